"""Every name and signature of Ray's that plates/ray_private.py rests on, against the Ray that is installed."""

import ast
import asyncio
import dataclasses
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from ray import cloudpickle
from ray._private import ray_constants
from ray._private.authentication import authentication_constants
from ray.autoscaler._private import monitor
from ray.autoscaler._private.autoscaler import AutoscalerSummary
from ray.autoscaler.v2.schema import ClusterStatus, LaunchRequest
from ray.core.generated import gcs_service_pb2
from ray.dashboard.modules.version import VersionResponse
from ray.runtime_context import RuntimeContext
from ray.train import (
    ControllerError,
    PreemptionError,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.v2._internal import constants, exceptions

from plates import ray_private
from plates.config import UserError

HOOKS = "ray.train.v2._internal.execution.callback"
COORDINATOR = next(name for name in ray_private.NAMES if "coordinator" in name)
GROUP = "ray.train.v2._internal.execution.worker_group"
RUN_CALLBACKS = """
import pickle, sys
class Status:
    errors, finished = {}, False
ours = pickle.load(sys.stdin.buffer)
for callback in ours:
    callback.after_worker_group_start(None)
    callback.after_worker_group_poll_status(Status)
print([type(callback).__name__ for callback in ours])
print([name for name in sys.modules if name.split(".")[0] in ("plates", "torch")])
"""


def test_every_name_is_looked_for_by_a_job_before_it_is_needed():
    sources = [file.read_text() for folder in ("plates", "ray_jobs") for file in (ROOT / folder).rglob("*.py")]
    required = [package for source in sources for call in re.findall(r"^ +require\((.*)\)$", source, re.M)
                for package in re.findall(r'"(.*?)"', call)]  # fmt: skip
    assert [name for name in ray_private.NAMES if not name.startswith(tuple(required))] == []


@pytest.mark.parametrize("name", ray_private.NAMES)
def test_ray_has_every_name(name):
    assert pkgutil.resolve_name(name) is not None


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ray.autoscaler.v2.sdk:get_cluster_status", "gcs_address timeout"),
        ("ray.autoscaler.v2.utils:is_autoscaler_v2", "fetch_from_server gcs_client"),
        (COORDINATOR, ""),
        ("ray.experimental.internal_kv:_internal_kv_get", "key namespace"),
        ("ray.experimental.tqdm_ray:tqdm", "iterable desc total unit position flush_interval_s"),
        ("ray.experimental.tqdm_ray:tqdm.update", "self n"),
        ("ray.experimental.tqdm_ray:tqdm.close", "self"),
        ("ray.job_submission:JobSubmissionClient._do_request", "self method endpoint data json_data kwargs"),
        ("ray.train.torch:TorchTrainer._create_default_callbacks", "self"),
        ("ray.train.torch:TorchTrainer._register_sigint_handler", "self controller"),
        (f"{HOOKS}:ControllerCallback.before_controller_shutdown", "self"),
        (f"{HOOKS}:WorkerGroupCallback.after_worker_group_poll_status", "self worker_group_status"),
        (f"{HOOKS}:WorkerGroupCallback.after_worker_group_start", "self worker_group"),
        (f"{GROUP}:WorkerGroup.get_worker_group_state", "self"),
        (f"{GROUP}:WorkerGroup.has_started", "self"),
        (f"{GROUP}:WorkerGroupState.shutdown", "self"),
        ("ray.tune.schedulers:ASHAScheduler.on_trial_add", "self tune_controller trial"),
        ("ray.tune.schedulers:ASHAScheduler.on_trial_result", "self tune_controller trial result"),
    ],
)
def test_it_is_called_as_we_call_it(name, parameters):
    assert " ".join(inspect.signature(pkgutil.resolve_name(name)).parameters) == parameters
    assert inspect.iscoroutinefunction(pkgutil.resolve_name(name)) == name.endswith("before_controller_shutdown")


def test_what_is_read_of_rays_answers_is_there():
    for kind, names in (
        (ClusterStatus, {"pending_nodes", "pending_launches"}),
        (LaunchRequest, {"count"}),
        (AutoscalerSummary, {"pending_nodes", "pending_launches"}),
        (VersionResponse, {"ray_version"}),
    ):
        assert names <= {field.name for field in dataclasses.fields(kind)}
    assert isinstance(inspect.getattr_static(RuntimeContext, "gcs_address"), property)
    for name in ("errors", "finished"):
        assert isinstance(pkgutil.resolve_name(f"{GROUP}:WorkerGroupPollStatus.{name}"), property)
    assert ray_constants.DEBUG_AUTOSCALING_STATUS == ray_private.AUTOSCALER_STATUS
    assert 'status["autoscaler_report"] = asdict(autoscaler_summary)' in inspect.getsource(monitor)


def test_a_head_is_asked_in_rays_words():
    service = gcs_service_pb2.DESCRIPTOR.services_by_name["NodeInfoGcsService"]
    assert f"/{service.full_name}/{service.methods_by_name['CheckAlive'].name}" == ray_private.CHECK_ALIVE
    assert authentication_constants.AUTHORIZATION_HEADER_NAME == "authorization"
    assert authentication_constants.AUTHORIZATION_BEARER_PREFIX == "Bearer "


def test_the_settings_of_the_controller_reach_it():
    assert constants.HEALTH_CHECK_INTERVAL_S_ENV_VAR == ray_private.POLL_INTERVAL
    assert constants.ENABLE_PREEMPTION_WATCHER_ENV_VAR == ray_private.PREEMPTION_WATCHER
    assert {ray_private.POLL_INTERVAL, ray_private.PREEMPTION_WATCHER} <= constants.ENV_VARS_TO_PROPAGATE


def test_a_lost_worker_is_an_error_of_ray_train():
    lost = [exceptions.WorkerHealthCheckFailedError, exceptions.WorkerHealthCheckTimeoutError]
    for kind in (*lost, ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError):
        assert issubclass(kind, ray_private.ray_train_error())


def test_our_callbacks_are_called_first_and_do_not_need_us_where_they_run(tmp_path, monkeypatch):
    """By value: nothing of plates is in what is shipped to the controller."""
    monkeypatch.setenv(ray_private.POLL_INTERVAL, "0.5")
    trainer = ray_private.trainer_class([], 0.0)(
        print, scaling_config=ScalingConfig(num_workers=1), run_config=RunConfig(storage_path=str(tmp_path))
    )
    shipped = cloudpickle.dumps(trainer._create_default_callbacks()[:2])
    ended = subprocess.run(
        [sys.executable, "-c", RUN_CALLBACKS], input=shipped, capture_output=True, timeout=60, check=True
    )
    assert ended.stdout.decode().splitlines() == ["['ReleaseRoom', 'AskForMore']", "[]"]


def test_the_room_of_a_group_that_ray_forgot_is_given_back(tmp_path):
    class Group:
        is_shut = False

        def has_started(self) -> bool:
            return True

        def get_worker_group_state(self) -> "Group":
            return self

        def shutdown(self) -> None:
            self.is_shut = True

    class Status:
        errors, finished = (), False

    trainer = ray_private.trainer_class([], -1.0)(
        print, scaling_config=ScalingConfig(num_workers=1), run_config=RunConfig(storage_path=str(tmp_path))
    )
    group, (release, ask) = Group(), trainer._create_default_callbacks()[:2]
    for callback in (release, ask):
        callback.after_worker_group_start(group)
    ask.after_worker_group_poll_status(Status())  # nothing is missing, so nothing ends it
    ask.asked = [type("Asked", (), {"wait": lambda self, timeout_s: True})()]
    with pytest.raises(WorkerGroupError, match="there is room for more workers") as raised:
        ask.after_worker_group_poll_status(Status())
    assert cloudpickle.loads(cloudpickle.dumps(raised.value)).worker_failures == {}
    asyncio.run(release.before_controller_shutdown())
    assert group.is_shut


def test_a_changed_ray_is_one_line(monkeypatch):
    for name in ("ray.train.v2._internal.gone:name", "ray.train.v2._internal.exceptions:Gone"):
        monkeypatch.setattr(ray_private, "NAMES", (name,))
        ray_private.require("ray.autoscaler", "ray.experimental")
        with pytest.raises(UserError, match=rf"ray [\d.]+ has no {name}: install") as raised:
            ray_private.require("ray.train")
        assert "\n" not in str(raised.value)


def test_importing_it_imports_no_ray():
    code = "import sys, plates.address, plates.ray_private; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize("path", [*(ROOT / "plates").rglob("*.py"), *(ROOT / "ray_jobs").rglob("*.py")], ids=str)
def test_no_other_file_uses_what_ray_does_not_promise(path: Path):
    text, found = path.read_text(), set()
    for node in ast.walk(ast.parse(text)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name for name in modules for part in name.split(".")
                  if name.startswith("ray.") and (part[0] == "_" or part in ("experimental", "v2"))}  # fmt: skip
    found |= set(re.findall(r"RAY_TRAIN_\w+|client\._\w+", text))
    assert bool(found) == (path.name == "ray_private.py"), found
