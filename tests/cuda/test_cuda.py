"""For whoever has a GPU: `pytest -m cuda`. The same helpers run once on the CPU, so that they stay right without one.

Every way of training in every precision, in this process, on one Ray worker and on one a GPU under NCCL, against fp32
on the CPU; a killed worker; pictures made on the device.
"""

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import CONFIG, predict_on, train_on

from plates.address import start_ray
from plates.cluster import Plan, list_nodes, plan_workers
from plates.config import TrainConfig
from plates.device import num_usable_cpus
from plates.model import preprocessing_of
from plates.train_loop import train
from plates.train_loop.task import Trained
from plates.transforms import draw_view, eval_view, make_views

pytestmark = pytest.mark.timeout(600)
CPU = torch.device("cpu")
CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]
# As tests/integration/test_precision.py has it: steps enough for weights that went stale to show.
DRAWN = replace(CONFIG, data="synthetic:40", epochs=15, num_views=1, image_size=96, global_batch_size=8)
LR = {"head": 1e-3, "layer4": 1e-3, "all": 1e-4}
# Of a loss, absolute and relative. fp32: convolutions sum in another order, which Adam's first steps blow up.
TOLERANCE = {"fp32": (0.02, 0.005), "bf16": (0.05, 0.01), "fp16": (0.05, 0.01), "auto": (0.05, 0.01)}


def cuda(test):
    for mark in CUDA:
        test = mark(test)
    return test


def drawn(way: str, precision: str) -> TrainConfig:
    return replace(DRAWN, trainable=way, precision=precision, lr=LR[way])


def plan_for(where: str, device: str) -> Plan:
    """In this process, or on Ray: `one worker`, or `all GPUs` of this machine, one worker each."""
    if where == "this process":
        return Plan.on(device, 0, num_usable_cpus(), "test")
    start_ray()
    return plan_workers(1 if where == "one worker" else "auto", device, list_nodes())


def losses_of(trained: Trained) -> torch.Tensor:
    """(E, 2)"""
    return torch.tensor([[row["train/loss"], row["val/loss"]] for row in trained.history])


def assert_follows(config: TrainConfig, plan: Plan, expected: Trained, run: Path) -> Trained:
    """Trained by the plan, with the losses of another training to the tolerance of the precision."""
    trained = train_on(plan, config, run)
    absolute, relative = TOLERANCE[config.precision]
    assert torch.allclose(losses_of(trained), losses_of(expected), atol=absolute, rtol=relative)
    assert [row["device"] for row in trained.timings] == [plan.device] * max(1, plan.num_workers)
    return trained


def assert_same_pictures(device: torch.device, way: torch.dtype) -> None:
    """Crops of images of many sizes, whole ones too, made on a device, beside those that the CPU makes of bytes."""
    draw, preprocessing = torch.Generator().manual_seed(0), preprocessing_of("resnet18", 96)
    for number, (height, width) in enumerate([(40, 56), (256, 341), (1000, 37), (224, 224)]):
        image = torch.randint(0, 256, (3, height, width), generator=draw, dtype=torch.uint8)
        views = [draw_view(0, index, str(number), height, width) for index in range(8)]
        views.append(eval_view(preprocessing, height, width))
        made = make_views(image.to(device, way), views, preprocessing).cpu().int()
        assert (made - make_views(image, views, preprocessing).int()).abs().max() <= 1


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Each way of training on the CPU in fp32."""
    folder = tmp_path_factory.mktemp("cpu")
    return {way: train_on(0, drawn(way, "fp32"), folder / way) for way in LR}


def test_the_helpers_of_these_tests_on_the_cpu(tmp_path):
    config = replace(drawn("layer4", "fp32"), epochs=2)
    expected = train_on(0, config, tmp_path / "expected")
    assert_follows(config, plan_for("this process", "cpu"), expected, tmp_path / "run")
    with pytest.raises(AssertionError):
        assert_follows(replace(config, lr=0.03), plan_for("this process", "cpu"), expected, tmp_path / "other")
    assert_same_pictures(CPU, torch.float32)


@cuda
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("way", LR)
@pytest.mark.parametrize("where", ["this process", "one worker", "all GPUs"])
def test_losses_follow_those_of_the_cpu_in_fp32(where, way, precision, on_cpu, tmp_path):
    assert_follows(drawn(way, precision), plan_for(where, "cuda"), on_cpu[way], tmp_path)


@cuda
@pytest.mark.parametrize("precision", ["fp32", "auto"])
@pytest.mark.parametrize("way", LR)
def test_predictions_are_those_of_the_cpu(way, precision, on_cpu, tmp_path):
    """On every GPU, to the probabilities' tolerance of the precision."""
    for where in ("this process", "all GPUs"):
        plan = plan_for(where, "cuda")
        found = predict_on(plan, drawn(way, precision), on_cpu[way].state, tmp_path / plan.reason)
        differences = found.logits.softmax(1) - on_cpu[way].predicted.logits.softmax(1)
        assert differences.abs().max() < (1e-3 if precision == "fp32" else 0.05)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=CUDA)])
def test_a_killed_worker_is_outlived(device, tmp_path, local_ray):
    """All GPUs, or two CPUs; to the end with the model of a run in this process."""

    def train_killed_once(task, worker):  # by value: Ray's workers do not have this module
        has_died = task.run / "has-died"
        if worker.rank == worker.world_size - 1 and not has_died.exists():
            has_died.write_bytes(b"")
            threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return train(task, worker)

    config = replace(drawn("layer4", "fp32"), epochs=300, image_size=32, lr=1e-5, step_size=1000)
    plan = plan_for("all GPUs", "cuda") if device == "cuda" else Plan.on("cpu", 2, 1, "test")
    (tmp_path / "run").mkdir()
    trained = train_on(plan, config, tmp_path / "run", train_killed_once)
    assert (tmp_path / "run" / "has-died").exists()
    assert len(trained.history) == config.epochs
    undisturbed = train_on(plan_for("this process", device), config, tmp_path / "here")
    assert torch.allclose(trained.val_logits, undisturbed.val_logits, atol=0.05)


@cuda
def test_pictures_made_on_the_gpu_are_those_of_the_cpu():
    assert_same_pictures(torch.device("cuda"), torch.uint8)
