"""Requests in, statuses out: the HTTP side of `plates serve` without Ray, with a model of random weights."""

import asyncio
import base64
import io
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from by_hand import ByHand
from conftest import write_picture
from PIL import Image

from plates.checkpoint import Bundle, load_bundle, save_bundle
from plates.config import TrainConfig
from plates.device import CPU
from plates.images import decode
from plates.model import build_classifier, build_trunk, preprocessing_of
from plates.serve.predictor import Predictor

testclient = pytest.importorskip("starlette.testclient")

VERSION = {"checkpoint": "abc", "plates": "1"}
SETTINGS = {"seed": 3, "augment": "both", "tta": 3, "readout": "last/avg", "num_views": 2}
MAX_BYTES, TOKEN = 200_000, "a token"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A ResNet18 of random weights that averages the image and two drawn and turned views."""
    trunk, _ = build_trunk("resnet18")
    model = build_classifier("resnet18", trunk.state_dict(), 3, 0, 32)
    info = {**SETTINGS, "classes": ["b", "a", "c"]}
    bundle = Bundle("resnet18", ("b", "a", "c"), preprocessing_of("resnet18", 32), model.state_dict(), info)
    save_bundle(folder := tmp_path_factory.mktemp("checkpoint"), bundle)
    return folder


@pytest.fixture
def build(checkpoint, one_thread):
    from plates.serve.app import build_app

    settings = TrainConfig(seed=3, augment="both", tta=3)
    predictor = Predictor(load_bundle(checkpoint), settings, CPU, "fp32")

    async def classify(data: bytes, name: str, is_explained: bool) -> dict[str, Any]:
        ((chances, quantile),) = predictor.predict([predictor.load(data, name)])
        assert quantile is None  # the bundle has no training images
        return {"chances": chances, **(predictor.explain(data, name, "a") if is_explained else {})}

    return lambda token=None: build_app(classify, VERSION, token, MAX_BYTES)


@pytest.fixture
def client(build):
    return testclient.TestClient(build())


@pytest.fixture
def jpeg(tmp_path) -> bytes:
    write_picture(tmp_path / "one.jpg", 5)
    return (tmp_path / "one.jpg").read_bytes()


def huge_png() -> bytes:
    """30,000 pixels a side, in 100 bytes."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0"))]
    chunks = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in [*parts, (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_probabilities_are_those_computed_by_hand(client, checkpoint, jpeg):
    """Of the mean of the logits of the views, which are drawn by the file's name."""
    by_hand = ByHand(checkpoint)
    answer = client.post("/predict", files=[("image", ("test/x.jpg", jpeg)), ("other", ("y.jpg", jpeg))]).json()
    assert answer["version"] == VERSION
    assert [one["name"] for one in answer["predictions"]] == ["test/x.jpg", "y.jpg"]
    found = [one["chances"] for one in answer["predictions"]]
    for name, chances in zip(("test/x.jpg", "y.jpg"), found, strict=True):
        logits = by_hand.model(by_hand.views(decode(jpeg), name, by_hand.eval_numbers())).detach()
        np.testing.assert_allclose(chances, logits.mean(0).double().softmax(0), atol=1e-5)
    assert found[0] != found[1]


def test_a_body_and_json_are_the_same_image(client, jpeg):
    """Whatever type the request claims; curl claims that of a form."""
    kinds = ("image/jpeg", "image/png", "application/x-www-form-urlencoded")
    answers = [client.post("/predict", content=jpeg, headers={"Content-Type": kind}) for kind in kinds]
    answers.append(client.post("/predict", content=jpeg))
    answers.append(client.post("/predict", json={"images": [base64.b64encode(jpeg).decode()] * 2}))
    predictions = [one for answer in answers for one in answer.json()["predictions"]]
    assert len(predictions) == 6
    assert all(one == {"chances": predictions[0]["chances"]} for one in predictions)


def test_what_decided_is_a_picture_of_the_images_size_and_only_where_it_is_asked_for(client, jpeg):
    (found,) = client.post("/predict?explain=1", content=jpeg).json()["predictions"]
    kind, _, data = found["map"].partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == Image.open(io.BytesIO(jpeg)).size
    for query in ("", "?explain=0"):
        assert client.post(f"/predict{query}", content=jpeg).json()["predictions"] == [{"chances": found["chances"]}]


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        ({"content": b""}, 400, "no image was sent"),
        ({"content": b"text"}, 415, "not an image"),
        ({"content": huge_png()}, 415, "has more than [0-9,]+ pixels"),
        ({"files": {"image": ("a.jpg", b"")}}, 415, "the file is empty"),
        ({"files": [("image", (f"{n}.jpg", b"x")) for n in range(65)]}, 400, "Too many files"),
        ({"data": {"a": "b"}, "headers": {"Content-Type": "multipart/form-data"}}, 400, "Missing boundary"),
        ({"content": b"--x", "headers": {"Content-Type": "multipart/form-data; boundary=y"}}, 400, "."),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "JSON must be"),
        ({"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}}, 400, "JSON must be"),
        ({"content": b"\xff", "headers": {"Content-Type": "application/json; charset=utf-8"}}, 400, "JSON must be"),
        *(({"json": sent}, 400, "JSON must be") for sent in
          ([], 5, {}, {"images": "abcd"}, {"images": [1]}, {"images": ["?"]}, {"images": ["é"]}, {"images": ["a"]},
           {"images": {"a": "b"}}, {"images": ["YQ=="] * 65})),
        ({"json": {"images": []}}, 400, "no image was sent"),
        ({"json": {"images": ["YQ==", "YQ=="]}}, 415, "not an image"),
        ({"content": bytes(MAX_BYTES + 1)}, 413, "the request has more than"),
    ],
)  # fmt: skip
def test_what_is_refused_is_one_line_of_json(client, sent, status, message):
    answer = client.post("/predict", **sent)
    assert answer.status_code == status
    assert [*answer.json()] == ["error"]
    assert re.match(message, answer.json()["error"])
    assert "\n" not in answer.text


def test_one_image_that_cannot_be_read_takes_nothing_from_the_others(client, jpeg):
    answer = client.post("/predict", files=[("image", ("a.jpg", b"text")), ("image", ("b.jpg", jpeg))])
    assert answer.status_code == 200
    bad, good = answer.json()["predictions"]
    assert bad == {"name": "a.jpg", "error": "not an image"}
    assert good["name"] == "b.jpg"
    assert len(good["chances"]) == 3


@pytest.mark.parametrize("kind", ["image/jpeg", "application/json", "multipart/form-data; boundary=x"])
def test_a_body_without_end_is_refused_while_it_comes(build, kind):
    """Sent in pieces, without its length."""
    piece, taken, sent = 1000, [], []
    start = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'

    async def receive() -> dict:
        taken.append(piece)
        assert sum(taken) <= MAX_BYTES + 2 * piece
        return {"type": "http.request", "body": start if len(taken) == 1 else bytes(piece), "more_body": True}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "root_path": "",
             "headers": [(b"content-type", kind.encode())]}  # fmt: skip
    asyncio.run(build()(scope, receive, send))
    assert sent[0]["status"] == 413


def test_a_length_that_is_too_large_is_refused_unread(build):
    async def receive() -> dict:
        raise AssertionError("nothing was to be read")

    async def send(message: dict) -> None:
        sent.append(message)

    sent: list[dict] = []
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "root_path": "",
             "headers": [(b"content-length", str(MAX_BYTES + 1).encode())]}  # fmt: skip
    asyncio.run(build()(scope, receive, send))
    assert sent[0]["status"] == 413


def test_only_the_token_opens(build, jpeg):
    client = testclient.TestClient(build(TOKEN))
    for given in (
        None,
        "Bearer ",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Basic {TOKEN}",
        TOKEN,
        b"Bearer \xff\xe9",
    ):
        answer = client.post("/predict", content=jpeg, headers={"Authorization": given} if given else {})
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert [*answer.json()] == ["error"]
    assert client.post("/predict", content=jpeg, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert client.get("/healthz").json() == {"status": "ok", "version": VERSION}
    assert 'id="token"' in client.get("/").text


def test_the_page_loads_nothing_from_elsewhere(client):
    def nonces(text: str) -> Iterator[str]:
        yield from re.findall(r'nonce[=-]"?([\w-]+)', text)

    first, second = client.get("/"), client.get("/")
    policy = first.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert len({*nonces(policy), *nonces(first.text)}) == 1
    assert {*nonces(first.text)}.isdisjoint(nonces(second.text))
    assert not re.search(r"https?://|\bsrc=|\bhref=|\bstyle=|\bon\w+=", first.text)
    assert 'id="token"' not in first.text
    assert first.headers["X-Content-Type-Options"] == "nosniff"


def test_other_ways_and_places_are_json_too(client):
    for answer, status in ((client.get("/predict"), 405), (client.get("/elsewhere"), 404)):
        assert (answer.status_code, [*answer.json()]) == (status, ["error"])


def test_a_phone_s_turned_photo_is_upright(client, tmp_path):
    """Whatever the way, an image is decoded as the other jobs do."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned, upright = io.BytesIO(), io.BytesIO()
    picture.save(turned, "PNG", exif=exif)
    picture.rotate(-90, expand=True).save(upright, "PNG")
    answers = [client.post("/predict", content=file.getvalue()).json() for file in (turned, upright)]
    assert answers[0] == answers[1]
