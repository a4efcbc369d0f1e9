import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from made_up_trials import CONFIG, SAMPLES, made_up
from scipy import stats
from torch.nn.functional import cross_entropy

from plates.config import TuneConfig, UserError
from plates.head import HeadSettings, fit_heads
from plates.sweep import draw_schedules
from plates.sweep.head_trials import HeadSweep, score_schedule
from plates.sweep.scores import TrialResult, make_folds, paired_difference, score_trial, summarize, tabulate_trials


def make_sweep(class_weights: tuple[float, ...] = (1.0, 1.0)) -> HeadSweep:
    generator = torch.Generator().manual_seed(0)
    labels = SAMPLES.labels
    val = torch.randn(16, 6, generator=generator) + labels[:, None] * 0.8
    train = val + 0.1 * torch.randn(5, 16, 6, generator=generator)
    initial = (torch.zeros(2, 6), torch.zeros(2))
    settings = (make_folds(SAMPLES, CONFIG), draw_schedules(CONFIG), CONFIG, class_weights)
    return HeadSweep(train, val, labels, initial, *settings)


def test_both_ways_of_training_score_alike():
    """Of the same scores, three of six folds at first, and all with the nested ones in the end."""
    folds = make_folds(SAMPLES, CONFIG)
    draw = np.random.default_rng(0)
    losses, is_right = draw.uniform(size=(2, 2, 16))  # by repeat
    scores = np.stack([losses, is_right > 0.5])
    held_out = [scores[:, min(place // 3, 1), held] for place, (_, held) in enumerate(folds.in_turn())]
    whole, first = score_trial(folds, held_out), score_trial(folds, held_out[:4])
    assert whole.log_loss == pytest.approx(losses.mean())
    assert whole.accuracy == pytest.approx((is_right > 0.5).mean())
    assert whole.repeat_log_losses == pytest.approx(losses.mean(1))
    assert whole.image_log_losses == pytest.approx(losses.mean(0))
    assert whole.nested_outer == [held_out[place].tolist() for place in (6, 10, 14)]
    inner = [np.concatenate([held_out[place + 1 + i][0] for i in range(3)]).mean() for place in (6, 10, 14)]
    assert whole.nested_inner == pytest.approx(inner)
    assert first.fold_log_losses == whole.fold_log_losses[:4]
    assert first.repeat_log_losses == pytest.approx([losses[0].mean(), held_out[3][0].mean()])
    again = set(folds.repeated[3][1])
    expected = [losses[:, i].mean() if i in again else losses[0, i] for i in range(16)]
    assert first.image_log_losses == pytest.approx(expected)
    assert (first.nested_inner, first.nested_outer) == ([], [])
    assert np.isnan(score_trial(folds, held_out[:1]).image_log_losses).sum() == 16 - len(folds.repeated[0][1])


def test_what_tune_restores_is_what_a_trial_reported():
    sweep = make_sweep()
    sweep.val[3] = float("inf")
    result = score_schedule(sweep, sweep.schedules[0])
    assert result.log_loss == float("inf")
    assert TrialResult(**json.loads(json.dumps(asdict(result)))) == result


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


@pytest.mark.parametrize("class_weights", [(1.0, 1.0), (0.2, 3.0)])
def test_a_score_is_what_plain_heads_give_fold_by_fold(class_weights):
    """Classes count in training alone."""
    sweep = make_sweep(class_weights)
    schedule = sweep.schedules[1]
    result = score_schedule(sweep, schedule)
    losses = torch.zeros(2, 16)
    for index, (train, held) in enumerate(sweep.folds.repeated):
        heads = fit_heads(
            sweep.train, sweep.labels, [HeadSettings(**schedule, indices=train.tolist())], sweep.initial,
            epochs=5, global_batch_size=8, seed=0, class_weights=class_weights,
        )  # fmt: skip
        logits = heads.logits(sweep.val)[0][held]
        losses[index // 3, held] = cross_entropy(logits, sweep.labels[held], reduction="none")
    assert result.log_loss == pytest.approx(float(losses.mean()), abs=1e-5)
    assert result.image_log_losses == pytest.approx(losses.mean(0).tolist(), abs=1e-5)
    assert len(result.fold_log_losses) == 6
    assert sum(len(losses) for losses, _ in result.nested_outer) == 16


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
    one = made_up(1.0, [1.0, 1.1], nested_inner=[0.1, 0.9], nested_outer=[[[5.0], [1.0]], [[7.0], [0.0]]])
    two = made_up(2.0, [1.0, 1.1], nested_inner=[0.9, 0.1], nested_outer=[[[6.0], [0.0]], [[8.0], [1.0]]])
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


def test_a_diverged_fold_is_infinitely_bad_for_a_trial_of_heads():
    sweep = make_sweep()
    val = sweep.val.clone()
    val[3] = float("nan")  # as after weights that overflowed, in the folds that hold out this image alone
    result = score_schedule(replace(sweep, val=val), sweep.schedules[0])
    assert result.log_loss == float("inf")
    assert result.repeat_log_losses == [float("inf")] * 2
    assert sorted(np.isinf(result.fold_log_losses).tolist()) == [False] * 4 + [True] * 2
    assert result.nested_inner.count(float("inf")) == 2, "in the inner folds of all outer ones but its own"
    assert result.accuracy <= 15 / 16, "no prediction of a diverged head is right"


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


def test_nested_figures_have_the_intervals_of_their_images():
    """Student's t of the losses, cut off at 0, and Wilson's of the 3 of 4 that are right."""
    for losses, low in (([0.9, 0.9, 1.1, 1.3], None), ([0.0, 0.0, 0.0, 4.0], 0.0)):
        result = made_up(1.0, losses, nested_outer=[(losses, [1.0, 1.0, 0.0, 1.0])])
        schedules = draw_schedules(replace(CONFIG, num_trials=1))
        figures = summarize([result], schedules, tabulate_trials([result], schedules))
        half = stats.t.ppf(0.975, 3) * np.std(losses, ddof=1) / 2
        assert figures["nested/log_loss_low"] == pytest.approx(np.mean(losses) - half if low is None else low)
        assert figures["nested/log_loss_high"] == pytest.approx(np.mean(losses) + half)
        for bound in (figures["nested/accuracy_low"], figures["nested/accuracy_high"]):
            assert abs(0.75 - bound) / (bound * (1 - bound) / 4) ** 0.5 == pytest.approx(1.96, abs=0.001)
    diverged = made_up(np.inf, [np.inf] * 4)
    figures = summarize([diverged], schedules, tabulate_trials([diverged], schedules))
    assert np.isnan(figures["nested/log_loss_low"])


def test_the_highest_seed_makes_folds():
    folds = make_folds(SAMPLES, replace(CONFIG, seed=2**32 - 1))
    assert len(folds.nested) == 3
