"""``index.html``: the results of a sweep as one page that loads nothing from the network."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from ...calibrate.svg import FAINT, INK, STYLE, as_svg, new_figure, plain_labels
from ...convert.bundle.describe import size
from ..report import short

INDEX = "index.html"
_LABELLED = 8  # points of the front whose names are written beside them
_FLOOR = 1e-6  # nats/token: what is below is rounding, and is drawn there
_COLOUR = "#2f6fb0"  # stands out on white and on black


def html(rows: Sequence[Mapping[str, Any]], command: str) -> str:
    """Return the page of some rows, as ``tables.rows_of`` gives them."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"short": short, "size": size}
    template = environment.from_string((files(__package__) / "templates" / INDEX).read_text("utf-8"))
    by_source: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_source.setdefault(str(row["source"]), []).append(row)
    pictures = {name: picture for name, inner in by_source.items() if (picture := pareto(inner))}
    counts = {status: sum(row["status"] == status for row in rows) for status in ("intact", "not intact", "failed")}
    return template.render(rows=rows, pictures=pictures, counts=counts, sources=len(by_source), command=command) + "\n"


def pareto(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return size against divergence of one source's cells as SVG, None where nothing was measured."""
    import matplotlib as mpl
    from matplotlib.ticker import FuncFormatter

    known = [row for row in rows if row["agent_kl"] is not None]
    if not known:
        return None
    unit = max(float(row["bytes"]) for row in known)
    scale, name = (1e9, "GB") if unit >= 1e9 else (1e6, "MB")
    with mpl.rc_context(STYLE):
        figure, (axis,) = new_figure(3.2)
        for intact, marker in ((True, "o"), (False, "x")):
            points = [row for row in known if (row["status"] == "intact") == intact and not row["on_front"]]
            axis.scatter(
                [row["bytes"] / scale for row in points],
                [_shown(row["agent_kl"]) for row in points],
                marker=marker,
                s=24,
                color=FAINT,
            )
        front = sorted((row for row in known if row["on_front"]), key=lambda row: row["bytes"])
        axis.plot(
            [row["bytes"] / scale for row in front],
            [_shown(row["agent_kl"]) for row in front],
            color=_COLOUR,
            marker="o",
            markersize=5,
            linewidth=1.2,
        )
        for row in front[:_LABELLED]:
            label = str(row["name"]).partition("/")[2].replace("$", r"\$")
            where = (row["bytes"] / scale, _shown(row["agent_kl"]))
            axis.annotate(label, where, (5, 5), textcoords="offset points", color=INK, fontsize=8)
        axis.margins(x=0.2, y=0.15)
        axis.set_yscale("log")
        plain_labels(axis.yaxis)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xlabel(f"size, {name}")
        axis.set_ylabel("agent KL, nats/token")
        return as_svg(figure)


def _shown(kl: float) -> float:
    return max(kl, _FLOOR)
