"""Plots as inline SVG in the page's own colours, light and dark."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

# Colours that no plot would use: the page's style sheet gives each its light and its dark value.
COLOURS = {"muted": "#000001", "line": "#000002", "train": "#000003", "accent": "#000004"}


@contextmanager
def themed_axes(title: str, x_label: str, height: float, drawn: dict[str, str]) -> Iterator[Any]:
    """Axes of 3.5 x `height` inches to draw on; afterwards drawn["svg"] holds the picture."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    muted, line = COLOURS["muted"], COLOURS["line"]
    with rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": title, "axes.edgecolor": line}):
        figure = Figure(figsize=(3.5, height), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        yield axes
        axes.set_title(title, loc="left", fontsize=10, color=muted)
        axes.set_xlabel(x_label, color=muted)
        axes.grid(axis="y", color=line, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=muted, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    # Several drawings share one page, where group ids and matplotlib's rule for `*` would collide.
    waste = r"""<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>| xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*["]"""
    svg = re.sub(waste, "", svg, flags=re.DOTALL)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    drawn["svg"] = svg


def draw_lines(
    x: np.ndarray, lines: Sequence[tuple[str, str, str, np.ndarray]], title: str, x_label: str, height: float
) -> dict[str, str]:
    """Lines (label, colour name, dash, values) over x, with alt text; {} where all values are missing."""
    drawn: dict[str, str] = {}
    finite = [(label, values[np.isfinite(values)]) for label, _, _, values in lines]
    spoken = [f"{label} from {values[0]:.4g} to {values[-1]:.4g}" for label, values in finite if values.size]
    if not spoken:
        return {}
    with themed_axes(title, x_label, height, drawn) as axes:
        for label, colour, dash, values in lines:
            if np.isfinite(values).any():
                dot = "o" if len(values) <= 30 else ""
                axes.plot(x, values, dot + dash, color=COLOURS[colour], linewidth=1.6, markersize=3, label=label)
        axes.locator_params(axis="x", integer=True, nbins=6)
        axes.locator_params(axis="y", nbins=5 if height > 2 else 2)
        if len(lines) > 1:
            axes.legend(frameon=False, labelcolor="linecolor")
    return {**drawn, "alt": f"{title} over {len(x)} {x_label}s: {'; '.join(spoken)}"}
