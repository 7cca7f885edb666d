"""Pictures of a report, as SVG that stands in a page and takes its colours, light or dark, from there."""

from collections.abc import Mapping, Sequence

from ..calibrate.svg import INK, STYLE, above_floor, add_legend, as_svg, new_figure, plain_labels
from .figures import ActivationRow, Difference, Rollout, StreamFigures
from .records import Report

_COLOURS = {"attention": "#2b7bba", "mlp": "#d9730d", "noise": "#7a8288"}


def pictures(report: Report) -> dict[str, str]:
    """Return the pictures of a report, as SVG text by name; of figures that it lacks there is none."""
    import matplotlib as mpl  # half a second to import: only where something is drawn

    drawn = {}
    with mpl.rc_context(STYLE):
        if report.activations:
            drawn["drift"] = _drift(report.activations)
            drawn["steps"] = _steps(report.activations)
        if report.predictions:
            drawn["predictions"] = _predictions(report.predictions)
        if report.rollout:
            drawn["rollout"] = _rollout(report.rollout)
    return drawn


def _drift(activations: Sequence[ActivationRow]) -> str:
    """Draw the error of the temporal transformer's blocks over its depth."""
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in activations if row.component == "temporal" and row.local]
    figure, (axis,) = new_figure(3.4)
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
    axis.plot(layers, noise, ":", color=_COLOURS["noise"], label="noise floor, accumulated")
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


def _steps(activations: Sequence[ActivationRow]) -> str:
    """Draw the local error of the depformer's blocks, step by layer."""
    rows = [row for row in activations if row.component == "depformer" and row.local]
    layers = sorted({row.layer for row in rows if row.layer is not None})
    steps = sorted({row.step for row in rows if row.step is not None})
    values = {(row.sublayer, row.layer, row.step): row.local.relative_l2 for row in rows if row.local}
    largest = max([value for value in values.values() if value], default=0.0) or 1.0
    figure, axes = new_figure(1.5 + 0.42 * len(layers), 2)
    for axis, sublayer in zip(axes, ("attention", "mlp"), strict=True):
        table = [[values.get((sublayer, layer, step)) or 0.0 for step in steps] for layer in layers]
        mesh = axis.pcolormesh(steps, layers, table, cmap="viridis", vmin=0, vmax=largest, edgecolors="face")
        axis.set_title("MLP" if sublayer == "mlp" else sublayer, fontsize=9, color=INK)
        axis.set_ylabel("layer")
        axis.set_xticks(steps)
        axis.set_yticks(layers)
    axes[1].set_xlabel("depformer step (0–7: the agent's codebooks)")
    colours = figure.colorbar(mesh, ax=list(axes), label="relative L2 error")
    colours.ax.tick_params(colors=INK, labelcolor=INK)
    colours.ax.yaxis.label.set_color(INK)
    return as_svg(figure)


def _predictions(predictions: Mapping[str, StreamFigures]) -> str:
    """Draw the divergence of each stream's predictions: mean, and how far percentiles reach."""
    names = ["text", *(name for name in predictions if name.startswith("codebook_"))]
    figure, (axis,) = new_figure(3.4)
    for place, name in enumerate(names):
        kl, noise = predictions[name].bundle.kl, predictions[name].noise.kl
        if not kl:
            continue
        colour = _COLOURS["attention"] if place <= len(names) // 2 else _COLOURS["noise"]
        reach = [above_floor(value) for value in (kl.median, kl.p99)]
        axis.plot([place, place], reach, color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axis.plot([place], [above_floor(kl.p90)], "_", color=colour, markersize=7)
        axis.plot([place], [above_floor(kl.mean)], "o", color=colour, markersize=5)
        if noise:
            axis.plot([place], [above_floor(noise.mean)], "x", color=INK, markersize=4)
    axis.set_yscale("log")
    plain_labels(axis.yaxis)
    axis.set_xticks(range(len(names)), ["text", *(name.removeprefix("codebook_") for name in names[1:])])
    axis.set_xlabel("codebook (grey: the user's, unused in conversation)")
    axis.set_ylabel("KL divergence, nats/token")
    return as_svg(figure)


def _rollout(rollout: Rollout) -> str:
    """Draw how many of the agent's tokens agree, frame by frame."""
    figure, (axis,) = new_figure(2.2)
    axis.plot(range(len(rollout.agreement)), rollout.agreement, color=_COLOURS["attention"])
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("frame (80 ms)")
    axis.set_ylabel("same tokens")
    return as_svg(figure)
