"""A voice made from a recording: its file, what is recorded of it, and the consent of the person in it.

The file is a preset with its origin: ``embeddings`` and ``cache`` as in ``voices.tgz``, the recording's codec tokens,
and in the header's metadata the consent, the sha256 of the recording and that of the embedding tables. Files of others
are not trusted.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import Problem, UserError
from ..hints import Hint
from ..regular_files import check_regular
from ..tensorfile import DTYPES, Spec, TensorFile, TensorWriter
from .architecture import Architecture
from .checkpoint import Checkpoint
from .scan import BLOCK
from .voices import PRESETS, Voice, check, is_voice_name

SUFFIX = ".safetensors"
MOST_FRAMES = 750  # of 80 ms: a minute; the published presets are four seconds
MOST_CONSENT = 500  # characters
_FORMAT = "ppx-voice 1"
_LARGEST = 64 << 20  # bytes; a minute of the 7B model takes 6 million
_SHA256 = re.compile("[0-9a-f]{64}")
_WORD = re.compile(r"[^\W\d_]+")
_NO_CONSENT = (
    "a voice is made only with the consent of the person recorded, in words: say who agreed to what, for example "
    '"I am the speaker, and agree to this use of my voice"'
)

Codes = NDArray[np.int16]


@dataclass(frozen=True)
class VoiceOrigin:
    """What is recorded of a voice that was made from a recording.

    consent: of the person recorded, in words. recording, embedding_tables: sha256 of the audio file, and of the tables
    that the embeddings are sums of. tokens: of the codec, ``[codebooks][frames]``.
    """

    name: str
    consent: str
    recording: str
    embedding_tables: str
    tokens: tuple[tuple[int, ...], ...]

    @property
    def codes(self) -> Codes:
        """The tokens as an array ``[codebooks, frames]``."""
        return np.array(self.tokens, np.int16)

    def to_json(self) -> dict[str, Any]:
        """Return it as a manifest holds it: the tokens as base64 of int16, little-endian, codebook by codebook."""
        codes = base64.b64encode(self.codes.astype("<i2").tobytes()).decode()
        return {
            "name": self.name,
            "consent": self.consent,
            "recording_sha256": self.recording,
            "embedding_tables_sha256": self.embedding_tables,
            "codebooks": len(self.tokens),
            "tokens": codes,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the record in a manifest that was checked; raises ValueError for tokens that are not in its form."""
        values = np.frombuffer(base64.b64decode(data["tokens"], validate=True), "<i2")
        codes = values.reshape(data["codebooks"], -1)
        if not 1 < codes.shape[1] <= MOST_FRAMES:
            raise ValueError(f"voice {data['name']}: {codes.shape[1]} frames of tokens: at most {MOST_FRAMES} are read")
        names = (data["recording_sha256"], data["embedding_tables_sha256"])
        return cls(data["name"], data["consent"], *names, as_tokens(codes))


@dataclass(frozen=True)
class RecordedVoice:
    """A voice that was made from a recording, and where it comes from."""

    voice: Voice
    origin: VoiceOrigin


def as_tokens(codes: NDArray[Any]) -> tuple[tuple[int, ...], ...]:
    """Return an array of tokens ``[codebooks, frames]`` as a record holds them."""
    return tuple(tuple(row) for row in codes.tolist())


def check_consent(consent: str | None) -> str:
    """Return the words of consent; raises UserError where there are none, or they are no sentence of one line."""
    words = " ".join((consent or "").split())
    if not words:
        raise UserError(_NO_CONSENT, Hint.GIVE_CONSENT)
    if not words.isprintable() or len(words) > MOST_CONSENT:
        raise UserError(f"the consent is longer than {MOST_CONSENT} characters, or cannot be printed: shorten it")
    if len(_WORD.findall(words)) < 3:
        raise UserError(f"the consent {words!r} is not a sentence: {_NO_CONSENT}", Hint.GIVE_CONSENT)
    return words


def check_voice_name(name: str, taken: Iterable[str] = ()) -> str:
    """Return the name of a new voice; raises UserError for one that is not plain, or is taken.

    Capitals make no difference: file systems of Macs do not tell them apart.
    """
    if not is_voice_name(name):
        raise UserError(
            f"voice {name!a}: not a name: letters, digits, - and _ are allowed, at most 64", Hint.RENAME_VOICE
        )
    same = [other for other in (*PRESETS, *taken) if other.casefold() == name.casefold()]
    if same:
        raise UserError(f"voice {name}: there is already a voice {same[0]}", Hint.RENAME_VOICE)
    return name


def table_names(architecture: Architecture) -> list[str]:
    """Return the tables that a temporal step sums, by stream: the text's, then each codebook's."""
    return ["text_emb.weight", *(f"emb.{number}.weight" for number in range(architecture.n_q))]


def tables_sha256(checkpoint: Checkpoint) -> str:
    """Return the sha256 of a checkpoint's embedding tables: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in table_names(checkpoint.architecture):
        spec = checkpoint.tensors[name].spec
        digest.update(f"{name} {spec.dtype} {list(spec.shape)}\n".encode())
        for first, last in spec.pieces(BLOCK):
            values = np.ascontiguousarray(checkpoint.read(name, first, last))
            digest.update(values.view(np.uint8).data)
    return digest.hexdigest()


def write_voice(path: str | Path, recorded: RecordedVoice) -> None:
    """Write the file of a voice: under a temporary name, flushed, renamed."""
    path = Path(path)
    voice, origin = recorded.voice, recorded.origin
    tensors: dict[str, NDArray[Any]] = {"cache": voice.cache, "embeddings": voice.embeddings, "tokens": origin.codes}
    codes = {dtype: code for code, dtype in DTYPES.items()}
    specs = [Spec(name, codes[array.dtype], array.shape) for name, array in tensors.items()]
    metadata = {"format": _FORMAT, "name": origin.name, "consent": origin.consent}
    metadata |= {"recording_sha256": origin.recording, "embedding_tables_sha256": origin.embedding_tables}
    partial = path.with_name(f".{path.name}.partial")
    try:
        with closing(TensorWriter(partial, specs, metadata)) as writer:
            for name, array in tensors.items():
                writer.append(name, array)
            writer.finish()
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def read_voice_file(path: Path, architecture: Architecture) -> RecordedVoice:
    """Read the file of a voice, for a model of this architecture.

    Raises UserError for what is not such a file: other tensors, dtypes or shapes, values that are not finite, tokens
    that the model does not have, no consent.
    """
    check_regular(path, _LARGEST)
    with TensorFile(path) as file:
        problems = file.header_problems()
        if problems or file.metadata.get("format") != _FORMAT:
            problems = problems or [Problem(str(path), "not a voice that ppx-voice wrote", Hint.MAKE_VOICE)]
            raise UserError(problems)
        dtypes = {name: spec.dtype for name, spec in file.specs.items()}
        if dtypes != {"cache": "I64", "embeddings": "BF16", "tokens": "I16"}:
            shown = ", ".join(f"{name!a} {dtype}" for name, dtype in list(dtypes.items())[:5])
            raise _not_a_voice(path, f"holds {shown or 'nothing'}, not cache I64, embeddings BF16 and tokens I16")
        arrays = {name: file.read(name, 0, spec.rows).reshape(spec.shape) for name, spec in file.specs.items()}
        recording, tables = (file.metadata.get(key, "") for key in ("recording_sha256", "embedding_tables_sha256"))
        name, consent = file.metadata.get("name", ""), file.metadata.get("consent")
    if not is_voice_name(name) or not _SHA256.fullmatch(recording) or not _SHA256.fullmatch(tables):
        raise _not_a_voice(path, "its metadata lacks a plain name, or the sha256 of recording and embedding tables")
    voice, codes = Voice(name, arrays["embeddings"], arrays["cache"]), arrays["tokens"]
    try:
        consent = check_consent(consent)
        check(voice, architecture)
        check_codes(codes, architecture)
    except UserError as error:
        raise UserError([problem.within(str(path)) for problem in error.problems]) from None
    except ValueError as error:
        raise _not_a_voice(path, str(error)) from None
    if len(voice.embeddings) != codes.shape[1] - 1:
        message = f"{len(voice.embeddings)} embeddings do not belong to {codes.shape[1]} frames of tokens"
        raise _not_a_voice(path, message)
    return RecordedVoice(voice, VoiceOrigin(name, consent, recording, tables, as_tokens(codes)))


def check_codes(codes: NDArray[Any], architecture: Architecture) -> None:
    """Raise ValueError for codec tokens ``[codebooks, frames]`` that a voice of this model cannot have."""
    codebooks = architecture.n_q // 2
    if codes.ndim != 2 or codes.shape[0] != codebooks or not 1 < codes.shape[1] <= MOST_FRAMES:
        raise ValueError(f"tokens have shape {list(codes.shape)}, not [{codebooks}, 2 to {MOST_FRAMES}]")
    if not ((codes >= 0) & (codes < architecture.card)).all():
        raise ValueError(f"tokens are not from 0 to {architecture.card - 1}, which this model has")


def _not_a_voice(path: Path, message: str) -> UserError:
    return UserError(Problem(str(path), message, Hint.MAKE_VOICE))
