"""The library does what the programs do: the same defaults, quietly, and imported only where it is used."""

import ast
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from ppx.convert import CheckFailed, UserError, convert, make_recipe, open_conversion
from ppx.convert.bundle import shipped
from ppx.convert.bundle.recipe_choice import DEFAULT_RECIPE
from ppx.verify import write_card

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "python.md").read_text()
PACKAGES = ("convert", "speak", "calibrate", "verify")
_PARTS = re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)[1:]
SECTIONS = dict(zip(_PARTS[::2], _PARTS[1::2], strict=True))


def snippets(*sections: str) -> list[str]:
    return [code for name in sections for code in re.findall(r"```python\n(.*?)```", SECTIONS[name], re.DOTALL)]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_section_of_the_page_is_tested():
    assert list(SECTIONS) == ["Convert", "Verify", "Compare", "Quantize with data", "Publish", "Speak", "Listen"]


@pytest.mark.slow
def test_the_pages_notebook_runs(pico, tmp_path):
    """Convert, verify, compare and quantize with data, one after the other; on pico, as it is quicker."""
    (tmp_path / "pico").symlink_to(pico)
    code = re.sub(r"""(["'])demo["']""", r"\1./pico\1", "\n".join(snippets(*list(SECTIONS)[:4])))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"\d\.\d\d bits per weight", lines[0])
    assert lines[1] == "my-4bit 24 files"
    assert lines[2] == "intact"
    assert "verdict" in done.stdout
    assert "expected divergence" in lines[-1]
    assert "calibration tokens are scarce" in done.stderr
    for name in ("my-4bit", "my-8bit", "my-gptq", "my-5bpw"):
        assert (tmp_path / name / "manifest.json").is_file()
    assert (tmp_path / "my-4bit" / "README.md").is_file()
    assert shipped.load(str(tmp_path / "small.toml")).rules


@pytest.mark.parametrize(("section", "function", "module"), [
    ("Publish", "publish", "ppx.verify.publishing.gate"), ("Speak", "answer", "ppx.speak.answers"),
    ("Listen", "listen", "ppx.verify.listening")
])  # fmt: skip
def test_the_pages_calls_are_calls_of_their_functions(section, function, module, monkeypatch):
    """What needs a token or a codec is only looked at: names and arguments are right."""
    import inspect

    real, calls = getattr(import_module(module), function), []

    def called(*arguments, **options):
        calls.append(inspect.signature(real).bind(*arguments, **options))
        return type("Done", (), {"text": ""})

    monkeypatch.setattr(import_module(module), function, called)
    (code,) = snippets(section)
    exec(code, {})
    assert len(calls) == 1


def test_the_library_writes_what_the_program_writes(program, pico, tmp_path, monkeypatch, capfd):
    """With nothing said but the source: the same files, to the byte, and nothing printed."""
    monkeypatch.chdir(tmp_path)
    program("ppx-convert", pico, "-o", "by-program", cwd=tmp_path)
    capfd.readouterr()
    done = convert(pico, "by-library")
    write_card("by-library")
    assert capfd.readouterr() == ("", "")
    assert done.files_written == len(done.manifest.files)
    assert tree(tmp_path / "by-library") == tree(tmp_path / "by-program")
    assert convert(str(pico)).folder.name == f"pico-speech-swift-{DEFAULT_RECIPE}"


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"bits": 3}, ("--bits", "3")),
        ({"quantize": False, "target": "mlx"}, ("--no-quantize", "--target", "mlx")),
        (
            {"name": "mixed", "dtype": "float16", "method": "rtn"},
            ("--recipe", "mixed", "--dtype", "float16", "--method", "rtn"),
        ),
        ({"name": "bf16", "depformer_steps": 8}, ("--recipe", "bf16", "--depformer-steps", "8")),
    ],
    ids=str,
)
def test_recipes_of_the_library_are_those_of_the_program(settings, options, program, pico, tmp_path):
    said = json.loads(program("ppx-convert", pico, *options, "--dry-run", "--json", cwd=tmp_path).stdout)
    from ppx.convert import plan

    made = plan(pico, make_recipe(**settings))
    assert {file.name: file.nbytes for file in made.files} == said["files"]
    assert (made.recipe.name, made.target.name, made.recipe.dtype) == (said["recipe"], said["target"], said["dtype"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "4bit", "bits": 4}, "contradict"),
        ({"bits": 4, "quantize": False}, "contradict"),
        ({"group_size": 64}, "no effect without bits"),
        ({"quantize": False, "method": "rtn"}, "quantizes nothing takes no method"),
        ({"bits": 7, "group_size": 5}, "bits is 7: use one of 2, 3, 4, 5, 6, 8\ngroup_size is 5"),
        ({"bits": 4, "method": "awq"}, "method is 'awq': use one of mse, rtn, gptq"),
    ],
)
def test_settings_that_mean_no_recipe(settings, message):
    with pytest.raises(UserError, match=message):
        make_recipe(**settings)


def test_a_quantizer_is_for_recipes_that_need_one(pico, tmp_path):
    from ppx.calibrate import quantizer_for

    with pytest.raises(UserError, match="needs calibration tokens, but no quantizer is given"):
        convert(pico, tmp_path / "out", make_recipe(bits=4, method="gptq"))
    with pytest.raises(UserError, match="are for the method gptq"):
        convert(pico, tmp_path / "out", quantizer=quantizer_for())
    with pytest.raises(UserError, match="nothing: no such file"):
        quantizer_for("nothing")
    assert list(tmp_path.iterdir()) == []


def test_an_open_conversion_closes_its_source(pico, tmp_path):
    recipe = make_recipe(bits=4)
    with open_conversion(pico, tmp_path / "out", recipe) as conversion:
        assert not conversion.needs_data(recipe)
        assert conversion.needs_data(recipe.with_method("gptq"))
        weights = conversion.source.checkpoint
    with pytest.raises(UserError, match="not readable"):
        weights.read("out_norm.alpha", 0, 1)
    assert issubclass(CheckFailed, Exception)


def imported_by(code: str) -> set[str]:
    """The libraries that some code imports, by the names under which they are installed."""
    show = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_is_cheap(package):
    assert not imported_by(f"import ppx.{package}") & {"torch", "mlx", "huggingface_hub", "numba", "numpy", "typer"}


def test_a_plan_imports_no_network_client():
    code = (
        "from ppx.convert import make_recipe\n"
        "from ppx.convert.bundle.plan import inventory_of_7b, make_plan\n"
        "assert make_plan(inventory_of_7b('x/y'), make_recipe(bits=4)).nbytes"
    )
    found = imported_by(code)
    assert "numpy" in found
    assert not found & {"huggingface_hub", "httpx", "httpx2", "requests", "urllib3", "torch", "mlx", "typer"}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_package_offers_is_there(package):
    """Each name is what type checkers are told that it is."""
    module = import_module(f"ppx.{package}")
    syntax = ast.parse(Path(str(module.__file__)).read_text())
    block = next(node for node in syntax.body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(told) == sorted(module.__all__)
    for name, home in told.items():
        assert getattr(module, name) is getattr(import_module(f"ppx.{package}.{home}"), name)
        assert name in dir(module)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018
