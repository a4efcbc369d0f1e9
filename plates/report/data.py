"""The section of the data: images by class and split, and what the check found odd about them."""

from typing import Any

from plates.rundir import read_csv
from plates.storage import Place

MAX_CLASSES, MAX_ISSUES = 50, 200  # that the page shows


def show_data(path: Place, found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Args: data_issues.csv, absent where all is well; the counts and lines that config.json has of a check."""
    if not found:
        return None
    counts = found["counts"]
    names = list(dict.fromkeys(name for of_split in counts.values() for name in of_split))
    rows = [[name or "not labelled", *(str(of_split.get(name, 0)) for of_split in counts.values())] for name in names]
    section = {"header": ["class", *counts], "rows": rows[:MAX_CLASSES], "num_classes": len(rows)}
    section |= {"lines": found["lines"][1:], "issues": [], "num_issues": 0}
    if path.exists():
        table = read_csv(path, dtype=str, keep_default_na=False)
        section["num_issues"] = len(table)
        for row in table.head(MAX_ISSUES).to_dict("records"):
            score = row["label_score"] or row["near_duplicate_score"]
            beside = row["predicted_label"] or row["near_duplicate_sets"]
            cells = [row[name] for name in ("path", "split", "issue", "given_label")]
            section["issues"].append([*cells, f"{float(score):.3f}" if score else "", beside])
    return section
