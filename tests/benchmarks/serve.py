"""How fast `plates serve` answers at 1, 8 and 64 clients, beside what `plates predict` does on the same machine.

python tests/benchmarks/serve.py --checkpoint RUN/checkpoint --data PHOTOS [--clients 1 8 64] [--repeats 3]

Each client sends photos of PHOTOS/test, one a request, over a connection that it keeps, and waits for it;
all are threads of this process, on the server's machine. In each repeat `plates predict` runs first, in a process of
its own with an empty cache, then a server, each number of clients for some seconds after a warm-up. Latency in
milliseconds, throughput in images per second; the last line is one JSON object of medians and ranges.
"""

import argparse
import http.client
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

WARM_UP_S = 2.0


def measure_predict(checkpoint: str, data: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--checkpoint", checkpoint, "--data", data, "--out", f"{folder}/run", "--num-workers", "0"]
        command = [sys.executable, "-m", "ray_jobs", "predict", *flags]
        env = os.environ | {"PLATES_CACHE": f"{folder}/cache"}
        subprocess.run(command, check=True, capture_output=True, env=env)
        row = pd.read_csv(f"{folder}/run/timing.csv").iloc[0]
    return {"predict: images/s": float(row["inference_images_per_sec"])}


def measure_server(
    checkpoint: str, photos: list[bytes], counts: list[int], port: int, time_s: float
) -> dict[str, float]:
    command = [sys.executable, "-m", "ray_jobs", "serve", "--checkpoint", checkpoint, "--port", str(port)]
    start_s = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            assert next(line for line in server.stdout if re.match("listens at ", line))
            found = {"start_s": time.monotonic() - start_s}
            for count in counts:
                ask_for(count, port, photos, WARM_UP_S)
                found |= {f"{count} clients: {k}": v for k, v in ask_for(count, port, photos, time_s).items()}
        finally:
            server.terminate()
            server.wait()
    return found


def ask_for(num_clients: int, port: int, photos: list[bytes], time_s: float) -> dict[str, float]:
    """What so many clients see for so many seconds."""
    latencies: list[float] = []
    turn = itertools.count()
    end_s = time.perf_counter() + time_s

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while (sent_s := time.perf_counter()) < end_s:
            connection.request("POST", "/predict", photos[next(turn) % len(photos)], {"Content-Type": "image/jpeg"})
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == 200, body
            latencies.append(time.perf_counter() - sent_s)

    start_s = time.perf_counter()
    clients = [threading.Thread(target=ask) for _ in range(num_clients)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    p50, p99 = (1000 * np.percentile(latencies, [50, 99])).tolist()
    return {"p50 ms": p50, "p99 ms": p99, "images/s": len(latencies) / (time.perf_counter() - start_s)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each number of clients")
    parser.add_argument("--port", type=int, default=8000)
    own = parser.parse_args()
    photos = [path.read_bytes() for path in sorted(Path(own.data).glob("test/*.jpg"))[:64]]
    measured: dict[str, list[float]] = {}
    for repeat in range(own.repeats):
        found = measure_predict(own.checkpoint, own.data)
        found |= measure_server(own.checkpoint, photos, own.clients, own.port, own.seconds)
        for name, value in found.items():
            measured.setdefault(name, []).append(round(value, 1))
        print(f"repeat {repeat}: { ({name: round(value, 1) for name, value in found.items()}) }", flush=True)
    described = {"machine": platform.processor() or platform.machine(), "cpus": psutil.cpu_count(), "n": own.repeats}
    figures = {name: [statistics.median(v), min(v), max(v)] for name, v in measured.items()}
    print(json.dumps({**described, "median, least, most": figures}))


if __name__ == "__main__":
    main()
