"""What a report holds. Reports come with the bundles of others, and are printed, drawn and published."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from ..convert import typed_json
from ..convert.bundle.manifest import Manifest
from ..convert.bundle.run_memory import RunMemory
from ..convert.schema import FILE, Each, Leaf, OrNull, mismatch, number, whole
from ..convert.source.scan import Fingerprint
from ..convert.typed_json import MAY_BE_MISSING, Key
from ..model.kernel_test import KernelRow
from ..model.tokens import TokenDescription
from .figures import ActivationRow, Amount, HiddenFigures, Rollout, StreamFigures, WeightRow
from .limits import AT_LEAST, FIGURES, Failure

REPORT_VERSION = 2
_READ = (1, 2)  # 1 had limits that did not depend on the checkpoint
_FLAC = re.compile("data:audio/flac;base64,[A-Za-z0-9+/]*={0,2}")
_FILES = Each(FILE)
_Sound = Annotated[
    str, Leaf("a sound in FLAC", lambda value: isinstance(value, str) and _FLAC.fullmatch(value) is not None)
]
_Limits = Annotated[
    dict[str, float | None], {key: OrNull(number() if key in AT_LEAST else number(0)) for key in FIGURES}
]
# Streams that limits apply to, and texts mention, where anything was computed
_PREDICTED = {"predictions": dict.fromkeys(("text", "codebook_0", "agent"), typed_json.schema_of(StreamFigures))}


@dataclass(frozen=True)
class Verdict:
    """Whether a bundle passes, and every reason why it does not, the most important first."""

    passed: bool
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class BundleIdentity:
    """The bundle that a report is about. bytes: of all its files, the manifest's included."""

    recipe: str
    bytes: int
    fingerprint: str
    target: str
    dtype: str
    bits_per_weight: Amount
    parameters: Annotated[int | None, MAY_BE_MISSING]
    files: Annotated[dict[str, Fingerprint], _FILES]


@dataclass(frozen=True)
class SourceIdentity:
    """The checkpoint that it was made from. revision: the commit on the Hub, if it came from there."""

    id: str
    revision: str | None
    files: Annotated[dict[str, Fingerprint] | None, _FILES] = None


@dataclass(frozen=True)
class Structure:
    """What is wrong with the bundle's files, and how many files and tensors were looked at."""

    problems: tuple[str, ...]
    files: int
    tensors: int


@dataclass(frozen=True, kw_only=True)
class Question:
    """The recording that a bundle answered. transcript, through_codec: what the recognizer wrote of it, and of what the
    codec alone leaves of it; word_error_rate: of the latter, None for few words.
    """

    file: str
    seconds: Amount
    transcript: Annotated[str | None, Key("heard"), MAY_BE_MISSING]
    through_codec: Annotated[str | None, MAY_BE_MISSING]
    word_error_rate: Amount | None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A spoken answer. text: the model's own; transcript: the recognizer's.

    silent: share of frames; clipped: of samples. repeats: of a phrase in a row; looped: seconds of repeated sound.
    """

    seconds: Amount
    text: str
    transcript: Annotated[str, Key("heard")]
    word_error_rate: Amount | None
    silent: Amount
    clipped: Amount
    repeats: Amount
    looped: Amount


@dataclass(frozen=True)
class Session:
    """How a bundle was made to speak. wrapped: whether the question's tokens were taken modulo the model's number."""

    voice: str
    prompt: str
    seed: Annotated[int | None, MAY_BE_MISSING]
    wrapped: Annotated[bool, Key("folded")]


@dataclass(frozen=True, kw_only=True)
class RoundTripLimits:
    """What an answer may have at most; floor: word error rate of the question up to which the recognizer is trusted."""

    word_error_rate: Amount | None = None
    silent: Amount | None = None
    clipped: Amount | None = None
    repeats: Amount | None = None
    looped: Amount | None = None
    floor: Amount


@dataclass(frozen=True)
class Sounds:
    """The first half minute of a question and its answer, as data URIs."""

    question: _Sound
    answer: _Sound


@dataclass(frozen=True)
class RoundTrip:
    """A spoken answer, judged by a speech recognizer."""

    question: Question
    answer: Answer
    session: Annotated[Session, Key("scene")]
    recognizer: str
    limits: RoundTripLimits
    audio: Sounds


@dataclass(frozen=True)
class Devices:
    """Where MLX and PyTorch computed."""

    mlx: str
    torch: Annotated[str | None, MAY_BE_MISSING]


@dataclass(frozen=True)
class Machine:
    """What a verification ran on."""

    system: str
    machine: str
    device: Devices
    python: str
    toolkit: str
    libraries: dict[str, str]


@dataclass(frozen=True)
class Times:
    """When a verification began (UTC), and how many seconds it took."""

    began: str
    seconds: Amount


@dataclass(frozen=True)
class Report:
    """A whole verification (docs/verification.md describes every field).

    limits: what figures may be, by the names in ``limits.FIGURES``; None where nothing was computed to judge by.
    arithmetic: dtype of the bundle's activations. predictions: by stream, empty where nothing was computed; hidden:
    None there, and in earlier versions. memory: of a conversation, computed; None in earlier versions. rollout,
    round_trip: None where they were not asked for. command: what runs it again.
    """

    verdict: Verdict
    limits: _Limits
    bundle: BundleIdentity
    source: SourceIdentity
    tokens: Annotated[TokenDescription, Key("material")]
    arithmetic: str
    structure: Structure
    kernels: tuple[KernelRow, ...]
    weights: tuple[WeightRow, ...]
    activations: tuple[ActivationRow, ...]
    predictions: dict[str, StreamFigures]
    hidden: Annotated[HiddenFigures | None, MAY_BE_MISSING]
    memory: Annotated[RunMemory | None, MAY_BE_MISSING]
    rollout: Rollout | None
    round_trip: Annotated[RoundTrip | None, MAY_BE_MISSING]
    ran_on: Machine
    command: str
    times: Times

    def is_about(self, manifest: Manifest) -> bool:
        """Tell whether this is the report of a bundle's files as they are now."""
        return self.bundle.fingerprint == manifest.fingerprint and self.bundle.files == manifest.files

    def to_json(self) -> dict[str, Any]:
        """Return it as ``report.json`` holds it."""
        return {"report_version": REPORT_VERSION, **typed_json.to_json(self)}

    @classmethod
    def from_json(cls, data: Any) -> "Report":
        """Return the report in parsed JSON, of this version or an earlier one, which lacked some keys.

        Raises ValueError with a sentence on what does not fit.
        """
        if problem := mismatch(data, {"report_version": whole()}):
            raise ValueError(problem)
        if data["report_version"] not in _READ:
            raise ValueError(f"report_version is {data['report_version']}")
        report = typed_json.from_json(cls, data)
        if report.predictions and (problem := mismatch(data, _PREDICTED)):
            raise ValueError(problem)
        return report
