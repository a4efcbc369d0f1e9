import dataclasses

import pytest

from plates.command import run_job
from plates.config import PredictConfig, TrainConfig, TuneConfig, UserError
from plates.rules import RULES
from plates.tool_config import JOB_CONFIGS, CheckConfig, ServeConfig

DATA = {"data", "out", "skip_unreadable"}
WORKER = {"num_workers", "device", "precision", "cpus_per_worker", "wait_for_nodes_s", "cache_gb"}
MODEL = {
    "backbone", "weights", "trainable", "epochs", "lr", "step_size", "gamma", "global_batch_size", "image_size",
    "seed", "num_views",
}  # fmt: skip
SEEN = {"readout", "crop", "resize", "augment", "tta", "head", "class_weights", "drop_duplicates"}
TRACKED = {"log_to"}

FLAGS = {
    "prepare": DATA | {"num_workers", "seed"},
    "train": DATA | WORKER | MODEL | SEEN | TRACKED,
    "tune": DATA | WORKER | MODEL | SEEN | TRACKED | {"search", "budget_s", "num_trials", "folds", "cv_repeats"},
    "predict": DATA | WORKER | {"checkpoint", "tta", "abstain_below", "explain"},
    "serve": {"checkpoint", "host", "port", "token", "num_replicas", "device", "precision", "max_batch_size",
              "max_body_mb", "abstain_below"},
    "export": {"checkpoint", "format", "out"},
    "benchmark": DATA | MODEL | {"devices", "worker_counts", "repeats", "scaling", "precision"},
    "show": {"run", "data", "out", "seed"},
    "check": {"address", "data", "out", "num_workers", "device"},
    "check-data": DATA,
    "compare": {"runs", "out"},
}  # fmt: skip


def test_the_flags_are_these():
    assert {job: {f.name for f in dataclasses.fields(config)} for job, config in JOB_CONFIGS.items()} == FLAGS


def test_every_rule_is_of_a_setting():
    assert {name for name, _, _ in RULES} <= set().union(*FLAGS.values())


def test_the_defaults_are_the_published_recipe():
    config = TrainConfig()
    assert (config.epochs, config.lr, config.step_size, config.gamma) == (100, 1e-3, 7, 0.1)
    assert (config.global_batch_size, config.image_size, config.trainable) == (8, 224, "head")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--epochs", "0"), ("--lr", "0"), ("--lr", "nan"), ("--lr", "inf"), ("--step-size", "0"), ("--gamma", "0"),
        ("--gamma", "1.5"), ("--global-batch-size", "0"), ("--image-size", "31"), ("--seed", "-1"),
        ("--num-views", "0"), ("--num-workers", "-1"), ("--data", "synthetic:3"), ("--data", "synthetic:many"),
        ("--data", "synthetic:"), ("--data", "synthetic:hard"), ("--data", "synthetic:8:"),
        ("--data", "synthetic:8:harder"), ("--data", "synthetic:8:hard:1"),
        ("--data", "kaggle:"), ("--data", "kaggle:a/b/c"), ("--data", "kaggle:a b"), ("--data", "kaggle:../a"),
        ("--data", ""), ("--out", ""), ("--weights", ""), ("--backbone", "vgg16"), ("--backbone", "timm/vit_tinny"),
        ("--backbone", "timm/vit_tiny_patch16_224.none"), ("--tta", "0"), ("--readout", ""),
        ("--readout", "stage0/avg"), ("--readout", "last"), ("--readout", "pre/token"),
        ("--readout", "last/avg+last/avg"), ("--cache-gb", "-1"),
        ("--class-weights", ""), ("--class-weights", "balanced"), ("--class-weights", "a=0"),
        ("--class-weights", "a=-1"), ("--class-weights", "a=nan"), ("--class-weights", "a=inf"),
        ("--class-weights", "a=1e7"), ("--class-weights", "a="), ("--class-weights", "=1"),
        ("--class-weights", "a=1,"), ("--class-weights", "a=1,b"), ("--class-weights", "a=1,a=2"),
        ("--class-weights", "a=1e"),
        ("--readout", "last/avg+"),
    ],
)  # fmt: skip
def test_a_bad_value_is_one_line_and_exit_code_2(flag, value, capsys):
    assert run_job(lambda config: 0, TrainConfig, "plates train", [flag, value]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith(f"plates train: {flag} {value}".rstrip())


@pytest.mark.parametrize("argv", [["--no-such-flag"], ["--epochs", "many"], ["stray"]])
def test_an_unknown_flag_or_word_ends_with_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        run_job(lambda config: 0, TrainConfig, "plates train", argv)
    assert ended.value.code == 2
    assert argv[-1].lstrip("-") in capsys.readouterr().err


def test_flags_reach_the_config():
    seen = []
    argv = ["--num-workers", "3", "--lr", "0.01", "--num-views", "5", "--skip-unreadable"]
    run_job(lambda config: seen.append(config) or 0, TrainConfig, "plates train", [*argv, "--out", "a"])
    assert seen == [TrainConfig(num_workers=3, lr=0.01, num_views=5, skip_unreadable=True, out="a")]


def test_a_run_gets_a_directory_of_its_own(capsys):
    def interrupt(config: TrainConfig) -> int:
        seen.append(config.out)
        raise KeyboardInterrupt

    seen = []
    for _ in range(2):
        assert run_job(interrupt, TrainConfig, "plates train", []) == 1
        assert f"--out {seen[-1]} goes on" in capsys.readouterr().err
    assert len({*seen, None}) == 3
    assert all(out.startswith("runs/train-") for out in seen)
    run_job(lambda config: seen.append(config.out) or 0, CheckConfig, "plates check", [])
    assert seen[-1] is None  # it makes no run


def test_configs_are_frozen():
    config = TrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError):
        dataclasses.replace(config, lr=-1.0)


@pytest.mark.parametrize(
    ("job", "flag", "value"),
    [("tune", "--num-trials", "0"), ("tune", "--folds", "1"), ("tune", "--cv-repeats", "0"), ("tune", "--seed", "-1"),
     ("benchmark", "--repeats", "0"), ("benchmark", "--worker-counts", "0"), ("benchmark", "--image-size", "31"),
     ("prepare", "--num-workers", "-1"), ("prepare", "--seed", "-1"), ("check", "--num-workers", "-1"),
     ("tune", "--budget-s", "0.0"), ("predict --checkpoint c", "--tta", "0"), ("train", "--cpus-per-worker", "0"),
     ("train", "--wait-for-nodes-s", "-1.0"), ("serve --checkpoint c", "--port", "0"),
     ("serve --checkpoint c", "--port", "65536"), ("serve --checkpoint c", "--num-replicas", "0"),
     ("serve --checkpoint c", "--max-batch-size", "0"), ("serve --checkpoint c", "--max-body-mb", "0")],
)  # fmt: skip
def test_a_bad_number_is_one_line_in_every_job(job, flag, value, capsys):
    job, *needed = job.split()
    assert run_job(lambda config: 0, JOB_CONFIGS[job], f"plates {job}", [*needed, flag, value]) == 2
    assert capsys.readouterr().err.startswith(f"plates {job}: {flag} {value}: must be")


@pytest.mark.parametrize(
    ("settings", "train_views", "eval_views"),
    [
        ({}, [*range(100)], [-1]),
        ({"num_views": 3}, [0, 1, 2], [-1]),
        ({"epochs": 4, "tta": 3}, [0, 1, 2, 3], [-1, 0, 1]),
        ({"augment": "both", "epochs": 2}, [0, 1], [-1]),
        ({"augment": "both", "num_views": 2, "tta": 4}, [0, 1], [-1, 0, 1, 2]),
        ({"tta": 9, "num_views": 1}, [0], [-1, 0, 1, 2, 3, 4, 5, 6, 7]),
        ({"augment": "dihedral"}, [-1, -2, -3, -4, -5, -6, -7, -8], [-1]),
        ({"augment": "dihedral", "num_views": 2, "tta": 8}, [-1, -2], [-1, -2, -3, -4, -5, -6, -7, -8]),
        ({"augment": "dihedral", "num_views": 8, "tta": 2}, [-1, -2, -3, -4, -5, -6, -7, -8], [-1, -2]),
    ],
    ids=str,
)
def test_the_views_of_a_way_of_augmenting(settings, train_views, eval_views):
    """Of a prediction the first is the image as it is, and it is never drawn unless more are asked for."""
    config = TrainConfig(**settings)
    assert list(config.train_views) == train_views
    assert list(config.eval_views) == eval_views


@pytest.mark.parametrize(
    ("job", "flags", "message"),
    [
        ("train", {"augment": "dihedral", "tta": 9}, "--tta 9: --augment dihedral has 8 views"),
        ("train", {"augment": "dihedral", "num_views": 9}, "--num-views 9: --augment dihedral has 8 views"),
        ("train", {"head": "logistic", "trainable": "layer4"}, "--head logistic: .*not --trainable layer4"),
        ("train", {"head": "logistic", "trainable": "all"}, "--head logistic: .*not --trainable all"),
        ("tune", {"search": "all", "trainable": "layer4"}, "--search all: .*--trainable layer4 has --search recipe"),
        ("tune", {"head": "logistic"}, "--head logistic: the baseline of a sweep"),
        ("tune", {"head": "logistic", "search": "recipe"}, "--head logistic: the baseline of a sweep"),
    ],
)
def test_what_does_not_go_together_is_refused(job, flags, message):
    with pytest.raises(UserError, match=message):
        JOB_CONFIGS[job](**flags)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_alone_needs_no_token(host, monkeypatch):
    monkeypatch.delenv("PLATES_TOKEN", raising=False)
    assert ServeConfig(checkpoint="c", host=host).token is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "localhost.example.com", "my-machine"])
def test_a_host_that_others_reach_demands_a_token(host, monkeypatch):
    monkeypatch.setenv("PLATES_TOKEN", "")
    with pytest.raises(UserError, match=f"--host {host}: reaches beyond this machine; set --token or PLATES_TOKEN"):
        ServeConfig(checkpoint="c", host=host)
    assert ServeConfig(checkpoint="c", host=host, token="a").token == "a"
    monkeypatch.setenv("PLATES_TOKEN", "b")
    assert ServeConfig(checkpoint="c", host=host).token == "b"
    assert ServeConfig(checkpoint="c", host=host, token="a").token == "a"


def test_what_is_searched_by_default_follows_from_what_is_trained():
    searched = {trainable: TuneConfig(trainable=trainable).search for trainable in ("head", "layer4", "all")}
    assert searched == {"head": "all", "layer4": "recipe", "all": "recipe"}
    assert TuneConfig(search="recipe").search == "recipe"


def test_a_prediction_averages_as_many_views_as_its_model_was_trained_for_unless_told():
    from plates.checkpoint import Bundle
    from plates.job import settings_of
    from plates.model import preprocessing_of

    info = {"seed": 4, "trainable": "head", "readout": "pre/max", "augment": "dihedral", "tta": 8}
    bundle = Bundle("resnet18", ("a", "b"), preprocessing_of("resnet18", 64), {}, info)
    kept = settings_of(bundle, PredictConfig(checkpoint="c"))
    assert (kept.tta, kept.augment, kept.readout, kept.seed) == (8, "dihedral", "pre/max", 4)
    assert settings_of(bundle, PredictConfig(checkpoint="c", tta=1)).eval_views == [-1]
    with pytest.raises(UserError, match="--tta 9"):
        settings_of(bundle, PredictConfig(checkpoint="c", tta=9))
    before = settings_of(dataclasses.replace(bundle, info={}), PredictConfig(checkpoint="c"))
    assert (before.eval_views, before.readout) == ([-1], "last/avg")
