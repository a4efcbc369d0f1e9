"""What bare Ray takes on this machine before and around a 2-worker run: nothing is trained, nothing is predicted.

python tests/benchmarks/ray_floor.py

Prints seconds of importing, of `ray.init`, of an empty TorchTrainer.fit (until its loop is entered, and whole), of an
empty map_batches on two actors, and of all with the shutdown. `startup_s` of a 2-worker run is to be read beside it.
"""

import logging
import os
import tempfile
import time


def main() -> None:
    started_s = time.time()
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    import pandas as pd
    import ray.data
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    imported_s = time.time()
    ray.init(address="local", logging_level=logging.ERROR)
    connected_s = time.time()
    with tempfile.TemporaryDirectory() as folder:
        entered_s = (
            TorchTrainer(
                lambda config: time.time(),
                train_loop_config={},
                scaling_config=ScalingConfig(num_workers=2),
                run_config=RunConfig(storage_path=folder),
            )
            .fit()
            .return_value
        )
    fitted_s = time.time()

    class Echo:
        def __call__(self, batch: dict) -> dict:
            return batch

    pool = ray.data.ActorPoolStrategy(size=2)
    rows = ray.data.from_pandas([pd.DataFrame({"path": ["a"]})] * 2)
    list(rows.map_batches(Echo, compute=pool, batch_size=None, num_cpus=1).iter_batches(batch_size=None))
    mapped_s = time.time()
    ray.shutdown()
    print(f"import {imported_s - started_s:.1f}, ray.init {connected_s - imported_s:.1f}", end=", ")
    print(f"loop entered {entered_s - connected_s:.1f}, fit {fitted_s - connected_s:.1f}", end=", ")
    print(f"map_batches {mapped_s - fitted_s:.1f}, all {time.time() - started_s:.1f} s")


if __name__ == "__main__":
    main()
