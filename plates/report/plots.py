"""Plots as inline SVG in the page's own colours, light and dark."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

# Colours that no plot would use: the page's style sheet gives each its light and its dark value.
COLOURS = {"muted": "#000001", "line": "#000002", "train": "#000003", "accent": "#000004"}
# Several drawings share one page, where group ids and matplotlib's rule for `*` would collide.
WASTE = r"""<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>| xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*["]"""

Plot = dict[str, str]  # svg, and alt: what it shows, in words


@contextmanager
def draw_plot(title: str, x_label: str, height: float) -> Iterator[tuple[Any, Plot]]:
    """Axes of 3.5 x `height` inches to draw on, and the plot, whose svg is there afterwards; the caller sets alt."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    muted, line = COLOURS["muted"], COLOURS["line"]
    plot, buffer = Plot(), io.StringIO()
    with rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": title, "axes.edgecolor": line}):
        figure = Figure(figsize=(3.5, height), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        yield axes, plot
        axes.set_title(title, loc="left", fontsize=10, color=muted)
        axes.set_xlabel(x_label, color=muted)
        axes.grid(axis="y", color=line, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=muted, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        figure.savefig(buffer, format="svg")
    svg = re.sub(WASTE, "", buffer.getvalue()[buffer.getvalue().index("<svg") :], flags=re.DOTALL)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    plot["svg"] = svg


def draw_lines(
    x: np.ndarray, lines: Sequence[tuple[str, str, str, np.ndarray]], title: str, x_label: str, height: float
) -> Plot | None:
    """Lines (label, colour name, dash, values) over x; None where all values are missing."""
    shown = [line for line in lines if np.isfinite(line[3]).any()]
    if not shown:
        return None
    finite = [(label, values[np.isfinite(values)]) for label, _, _, values in shown]
    spoken = [f"{label} from {values[0]:.4g} to {values[-1]:.4g}" for label, values in finite]
    with draw_plot(title, x_label, height) as (axes, plot):
        for label, colour, dash, values in shown:
            dot = "o" if len(values) <= 30 else ""
            axes.plot(x, values, dot + dash, color=COLOURS[colour], linewidth=1.6, markersize=3, label=label)
        axes.locator_params(axis="x", integer=True, nbins=6)
        axes.locator_params(axis="y", nbins=5 if height > 2 else 2)
        if len(lines) > 1:
            axes.legend(frameon=False, labelcolor="linecolor")
    plot["alt"] = f"{title} over {len(x)} {x_label}s: {'; '.join(spoken)}"
    return plot
