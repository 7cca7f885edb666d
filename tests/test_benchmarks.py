"""What the benchmarks share: how a process is measured, and what is printed of it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

MIB = 1 << 20


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")


def test_memory_is_that_of_the_process_alone():
    """Also where the one that measures is larger: a process begins with the memory of the one that starts it."""
    from processes import run

    ballast = np.ones(256 * MIB, np.uint8)
    nothing = run([sys.executable, "-S", "-c", "pass"])
    something = run([sys.executable, "-S", "-c", f"held = b'x' * {128 * MIB}; print(len(held))"])
    assert nothing.memory < 100 * MIB < len(ballast)  # a bare Python takes about 10 MiB
    assert 128 * MIB <= something.memory < 228 * MIB
    assert something.output == f"{128 * MIB}\n"
    assert something.seconds > 0


def test_a_process_that_fails_ends_a_benchmark():
    from processes import run

    with pytest.raises(SystemExit, match="ended with 3"):
        run([sys.executable, "-S", "-c", "raise SystemExit(3)"])
    assert run([sys.executable, "-S", "-c", "raise SystemExit(3)"], allowed=(3,)).output == ""


def test_no_column_of_the_conversions_table_is_empty():
    from conversion import table

    head, *rows = table({"plain copy": [(2.0, 1.0, -1e5)], "rtn": [(3.0, 1.5, -1e6), (5.0, 2.5, 1e9)]}).splitlines()
    assert head.split() == ["seconds", "/", "copy", "peak", "memory", "above", "imports"]
    assert rows[0].split() == ["plain", "copy", "2.0", "1.00", "0.00", "GiB"]
    assert rows[1].split() == ["rtn", "4.0", "2.00", "0.47", "GiB"]


def test_calibration_frames_are_as_many_as_were_asked_for(pico, tmp_path):
    from calibration import some_frames
    from ppx.convert.source.source import locate, open_source
    from ppx.model.tokens import read_token_file
    from safetensors.numpy import save_file

    path = pico / "calibration_tokens.safetensors"
    with open_source(locate(str(pico))) as source:
        whole = some_frames(source, [path], None).tokens
        for frames, shape in {100: (1, 100), 500: (2, 250), 700: (3, 233)}.items():
            few = some_frames(source, [path], frames).tokens
            assert few.shape == (shape[0], whole.shape[1], shape[1])
            step = len(whole) // shape[0]
            assert (few == whole[::step][: shape[0], :, : shape[1]]).all()
        short = tmp_path / "short.safetensors"
        save_file({"tokens": read_token_file(path, source.architecture)[:2, :, :50].copy()}, short)
        both = some_frames(source, [path, short], None)
    assert both.undelayed is not None
    assert both.undelayed.shape == (len(whole) + 2, whole.shape[1], 50)


def test_the_curve_of_calibration_frames_is_drawn_for_every_model(tmp_path):
    from calibration import draw, table

    row = {"text": 0.001, "codebook_0": 0.02, "agent": 0.01, "agreement": 0.9, "seconds": 3.2, "frames": 500}
    for model in ("first", "second"):
        for name in ("4-bit-lsq", "1-frames-per-column", "0.25-frames-per-column"):
            agent = 0.02 if name == "4-bit-lsq" else 0.01 * len(name)
            (tmp_path / f"{model}+{name}.json").write_text(json.dumps({**row, "agent": agent}))
    draw(tmp_path, tmp_path / "curve.svg")
    drawn = (tmp_path / "curve.svg").read_text()
    assert drawn.count("first, gptq") == drawn.count("second, gptq") == 1
    assert "first, mse (no data)" in drawn
    assert table({"4 bit, lsq": row}).splitlines()[-1] == "| 4 bit, lsq | 500 | 0.0010 | 0.0200 | 0.0100 | 0.900 | 3 |"


def test_figures_of_the_reference_against_itself_are_zero(pico):
    from calibration import figures
    from ppx.convert.source.source import locate, open_source
    from ppx.model.reference import reference_of
    from ppx.model.tokens import read_tokens

    with open_source(locate(str(pico))) as source:
        held = read_tokens(pico / "heldout_tokens.safetensors", source.architecture, 5, 12)
        reference = reference_of(source.checkpoint)
        found = figures(reference, reference, held)
        assert found == {"text": 0, "codebook_0": 0, "agent": 0, "agreement": 1}
        louder = replace(reference, weights=lambda name, step: 1.1 * reference.weights(name, step))
        found = figures(louder, reference, held)
        assert min(found["text"], found["codebook_0"], found["agent"]) > 0
        assert found["agreement"] < 1


def test_the_sweeps_of_the_benchmark_are_sweeps(pico, tmp_path):
    from ppx.verify.sweeping.cells import cells_of
    from ppx.verify.sweeping.sweep_file import read
    from sweep import Run, sweep_file, text

    for cells in (2, 24):
        (tmp_path / "sweep.toml").write_text(sweep_file(pico, cells, 24))
        assert len(cells_of(read(tmp_path / "sweep.toml"))) == cells
    said = text(Run(60.0, [10.0] * 6, 1 << 30), Run(40.0, [12.0] * 6, 3 << 30), 2).splitlines()
    assert said[3:] == [
        "speed-up 1.50",
        "Ray adds 1.33 s of a worker to a cell, its start included",
        "a cell takes 1.20 times its time alone",
        "memory 3.00 times that of one process",
    ]


def test_processes_are_timed_beside_one():
    from gptq_gpus import line

    each = [
        {"seconds": 4.0, "gpu": 3 << 29, "resident": 1 << 30},
        {"seconds": 5.0, "gpu": 1 << 30, "resident": 1 << 29},
    ]
    assert line(2, 5.0, 1.5, 1.8, each) == (
        "2 processes: 5.0 s, 1.80 times as fast; 1.5 s to start; GiB of each: GPU 1.50, 1.00; resident 1.00, 0.50"
    )


def test_the_picture_of_recipes_has_a_point_and_a_name_for_each(tmp_path):
    from fidelity import draw_recipes

    draw_recipes(
        {"4 bit, rtn": {"agent": 0.06}, "4 bit, lsq": {"agent": 0.05}, "8bit, lsq": {"agent": 2e-4}}, tmp_path / "a.svg"
    )
    picture = (tmp_path / "a.svg").read_text()
    for label in (">4bit, plain rounding<", ">4bit<", ">8bit<", "(computed)"):
        assert picture.count(label) == 1, label
    shown = (Path(__file__).parent.parent / "docs" / "recipes.svg").read_text()
    for name in ("4bit", "5bit", "6bit", "8bit", "4bit-depformer16", "moshi-q4", "moshi-q8", "mixed"):
        assert f">{name}<" in shown, name  # README's picture has every recipe that quantizes
