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

import pytest
import torch
from safetensors.torch import save_file

from plates import model
from plates.checkpoint import Bundle, build_model, load_bundle, save_bundle
from plates.config import UserError
from plates.model import build_classifier, build_trunk, preprocessing_of, resolve_weights, set_trainable


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
    whole = model.torchvision.models.resnet18()
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
    command = [sys.executable, "-c", f"from plates.model import fetch; fetch({server.url + '/' + name!r})"]
    first_runs = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(60) for process in first_runs] == [0, 0]
    assert (cache / name).read_bytes() == server.data
    assert files_of(cache) == [name]
    server.data = b"an error page"
    with pytest.raises(OSError, match="hash"):
        model.fetch(f"{server.url}/resnet18-00000000.pth")
    assert files_of(cache) == [name]


def test_a_server_that_goes_silent_is_not_waited_for(tmp_path, server, monkeypatch):
    monkeypatch.setattr(model, "CONNECT_TIMEOUT_S", 0.2)
    server.data, server.pause_s = bytes(1000), 2
    with pytest.raises(OSError, match="timed out"):
        model.fetch(f"{server.url}/resnet18-00000000.pth")
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
    whole = model.torchvision.models.resnet18()
    path = tmp_path / f"weights{suffix}"
    save_file(whole.state_dict(), path) if suffix == ".safetensors" else torch.save(whole.state_dict(), path)
    weights = resolve_weights(backbone, str(path), seed=0)
    assert weights.backbone == "resnet18"
    assert torch.equal(weights.state["layer4.1.conv2.weight"], whole.layer4[1].conv2.weight)
    assert "fc.weight" not in weights.state


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save(model.torchvision.models.resnet18().state_dict(), tmp_path / "r18.pth")
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


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "efficientnet_lite0"])
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
    again = build_model(loaded)
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
