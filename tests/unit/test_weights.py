import hashlib
import http.server
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from plates.config import UserError
from plates.model import build_classifier
from plates.weights import fetch, resolve_weights


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """An empty torch cache, and downloads that fail as on a machine that reaches none."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)


def test_auto_falls_back_to_lite0_and_says_why():
    weights = resolve_weights("auto", "imagenet", seed=0)
    assert weights.backbone == "efficientnet_lite0"
    assert "resnet18" in weights.reason
    assert "cannot be downloaded" in weights.reason


def test_a_named_backbone_never_becomes_another():
    with pytest.raises(UserError, match=r"--backbone resnet34: .*--weights FILE"):
        resolve_weights("resnet34", "imagenet", seed=0)


def test_imagenet_weights_come_from_torchs_cache(tmp_path):
    whole = torchvision.models.resnet18()
    cached = tmp_path / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    cached.parent.mkdir(parents=True)
    torch.save(whole.state_dict(), cached)
    weights = resolve_weights("auto", "imagenet", seed=0)
    assert weights.backbone == "resnet18"
    assert torch.equal(weights.state["conv1.weight"], whole.conv1.weight)


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[SimpleNamespace]:
    """A web server whose answers come in two halves, with a pause of `pause_s` between them."""
    monkeypatch.setattr(torch.hub, "urlopen", urllib.request.urlopen)
    served = SimpleNamespace(data=b"", pause_s=0.2)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(served.data)))
            self.end_headers()
            with suppress(OSError):  # of a client that has gone
                self.wfile.write(served.data[: len(served.data) // 2])
                self.wfile.flush()
                time.sleep(served.pause_s)
                self.wfile.write(served.data[len(served.data) // 2 :])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        served.url = f"http://127.0.0.1:{listening.server_port}"
        yield served
        listening.shutdown()


def files_of(cache):
    return sorted(path.name for path in cache.iterdir())


def test_a_download_is_checked_against_its_hash_and_kept(tmp_path, server):
    server.data = bytes(range(256)) * 10_000
    name, cache = f"resnet18-{hashlib.sha256(server.data).hexdigest()[:8]}.pth", tmp_path / "torch/hub/checkpoints"
    server.pause_s = 1.0
    command = [sys.executable, "-c", f"from plates.weights import fetch; fetch({server.url + '/' + name!r})"]
    first_runs = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(60) for process in first_runs] == [0, 0]
    assert (cache / name).read_bytes() == server.data
    assert files_of(cache) == [name]
    server.data = b"an error page"
    with pytest.raises(OSError, match="hash"):
        fetch(f"{server.url}/resnet18-00000000.pth")
    assert files_of(cache) == [name]


def test_a_server_that_goes_silent_is_not_waited_for(tmp_path, server, monkeypatch):
    monkeypatch.setattr("plates.weights.CONNECT_TIMEOUT_S", 0.2)
    server.data, server.pause_s = bytes(1000), 2
    with pytest.raises(OSError, match="timed out"):
        fetch(f"{server.url}/resnet18-00000000.pth")
    assert files_of(tmp_path / "torch/hub/checkpoints") == []
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("garbage", [b"", b"<html>Sign in to the network</html>", b"PK\x03\x04 cut off", bytes(1000)])
@pytest.mark.parametrize("backbone", ["auto", "resnet18"])
def test_a_garbage_file_in_torchs_cache_is_named(garbage, backbone, tmp_path):
    cached = tmp_path / "torch/hub/checkpoints/resnet18-f37072fd.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(garbage)
    with pytest.raises(UserError, match=rf"^--backbone {backbone}: {cached} is not .*; delete it"):
        resolve_weights(backbone, "imagenet", seed=0)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("backbone", ["auto", "resnet18"])
def test_a_weights_file_fills_the_trunk(tmp_path, suffix, backbone):
    whole = torchvision.models.resnet18()
    path = tmp_path / f"weights{suffix}"
    save_file(whole.state_dict(), path) if suffix == ".safetensors" else torch.save(whole.state_dict(), path)
    weights = resolve_weights(backbone, str(path), seed=0)
    assert weights.backbone == "resnet18"
    assert torch.equal(weights.state["layer4.1.conv2.weight"], whole.layer4[1].conv2.weight)
    assert "fc.weight" not in weights.state


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r18.pth")
    (tmp_path / "text.pth").write_text("no tensors")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    torch.save({"weights": [1, 2]}, tmp_path / "list.pth")
    for name, backbone, message in [
        ("r18.pth", "resnet50", "not weights of resnet50"),
        ("r18.pth", "resnet34", "not weights of resnet34"),
        ("text.pth", "resnet18", "not a file of tensors"),
        ("empty.safetensors", "resnet18", "not a file of tensors"),
        ("list.pth", "resnet18", "no dictionary of tensors"),
        ("missing.pth", "resnet18", "no such file"),
    ]:
        with pytest.raises(UserError, match=message):
            resolve_weights(backbone, str(tmp_path / name), seed=0)


def test_random_weights_are_asked_for_and_follow_the_seed():
    one, same, other = (resolve_weights("resnet18", "none", seed) for seed in (1, 1, 2))
    assert torch.equal(one.state["conv1.weight"], same.state["conv1.weight"])
    assert not torch.equal(one.state["conv1.weight"], other.state["conv1.weight"])
    assert "random" in one.source


@pytest.mark.parametrize("size", [160, 96])
def test_a_weights_file_fills_a_model_of_timm_at_any_size(size, tmp_path):
    """Position embeddings are resized by timm, as it does with weights of its own."""
    whole = timm.create_model("test_vit3")
    torch.nn.init.normal_(whole.pos_embed)
    save_file(whole.state_dict(), tmp_path / "vit.safetensors")
    weights = resolve_weights("timm/test_vit3", str(tmp_path / "vit.safetensors"), 0, size)
    assert weights.backbone == "timm/test_vit3"
    overlay = {"file": str(tmp_path / "vit.safetensors")}
    theirs = timm.create_model("test_vit3", pretrained=True, img_size=size, pretrained_cfg_overlay=overlay).eval()
    ours = build_classifier("timm/test_vit3", weights.state, 2, 0, size).trunk
    pictures = torch.randn(2, 3, size, size)
    expected = theirs.forward_head(theirs.forward_features(pictures), pre_logits=True)
    assert torch.allclose(ours(pictures), expected, atol=1e-5)
    with pytest.raises(UserError, match="not weights of timm/test_vit4"):
        resolve_weights("timm/test_vit4", str(tmp_path / "vit.safetensors"), 0, size)


@pytest.mark.parametrize(("backbone", "size"), [("timm/test_vit", 100), ("timm/test_coatnet", 100)])
def test_a_size_that_a_model_cannot_take_is_one_line(backbone, size):
    with pytest.raises(UserError, match=rf"^--image-size {size}: {backbone} does not take it \(.*; its own is 160$"):
        resolve_weights(backbone, "none", 0, size)


def test_an_encoder_without_pooled_features_is_refused():
    with pytest.raises(UserError, match="timm/qwen3_vit_88m_enc: gives"):
        resolve_weights("timm/qwen3_vit_88m_enc", "none", 0)


def test_timms_weights_come_from_the_hubs_cache(tmp_path, monkeypatch):
    """A cache as the hub's client leaves it; without the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = r"--backbone timm/test_resnet: its weights are not cached .* --weights none$"
    with pytest.raises(UserError, match=message):
        resolve_weights("timm/test_resnet", "imagenet", 0)
    cached = tmp_path / "models--timm--test_resnet.r160_in1k"
    whole = timm.create_model("test_resnet")
    (cached / "snapshots" / "0").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    save_file(whole.state_dict(), cached / "snapshots" / "0" / "model.safetensors")
    weights = resolve_weights("timm/test_resnet", "imagenet", 0)
    assert weights.source == f"timm {timm.__version__}: timm/test_resnet.r160_in1k"
    assert torch.equal(weights.state["conv1.0.weight"], whole.state_dict()["conv1.0.weight"])
    with pytest.raises(UserError, match="--backbone timm/test_vit_relpos: its weights are not cached"):
        resolve_weights("timm/test_vit_relpos", "imagenet", 0)
