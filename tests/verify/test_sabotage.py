"""Bundles that are broken on purpose: the report must fail and name the place.

Most are broken twice: as a damaged disk does it, and by somebody who then writes the hashes anew, so that only the
figures can tell.
"""

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ppx.convert.errors import UserError
from ppx.convert.source.source import Source, locate, open_source
from ppx.convert.tensorfile import TensorFile
from ppx.verify.figures import PredictionFigures, StreamFigures, finite_or_infinite
from ppx.verify.limits import Failure, prediction_failures
from ppx.verify.options import VerifyOptions
from ppx.verify.records import Verdict
from ppx.verify.verification import verify

UNEVEN = str(Path(__file__).parent.parent / "data" / "uneven.toml")
QUICK = VerifyOptions(sequences=1, frames=40, device="cpu")
SWIFT = ("--recipe", "4bit")


@pytest.fixture(scope="module")
def source(pico: Path) -> Iterator[Source]:
    with open_source(locate(str(pico))) as opened:
        yield opened


@pytest.fixture
def broken(bundle, tmp_path):
    """A copy of a bundle, to be broken."""

    def copy(*options):
        shutil.copytree(bundle(*options), tmp_path / "broken")
        return tmp_path / "broken"

    return copy


@pytest.fixture
def reasons(source):
    """Verify a bundle that must fail; return its reasons."""

    def run(folder, request=QUICK):
        verdict = verify(source, folder, request, "", quiet=True).verdict
        assert not verdict.passed
        return verdict.failures

    return run


def change(folder: Path, file: str, name: str, function: Callable[..., NDArray[Any]]) -> None:
    """Replace a tensor's values in place by what a function makes of them."""
    opened = TensorFile(folder / file)
    spec = opened.specs[name]
    array = opened.read(name, 0, spec.rows).reshape(spec.shape)
    changed = np.ascontiguousarray(function(array.copy()))
    assert changed.shape == array.shape
    assert changed.dtype == array.dtype
    assert changed.tobytes() != array.tobytes()
    with (folder / file).open("r+b") as stream:
        stream.seek(opened.offsets[name])
        stream.write(changed.tobytes())
    opened.close()


def seal(folder: Path) -> None:
    """Write the hashes of a changed bundle anew, as somebody would who hides what was done."""
    seal_files(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["tensors"]:
        opened = TensorFile(folder / entry["file"])
        arrays = [opened.read(name, 0, opened.specs[name].rows) for name in entry["outputs"]]
        entry["crc32"] = [f"{zlib.crc32(array.tobytes()):08x}" for array in arrays]
        opened.close()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def named(failures: Sequence[Failure], *words: str, check: str | None = None) -> bool:
    """Tell whether some reason of a kind holds all words."""
    return any(
        all(word in failure.message for word in words) and check in (None, failure.check) for failure in failures
    )


def swap(first: int, last: int, other: int) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Swap two ranges of rows of the same length."""

    def swapped(array: NDArray[Any]) -> NDArray[Any]:
        height = last - first
        held = array[first:last].copy()
        array[first:last] = array[other : other + height]
        array[other : other + height] = held
        return array

    return swapped


def test_an_untouched_bundle_passes(source, bundle):
    for options in (SWIFT, ("--recipe", "moshi-q4"), ("--recipe", UNEVEN)):
        found = verify(source, bundle(*options), QUICK, "", quiet=True)
        assert found.verdict == Verdict(passed=True, failures=())
        divergence = found.predictions["agent"].bundle.kl
        assert divergence
        assert finite_or_infinite(divergence.mean) > 0.001


def flip(array: NDArray[Any]) -> NDArray[Any]:
    """Flip the highest bit of one code."""
    array[3, 5] ^= 1 << 19
    return array


def test_one_flipped_bit_with_hashes_written_anew(broken, reasons):
    """In a tensor of this size even the error shows it; in one of the 7B model only the hashes would."""
    folder = broken(*SWIFT)
    change(folder, "temporal.safetensors", "layers.1.gating.linear_in.weight", flip)
    seal(folder)
    found = reasons(folder)
    assert named(found, "layers.1.gating.linear_in.weight: relative error", "conversion measured", check="weights")
    assert len(found) == 1


def test_one_flipped_bit_of_a_packed_weight(broken, reasons):
    folder = broken(*SWIFT)
    change(folder, "temporal.safetensors", "layers.1.gating.linear_in.weight", flip)
    found = reasons(folder)
    assert named(found, "temporal.safetensors", "sha256", check="structure")
    assert named(found, "temporal.safetensors: layers.1.gating.linear_in.weight: its bytes", check="structure")
    assert sum("its bytes" in failure.message for failure in found) == 1


@pytest.mark.parametrize("sealed", [False, True])
def test_scales_of_two_tensors_swapped(sealed, broken, reasons):
    folder = broken(*SWIFT)
    names = [f"layers.{layer}.gating.linear_out.scales" for layer in (0, 1)]
    opened = TensorFile(folder / "temporal.safetensors")
    held = [opened.read(name, 0, opened.specs[name].rows) for name in names]
    opened.close()
    for name, array in zip(names, reversed(held), strict=True):
        change(folder, "temporal.safetensors", name, lambda _, array=array: array)
    if sealed:
        seal(folder)
    found = reasons(folder)
    for layer in (0, 1):
        assert named(found, f"layers.{layer}.gating.linear_out.weight: relative error", check="weights")
        assert sealed or named(found, f"layers.{layer}.gating.linear_out.scales", "its bytes", check="structure")


@pytest.mark.parametrize("sealed", [False, True])
def test_q_and_k_swapped_in_one_layer(sealed, broken, reasons):
    folder = broken(*SWIFT)
    for name in ("in_proj_weight", "in_proj_scales", "in_proj_biases"):
        change(folder, "temporal.safetensors", f"layers.1.self_attn.{name}", swap(0, 256, 256))
    if sealed:
        seal(folder)
    found = reasons(folder)
    for part in "qk":
        assert named(found, f"layers.1.self_attn.in_proj_weight {part}: relative error", check="weights")
    assert not named(found, "layers.1.self_attn.in_proj_weight v: relative error", check="weights")
    assert not named(found, "layers.0.")


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize(
    ("options", "file", "name"),
    [
        (SWIFT, "temporal.safetensors", "layers.1.norm2.alpha"),
        (SWIFT, "temporal.safetensors", "out_norm.alpha"),
        (SWIFT, "depformer.safetensors", "layers.0.norm1.alpha"),
        (("--recipe", UNEVEN), "model.safetensors", "depformer.slices.9.transformer.layers.1.norm2.weight"),
    ],
)
def test_a_norm_off_by_one_per_cent(sealed, options, file, name, broken, reasons):
    folder = broken(*options)
    change(folder, file, name, lambda array: (array.astype(np.float32) * 1.01).astype(array.dtype))
    if sealed:
        seal(folder)
    found = reasons(folder)
    assert named(found, name.removesuffix(".weight"), "values are not the source's", check="weights")


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("step", [5, 12])
def test_a_depformer_steps_weights_replaced_by_its_neighbours(sealed, step, broken, reasons):
    folder = broken(*SWIFT)

    def copied(array):
        height = len(array) // 16
        array[step * height : (step + 1) * height] = array[(step + 1) * height : (step + 2) * height]
        return array

    for name in ("in_proj_weight", "in_proj_scales", "in_proj_biases"):
        change(folder, "depformer.safetensors", f"layers.1.self_attn.{name}", copied)
    if sealed:
        seal(folder)
    found = reasons(folder)
    assert named(found, f"layers.1.self_attn.in_proj_weight step {step} q: relative error", check="weights")
    assert not named(found, f"step {step + 1} ", check="weights")


@pytest.mark.parametrize("sealed", [False, True])
def test_one_voice_zeroed(sealed, broken, reasons):
    folder = broken(*SWIFT)
    change(folder, "voices/VARM3.safetensors", "embeddings", np.zeros_like)
    if sealed:
        seal(folder)
    found = reasons(folder)
    assert named(found, "voice VARM3: embeddings", "not the source's", check="structure")
    assert {failure.check for failure in found} == {"structure"}  # the rest was compared, and is sound
    assert not named(found, "voice VARM2")


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize(
    ("options", "name"), [(SWIFT, "mimi.safetensors"), (("--recipe", "moshi-q4"), "tokenizer_spm_32k_3.model")]
)
def test_a_codec_or_tokenizer_that_is_not_the_sources(sealed, options, name, broken, reasons):
    folder = broken(*options)
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(data)
    if sealed:
        seal(folder)
    assert named(
        reasons(folder), f"{name}: is not the source's" if sealed else f"{name}: its sha256", check="structure"
    )


def rewrite_header(path: Path, function: Callable[[Any, bytes], tuple[Any, bytes]]) -> None:
    """Change a safetensors file by a function of its parsed header and its bytes, which it returns changed."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, values = function(json.loads(data[8 : 8 + length]), data[8 + length :])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)


def test_a_missing_tensor(broken, reasons):
    folder = broken(*SWIFT)
    lost = []

    def without_the_last(header, values):
        name = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
        lost.append(name)
        return header, values[: header.pop(name)["data_offsets"][0]]

    rewrite_header(folder / "depformer.safetensors", without_the_last)
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / "depformer.safetensors").read_bytes()
    manifest["files"]["depformer.safetensors"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert named(reasons(folder), "depformer.safetensors", lost[0], "nothing", check="structure")


def test_a_tensor_that_nobody_expects(broken, reasons):
    folder = broken(*SWIFT)

    def with_another(header, values):
        end = len(values)
        header["layers.99.norm1.alpha"] = {"dtype": "F16", "shape": [2], "data_offsets": [end, end + 4]}
        return header, values + bytes(4)

    rewrite_header(folder / "temporal.safetensors", with_another)
    found = reasons(folder)
    assert named(found, "temporal.safetensors: layers.99.norm1.alpha", "where nothing is expected", check="structure")


def test_a_truncated_file(broken, reasons):
    folder = broken(*SWIFT)
    path = folder / "temporal.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    found = reasons(folder)
    assert named(found, "temporal.safetensors", "not a complete safetensors file", check="structure")


def test_a_missing_file(broken, reasons):
    folder = broken(*SWIFT)
    (folder / "mimi.safetensors").unlink()
    assert named(reasons(folder), "mimi.safetensors: missing", check="structure")


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize(
    ("options", "key"), [(SWIFT, "depformer.context"), (("--recipe", "moshi-q8"), "depformer_context")]
)
def test_the_depformers_context_clipped_to_eight(sealed, options, key, broken, reasons, source, bundle):
    folder = broken(*options)
    config = json.loads((folder / "config.json").read_text())
    inner = config
    *parents, last = key.split(".")
    for parent in parents:
        inner = inner[parent]
    assert inner[last] == 16
    inner[last] = 8
    (folder / "config.json").write_text(json.dumps(config))
    if sealed:
        seal(folder)
    assert named(reasons(folder), f"config.json: {key} is 8, where 16 is expected", check="structure")
    clipped, whole = (local_errors(source, path) for path in (folder, bundle(*options)))
    assert clipped[:8] == whole[:8]
    assert all(now > before for now, before in zip(clipped[8:], whole[8:], strict=True))


def local_errors(source: Source, folder: Path) -> list[float]:
    """The local error of the depformer's first attention at each step."""
    rows = verify(source, folder, QUICK, "", quiet=True).activations
    block = ("depformer", 0, "attention")
    local = [row.local for row in rows if (row.component, row.layer, row.sublayer) == block]
    return [finite_or_infinite(difference.relative_l2) for difference in local if difference]


def min_max(weights: NDArray[Any], bits: int, size: int) -> dict[str, NDArray[Any]]:
    """The quantizer that MLX dropped: even steps from a group's smallest to its largest weight."""
    groups = weights.reshape(len(weights), -1, size)
    low, high = groups.min(-1), groups.max(-1)
    steps = np.maximum((high - low) / (2**bits - 1), 1e-7).astype(np.float16)
    codes = np.clip(np.rint((groups - low[..., None]) / steps[..., None]), 0, 2**bits - 1).astype(np.uint32)
    blocks_of = 32 // bits
    words = codes.reshape(len(weights), -1, blocks_of) << (bits * np.arange(blocks_of, dtype=np.uint32))
    return {"weight": words.sum(-1, dtype=np.uint32), "scales": steps, "biases": low.astype(np.float16)}


def codes_of(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """The codes of 2 bits in groups of 64."""
    codes = words[..., None] >> (2 * np.arange(16, dtype=np.uint32)) & 3
    return codes.reshape(len(words), -1, 64).astype(np.float32)


def test_two_bits_min_max_under_the_limits_of_four(pico, source, program, tmp_path, reasons):
    (tmp_path / "two.toml").write_text(
        'target = "speech-swift"\n[[rules]]\ncomponents = ["temporal", "depformer"]\nbits = 2\ngroup_size = 64\n'
        'method = "rtn"\n[parity]\ntext_kl = 0.015\ncodebook0_kl = 0.32\nagent_kl = 0.11\nagent_top1 = 0.47\n'
    )
    program("ppx-convert", pico, "--recipe", "two.toml", "-o", "two", cwd=tmp_path)
    folder = tmp_path / "two"
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["tensors"]:
        if "bits" not in entry:
            continue
        first, last = entry["rows"]
        made = min_max(source.checkpoint.read(entry["source"], first, last).astype(np.float32), 2, 64)
        for name, side in zip(entry["outputs"], ("weight", "scales", "biases"), strict=True):
            change(folder, entry["file"], name, lambda _, array=made[side]: array)
        back = made["biases"][..., None] + made["scales"].astype(np.float32)[..., None] * codes_of(made["weight"])
        weights = source.checkpoint.read(entry["source"], first, last).astype(np.float64).reshape(back.shape)
        parts = len(entry.get("relative_rmse_by_step", [0]))
        lost = [
            np.linalg.norm(x - y) / np.linalg.norm(y)
            for x, y in zip(np.split(back, parts), np.split(weights, parts), strict=True)
        ]
        entry["relative_rmse"] = float(np.linalg.norm(back - weights) / np.linalg.norm(weights))
        if parts > 1:
            entry["relative_rmse_by_step"] = [float(error) for error in lost]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    seal(folder)
    found = reasons(folder)
    assert {failure.check for failure in found} == {"predictions"}, found
    assert named(found, "KL of the agent's codebooks is", "at most 0.11 is allowed", "it starts at temporal layer 0")
    assert all(failure.value is not None and failure.bound is not None for failure in found)


class TestByAStrangerWhoSealsWhatHeDid:
    """Bundles whose manifest was written to fit."""

    def edit(self, folder, function):
        manifest = json.loads((folder / "manifest.json").read_text())
        function(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    @pytest.mark.parametrize("name", ["mimi.safetensors", "voices/NATF2.safetensors"])
    def test_a_file_gone_with_its_entry(self, name, broken, reasons):
        folder = broken(*SWIFT)
        (folder / name).unlink()
        self.edit(folder, lambda manifest: manifest["files"].pop(name))
        assert named(reasons(folder), f"{name}: belongs to the bundle", check="structure")

    @pytest.mark.parametrize(
        ("options", "name"),
        [(("--recipe", UNEVEN), "model-extra.safetensors"), (("--recipe", "moshi-q8"), "model.q4.safetensors")],
    )
    def test_weights_that_a_runtime_would_load_as_well(self, options, name, broken, reasons):
        folder = broken(*options)
        whole = next(folder.glob("model*.safetensors"))
        shutil.copy(whole, folder / name)
        self.edit(folder, lambda manifest: manifest["files"].update({name: manifest["files"][whole.name]}))
        assert named(reasons(folder), f"{name}: stands in manifest.json, and does not belong", check="structure")

    @pytest.mark.parametrize(
        ("field", "value"),
        [("context", 8), ("delays", [0] * 17), ("text_padding", 5), ("num_heads", 8), ("num_layers", 1)],
    )
    def test_another_architecture_in_manifest_and_config(self, field, value, broken, reasons):
        folder = broken("--recipe", "moshi-q8")
        config = json.loads((folder / "config.json").read_text())
        config[{"text_padding": "existing_text_padding_id"}.get(field, field)] = value
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        self.edit(folder, lambda manifest: manifest["architecture"].update({field: value}))
        seal_files(folder)
        assert named(reasons(folder), f"architecture.{field} is", "the source's is", check="structure")

    def test_keys_that_hide_behind_dots_or_stand_twice(self, broken, reasons):
        folder = broken(*SWIFT)
        text = (folder / "config.json").read_text()
        clipped = text.replace('"context": 16,\n    "weights_per_step"', '"context": 8,\n    "weights_per_step"')
        assert clipped != text
        hidden = json.loads(clipped) | {"depformer.context": 16}
        twice = text.replace(
            '"context": 16,\n    "weights_per_step"', '"context": 8, "context": 16, "weights_per_step"'
        )
        for written in (json.dumps(hidden, indent=2), twice):
            (folder / "config.json").write_text(written)
            seal_files(folder)
            assert named(reasons(folder), "config.json", check="structure")

    @pytest.mark.parametrize("damage", [None, 0.5])
    def test_scales_off_with_another_figure_in_the_manifest(self, damage, broken, reasons):
        folder = broken(*SWIFT)
        name = "layers.1.gating.linear_out.scales"
        change(folder, "temporal.safetensors", name, lambda array: array * np.float16(1.03))
        seal(folder)

        def forget(manifest):
            for entry in manifest["tensors"]:
                if name in entry.get("outputs", ()):
                    entry.pop("relative_rmse")
                    entry |= {"relative_rmse": damage} if damage else {}

        self.edit(folder, forget)
        assert named(reasons(folder), "layers.1.gating.linear_out.weight", "conversion measured", check="weights")

    def test_a_two_bit_tensor_of_zeros(self, pico, program, tmp_path, reasons):
        program("ppx-convert", pico, "--bits", "2", "-o", "two", cwd=tmp_path)
        folder = tmp_path / "two"
        for side in ("scales", "biases"):
            change(folder, "temporal.safetensors", f"layers.0.gating.linear_out.{side}", np.zeros_like)
        seal(folder)
        found = reasons(folder)
        assert named(found, "layers.0.gating.linear_out.weight: relative error 100.00%, at most", check="weights")

    def test_a_tensor_that_no_norm_weighs_claims_to_be_weighted(self, broken, reasons):
        folder = broken("--recipe", "8bit")
        name = "layers.0.gating.linear_out"
        change(folder, "temporal.safetensors", f"{name}.scales", lambda array: array * np.float16(1.05))
        seal(folder)

        def claim(manifest):
            for entry in manifest["tensors"]:
                if f"{name}.weight" in entry.get("outputs", ()):
                    entry["weighted_by"] = "transformer.layers.0.norm2.alpha"

        self.edit(folder, claim)
        assert named(reasons(folder), f"{name}.weight: relative error", "at 8 bit", check="weights")

    def test_voices_whose_tokens_are_no_whole_numbers(self, broken, reasons):
        folder = broken(*SWIFT)
        change(folder, "voices/NATM0.safetensors", "cache", lambda array: array + np.float32(0.5))
        seal(folder)
        assert named(reasons(folder), "voice NATM0: cache", check="structure")

    def test_a_recipe_that_allows_everything_allows_nothing_more(self, broken, source):
        folder = broken(*SWIFT)
        before = verify(source, folder, QUICK, "", quiet=True).limits
        text = "[parity]\ntext_kl = inf\nagent_kl = 1000\nagent_top1 = 0.0\n"
        self.edit(folder, lambda manifest: manifest["recipe"].update({"text": text}))
        assert verify(source, folder, QUICK, "", quiet=True).limits == before
        text = "[parity]\nagent_kl = 0.0001\n"
        self.edit(folder, lambda manifest: manifest["recipe"].update({"text": text}))
        assert verify(source, folder, QUICK, "", quiet=True).limits == before | {"agent_kl": 0.0001}

    @pytest.mark.parametrize(
        "damage",
        [
            lambda manifest: manifest.pop("bits_per_weight"),
            lambda manifest: manifest.update({"bits_per_weight": "4"}),
            lambda manifest: manifest["source"].pop("revision"),
            lambda manifest: manifest["source"].update({"files": 3}),
            lambda manifest: manifest["tensors"][0].pop("source"),
            lambda manifest: next(entry for entry in manifest["tensors"] if "bits" in entry).pop("group_size"),
            lambda manifest: next(entry for entry in manifest["tensors"] if "bits" in entry).update(bits=[4]),
            lambda manifest: manifest["tensors"][-1].update({"relative_rmse_by_step": 5}),
            lambda manifest: manifest["tensors"][0].update({"crc32": 5}),
        ],
    )
    def test_a_manifest_that_is_none_ends_in_a_line(self, damage, broken, source):
        folder = broken(*SWIFT)
        self.edit(folder, damage)
        with pytest.raises(UserError, match=r"manifest\.json"):
            verify(source, folder, QUICK, "", quiet=True)


def seal_files(folder: Path) -> None:
    """Write the hashes of a bundle's files anew."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, record in manifest["files"].items():
        data = (folder / name).read_bytes()
        record |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_names_cannot_command_a_terminal(broken, reasons):
    folder = broken(*SWIFT)
    (folder / "a\x1b[31mred").write_text("")
    (folder / "config.json").write_text(json.dumps({"\x1b[2J": 1, "\ud800": 2}))
    for failure in reasons(folder):
        assert failure.message.isprintable()
        failure.message.encode()


def test_a_context_beyond_all_bounds(broken, reasons):
    folder = broken("--recipe", "moshi-q8")
    config = json.loads((folder / "config.json").read_text()) | {"context": 10**30}
    (folder / "config.json").write_text(json.dumps(config))
    assert named(reasons(folder), "config.json: context is", check="structure")


def test_a_figure_that_nothing_told_of_does_not_pass():
    nothing = PredictionFigures(0, None, None, None)
    predictions = dict.fromkeys(("text", "codebook_0", "agent"), StreamFigures(nothing, nothing))
    found = prediction_failures(predictions, {"text_kl": 1.0, "agent_top1": 0.0}, [], 8)
    assert [failure.place for failure in found] == ["text", "agent"]
