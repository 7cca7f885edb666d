"""README and docs: their length, their index, and that each command in them is run by a test."""

import re
import shlex
import sys
import tomllib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
from architecture import ROOT
from documents import PAGES, README, commands_of, lines_of
from hub_server import running
from ppx.convert.bundle import shipped
from ppx.convert.bundle.manifest import manifest_of
from ppx.convert.file_names import CODEC
from ppx.convert.source import demo
from ppx.recipes.cli import sweep as program_of_sweeps
from ppx.verify.sweeping import sweep as sweeps
from typer.testing import CliRunner

pytestmark = pytest.mark.slow
HERE = "recipes/test_documents.py"
PROMISES = "recipes/test_promises.py"
RUN_BY = {  # every page with commands, and the tests that run them
    "converting.md": [(PROMISES, "test_commands_of_the_readme_plan"),
                      (PROMISES, "test_the_session_of_the_converting_page_is_a_real_one")],
    "fidelity.md": [(PROMISES, "test_commands_of_the_readme_plan"),
                    ("calibrate/test_size_budget.py", "test_a_conversion_to_a_size")],
    "install.md": [("convert/test_install.py", "test_commands_of_the_page_run"),
                   ("convert/test_location.py", "test_commands_of_the_page_with_a_hub_id_run")],
    "listening.md": [("verify/test_listening.py", "test_the_documented_commands_are_commands")],
    "publishing.md": [(PROMISES, "test_the_session_of_the_publishing_page_is_a_real_one")],
    "quantizing.md": [(PROMISES, "test_commands_of_the_readme_plan"),
                      (HERE, "test_commands_of_the_readme_run"),
                      (HERE, "test_commands_that_two_pages_have_are_the_same")],
    "real-checkpoint.md": [(HERE, "test_the_command_for_the_real_checkpoint_runs")],
    "sources.md": [("convert/test_hub.py", "test_the_command_of_the_sources_page")],
    "speaking.md": [("speak/test_speak.py", "test_the_commands_of_the_page_run"),
                    ("speak/test_speak.py", "test_the_conversation_of_the_page_is_a_real_one")],
    "sweeps.md": [(HERE, "test_the_commands_of_the_sweeps_page_are_commands")],
    "verification.md": [(PROMISES, "test_verifications_of_the_page_run")],
    "voices.md": [("speak/test_recorded_voices.py", "test_the_commands_of_the_page_run")],
}  # fmt: skip
SWEEP = """[[sources]]
name = "mine"
source = "SOURCE"
[[recipes]]
recipe = "4bit"
[evaluation]
sequences = 1
frames = 80
"""


def test_the_readme_has_at_most_1000_words():
    assert 300 < len(README.split()) <= 1000  # as wc counts: bars of tables and code, too
    assert len(re.findall(r"^!\[", README, re.MULTILINE)) == 1
    glossary = README.partition("\n## Glossary\n")[2]
    assert len(re.findall(r"^- \*\*", glossary, re.MULTILINE)) == 5


def test_every_page_is_in_the_index_once():
    targets = re.findall(r"\]\(([^)#]+)\)", PAGES["README.md"])
    assert sorted(target for target in targets if target != "../README.md") == sorted(PAGES.keys() - {"README.md"})
    assert "(docs/README.md)" in README


def test_every_page_with_commands_has_tests_that_run_them():
    assert {name for name, text in PAGES.items() if commands_of(text)} == set(RUN_BY)
    for name, tests in RUN_BY.items():
        for path, function in tests:
            text = (ROOT / "tests" / path).read_text()
            assert f"def {function}(" in text, (name, function)


def test_other_commands_of_the_documents_name_what_is_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, text in (("README", README), *PAGES.items()):
        for names in re.findall(r"(?:'\.|ppx-convert)\[([\w,-]+)\]", text):
            assert set(names.split(",")) <= extras.keys(), (name, names)
        for line in (line for line in lines_of(text) if not line.startswith("ppx-")):
            word = line.split()[0]
            assert word in ("make", "python3", "pip", "hf"), (name, line)
            if word == "pip":
                assert all((ROOT / path).is_file() for path in re.findall(r"--constraint (\S+)", line)), line
            if word == "hf":
                assert (Path(sys.executable).parent / "hf").is_file()


def test_commands_that_two_pages_have_are_the_same():
    """What README shows of quantizing is what its page shows."""
    for program in ("ppx-calibrate", "ppx-allocate", "ppx-sweep"):
        assert {line for line in commands_of(PAGES["quantizing.md"]) if line.startswith(program)} <= set(
            commands_of(README)
        ), program


@pytest.fixture(scope="module")
def source(codec, tmp_path_factory):
    """The demo with a whole codec and few layers, in place of the published checkpoint."""
    folder = tmp_path_factory.mktemp("readme") / "source"
    shallow = replace(demo.SIZES["demo:audio"], num_layers=2, depformer_num_layers=1)
    demo.make("demo", folder, quiet=True, architecture=shallow)
    (folder / CODEC).unlink()
    (folder / CODEC).symlink_to(codec)
    return folder


def test_commands_of_the_readme_run(source, program, tmp_path):
    """All of them, in their order, in one folder."""
    samples, rate = soundfile.read(ROOT / "tests" / "data" / "speech.flac", dtype="float32")
    for name, seconds in (("question", 0.4), ("me", 1.3), ("monday", 2), ("tuesday", 2)):
        soundfile.write(tmp_path / f"{name}.wav", samples[: int(seconds * rate)], rate)
    (tmp_path / "sweep.toml").write_text(SWEEP.replace("SOURCE", str(source)))
    program("ppx-convert", source, "--recipe", "8bit", "-o", "my-8bit", cwd=tmp_path)
    shorter = {
        "ppx-bench": ["--frames", "3"],
        "ppx-calibrate": ["--frames", "20"],
        "ppx-allocate": ["--tokens", "tokens.safetensors"],
        "--reference": ["--sequences", "1", "--frames", "80"],
        "--listen": ["--pairs", "1"],
    }
    outputs: dict[str, str] = {}
    with running() as hub:
        online = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_writer"}
        online |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        for line in commands_of(README):
            name, *words = shlex.split(line)
            sources = ("nvidia/personaplex-7b-v1", "./my-finetune")
            arguments = [str(source) if word in sources else word for word in words]
            if name == "ppx-convert" and words[0].startswith("--"):
                arguments.insert(0, str(source))
            if "5.3GB" in arguments:
                arguments[arguments.index("5.3GB")] = f"{manifest_of(tmp_path / 'my-bundle').nbytes / 1e6:.1f}MB"
            if "--ray" in arguments and find_spec("ray") is None:
                place = arguments.index("--ray")
                del arguments[place : place + 2]
            for key, more in shorter.items():
                arguments += more if key in (name, *words) else []
            environment = online if name == "ppx-publish" else {"HOME": str(tmp_path / "home")}
            outputs[line] = program(name, *arguments, cwd=tmp_path, environment=environment).stdout
        assert hub.repositories["me/personaplex-4bit"].private
    assert manifest_of(tmp_path / "my-bundle").recipe.name == "4bit-g64"
    assert list((tmp_path / "home").rglob("me/personaplex-4bit/voices/NATF2.safetensors"))
    assert soundfile.info(tmp_path / "answer.wav").duration == pytest.approx(0.4, abs=0.01)
    assert (tmp_path / "my-bundle" / "parity" / "report.html").is_file()
    assert shipped.load(str(tmp_path / "mine.toml")).depformer_steps == 8
    assert (tmp_path / "mine.svg").read_text().startswith(("<svg", "<?xml"))
    assert (tmp_path / "results" / "index.html").is_file()
    assert len(list(tmp_path.glob("*.html"))) == 1
    assert all(output for output in outputs.values())


def test_the_command_for_the_real_checkpoint_runs(source, program, tmp_path):
    (line,) = commands_of(PAGES["real-checkpoint.md"])
    here = {
        "nvidia/personaplex-7b-v1": source,
        "tests/data/speech.flac": ROOT / "tests" / "data" / "speech.flac",
    }
    for command in line.split(" && "):
        name, *words = shlex.split(command)
        output = program(name, *(here.get(word, word) for word in words), cwd=tmp_path).stdout
    assert "what 8 bit loses" in output
    assert (tmp_path / "real-4bit" / "parity" / "report.md").is_file()


def test_the_commands_of_the_sweeps_page_are_commands(monkeypatch, tmp_path):
    """Sweeps themselves, with and without a cluster, have tests of their own."""
    monkeypatch.chdir(tmp_path)
    calls: list[tuple[object, ...]] = []

    def planned(file):
        calls.append((file, "dry run"))
        return None, None

    monkeypatch.setattr(sweeps, "dry_run", planned)
    monkeypatch.setattr(sweeps, "sweep", lambda file, output, **options: calls.append((file, output, options)))
    monkeypatch.setattr(sweeps, "fail_if_failed", lambda _: None)
    summary = SimpleNamespace(plan_text=lambda *_, **__: "", result_text=lambda _: "")
    monkeypatch.setattr(program_of_sweeps, "summary", summary)
    for command in commands_of(PAGES["sweeps.md"]):
        name, *arguments = shlex.split(command)
        assert name == "ppx-sweep"
        done = CliRunner().invoke(program_of_sweeps.app, arguments)
        assert done.exit_code == 0, done.output
    file, results = Path("sweep.toml"), Path("results")
    usual = {"ray": None, "storage": None, "keep": "none", "quiet": False}
    assert calls == [
        (file, "dry run"),
        (file, results, usual),
        (file, results, usual | {"ray": "auto", "keep": "best"}),
        (file, results, usual | {"ray": "10.0.0.5:6379", "storage": "s3://bucket/sweep"}),
    ]
