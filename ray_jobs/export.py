"""One file of a model and its preprocessing, for ONNX Runtime or torch without this package; or a folder for timm."""

import sys
from functools import partial

from plates.command import run_job
from plates.config import EXIT_FAILED, EXIT_OK, UserError
from plates.tool_config import ExportConfig

DEFAULT_NAMES = {"onnx": "model.onnx", "torch": "model.pt2", "timm": "timm"}


def export(config: ExportConfig) -> int:
    # Imported here, so that --help and a mistaken flag answer at once: torch alone takes seconds.
    from plates.checkpoint import load_bundle, rebuild_model
    from plates.export.check import MismatchError
    from plates.export.files import write_file
    from plates.export.timm_folder import write_timm
    from plates.storage import place_of

    checkpoint = place_of("--checkpoint", config.checkpoint)
    bundle = load_bundle(checkpoint)
    model = rebuild_model(bundle)
    out = place_of("--out", config.out) if config.out else checkpoint / DEFAULT_NAMES[config.format]
    try:
        if config.format == "timm":
            difference = write_timm(out, bundle, model)
        else:
            difference = write_file(out, config.format, bundle, model, checkpoint)
    except MismatchError as error:
        print(f"plates export: {out} was not written: {error}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from error
    if (num_views := bundle.info.get("tta", 1)) > 1:
        print(f"of the {num_views} views that the run's predictions average, it sees one: the image as it is")
    print(f"{out}: its probabilities are the checkpoint's to {difference}")
    return EXIT_OK


main = partial(run_job, export, ExportConfig, "plates export")

if __name__ == "__main__":
    sys.exit(main())
