from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle
from ray.tune.experiment import Trial
from scipy import stats
from torch.nn.functional import cross_entropy

from plates.cluster import Node, Plan
from plates.config import TuneConfig, UserError
from plates.dataset import Dataset, Sample, SyntheticSource
from plates.head import HeadSettings, fit_heads
from plates.model import Weights
from plates.ray_private import lasting_asha
from plates.sweep import draw_schedules, training_trials
from plates.sweep.head_trials import HeadSweep, score_schedule
from plates.sweep.scores import make_folds, paired_difference, summarize, tabulate_trials
from plates.sweep.tuner import state_of
from plates.train_loop.task import Task, Trained, task_key
from plates.transforms import Preprocessing

CONFIG = TuneConfig(epochs=5, folds=3, cv_repeats=2, num_trials=6)
SAMPLES = [Sample(f"train/{i}.jpg", i % 2) for i in range(16)]


def make_sweep() -> HeadSweep:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([sample.label for sample in SAMPLES])
    val = torch.randn(16, 6, generator=generator) + labels[:, None] * 0.8
    train = val + 0.1 * torch.randn(5, 16, 6, generator=generator)
    initial = (torch.zeros(2, 6), torch.zeros(2))
    return HeadSweep(train, val, labels, initial, make_folds(SAMPLES, CONFIG), draw_schedules(CONFIG), CONFIG)


def test_the_schedule_asked_for_is_trial_0_and_the_others_lie_in_range():
    schedules = draw_schedules(TuneConfig(num_trials=200))
    assert schedules[0] == {"lr": 1e-3, "step_size": 7, "gamma": 0.1}, "by default the published one"
    asked = draw_schedules(TuneConfig(num_trials=200, lr=0.02, step_size=3, gamma=0.5))
    assert asked == [{"lr": 0.02, "step_size": 3, "gamma": 0.5}, *schedules[1:]]
    assert len(schedules) == 200
    assert all(1e-4 <= s["lr"] <= 3e-2 and 1 <= s["step_size"] <= 100 and 0 < s["gamma"] <= 1 for s in schedules)
    assert schedules == draw_schedules(TuneConfig(num_trials=200))
    assert np.median([s["lr"] for s in schedules]) < 5e-3, "lr is drawn log-uniformly"


def test_every_image_is_held_out_once_a_repeat_and_never_trained_on_there():
    folds = make_folds(SAMPLES, CONFIG)
    assert len(folds.repeated) == 6
    for repeat in range(2):
        held = np.concatenate([b for _, b in folds.repeated[repeat * 3 : repeat * 3 + 3]])
        assert sorted(held) == list(range(16))
    assert all(not set(a) & set(b) for a, b in folds.repeated)
    for (rest, held), inner in folds.nested:
        for a, b in inner:
            assert sorted([*a, *b]) == sorted(rest)
            assert not (set(a) | set(b)) & set(held)


def test_too_many_folds_are_refused():
    with pytest.raises(UserError, match="--folds 8: the smallest class has 8 images"):
        make_folds(SAMPLES, TuneConfig(folds=8))


def test_a_score_is_what_plain_heads_give_fold_by_fold():
    sweep = make_sweep()
    schedule = sweep.schedules[1]
    result = score_schedule(sweep, schedule)
    losses = torch.zeros(2, 16)
    for index, (train, held) in enumerate(sweep.folds.repeated):
        heads = fit_heads(
            sweep.train, sweep.labels, [HeadSettings(**schedule, indices=train.tolist())], sweep.initial,
            epochs=5, global_batch_size=8, seed=0,
        )  # fmt: skip
        logits = heads.logits(sweep.val)[0][held]
        losses[index // 3, held] = cross_entropy(logits, sweep.labels[held], reduction="none")
    assert result["log_loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
    assert result["image_log_losses"] == pytest.approx(losses.mean(0).tolist(), abs=1e-5)
    assert len(result["fold_log_losses"]) == 6
    assert sum(len(losses) for losses, _ in result["nested_outer"]) == 16


def test_the_winner_is_the_best_by_log_loss_and_its_equals_are_marked():
    sweep = make_sweep()
    results = [score_schedule(sweep, schedule) for schedule in sweep.schedules]
    trials = tabulate_trials(results, sweep.schedules)
    assert trials.loc[trials["is_winner"], "log_loss"].item() == trials["log_loss"].min()
    assert trials["is_baseline"].tolist() == [True] + [False] * 5
    assert not trials.loc[trials["is_winner"], "is_distinguishable"].item()
    figures = summarize(results, sweep.schedules, trials)
    assert figures["gain/log_loss"] == pytest.approx(figures["baseline/log_loss"] - figures["winner/log_loss"])
    assert figures["gain/log_loss_low"] <= figures["gain/log_loss"] <= figures["gain/log_loss_high"]


def test_nested_cross_validation_scores_outside_what_was_chosen_inside():
    """Two made-up trials: each is best inside one outer fold; the estimate takes its outer loss there."""
    common = {
        "accuracy": 0.5,
        "repeat_log_losses": [1.0, 1.0],
        "fold_log_losses": [1.0],
        "image_log_losses": [1.0, 1.1],
    }
    one = {**common, "log_loss": 1.0, "nested_inner": [0.1, 0.9], "nested_outer": [([5.0], [1.0]), ([7.0], [0.0])]}
    two = {**common, "log_loss": 2.0, "nested_inner": [0.9, 0.1], "nested_outer": [([6.0], [0.0]), ([8.0], [1.0])]}
    schedules = draw_schedules(replace(CONFIG, num_trials=2))
    figures = summarize([one, two], schedules, tabulate_trials([one, two], schedules))
    assert figures["nested/log_loss"] == pytest.approx((5.0 + 8.0) / 2)
    assert figures["nested/accuracy"] == 1.0


def test_a_paired_difference_covers_zero_only_where_noise_does():
    base = np.linspace(0, 1, 50)
    mean, low, high = paired_difference(base, base + 0.1 + 0.001 * np.sin(np.arange(50)))
    assert low > 0
    assert low < mean < high
    _, low, high = paired_difference(base, base + np.sin(np.arange(50)))
    assert low < 0 < high


def made_up(log_loss: float, image_losses: list[float], **changes: Any) -> dict[str, Any]:
    """A trial's result, with one outer fold that holds out all images."""
    return {
        "log_loss": log_loss, "accuracy": 0.5, "fold_log_losses": [log_loss], "repeat_log_losses": [log_loss] * 2,
        "image_log_losses": image_losses, "nested_inner": [log_loss], "nested_outer": [(image_losses, [1.0] * 4)],
        **changes,
    }  # fmt: skip


def test_a_diverged_fold_is_infinitely_bad_for_a_trial_of_heads():
    sweep = make_sweep()
    val = sweep.val.clone()
    val[3] = float("nan")  # as after weights that overflowed, in the folds that hold out this image alone
    result = score_schedule(replace(sweep, val=val), sweep.schedules[0])
    assert result["log_loss"] == float("inf")
    assert result["repeat_log_losses"] == [float("inf")] * 2
    assert sorted(np.isinf(result["fold_log_losses"]).tolist()) == [False] * 4 + [True] * 2
    assert result["nested_inner"].count(float("inf")) == 2, "in the inner folds of all outer ones but its own"
    assert result["accuracy"] <= 15 / 16, "no prediction of a diverged head is right"


def test_a_diverged_trial_neither_wins_nor_hides_what_the_others_show():
    good, better = made_up(0.5, [0.4, 0.5, 0.5, 0.6]), made_up(0.4, [0.3, 0.4, 0.4, 0.5])
    diverged = made_up(float("inf"), [0.1, 0.1, 0.1, float("inf")])
    schedules = draw_schedules(replace(CONFIG, num_trials=3))
    for results, winner in (([diverged, good, better], 2), ([good, better, diverged], 1)):
        trials = tabulate_trials(results, schedules)
        assert trials["is_winner"].tolist().index(True) == winner
        diverged_row = trials[np.isinf(trials["log_loss"])].iloc[0]
        assert diverged_row["is_distinguishable"]
        figures = summarize(results, schedules, trials)
        assert figures["nested/log_loss"] == pytest.approx(0.4)
    assert summarize([diverged, good, better], schedules, tabulate_trials([diverged, good, better], schedules))[
        "gain/log_loss"
    ] == float("inf")


def test_where_every_trial_diverged_the_baseline_stays():
    diverged = [made_up(float("inf"), [float("inf")] * 4) for _ in range(2)]
    trials = tabulate_trials(diverged, draw_schedules(replace(CONFIG, num_trials=2)))
    assert trials["is_winner"].tolist() == [True, False]
    assert trials["is_distinguishable"].tolist() == [False, False]


def train_fold(val_logits: list[torch.Tensor]) -> Any:
    """Stands for a Ray Train run: the validation logits of the folds, in turn."""
    return lambda loop, task, plan: Trained(
        {}, [], val_logits.pop(0), [], has_reused_features=False, num_skipped_steps=0
    )


def make_task(run: Path, config: TuneConfig = CONFIG) -> Task:
    samples = tuple(SAMPLES)
    dataset = Dataset(SyntheticSource(0), ("a", "b"), samples, samples, ())
    weights = Weights("resnet18", {"layer": torch.ones(2)}, "file", "asked for")
    digests = {sample.path: str(i) for i, sample in enumerate(samples)}
    return Task(
        config,
        dataset,
        weights,
        Preprocessing(image_size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        "fp32",
        digests,
        run,
        run,
        0.0,
    )


def test_a_diverged_fold_is_infinitely_bad_for_a_trial_that_trains_the_trunk(tmp_path, monkeypatch):
    task = make_task(tmp_path, replace(CONFIG, folds=2, cv_repeats=2))
    folds = make_folds(task.dataset.train, task.config)
    good = torch.tensor([[9.0, 0.0], [0.0, 9.0]] * 4)
    monkeypatch.setattr(training_trials, "run_loop", train_fold([good, good * float("nan"), good, good]))
    monkeypatch.setattr(training_trials, "labels_of", lambda samples: torch.tensor([0, 1] * 4))
    plan = Plan(1, "cpu", 1, "")
    results = list(training_trials.score_folds(task, folds, {"lr": 1.0}, plan, tmp_path / "state"))
    assert [len(result["fold_log_losses"]) for result in results] == [1, 2, 3, 4]
    assert np.isfinite(results[0]["log_loss"])
    assert [result["log_loss"] for result in results[1:]] == [float("inf")] * 3
    assert np.isfinite(results[-1]["repeat_log_losses"]).tolist() == [False, True]
    assert results[-1]["accuracy"] == pytest.approx(0.75)


def test_intervals_use_the_t_distribution_and_the_comparison_covers_the_selection():
    repeats = [0.5, 0.6, 0.55, 0.65]
    base = made_up(0.575, [0.5, 0.6, 0.7, 0.5], repeat_log_losses=repeats)
    # Worse by a mean of 0.1 with a standard error of 0.0289: beyond t of one comparison, within that of many.
    worse = made_up(0.675, [0.55, 0.75, 0.75, 0.65])
    schedules = draw_schedules(replace(CONFIG, num_trials=40))
    trials = tabulate_trials([base, worse], schedules[:2])
    half = stats.t.ppf(0.975, 3) * np.std(repeats, ddof=1) / 2
    assert trials.at[0, "log_loss_high"] == pytest.approx(0.575 + half)
    assert trials.at[0, "log_loss_low"] == pytest.approx(0.575 - half)
    assert trials["is_distinguishable"].tolist() == [False, True]
    many = tabulate_trials([base, *[worse] * 39], schedules)
    assert not many["is_distinguishable"].any()


def test_nested_folds_give_the_gain_of_choosing_free_of_selection():
    """Trial 1 is chosen inside; outside it is better than the baseline by 0.1 on average, whatever it was inside."""
    base = made_up(1.0, [1.0, 1.1, 1.2, 1.3])
    chosen = made_up(0.2, [0.2] * 4, nested_outer=[([0.9, 0.9, 1.1, 1.3], [1.0] * 4)])
    schedules = draw_schedules(replace(CONFIG, num_trials=2))
    figures = summarize([base, chosen], schedules, tabulate_trials([base, chosen], schedules))
    assert figures["nested/gain"] == pytest.approx(0.1)
    half = stats.t.ppf(0.975, 3) * np.std([0.1, 0.2, 0.1, 0.0], ddof=1) / 2
    assert figures["nested/gain_low"] == pytest.approx(0.1 - half)
    assert figures["nested/gain_high"] == pytest.approx(0.1 + half)


def test_the_highest_seed_makes_folds():
    folds = make_folds(SAMPLES, replace(CONFIG, seed=2**32 - 1))
    assert len(folds.nested) == 3


def test_the_state_of_a_sweep_is_that_of_the_same_images_labels_weights_and_settings(tmp_path):
    task = make_task(tmp_path)
    key = task_key(task)
    relabelled = tuple(replace(sample, label=1 - (sample.label or 0)) for sample in SAMPLES)
    for change in (
        {"dataset": replace(task.dataset, train=relabelled)},
        {"digests": {**task.digests, "train/0.jpg": "other"}},
        {"weights": replace(task.weights, state={"layer": torch.zeros(2)})},
        {"weights": replace(task.weights, backbone="efficientnet_lite0")},
        {"preprocessing": replace(task.preprocessing, image_size=96)},
        {"config": replace(CONFIG, folds=4)},
    ):
        assert task_key(replace(task, **change)) != key, change
    for config in (
        replace(CONFIG, out="elsewhere"),
        replace(CONFIG, data="./synthetic"),
        replace(CONFIG, device="cpu"),
    ):
        assert task_key(replace(task, config=config)) == key


def test_state_of_other_images_is_removed_and_that_of_the_same_is_kept(tmp_path, capsys):
    task = make_task(tmp_path)
    state = state_of(task)
    state.mkdir(parents=True)
    (state / "tuner.pkl").write_bytes(b"trials")
    assert state_of(replace(task, config=replace(CONFIG, out=str(tmp_path)))) == state
    assert (state / "tuner.pkl").exists()
    assert capsys.readouterr().out == ""
    other = state_of(replace(task, digests={**task.digests, "train/0.jpg": "other"}))
    assert other != state
    assert not state.exists()
    assert "starting again" in capsys.readouterr().out


def test_a_folds_state_is_gone_once_its_score_is_known_and_the_score_is_not_computed_again(tmp_path, monkeypatch):
    task = make_task(tmp_path, replace(CONFIG, folds=2, cv_repeats=1))
    folds = make_folds(task.dataset.train, task.config)
    state, plan = tmp_path / "state", Plan(1, "cpu", 1, "")
    logits = torch.tensor([[9.0, 0.0], [0.0, 3.0]] * 4)

    def train_and_store(loop, fold, plan):
        fold.run.mkdir(parents=True)
        (fold.run / "large").write_bytes(b"state")
        return train_fold([logits])(loop, fold, plan)

    monkeypatch.setattr(training_trials, "run_loop", train_and_store)
    whole = []
    for result in training_trials.score_folds(task, folds, {"lr": 1.0}, plan, state):
        assert not list(tmp_path.glob("**/large")), "before the score is reported: a stopped trial is not resumed"
        whole.append(result)
    monkeypatch.setattr(training_trials, "run_loop", train_fold([]))
    assert list(training_trials.score_folds(task, folds, {"lr": 1.0}, plan, state)) == whole


@pytest.mark.parametrize(
    ("device", "nodes", "flags", "expected"),
    [
        ("cpu", [(64, 0)], {}, (1, 2, 32)),
        ("cpu", [(64, 0)], {"num_trials": 4}, (1, 16, 4)),
        ("cpu", [(64, 0)], {"num_workers": 4}, (4, 2, 8)),
        ("cpu", [(64, 0)], {"cpus_per_worker": 1}, (1, 1, 64)),
        ("cpu", [(64, 0)], {"cpus_per_worker": 24}, (1, 24, 2)),
        ("cpu", [(16, 0), (8, 0)], {}, (1, 2, 12)),
        ("cpu", [(16, 0), (8, 0)], {"num_trials": 3}, (1, 8, 3)),
        ("cpu", [(3, 0), (3, 0)], {}, (1, 3, 2)),
        ("cpu", [(2, 0)], {}, (1, 2, 1)),
        ("cpu", [(2, 0)], {"num_workers": 2}, (2, 1, 1)),
        ("cpu", [(2, 0)], {"cpus_per_worker": 1}, (1, 1, 2)),
        ("cpu", [(1, 0)], {}, (1, 1, 1)),
        ("cuda", [(16, 4)], {}, (1, 4, 4)),
        ("cuda", [(16, 4)], {"num_workers": 2}, (2, 4, 2)),
        ("cuda", [(16, 4)], {"cpus_per_worker": 6}, (1, 6, 2)),
        ("cuda", [(8, 8)], {}, (1, 1, 8)),
        ("cuda", [(16, 4), (32, 0)], {}, (1, 4, 4)),
    ],
)
def test_as_many_trials_run_at_a_time_as_find_room(device, nodes, flags, expected):
    """(Ray workers of a trial, CPUs of each, trials at a time); there are 64 trials unless told."""
    config = TuneConfig(**flags)
    plan = Plan(0 if config.num_workers == "auto" else config.num_workers, device, 1, "")
    packed, num_concurrent = training_trials.pack_trials(plan, config, [Node(*node) for node in nodes])
    assert (packed.num_workers, packed.cpus_per_worker, num_concurrent) == expected


def test_a_trial_is_one_worker_also_where_the_job_has_one_on_each_node():
    packed, num_concurrent = training_trials.pack_trials(Plan(2, "cpu", 8, ""), TuneConfig(), [Node(8, 0)] * 2)
    assert (packed.num_workers, packed.cpus_per_worker, num_concurrent) == (1, 2, 8)


def test_more_cpus_for_a_trial_than_there_are_is_one_line():
    with pytest.raises(UserError, match="--cpus-per-worker 9"):
        training_trials.pack_trials(Plan(0, "cpu", 8, ""), TuneConfig(cpus_per_worker=9), [Node(8, 0)])


@pytest.mark.parametrize(("score", "decision"), [(0.9, "STOP"), (0.3, "CONTINUE")])
def test_asha_compares_with_trials_that_ended_before_the_sweep_was_cut_off(score, decision):
    scheduler = lasting_asha(metric="score", mode="min", max_t=4, grace_period=2, reduction_factor=2)
    scheduler = cloudpickle.loads(cloudpickle.dumps(scheduler))  # as Tune keeps it for a sweep that is cut off
    trials = [Trial("trial", stub=True) for _ in range(3)]
    trials[0].update_last_result({"training_iteration": 4, "score": 0.5, "scores": [0.7, 0.6, 0.5, 0.5]})
    trials[1].update_last_result({"training_iteration": 2, "score": 0.8, "scores": [0.8, 0.8]})
    for trial in trials:
        scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, trials[2], {"training_iteration": 1, "score": 5.0}) == "CONTINUE"
    assert scheduler.on_trial_result(None, trials[2], {"training_iteration": 2, "score": score}) == decision
