"""The search of all: what the head sees, beside the recipe's schedules, and the winner made whole."""

import time
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from plates.backbones import find_backbone
from plates.checkpoint import Bundle
from plates.cluster import Plan, plural
from plates.config import NUM_SYMMETRIES, TrainConfig, TuneConfig
from plates.foreground import foreground_box
from plates.head import FIGURES, HeadSettings, score_heads
from plates.logistic import fit_logistic, logits_of_folds, mask_folds, temperature
from plates.model import Classifier, preprocessing_of
from plates.readouts import count_features, readouts_to_search
from plates.reference import Reference, spread_evenly
from plates.sweep.head_trials import HeadSweep, Scored, run_head_trials
from plates.sweep.readout_trials import Pass, time_trials
from plates.sweep.scores import Folds, Schedule, Swept, draw_schedules, summarize, tabulate_trials
from plates.train_loop import build_model, compute_passes, predict
from plates.train_loop.task import Task
from plates.trainer import run_loop

SIZES = (10 / 7, 2.0)  # beside the settings' own: of 224 320 and 448 px
LARGEST_SIZE = 4096  # of --image-size
MOST_VIEWS, FEWEST_VIEWS = 4000, 8  # of all labelled images together, and at least of one, for the recipe
MOST_SYMMETRIES = 2000  # of all labelled images together that a pass has, at least one of each
NUM_LOOKED_AT = 64  # images in which a foreground is looked for


@dataclass(frozen=True)
class Winner:
    """A candidate fitted on all labelled images and calibrated, and what its held-out logits were before."""

    settings: Schedule
    weight: Tensor  # (C, F)
    bias: Tensor  # (C,)
    history: pd.DataFrame
    heat: float  # temperature that both were divided by
    held_out: Tensor  # (R, N, C) logits of each repeat


def search_all(task: Task, folds: Folds, plan: Plan) -> Swept:
    """The recipe's schedules, and beside them a trial for each pass of the trunk and number of views."""
    config, labels, start_s = cast(TuneConfig, task.config), task.dataset.train.labels, time.perf_counter()
    deadline, num_views = task.submitted_at + config.budget_s, max(FEWEST_VIEWS, MOST_VIEWS // len(labels))
    tasks, notes = list_passes(task)
    if config.num_views is None and num_views < len(config.train_views):
        notes.append(f"the recipe has {num_views} views an image, not {len(config.train_views)}: images are many")
        config = replace(config, num_views=num_views)
        task = replace(task, config=config)
    columns = find_columns(task, tasks[0].config.readout)
    timed = partial(time_trials, list(columns.values()), labels, task.class_weights, folds)
    searched = run_loop(partial(compute_passes, tasks, deadline, timed), task, plan)
    passes = make_passes(tasks, searched.of_passes, columns, notes)
    features, head = searched.of_task, build_model(task).head
    own = {"head": "adam", "image_size": task.preprocessing.image_size, "crop": config.crop,
           "num_views": len(config.train_views), "readout": config.readout, "tta": config.tta}  # fmt: skip
    schedules = [{**own, **schedule} for schedule in draw_schedules(config)]
    initial = (head.weight.detach(), head.bias.detach())
    end = deadline - searched.time_to_predict_s * config.tta
    read = (features.train, features.val, labels, initial, folds, schedules, config, task.class_weights)
    sweep = HeadSweep(*read, passes, searched.trial_s, end)
    by_trial = run_head_trials(sweep, task, plan)
    notes += name_left_out(sweep, by_trial)
    settings, results = map(list, zip(*chain(*by_trial), strict=True))
    trials = tabulate_trials(results, settings)
    figures = summarize(results, settings, trials)
    chosen = settings[figures["winner/trial"]]
    by_name = {name_pass(found.settings): found for found in passes}
    found = None if chosen["head"] == "adam" else by_name[name_pass(chosen)]
    winner = fit_winner(sweep, found, chosen)
    baseline = sweep.fit([HeadSettings(**draw_schedules(config)[0], indices=range(len(labels)))])
    train_s = time.perf_counter() - start_s
    model, winning = assemble_winner(task, winner)
    # The first view of a pass is the image as it is; what adam was fitted on is stored.
    as_is = found and found.features[0, spread_evenly(len(labels)), found.columns[chosen["readout"]]]
    reference = None if as_is is None else Reference.of(as_is)
    bundle = Bundle(
        task.weights.backbone, task.dataset.classes, winning.preprocessing, model.state_dict(), chosen, reference
    )
    predicted = run_loop(partial(predict, bundle), replace(winning, submitted_at=time.time()), plan)
    predicted.timings[0] |= {"train_s": train_s, "num_train_images": None}
    print(*notes, sep="\n", end="\n" * bool(notes), flush=True)
    return Swept(
        trials,
        figures | {"winner/temperature": winner.heat},
        model.state_dict(),
        winner.history,
        pd.DataFrame(baseline.history(0)),
        predicted,
        winning,
        {**chosen, "augment": winning.config.augment},
        notes,
        {"out_of_fold.csv": tabulate_held_out(task, winner)},
    )


def name_pass(settings: Schedule) -> str:
    return f"{settings['image_size']} px, crop {settings['crop']}"


def name_left_out(sweep: HeadSweep, by_trial: list[list[Scored]]) -> list[str]:
    trials = [trial for trial, candidates in zip(sweep.trials, by_trial, strict=True) if not candidates]
    passes = [trial for trial in trials if not isinstance(trial, int)]
    names = [f"{name_pass(found.settings)}, {plural(num_views, 'view')}" for found, num_views in passes]
    num_schedules = len(trials) - len(passes)
    names += [f"{plural(num_schedules, 'schedule')} of the recipe"] * (num_schedules > 0)
    return [f"{name}: left out, it would not have been done within --budget-s" for name in names]


def find_columns(task: Task, readouts: str) -> dict[str, slice]:
    """Of the features of several readouts joined by +, those of each."""
    trunk, size, columns, start = build_model(task).trunk, task.preprocessing.image_size, {}, 0
    for readout in readouts.split("+"):
        columns[readout] = slice(start, start := start + count_features(trunk, readout, size))
    return columns


def make_passes(
    tasks: list[Task], features: list[Tensor | None], columns: dict[str, slice], notes: list[str]
) -> list[Pass]:
    """Those that were computed; what was left out is noted."""
    passes = []
    for one, found in zip(tasks, features, strict=True):
        settings = {"image_size": one.preprocessing.image_size, "crop": one.preprocessing.crop}
        if found is None:
            notes.append(f"{name_pass(settings)}: left out, it would not have been done within --budget-s")
        else:
            passes.append(Pass(settings, found, columns))
    return passes


def assemble_winner(task: Task, winner: Winner) -> tuple[Classifier, Task]:
    """The whole model, and the task that its predictions follow from."""
    settings = winner.settings
    if settings["head"] == "adam":
        winning = task
    else:
        seen = {name: settings[name] for name in ("image_size", "crop", "readout", "num_views", "tta", "head")}
        winning = change(task, **seen, augment="dihedral")
    model = build_model(winning)
    model.head.load_state_dict({"weight": winner.weight, "bias": winner.bias})
    return model, winning


def list_passes(task: Task) -> tuple[list[Task], list[str]]:
    """A task for each size and crop, from cheap to expensive; and what is not searched, and why.

    Each reads all stages at once, of the image as it is and its symmetries, fewer of them where images are many.
    """
    own, notes = task.preprocessing.image_size, []
    crops = ["none", "foreground"]
    if not has_foreground(task):
        crops, notes = ["none"], ["--crop foreground was not tried: no background is plain"]
    sizes = sorted({own, *(min(LARGEST_SIZE, round(own * factor / 32) * 32) for factor in SIZES)})
    if find_backbone(task.weights.backbone).is_fixed_size:
        sizes, notes = [own], [*notes, f"other sizes than {own} px were not tried: the backbone is built for it"]
    num_views = min(NUM_SYMMETRIES, max(1, MOST_SYMMETRIES // len(task.dataset.train)))
    readout = "+".join(readouts_to_search(build_model(task).trunk, own))
    passes = []
    for size in sizes:
        for crop in crops:
            changes = {"image_size": size, "crop": crop, "readout": readout, "augment": "dihedral", "tta": 1}
            passes.append(change(task, **changes, num_views=num_views))
    return passes, notes


def change(task: Task, **changes: Any) -> Task:
    """The task with other settings, no longer those of a sweep."""
    kept = {field.name: getattr(task.config, field.name) for field in fields(TrainConfig)}
    config = TrainConfig(**kept | changes)
    seen = (config.image_size, config.crop, config.resize)
    return replace(task, config=config, preprocessing=preprocessing_of(task.weights.backbone, *seen))


def has_foreground(task: Task) -> bool:
    """Whether any of the images, of a part of many, has a background to cut off."""
    samples, source = task.dataset.train, task.dataset.source
    for sample in samples[:: -(-len(samples) // NUM_LOOKED_AT)]:
        image = source.read(sample.path)
        if foreground_box(image)[2:].tolist() != list(image.shape[1:]):
            return True
    return False


def fit_winner(sweep: HeadSweep, found: Pass | None, settings: Schedule) -> Winner:
    """The candidate on all labelled images, at the temperature of its held-out logits.

    found: the pass that it reads; None for one of the recipe's schedules.
    """
    labels, repeated = sweep.labels, sweep.folds.repeated
    if found is None:
        schedule = {name: settings[name] for name in ("lr", "step_size", "gamma")}
        indices = [range(len(labels)), *(train.tolist() for train, _ in repeated)]
        heads = sweep.fit([HeadSettings(**schedule, indices=chosen) for chosen in indices])
        weight, bias, history, logits = heads.weight[0], heads.bias[0], heads.history(0), heads.logits(sweep.val)[1:]
    else:
        features = found.features[: settings["num_views"], :, found.columns[settings["readout"]]]
        weights, strengths = sweep.class_weights, [settings["strength"]]
        evaluation, problem = features[: settings["tta"]].mean(0), (features, labels, len(weights))
        kept = mask_folds([np.arange(len(labels)), *(train for train, _ in repeated)], len(labels))
        weight, bias = (value[0, 0] for value in fit_logistic(*problem, kept[:1], strengths, weights))
        logits = logits_of_folds(*problem, kept[1:], strengths, evaluation, weights)[:, 0]
        loss, accuracy = (float(of[0]) for of in score_heads(weight[None], bias[None], (evaluation, labels)))
        history = [dict(zip(("epoch", *FIGURES), (0, None, loss, accuracy, None, None), strict=True))]
    num_folds = len(sweep.folds.nested)
    held_out = torch.empty(len(repeated) // num_folds, len(labels), logits.shape[-1])
    for fold, (_, held) in enumerate(repeated):
        held_out[fold // num_folds, held] = logits[fold, held]
    heat = temperature(held_out.flatten(0, 1), labels.repeat(len(held_out)))
    return Winner(settings, weight / heat, bias / heat, pd.DataFrame(history), heat, held_out)


def tabulate_held_out(task: Task, winner: Winner) -> pd.DataFrame:
    """out_of_fold.csv: path, label, p_CLASS…, of each labelled image what the winner said of it when it was held out,
    its probabilities' mean over the repeats."""
    samples, classes = task.dataset.train, task.dataset.classes
    chances = (winner.held_out / winner.heat).softmax(2).mean(0).numpy()
    table = pd.DataFrame(chances, columns=pd.Index([f"p_{name}" for name in classes]))
    table.insert(0, "path", samples.table["path"].to_pylist())
    table.insert(1, "label", np.array(classes)[samples.labels.numpy()])
    return table
