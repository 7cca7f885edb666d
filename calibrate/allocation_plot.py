"""A picture of an allocation: what other sizes would cost, and what was measured of and chosen for every part."""

from collections.abc import Mapping, Sequence

from .svg import INK, STYLE, above_floor, add_legend, as_svg, new_figure, plain_labels

_ROW, _CURVE = 0.2, 2.6  # inches
_FONT = 8


def draw(
    costs: Mapping[str, Mapping[int, float]],
    chosen: Mapping[str, float],
    settings: Mapping[str, str],
    curve: Sequence[tuple[int, float]],
    here: tuple[int, float],
) -> str:
    """Draw the divergence by size, and below it what each part costs at each number of bits, as SVG.

    costs: nats/token, by part and bits. chosen: what the chosen setting is expected to cost, by part. settings: what it
    is called, by part. curve: bytes and expected divergence of the best recipes. here: those of the chosen one. The
    colours are fixed, since the picture is not part of a page.
    """
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        names = list(costs)
        figure, (sizes, parts) = new_figure(_CURVE + 1 + _ROW * len(names), 2, 7.0, (_CURVE, 0.6 + _ROW * len(names)))
        figure.patch.set(alpha=1, facecolor="white")
        sizes.plot(
            [nbytes / 1e6 for nbytes, _ in curve], [above_floor(value) for _, value in curve], ".-", color="#3b6ea5"
        )
        sizes.plot([here[0] / 1e6], [above_floor(here[1])], "o", color="#c0392b", label="this recipe")
        sizes.set_yscale("log")
        plain_labels(sizes.yaxis)
        sizes.set_xlabel("size of the bundle, MB")
        sizes.set_ylabel("expected divergence,\nnats/token")
        sizes.grid(True, alpha=0.3)
        add_legend(sizes)
        bits = sorted({number for cost in costs.values() for number in cost})
        colours = mpl.colormaps["viridis"]([0.9 * index / max(1, len(bits) - 1) for index in range(len(bits))])
        for number, colour in zip(bits, colours, strict=True):
            values = [above_floor(costs[name].get(number)) for name in names]
            parts.plot(values, range(len(names)), "o", markersize=4, color=colour, label=f"{number} bit")
        marked = [(place, chosen[name]) for place, name in enumerate(names) if name in chosen]
        parts.plot(
            [above_floor(value) for _, value in marked],
            [place for place, _ in marked],
            "x",
            markersize=7,
            color=INK,
            label="chosen",
        )
        for place, name in enumerate(names):
            parts.text(
                1.01,
                place,
                settings[name],
                transform=parts.get_yaxis_transform(),
                va="center",
                fontsize=_FONT,
                color=INK,
            )
        parts.set_xscale("log")
        plain_labels(parts.xaxis)
        parts.set_yticks(range(len(names)), names, fontsize=_FONT)
        parts.set_ylim(len(names) - 0.4, -0.6)
        parts.grid(True, axis="y", alpha=0.2)
        parts.set_xlabel("divergence of text and agent, nats/token, when only this part is quantized")
        add_legend(parts, 4)
        return as_svg(figure).replace("var(--ink)", "#222").replace("var(--faint)", "#999")
