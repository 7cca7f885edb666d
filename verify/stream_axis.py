"""An axis of streams beside a logarithmic one of divergence: streams run down a phone, and along a wide page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..calibrate.svg import FAINT, above_floor, new_figure, plain_labels
from .figures import StreamFigures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NARROW = 3.6  # inches of a phone's width: text of 9 points is then 12 CSS pixels or more
_ROW = 0.27  # inches of a stream


@dataclass(frozen=True)
class StreamAxis:
    """Where figures of text and each codebook are drawn. names: of the streams, in their order."""

    axes: "Axes"
    names: Sequence[str]
    narrow: bool

    @classmethod
    def new(
        cls, predictions: Mapping[str, StreamFigures], narrow: bool, width: float, height: float
    ) -> "tuple[Figure, StreamAxis]":
        """Return a figure and its axis; width, height: inches of the wide form."""
        from matplotlib.ticker import LogLocator, NullLocator

        names = ["text", *(name for name in predictions if name.startswith("codebook_"))]
        figure, (axes,) = new_figure(1.0 + _ROW * len(names) if narrow else height, width=NARROW if narrow else width)
        labels = [name.removeprefix("codebook_") for name in names]
        streams, divergence = (axes.yaxis, axes.xaxis) if narrow else (axes.xaxis, axes.yaxis)
        streams.set_ticks(range(len(names)), labels)
        streams.set_label_text("codebook" if narrow else "codebook (shaded: the user's, unused in conversation)")
        (axes.set_xscale if narrow else axes.set_yscale)("log")
        plain_labels(divergence)
        divergence.set_major_locator(LogLocator(numticks=5 if narrow else 8))
        divergence.set_minor_locator(NullLocator())  # a third of the time that a picture takes
        divergence.set_label_text("KL divergence, nats/token")
        first, last = user_begins(names) - 0.5, len(names) - 0.5
        if narrow:
            axes.set_ylim(last, -0.5)
            axes.axhspan(first, last, color=FAINT, alpha=0.3, linewidth=0)
        else:
            axes.set_xlim(-0.5, last)
            axes.axvspan(first, last, color=FAINT, alpha=0.3, linewidth=0)
        divergence.grid(visible=True, color=FAINT, alpha=0.5, linewidth=0.6)
        axes.set_axisbelow(True)
        return figure, cls(axes, names, narrow)

    def plot(self, places: Sequence[float], values: Sequence[float | None], **style: Any) -> None:
        """Draw values at places of streams."""
        drawn = [above_floor(value) for value in values]
        self.axes.plot(*((drawn, places) if self.narrow else (places, drawn)), **style)

    def span_decades(self) -> None:
        """Let the axis of divergence begin and end at powers of ten, so that it has two labels at least."""
        low, high = self.axes.get_xlim() if self.narrow else self.axes.get_ylim()
        ends = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
        (self.axes.set_xlim if self.narrow else self.axes.set_ylim)(*ends)


def user_begins(names: Sequence[str]) -> int:
    """Return the place of the first codebook that predicts the user: the second half of them."""
    return 1 + (len(names) - 1) // 2
