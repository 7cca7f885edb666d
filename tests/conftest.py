import json
import os
import shutil
from pathlib import Path

import pytest
from ppx.convert import demo
from ppx.convert.source import CODEC
from program_server import Programs

LONGEST = (
    "test_speak.py",
    "test_solving.py",
    "test_allocate.py",
    "test_promises.py",
    "test_publish.py",
    "test_verify.py",
    "test_convert.py",
    "test_kill.py",
)
DATA = Path(__file__).parent / "data"
PROGRAMS = {
    "ppx-allocate": "ppx.recipes.allocate_program",
    "ppx-bench": "ppx.recipes.bench_program",
    "ppx-calibrate": "ppx.recipes.calibrate_program",
    "ppx-convert": "ppx.recipes.convert_program",
    "ppx-inspect": "ppx.recipes.inspect_program",
    "ppx-publish": "ppx.recipes.publish_program",
    "ppx-speak": "ppx.recipes.speak_program",
    "ppx-verify": "ppx.recipes.verify_program",
}


def pytest_addoption(parser):
    parser.addoption("--source", type=Path, help="a source folder with golden files, tested as pico is")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep the tests away from the user's caches, tokens and the network."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setenv("HF_HOME", str(cache / "hub"))
        patch.delenv("HF_TOKEN", raising=False)
        yield cache


@pytest.fixture(scope="session")
def pico(request):
    """The folder of the small trained model, or of another one with golden files that --source names."""
    return request.config.getoption("--source") or DATA / "pico"


@pytest.fixture
def pico_copy(pico, tmp_path):
    """Pico in a folder that a test may damage."""
    target = tmp_path / "pico"
    shutil.copytree(pico, target, ignore=shutil.ignore_patterns("golden", "*_tokens.safetensors"))
    return target


@pytest.fixture(scope="session")
def layout():
    return lambda name: json.loads((DATA / "layouts" / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def codec(tmp_path_factory):
    """A file of Mimi's names and shapes with random weights, 385 MB."""
    path = tmp_path_factory.mktemp("codec") / CODEC
    demo.codec(path, whole=True)
    return path


@pytest.fixture(scope="session")
def program(own_cache):
    """Run one of the programs as a user does; returns the finished process.

    ppx-convert verifies only where a test says --verify: it takes seconds.
    """
    programs = Programs({"XDG_CACHE_HOME": str(own_cache)})

    def run(name, *arguments, cwd, status=0, environment=None, stop=None):
        if name == "ppx-convert" and "--verify" not in arguments:
            arguments = (*arguments, "--no-verify")
        environment = os.environ | {"HF_HUB_OFFLINE": "1"} | (environment or {})
        done = programs.run(PROGRAMS[name], [str(argument) for argument in arguments], cwd, environment, stop)
        assert done.returncode == status, f"{done.args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    yield run
    programs.close()


@pytest.fixture(scope="session")
def bundle(program, pico, tmp_path_factory):
    """Return the folder of pico converted with some options; made once a session for each."""
    made = {}

    def convert(*options):
        if options not in made:
            folder = tmp_path_factory.mktemp("bundles")
            program("ppx-convert", pico, *options, "--output", "bundle", cwd=folder)
            made[options] = folder / "bundle"
        return made[options]

    return convert


def pytest_collection_modifyitems(items):
    """Let the files that take longest come first, so that no worker is left with one of them at the end."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
