"""The first picture of a report: a bundle beside plain rounding and controls, for text and each codebook."""

from collections.abc import Mapping

from ..calibrate.svg import WIDTH, add_legend, as_svg
from .figures import BUNDLE, CONTROL, NOISE, StreamFigures
from .stream_axis import StreamAxis

_NAMES = {BUNDLE: "this bundle", CONTROL: "plain rounding"}
_STYLES = {
    BUNDLE: {"marker": "o", "color": "#2b7bba", "markersize": 6},
    CONTROL: {"marker": "s", "color": "#d9730d", "markersize": 5},
}
_OTHERS = ("^", "v", "D")  # of controls at other bits
_APART = 0.2  # of a stream's width, between neighbours


def draw_comparison(predictions: Mapping[str, StreamFigures], narrow: bool) -> str:
    """Return the picture as SVG: mean divergences side by side for each stream; another picture has the noise floor."""
    models = [name for name in predictions["text"].by_model() if name not in (NOISE, CONTROL)]
    models += [CONTROL] if predictions["text"].control else []
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
    axis.span_decades()
    add_legend(axis.axes, min(len(models), 3 if narrow else 8))
    return as_svg(figure)
