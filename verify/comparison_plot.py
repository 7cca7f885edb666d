"""The first picture of a report: a bundle beside plain rounding and controls, for text and each codebook."""

from collections.abc import Mapping

from ..calibrate.svg import INK, WIDTH, add_legend, as_svg
from .figures import BUNDLE, CONTROL, NOISE, StreamFigures
from .stream_axis import StreamAxis

_NAMES = {BUNDLE: "this bundle", CONTROL: "plain rounding", NOISE: "noise floor"}
_STYLES = {
    BUNDLE: {"marker": "o", "color": "#2b7bba", "markersize": 6},
    CONTROL: {"marker": "s", "color": "#d9730d", "markersize": 5},
    NOISE: {"marker": "x", "color": INK, "markersize": 4},
}
_OTHERS = ("^", "v", "D")  # of controls at other bits
_APART = 0.2  # of a stream's width, between neighbours


def draw_comparison(predictions: Mapping[str, StreamFigures], narrow: bool) -> str:
    """Return the picture as SVG: the mean divergence of every model, side by side for each stream."""
    present = [name for name in predictions["text"].by_model() if name != NOISE]
    models = [name for name in (CONTROL, BUNDLE) if name in present]
    models += [name for name in present if name not in models] + [NOISE]
    figure, axis = StreamAxis.new(predictions, narrow, 2 * WIDTH, 3.4)
    others = 0
    for number, model in enumerate(models):
        style = _STYLES.get(model)
        if style is None:
            style = {"marker": _OTHERS[others % len(_OTHERS)], "color": "#2f9e6b", "markersize": 6}
            others += 1
        offset = _APART * (number - (len(models) - 1) / 2)
        means = []
        for name in axis.names:
            figures = predictions[name].by_model().get(model)
            means.append(figures.kl.mean if figures and figures.kl else None)
        places = [place + offset for place in range(len(axis.names))]
        axis.plot(places, means, label=_NAMES.get(model, f"plain {model} bit"), linestyle="none", **style)
    add_legend(axis.axes, 2 if narrow else len(models))
    return as_svg(figure)
