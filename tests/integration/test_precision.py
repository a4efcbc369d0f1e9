"""Every way of training in every precision learns what it learns in fp32, on one worker and on two."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import CONFIG, train_on

from plates.config import TrainConfig
from plates.device import best_precision
from plates.train_loop.task import Trained
from plates.weights import resolve_weights

# Enough steps over drawn plates for weights that went stale to show: val/loss was 3328 so, where fp32 has 0.68. From
# random weights, lr 1e-3 on the whole trunk would throw the first epoch's loss to 23, and any rounding about with it.
DRAWN = replace(CONFIG, data="synthetic:40", epochs=15, num_views=1, image_size=96, global_batch_size=8)
LR = {"head": 1e-3, "layer4": 1e-3, "all": 1e-4}


def drawn(trainable: str, precision: str) -> TrainConfig:
    return replace(DRAWN, trainable=trainable, precision=precision, lr=LR[trainable])


def losses_of(trained: Trained) -> torch.Tensor:
    """(E, 2)"""
    return torch.tensor([[row["train/loss"], row["val/loss"]] for row in trained.history])


@pytest.fixture(scope="module")
def in_fp32(tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("fp32")
    return {name: losses_of(train_on(0, drawn(name, "fp32"), folder / name)) for name in LR}


@pytest.mark.parametrize(
    ("precision", "epochs"),  # CPUs compute fp16 ten times as slowly
    [("auto", 15), ("bf16", 15), ("fp16", 2), pytest.param("fp16", 15, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("trainable", ["head", "layer4", "all"])
def test_losses_follow_those_of_fp32(trainable, precision, epochs, in_fp32, tmp_path):
    if precision == "bf16" and best_precision(torch.device("cpu")) == "bf16":
        pytest.skip("auto is bf16 here")
    losses = losses_of(train_on(0, replace(drawn(trainable, precision), epochs=epochs), tmp_path))
    # 0.05, and what 8 bits leave of a loss above 1.
    assert torch.allclose(losses, in_fp32[trainable][: len(losses)], atol=0.05, rtol=0.01)


@pytest.mark.parametrize(
    ("trainable", "precision"),
    [
        ("layer4", "fp16"),
        ("all", "bf16"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in
          [("head", "bf16"), ("head", "fp16"), ("layer4", "bf16"), ("all", "fp16")]),
    ],
)  # fmt: skip
def test_two_workers_train_the_model_of_one(trainable, precision, folder, tmp_path, local_ray):
    """Sums are rounded in another order, to 8 bits in bf16."""
    config = replace(CONFIG, data=str(folder), trainable=trainable, precision=precision, lr=1e-5, epochs=3)
    config = replace(config, class_weights="cleaned=0.2,dirty=3")
    here, on_ray = (train_on(count, config, tmp_path / str(count)) for count in (0, 2))
    assert torch.allclose(losses_of(here), losses_of(on_ray), atol=0.02)
    assert torch.allclose(here.val_logits, on_ray.val_logits, atol=0.05)
    for name, value in here.state.items():
        assert torch.allclose(value.float(), on_ray.state[name].float(), atol=1e-3), name


def loud(factor: float, folder: Path) -> str:
    """Random weights whose last features are larger by a factor: their gradients overflow in fp16."""
    state = resolve_weights("resnet18", "none", 0).state
    state["layer4.1.bn2.weight"] *= factor
    torch.save(state, folder / "loud.pth")
    return str(folder / "loud.pth")


@pytest.mark.parametrize("trainable", ["layer4", pytest.param("all", marks=pytest.mark.slow)])
def test_steps_that_overflow_are_skipped_by_all_workers_together(trainable, tmp_path, local_ray):
    config = replace(CONFIG, data="synthetic:20", trainable=trainable, precision="fp16", lr=1e-6, epochs=3)
    config = replace(config, weights=loud(3000, tmp_path))
    here, on_ray = (train_on(count, config, tmp_path / str(count)) for count in (0, 2))
    assert 1 <= here.figures["train/num_skipped_steps"] == on_ray.figures["train/num_skipped_steps"] <= 3
    in_fp32 = train_on(0, replace(config, precision="fp32"), tmp_path / "fp32")
    assert torch.allclose(losses_of(here), losses_of(on_ray), rtol=0.02)
    assert torch.allclose(losses_of(here), losses_of(in_fp32), rtol=0.1)


def test_a_skipped_step_is_no_step_and_its_images_count(tmp_path, caplog):
    """Where every step overflows nothing is trained: the loss is that of fp32 at a learning rate of almost 0."""
    config = replace(CONFIG, data="synthetic:20", trainable="all", precision="fp16", weights=loud(1e4, tmp_path))
    config = replace(config, epochs=1)
    trained = train_on(0, config, tmp_path / "fp16")
    assert trained.figures["train/num_skipped_steps"] == 3
    assert "all steps overflowed in fp16" in caplog.text
    before = resolve_weights("resnet18", config.weights, 0).state
    for name, value in before.items():
        assert torch.equal(trained.state[f"trunk.{name}"], value), name
    still = train_on(0, replace(config, precision="fp32", lr=1e-30), tmp_path / "fp32")
    assert torch.allclose(losses_of(trained), losses_of(still), rtol=0.01)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_weights_that_are_trained_are_kept_in_fp32(precision, folder, tmp_path):
    """An update of 1e-5 would be lost in weights of 8 or 11 bits."""
    config = replace(CONFIG, data=str(folder), trainable="all", precision=precision, lr=1e-5, epochs=1)
    trained = train_on(0, config, tmp_path)
    before = resolve_weights("resnet18", "none", 0).state
    changes = [(trained.state[f"trunk.{name}"] - value).abs() for name, value in before.items() if "conv" in name]
    assert all(change.dtype == torch.float32 for change in changes)
    assert all(0 < change.max() < 1e-4 for change in changes)
