"""The only place that builds a Tuner."""

from typing import Any

from plates.storage import Place, remove_tree
from plates.train_loop.task import Task, task_key

STATE_FOLDER = ".ray_tune"  # of a sweep at work inside the run directory, gone when the run is finished


def state_of(task: Task, num_trials: int) -> Place:
    """The folder of what this sweep has computed. That of other images, labels, weights, settings or passes of the
    trunk is removed."""
    state = task.run / STATE_FOLDER / f"{task_key(task)[:16]}-{num_trials}"
    if state.parent.exists() and not state.exists():
        print("the trials computed before are of other images, weights or passes: starting again", flush=True)
        remove_tree(state.parent)
    return state


def tune_all(
    trainable: Any, num_trials: int, state: Place, *, callbacks: list[Any] | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Runs trials {"index": 0…} by Tune, or resumes them from `state`, and gives their last reports in trial order.

    Raises: RuntimeError naming the first failed trial's error.
    """
    from ray import tune

    space = {"index": tune.grid_search(list(range(num_trials)))}
    if tune.Tuner.can_restore(str(state)):
        tuner = tune.Tuner.restore(str(state), trainable, restart_errored=True, param_space=space)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(**options),
            run_config=tune.RunConfig(
                name=state.name,
                storage_path=str(state.parent),
                callbacks=callbacks,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )
    grid = tuner.fit()
    if grid.errors:
        raise RuntimeError(f"a trial of the sweep failed: {grid.errors[0]}")
    return sorted((result.metrics or {} for result in grid), key=lambda metrics: metrics["index"])
