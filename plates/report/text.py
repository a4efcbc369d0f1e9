"""Figures and settings as text, and tables of them for the terminal."""

import math
from typing import Any

MAX_LISTED = 20  # entries of a setting, such as very many classes


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def format_number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if is_number(value) else "–"


def format_loss(value: Any) -> str:
    """Four digits; metrics.json has null, and trials.csv inf, where training diverged."""
    return f"{value:.4f}" if is_number(value) else "diverged"


def format_percent(fraction: Any) -> str:
    return f"{fraction:.1%}" if is_number(fraction) else "–"


def format_probability(value: float) -> str:
    # A rounded 1.000 would claim a certainty that the model did not state.
    return ">0.999" if 0.9995 <= value < 1 else "<0.001" if 0 < value < 0.0005 else format_number(value, 3)


def format_setting(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{key} {entry}" for key, entry in value.items()]
    if isinstance(value, list):
        more = [f"and {len(value) - MAX_LISTED} more"] if len(value) > MAX_LISTED else []
        value = ", ".join(map(str, value[:MAX_LISTED] + more))
    return "–" if value in (None, "") else str(value)


def align_columns(rows: list[list[str]], *, text_columns: int, width: int = 100) -> str:
    """Lay out rows of cells, the first `text_columns` of them to the left and cut to fit into `width`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > width and max(widths[:text_columns]) > 4:
        widths[widths.index(max(widths[:text_columns]))] -= 1
    lines = []
    for row in rows:
        cells = [cell if len(cell) <= w else cell[: w - 1] + "…" for cell, w in zip(row, widths, strict=True)]
        cells = [f"{cell:{'<' if i < text_columns else '>'}{widths[i]}}" for i, cell in enumerate(cells)]
        lines.append("  ".join(cells).rstrip()[:width])
    return "\n".join(lines)
