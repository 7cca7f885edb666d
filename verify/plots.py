"""Pictures of a report, as SVG that stands in a page and takes its colours, light or dark, from there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..calibrate.svg import INK, STYLE, WIDTH, above_floor, add_legend, as_svg, new_figure, plain_labels
from .comparison_plot import draw_comparison
from .figures import ActivationRow, Difference, Rollout, StreamFigures
from .records import Report
from .stream_axis import NARROW, StreamAxis, user_begins

_COLOURS = {"attention": "#2b7bba", "mlp": "#d9730d", "noise": "#7a8288"}
_STEPS_OF_COLOUR = 32  # matplotlib makes pixels of a colour bar of more than 50


@dataclass(frozen=True)
class Picture:
    """One picture as SVG text, drawn for a phone and for a wide page, so that its text is legible on both."""

    narrow: str
    wide: str


def pictures(report: Report) -> dict[str, Picture]:
    """Return the pictures of a report, by name; figures that it lacks are not drawn."""
    import matplotlib as mpl  # half a second to import: only where something is drawn

    draw: dict[str, Callable[[bool], str]] = {}
    if report.predictions:
        draw["comparison"] = lambda narrow: draw_comparison(report.predictions, narrow)
        draw["predictions"] = lambda narrow: _predictions(report.predictions, narrow)
    if report.activations:
        draw["drift"] = lambda narrow: _drift(report.activations, narrow)
        draw["steps"] = lambda narrow: _steps(report.activations, narrow)
    if report.rollout:
        session = report.rollout
        draw["rollout"] = lambda narrow: _rollout(session, narrow)
    drawn = {}
    for name, one in draw.items():
        versions = []
        for narrow in (True, False):
            salt = f"{name}-{'narrow' if narrow else 'wide'}"  # ids of one page must differ
            with mpl.rc_context(STYLE | {"svg.hashsalt": salt}):
                versions.append(one(narrow))
        drawn[name] = Picture(*versions)
    return drawn


def _width(narrow: bool) -> float:
    return NARROW if narrow else WIDTH


def _drift(activations: Sequence[ActivationRow], narrow: bool) -> str:
    """Draw the error of the temporal transformer's blocks over its depth."""
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in activations if row.component == "temporal" and row.local]
    figure, (axis,) = new_figure(3.4, width=_width(narrow))
    for sublayer in ("attention", "mlp"):
        of_sublayer = [row for row in rows if row.sublayer == sublayer]
        accumulated, local = (
            _drawn([row.accumulated for row in of_sublayer]),
            _drawn([row.local for row in of_sublayer]),
        )
        for kind, values, style in (("accumulated", accumulated, "-"), ("local", local, "--")):
            label = f"{'MLP' if sublayer == 'mlp' else sublayer}, {kind}"
            axis.plot(_layers(of_sublayer), values, style, marker=".", color=_COLOURS[sublayer], label=label)
    of_sublayer = [row for row in rows if row.sublayer == "mlp"]
    layers, noise = _layers(of_sublayer), _drawn([row.noise_accumulated for row in of_sublayer])
    label = "noise floor" if narrow else "noise floor, accumulated"
    axis.plot(layers, noise, ":", color=_COLOURS["noise"], label=label)
    axis.set_yscale("log")
    plain_labels(axis.yaxis)
    axis.set_xlabel("layer")
    axis.set_ylabel("relative L2 error")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    add_legend(axis)
    return as_svg(figure)


def _layers(rows: Sequence[ActivationRow]) -> list[int]:
    return [row.layer or 0 for row in rows]


def _drawn(differences: Sequence[Difference | None]) -> list[float]:
    """Return relative errors as they are drawn."""
    return [above_floor(difference.relative_l2 if difference else None) for difference in differences]


def _steps(activations: Sequence[ActivationRow], narrow: bool) -> str:
    """Draw the local error of the depformer's blocks, step by layer."""
    from matplotlib import colormaps

    rows = [row for row in activations if row.component == "depformer" and row.local]
    layers = sorted({row.layer for row in rows if row.layer is not None})
    steps = sorted({row.step for row in rows if row.step is not None})
    values = {(row.sublayer, row.layer, row.step): row.local.relative_l2 for row in rows if row.local}
    largest = max([value for value in values.values() if value], default=0.0) or 1.0
    figure, axes = new_figure(1.5 + 0.42 * len(layers), 2, _width(narrow))
    colours = colormaps["viridis"].resampled(_STEPS_OF_COLOUR)
    for axis, sublayer in zip(axes, ("attention", "mlp"), strict=True):
        table = [[values.get((sublayer, layer, step)) or 0.0 for step in steps] for layer in layers]
        mesh = axis.pcolormesh(steps, layers, table, cmap=colours, vmin=0, vmax=largest, edgecolors="face")
        axis.set_title("MLP" if sublayer == "mlp" else sublayer, fontsize=9, color=INK)
        axis.set_ylabel("layer")
        axis.set_xticks(steps[:: 2 if narrow else 1])
        axis.set_yticks(layers)
    axes[1].set_xlabel("depformer step (0–7: the agent's)" if narrow else "depformer step (0–7: the agent's codebooks)")
    bar = figure.colorbar(mesh, ax=list(axes), label="relative L2 error")
    bar.ax.tick_params(colors=INK, labelcolor=INK)
    bar.ax.yaxis.label.set_color(INK)
    return as_svg(figure)


def _predictions(predictions: Mapping[str, StreamFigures], narrow: bool) -> str:
    """Draw the divergence of each stream's predictions: mean, and how far percentiles reach."""
    figure, axis = StreamAxis.new(predictions, narrow, WIDTH, 3.4)
    for place, name in enumerate(axis.names):
        kl, noise = predictions[name].bundle.kl, predictions[name].noise.kl
        if not kl:
            continue
        colour = _COLOURS["noise" if place >= user_begins(axis.names) else "attention"]
        axis.plot([place, place], [kl.median, kl.p99], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axis.plot([place], [kl.p90], marker="|" if narrow else "_", color=colour, markersize=7)
        axis.plot([place], [kl.mean], marker="o", color=colour, markersize=5)
        if noise:
            axis.plot([place], [noise.mean], marker="x", color=INK, markersize=4)
    return as_svg(figure)


def _rollout(rollout: Rollout, narrow: bool) -> str:
    """Draw how many of the agent's tokens agree, frame by frame."""
    figure, (axis,) = new_figure(2.2, width=_width(narrow))
    axis.plot(range(len(rollout.agreement)), rollout.agreement, color=_COLOURS["attention"])
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("frame (80 ms)")
    axis.set_ylabel("same tokens")
    return as_svg(figure)
