"""What decided: maps that add up to logits, laid where the pixels come from, and drawn."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from plates.explain import activation_maps, explain_image, place_back, why_no_map
from plates.features import Drawing
from plates.logistic import fit_logistic
from plates.model import Classifier, assemble, preprocessing_of
from plates.readouts import read_out
from plates.report.explained import AGAINST, FOR, draw_map, explain_answers
from plates.transforms import cut_background, eval_view, find_view, view_batch
from plates.weights import resolve_weights

pytestmark = pytest.mark.usefixtures("one_thread")
SYMMETRIES = [*range(-1, -9, -1)]


def make_model(backbone: str, readout: str, num_classes: int, size: int) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = assemble(backbone, num_classes, size, readout)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.load_state_dict(
                    module.state_dict()
                    | {
                        "running_mean": torch.rand(module.num_features) - 0.5,
                        "running_var": torch.rand(module.num_features) + 0.5,
                    }
                )
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("backbone", "readout", "size", "num_classes"),
    [
        ("resnet18", "last/avg", 96, 2), ("resnet18", "last/avg+stage2/avg+last/max+stage3/max", 64, 4),
        ("efficientnet_lite0", "last/avg", 64, 3), ("efficientnet_lite0", "pre/avg+last/max", 96, 2),
        ("timm/test_vit", "last/patches+stage3/max", 160, 2), ("timm/vit_tiny_patch16_224", "last/max", 64, 3),
        ("timm/swin_tiny_patch4_window7_224", "last/avg", 64, 2),
    ],
)  # fmt: skip
def test_a_map_and_the_biases_add_up_to_the_logit_above_the_others(backbone, readout, size, num_classes):
    model = make_model(backbone, readout, num_classes, size)
    assert why_no_map(model, size) is None
    pictures = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    logits, bias = model(pictures), model.head.bias
    for label in range(num_classes):
        others = [other for other in range(num_classes) if other != label]
        expected = logits[:, label] - logits[:, others].mean(1) - (bias[label] - bias[others].mean())
        found = activation_maps(model, pictures, label)
        assert found.dim() == 3
        torch.testing.assert_close(found.sum((1, 2)), expected, rtol=1e-3, atol=1e-4 * float(logits.abs().max()))


def test_the_largest_values_place_has_all_of_a_maximum():
    model = make_model("resnet18", "last/max", 2, 96)
    cells = torch.zeros(1, 512, 3, 3)
    for channel in range(512):
        cells[0, channel, channel % 3, 1] = 1.0
    model.trunk.layer4 = Returns(cells)
    found = activation_maps(model, torch.zeros(1, 3, 96, 96), 1)[0]
    direction = model.head.weight[1] - model.head.weight[0]
    expected = torch.zeros(3, 3)
    expected[:, 1] = torch.stack([direction[row::3].sum() for row in range(3)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class Returns(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, _: Tensor) -> Tensor:
        return self.value


@pytest.mark.parametrize(
    ("backbone", "readout", "size"),
    [
        ("timm/vit_tiny_patch16_224", "last/avg", 64), ("timm/vit_tiny_patch16_224", "last/max+last/token", 64),
        ("timm/pit_ti_224", "last/avg", 224),  # its last stage hands on the class token alone
        ("timm/test_vit", "last/avg", 160), ("timm/test_convnext", "last/avg", 64),
    ],
)  # fmt: skip
def test_what_no_map_adds_up_to_is_refused(backbone, readout, size):
    reason = why_no_map(make_model(backbone, readout, 2, size), size)
    assert reason is not None
    assert reason.startswith("this backbone does not" if "pit" in backbone else readout.split("+")[-1])


@pytest.mark.parametrize("resize", ["squash", "border", "center"])
@pytest.mark.parametrize("number", [*SYMMETRIES, 0, 1])
def test_a_views_map_lies_where_its_pixels_come_from(resize, number):
    """A white spot, seen through a view as a trunk would see it, is laid back on the spot."""
    preprocessing = replace(preprocessing_of("resnet18", 64, resize=resize), mean=(0.0,) * 3, std=(1.0,) * 3)
    height, width = 90, 60
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    view = find_view(preprocessing, number, 3, "a.png", height, width, is_turned=True)
    row, column = max(view.top, 0) + min(view.height, height) // 4, max(view.left, 0) + min(view.width, width) // 3
    image[:, row : row + 6, column : column + 6] = 255
    seen = view_batch([image], [view], preprocessing)[0, 0]
    placed = place_back(seen, view, height, width)
    found = torch.unravel_index(placed.argmax(), placed.shape)
    assert row <= found[0] < row + 6
    assert column <= found[1] < column + 6
    inside = min(view.height, height) * min(view.width, width) / (view.height * view.width)
    assert (placed > 0).float().mean() < 0.3 * inside + 0.1
    assert placed.sum() == pytest.approx(float(seen.sum()), rel=0.05)


def plant(seed: int, has_mark: bool) -> tuple[Tensor, tuple[int, int]]:
    """A grey noisy picture on a white background, of which a mark alone may tell the class, and the mark's middle."""
    draw = np.random.default_rng(seed)
    pixels = np.full((260, 340, 3), 255, np.uint8)
    top, left = draw.integers(15, 60, 2)
    pixels[top : top + 180, left : left + 200] = draw.normal(128, 12, (180, 200, 3)).clip(0, 250).astype(np.uint8)
    row, column = top + draw.integers(10, 140), left + draw.integers(10, 160)
    if has_mark:
        pixels[row : row + 30 : 2, column : column + 30] = (200, 20, 20)
        pixels[row + 1 : row + 30 : 2, column : column + 30] = (250, 220, 40)
    return torch.from_numpy(pixels).permute(2, 0, 1), (int(row) + 15, int(column) + 15)


@pytest.mark.parametrize(
    ("numbers", "readout", "within_px"), [([-1], "stage3/avg", 25), ([-1, -5, -8], "last/avg+last/max", 40)]
)
def test_a_planted_mark_is_under_the_peak(numbers, readout, within_px):
    """Resize, foreground's box and turns are undone: object and mark lie elsewhere each time. A cell of the last
    map is 27 pixels and sees its neighbours."""
    preprocessing = preprocessing_of("efficientnet_lite0", 224, "foreground")
    model = assemble("efficientnet_lite0", 2, 224, readout)
    model.trunk.load_state_dict(resolve_weights("efficientnet_lite0", "imagenet", 0).state)
    batches = []
    for seed in range(24):
        seen = cut_background(plant(seed, bool(seed % 2))[0], preprocessing)
        batches.append(view_batch([seen], [eval_view(preprocessing, *seen.shape[1:])], preprocessing))
    labels = torch.arange(24) % 2
    with torch.inference_mode():
        features = torch.cat([read_out(model.trunk, batch, readout) for batch in batches])
    weight, bias = fit_logistic(features[None], labels, 2, torch.ones(1, 24, dtype=torch.bool), [0.01])
    model.head.load_state_dict({"weight": weight[0, 0], "bias": bias[0, 0]})
    for seed in range(101, 106):
        image, mark = plant(seed, True)
        found = explain_image(model, image, "a.png", 1, numbers, Drawing(0), preprocessing)
        assert found.shape == image.shape[1:]
        peak = torch.stack(torch.unravel_index(found.argmax(), found.shape))
        assert (peak - torch.tensor(mark)).abs().max() <= within_px, (mark, peak)


def test_the_background_says_nothing():
    model = make_model("resnet18", "last/avg", 2, 64)
    image, _ = plant(1, True)
    found = explain_image(model, image, "a.png", 0, [-1], Drawing(0), preprocessing_of("resnet18", 64, "foreground"))
    assert (found[:5] == 0).all()
    assert (found != 0).float().mean() > 0.3


def test_red_speaks_for_and_blue_against():
    values = np.zeros((40, 60))
    values[:20, :30], values[20:, 30:] = 2.0, -2.0
    drawn = np.asarray(draw_map(np.full((40, 60, 3), 128, np.uint8), values)).astype(int)
    for place, colour in ((drawn[10, 10], FOR), (drawn[30, 45], AGAINST), (drawn[10, 45], (128, 128, 128))):
        assert np.abs(place - colour).max() < 30


def answers() -> pd.DataFrame:
    """40 of falling confidence; of those whose truth is known 6 are wrong."""
    labels = ["dirty"] * 40
    true = ["cleaned" if index % 5 == 0 else "dirty" if index < 30 else None for index in range(30)] + [None] * 10
    chances = np.linspace(0.99, 0.5, 40)
    return pd.DataFrame(
        {"path": [f"test/{i:02}.jpg" for i in range(40)], "id": [f"{i:02}" for i in range(40)], "label": labels,
         "chance": chances, "true": true}
    )  # fmt: skip


def test_which_images_are_explained(tmp_path: Path):
    def look(path: str, label: str) -> tuple[np.ndarray, np.ndarray]:
        assert label == "dirty"
        if path == "test/05.jpg":
            raise OSError("gone")
        return np.zeros((600, 800, 3), np.uint8), np.ones((600, 800))

    section = explain_answers(answers(), look, tmp_path)
    assert section is not None
    shown = {title.split()[0]: [picture["title"] for picture in grid] for title, grid in section["grids"].items()}
    assert shown["Least"] == [str(number) for number in range(39, 31, -1)]
    assert shown["Most"] == ["00, is cleaned", "01", "02", "03", "04", "06", "07"]
    assert shown["Wrong,"] == [f"{number:02}, is cleaned" for number in (0, 10, 15, 20, 25)]
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == [f"{number:02}_cam.jpg" for number in (0, 1, 2, 3, 4, 6, 7, 10, 15, 20, 25, *range(32, 40))]
    assert section["num_wrong"] == 6
    without = explain_answers(answers(), look, None)
    assert without is not None
    assert [title.split()[0] for title in without["grids"]] == ["Least", "Wrong,"]
    assert explain_answers(answers().iloc[:0], look, None) is None
