"""The cluster files, as far as they can be checked without a cloud."""

import copy
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start

from plates.command import parse
from plates.config import TrainConfig

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
HEAD = CLUSTER["available_node_types"][CLUSTER["head_node_type"]]
(WORKERS,) = [node for node in CLUSTER["available_node_types"].values() if node is not HEAD]
(START_HEAD,) = [command for command in CLUSTER["head_start_ray_commands"] if "ray start" in command]
(START_WORKER,) = [command for command in CLUSTER["worker_start_ray_commands"] if "ray start" in command]

JOB = yaml.safe_load((ROOT / "ray_jobs" / "rayjob.yaml").read_text())
PODS = JOB["spec"]["rayClusterSpec"]
HEAD_PODS, (WORKER_PODS,) = PODS["headGroupSpec"], PODS["workerGroupSpecs"]
((HEAD_BOX,), (WORKER_BOX,)) = [pods["template"]["spec"]["containers"] for pods in (HEAD_PODS, WORKER_PODS)]


def prepare(**changes: Any) -> dict[str, Any]:
    """What `ray up` checks before it talks to the cloud. Raises: where Ray refuses the file."""
    prepared = prepare_config(copy.deepcopy(CLUSTER) | changes)
    validate_config(prepared)
    return prepared


def mebibytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()
    return int(number) * {"Mi": 1, "Gi": 1024}[unit]


def test_ray_accepts_the_cluster():
    assert set(prepare()["available_node_types"]) == set(CLUSTER["available_node_types"])


def test_ray_refuses_a_misspelt_key_and_an_unknown_head():
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        prepare(max_worker=8)
    with pytest.raises(jsonschema.ValidationError, match="shm_size"):
        prepare(docker=CLUSTER["docker"] | {"shm_size": "8g"})
    with pytest.raises(ValueError, match="head_node_type"):
        prepare(head_node_type="haed")


@pytest.mark.parametrize("image", [CLUSTER["docker"]["image"], HEAD_BOX["image"], WORKER_BOX["image"]])
def test_images_have_the_tested_ray_and_a_python_of_the_project(image):
    version, major, minor = re.fullmatch(r"\S+:(\d+\.\d+\.\d+)-py(\d)(\d+)-gpu", image).groups()
    (bound,) = [each.specifier for each in map(Requirement, PROJECT["dependencies"]) if each.name == "ray"]
    assert bound.contains(version)
    assert version.split(".")[:2] == ray.__version__.split(".")[:2]
    assert version == PODS["rayVersion"]
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{major}.{minor}")


def test_the_head_runs_no_work_and_workers_come_and_go():
    assert HEAD["resources"] == {"CPU": 0, "GPU": 0}
    assert {"--head", "--num-cpus=0", "--num-gpus=0"} <= set(shlex.split(START_HEAD))
    assert HEAD_PODS["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in HEAD_BOX["resources"]["limits"]
    assert (WORKERS["min_workers"], WORKERS["max_workers"], CLUSTER["max_workers"]) == (0, 8, 8)
    assert (WORKER_PODS["minReplicas"], WORKER_PODS["maxReplicas"], PODS["enableInTreeAutoscaling"]) == (0, 8, True)
    assert WORKER_BOX["resources"]["limits"]["nvidia.com/gpu"] == 1


@pytest.mark.parametrize("command", [START_HEAD, START_WORKER])
def test_every_node_wants_the_token_and_no_dashboard_leaves_loopback(command):
    before, _, flags = command.partition(" ray start ")
    assert before.endswith("RAY_AUTH_MODE=token")
    assert ray_start.make_context("start", shlex.split(flags)).params["dashboard_host"] in ("127.0.0.1", "localhost")
    assert ("--head" in flags) == ("--dashboard-host=127.0.0.1" in flags)
    assert CLUSTER["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert PODS["authOptions"] == {"mode": "token"}


def test_the_object_store_fits_into_shared_memory():
    assert "--shm-size=8g" in CLUSTER["docker"]["run_options"]
    for pods, box in ((HEAD_PODS, HEAD_BOX), (WORKER_PODS, WORKER_BOX)):
        (volume,) = pods["template"]["spec"]["volumes"]
        assert box["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
        assert volume["emptyDir"]["medium"] == "Memory"
        share = ray._private.ray_constants.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION
        assert mebibytes(volume["emptyDir"]["sizeLimit"]) >= share * mebibytes(box["resources"]["limits"]["memory"])


def test_the_kubernetes_job_is_a_command_of_this_project():
    python, dash_m, module, *argv = shlex.split(JOB["spec"]["entrypoint"])
    assert (JOB["apiVersion"], JOB["kind"], python, dash_m) == ("ray.io/v1", "RayJob", "python", "-m")
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
    assert parse(TrainConfig, argv, "plates train").num_workers <= WORKER_PODS["maxReplicas"]
    assert JOB["spec"]["shutdownAfterJobFinishes"] is True
