"""Pictures of a report, as SVG that stands in a page and takes its colours, light or dark, from there."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..calibrate.svg import INK, STYLE, above_floor, add_legend, as_svg, new_figure, plain_labels

_COLOURS = {"attention": "#2b7bba", "mlp": "#d9730d", "noise": "#7a8288"}


def pictures(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the pictures that a report's figures allow, as SVG text by name."""
    import matplotlib as mpl  # half a second to import: only where something is drawn

    found = {}
    with mpl.rc_context(STYLE):
        if report["activations"]:
            found["drift"] = _drift(report["activations"])
            found["steps"] = _steps(report["activations"])
        if report["predictions"]:
            found["predictions"] = _predictions(report["predictions"])
        if report["rollout"]:
            found["rollout"] = _rollout(report["rollout"])
    return found


def _drift(activations: Sequence[Mapping[str, Any]]) -> str:
    """Draw the error of the temporal transformer's blocks over its depth."""
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in activations if row["component"] == "temporal" and row["local"]]
    figure, (axis,) = new_figure(3.4)
    for part in ("attention", "mlp"):
        of_part = [row for row in rows if row["part"] == part]
        layers = [row["layer"] for row in of_part]
        for kind, style in (("accumulated", "-"), ("local", "--")):
            values = [above_floor(row[kind]["relative_l2"]) for row in of_part]
            label = f"{'MLP' if part == 'mlp' else part}, {kind}"
            axis.plot(layers, values, style, marker=".", color=_COLOURS[part], label=label)
    layers = [row["layer"] for row in rows if row["part"] == "mlp"]
    noise = [above_floor(row["noise_accumulated"]["relative_l2"]) for row in rows if row["part"] == "mlp"]
    axis.plot(layers, noise, ":", color=_COLOURS["noise"], label="noise floor, accumulated")
    axis.set_yscale("log")
    plain_labels(axis.yaxis)
    axis.set_xlabel("layer")
    axis.set_ylabel("relative L2 error")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    add_legend(axis)
    return as_svg(figure)


def _steps(activations: Sequence[Mapping[str, Any]]) -> str:
    """Draw the own error of the depformer's blocks, step by layer."""
    rows = [row for row in activations if row["component"] == "depformer" and row["local"]]
    layers, steps = (sorted({row[key] for row in rows}) for key in ("layer", "step"))
    values = {(row["part"], row["layer"], row["step"]): row["local"]["relative_l2"] for row in rows}
    largest = max([value for value in values.values() if value], default=0.0) or 1.0
    figure, axes = new_figure(1.5 + 0.42 * len(layers), 2)
    for axis, part in zip(axes, ("attention", "mlp"), strict=True):
        table = [[values.get((part, layer, step)) or 0.0 for step in steps] for layer in layers]
        mesh = axis.pcolormesh(steps, layers, table, cmap="viridis", vmin=0, vmax=largest, edgecolors="face")
        axis.set_title("MLP" if part == "mlp" else part, fontsize=9, color=INK)
        axis.set_ylabel("layer")
        axis.set_xticks(steps)
        axis.set_yticks(layers)
    axes[1].set_xlabel("depformer step (0–7: the agent's codebooks)")
    colours = figure.colorbar(mesh, ax=list(axes), label="relative L2 error")
    colours.ax.tick_params(colors=INK, labelcolor=INK)
    colours.ax.yaxis.label.set_color(INK)
    return as_svg(figure)


def _predictions(predictions: Mapping[str, Any]) -> str:
    """Draw the divergence of each stream's predictions: mean, and how far percentiles reach."""
    names = ["text", *(name for name in predictions if name.startswith("codebook_"))]
    figure, (axis,) = new_figure(3.4)
    for place, name in enumerate(names):
        kl, noise = (predictions[name][which]["kl"] for which in ("bundle", "noise"))
        if not kl:
            continue
        colour = _COLOURS["attention"] if place <= len(names) // 2 else _COLOURS["noise"]
        reach = [above_floor(kl[key]) for key in ("median", "p99")]
        axis.plot([place, place], reach, color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axis.plot([place], [above_floor(kl["p90"])], "_", color=colour, markersize=7)
        axis.plot([place], [above_floor(kl["mean"])], "o", color=colour, markersize=5)
        if noise:
            axis.plot([place], [above_floor(noise["mean"])], "x", color=INK, markersize=4)
    axis.set_yscale("log")
    plain_labels(axis.yaxis)
    axis.set_xticks(range(len(names)), ["text", *(name.removeprefix("codebook_") for name in names[1:])])
    axis.set_xlabel("codebook (grey: the user's, unused in conversation)")
    axis.set_ylabel("KL divergence, nats a token")
    return as_svg(figure)


def _rollout(rollout: Mapping[str, Any]) -> str:
    """Draw how many of the agent's tokens agree, frame by frame."""
    figure, (axis,) = new_figure(2.2)
    axis.plot(range(len(rollout["agreement"])), rollout["agreement"], color=_COLOURS["attention"])
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("frame (80 ms)")
    axis.set_ylabel("same tokens")
    return as_svg(figure)
