"""What contributors rely on: the architecture page, the contributor's guide, and files that other programs read."""

import re
import tomllib
from pathlib import Path

import architecture
import pytest
import yaml
from architecture import ROOT
from ppx.convert.bundle.targets import TARGETS
from ppx.quant.affine import METHOD_NAMES

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS_OF_MAKE = set(re.findall(r"^(\w+):", MAKEFILE, re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "tests" / "data" / "README.md"]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
GUIDES = [ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md", ROOT / "RELEASING.md"]


def test_the_picture_is_drawn_from_the_imports_of_today():
    assert architecture.PICTURE.read_text() == architecture.draw(), "draw it again: make picture"


def test_the_picture_changes_with_the_imports(monkeypatch):
    before = architecture.draw()
    monkeypatch.setattr(architecture, "arrows", lambda: {"convert": {"quant"}})
    assert architecture.draw().count("imports") < before.count("imports")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_links_to_functions_name_what_is_there(page):
    for name, target in re.findall(r"\[`([\w.]+)`\]\(([^)]+\.py)\)", page.read_text()):
        defined = re.findall(r"^ *(?:def|class) (\w+)", (page.parent / target).read_text(), re.MULTILINE)
        assert name == Path(target).name or set(name.split(".")) <= {*defined}, f"{name} in {target}"


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_paths_and_commands_of_the_guides_are_there(page):
    text, folders = page.read_text(), "|".join((*architecture.ORDER, "tests", "docs", "benchmarks"))
    for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", text):
        assert (ROOT / name).exists() or "NAME" in name, name
    assert set(re.findall(r"(?:`|^|; )make (\w+)", text, re.MULTILINE)) <= TARGETS_OF_MAKE


def test_every_target_and_method_is_documented():
    readme, recipes = (ROOT / "README.md").read_text(), (ROOT / "docs" / "recipes.md").read_text()
    for target in TARGETS:
        assert f"| `{target}`" in readme, target
    for method in METHOD_NAMES:
        assert f"- `{method}`" in recipes, method


def test_workflows_call_the_makefile_on_both_systems_with_the_oldest_and_the_newest_python():
    workflows = [yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")]
    assert workflows
    commands = []
    for job in (job for workflow in workflows for job in workflow["jobs"].values()):
        matrix = job["strategy"]["matrix"]
        assert {system.partition("-")[0] for system in matrix["system"]} == {"ubuntu", "macos"}
        assert PROJECT["project"]["requires-python"] == f">={matrix['python'][0]}"
        commands += [step["run"] for step in job["steps"] if "run" in step]
        assert all("run" in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in job["steps"])
    assert {"make test PYTHON=python", "make demo PYTHON=python"} == set(commands)
    assert {command.split()[1] for command in commands} <= TARGETS_OF_MAKE


def test_commit_hooks_are_the_makefiles_lint():
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    parts = re.search(r"^lint: (.*)$", MAKEFILE, re.MULTILINE)
    assert parts
    assert [hook["entry"] for hook in hooks] == [f"make {part}" for part in parts[1].split()]
    assert set(parts[1].split()) <= TARGETS_OF_MAKE
    for tool in ("ruff check", "ruff format --check", "mypy"):
        assert f"$(BIN)/{tool}" in MAKEFILE


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name
)
def test_issue_forms_are_forms(path: Path):
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert form == {"blank_issues_enabled": True}
        return
    assert form["name"]
    assert form["description"]
    kinds = {"textarea", "input", "dropdown", "markdown", "checkboxes"}
    assert all(field["type"] in kinds and field["attributes"]["label"] for field in form["body"])
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    programs = set(re.findall(r"\bppx-[a-z]+", path.read_text()))
    assert programs <= set(PROJECT["project"]["scripts"])


def test_every_file_of_the_test_data_has_an_origin_and_a_license():
    data = ROOT / "tests" / "data"
    page = (data / "README.md").read_text()
    rows = [row.split("|")[1:-1] for row in page.splitlines() if row.startswith("| `")]
    assert all(len(row) == 3 and all(cell.strip() for cell in row) for row in rows)
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row[0])]
    files = [path for path in data.rglob("*") if path.is_file() and path.name != "README.md"]
    for path in files:
        assert sum(path.relative_to(data).match(name) for name in named) == 1, path
    for name in named:
        assert any(path.relative_to(data).match(name) for path in files), name


def test_the_changelog_is_dated():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0].startswith("Unreleased")
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", heading) for heading in headings[1:])
    assert headings[1].split()[0] == PROJECT["project"]["version"]
