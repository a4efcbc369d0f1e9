"""A search of all on small drawings: its passes, its budget, and the winner made whole."""

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from plates import logistic
from plates.config import TuneConfig
from plates.dataset import Samples, check_dataset, load_dataset
from plates.head import HeadSettings
from plates.logistic import fit_logistic, solve_fold, temperature
from plates.model import preprocessing_of
from plates.readouts import readouts_to_search
from plates.sources import SyntheticSource
from plates.sweep import readout_trials, search
from plates.sweep.head_trials import HeadSweep, score_trial_of
from plates.sweep.readout_trials import Pass, score_readouts, time_trials
from plates.sweep.scores import draw_schedules, make_folds
from plates.sweep.search import find_columns, fit_winner, has_foreground, list_passes, make_passes
from plates.train_loop import build_model, compute_features, compute_passes
from plates.train_loop.group import Worker
from plates.train_loop.task import Task
from plates.trainer import make_task
from plates.weights import resolve_weights

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = Worker(0, 1, torch.device("cpu"), False, (1,))
CONFIG = TuneConfig(
    data="synthetic:12", backbone="resnet18", weights="none", image_size=32, epochs=2, num_views=2, num_trials=2,
    folds=2, cv_repeats=2, precision="fp32",
)  # fmt: skip


@pytest.fixture
def task(tmp_path) -> Task:
    """Of 12 labelled images, all of them in both splits as in a sweep."""
    dataset, _ = check_dataset(load_dataset(CONFIG.data, CONFIG.seed), False)
    paths = [sample.path for samples in (dataset.train, dataset.val) for sample in samples]
    labels = [sample.label for samples in (dataset.train, dataset.val) for sample in samples]
    digests = [dataset.source.digest(path) for path in paths]
    labelled = Samples.of(paths, labels).with_digests(digests)
    dataset = replace(dataset, train=labelled, val=labelled)
    weights = resolve_weights("resnet18", "none", 0)
    return make_task(CONFIG, dataset, weights, preprocessing_of("resnet18", 32), "fp32", tmp_path)


def test_passes_go_from_cheap_to_expensive(task):
    tasks, notes = list_passes(task)
    seen = [(one.preprocessing.image_size, one.preprocessing.crop) for one in tasks]
    assert seen == [(size, crop) for size in (32, 64) for crop in ("none", "foreground")]
    assert notes == []
    readout = "+".join(readouts_to_search(build_model(task).trunk, 32))
    for one, (size, crop) in zip(tasks, seen, strict=True):
        assert (one.config.image_size, one.config.crop, one.config.readout) == (size, crop, readout)
        assert [*one.config.train_views] == [-1, -2, -3, -4, -5, -6, -7, -8]
        assert one.config.eval_views == [-1]
        assert one.dataset is task.dataset
        assert one.config.seed == task.config.seed


@pytest.mark.parametrize(
    ("own", "sizes"),
    [(32, [32, 64]), (224, [224, 320, 448]), (300, [300, 416, 608]), (40, [40, 64]), (3000, [3000, 4096])],
)
def test_sizes_are_the_own_one_and_larger_ones_none_twice(task, own, sizes, monkeypatch):
    monkeypatch.setattr(search, "readouts_to_search", lambda *_: ["last/avg"])  # seconds of large pictures
    monkeypatch.setattr(search, "has_foreground", lambda _: True)
    config = replace(CONFIG, image_size=own)
    other = replace(task, config=config, preprocessing=replace(task.preprocessing, image_size=own))
    found, _ = list_passes(other)
    assert [one.preprocessing.image_size for one in found][::2] == sizes


@pytest.mark.parametrize(("num_images", "num_views"), [(12, 8), (300, 6), (2000, 1), (5000, 1)])
def test_many_images_have_fewer_views(task, num_images, num_views, monkeypatch):
    monkeypatch.setattr(search, "has_foreground", lambda _: True)
    many = task.dataset.train.take([index % 12 for index in range(num_images)])
    found, _ = list_passes(replace(task, dataset=replace(task.dataset, train=many)))
    assert {len(one.config.train_views) for one in found} == {num_views}


def test_a_foreground_is_looked_for_before_it_is_tried(task, monkeypatch):
    source = SyntheticSource(0)
    assert has_foreground(task), "some drawings are cut out"
    wood = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(SyntheticSource, "read", lambda *_: wood)
    assert task.dataset.source == source
    assert not has_foreground(task)
    tasks, notes = list_passes(task)
    assert {one.preprocessing.crop for one in tasks} == {"none"}
    assert notes == ["--crop foreground was not tried: no background is plain"]


def test_a_trunk_of_one_size_is_tried_at_it_alone(task):
    weights = resolve_weights("timm/test_vit", "none", 0)
    config = replace(CONFIG, backbone="timm/test_vit", image_size=160)
    vit = replace(task, config=config, weights=weights, preprocessing=preprocessing_of("timm/test_vit", 160))
    tasks, notes = list_passes(vit)
    assert [one.preprocessing.image_size for one in tasks] == [160, 160]
    assert notes == ["other sizes than 160 px were not tried: the backbone is built for it"]
    assert "last/token" in tasks[0].config.readout


@pytest.mark.parametrize(("left_s", "are_computed"), [(-1.0, [False] * 4), (1e6, [True] * 4)])
def test_a_pass_that_cannot_be_done_in_time_is_left_out_and_named(task, left_s, are_computed):
    tasks, notes = list_passes(task)
    timed = []
    found = compute_passes(
        tasks, time.time() + left_s, lambda features: timed.append(features) or {1: 2.0}, task, HERE
    )
    assert found is not None
    assert [features is not None for features in found.of_passes] == are_computed
    passes = make_passes(tasks, found.of_passes, find_columns(task, tasks[0].config.readout), notes)
    assert (len(passes), len(notes)) == (sum(are_computed), 4 - sum(are_computed))
    expected = compute_features(task, HERE)
    assert expected is not None
    assert torch.equal(found.of_task.train, expected.train), "the baseline's, which is never left out"
    if not passes:
        assert notes[0] == "32 px, crop none: left out, it would not have been done within --budget-s"
        assert not timed
        return
    assert found.trial_s == {1: 2.0}
    assert torch.equal(timed[0], passes[0].features)
    assert len(timed) == 1
    assert [features.shape for features in found.of_passes if features is not None] == [
        (8, 12, 512 * 2 + 256 * 2)
    ] * 4
    plain = passes[0]
    assert plain.settings == {"image_size": 32, "crop": "none"}
    assert list(plain.columns) == ["last/avg", "last/max", "stage3/avg", "stage3/max"]
    # The first view of the pass of the task's own size is what validation sees.
    assert torch.equal(plain.features[0][:, plain.columns["last/avg"]], expected.val)


def test_the_budget_counts_what_is_predicted_afterwards(task):
    """A million images to predict leave no time, the same passes without them do."""
    tasks, _ = list_passes(task)
    deadline = time.time() + 300
    assert all(
        features is not None for features in compute_passes(tasks[:1], deadline, no_time, task, HERE).of_passes
    )
    many = Samples.of([f"test/{index}.png" for index in range(1_000_000)])
    late = [replace(one, dataset=replace(one.dataset, test=many)) for one in tasks[:1]]
    loaded = replace(task, dataset=replace(task.dataset, test=many))
    assert compute_passes(late, deadline, no_time, loaded, HERE).of_passes == [None]


def no_time(_: torch.Tensor) -> dict[int, float]:
    return {}


@pytest.mark.parametrize(
    ("trial_s", "threads", "num_computed"),
    [
        ({1: 40.0, 8: 160.0}, 1, 1),  # 400 s for the trials of two passes
        ({1: 40.0, 8: 160.0}, 2, 2),  # 300 s for those of three
        ({1: 0.0, 8: 301.0}, 8, 1),  # one that no number of threads would end
    ],
)
def test_the_budget_has_room_for_the_trials_of_what_is_computed(task, trial_s, threads, num_computed):
    tasks, _ = list_passes(task)
    worker = replace(HERE, threads=(threads,))
    found = compute_passes(tasks, time.time() + 250, lambda _: trial_s, task, worker).of_passes
    assert [features is not None for features in found] == [index < num_computed for index in range(4)]


def test_trials_are_timed_by_one_of_their_folds(task, monkeypatch):
    """On a clock that ticks with each head solved: two repeats of two folds, two outer ones with two inner each."""
    sweep, solved = make_sweep(task), []

    def solve(inputs, *arguments, **named):
        solved.append(len(inputs))
        return solve_fold(inputs, *arguments, **named)

    monkeypatch.setattr(logistic, "solve_fold", solve)
    monkeypatch.setattr(readout_trials, "time", SimpleNamespace(perf_counter=lambda: len(solved)))
    (found,) = sweep.passes
    columns, num_folds = list(found.columns.values()), 2 * 2 + 2 + 2 * 2
    read = (task.dataset.train.labels, sweep.class_weights, sweep.folds)
    assert time_trials(columns, *read, found.features) == {1: num_folds * 2, 3: num_folds * 2}
    assert solved == [6, 6, 18, 18], "half of the images of both readouts, of one view and of three"
    solved.clear()
    score_readouts(found, 3, *read, 1)
    assert len(solved) == num_folds * 2


def make_sweep(task: Task) -> HeadSweep:
    """On random features: two views of each image to train on, of nine columns, and a pass of three views."""
    generator = torch.Generator().manual_seed(0)
    labels = task.dataset.train.labels
    val = torch.randn(12, 9, generator=generator) + labels[:, None]
    train = val + 0.3 * torch.randn(2, 12, 9, generator=generator)
    features = val + 0.3 * torch.randn(3, 12, 9, generator=generator)
    found = Pass({"image_size": 32, "crop": "none"}, features, {"last/avg": slice(0, 4), "last/max": slice(4, 9)})
    initial = (torch.zeros(2, 9), torch.zeros(2))
    folds = make_folds(task.dataset.train, CONFIG)
    return HeadSweep(train, val, labels, initial, folds, draw_schedules(CONFIG), CONFIG, (0.4, 2.0), [found])


LOGISTIC = {"head": "logistic", "image_size": 32, "crop": "none", "num_views": 2, "readout": "last/max", "tta": 2,
            "strength": 0.3}  # fmt: skip


def test_a_trial_is_begun_where_one_of_its_kind_would_end_in_time(task):
    """The first of a kind where it is likely to; the baseline is always done."""
    sweep = replace(make_sweep(task), trial_s={1: 1.0, 3: 1e6}, deadline=time.time() + 100)
    baseline, one_view, three_views, schedule = range(4)
    seconds = {0: 1e6, 1: 1e6, 3: 1.0}
    assert len(score_trial_of(sweep, baseline, seconds)) == 1
    assert seconds[0] < 100
    assert score_trial_of(sweep, one_view, seconds) == []
    assert len(score_trial_of(sweep, three_views, seconds)) == 2
    assert seconds == {0: seconds[0], 1: 1e6, 3: seconds[3]}
    assert 0 < seconds[3] != 1.0
    assert len(score_trial_of(sweep, schedule, {})) == 1
    assert [len(score_trial_of(sweep, index, {})) for index in range(4)] == [1, 2, 0, 1]
    over = replace(sweep, deadline=time.time() - 1)
    assert [len(score_trial_of(over, index, {})) for index in range(4)] == [1, 0, 0, 0]


def check_calibrated(winner, raw_weight, raw_bias, labels):
    """Weight and bias are those of the fit over the temperature of all held-out logits."""
    heat = temperature(winner.held_out.flatten(0, 1), labels.repeat(len(winner.held_out)))
    assert winner.heat == pytest.approx(heat)
    assert winner.heat != pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(winner.weight, raw_weight / heat)
    torch.testing.assert_close(winner.bias, raw_bias / heat)
    losses = [float(cross_entropy(winner.held_out.flatten(0, 1) / t, labels.repeat(2))) for t in (heat, 1.0)]
    assert losses[0] < losses[1]


def test_a_logistic_winner_is_fitted_on_all_and_calibrated_on_what_was_held_out(task):
    sweep = make_sweep(task)
    winner = fit_winner(sweep, sweep.passes[0], LOGISTIC)
    features = sweep.passes[0].features[:2, :, 4:9]
    everything = torch.ones(1, 12, dtype=torch.bool)
    weight, bias = fit_logistic(features, sweep.labels, 2, everything, [0.3], (0.4, 2.0))
    check_calibrated(winner, weight[0, 0], bias[0, 0], sweep.labels)
    assert winner.held_out.shape == (2, 12, 2)
    for fold, (kept, held) in enumerate(sweep.folds.repeated):
        mask = torch.zeros(1, 12, dtype=torch.bool)
        mask[0, kept] = True
        weight, bias = fit_logistic(features, sweep.labels, 2, mask, [0.3], (0.4, 2.0))
        logits = features.mean(0)[held] @ weight[0, 0].T + bias[0, 0]
        torch.testing.assert_close(winner.held_out[fold // 2, held], logits, atol=1e-4, rtol=0)
    assert winner.history["epoch"].tolist() == [0]
    assert winner.history["lr"].isna().all()
    assert winner.history["train/accuracy"].item() >= 0.5


def test_a_winner_by_adam_is_its_schedule_on_all_and_calibrated(task):
    sweep = make_sweep(task)
    settings = {"head": "adam", "image_size": 32, "crop": "none", "readout": "last/avg", **sweep.schedules[1]}
    schedule = {name: settings[name] for name in ("lr", "step_size", "gamma")}
    winner = fit_winner(sweep, None, settings)
    alone = sweep.fit([HeadSettings(**schedule, indices=range(12))])
    check_calibrated(winner, alone.weight[0], alone.bias[0], sweep.labels)
    assert winner.history["epoch"].tolist() == [0, 1]
    for fold, (kept, held) in enumerate(sweep.folds.repeated):
        heads = sweep.fit([HeadSettings(**schedule, indices=kept.tolist())])
        torch.testing.assert_close(winner.held_out[fold // 2, held], heads.logits(sweep.val)[0][held])


@pytest.mark.parametrize("head", ["adam", "logistic"])
def test_no_image_influences_what_is_said_of_it_when_it_is_held_out(task, head):
    """Its label; of its features only those that are predicted from."""
    sweep = make_sweep(task)
    settings = LOGISTIC if head == "logistic" else {"head": "adam", **sweep.schedules[1]}
    found = sweep.passes[0] if head == "logistic" else None
    before = fit_winner(sweep, found, settings).held_out
    labels = sweep.labels.clone()
    labels[5] = 1 - labels[5]
    train = sweep.train.clone()
    train[:, 5] += 50.0
    after = fit_winner(replace(sweep, labels=labels, train=train), found, settings).held_out
    torch.testing.assert_close(after[:, 5], before[:, 5])
    assert (after - before).abs().amax((0, 2)).gt(1e-3).sum() > 6, "the others are other"


def test_out_of_fold_predictions_are_of_the_winner_at_its_temperature(task):
    sweep = make_sweep(task)
    winner = fit_winner(sweep, sweep.passes[0], LOGISTIC)
    table = search.tabulate_held_out(task, winner)
    assert list(table) == ["path", "label", *(f"p_{name}" for name in task.dataset.classes)]
    expected = (winner.held_out / winner.heat).softmax(2).mean(0)
    assert np.allclose(table.iloc[:, 2:].to_numpy(), expected.numpy())
    assert table["path"].tolist() == [sample.path for sample in task.dataset.train]
    assert table["label"].tolist() == [task.dataset.classes[sample.label or 0] for sample in task.dataset.train]


def test_the_winner_made_whole_gives_the_logits_of_its_head(task):
    sweep = make_sweep(task)
    winner = replace(fit_winner(sweep, sweep.passes[0], LOGISTIC), weight=torch.randn(2, 512), bias=torch.randn(2))
    settings = {**LOGISTIC, "image_size": 64, "crop": "foreground"}
    model, winning = search.assemble_winner(task, replace(winner, settings=settings))
    assert (winning.preprocessing.image_size, winning.preprocessing.crop) == (64, "foreground")
    assert (winning.config.readout, winning.config.eval_views) == ("last/max", [-1, -2])
    assert torch.equal(model.head.weight, winner.weight)
    assert model.readout == "last/max"
    adam = replace(winner, settings={"head": "adam"})
    assert search.assemble_winner(task, adam)[1] is task
