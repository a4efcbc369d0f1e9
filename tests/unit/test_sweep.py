from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_trials import CONFIG, SAMPLES
from ray import cloudpickle
from ray.tune.experiment import Trial
from torch.nn.functional import one_hot

from plates.cluster import Node, Plan
from plates.config import TuneConfig, UserError
from plates.dataset import Dataset, Samples
from plates.model import Weights
from plates.ray_private import lasting_asha
from plates.sources import SyntheticSource
from plates.sweep import draw_schedules, training_trials
from plates.sweep.scores import make_folds
from plates.sweep.tuner import state_of
from plates.train_loop.task import Predicted, Task, Trained, task_key
from plates.transforms import Preprocessing


def test_the_schedule_asked_for_is_trial_0_and_the_others_lie_in_range():
    schedules = draw_schedules(TuneConfig(num_trials=200))
    assert schedules[0] == {"lr": 1e-3, "step_size": 7, "gamma": 0.1}, "by default the published one"
    asked = draw_schedules(TuneConfig(num_trials=200, lr=0.02, step_size=3, gamma=0.5))
    assert asked == [{"lr": 0.02, "step_size": 3, "gamma": 0.5}, *schedules[1:]]
    assert len(schedules) == 200
    assert all(1e-4 <= s["lr"] <= 3e-2 and 1 <= s["step_size"] <= 100 and 0 < s["gamma"] <= 1 for s in schedules)
    assert schedules == draw_schedules(TuneConfig(num_trials=200))
    assert np.median([s["lr"] for s in schedules]) < 5e-3, "lr is drawn log-uniformly"


def train_fold(factors: list[float]) -> Any:
    """Stands for a Ray Train run: validation logits that are right, times a factor, of the folds in turn."""
    return lambda loop, task, plan: Trained(
        {},
        [],
        one_hot(task.dataset.val.labels, 2) * 9 * factors.pop(0),
        Predicted(torch.empty(0, 2), {}, []),
        has_reused_features=False,
        figures={},
    )


def make_task(run: Path, config: TuneConfig = CONFIG) -> Task:
    samples = SAMPLES.with_digests([bytes([i] * 32) for i in range(len(SAMPLES))])
    dataset = Dataset(SyntheticSource(0), ("a", "b"), samples, samples, Samples.of())
    weights = Weights("resnet18", {"layer": torch.ones(2)}, "file", "asked for")
    return Task(
        config,
        dataset,
        weights,
        Preprocessing(image_size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        "fp32",
        run,
        run,
        0.0,
        (0.5, 3.0),
    )


def with_another_image(dataset: Dataset) -> Dataset:
    """Of the same path."""
    digests = dataset.train.table["digest"].to_pylist()
    return replace(dataset, train=dataset.train.with_digests([b"x" * 32, *digests[1:]]))


def test_a_diverged_fold_is_infinitely_bad_for_a_trial_that_trains_the_trunk(tmp_path, monkeypatch):
    task = make_task(tmp_path, replace(CONFIG, folds=2, cv_repeats=2))
    folds = make_folds(task.dataset.train, task.config)
    monkeypatch.setattr(training_trials, "run_loop", train_fold([1.0, float("nan"), 1.0, 1.0]))
    plan = Plan(1, "cpu", 1, "")
    results = list(training_trials.score_folds(task, folds, {"lr": 1.0}, plan, tmp_path / "state"))
    assert [len(result.fold_log_losses) for result in results] == [1, 2, 3, 4]
    assert np.isfinite(results[0].log_loss)
    assert [result.log_loss for result in results[1:]] == [float("inf")] * 3
    assert np.isfinite(results[-1].repeat_log_losses).tolist() == [False, True]
    assert results[-1].accuracy == pytest.approx(0.75)


def test_the_state_of_a_sweep_is_that_of_the_same_images_labels_weights_and_settings(tmp_path):
    task = make_task(tmp_path)
    key = task_key(task)
    train = task.dataset.train
    relabelled = Samples.of(train.table["path"].to_pylist(), (1 - train.labels).tolist())
    relabelled = relabelled.with_digests(train.table["digest"].to_pylist())
    for change in (
        {"dataset": replace(task.dataset, train=relabelled)},
        {"dataset": with_another_image(task.dataset)},
        {"weights": replace(task.weights, state={"layer": torch.zeros(2)})},
        {"weights": replace(task.weights, backbone="efficientnet_lite0")},
        {"preprocessing": replace(task.preprocessing, image_size=96)},
        {"config": replace(CONFIG, folds=4)},
        {"class_weights": (0.5, 2.0)},
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
    state = state_of(task, 6)
    state.mkdir(parents=True)
    (state / "tuner.pkl").write_bytes(b"trials")
    assert state_of(replace(task, config=replace(CONFIG, out=str(tmp_path))), 6) == state
    assert (state / "tuner.pkl").exists()
    assert capsys.readouterr().out == ""
    other = state_of(replace(task, dataset=with_another_image(task.dataset)), 6)
    assert other != state
    assert not state.exists()
    assert "starting again" in capsys.readouterr().out


def test_a_folds_state_is_gone_once_its_score_is_known_and_the_score_is_not_computed_again(tmp_path, monkeypatch):
    task = make_task(tmp_path, replace(CONFIG, folds=2, cv_repeats=1))
    folds = make_folds(task.dataset.train, task.config)
    state, plan = tmp_path / "state", Plan(1, "cpu", 1, "")

    def train_and_store(loop, fold, plan):
        fold.run.mkdir(parents=True)
        (fold.run / "large").write_bytes(b"state")
        assert fold.class_weights == task.class_weights, "those of all images"
        return train_fold([1.0])(loop, fold, plan)

    monkeypatch.setattr(training_trials, "run_loop", train_and_store)
    whole = []
    for result in training_trials.score_folds(task, folds, {"lr": 1.0}, plan, state):
        assert not list(tmp_path.glob("**/large")), "before the score is reported: a stopped trial is not resumed"
        whole.append(result)
    monkeypatch.setattr(training_trials, "run_loop", train_fold([]))
    again = list(training_trials.score_folds(task, folds, {"lr": 1.0}, plan, state))
    assert repr(again) == repr(whole)  # NaN, of what the first fold did not hold out, is not its own equal


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
