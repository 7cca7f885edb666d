"""What long work is in vain without is checked before it; what it needs twice is computed once."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from ppx.calibrate import measurement, self_generated
from ppx.calibrate.sensitivity import STREAMS, Sensitivities, members_of, settings_of
from ppx.convert.bundle import plan as plans
from ppx.convert.file_names import CODEC, WEIGHTS
from ppx.convert.preparation import inventory
from ppx.convert.source import demo, source
from ppx.convert.source.scan import scan_tensors
from ppx.convert.source.source import locate, open_source
from ppx.quant.affine import BITS
from ppx.recipes.cli import allocate, convert
from safetensors.numpy import load_file
from typer.testing import CliRunner

SCANNED = [f"read {WEIGHTS}", f"read {CODEC}"]  # once
HEAD = """target = "mlx"
[[rules]]
modules = "text_linear"
bits = 4
group_size = 64
method = "gptq"
"""


@pytest.fixture
def work(pico, monkeypatch, tmp_path):
    """Stand-ins for what takes hours (sampling sessions, measuring), and a recipe for one matrix; what was done."""
    done = []
    tokens = load_file(pico / "calibration_tokens.safetensors")["tokens"][:2, :, :20].astype(np.int32)

    def generate(*_):
        done.append("sampled")
        return tokens

    def measure(opened, token_set, mark, *_):
        done.append("measured")
        found = Sensitivities(token_set.description, mark)
        members = members_of(opened.architecture)
        for part, tensors in members.items():
            columns = [opened.checkpoint.tensors[name].role.shape[-1] for name, _ in tensors]
            found.costs[part] = {bits: dict.fromkeys(STREAMS, 4.0**-bits) for bits in BITS}
            found.errors[part] = {setting: 4.0 ** -setting[0] for setting in settings_of(columns)}
        return found

    def scanned(file, bar):
        done.append(f"read {file.path.name}")
        return scan_tensors(file, bar)

    (tmp_path / "head.toml").write_text(HEAD)
    monkeypatch.setattr(self_generated, "generate", generate)
    monkeypatch.setattr(measurement, "measure", measure)
    monkeypatch.setattr(source, "scan_tensors", scanned)
    monkeypatch.chdir(tmp_path)
    return done


def run(program, *arguments):
    return CliRunner().invoke(program.app, [str(argument) for argument in arguments])


GPTQ = ("--recipe", "head.toml", "--no-verify")
SIZE = ("--target-size", "2.2MB", "--depformer-steps", "8", "--no-verify")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (GPTQ, ["sampled"]),
        (SIZE, ["sampled", "measured"]),
    ],
    ids=["gptq", "size"],
)
def test_parents_are_made_first_and_the_source_is_hashed_once(options, expected, work, pico, tmp_path):
    done = run(convert, pico, *options, "-o", "new/deeper/out")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "new" / "deeper" / "out" / "manifest.json").is_file()
    assert work == [*SCANNED, *expected]


def test_allocating_hashes_the_source_once(work, pico):
    done = run(allocate, pico, "--bits-per-weight", "5", "-o", "a.toml")
    assert done.exit_code == 0, done.output
    assert work == [*SCANNED, "sampled", "measured"]


@pytest.mark.parametrize("output", [".", "../here"])
def test_the_working_folder_as_output(output, work, pico, tmp_path, monkeypatch):
    """It is replaced; what is named relative to it, as the source that is verified against, is still found."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = run(convert, pico, "--recipe", "../head.toml", "--no-verify", "-o", output)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "here" / "manifest.json").is_file()
    assert Path.cwd().samefile(tmp_path / "here")
    assert (tmp_path / "here.spoken.safetensors").is_file()
    assert "sampled" in work


@pytest.mark.parametrize("options", [GPTQ, SIZE], ids=["gptq", "size"])
def test_an_output_that_cannot_be_is_refused_first(options, work, pico, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    for output, words in (
        ("file", "is a file"),
        ("file/out", "file: is not a folder"),
        ("full", "no bundle"),
    ):
        done = run(convert, pico, *options, "-o", output)
        assert done.exit_code == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert work == []


def test_another_bundle_is_found_before_sessions_are_sampled(work, bundle, pico, tmp_path):
    shutil.copytree(bundle(), tmp_path / "bundle")
    done = run(convert, pico, *GPTQ, "-o", "bundle")
    assert done.exit_code == 2
    assert "bundle: holds a bundle of another source, with other settings" in done.stderr
    assert work == SCANNED


def test_a_bundle_of_another_source_is_found_before_it_is_measured(work, bundle, pico, tmp_path):
    shutil.copytree(bundle(), tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    manifest["source"]["files"][WEIGHTS]["sha256"] = "0" * 64
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    done = run(convert, pico, *SIZE, "-o", "bundle")
    assert done.exit_code == 2
    assert "bundle: holds a bundle of another source" in done.stderr
    assert work == SCANNED


def test_a_folder_that_is_not_writable_is_told_first(work, bundle, pico, tmp_path, monkeypatch):
    """What is written beside the output goes there, also where the output itself is there."""
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)  # root may write anywhere
    (tmp_path / "empty").mkdir()
    shutil.copytree(bundle(), tmp_path / "bundle")
    for program, *options in (
        (convert, *GPTQ, "-o", "empty"),
        (convert, *GPTQ, "-o", "bundle", "--force"),
        (convert, *GPTQ, "-o", "new/out"),
        (allocate, "--bits-per-weight", "5", "-o", "a.toml"),
    ):
        done = run(program, pico, *options)
        assert done.exit_code == 2
        assert "is not writable: choose another" in done.stderr
    assert work == []


def test_allocating_checks_where_it_writes(work, pico):
    for options in (
        ("-o", "no/a.toml"),
        ("-o", "a.toml", "--plot", "no/a.svg"),
        ("-o", "a.toml", "--sensitivity", "no/a"),
    ):
        done = run(allocate, pico, "--bits-per-weight", "5", *options)
        assert done.exit_code == 2
        assert "in a folder that is there" in done.stderr
    assert work == []


def test_a_place_without_room_is_refused_first(work, pico, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 20, 1 << 20, 0))
    done = run(convert, pico, *GPTQ, "-o", "out")
    assert done.exit_code == 2
    assert "0.00 GB are free" in done.stderr
    assert "sampled" not in work


def test_a_dry_run_of_a_demo_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for size in demo.SIZES:
        done = run(convert, size, "--dry-run")
        assert done.exit_code == 0, done.output
        assert f"{size} was not made yet: planned from its shapes" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_demo_has_the_sizes_that_are_planned():
    with open_source(locate("demo", quiet=True)) as opened:
        assert plans.inventory_of_demo("demo") == inventory(opened)
    assert demo.sizes_of("demo:audio")[CODEC] == demo.sizes_of("demo:7b")[CODEC] > 384_000_000
