"""What the programs have in common: help, names of options, and how they end."""

import ast
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ppx.calibrate import measurement, self_generated
from ppx.convert.bundle import recipe_file
from ppx.convert.bundle.recipe_file import to_toml
from ppx.convert.errors import UserError
from ppx.convert.source import source
from ppx.quant.affine import QuantizationConfig
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = (
    "allocate", "bench", "calibrate", "convert", "inspect", "install", "publish", "speak", "sweep", "verify", "voice"
)  # fmt: skip
LAYER = "transformer.layers.0.self_attn"


def run(program: str, *arguments: object, **more: Any) -> Result:
    module: Any = import_module(f"ppx.recipes.cli.{program}")
    return CliRunner().invoke(module.app, [str(argument) for argument in arguments], **more)


def test_programs_are_thin():
    for path in (ROOT / "recipes" / "cli").glob("*.py"):
        assert len(path.read_text().splitlines()) < 120, path


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_plain_and_names_no_switch_that_does_nothing(program):
    wide = {"terminal_width": 200}
    short, long = (run(program, option, **wide) for option in ("-h", "--help"))
    assert short.exit_code == long.exit_code == 0
    assert short.stdout == long.stdout
    assert {"--debug", "--version"} <= set(re.findall(r"--[a-z-]+", long.stdout))
    off = {"--no-quantize", "--no-verify"} if program == "convert" else set()
    assert set(re.findall(r"--no-[a-z-]+", long.stdout)) - off == set()


@pytest.mark.parametrize("program", ["convert", "allocate", "calibrate"])
def test_tokens_is_one_option_with_an_alias(program, pico, tmp_path, monkeypatch):
    """A file that is not there is complained of under both names; ppx-verify's --tokens is a file of the same kind."""
    monkeypatch.chdir(tmp_path)
    more = {"convert": ("--method", "gptq"), "allocate": ("--bits-per-weight", "5", "-o", "a.toml")}
    options = more.get(program, ("-o", "a.safetensors"))
    said = [run(program, pico, name, "nothing", *options) for name in ("--tokens", "--calibration")]
    assert [one.exit_code for one in said] == [2, 2]
    assert said[0].stderr == said[1].stderr
    assert "nothing: no such file" in said[0].stderr.lower()
    assert re.search(r"--tokens, --calibration\s", run(program, "-h", terminal_width=200).stdout)
    assert "--calibration" not in run("verify", "-h").stdout
    assert "--tokens" in run("verify", "-h").stdout


@pytest.fixture
def adapter(tmp_path):
    """An adapter of one matrix of pico."""
    sides = {"lora_A": np.ones((2, 256), np.float32), "lora_B": np.ones((256, 2), np.float32)}
    save_file(
        {f"{LAYER}.out_projs.0.{side}.weight": array for side, array in sides.items()}, tmp_path / "lora.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps({"lora_rank": 2}))
    return tmp_path / "lora.safetensors"


@pytest.fixture
def opened(pico, monkeypatch):
    """The sources that ppx-calibrate and ppx-allocate sample from and measure, which takes too long here."""
    sources = []
    tokens = load_file(pico / "calibration_tokens.safetensors")["tokens"][:2, :, :20].astype(np.int32)

    def generate(opened, *_):
        sources.append(opened)
        return tokens

    def measure(opened, *_):
        sources.append(opened)
        raise UserError("measured")

    monkeypatch.setattr(self_generated, "generate", generate)
    monkeypatch.setattr(measurement, "measure", measure)
    return sources


@pytest.mark.parametrize(
    ("program", "options"),
    [("calibrate", ("-o", "a.safetensors")), ("allocate", ("--bits-per-weight", "5", "-o", "a.toml"))],
)
def test_what_is_sampled_and_measured_has_the_adapter_merged(
    program, options, pico, adapter, opened, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run(program, pico, *options)
    plain = [one.adapter for one in opened]
    assert set(plain) == {None}
    opened.clear()
    for path in tmp_path.glob("a.*"):
        path.unlink()
    done = run(program, pico, "--adapter", adapter, *options)
    assert [one.adapter.rank for one in opened] == [2] * len(plain), done.output


@pytest.mark.parametrize("program", ["calibrate", "allocate"])
def test_sources_are_found_as_ppx_convert_finds_them(program, pico, tmp_path, monkeypatch):
    """--revision goes to the Hub, --fill-depformer-steps to the checkpoint."""
    from ppx.convert import preparation

    calls: list[Any] = []

    def locate(_where, revision=None, *_):
        calls.append(revision)
        return source.locate(str(pico))

    def opened(_location, _adapter, fill, *_, **__):
        calls.append(fill)
        raise UserError("opened")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preparation, "locate", locate)
    monkeypatch.setattr(preparation, "open_merged", opened)
    options = {"calibrate": ("-o", "a.safetensors"), "allocate": ("--bits-per-weight", "5", "-o", "a.toml")}[program]
    for more, expected in ((("--revision", "v2"), ["v2", False]), (("--fill-depformer-steps",), [None, True])):
        calls.clear()
        done = run(program, "someone/tune", *more, *options)
        assert (done.exit_code, calls) == (2, expected), done.output
    assert "has no effect" in run(program, pico, "--revision", "v2", *options).stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_debug_shows_what_is_behind_a_line(program, tmp_path, monkeypatch):
    """The line is the last, as it is without; errors that it was made of are shown as well."""
    monkeypatch.chdir(tmp_path)
    needed = {
        "allocate": ("nothing", "--bits-per-weight", "4", "-o", "a.toml"),
        "calibrate": ("nothing", "-o", "a.safetensors"),
        "publish": ("nothing", "me/it"),
        "speak": ("nothing", "q.wav", "-o", "a.wav"),
        "voice": ("nothing", "q.wav"),
    }
    arguments = needed.get(program, ("./nothing",))
    plain, debug = run(program, *arguments), run(program, *arguments, "--debug")
    variable = run(program, *arguments, env={"PPX_DEBUG": "1"})
    assert plain.exit_code == debug.exit_code == variable.exit_code == 2
    assert plain.stderr.startswith("error: ")
    assert "Traceback" not in plain.stderr
    for shown in (debug, variable):
        assert "Traceback (most recent call last)" in shown.stderr
        assert "UserError" in shown.stderr
        assert shown.stderr.endswith(plain.stderr)


def test_debug_shows_the_cause(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("= 3")
    assert "TOMLDecodeError" in run("convert", "demo", "--recipe", "mine.toml", "--dry-run", "--debug").stderr


def test_both_names_of_a_quantizer_write_the_same(program, pico, tmp_path):
    """What is stored is lsq, which earlier versions read."""
    for name in ("mse", "lsq"):
        program("ppx-convert", pico, "--bits", "4", "--method", name, "-o", name, cwd=tmp_path)
    files = [path.relative_to(tmp_path / "mse") for path in (tmp_path / "mse").rglob("*") if path.is_file()]
    assert all((tmp_path / "mse" / path).read_bytes() == (tmp_path / "lsq" / path).read_bytes() for path in files)
    assert '"mse"' not in (tmp_path / "mse" / "manifest.json").read_text()
    text = "[[rules]]\nbits = 4\ngroup_size = 64\nmethod = {!r}\n"
    read = [recipe_file.parse(text.format(name), "mine", "mine.toml") for name in ("mse", "lsq")]
    assert read[0].rules == read[1].rules
    assert 'method = "lsq"' in to_toml(read[0])
    assert QuantizationConfig(4, 64, "mse") == QuantizationConfig(4, 64, "lsq")
    assert "[mse|rtn|gptq|mse-unweighted]" in run("convert", "-h", terminal_width=200).stdout


def test_messages_of_options_that_contradict_each_other(pico, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options, words in (
        (("--recipe", "4bit", "--bits", "4"), "--recipe and --bits contradict each other"),
        (("--bits", "4", "--target-size", "1GB"), "--bits and --target-size contradict each other"),
        (("--target-size", "1GB", "--bits-per-weight", "4"), "--target-size and --bits-per-weight contradict"),
        (("--group-size", "32"), "--group-size needs --bits"),
        (("--no-quantize", "--method", "rtn"), "quantizes nothing takes no method"),
        (("--private",), "--private needs --publish"),
        (("--publish", "me/it", "--no-verify"), "--publish needs --verify"),
    ):
        done = run("convert", pico, *options, "-o", "out")
        assert done.exit_code == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_every_program_is_listed():
    found = {path.stem for path in (ROOT / "recipes" / "cli").glob("*.py") if "app = " in path.read_text()}
    assert found == set(PROGRAMS)
    for name in PROGRAMS:
        syntax = ast.parse((ROOT / "recipes" / "cli" / f"{name}.py").read_text())
        assert [node.name for node in syntax.body if isinstance(node, ast.FunctionDef)][-1] == "main"
