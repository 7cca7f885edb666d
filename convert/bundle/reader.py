"""An open bundle: which stored tensor is which part of the model, and a way to read its rows."""

from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ...quant.affine import QuantizationConfig
from ..errors import Problem, UserError, refuse
from ..file_names import CONFIG, MANIFEST, VOICES
from ..hints import Hint
from ..source.architecture import Architecture, read_config
from ..source.voices import Voice, check, read_voices
from ..tensorfile import Spec, TensorFile
from .manifest import Manifest, manifest_of
from .output_tensor import Output
from .recipe import DTYPES
from .records import TensorRecord
from .targets import TARGETS, Target

_FARTHEST = 1 << 24  # frames: far above any context


@dataclass(frozen=True)
class Layout:
    """What a manifest says of a bundle's tensors.

    outputs: what each source tensor became, by its name: one output, or one for each depformer step. files: the file
    of each output (names are unique in a file only).
    """

    target: Target
    architecture: Architecture
    outputs: dict[str, list[Output]]
    files: dict[Output, str]

    def every(self) -> list[Output]:
        """Return all outputs."""
        return [output for outputs in self.outputs.values() for output in outputs]

    def specs(self) -> dict[str, list[Spec]]:
        """Return the tensors that each file of weights must hold."""
        specs: dict[str, list[Spec]] = {}
        for output in self.every():
            specs.setdefault(self.files[output], []).extend(output.specs())
        return specs


def layout_of(folder: Path) -> tuple[Manifest, Layout]:
    """Read a bundle's manifest; return it, and where every tensor of the model must lie.

    Raises UserError for a folder that is no bundle of this toolkit's.
    """
    manifest = manifest_of(folder)
    target, dtype = TARGETS.get(manifest.target), DTYPES.get(manifest.dtype)
    if target is None or dtype is None:
        raise UserError(f"{folder}: made for {manifest.target} in {manifest.dtype}, which this version is not")
    records = {(tensor.source, tensor.outputs[0]): tensor for tensor in manifest.tensors}
    outputs = [
        replace(output, dtype=dtype, quantization=_quantization(records.get((output.role.name, output.name))))
        for output in target.layout(manifest.architecture)
    ]
    names = target.split(outputs)
    files = {output: file for file, of_file in names.items() for output in of_file}
    by_source: dict[str, list[Output]] = {}
    for output in outputs:
        by_source.setdefault(output.role.name, []).append(output)
    return manifest, Layout(target, manifest.architecture, by_source, files)


def _quantization(record: TensorRecord | None) -> QuantizationConfig | None:
    if record is None or record.bits is None or record.group_size is None:
        return None
    quantization = QuantizationConfig(record.bits, record.group_size)
    place = f"{MANIFEST}: {record.outputs[0]}"
    refuse([Problem(place, f"{name} {problem}") for name, problem in quantization.problems().items()])
    return quantization


class Bundle:
    """An open bundle, to be closed. Its files hold what its layout says: that is checked before one is opened."""

    def __init__(self, folder: Path, manifest: Manifest, layout: Layout) -> None:
        """Open every file of weights; raises UserError if one is not there or not whole."""
        self.folder, self.manifest, self.layout = folder, manifest, layout
        self.architecture = layout.architecture
        self._stack = ExitStack()
        self._files: dict[str, TensorFile] = {}
        with ExitStack() as stack:
            for name in sorted(set(layout.files.values())):
                self._files[name] = TensorFile(folder / name)
                stack.callback(self._files[name].close)
            self._stack = stack.pop_all()

    def output(self, name: str, step: int | None = None) -> Output:
        """Return the output that holds a source tensor, or a depformer step of it."""
        outputs = self.layout.outputs[name]
        return outputs[step or 0] if len(outputs) > 1 else outputs[0]

    def rows_of(self, name: str, step: int | None = None) -> tuple[Output, int, int]:
        """Return where a tensor of the model lies, by its name in the checkpoint; of a stacked one the rows of a step.

        An output, and its first row and the one after its last.
        """
        output = self.output(name, step)
        height = (output.rows[1] - output.rows[0]) // output.parts
        first = (step or 0) * height if output.parts > 1 else 0
        return output, first, first + height

    def read(self, output: Output, first: int, last: int) -> list[NDArray[Any]]:
        """Read rows of an output: floats; or packed codes, scales and biases, where it is quantized."""
        file = self._files[self.layout.files[output]]
        return [file.read(spec.name, first, last) for spec in output.specs()]

    def voices(self) -> list[Voice]:
        """Read the bundle's voices, the source's first, none where there are none; raises UserError for wrong ones."""
        if not self.manifest.voices and VOICES not in self.manifest.files:
            return []
        added = {origin.name for origin in self.manifest.recorded_voices}
        return sorted(self._voices(), key=lambda voice: (voice.name in added, voice.name))

    def _voices(self) -> list[Voice]:
        if self.layout.target.voice_cache is None:
            return read_voices(self.folder / VOICES, self.architecture)[0]  # which refuses an archive that lacks some
        files = sorted(name for name in self.manifest.files if name.startswith("voices/"))
        if not files:
            raise UserError(f"{self.folder}: its manifest names no voices", Hint.CONVERT_AGAIN)
        return [_voice(self.folder / name, self.architecture) for name in files]  # none lies outside of the folder

    def attention_spans(self) -> tuple[int, int]:
        """Return how many frames and how many depformer steps a runtime lets attend, by the bundle's config.json."""
        config = read_config(self.folder / CONFIG)
        spans = [config.get("context"), config.get("depformer_context")]
        if isinstance(config.get("temporal"), dict) and isinstance(config.get("depformer"), dict):
            spans = [config["temporal"].get("context"), config["depformer"].get("context")]
        lengths = [min(span, _FARTHEST) if type(span) is int and span > 0 else None for span in spans]
        return lengths[0] or self.architecture.context, lengths[1] or self.architecture.steps

    def close(self) -> None:
        """Close its files."""
        self._stack.close()


def _voice(path: Path, architecture: Architecture) -> Voice:
    """Read a voice's own file."""
    file = TensorFile(path)
    try:
        if set(file.specs) != {"cache", "embeddings"}:
            raise UserError(f"{path}: holds {', '.join(file.specs) or 'nothing'}, not cache and embeddings")
        arrays = {key: file.read(key, 0, spec.rows).reshape(spec.shape) for key, spec in file.specs.items()}
    finally:
        file.close()
    voice = Voice(path.stem, arrays["embeddings"], arrays["cache"])
    try:
        check(voice, architecture)
    except ValueError as error:
        raise UserError(f"{path}: {error}", Hint.CONVERT_AGAIN) from None
    return voice


def open_bundle(folder: Path) -> Bundle:
    """Open a bundle whose files hold the tensors that its manifest says, of the right types and shapes.

    Raises UserError with all that is otherwise. Hashes are not looked at.
    """
    manifest, layout = layout_of(folder)
    problems: list[Problem] = []
    for name, specs in layout.specs().items():
        with closing(TensorFile(folder / name)) as file:
            stored = {key: (spec.dtype, spec.shape) for key, spec in file.specs.items()}
        wrong = [spec.name for spec in specs if stored.get(spec.name) != (spec.dtype, spec.shape)]
        place = str(folder / name)
        problems += [Problem(f"{place}: {key}", "not as the manifest says", Hint.CONVERT_AGAIN) for key in wrong]
    refuse(problems)
    return Bundle(folder, manifest, layout)
