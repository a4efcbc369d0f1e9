"""ASHA over a sweep that is cut off and goes on."""

from typing import Any

from ray.tune.schedulers import ASHAScheduler


class LastingASHA(ASHAScheduler):
    """Knows again what trials scored before the sweep was cut off.

    Ray 2.60 restores a sweep's trials, not its scheduler: a trial would be compared with none that ended before. The
    last report of each therefore holds the scores of all its reports.
    """

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        for time, score in enumerate((trial.last_result or {}).get("scores", []), 1):
            self.on_trial_result(tune_controller, trial, {"training_iteration": time, "score": score})
