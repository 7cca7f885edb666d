"""Pictures of a report, as SVG that stands in a page and takes its colours, light or dark, from there."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "ppx", "font.size": 9, "font.family": "sans-serif"}
_INK, _FAINT = "#010203", "#040506"  # replaced by the page's own colours
_COLOURS = {"attention": "#2b7bba", "mlp": "#d9730d", "noise": "#7a8288"}
_FLOOR = 1e-9  # of a logarithmic axis: a difference of nothing is drawn there


def pictures(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the pictures that a report's figures allow, as SVG text by name."""
    import matplotlib as mpl  # half a second to import: only where something is drawn

    found = {}
    with mpl.rc_context(_STYLE):
        if report["activations"]:
            found["drift"] = _drift(report["activations"])
            found["steps"] = _steps(report["activations"])
        if report["predictions"]:
            found["predictions"] = _predictions(report["predictions"])
        if report["rollout"]:
            found["rollout"] = _rollout(report["rollout"])
    return found


def sensitivities(costs: Mapping[str, Mapping[int, float]], chosen: Mapping[str, float]) -> str:
    """Draw what each part costs at each number of bits, and what was chosen for it, as SVG.

    costs: nats a token, by part and bits. The colours stand for themselves, as the picture stands alone.
    """
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure, (axis,) = _figure(1.2 + 0.16 * len(costs))
        names = list(costs)
        bits = sorted({number for cost in costs.values() for number in cost})
        colours = mpl.colormaps["viridis"]([index / max(1, len(bits) - 1) for index in range(len(bits))])
        for number, colour in zip(bits, colours, strict=True):
            values = [_positive(costs[name].get(number)) for name in names]
            axis.plot(values, range(len(names)), "o", markersize=3, color=colour, label=f"{number} bit")
        marked = [(place, chosen[name]) for place, name in enumerate(names) if name in chosen]
        axis.plot(
            [_positive(value) for _, value in marked], [place for place, _ in marked], "x", color=_INK, label="chosen"
        )
        axis.set_xscale("log")
        _plain(axis.xaxis)
        axis.set_yticks(range(len(names)), names, fontsize=6)
        axis.invert_yaxis()
        axis.set_xlabel("divergence of text and agent, nats a token, when it alone is quantized")
        _legend(axis)
        return _svg(figure).replace("var(--ink)", "#555").replace("var(--faint)", "#999")


def _figure(height: float, rows: int = 1) -> "tuple[Figure, Sequence[Axes]]":
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = [figure.add_subplot(rows, 1, row + 1) for row in range(rows)]
    figure.patch.set_alpha(0)
    for axis in axes:
        axis.patch.set_alpha(0)
        axis.tick_params(colors=_INK, labelcolor=_INK)
        for spine in axis.spines.values():
            spine.set_color(_FAINT)
        for label in (axis.xaxis.label, axis.yaxis.label, axis.title):
            label.set_color(_INK)
    return figure, axes


def _svg(figure: "Figure") -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return svg.replace(_INK, "var(--ink)").replace(_FAINT, "var(--faint)")


def _drift(activations: Sequence[Mapping[str, Any]]) -> str:
    """Draw the error of the temporal transformer's blocks over its depth."""
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in activations if row["component"] == "temporal" and row["local"]]
    figure, (axis,) = _figure(3.4)
    for part in ("attention", "mlp"):
        of_part = [row for row in rows if row["part"] == part]
        layers = [row["layer"] for row in of_part]
        for kind, style in (("accumulated", "-"), ("local", "--")):
            values = [_positive(row[kind]["relative_l2"]) for row in of_part]
            label = f"{'MLP' if part == 'mlp' else part}, {kind}"
            axis.plot(layers, values, style, marker=".", color=_COLOURS[part], label=label)
    layers = [row["layer"] for row in rows if row["part"] == "mlp"]
    noise = [_positive(row["noise_accumulated"]["relative_l2"]) for row in rows if row["part"] == "mlp"]
    axis.plot(layers, noise, ":", color=_COLOURS["noise"], label="noise floor, accumulated")
    axis.set_yscale("log")
    _plain(axis.yaxis)
    axis.set_xlabel("layer")
    axis.set_ylabel("relative L2 error")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axis)
    return _svg(figure)


def _plain(axis: "Axis") -> None:
    """Label powers of ten as 0.001 or 1e-05; raised exponents take a third of a picture's time."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(axis: "Axes") -> None:
    legend = axis.legend(fontsize=8, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for text in legend.get_texts():
        text.set_color(_INK)


def _positive(value: float | None) -> float:
    return float("nan") if value is None else max(value, _FLOOR)


def _steps(activations: Sequence[Mapping[str, Any]]) -> str:
    """Draw the own error of the depformer's blocks, step by layer."""
    rows = [row for row in activations if row["component"] == "depformer" and row["local"]]
    layers, steps = (sorted({row[key] for row in rows}) for key in ("layer", "step"))
    values = {(row["part"], row["layer"], row["step"]): row["local"]["relative_l2"] for row in rows}
    largest = max([value for value in values.values() if value], default=0.0) or 1.0
    figure, axes = _figure(1.5 + 0.42 * len(layers), 2)
    for axis, part in zip(axes, ("attention", "mlp"), strict=True):
        table = [[values.get((part, layer, step)) or 0.0 for step in steps] for layer in layers]
        mesh = axis.pcolormesh(steps, layers, table, cmap="viridis", vmin=0, vmax=largest, edgecolors="face")
        axis.set_title("MLP" if part == "mlp" else part, fontsize=9, color=_INK)
        axis.set_ylabel("layer")
        axis.set_xticks(steps)
        axis.set_yticks(layers)
    axes[1].set_xlabel("depformer step (0–7: the agent's codebooks)")
    colours = figure.colorbar(mesh, ax=list(axes), label="relative L2 error")
    colours.ax.tick_params(colors=_INK, labelcolor=_INK)
    colours.ax.yaxis.label.set_color(_INK)
    return _svg(figure)


def _predictions(predictions: Mapping[str, Any]) -> str:
    """Draw the divergence of each stream's predictions: mean, and how far percentiles reach."""
    names = ["text", *(name for name in predictions if name.startswith("codebook_"))]
    figure, (axis,) = _figure(3.4)
    for place, name in enumerate(names):
        kl, noise = (predictions[name][which]["kl"] for which in ("bundle", "noise"))
        if not kl:
            continue
        colour = _COLOURS["attention"] if place <= len(names) // 2 else _COLOURS["noise"]
        reach = [_positive(kl[key]) for key in ("median", "p99")]
        axis.plot([place, place], reach, color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axis.plot([place], [_positive(kl["p90"])], "_", color=colour, markersize=7)
        axis.plot([place], [_positive(kl["mean"])], "o", color=colour, markersize=5)
        if noise:
            axis.plot([place], [_positive(noise["mean"])], "x", color=_INK, markersize=4)
    axis.set_yscale("log")
    _plain(axis.yaxis)
    axis.set_xticks(range(len(names)), ["text", *(name.removeprefix("codebook_") for name in names[1:])])
    axis.set_xlabel("codebook (grey: the user's, unused in conversation)")
    axis.set_ylabel("KL divergence, nats a token")
    return _svg(figure)


def _rollout(rollout: Mapping[str, Any]) -> str:
    """Draw how many of the agent's tokens agree, frame by frame."""
    figure, (axis,) = _figure(2.2)
    axis.plot(range(len(rollout["agreement"])), rollout["agreement"], color=_COLOURS["attention"])
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("frame (80 ms)")
    axis.set_ylabel("same tokens")
    return _svg(figure)
