"""SVG that stands in a page and takes its colours, light or dark, from there."""

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "ppx", "font.size": 9, "font.family": "sans-serif"}
INK, FAINT = "#010203", "#040506"  # replaced by the page's own colours
WIDTH = 5.2  # inches of half of a page
_FLOOR = 1e-9  # of a logarithmic axis: a difference of nothing is drawn there


def new_figure(
    height: float, rows: int = 1, width: float = WIDTH, ratios: Sequence[float] | None = None
) -> "tuple[Figure, Sequence[Axes]]":
    """Return a figure of a height and width in inches, and its axes below each other; ratios: of their heights."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    grid = figure.add_gridspec(rows, 1, height_ratios=ratios)
    axes = [figure.add_subplot(grid[row, 0]) for row in range(rows)]
    figure.patch.set_alpha(0)
    for axis in axes:
        axis.patch.set_alpha(0)
        axis.tick_params(colors=INK, labelcolor=INK)
        for spine in axis.spines.values():
            spine.set_color(FAINT)
        for label in (axis.xaxis.label, axis.yaxis.label, axis.title):
            label.set_color(INK)
    return figure, axes


def as_svg(figure: "Figure") -> str:
    """Return a figure as SVG text that takes its width from the page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to groups, and a page has several pictures
    return svg.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")


def plain_labels(axis: "Axis") -> None:
    """Label powers of ten as 0.001 or 1e-05; raised exponents take a third of a picture's time."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def add_legend(axis: "Axes", columns: int = 2) -> None:
    """Put a legend above an axis."""
    legend = axis.legend(
        fontsize=8,
        frameon=False,
        ncols=columns,
        columnspacing=1.2,
        handletextpad=0.4,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
    )
    for text in legend.get_texts():
        text.set_color(INK)


def above_floor(value: float | None) -> float:
    """Return a value as a logarithmic axis can show it; NaN, which it leaves out, for None."""
    return float("nan") if value is None else max(value, _FLOOR)
