import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from plates.config import TuneConfig, UserError
from plates.dataset import Sample
from plates.head import HeadSettings, fit_heads
from plates.sweep import PUBLISHED, draw_schedules
from plates.sweep.head_trials import HeadSweep, score_schedule
from plates.sweep.scores import make_folds, paired_difference, summarize, tabulate_trials

CONFIG = TuneConfig(epochs=5, folds=3, cv_repeats=2, num_trials=6)
SAMPLES = [Sample(f"train/{i}.jpg", i % 2) for i in range(16)]


def make_sweep() -> HeadSweep:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([sample.label for sample in SAMPLES])
    val = torch.randn(16, 6, generator=generator) + labels[:, None] * 0.8
    train = val + 0.1 * torch.randn(5, 16, 6, generator=generator)
    initial = (torch.zeros(2, 6), torch.zeros(2))
    return HeadSweep(train, val, labels, initial, make_folds(SAMPLES, CONFIG), draw_schedules(CONFIG), CONFIG)


def test_the_published_schedule_is_trial_0_and_the_others_lie_in_range():
    schedules = draw_schedules(TuneConfig(num_trials=200))
    assert schedules[0] == PUBLISHED
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
    schedules = [PUBLISHED, PUBLISHED]
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
