"""Mistakes in a command line, help on a narrow terminal, and what is taken where little is said."""

import json
import re
from importlib import import_module
from typing import Any

import pytest
from ppx.convert.bundle import shipped
from ppx.convert.bundle.plan import inventory_of_7b, make_plan
from ppx.convert.bundle.recipe_choice import make_recipe
from ppx.convert.bundle.targets import TARGETS
from ppx.convert.errors import UserError
from ppx.recipes.cli.hints import OF_MLX_LM
from typer.main import get_command
from typer.testing import CliRunner, Result

PROGRAMS = (
    "allocate", "bench", "calibrate", "convert", "inspect", "install", "publish", "speak", "sweep",
    "verify", "voice"
)  # fmt: skip


def run(program: str, *arguments: object, **more: Any) -> Result:
    module: Any = import_module(f"ppx.recipes.cli.{program}")
    return CliRunner().invoke(module.app, [str(argument) for argument in arguments], **more)


@pytest.mark.parametrize(
    ("program", "arguments", "line"),
    [
        ("convert", ("--bits", "x"), "--bits is 'x': a whole number is needed"),
        ("convert", ("--bits=x",), "--bits is 'x': a whole number is needed"),
        ("convert", ("--jobs", "0"), "--jobs is '0': a whole number from 1 to 256 is needed"),
        ("convert", ("--depformer-steps", "0"), "--depformer-steps is '0': a whole number of at least 1 is needed"),
        ("convert", ("--bits-per-weight", "99"), "--bits-per-weight is '99': a number from 1 to 32 is needed"),
        (
            "convert",
            ("--target", "mosh-mlx"),
            "--target is 'mosh-mlx': use speech-swift, moshi-mlx, mlx: did you mean moshi-mlx?",
        ),
        ("convert", ("--method", "foo"), "--method is 'foo': use mse, rtn, gptq, mse-unweighted"),
        ("convert", ("--bits",), "--bits needs a value: ppx-convert -h lists what there is"),
        ("convert", ("a", "b"), "b: one argument too many: ppx-convert -h lists what there is"),
        (
            "convert",
            ("--publsh", "a/b"),
            "--publsh: no such option: did you mean --publish? ppx-convert -h lists what there is",
        ),
        ("bench", (), "BUNDLE is not given: ppx-bench -h lists what there is"),
        ("bench", ("x", "--frames", "1"), "--frames is '1': a whole number from 2 to 100000 is needed"),
        ("allocate", ("pico",), "--output is not given: ppx-allocate -h lists what there is"),
        ("verify", ("x", "--controls", "q"), "--controls is 'q': a whole number is needed"),
        ("verify", ("x", "--q-bits", "4"), "--q-bits: no such option: ppx-verify -h lists what there is"),
    ],
)
def test_mistakes_in_options_are_one_line_in_our_words(program, arguments, line):
    done = run(program, *arguments)
    assert (done.exit_code, done.stderr, done.stdout) == (2, f"error: {line}\n", "")


def test_options_of_mlx_lm_are_answered_with_ours():
    assert {"--hf-path", "-q", "--q-bits", "--q-group-size", "--mlx-path"} <= set(OF_MLX_LM)
    command: Any = get_command(import_module("ppx.recipes.cli.convert").app)
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for option, advice in OF_MLX_LM.items():
        done = run("convert", option, "4")
        assert (done.exit_code, done.stderr) == (2, f"error: {option}: no such option here: {advice}\n")
        assert option not in known
        assert set(re.findall(r"--[a-z-]+", advice)) <= known


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_fits_into_80_columns_whole(program):
    """Nothing is cut off; every option is told in a sentence that begins with a verb, and examples likewise."""
    text = run(program, "-h", terminal_width=80).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "\u2026" not in text
    assert "..." not in text
    command: Any = get_command(import_module(f"ppx.recipes.cli.{program}").app)
    whole = " ".join(text.split())
    for parameter in command.params:
        if parameter.help:
            said = " ".join(parameter.help.split())
            assert said.replace("- ", "-") in whole.replace("- ", "-"), said
            assert re.match(VERB, said), said
    examples = text.partition("Examples:")[2].splitlines()
    for line in examples:
        if line.startswith("      ") and not line.lstrip().startswith("-"):
            assert re.match(f"(?i){VERB}", line.strip()), line


VERB = (
    "(Answer|Begin|Choose|Comp|Convert|Copy|Cut|Draw|Encode|Fine-tune|Fit|Generate|Give|Hash|Join|Keep|Let|Link|List|Make|Measure|"
    "Merge|Open|Print|Propose|Publish|Put|Quantize|Read|Remove|Replace|Run|Sample|Say|Share|Show|Speak|Store|Take|Talk|Time|Undo|Upload|Use|Write)"
)


def test_unknown_recipes_get_what_may_be_meant():
    with pytest.raises(UserError, match=r"moshi-q5: no such recipe or file: did you mean moshi-q\d\? shipped are"):
        shipped.load("moshi-q5")
    with pytest.raises(UserError, match="zzz: no such recipe or file: shipped are 4bit"):
        shipped.load("zzz")


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_alone_takes_a_recipe_that_it_loads(target, pico, tmp_path, monkeypatch):
    recipe = make_recipe(target=target)
    assert recipe.name == TARGETS[target].recipe
    assert make_plan(inventory_of_7b("x/y"), recipe).target.name == target
    monkeypatch.chdir(tmp_path)
    done = run("convert", pico, "--target", target, "--dry-run", "--json")
    planned = json.loads(done.stdout)
    assert (planned["target"], planned["recipe"]) == (target, TARGETS[target].recipe)
    assert planned["output"] == f"pico-{target}-{TARGETS[target].recipe}"
    assert planned["download_bytes"] == 0
    assert planned["conversion_seconds"] > 0


def test_a_dry_run_says_how_long_a_conversion_takes(pico, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run("convert", pico, "--dry-run", "--jobs", "1").stdout.splitlines()[-1]
    assert re.fullmatch(r"conversion: about \d+ s on this machine with 1 thread and a disk of 1 GB/s; .*", said)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    small, large = (
        json.loads(run("convert", source, "--bits", "4", "--dry-run", "--json").stdout)["conversion_seconds"]
        for source in (pico, "demo:7b")
    )
    assert large > 20 * max(small, 0.1)


def test_a_size_takes_tokens_and_refinement_only_with_gptq(pico, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ("convert", pico, "--target-size", "1KB", "--refine", "3")
    assert "only the method gptq takes --refine: leave --refine out" in run(*common).stderr
    assert "the smallest bundle for mlx is larger" in run(*common, "--method", "gptq").stderr
