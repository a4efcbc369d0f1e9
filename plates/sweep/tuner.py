"""The only place that builds a Tuner."""

from typing import Any

from plates.storage import Place

STATE_FOLDER = ".ray_tune"  # Tune's own bookkeeping inside the run directory, gone when the sweep is done


def tune_all(
    trainable: Any, num_trials: int, run: Place, *, callbacks: list[Any] | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Runs trials {"index": 0…} by Tune, or resumes them, and returns their last results in trial order.

    Raises: RuntimeError naming the first failed trial's error.
    """
    from ray import tune

    folder = run / STATE_FOLDER
    space = {"index": tune.grid_search(list(range(num_trials)))}
    if tune.Tuner.can_restore(str(folder)):
        tuner = tune.Tuner.restore(str(folder), trainable, restart_errored=True, param_space=space)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(**options),
            run_config=tune.RunConfig(
                name=STATE_FOLDER,
                storage_path=str(run),
                callbacks=callbacks,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )
    grid = tuner.fit()
    if grid.errors:
        raise RuntimeError(f"a trial of the sweep failed: {grid.errors[0]}")
    return sorted((result.metrics or {} for result in grid), key=lambda metrics: metrics["index"])
