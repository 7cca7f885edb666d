"""What is in a source or bundle: its tensors by component, counted from the headers of its files."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from .. import typed_json
from ..errors import UserError
from ..file_names import CODEC, CONFIG, MANIFEST, VOICES
from ..source.architecture import from_config, read_config
from ..source.source import is_hub_id, locate, locate_here
from ..source.source_files import files_in, missing_files
from ..source.tensors import roles, stored_as
from ..source.voices import read_voices
from ..tensorfile import DTYPES, TensorFile
from ..typed_json import Key
from .describe import counted, size
from .location import locate_bundle
from .manifest import Manifest, files_of, read_manifest
from .speech_swift import CODEC as SWIFT_CODEC

MODEL = ("temporal", "depformer", "embeddings", "heads")
ORDER = (*MODEL, "codec", "voices", "other")


@dataclass(frozen=True)
class StoredTensor:
    """One stored tensor. parameters: the weights that it stands for; scales and biases stand for none."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    component: str
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class ComponentSummary:
    """The tensors of a component, counted. bits_per_weight: of their bytes, None for no parameters."""

    component: str
    tensors: int
    parameters: int
    nbytes: Annotated[int, Key("bytes")]
    dtypes: list[str]
    bits_per_weight: float | None


@dataclass(frozen=True)
class Contents:
    """What is in a folder.

    kind: ``source`` or ``bundle``. missing: files that belong to it and are not there. manifest: a bundle's, None for
    a source.
    """

    folder: Path
    kind: str
    tensors: list[StoredTensor]
    files: dict[str, int]
    missing: list[str]
    voices: list[str]
    manifest: Manifest | None

    def components(self) -> list[ComponentSummary]:
        """Return each component that has tensors, then the whole model."""
        rows = [_row(name, [tensor for tensor in self.tensors if tensor.component == name]) for name in ORDER]
        model = [tensor for tensor in self.tensors if tensor.component in MODEL]
        return [row for row in rows if row.tensors] + [_row("model", model)]

    def to_json(self, every_tensor: bool = False) -> dict[str, Any]:
        """Return what the program prints as JSON."""
        shown: dict[str, Any] = {
            "path": str(self.folder),
            "kind": self.kind,
            "components": typed_json.to_json(self.components()),
            "files": self.files,
            "missing": self.missing,
            "voices": self.voices,
        }
        if self.manifest:
            keys = ("source", "target", "dtype", "recipe", "toolkit", "overflowed", "flushed")
            recorded = self.manifest.to_json()
            shown |= {key: recorded[key] for key in keys}
        if every_tensor:
            shown["tensors"] = [asdict(tensor) for tensor in self.tensors]
        return shown


def _row(name: str, tensors: list[StoredTensor]) -> ComponentSummary:
    parameters, nbytes = sum(tensor.parameters for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
    return ComponentSummary(
        component=name,
        tensors=len(tensors),
        parameters=parameters,
        nbytes=nbytes,
        dtypes=sorted({tensor.dtype for tensor in tensors}),
        bits_per_weight=round(8 * nbytes / parameters, 3) if parameters else None,
    )


def read_contents(folder: Path) -> Contents:
    """Look at a source or bundle; reads headers, voices and the manifest, no weights.

    Raises UserError for a folder that is neither, and for files that are damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder: give one that holds a source or a bundle")
    manifest, files = read_manifest(folder), files_of(folder)
    if manifest is not None:
        missing = [name for name in manifest.files if name not in files]
        known = _known(manifest)
        tensors = [one for name in files if name.endswith(".safetensors") for one in _tensors_of(folder, name, known)]
        return Contents(folder, "bundle", tensors, files, missing, list(manifest.voices), manifest)
    names = files_in(folder)
    if not any(name in files for name in names.weights):
        raise UserError(f"{folder}: neither a bundle (no {MANIFEST}) nor a source (no {' or '.join(names.weights)})")
    architecture = from_config(read_config(folder / CONFIG) if names.config else {})
    stored = {name: role for role in roles(architecture).values() for way in stored_as(role) for name in way}
    parts = {(file, name): (role.component, None) for file in names.weights for name, role in stored.items()}
    parts |= {(names.codec, name): ("codec", None) for name in _names_in(folder / names.codec)}
    kept = (*names.weights, names.codec)
    tensors = [one for name in kept if name in files for one in _tensors_of(folder, name, parts)]
    voices = [voice.name for voice in read_voices(folder / VOICES, architecture)[0]] if names.voices else []
    return Contents(folder, "source", tensors, files, missing_files(folder, names), voices, None)


def _names_in(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with closing(TensorFile(path)) as file:
        return [*file.specs]


def inspect(source: str | Path, revision: str | None = None, *, quiet: bool = True) -> Contents:
    """Look at a source or bundle as ``read_contents`` does: a folder, a Hub id, or ``demo``.

    revision: of a Hub id. A bundle is downloaded from the Hub, a source is not. Raises UserError for what is neither,
    or a source that is not on this machine.
    """
    return read_contents(folder_of(source, revision, quiet))


def folder_of(source: str | Path, revision: str | None = None, quiet: bool = True) -> Path:
    """Return the folder of a source or bundle, of a bundle on the Hub where it was downloaded to.

    Raises UserError for what is neither, and for a source on the Hub that is not in its cache.
    """
    where = str(source)
    if is_hub_id(where):
        location = locate_here(where, revision, quiet=quiet)
        return location.folder if location else locate_bundle(where, revision, quiet)
    if Path(source).is_dir() or revision is not None:
        return locate_bundle(source, revision)
    return locate(where, quiet=quiet).folder


Known = Mapping[tuple[str, str], tuple[str, int | None]]  # file and tensor -> component, parameters if not its values


def _known(manifest: Manifest) -> Known:
    """Return what a manifest says of each tensor: its component, and how many weights it stands for."""
    known: dict[tuple[str, str], tuple[str, int | None]] = {}
    of_source = roles(manifest.architecture)
    counted: set[str] = set()
    for tensor in manifest.tensors:
        role = of_source.get(tensor.source)
        if role:
            first, last = tensor.rows
            known |= {(tensor.file, name): (role.component, 0) for name in tensor.outputs}
            if role.name not in counted:  # a norm that the steps share is stored for each, and counts once
                known[tensor.file, tensor.outputs[0]] = (role.component, (last - first) * role.shape[-1])
            counted |= {role.name} if role.kind == "norm" else set()
    return known


def _tensors_of(folder: Path, file: str, known: Known) -> Iterator[StoredTensor]:
    """Yield the tensors of a file."""
    place = {CODEC: "codec", SWIFT_CODEC: "codec"}.get(file) or ("voices" if file.startswith("voices") else "other")
    with closing(TensorFile(folder / file)) as opened:
        for name, spec in opened.specs.items():
            component, parameters = known.get((file, name), (place, None))
            count = spec.parameters if parameters is None else parameters
            yield StoredTensor(file, name, spec.dtype, spec.shape, component, count, spec.nbytes)
        if opened.unknown:
            dtypes = sorted({*opened.unknown.values()} - DTYPES.keys())
            raise UserError(f"{folder / file}: holds tensors of dtype {', '.join(dtypes)}, which no runtime here loads")


def text(contents: Contents, every_tensor: bool = False) -> str:
    """Return the contents of a folder as a table for people."""
    total = sum(contents.files.values())
    lines = [f"{contents.folder}: a {contents.kind}, {len(contents.files)} files, {size(total)}"]
    if contents.missing:
        lines.append(f"missing: {', '.join(contents.missing)}")
    if contents.manifest:
        bundle = contents.manifest
        lines.append(f"made from {bundle.source.id} for {bundle.target}, recipe {bundle.recipe.name}, {bundle.dtype}")
    lines += ["", f"{'component':<12}{'tensors':>8}{'parameters':>16}{'bytes':>11}{'bits/weight':>13}  dtypes"]
    for row in contents.components():
        bits = "" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}"
        counts = f"{row.tensors:>8}{row.parameters:>16,}{size(row.nbytes):>11}{bits:>13}"
        lines.append(f"{row.component:<12}{counts}  {', '.join(row.dtypes)}")
    named = f"{counted(len(contents.voices), 'voice')}: {', '.join(contents.voices)}"
    lines += ["", named if contents.voices else "no voices"]
    if every_tensor:
        lines.append("")
        lines += [
            f"{tensor.file}  {tensor.name}  {tensor.dtype} {list(tensor.shape)}  {size(tensor.nbytes)}"
            for tensor in contents.tensors
        ]
    return "\n".join(lines)
