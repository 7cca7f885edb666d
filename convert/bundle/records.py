"""What a manifest records: of a bundle's source, its recipe, its calibration tokens, and each of its tensors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from ..source.adapter_record import AdapterRecord
from ..source.license import License
from ..source.license import from_json as license_from_json
from ..source.scan import Fingerprint


@dataclass(frozen=True)
class Software:
    """A program and its version."""

    name: str
    version: str


@dataclass(frozen=True)
class RecipeRecord:
    """A recipe. text: as ``to_toml`` writes it. original: the file that it was read from, None for none."""

    name: str
    text: str
    original: str | None = None


@dataclass(frozen=True)
class SourceRecord:
    """What a bundle was made from.

    id: its Hub id or the folder's name. revision: the commit on the Hub, None for a folder. files: size and sha256 by
    name. copied_steps: where the tensors of depformer steps were copied from that the source does not have.
    """

    id: str
    revision: str | None
    files: dict[str, Fingerprint]
    copied_steps: dict[str, str]
    license: License | None
    adapter: AdapterRecord | None

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's ``source``."""
        return {
            "id": self.id,
            "revision": self.revision,
            "files": files_to_json(self.files),
            "filled": self.copied_steps,
            "license": self.license and asdict(self.license),
            "adapter": self.adapter and self.adapter.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the record in a manifest that was checked; earlier versions lack the last three keys."""
        return cls(
            id=data["id"],
            revision=data["revision"],
            files=files_from_json(data["files"]),
            copied_steps=dict(data.get("filled") or {}),
            license=license_from_json(data.get("license")),
            adapter=AdapterRecord.from_json(data["adapter"]) if data.get("adapter") else None,
        )


@dataclass(frozen=True)
class CalibrationRecord:
    """The calibration tokens of layer-wise GPTQ and fine-tuning.

    kind: where they come from. file: its name. sequences, frames: how many, and how long each is. sha256: of the
    tokens. refined_steps: of fine-tuning. refined: what it trained, None in bundles of earlier versions.
    """

    kind: str
    file: str | None
    sequences: int
    frames: int
    sha256: str
    refined_steps: int = 0
    refined: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's ``calibration``."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the record in a manifest that was checked."""
        return cls(
            data["kind"],
            data.get("file"),
            data["sequences"],
            data["frames"],
            data["sha256"],
            data["refined_steps"],
            data.get("refined"),
        )


@dataclass(frozen=True)
class Adjustment:
    """How a matrix was quantized for which the usual damping of GPTQ was not enough.

    method: the one without data that took its place, else None. damping: the one that was enough, else None.
    """

    reason: str
    method: str | None = None
    damping: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it without what does not apply."""
        pairs = (("method", self.method), ("damping", self.damping), ("reason", self.reason))
        return {key: value for key, value in pairs if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return what ``to_json`` wrote."""
        return cls(str(data["reason"]), data.get("method"), data.get("damping"))


@dataclass(frozen=True)
class TensorRecord:
    """One output tensor of the model.

    source, rows: which rows (the first, and the one after the last) of which tensor of the checkpoint. outputs: names
    in the file: the weight, then its scales and biases. bits, group_size, method: None for a float. weighted_by: the
    norm whose gains weighed the errors, None for none and in bundles of earlier versions. relative_rmse: the
    quantization error of the whole, unweighted; by_step: of each stacked depformer step. overflowed, flushed: values
    that became infinite or zero in the dtype. adjusted: by stacked step, None where no steps are stacked. crc32: of the
    bytes of each of the outputs.
    """

    file: str
    source: str
    rows: tuple[int, int]
    outputs: tuple[str, ...]
    bits: int | None = None
    group_size: int | None = None
    method: str | None = None
    relative_rmse: float | None = None
    relative_rmse_by_step: tuple[float, ...] = ()
    overflowed: int = 0
    flushed: int = 0
    adjusted: tuple[tuple[int | None, Adjustment], ...] = ()
    crc32: tuple[str, ...] = ()
    weighted_by: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the manifest's ``tensors``, without what does not apply."""
        entry: dict[str, Any] = {"file": self.file, "source": self.source, "rows": list(self.rows)}
        entry["outputs"] = list(self.outputs)
        for key in ("bits", "group_size", "method", "weighted_by", "relative_rmse"):
            if getattr(self, key) is not None:
                entry[key] = getattr(self, key)
        if self.relative_rmse_by_step:
            entry["relative_rmse_by_step"] = list(self.relative_rmse_by_step)
        if self.overflowed or self.flushed:
            entry |= {"overflowed": self.overflowed, "flushed": self.flushed}
        if self.adjusted:
            entry["adjusted"] = [{"step": step, **how.to_json()} for step, how in self.adjusted]
        if self.crc32:
            entry["crc32"] = list(self.crc32)
        return entry

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the record of an entry that was checked."""
        return cls(
            file=data["file"],
            source=data["source"],
            rows=(data["rows"][0], data["rows"][1]),
            outputs=tuple(data["outputs"]),
            bits=data.get("bits"),
            group_size=data.get("group_size"),
            method=data.get("method"),
            weighted_by=data.get("weighted_by"),
            relative_rmse=data.get("relative_rmse"),
            relative_rmse_by_step=tuple(data.get("relative_rmse_by_step") or ()),
            overflowed=data.get("overflowed") or 0,
            flushed=data.get("flushed") or 0,
            adjusted=tuple((how["step"], Adjustment.from_json(how)) for how in data.get("adjusted") or ()),
            crc32=tuple(data.get("crc32") or ()),
        )


@dataclass(frozen=True)
class VoiceRecord:
    """A voice preset whose embeddings do not all fit the bundle's dtype: how many became infinite, or zero."""

    file: str
    overflowed: int
    flushed: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the record of an entry that was checked."""
        return cls(data["file"], data.get("overflowed") or 0, data.get("flushed") or 0)


@dataclass(frozen=True)
class WrittenFile:
    """A file of a bundle that was written: its size and sha256, and what the manifest records of its tensors."""

    size: int
    sha256: str
    tensors: tuple[TensorRecord, ...] = ()
    voices: tuple[VoiceRecord, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what the journal of a conversion keeps of it."""
        entries = [tensor.to_json() for tensor in self.tensors] + [asdict(voice) for voice in self.voices]
        return {"size": self.size, "sha256": self.sha256, "tensors": entries}

    @classmethod
    def from_json(cls, name: str, data: Mapping[str, Any]) -> Self:
        """Return what ``to_json`` wrote, or an earlier version, which named no file in its entries."""
        entries = [{"file": name} | entry for entry in data["tensors"]]
        return cls(data["size"], data["sha256"], *records_of(entries))


def records_of(entries: list[dict[str, Any]]) -> tuple[tuple[TensorRecord, ...], tuple[VoiceRecord, ...]]:
    """Return the tensors of the model, and the voices, among the entries of a manifest's ``tensors``."""
    tensors = tuple(TensorRecord.from_json(entry) for entry in entries if "source" in entry)
    return tensors, tuple(VoiceRecord.from_json(entry) for entry in entries if "source" not in entry)


def files_to_json(files: Mapping[str, Fingerprint]) -> dict[str, Any]:
    """Return size and sha256 by name."""
    return {name: asdict(file) for name, file in files.items()}


def files_from_json(data: Mapping[str, Any]) -> dict[str, Fingerprint]:
    """Return what ``files_to_json`` wrote."""
    return {name: Fingerprint(record["size"], record["sha256"]) for name, record in data.items()}
