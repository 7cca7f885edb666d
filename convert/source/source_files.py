"""Which files make up a source: config.json may name them, an index lists shards, and voices may be missing."""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import Problem, UserError, refuse
from ..file_names import CODEC, CONFIG, INDEX, TOKENIZER, VOICES, WEIGHTS
from ..hints import Hint
from .architecture import read_config
from .scan import Fingerprint
from .shards import read_index

NAMING = (CONFIG, INDEX)  # small files, which name the others
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,199}")
_KEYS = {"moshi_name": WEIGHTS, "mimi_name": CODEC, "tokenizer_name": TOKENIZER}  # the loaders' keys and defaults
_TENSORS = ("moshi_name", "mimi_name", "lora_name")  # keys that name safetensors files


@dataclass(frozen=True)
class SourceFiles:
    """Names of a source's files in its folder.

    weights: one file, or the shards that ``index`` lists. index, voices, config: None where the source has none.
    adapter: the LoRA file that config.json asks to add to the weights, None for none.
    """

    weights: tuple[str, ...] = (WEIGHTS,)
    index: str | None = None
    codec: str = CODEC
    tokenizer: str = TOKENIZER
    voices: str | None = None
    config: str | None = None
    adapter: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Every file but the adapter, in the order in which they are listed."""
        optional = (self.index, self.voices, self.config)
        return (*self.weights, self.codec, self.tokenizer, *(name for name in optional if name))

    def by_kind(self) -> dict[str, tuple[str, ...]]:
        """Return the names under those that PersonaPlex's files have; what the source lacks is left out."""
        kinds: dict[str, tuple[str, ...]] = {WEIGHTS: self.weights, CODEC: (self.codec,), TOKENIZER: (self.tokenizer,)}
        kinds |= {VOICES: (self.voices,)} if self.voices else {}
        return kinds | ({CONFIG: (self.config,)} if self.config else {})

    def weights_sha256(self, fingerprints: Mapping[str, Fingerprint]) -> str:
        """Return what stands for the weights: the sha256 of their file, or one over those of all shards."""
        hashes = [fingerprints[name].sha256 for name in self.weights]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def name_files(folder: Path, available: Callable[[str], bool]) -> SourceFiles:
    """Return the names of a source's files.

    folder: holds config.json and the index, if the source has them. available: tells of a name whether the source has
    such a file. One file of weights goes before an index, as in other loaders. Raises UserError for a config.json or an
    index that cannot be read, and for names that are not plain file names.
    """
    config = read_config(folder / CONFIG) if available(CONFIG) else {}
    names = {key: config.get(key, default) for key, default in _KEYS.items()}
    adapter = config.get("lora_name") if config.get("lora") else None
    named = names | ({} if adapter is None else {"lora_name": adapter})
    problems = [Problem(str(folder / CONFIG), f"{key} is {name!a:.80}", why) for key, name, why in _unusable(named)]
    if not problems and len(set(named.values())) < len(named):
        problems = [Problem(str(folder / CONFIG), "gives two files the same name", "correct it")]
    refuse(problems)
    sharded = available(INDEX) and not available(names["moshi_name"])
    return SourceFiles(
        weights=tuple(sorted(set(read_index(folder / INDEX).values()))) if sharded else (names["moshi_name"],),
        index=INDEX if sharded else None,
        codec=names["mimi_name"],
        tokenizer=names["tokenizer_name"],
        voices=VOICES if available(VOICES) else None,
        config=CONFIG if available(CONFIG) else None,
        adapter=adapter,
    )


def _unusable(names: Mapping[str, object]) -> list[tuple[str, object, str]]:
    """Return key, name and what to do for each name that is not a plain one, or not of a file that is read here."""
    problems: list[tuple[str, object, str]] = []
    for key, name in names.items():
        if isinstance(name, str) and name.startswith("hf://"):
            why = "a file of another repository: put it into the folder, and its name here"
            problems.append((key, name, why))
        elif not isinstance(name, str) or not _PLAIN.fullmatch(name):
            problems.append((key, name, "not a plain file name: do not trust this source"))
        elif key in _TENSORS and not name.endswith(".safetensors"):
            problems.append((key, name, "only safetensors files are read: save it as one"))
    return problems


def files_in(folder: Path) -> SourceFiles:
    """Return the names of a source's files in a folder on this machine; raises as ``name_files``."""
    return name_files(folder, lambda name: (folder / name).is_file())


def missing_files(folder: Path, files: SourceFiles) -> list[str]:
    """Return the files of a source that its folder lacks."""
    return [name for name in files.names if not (folder / name).is_file()]


def check_adapter(files: SourceFiles, given: bool) -> None:
    """Raise UserError for weights that are incomplete without an adapter, where none is given."""
    if files.adapter and not given:
        message = f"lora is set: the model is these weights with {files.adapter} added"
        raise UserError(Problem(CONFIG, message, Hint.GIVE_ADAPTER))
