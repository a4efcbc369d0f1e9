"""What is tried before anything is trained: in the run directory and the cache, on every node, GPUs in use or not."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from plates import rundir
from plates.cluster import Plan
from plates.config import TrainConfig
from plates.dataset import load_dataset
from plates.device import best_precision
from plates.preflight import probe_nodes
from ray_jobs import check, train

HERE = Plan(0, "cpu", 1, "test")
SMALL = ["--backbone", "resnet18", "--weights", "none", "--image-size", "32", "--epochs", "1", "--num-workers", "0"]


@dataclass(frozen=True)
class Watching:
    """A source that notes what lies beside and inside the run directory while a node is tried."""

    root: Path
    seen: list[set[str]] = field(default_factory=list)

    def read(self, path: str) -> None:
        self.seen.append({found.relative_to(self.root).as_posix() for found in self.root.rglob("*")})


def test_nodes_write_inside_the_run_directory_and_nothing_stays(tmp_path):
    """So that it may be all that can be written: a folder in a read-only one, a prefix of a bucket."""
    source = Watching(tmp_path)
    dataset = replace(load_dataset("synthetic:8", 0), source=source)
    for run in (tmp_path / "made" / "for" / "it", tmp_path / "there"):
        if run.name == "there":
            run.mkdir()
        before = set(tmp_path.rglob("*"))
        (probe,) = probe_nodes(HERE, dataset, run)
        assert probe.problems == ()
        assert probe.precision == best_precision(torch.device("cpu"))
        inside = [path for path in source.seen[-1] if path.startswith(f"{run.relative_to(tmp_path).as_posix()}/.")]
        assert len(inside) >= 2
        for path in set(source.seen[-1]) - set(inside):
            assert run.is_relative_to(tmp_path / path)
        assert set(tmp_path.rglob("*")) == before


def test_what_a_killed_preflight_left_does_not_take_the_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("plates.preflight.remove_tree", lambda folder: None)
    probe_nodes(HERE, load_dataset("synthetic:8", 0), tmp_path / "run")
    assert list((tmp_path / "run").iterdir())
    assert rundir.find_run(str(tmp_path / "run"), "train", TrainConfig()) == tmp_path / "run"


def test_a_cache_that_cannot_be_written_is_said_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache"
    monkeypatch.setenv("PLATES_CACHE", str(cache))
    run = tmp_path / "run"
    assert train.main([*SMALL, "--data", "synthetic:8", "--out", str(run)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"plates train: PLATES_CACHE {cache}: cannot be written (Not a directory)")
    assert not run.exists()
    assert (
        train.main([*SMALL, "--data", "synthetic:8", "--trainable", "layer4", "--out", str(run)]) == 0
    )  # has no use
    assert check.main(["--num-workers", "0", "--out", str(tmp_path / "other")]) == 2
    assert f"PLATES_CACHE {cache}: cannot be written" in capsys.readouterr().out


def test_workers_try_the_cache_and_a_gpu_in_use_is_no_refusal(tmp_path, monkeypatch):
    """On a Ray that believes in one GPU here, which an actor holds."""
    import ray

    class Holder:
        def hold(self) -> bool:
            return True

    (tmp_path / "file").write_text("")
    ray.shutdown()
    ray.init(address="local", num_cpus=2, num_gpus=1, object_store_memory=200_000_000, logging_level="ERROR")
    monkeypatch.setattr("plates.preflight.PROBE_S", 20.0)
    try:
        holder = ray.remote(num_gpus=1)(Holder).remote()
        assert ray.get(holder.hold.remote())
        dataset = load_dataset("synthetic:8", 0)
        (probe,) = probe_nodes(Plan.on("cuda", 1, 1, "test"), dataset, tmp_path / "run", tmp_path / "file" / "cache")
    finally:
        ray.shutdown()
    assert probe.versions == rundir.versions()
    if not torch.cuda.is_available():
        assert probe.precision is None
        assert "torch" in probe.problems[-1]
    assert not [problem for problem in probe.problems if "did not run" in problem]
    assert [problem for problem in probe.problems if f"PLATES_CACHE {tmp_path / 'file' / 'cache'}" in problem]
