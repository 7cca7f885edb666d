import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from compiling import compile_kernels
from ppx.convert.file_names import CODEC
from ppx.convert.source import demo
from program_server import Programs
from stopping import Moment

SLOW = (  # the slowest first
    "test_verify.py",
    "test_layerwise.py",
    "test_speak.py",
    "test_recorded_voices.py",
    "test_publish.py",
    "test_sabotage.py",
    "test_self_generated.py",
    "test_fuzz.py",
    "test_convert.py",
    "test_hub.py",
    "test_kill.py",
    "test_size_budget.py",
    "test_sweep.py",
    "test_sweep_ray.py",
    "test_adapter.py",
    "test_language_model.py",
    "test_moshi_mlx.py",
    "test_mlx_model.py",
)
DATA = Path(__file__).parent / "data"
PROGRAMS = {
    "ppx-allocate": "ppx.recipes.cli.allocate",
    "ppx-bench": "ppx.recipes.cli.bench",
    "ppx-calibrate": "ppx.recipes.cli.calibrate",
    "ppx-convert": "ppx.recipes.cli.convert",
    "ppx-inspect": "ppx.recipes.cli.inspect",
    "ppx-install": "ppx.recipes.cli.install",
    "ppx-publish": "ppx.recipes.cli.publish",
    "ppx-speak": "ppx.recipes.cli.speak",
    "ppx-sweep": "ppx.recipes.cli.sweep",
    "ppx-verify": "ppx.recipes.cli.verify",
    "ppx-voice": "ppx.recipes.cli.voice",
}


def pytest_configure(config: pytest.Config) -> None:
    """Compile the quantizer before workers start."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        compile_kernels()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--source", type=Path, help="a source folder with golden files, tested as pico is")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the tests away from the user's caches, tokens and the network."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setenv("HF_HOME", str(cache / "hub"))
        patch.delenv("HF_TOKEN", raising=False)
        yield cache


@pytest.fixture(scope="session")
def pico(request: pytest.FixtureRequest) -> Path:
    """The folder of the small trained model, or of another one with golden files that --source names."""
    source: Path | None = request.config.getoption("--source")
    return source.resolve() if source else DATA / "pico"  # programs run in folders of their own


@pytest.fixture
def pico_copy(pico: Path, tmp_path: Path) -> Path:
    """Pico in a folder that a test may damage."""
    target = tmp_path / "pico"
    shutil.copytree(pico, target, ignore=shutil.ignore_patterns("golden", "*_tokens.safetensors"))
    return target


@pytest.fixture(scope="session")
def layout() -> Callable[[str], Any]:
    return lambda name: json.loads((DATA / "layouts" / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def codec(own_cache: Path) -> Path:
    """A file of Mimi's names and shapes with random weights, 385 MB: that of the demo which has one, made once."""
    path = demo.cached("demo:audio", quiet=True) / CODEC
    assert path.is_relative_to(own_cache)
    return path


@pytest.fixture(scope="session")
def program(own_cache: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Run one of the programs as a user does; returns the finished process.

    ppx-convert verifies only where a test says --verify: it takes seconds.
    """
    usual = os.environ | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(own_cache)}
    programs = Programs(usual)

    def run(
        name: str,
        *arguments: object,
        cwd: Path,
        status: int = 0,
        environment: dict[str, str] | None = None,
        stop: tuple[Moment, int] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        if name == "ppx-convert" and "--verify" not in arguments:
            arguments = (*arguments, "--no-verify")
        environment = usual | (environment or {})
        done = programs.run(PROGRAMS[name], [str(argument) for argument in arguments], cwd, environment, stop)
        assert done.returncode == status, f"{done.args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    yield run
    programs.close()


@pytest.fixture(scope="session")
def bundle(program: Callable[..., object], pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of pico converted with some options; made once a session for each."""
    made: dict[tuple[str, ...], Path] = {}

    def convert(*options: str) -> Path:
        if options not in made:
            folder = tmp_path_factory.mktemp("bundles")
            program("ppx-convert", pico, *options, "--output", "bundle", cwd=folder)
            made[options] = folder / "bundle"
        return made[options]

    return convert


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the files that take longest come first, so that no worker is left with one of them at the end."""
    order = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    for item in items:
        if item.path.name in SLOW:
            item.add_marker(pytest.mark.slow)
