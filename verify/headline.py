"""What a report says first: how much a bundle loses, beside plain rounding of the same checkpoint."""

from .figures import PredictionFigures, StreamFigures
from .records import Report

EIGHT = "8"  # bits that are taken for lossless; the control at them, by its name in a report
INTACT, NOT_INTACT = "Intact", "Not intact"
MEANING = (
    "Intact means that files and weights are what the conversion wrote, and that predictions diverge about as much as "
    "plain rounding makes them, or less. It is not the same as good: the figures say how much is lost."
)


def verdict(report: Report) -> str:
    """Return the verdict in a word or two."""
    return INTACT if report.verdict.passed else NOT_INTACT


def headline(report: Report) -> str:
    """Return one sentence on what is lost: bits, size, divergence over that of plain rounding, top-1 agreement."""
    bits, size = bits_of(report), f"{report.bundle.bits_per_weight:.2f} bpw"
    agent = report.predictions.get("agent")
    if agent is None or agent.bundle.kl is None or agent.bundle.top1 is None:
        return f"{bits}, {size}: nothing was computed"
    parts = []
    if any(row.bits for row in report.weights):
        parts = [f"{_shown(ratio)} what {name} loses" for name, ratio in _ratios(agent, "plain rounding", "{} bit")]
    lost = f"loses {' and '.join(parts)}" if parts else f"agent KL {_figure(agent.bundle)} nats/token"
    agreement = agent.bundle.top1.agreement
    shown = "unknown" if agreement is None else f"{100 * agreement:.0f} %"
    return f"{bits}, {size}: {lost}; agent top-1 agreement {shown}"


def comparison(report: Report) -> str:
    """Return one sentence on how far predictions diverge, beside plain rounding and controls at other bits."""
    agent = report.predictions.get("agent")
    if agent is None or agent.bundle.kl is None:
        return "Nothing was computed."
    subject = "Its predictions of the agent's audio diverge from the original's"
    if not any(row.bits for row in report.weights):
        return f"{subject} by {_figure(agent.bundle)} nats/token; it is not quantized."
    ratios = _ratios(agent, "plain rounding at the same bits", "{} bit of the same checkpoint")
    parts = [f"{_factor(ratio)} times as much as {name}" for name, ratio in ratios]
    if not parts:
        return f"{subject} by {_figure(agent.bundle)} nats/token; this report has nothing to compare that with."
    return f"{subject} {', and '.join(parts)}."


def lacks_8_bit(report: Report) -> bool:
    """Tell whether the same checkpoint at 8 bit could be a control of a report, and is not."""
    agent = report.predictions.get("agent")
    widths = {row.bits for row in report.weights if row.bits}
    return agent is not None and EIGHT not in agent.controls and bool(widths - {int(EIGHT)})


def _ratios(stream: StreamFigures, plain: str, width: str) -> list[tuple[str, float]]:
    """Return a bundle's divergence over that of each control where both are known.

    plain: name of plain rounding at the bundle's own bits. width: of a control at other bits, with {} for these.
    """
    known = [(plain, stream.control)] if stream.control else []
    known += [(width.format(bits), figures) for bits, figures in stream.controls.items()]
    ratios = [(name, times(stream.bundle, figures)) for name, figures in known]
    return [(name, ratio) for name, ratio in ratios if ratio is not None]


def times(bundle: PredictionFigures, control: PredictionFigures) -> float | None:
    """Return the divergence of a bundle over that of a control, None where either is not known or the latter is 0."""
    if bundle.kl is None or control.kl is None or bundle.kl.mean is None or not control.kl.mean:
        return None
    return bundle.kl.mean / control.kl.mean


def bits_of(report: Report) -> str:
    """Return the bits of a bundle's quantized tensors, such as ``4 bit`` or ``4 to 8 bit``."""
    widths = sorted({row.bits for row in report.weights if row.bits})
    if not widths:
        return f"{report.bundle.dtype}, not quantized" if report.weights else "not read"
    return f"{widths[0]} bit" if len(widths) == 1 else f"{widths[0]} to {widths[-1]} bit"


def _shown(ratio: float) -> str:
    if ratio >= 0.995:
        return f"{ratio:.1f} times" if ratio < 9.95 else f"{ratio:.0f} times"
    return f"{100 * ratio:.0f} % of" if ratio >= 0.0995 else f"{100 * ratio:.1f} % of"


def _factor(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.2g}"


def _figure(figures: PredictionFigures) -> str:
    mean = figures.kl.mean if figures.kl else None
    return "unknown" if mean is None else f"{mean:.2g}"
