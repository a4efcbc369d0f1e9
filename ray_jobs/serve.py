"""Predict images that are sent over HTTP, from a checkpoint, on Ray Serve, until it is stopped."""

import sys
from functools import partial
from importlib.util import find_spec

from plates.command import run_job
from plates.config import EXIT_OK, PredictConfig, UserError
from plates.tool_config import ServeConfig

PACKAGES = ("fastapi", "starlette", "uvicorn", "python_multipart")  # those of the extra that nothing else brings


def serve(config: ServeConfig) -> int:
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(f"{', '.join(missing)} is missing: pip install '.[serve]'")
    # Imported here, so that --help and a mistaken flag answer at once: torch alone takes seconds.
    from plates.checkpoint import load_bundle, rebuild_model
    from plates.job import settings_of
    from plates.serve.server import run_server
    from plates.storage import place_of

    bundle = load_bundle(place_of("--checkpoint", config.checkpoint))
    rebuild_model(bundle)  # refuses tensors that do not fit before anything is started
    run_server(bundle, settings_of(bundle, PredictConfig(checkpoint=config.checkpoint)), config)
    return EXIT_OK


main = partial(run_job, serve, ServeConfig, "plates serve")

if __name__ == "__main__":
    sys.exit(main())
