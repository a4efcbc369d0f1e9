"""A test split in folders of the classes, in an archive: scored, never trained on."""

import json
import re
import zipfile

import pandas as pd
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from plates.checkpoint import load_bundle
from ray_jobs import predict, train

SMALL = ["--num-workers", "0", "--precision", "fp32"]
MODEL = ["--backbone", "resnet18", "--weights", "none", "--image-size", "32", "--epochs", "2", "--num-views", "2"]


def check_scores(run, truth):
    """The figures are those of the predictions against the labels, by scikit-learn."""
    figures, table = json.loads((run / "metrics.json").read_text()), pd.read_csv(run / "predictions.csv")
    true = [truth[path.rpartition("/")[2]] for path in table["path"]]
    assert figures["test/accuracy"] == accuracy_score(true, table["label"])
    for name, measure in {"precision": precision_score, "recall": recall_score, "f1": f1_score}.items():
        for label in ("cleaned", "dirty"):
            found = figures[f"test/{name}/{label}"]
            predicted_any = name != "precision" or label in set(table["label"])
            assert found == (measure(true, table["label"], pos_label=label) if predicted_any else None)
    page = (run / "report.html").read_text()
    rows = re.findall(r"<tr><td>(cleaned|dirty)</td>" + r'<td class="n">([^<]*%|–)</td>' * 3 + "</tr>", page)
    recall = {label: figures[f"test/recall/{label}"] for label in ("cleaned", "dirty")}
    assert {label: cells[1] for label, *cells in rows[-2:]} == {key: f"{value:.1%}" for key, value in recall.items()}


def test_a_labelled_test_split_is_scored_and_never_trained_on(folder, tmp_path, capsys):
    unlabelled = tmp_path / "run-unlabelled"
    assert train.main([*SMALL, *MODEL, "--data", str(folder), "--out", str(unlabelled)]) == 0
    truth = {f"{n}.jpg": "dirty" if n % 3 else "cleaned" for n in range(7)}
    for name, label in truth.items():
        (folder / "test" / label).mkdir(exist_ok=True)
        (folder / "test" / name).rename(folder / "test" / label / name)
    (folder / "test" / "dirty" / "notes.txt").write_text("no image")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for file in folder.rglob("*.*"):
            archive.write(file, file.relative_to(folder.parent))
    run = tmp_path / "run"
    assert train.main([*SMALL, *MODEL, "--data", str(tmp_path / "photos.zip"), "--out", str(run)]) == 0
    assert capsys.readouterr().out.count("not looked at: 1 file of other kinds (.txt 1)\n") == 1
    check_scores(run, truth)
    one, other = (load_bundle(place / "checkpoint").state["head.weight"] for place in (unlabelled, run))
    assert one.equal(other)
    (folder / "train").rename(tmp_path / "elsewhere")
    flags = [*SMALL, "--checkpoint", str(run / "checkpoint"), "--data", str(folder)]
    assert predict.main([*flags, "--out", str(tmp_path / "again")]) == 0
    check_scores(tmp_path / "again", truth)
