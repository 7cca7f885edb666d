"""A picture of what was measured of a model's parts, and what was chosen for them."""

from collections.abc import Mapping

from .svg import INK, STYLE, above_floor, add_legend, as_svg, new_figure, plain_labels


def sensitivities(costs: Mapping[str, Mapping[int, float]], chosen: Mapping[str, float]) -> str:
    """Draw what each part costs at each number of bits, and what was chosen for it, as SVG.

    costs: nats/token, by part and bits. The colours are fixed, since the picture is not part of a page.
    """
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure, (axis,) = new_figure(1.2 + 0.16 * len(costs))
        names = list(costs)
        bits = sorted({number for cost in costs.values() for number in cost})
        colours = mpl.colormaps["viridis"]([index / max(1, len(bits) - 1) for index in range(len(bits))])
        for number, colour in zip(bits, colours, strict=True):
            values = [above_floor(costs[name].get(number)) for name in names]
            axis.plot(values, range(len(names)), "o", markersize=3, color=colour, label=f"{number} bit")
        marked = [(place, chosen[name]) for place, name in enumerate(names) if name in chosen]
        axis.plot(
            [above_floor(value) for _, value in marked], [place for place, _ in marked], "x", color=INK, label="chosen"
        )
        axis.set_xscale("log")
        plain_labels(axis.xaxis)
        axis.set_yticks(range(len(names)), names, fontsize=6)
        axis.invert_yaxis()
        axis.set_xlabel("divergence of text and agent, nats/token, when only it is quantized")
        add_legend(axis)
        return as_svg(figure).replace("var(--ink)", "#555").replace("var(--faint)", "#999")
