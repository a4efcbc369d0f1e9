"""What heads read of a trunk: each part against the trunk's own layers, all in one pass."""

from functools import cache, partial

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from plates.device import DTYPES
from plates.features import FrozenTrunk
from plates.folding import fast_trunk
from plates.model import build_classifier, build_trunk, preprocessing_of, set_trainable
from plates.readouts import count_features, read_out, readouts_to_search
from plates.rules import is_readout

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
# Convolutions with and without a final one, a ViT whose head attends and one with a class token, norms in the head,
# and a transformer whose channels are last.
SIZES = {"resnet18": 64, "efficientnet_lite0": 64, "timm/test_vit": 160, "timm/vit_tiny_patch16_224": 64,
         "timm/test_convnext": 64, "timm/swin_tiny_patch4_window7_224": 64}  # fmt: skip
VITS = [name for name in SIZES if "vit" in name]
BLOCKS = {  # by backbone the modules whose outputs are its stages
    "resnet18": ["layer1", "layer2", "layer3", "layer4"],
    "efficientnet_lite0": ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6"],
    "timm/test_vit": [f"blocks.{number}" for number in range(6)],
    "timm/vit_tiny_patch16_224": [f"blocks.{number}" for number in range(12)],
    "timm/test_convnext": [f"stages.{number}" for number in range(4)],
    "timm/swin_tiny_patch4_window7_224": [f"layers.{number}" for number in range(4)],
}
SEARCHED = {
    "resnet18": ["last/avg", "last/max", "stage3/avg", "stage3/max"],
    "efficientnet_lite0": ["last/avg", "last/max", "pre/avg", "pre/max", "stage4/avg", "stage4/max"],
    "timm/test_vit": ["last/avg", "last/token", "last/patches", "last/max", "stage5/avg", "stage5/max"],
    "timm/vit_tiny_patch16_224": ["last/avg", "last/token", "last/patches", "last/max", "stage9/avg", "stage9/max"],
    "timm/test_convnext": ["last/avg", "last/max", "stage3/avg", "stage3/max"],
    "timm/swin_tiny_patch4_window7_224": ["last/avg", "last/max", "stage3/avg", "stage3/max"],
}


@cache
def made(backbone: str) -> tuple[nn.Module, Tensor]:
    """A trunk of random weights, whose norms do something, and two pictures."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk, _ = build_trunk(backbone, SIZES[backbone])
        for module in trunk.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                nn.init.uniform_(module.bias, -0.2, 0.2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
        return trunk.eval().requires_grad_(False), torch.randn(2, 3, SIZES[backbone], SIZES[backbone])


def watch(trunk: nn.Module, names: list[str], pictures: Tensor) -> list[Tensor]:
    """What these modules give in one pass of the trunk."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = output

    hooks = [trunk.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    trunk(pictures)
    for hook in hooks:
        hook.remove()
    return [seen[name] for name in names]


def to_map(output: Tensor, backbone: str) -> Tensor:
    """(B, F, n) of what a block gives, without a class token."""
    if backbone == "timm/vit_tiny_patch16_224":
        return output[:, 1:].mT
    if backbone == "timm/test_vit":
        num_first = output.shape[1] - (SIZES[backbone] // 16) ** 2
        return output[:, num_first:].mT
    if "swin" in backbone:
        return output.flatten(1, 2).mT
    return output.flatten(2)


@pytest.mark.parametrize("backbone", SIZES)
def test_last_avg_is_what_the_trunk_itself_gives(backbone):
    """Alone it is the trunk; beside others it comes of the stages."""
    trunk, pictures = made(backbone)
    own = trunk(pictures)
    assert torch.equal(read_out(trunk, pictures, "last/avg"), own)
    joined = read_out(trunk, pictures, "stage1/avg+last/avg")
    assert (joined[:, -own.shape[1] :] - own).abs().max() <= 1e-6 * own.abs().max()


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_pre_is_last_without_a_final_convolution_and_what_goes_into_it_else(pooling):
    trunk, pictures = made("resnet18")
    assert torch.equal(read_out(trunk, pictures, f"pre/{pooling}"), read_out(trunk, pictures, f"stage4/{pooling}"))
    torch.testing.assert_close(
        read_out(trunk, pictures, f"pre/{pooling}"), read_out(trunk, pictures, f"last/{pooling}"), rtol=0, atol=1e-6
    )
    lite, pictures = made("efficientnet_lite0")
    (into_convolution,) = watch(lite, ["blocks"], pictures)
    (after_convolution,) = watch(lite, ["bn2"], pictures)
    reduce = torch.mean if pooling == "avg" else torch.amax
    pre, last = (read_out(lite, pictures, f"{part}/{pooling}") for part in ("pre", "last"))
    assert (pre.shape, last.shape) == ((2, 320), (2, 1280))
    torch.testing.assert_close(pre, reduce(into_convolution, (2, 3)), rtol=0, atol=1e-6)
    torch.testing.assert_close(last, reduce(after_convolution, (2, 3)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backbone", SIZES)
def test_a_stage_is_what_its_blocks_give(backbone):
    trunk, pictures = made(backbone)
    outputs = watch(trunk, BLOCKS[backbone], pictures)
    for number, output in enumerate(outputs, start=1):
        pixels = to_map(output, backbone)
        for pooling, expected in (("avg", pixels.mean(2)), ("max", pixels.amax(2))):
            found = read_out(trunk, pictures, f"stage{number}/{pooling}")
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backbone", SIZES)
def test_the_largest_of_the_last_map(backbone):
    trunk, pictures = made(backbone)
    tokens = trunk.forward_features(pictures) if "timm/" in backbone or "lite" in backbone else None
    pixels = watch(trunk, ["layer4"], pictures)[0].flatten(2) if tokens is None else to_map(tokens, backbone)
    torch.testing.assert_close(read_out(trunk, pictures, "last/max"), pixels.amax(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backbone", VITS)
def test_token_and_patches_of_a_vit(backbone):
    trunk, pictures = made(backbone)
    tokens = trunk.forward_features(pictures)  # (B, T, F)
    assert torch.equal(read_out(trunk, pictures, "last/token"), tokens[:, 0])
    assert tokens.shape[1] == 1 + (SIZES[backbone] // 16) ** 2
    patches = read_out(trunk, pictures, "last/patches")
    torch.testing.assert_close(patches, tokens[:, 1:].mean(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backbone", SIZES)
def test_joined_readouts_are_side_by_side(backbone):
    trunk, pictures = made(backbone)
    parts = SEARCHED[backbone]
    found = read_out(trunk, pictures, "+".join(parts))
    apart = torch.cat([read_out(trunk, pictures, part) for part in parts], 1)
    torch.testing.assert_close(found, apart, rtol=0, atol=1e-6)
    assert [count_features(trunk, part, SIZES[backbone]) for part in parts] == [
        read_out(trunk, pictures, part).shape[1] for part in parts
    ]


@pytest.mark.parametrize("backbone", SIZES)
def test_all_of_them_take_one_pass(backbone):
    trunk, pictures = made(backbone)
    calls = []
    stem = next(module for module in trunk.children() if [*module.parameters()])
    hook = stem.register_forward_hook(lambda *_: calls.append(1))
    read_out(trunk, pictures, "+".join(SEARCHED[backbone]))
    hook.remove()
    assert calls == [1]


@pytest.mark.parametrize(
    ("backbone", "readout", "message"),
    [
        ("resnet18", "stage5/avg", "stage5: the backbone has 4 stages"),
        ("efficientnet_lite0", "last/avg+stage6/max", "stage6: the backbone has 5 stages"),
        ("resnet18", "last/token", "last/token: the backbone has no class token"),
        ("efficientnet_lite0", "last/patches", "last/patches: the backbone is no ViT"),
        ("timm/swin_tiny_patch4_window7_224", "last/token", "last/token: the backbone has no class token"),
        ("timm/test_convnext", "last/max+last/token", "last/token: the backbone has no class token"),
    ],
)
def test_what_a_trunk_has_not_is_refused(backbone, readout, message):
    trunk, pictures = made(backbone)
    with pytest.raises(ValueError, match=message):
        read_out(trunk, pictures, readout)
    with pytest.raises(ValueError, match=message):
        count_features(trunk, readout, SIZES[backbone])


def test_a_transformer_without_a_class_token_has_none():
    trunk = timm.create_model("test_vit", num_classes=0, class_token=False, global_pool="avg").eval()
    pictures = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="last/token: the backbone has no class token"):
        read_out(trunk, pictures, "last/token")
    assert readouts_to_search(trunk, 160) == ["last/avg", "last/patches", "last/max", "stage5/avg", "stage5/max"]
    expected = trunk.forward_features(pictures).mean(1)
    torch.testing.assert_close(read_out(trunk, pictures, "last/patches"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backbone", SIZES)
def test_what_a_search_reads(backbone):
    trunk, pictures = made(backbone)
    found = readouts_to_search(trunk, SIZES[backbone])
    assert found == SEARCHED[backbone]
    assert all(map(is_readout, [*found, "+".join(found)]))
    assert read_out(trunk, pictures, "+".join(found)).isfinite().all()


@pytest.mark.parametrize("readout", ["stage2/avg", "pre/avg", "last/max"])
@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0", "timm/test_convnext"])
def test_weights_of_16_bits_are_pooled_in_fp32(backbone, readout):
    """The mean of a map of 8 bits of mantissa has more of them; a maximum is one of its values."""
    trunk, pictures = made(backbone)
    fast = fast_trunk(trunk, CPU, torch.bfloat16, SIZES[backbone])
    with torch.inference_mode():
        found = read_out(fast, pictures.bfloat16(), readout)
    assert found.dtype == torch.float32
    assert torch.equal(found, found.bfloat16().float()) == (readout == "last/max")


def test_the_average_of_a_resnet_is_not_rounded_to_16_bits_beside_others_either():
    trunk, pictures = made("resnet18")
    fast = fast_trunk(trunk, CPU, torch.bfloat16, 64)
    with torch.inference_mode():
        found = read_out(fast, pictures.bfloat16(), "last/avg+last/max")[:, :512]
        assert torch.equal(found, fast(pictures.bfloat16()))
    assert not torch.equal(found, found.bfloat16().float())


def test_autocast_pools_in_fp32():
    trunk, pictures = made("resnet18")
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        found = read_out(trunk, pictures, "stage2/avg+pre/avg")
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backbone", SIZES)
def test_a_fast_trunk_gives_the_same(backbone, precision):
    """Batch norm folded into convolutions: what blocks give stays what it was."""
    trunk, _ = made(backbone)
    readout, size = "+".join(SEARCHED[backbone]), SIZES[backbone]
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    preprocessing = preprocessing_of(backbone, size)
    fast = FrozenTrunk(trunk, preprocessing, CPU, precision, readout=readout)
    if backbone in ("resnet18", "efficientnet_lite0"):
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.module.modules())
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    right = read_out(trunk, (pixels / 255 - mean) / std, readout)
    found = fast(pixels, torch.zeros(2, dtype=torch.bool))
    assert (found.dtype, found.shape) == (torch.float32, right.shape)
    start = 0
    for part in SEARCHED[backbone]:
        columns = slice(start, start := start + count_features(trunk, part, size))
        error = (found[:, columns] - right[:, columns]).abs().max() / right[:, columns].abs().max()
        in_16_bits = 0.15 if backbone == "efficientnet_lite0" else 0.05
        assert error <= {"fp32": 1e-4, "bf16": in_16_bits}[precision], part
    assert fast.dtype == DTYPES[precision]


@pytest.mark.parametrize("trainable", ["layer4", "all"])
@pytest.mark.parametrize(
    ("backbone", "readout"),
    [
        ("resnet18", "pre/max+last/avg"),
        ("efficientnet_lite0", "pre/max"),
        ("timm/test_vit", "last/token+last/patches"),
    ],
)
def test_a_readout_is_trained_with_its_trunk(backbone, readout, trainable):
    state = made(backbone)[0].state_dict()
    classifier = build_classifier(backbone, state, 2, 0, SIZES[backbone], readout)
    parameters = set_trainable(classifier, trainable)
    _, pictures = made(backbone)
    logits = classifier(pictures)
    assert logits.shape == (2, 2)
    cross_entropy(logits, torch.tensor([0, 1])).backward()
    num_reached = sum(parameter.grad is not None and bool(parameter.grad.any()) for parameter in parameters)
    unread = {"efficientnet_lite0": 3, "timm/test_vit": 13}.get(backbone, 0)
    assert num_reached >= len(parameters) - unread, "all but the layers behind what is read"
    assert classifier.head.weight.grad.any()
    features = read_out(classifier.trunk, pictures, readout)
    torch.testing.assert_close(logits, classifier.head(features))


def test_a_worker_without_pictures_takes_part():
    classifier = build_classifier("resnet18", made("resnet18")[0].state_dict(), 2, 0, 64, "stage3/max+last/avg")
    set_trainable(classifier, "all")
    logits = classifier(torch.empty(0, 3, 64, 64))
    assert logits.shape == (0, 2)
    logits.sum().backward()
