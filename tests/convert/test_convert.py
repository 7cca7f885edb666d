"""The command, end to end, on pico: what the bundle holds, compared with the source by other means."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from ppx.convert import preparation
from ppx.convert.bundle import build as bundle_build
from ppx.convert.bundle import shipped
from ppx.convert.bundle.build import build
from ppx.convert.errors import UserError
from ppx.convert.file_names import CODEC, TOKENIZER
from ppx.convert.source import demo
from ppx.convert.source.source import fingerprint, locate
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FORMS = {"4bit": (4, 64), "8bit": (8, 64), "moshi-q4": (4, 32), "moshi-q8": (8, 64)}


def manifest_of(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


def arrays_of(path: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    return arrays


def headers(folder: Path) -> dict[tuple[str, str], tuple[str, list[int]]]:
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no dict)
                piece = file.get_slice(name)
                found[str(path.relative_to(folder)), name] = (piece.get_dtype(), piece.get_shape())
    return found


UNEVEN = str(Path(__file__).parent.parent / "data" / "uneven.toml")


@pytest.mark.parametrize("recipe", shipped.names())
def test_every_shipped_recipe(recipe, bundle):
    folder = bundle("--recipe", recipe)
    manifest = manifest_of(folder)
    on_disk = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert on_disk == {"manifest.json", "README.md", "NOTICE", *manifest["files"]}
    for name, record in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert (record["size"], record["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert not list(folder.parent.glob("*.partial"))


@pytest.mark.parametrize("recipe", ["4bit", "moshi-q4", UNEVEN])
def test_every_source_tensor_is_accounted_for(recipe, bundle, pico):
    folder = bundle("--recipe", recipe)
    manifest, held = manifest_of(folder), headers(folder)
    claimed: dict[str, set[tuple[int, int]]] = {}
    for entry in manifest["tensors"]:
        claimed.setdefault(entry["source"], set()).add(tuple(entry["rows"]))
        assert all((entry["file"], name) in held for name in entry["outputs"])
    for name, tensor in load_file(pico / "model.safetensors").items():
        rows = tensor.numel() // tensor.shape[-1]
        assert sum(last - first for first, last in claimed.pop(name)) == rows
    assert not claimed
    named = {(entry["file"], name) for entry in manifest["tensors"] for name in entry["outputs"]}
    model = {key for key in held if not key[0].startswith(("voices/", "mimi", "tokenizer"))}
    assert model == named


@pytest.mark.parametrize(("recipe", "dtype"), [("4bit", mx.float16), ("8bit", mx.float16), ("moshi-q4", mx.bfloat16)])
def test_rtn_bundles_hold_what_mlx_makes_of_the_source(recipe, dtype, bundle, pico):
    """Every word, scale and bias, the stacked depformer tensors included, against mx.quantize of the source."""
    folder = bundle("--recipe", recipe, "--method", "rtn")
    source = arrays_of(pico / "model.safetensors")
    files = {name: arrays_of(folder / name) for name in {e["file"] for e in manifest_of(folder)["tensors"]}}
    bits, size = FORMS[recipe]
    quantized = 0
    with mx.stream(mx.cpu):
        for entry in manifest_of(folder)["tensors"]:
            tensor = source[entry["source"]]
            rows = tensor.reshape(-1, tensor.shape[-1])[entry["rows"][0] : entry["rows"][1]]
            held = [files[entry["file"]][name] for name in entry["outputs"]]
            if "bits" not in entry:
                assert mx.array_equal(held[0].reshape(rows.shape), rows.astype(dtype)), entry
                continue
            words, scales, biases = mx.quantize(rows.astype(mx.float32), group_size=size, bits=bits)
            assert mx.array_equal(held[0], words), entry
            assert mx.array_equal(held[1], scales.astype(dtype)), entry
            assert mx.array_equal(held[2], biases.astype(dtype)), entry
            quantized += 1
    assert quantized >= 76


def test_the_manifests_errors_are_those_that_mlx_sees(bundle, pico):
    folder = bundle("--recipe", "4bit")
    source = arrays_of(pico / "model.safetensors")
    seen = 0
    with mx.stream(mx.cpu):
        for entry in manifest_of(folder)["tensors"]:
            if "bits" not in entry:
                continue
            held = arrays_of(folder / entry["file"])
            words, scales, biases = (held[name] for name in entry["outputs"])
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            restored = mx.dequantize(words, scales, biases, group_size=64, bits=4)
            original = source[entry["source"]].astype(mx.float32)
            steps = entry.get("relative_rmse_by_step", [entry["relative_rmse"]])
            assert len(steps) in (1, 16)
            for mine, theirs, expected in zip(
                mx.split(restored, len(steps)), mx.split(original, len(steps)), steps, strict=True
            ):
                error = (mx.linalg.norm(mine - theirs) / mx.linalg.norm(theirs)).item()
                assert error == pytest.approx(expected, rel=1e-3)
                seen += 1
    assert seen == 8 + 16 + 64 + 2 * 2 * 16


def test_lsq_beats_rtn_on_every_tensor(bundle):
    best, plain = (manifest_of(bundle("--recipe", "4bit", "--method", m))["tensors"] for m in ("lsq", "rtn"))
    pairs = [(a["relative_rmse"], b["relative_rmse"]) for a, b in zip(best, plain, strict=True) if "bits" in a]
    assert all(a < b for a, b in pairs)


@pytest.mark.parametrize(("recipe", "dtype", "cache"), [("4bit", "float16", "float32"), (UNEVEN, "bfloat16", "int32")])
def test_voices_keep_their_values(recipe, dtype, cache, bundle, pico):
    folder = bundle("--recipe", recipe)
    with tarfile.open(pico / "voices.tgz") as packed:
        for member in (m for m in packed if m.isfile()):
            file = packed.extractfile(member)
            assert file is not None
            held = torch.load(io.BytesIO(file.read()), weights_only=True)
            name = member.name.removeprefix("voices/").removesuffix(".pt")
            mine = load_file(folder / "voices" / f"{name}.safetensors")
            assert mine["embeddings"].dtype == getattr(torch, dtype)
            assert torch.equal(mine["embeddings"], held["embeddings"].to(getattr(torch, dtype)))
            assert mine["cache"].dtype == getattr(torch, cache)
            assert torch.equal(mine["cache"].to(torch.int64), held["cache"])
    assert len(list((folder / "voices").iterdir())) == 18


def test_what_belongs_to_no_tensor_is_copied(bundle, pico):
    codec, tokenizer = "tokenizer-e351c8d8-checkpoint125.safetensors", "tokenizer_spm_32k_3.model"
    swift, moshi = bundle("--recipe", "4bit"), bundle("--recipe", "moshi-q8")
    assert (swift / "mimi.safetensors").read_bytes() == (pico / codec).read_bytes()
    for name in (codec, tokenizer, "voices.tgz"):
        assert (moshi / name).read_bytes() == (pico / name).read_bytes()


def test_speech_swift_config(bundle):
    config = json.loads((bundle("--recipe", "4bit") / "config.json").read_text())
    assert config["model_type"] == "personaplex"
    assert config["quantization"] == {"bits": 4, "group_size": 64, "quantized_components": ["temporal", "depformer"]}
    assert config["temporal"]["n_q"] == 8
    assert config["depformer"]["num_steps"] == config["depformer"]["context"] == 16
    assert config["depformer"]["dim_feedforward"] == 192
    assert len(config["voices"]) == 18
    partly = json.loads((bundle("--recipe", "4bit-depformer16") / "config.json").read_text())
    assert partly["quantization"]["quantized_components"] == ["temporal"]


def test_mlx_config_names_exactly_the_quantized_modules(bundle):
    folder = bundle("--recipe", UNEVEN)
    config = json.loads((folder / "config.json").read_text())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = {name: spec for (file, name), spec in headers(folder).items() if file == "model.safetensors"}
    assert index["weight_map"] == dict.fromkeys(sorted(held), "model.safetensors")
    assert config["quantization"] == config["quantization_config"]
    common = {key: config["quantization"][key] for key in ("group_size", "bits")}
    for name, (_, shape) in held.items():
        if not name.endswith(".weight") or len(shape) == 1:
            continue
        path = name.removesuffix(".weight")
        setting = config["quantization"].get(path, common)
        assert (f"{path}.scales" in held) == (setting is not False), path
        if setting:
            groups = held[f"{path}.scales"][1][1]
            assert shape[1] * 32 == groups * setting["group_size"] * setting["bits"], path


def test_float_bundles_hold_the_source_exactly(bundle, pico):
    folder = bundle("--no-quantize", "--target", "mlx")
    source, mine = load_file(pico / "model.safetensors"), load_file(folder / "model.safetensors")
    for entry in manifest_of(folder)["tensors"]:
        tensor = source[entry["source"]]
        rows = tensor.reshape(-1, tensor.shape[-1])[entry["rows"][0] : entry["rows"][1]]
        assert torch.equal(mine[entry["outputs"][0]].reshape(rows.shape), rows)
    assert "quantization" not in json.loads((folder / "config.json").read_text())


def test_float16_reports_what_did_not_fit(pico_copy, program, tmp_path):
    tensors = load_file(pico_copy / "model.safetensors")
    tensors["text_emb.weight"][3, 5], tensors["text_emb.weight"][4, 6] = 1e6, 1e-12
    save_file(tensors, pico_copy / "model.safetensors")
    done = program("ppx-convert", pico_copy, "--dtype", "float16", "-o", "out", cwd=tmp_path)
    assert "1 value was too large in float16" in done.stdout
    manifest = manifest_of(tmp_path / "out")
    entry = next(entry for entry in manifest["tensors"] if entry["source"] == "text_emb.weight")
    assert manifest["overflowed"] == entry["overflowed"] == 1
    assert entry["flushed"] >= 1
    held = load_file(tmp_path / "out" / "embeddings.safetensors")["text_emb.weight"]
    assert (held[3, 5].item(), held[4, 6].item()) == (65504, 0)


def test_the_same_conversion_gives_the_same_bytes(bundle, pico, program, tmp_path):
    first = bundle("--recipe", "4bit")
    program("ppx-convert", pico, "--recipe", "4bit", "--jobs", "5", "-o", "again", cwd=tmp_path)
    for path in (p for p in first.rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(first)).read_bytes(), path.name


def test_a_dry_run_writes_nothing_and_adds_up(pico, program, tmp_path, bundle):
    done = program("ppx-convert", pico, "--dry-run", "--json", cwd=tmp_path)
    assert not list(tmp_path.iterdir())
    said = json.loads(done.stdout)
    folder = bundle("--recipe", "4bit")
    sizes = {name: record["size"] for name, record in manifest_of(folder)["files"].items()}
    assert said["files"] == sizes
    assert said["total_bytes"] == sum(sizes.values())
    parameters = sum(tensor.numel() for tensor in load_file(pico / "model.safetensors").values())
    assert sum(entry["parameters"] for entry in said["tensors"]) == said["parameters"] == parameters
    text = program("ppx-convert", pico, "--dry-run", cwd=tmp_path).stdout
    for wanted in ("temporal.safetensors", "4 bit g64 mse", "kept, float16", "bits per weight", "free disk", "memory"):
        assert wanted in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "7"], "--bits is 7: use one of"),
        (["--bits", "4", "--group-size", "48"], "--group-size is 48"),
        (["--group-size", "64"], "--group-size needs --bits"),
        (["--bits", "4", "--recipe", "8bit"], "contradict each other"),
        (["--bits", "4", "--no-quantize"], "contradict each other"),
        (["--recipe", "nope"], "no such recipe or file"),
        (["--target", "moshi-mlx", "--bits", "4"], "moshi-mlx loads every linear and embedding"),
        (["--bits", "4", "--group-size", "128"], "not divided by groups of 128"),
        (["--revision", "main"], "which is not on the Hub"),
    ],
)
def test_mistakes_end_in_a_line_and_write_nothing(options, message, pico, program, tmp_path):
    done = program("ppx-convert", pico, *options, "-o", "out", cwd=tmp_path, status=2)
    assert message in done.stderr
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())
    assert not list(tmp_path.iterdir())


def test_what_a_target_cannot_load_is_refused_before_the_download(program, tmp_path):
    done = program("ppx-convert", "--target", "moshi-mlx", "--bits", "4", cwd=tmp_path, status=2)
    assert "moshi-q4, moshi-q8 or bf16" in done.stderr
    assert "cache" not in done.stderr


def test_a_folder_of_something_else_is_left_alone(pico, program, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for extra in ([], ["--force"]):
        done = program("ppx-convert", pico, "-o", "out", *extra, cwd=tmp_path, status=2)
        assert "holds files that are no bundle" in done.stderr
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "thesis.tex"]
    (tmp_path / "more.partial").mkdir()
    (tmp_path / "more.partial" / "notes").write_text("x")
    program("ppx-convert", pico, "-o", "more", "--force", cwd=tmp_path, status=2)
    assert (tmp_path / "more.partial" / "notes").read_text() == "x"


def test_a_second_run_checks_and_another_bundle_is_kept_unless_forced(pico, program, tmp_path):
    program("ppx-convert", pico, "-o", "out", cwd=tmp_path)
    assert "checked again" in program("ppx-convert", pico, "-o", "out", cwd=tmp_path).stdout
    done = program("ppx-convert", pico, "-o", "out", "--bits", "8", cwd=tmp_path, status=2)
    assert "holds a bundle of another source, with other settings" in done.stderr
    program("ppx-convert", pico, "-o", "out", "--bits", "8", "--force", cwd=tmp_path)
    assert manifest_of(tmp_path / "out")["recipe"]["name"] == "8bit-g64"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    path = tmp_path / "out" / "depformer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = program("ppx-convert", pico, "-o", "out", "--bits", "8", cwd=tmp_path, status=1)
    assert "depformer.safetensors" in done.stderr


def test_files_of_the_users_in_a_bundle_are_never_removed(pico, program, tmp_path):
    program("ppx-convert", pico, "-o", "out", cwd=tmp_path)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    done = program("ppx-convert", pico, "-o", "out", "--bits", "8", "--force", cwd=tmp_path, status=2)
    assert "not of its bundle (notes.txt)" in done.stderr
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert manifest_of(tmp_path / "out")["recipe"]["name"] == "4bit"


def converted(pico: Path, output: Path, between: Callable[[], object]) -> object:
    """Convert with the library, and do something between the scan of the source and the first file."""
    source, plan = preparation.prepare(locate(str(pico)), shipped.load("4bit"))
    with source, pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle_build, "fingerprint", lambda *a: (fingerprint(*a), between())[0])
        return build(source, plan, output, quiet=True)


def test_what_comes_to_the_output_meanwhile_stays(pico, tmp_path, program):
    with pytest.raises(UserError, match="no bundle"):
        converted(pico, tmp_path / "out", lambda: (tmp_path / "out").mkdir() or (tmp_path / "out" / "x").write_text(""))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]

    def other_run():
        program("ppx-convert", pico, "--recipe", "8bit", "-o", "two", cwd=tmp_path)

    with pytest.raises(UserError, match="put there meanwhile"):
        converted(pico, tmp_path / "two", other_run)
    assert manifest_of(tmp_path / "two")["recipe"]["name"] == "8bit"
    assert (tmp_path / "two.partial").is_dir()


def test_a_source_that_changes_meanwhile_is_noticed(pico_copy, tmp_path):
    def change():
        with (pico_copy / "model.safetensors").open("r+b") as file:
            file.seek(-2, 2)
            file.write(b"\x00\x00")

    with pytest.raises(UserError, match="changed while it was converted"):
        converted(pico_copy, tmp_path / "out", change)
    assert not (tmp_path / "out").exists()


def test_leftovers_of_a_kill_after_the_rename_are_cleared(pico, program, tmp_path):
    program("ppx-convert", pico, "-o", "out", cwd=tmp_path)
    before = {path.name for path in (tmp_path / "out").iterdir()}
    for name in (".journal.json", ".lock"):
        (tmp_path / "out" / name).write_text("")
    (tmp_path / ".out.ppx-replaced-1" / "out").mkdir(parents=True)
    (tmp_path / ".out.old").mkdir()
    program("ppx-convert", pico, "-o", "out", cwd=tmp_path)
    assert {path.name for path in (tmp_path / "out").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.old"}


@pytest.mark.parametrize("name", ["tokenizer-e351c8d8-checkpoint125.safetensors", "tokenizer_spm_32k_3.model"])
def test_an_empty_codec_or_tokenizer_is_refused(name, pico_copy, program, tmp_path):
    (pico_copy / name).write_bytes(b"")
    done = program("ppx-convert", pico_copy, "-o", "out", cwd=tmp_path, status=2)
    assert name in done.stderr


def test_problems_of_source_voices_and_recipe_come_together(pico_copy, program, tmp_path):
    tensors = load_file(pico_copy / "model.safetensors")
    tensors["surprise"] = tensors.pop("out_norm.alpha")
    tensors["text_emb.weight"][0, 0] = torch.nan
    save_file(tensors, pico_copy / "model.safetensors")
    (pico_copy / "voices.tgz").write_bytes(b"")
    options = ["--bits", "4", "--target", "moshi-mlx"]
    said = program("ppx-convert", pico_copy, *options, cwd=tmp_path, status=2).stderr
    for problem in ("surprise: unknown", "out_norm.alpha: missing", "text_emb.weight: 1 values are NaN", "voices.tgz"):
        assert problem in said
    assert "moshi-mlx loads every linear" in said


def test_a_full_disk_ends_in_a_line_and_leaves_no_bundle(pico, program, tmp_path):
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)); "
    limit += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "sys.argv = ['ppx-convert', sys.argv[1], '-o', 'out', '--no-verify']; "
    limit += "runpy.run_module('ppx.recipes.cli.convert', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", limit, str(pico)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    program("ppx-convert", pico, "-o", "out", cwd=tmp_path)
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_an_empty_folder_a_link_and_the_working_folder_can_be_outputs(pico, program, tmp_path):
    for name in ("empty", "real", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("real")
    program("ppx-convert", pico, "-o", "empty", cwd=tmp_path)
    program("ppx-convert", pico, "-o", "link", cwd=tmp_path)
    program("ppx-convert", pico, "-o", ".", cwd=tmp_path / "here")
    for name in ("empty", "real", "here"):
        assert (tmp_path / name / "manifest.json").is_file()
    assert (tmp_path / "link").is_symlink()


def test_a_dry_run_of_the_full_size_demo_makes_none(program, tmp_path, own_cache):
    done = program("ppx-convert", "demo:7b", "--dry-run", cwd=tmp_path)
    assert "total 5.81 GB" in done.stdout
    assert not demo.folder_of("demo:7b").exists()
    assert demo.folder_of("demo:7b").is_relative_to(own_cache)


def test_a_folder_that_cannot_be_written(pico, program, tmp_path):
    (tmp_path / "file").write_text("")
    done = program("ppx-convert", pico, "-o", "file/out", cwd=tmp_path, status=2)
    assert len(done.stderr.splitlines()) == 1


def test_missing_source_files_are_all_named(pico_copy, program, tmp_path):
    for name in (CODEC, TOKENIZER):
        (pico_copy / name).unlink()
    done = program("ppx-convert", pico_copy, cwd=tmp_path, status=2)
    assert f"{CODEC}, {TOKENIZER} not there" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pico"]


def test_json_output_is_the_manifest(pico, program, tmp_path):
    said = json.loads(program("ppx-convert", pico, "-o", "out", "--json", cwd=tmp_path).stdout)
    assert said.items() >= manifest_of(tmp_path / "out").items()
    assert said["files_made"] == 24


def test_the_demo_has_all_475_tensors_and_converts(program, tmp_path):
    said = json.loads(program("ppx-inspect", "demo", "--json", cwd=tmp_path).stdout)
    assert next(row for row in said["components"] if row["component"] == "model")["tensors"] == 475
    assert len(said["voices"]) == 18
    program("ppx-convert", "demo", "--bits", "4", "--group-size", "64", cwd=tmp_path)
    assert np.median(
        [e["relative_rmse"] for e in manifest_of(tmp_path / "demo-speech-swift-4bit-g64")["tensors"] if "bits" in e]
    ) == pytest.approx(0.083, abs=0.005)
