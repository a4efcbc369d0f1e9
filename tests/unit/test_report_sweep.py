import re
from pathlib import Path

import numpy as np
import pandas as pd
from made_up_trials import made_up
from report_runs import write_page

from plates.config import TuneConfig
from plates.report import summary_table
from plates.rundir import write_json
from plates.sweep import draw_schedules
from plates.sweep.scores import summarize, tabulate_trials


def make_sweep(run: Path, losses: list[float], num_folds: list[int] | None = None, has_nested: bool = True) -> str:
    """Files of a sweep of which trial 0, the baseline, may have diverged; its report."""
    run.mkdir()
    schedules = draw_schedules(TuneConfig(num_trials=len(losses), lr=0.5))
    results = []
    for loss, count in zip(losses, num_folds or [2] * len(losses), strict=True):
        changes = {} if has_nested else {"nested_inner": [], "nested_outer": []}
        images = [loss - 0.1, loss, loss, loss + 0.1]
        results.append(made_up(loss, images, fold_log_losses=[loss] * count, **changes))
    trials = tabulate_trials(results, schedules)
    trials.to_csv(run / "trials.csv", index=False)
    write_json(run / "metrics.json", summarize(results, schedules, trials))
    history = pd.DataFrame({"epoch": [0, 1], "train/loss": [0.7, 0.5]})
    history.to_csv(run / "history.csv", index=False)
    history.assign(**{"train/loss": np.nan}).to_csv(run / "history_baseline.csv", index=False)
    return " ".join(re.sub(r"<[^>]*>", " ", write_page(run, views=0).split("<body>")[1]).split())


def test_a_diverged_trial_is_called_so(tmp_path: Path) -> None:
    text = make_sweep(tmp_path / "run", [np.inf, 0.6, 0.4])
    assert "The baseline (lr 0.5, step_size 7, gamma 0.1) has diverged" in text
    assert "Trial 2 has the lowest cross-validated log-loss of 3: 0.4000" in text
    assert "gain" not in text.split("The baseline")[1].split("own figures")[0]
    assert not re.search(r"\b(inf|nan|None)\b", text)


def test_a_sweep_whose_trials_all_diverged_has_a_page(tmp_path: Path) -> None:
    text = make_sweep(tmp_path / "run", [np.inf, np.inf])
    assert "Trial 0 has the lowest cross-validated log-loss of 2: diverged" in text
    assert not re.search(r"\b(inf|nan|None)\b", text)


def test_the_page_says_what_each_interval_covers(tmp_path: Path) -> None:
    text = make_sweep(tmp_path / "run", [0.5, 0.6, 0.4])
    assert "The winner gains 0.1000 , 95% interval 0.1000 to 0.1000, which holds for all trials at once" in text
    assert "a gain over the baseline of 0.1000 (95% interval" in text
    assert "it covers the noise of drawing the folds" in text
    assert "published schedule" not in text


def test_a_winner_without_a_nested_estimate_is_called_optimistic_and_stopped_trials_no_candidates(tmp_path) -> None:
    """Of trials that train the trunk: the second was stopped after one fold, at a loss below the winner's."""
    text = make_sweep(tmp_path / "run", [0.5, 0.3, 0.4], num_folds=[2, 1, 2], has_nested=False)
    assert "Trial 2 has the lowest cross-validated log-loss of 3, 1 of which were stopped early" in text
    assert "stopped after 1 folds" in text
    doubt = "As the best of 3 noisy scores the winner's own figures are optimistic, and there is no nested estimate"
    assert doubt in text.replace("&#39;", "'")
    terminal = " ".join(summary_table(tmp_path / "run").split())
    assert "The sweep's winner is trial 2 of 3: log-loss 0.4000, the baseline's 0.5000." in terminal
    assert doubt in terminal


def test_the_terminal_tells_the_nested_estimate(tmp_path) -> None:
    make_sweep(tmp_path / "run", [0.5, 0.6, 0.4])
    terminal = " ".join(summary_table(tmp_path / "run").split())
    assert "figures are optimistic; nested cross-validation" in terminal
    assert "a log-loss of 0.4000, an accuracy of 100.0% and a gain over the baseline of 0.1000" in terminal
