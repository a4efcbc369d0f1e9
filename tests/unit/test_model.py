import pytest
import torch

from plates.checkpoint import Bundle, load_bundle, rebuild_model, save_bundle
from plates.config import TrainConfig, UserError
from plates.device import DTYPES
from plates.folding import fast_trunk, fold_batch_norm
from plates.model import build_classifier, build_trunk, preprocessing_of, set_trainable

# A ViT with attention pooling, one with a class token, and networks of convolutions with and without batch norm; of
# the last three the head has weights of its own.
TIMM = {"timm/test_vit": 64, "timm/test_vit3": 96, "timm/test_resnet": 96, "timm/regnetx_002": 368,
        "timm/test_efficientnet": 256, "timm/test_convnext": 64, "timm/mobilenetv3_small_050": 1024}  # fmt: skip


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "efficientnet_lite0", *TIMM])
def test_what_is_trained(backbone):
    classifier = build_classifier(backbone, build_trunk(backbone)[0].state_dict(), 3, seed=0)
    num_head = sum(p.numel() for p in classifier.head.parameters())
    num_all = sum(p.numel() for p in classifier.parameters())
    counts = {part: sum(p.numel() for p in set_trainable(classifier, part)) for part in ("head", "layer4", "all")}
    assert counts["head"] == num_head
    assert num_head < counts["layer4"] < counts["all"] == num_all
    assert not any(module.training for module in classifier.modules())


def test_a_bundle_alone_is_enough_to_predict(tmp_path):
    classifier = build_classifier("resnet18", build_trunk("resnet18")[0].state_dict(), 2, seed=0)
    preprocessing = preprocessing_of("resnet18", 64)
    save_bundle(tmp_path, Bundle("resnet18", ("a", "b"), preprocessing, classifier.state_dict(), {"seed": 1}))
    loaded = load_bundle(tmp_path)
    assert (loaded.classes, loaded.preprocessing, loaded.info["seed"]) == (("a", "b"), preprocessing, 1)
    images = torch.randn(2, 3, 64, 64)
    again = rebuild_model(loaded)
    assert torch.allclose(again(images), classifier(images), atol=1e-5)


@pytest.mark.parametrize("spoilt", ["model.json", "model.safetensors"])
def test_a_damaged_bundle_is_refused(tmp_path, spoilt):
    state = build_classifier("resnet18", build_trunk("resnet18")[0].state_dict(), 2, seed=0).state_dict()
    save_bundle(tmp_path, Bundle("resnet18", ("a", "b"), preprocessing_of("resnet18", 64), state, {}))
    (tmp_path / spoilt).write_bytes(b"garbage")
    with pytest.raises(UserError, match="is damaged"):
        load_bundle(tmp_path)
    (tmp_path / spoilt).unlink()
    with pytest.raises(UserError, match=f"holds no {spoilt}"):
        load_bundle(tmp_path)


def test_a_bundle_of_a_model_that_timm_here_does_not_have_is_refused(tmp_path):
    bundle = Bundle("timm/vit_of_tomorrow", ("a", "b"), preprocessing_of("resnet18", 64), {"x": torch.zeros(1)},
                    {"versions": {"timm": "9.9"}})  # fmt: skip
    save_bundle(tmp_path, bundle)
    with pytest.raises(UserError, match=r"timm/vit_of_tomorrow of timm 9\.9 is not here: no such backbone"):
        load_bundle(tmp_path)


def test_the_last_stage_is_what_follows_the_first_three_quarters():
    trained = {}
    for backbone in (
        "resnet18",
        "efficientnet_lite0",
        "timm/resnet18",
        "timm/test_convnext",
        "timm/vit_tiny_patch16_224",
    ):
        classifier = build_classifier(backbone, build_trunk(backbone)[0].state_dict(), 2, seed=0)
        set_trainable(classifier, "layer4")
        names = [name for name, value in classifier.trunk.named_parameters() if value.requires_grad]
        trained[backbone] = {
            ".".join(name.split(".")[: 2 if name.startswith(("blocks", "stages")) else 1]) for name in names
        }
    assert trained == {
        "resnet18": {"layer4"},
        "timm/resnet18": {"layer4"},
        "efficientnet_lite0": {"blocks.5", "blocks.6", "conv_head", "bn2"},
        "timm/test_convnext": {"stages.3", "head"},
        "timm/vit_tiny_patch16_224": {"blocks.9", "blocks.10", "blocks.11", "norm"},
    }


def shake_batch_norm(trunk):
    for module in trunk.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backbone", TIMM)
def test_a_frozen_model_of_timm_gives_its_pooled_features(backbone, precision):
    trunk, num_features = build_trunk(backbone)
    shake_batch_norm(trunk.eval())
    size = preprocessing_of(backbone, None).image_size
    fast = fast_trunk(trunk, torch.device("cpu"), DTYPES[precision], size)
    pictures = torch.randn(3, 3, size, size)
    with torch.inference_mode():
        right = trunk.forward_head(trunk.forward_features(pictures), pre_logits=True)
        found = fast(pictures.to(DTYPES[precision])).float()
    assert right.shape == (3, num_features) == (3, TIMM[backbone])
    assert (found - right).abs().max() <= {"fp32": 1e-4, "bf16": 0.05}[precision] * right.abs().max()


def is_folded(trunk, size=64):
    fast = fast_trunk(trunk, torch.device("cpu"), torch.float32, size)
    pictures = torch.randn(2, 3, size, size)
    assert torch.allclose(fast(pictures), trunk(pictures), atol=1e-4)
    return not any(isinstance(module, torch.nn.BatchNorm2d) for module in fast.modules())


def test_batch_norm_stays_where_folding_it_is_not_known_to_be_right():
    """Here the norm is defined after a convolution that its input does not come from."""

    class Twisted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.BatchNorm2d(3)

        def forward(self, pictures):
            return self.conv(self.norm(pictures)).mean((2, 3))

    for trunk, expected in ((build_trunk("timm/test_efficientnet")[0], True), (Twisted(), False)):
        shake_batch_norm(trunk.eval())
        assert is_folded(trunk) == expected
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fold_batch_norm(trunk).modules())


@pytest.mark.parametrize("backbone", ["timm/test_vit", "timm/test_vit3"])
def test_a_worker_without_pictures_takes_part_with_zero(backbone):
    classifier = build_classifier(backbone, build_trunk(backbone)[0].state_dict(), 2, seed=0)
    parameters = set_trainable(classifier, "all")
    logits = classifier(torch.empty(0, 3, 160, 160))
    assert logits.shape == (0, 2)
    logits.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in parameters)


def test_a_model_of_timm_keeps_its_pictures():
    vit = preprocessing_of("timm/vit_tiny_patch16_384.augreg_in21k_ft_in1k", None)
    assert (vit.image_size, vit.interpolation, vit.crop_mode, vit.crop_pct) == (384, "bicubic", "center", 1.0)
    assert vit.mean == vit.std == (0.5, 0.5, 0.5)
    assert TrainConfig(backbone="timm/vit_tiny_patch16_384").image_size == 384
    assert TrainConfig(backbone="timm/vit_tiny_patch16_384", image_size=96).image_size == 96
