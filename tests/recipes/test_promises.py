"""What the documents, the layout and the house rules promise."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from architecture import ORDER, ROOT, arrows, imported, modules, name_of
from documents import CONVERTING, PAGES, PUBLISHING, README, VERIFICATION, commands_of
from hub_server import running
from ppx.convert.bundle import recipe_file, shipped
from ppx.convert.bundle.describe import size
from ppx.convert.bundle.plan import inventory_of_7b, make_plan
from ppx.convert.bundle.recipe_file import to_toml
from ppx.convert.bundle.run_memory import planned_memory
from ppx.verify.limits import NARROW, WIDE, Factor
from safetensors.numpy import load_file, save_file

NAMES = {name_of(path) for path in modules()}


def test_imports_run_in_one_direction():
    seen = arrows(())
    for folder, others in seen.items():
        assert all(ORDER.index(other) < ORDER.index(folder) for other in others), f"{folder} imports {others}"
    assert {folder for folder, others in seen.items() if others} == set(ORDER[1:])


@pytest.mark.parametrize("folder", sorted({name[:depth] for name in NAMES for depth in range(len(name))}))
def test_imports_run_in_one_direction_within_a_folder(folder):
    TopologicalSorter(arrows(folder)).prepare()  # raises for a circle


def test_an_import_that_is_not_relative_or_of_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("architecture.ROOT", tmp_path)
    module = tmp_path / "speak" / "one.py"
    module.parent.mkdir()
    for line, message in (
        ("import os, ppx.quant", "relative"),
        ("def f():\n    from ppx.quant import affine", "relative"),
        ("from ..quant import nothing", r"imports quant\.nothing"),
    ):
        module.write_text(line)
        with pytest.raises(ValueError, match=message):
            list(imported(module))
    (tmp_path / "quant").mkdir()
    (tmp_path / "quant" / "affine.py").write_text("")
    module.write_text("def f():\n    from ..quant.affine import quantize\n    from ..quant import affine")
    assert list(imported(module)) == [("quant", "affine")] * 2


def test_checkpoints_know_nothing_of_bundles():
    within = arrows(("convert",))
    assert "bundle" not in within["source"]
    assert "source" in within["bundle"]
    assert {"source", "bundle"} <= within["conversion"]

    within = arrows(("verify",))
    assert "publishing" not in within["verification"]
    assert "verification" in within["bundle_report"]


def test_numerics_know_no_files_and_no_network():
    for path in (ROOT / "quant").rglob("*.py"):
        assert not re.search(r"\b(pathlib|open\(|huggingface_hub|safetensors|typer)\b", path.read_text()), path


def test_modules_can_be_read_in_one_sitting():
    for path in modules():
        assert len(path.read_text().splitlines()) <= 320, path


def test_pickles_are_loaded_with_weights_only():
    for path in modules():
        for call in re.findall(r"torch\.load\([^\n]*", path.read_text()):
            assert "weights_only=True" in call, path


def test_every_program_of_the_readme_is_installed_and_the_other_way_round():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(re.findall(r"^(?:\$ )?(ppx-[a-z]+)", README, re.MULTILINE)) == set(scripts)


def test_the_readmes_first_block_names_targets_of_the_makefile():
    block = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)[0]
    commands = re.findall(r"^make (\w+)", block, re.MULTILINE)
    assert commands == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{command}: " in makefile for command in commands)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def conversions() -> list[str]:
    """Those of README, and of the pages about how to convert; other pages have tests of their own."""
    text = "".join((README, *(PAGES[f"{name}.md"] for name in ("converting", "quantizing", "fidelity", "publishing"))))
    return list(dict.fromkeys(line for line in commands_of(text) if line.startswith("ppx-convert")))


@pytest.mark.parametrize("command", conversions())
def test_commands_of_the_readme_plan(command, program, pico, tmp_path):
    name, *arguments = shlex.split(command)
    arguments = [pico if argument == "./my-finetune" else argument for argument in arguments if argument != "--dry-run"]
    (tmp_path / "mine.toml").write_text(to_toml(shipped.load("mixed")))
    for tokens in ("tokens.safetensors", "conversations.safetensors"):
        (tmp_path / tokens).symlink_to((pico / "calibration_tokens.safetensors").absolute())
    by_size = "--target-size" in arguments  # which measures, so that there is no plan without: tests of sizes run it
    done = program(name, *arguments, "--dry-run", cwd=tmp_path, status=2 if by_size else 0)
    assert ("measures nothing" in done.stderr) if by_size else ("bits per weight" in done.stdout)


@pytest.mark.slow
def test_verifications_of_the_page_run(bundle, pico, program, tmp_path):
    commands = commands_of(VERIFICATION)
    assert [command.split()[0] for command in commands] == ["ppx-verify"] * 3
    for name, options in (("my-bundle", "4bit"), ("my-4bit", "4bit"), ("my-8bit", "8bit")):
        shutil.copytree(bundle("--recipe", options), tmp_path / name)
    tokens = tmp_path / "held.safetensors"
    save_file({"tokens": load_file(pico / "heldout_tokens.safetensors")["tokens"][:2, :, :40].copy()}, tokens)
    here = {"nvidia/personaplex-7b-v1": pico, "./my-finetune": pico, "heldout.safetensors": tokens}
    for name in ("my-4bit", "my-8bit"):
        program("ppx-verify", name, "--reference", pico, "--sequences", "1", "--frames", "40", cwd=tmp_path)
    for command in commands:
        name, *arguments = shlex.split(command)
        arguments = [here.get(argument, argument) for argument in arguments]
        if "--tokens" not in arguments and "--reference" in arguments:
            arguments += ["--sequences", "1", "--frames", "40"]
        said = program(name, *arguments, cwd=tmp_path).stdout
        assert "KL of the agent's codebooks" in said


SPEED = re.compile(r".* on this machine .*\n")  # lines that forecast how long something takes
NUMBER = r"\d+(?:\.\d+)?(?:e-\d+)?"


def assert_same_output(printed: str, documented: str) -> None:
    """Compare words, with runs of blanks as one, and numbers by value: how wide they are is not what matters.

    Processors sum in different orders. The noise floor is what rounding alone costs: it moved by up to 15 % between
    processors, numbers of threads and ways to sum an attention (5.8e-06 to 6.7e-06), everything else by less than 1 %.
    """
    printed, documented = (SPEED.sub("", text) for text in (printed, documented))
    words = [[" ".join(part.split()) for part in re.split(NUMBER, text)] for text in (printed, documented)]
    assert words[0] == words[1]
    for mine, other in zip(re.findall(NUMBER, printed), re.findall(NUMBER, documented), strict=True):
        noise = float(other) < 5e-4
        assert float(mine) == pytest.approx(float(other), rel=0.3 if noise else 0.03), (mine, other)


def test_outputs_are_compared_by_words_and_values():
    documented = "KL of text    0.0043   2.1e-06\nfiles: 25\n"
    assert_same_output("KL of text   0.00427  2.2e-06\nfiles: 25\n", documented)
    for wrong in ("KL of text 0.0043 2.1e-06", "KL of text 0.0050 2.1e-06\nfiles: 25\n", "KL of text 25\nfiles: 25\n"):
        with pytest.raises((AssertionError, ValueError)):
            assert_same_output(wrong, documented)


def run_session(
    session: str,
    program: Callable[..., subprocess.CompletedProcess[str]],
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run a console session of a page, and compare what it prints."""
    steps = re.findall(r"\$ (.*)\n((?:(?!\$ ).*\n)*)", session)
    for command, output in steps:
        name, *arguments = shlex.split(command)
        as_it_stands = ["--verify"] if name == "ppx-convert" else []  # which it does without being told
        said = program(name, *arguments, *as_it_stands, cwd=folder, environment=environment).stdout
        if environment:
            said = said.replace(environment["HF_ENDPOINT"], "https://huggingface.co")
        assert_same_output(said, output)
    return len(steps)


@pytest.mark.slow
def test_the_session_of_the_converting_page_is_a_real_one(program, tmp_path):
    (session,) = re.findall(r"```console\n(.*?)```", CONVERTING, re.DOTALL)
    assert run_session(session, program, tmp_path) == 2
    demo = re.search(r"^demo: .*\n((?:\t.*\n)*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert demo
    assert re.findall(r"^\$ (.*)$", session, re.MULTILINE) == re.findall(r"^\t\$\(BIN\)/(.*)$", demo[1], re.MULTILINE)


@pytest.mark.slow
def test_the_session_of_the_publishing_page_is_a_real_one(program, tmp_path):
    (session,) = re.findall(r"```console\n(.*?)```", PUBLISHING, re.DOTALL)
    with running() as hub:
        environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_writer"}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        assert run_session(session, program, tmp_path, environment) == 4
        assert hub.repositories["me/personaplex-demo"].private


def test_the_readmes_table_of_recipes():
    rows = re.findall(
        r"^\| `([\w-]+)`(?: \(default\))? \| ([\w-]+) \| ([\d.]+ GB) \| ([\d.]+) \| ([\d.]+ GB) \|",
        README,
        re.MULTILINE,
    )
    assert sorted(row[0] for row in rows) == shipped.names()
    for name, target, total, bits, memory in rows:
        plan = make_plan(inventory_of_7b("x/y"), shipped.load(name))
        assert (target, total, bits) == (plan.target.name, size(plan.nbytes), f"{plan.bits_per_weight:.2f}"), name
        assert memory == size(planned_memory(plan).total), name


@pytest.mark.parametrize("name", tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])
def test_help_has_examples_and_no_option_without_a_word(name, program, tmp_path):
    said = program(name, "--help", cwd=tmp_path, environment={"COLUMNS": "200"}).stdout
    assert "Examples:" in said
    assert "\x1b" not in said
    said = re.sub(r"\n {10,}", "  ", said)  # help on the line below a long option
    for option in re.findall(r"^  (?:-\w, )?--[\w-]+.*$", said, re.MULTILINE):
        assert re.search(r"\S  +\S", option.strip()), option


def test_the_example_of_the_recipes_page_is_a_recipe():
    text = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL)[0]
    plan = make_plan(inventory_of_7b("x/y"), recipe_file.parse(text, "example", "example"))
    methods = {(output.quantization.bits, output.quantization.method) for output in plan.outputs if output.quantization}
    assert methods == {(6, "lsq"), (4, "rtn")}


def test_every_field_of_the_manifest_is_documented(bundle):
    page = (ROOT / "docs" / "bundle.md").read_text()
    manifest = json.loads((bundle("--recipe", "4bit") / "manifest.json").read_text())
    for field in [*manifest, *(key for entry in manifest["tensors"] for key in entry)]:
        assert f"`{field}`" in page, field


def test_output_without_a_terminal_is_plain(pico, program, tmp_path):
    done = program("ppx-convert", pico, "-o", "out", cwd=tmp_path, environment={"FORCE_COLOR": "", "NO_COLOR": "1"})
    assert done.stderr == ""
    assert "\x1b" not in done.stdout


@pytest.mark.slow
def test_every_field_of_the_report_is_documented(bundle, program, pico, tmp_path):
    page = (ROOT / "docs" / "verification.md").read_text()
    shutil.copytree(bundle("--recipe", "4bit"), tmp_path / "mine")
    options = ("--reference", pico, "--tokens", pico / "heldout_tokens.safetensors", "--sequences", "1")
    program("ppx-verify", "mine", *options, "--frames", "20", "--rollout", "2", cwd=tmp_path)
    report = json.loads((tmp_path / "mine" / "parity" / "report.json").read_text())
    seen = [report, report["verdict"], report["bundle"], report["structure"], report["rollout"], report["times"]]
    seen += [report["memory"]]
    seen += [
        report["kernels"][0],
        report["weights"][0],
        report["activations"][0],
        report["activations"][0]["accumulated"],
    ]
    seen += [report["predictions"]["text"], *list(report["predictions"]["text"]["bundle"].values())[1:]]
    for field in [field for fields in seen for field in fields]:
        assert f"`{field}`" in page, field


def test_the_documented_factors_are_those_that_apply():
    page = (ROOT / "docs" / "verification.md").read_text()
    rows = re.findall(
        r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+)(?: \(\+ ([\d.]+) of the agent's KL\))? \|$", page, re.MULTILINE
    )
    assert {limit: Factor(float(narrow)) for limit, narrow, _, _ in rows} == NARROW
    assert {limit: Factor(float(wide), float(share or 0)) for limit, _, wide, share in rows} == WIDE


@pytest.mark.slow
def test_programs_start_without_the_slow_libraries():
    """Help, dry runs and mistakes should not wait for torch and its kind."""
    slow = ("torch", "matplotlib", "sentencepiece")
    for entry in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].values():
        module = entry.split(":")[0]
        code = f"import sys, {module}; print([name for name in {slow} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]", module
