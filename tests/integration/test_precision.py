"""Every way of training in every precision learns what it learns in fp32, on one worker and on two."""

from dataclasses import replace

import pytest
import torch
from test_train import CONFIG, train_on

from plates.config import TrainConfig
from plates.model import resolve_precision
from plates.train_loop.task import Trained

# Enough steps over drawn plates for weights that went stale to show: val/loss was 3328 so, where fp32 has 0.68. From
# random weights, lr 1e-3 on the whole trunk would throw the first epoch's loss to 23, and any rounding about with it.
DRAWN = replace(CONFIG, data="synthetic:40", epochs=15, num_views=1, image_size=96, global_batch_size=8)
LR = {"head": 1e-3, "layer4": 1e-3, "all": 1e-4}


def drawn(trainable: str, precision: str) -> TrainConfig:
    epochs = 2 if precision == "fp16" else DRAWN.epochs  # CPUs compute fp16 twenty times as slowly
    return replace(DRAWN, trainable=trainable, precision=precision, lr=LR[trainable], epochs=epochs)


def losses_of(trained: Trained) -> torch.Tensor:
    """(E, 2)"""
    return torch.tensor([[row["train/loss"], row["val/loss"]] for row in trained.history])


@pytest.fixture(scope="module")
def in_fp32(tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("fp32")
    return {name: losses_of(train_on(0, drawn(name, "fp32"), folder / name)) for name in LR}


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16"])
@pytest.mark.parametrize("trainable", ["head", "layer4", "all"])
def test_losses_follow_those_of_fp32(trainable, precision, in_fp32, tmp_path):
    if precision == "bf16" and resolve_precision("auto", torch.device("cpu"), "resnet18") == torch.bfloat16:
        pytest.skip("auto is bf16 here")
    losses = losses_of(train_on(0, drawn(trainable, precision), tmp_path))
    # 0.05, and what 8 bits leave of a loss above 1.
    assert torch.allclose(losses, in_fp32[trainable][: len(losses)], atol=0.05, rtol=0.01)


@pytest.mark.parametrize("trainable", ["head", "layer4", "all"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_two_workers_train_the_model_of_one(trainable, precision, folder, tmp_path, local_ray):
    """Sums are rounded in another order, to 8 bits in bf16."""
    config = replace(CONFIG, data=str(folder), trainable=trainable, precision=precision, lr=1e-5, epochs=3)
    here, on_ray = (train_on(count, config, tmp_path / str(count)) for count in (0, 2))
    assert here.precision == on_ray.precision == precision
    assert torch.allclose(losses_of(here), losses_of(on_ray), atol=0.02)
    assert torch.allclose(here.val_logits, on_ray.val_logits, atol=0.05)
    for name, value in here.state.items():
        assert torch.allclose(value.float(), on_ray.state[name].float(), atol=1e-3), name
