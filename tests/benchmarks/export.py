"""Images a second of an exported ONNX file by ONNX Runtime beside the forward passes of `plates predict`, in fp32.

python tests/benchmarks/export.py [--backbones efficientnet_lite0 resnet18] [--repeats 3] [--threads 2]

64 drawn plates, decoded, to 224 px, with random weights, which change no rate; the ways take turns. The last line is
one JSON object of medians and ranges, by backbone.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from onnxruntime import InferenceSession, SessionOptions
from torch import Tensor

from plates.device import CPU, set_up_process
from plates.export.files import save_onnx, trace
from plates.export.graph import ImageClassifier
from plates.features import Drawing, FrozenTrunk, forward_all, make_numbered
from plates.model import build_classifier, build_trunk, preprocessing_of
from plates.synthetic import draw_plate
from plates.transforms import EVAL

NUM_IMAGES, BATCH_SIZE = 64, 16


def images_per_sec(predict: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    predict()
    return NUM_IMAGES / (time.perf_counter() - start_s)


def build(backbone: str, images: Tensor, num_threads: int) -> dict[str, Callable[[], object]]:
    """What predicts all images (64, H, W, 3) uint8, by name."""
    model = build_classifier(backbone, build_trunk(backbone)[0].state_dict(), 2, 0)
    preprocessing = preprocessing_of(backbone, None)
    options = SessionOptions()
    options.intra_op_num_threads = num_threads
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        save_onnx(trace(ImageClassifier(model, preprocessing)), file, {})
        session = InferenceSession(file, options, providers=["CPUExecutionProvider"])
    trunk = FrozenTrunk(model.trunk, preprocessing, CPU, "fp32", readout=model.readout)

    def predict() -> None:
        views = (make_numbered(one.permute(2, 0, 1), "", [EVAL], Drawing(0), preprocessing) for one in images)
        model.head(torch.cat([*forward_all(trunk, views)]).clone()).softmax(1)

    def run(size: int) -> None:
        for batch in images.split(size):
            session.run(None, {"images": batch.numpy()})

    return {"predict": predict, **{f"onnx, {size} a call": partial(run, size) for size in (1, BATCH_SIZE)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["efficientnet_lite0", "resnet18"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    set_up_process(CPU, "fp32", arguments.threads)
    images = torch.stack([torch.from_numpy(draw_plate(0, index, index % 2 == 0)) for index in range(NUM_IMAGES)])
    found = {}
    for backbone in arguments.backbones:
        ways = build(backbone, images, arguments.threads)
        for predict in ways.values():
            predict()  # warm-up
        rates = [{name: images_per_sec(way) for name, way in ways.items()} for _ in range(arguments.repeats)]
        ratios = {name: [one[name] / one["predict"] for one in rates] for name in ways if name != "predict"}
        rows = {"predict: images/s": [one["predict"] for one in rates]}
        rows |= {f"{name} / predict": values for name, values in ratios.items()}
        found[backbone] = {n: [round(x, 2) for x in (statistics.median(v), min(v), max(v))] for n, v in rows.items()}
        print(f"{backbone}: {found[backbone]}", flush=True)
    print(json.dumps({"threads": arguments.threads, "n": arguments.repeats, "median, least, most": found}))


if __name__ == "__main__":
    main()
