"""Sources, their adapters and bundles are closed again: by programs, by the library's errors, and by ``with``."""

import json
import os

import numpy as np
import pytest
from ppx.convert import preparation
from ppx.convert.bundle.recipe import uniform
from ppx.convert.errors import UserError
from ppx.convert.file_names import CODEC, WEIGHTS
from ppx.convert.source.source import locate, open_source
from ppx.convert.tensorfile import TensorFile
from ppx.quant.affine import QuantizationConfig
from ppx.recipes.cli import calibrate, convert, verify
from safetensors.numpy import save_file
from typer.testing import CliRunner

LAYER = "transformer.layers.0.self_attn"


def open_below(*folders):
    """Return the names of files in some folders that this process has open."""
    names = {
        (found.st_dev, found.st_ino): path.name
        for folder in folders
        for path in folder.rglob("*")
        if (found := path.stat()) and path.is_file()
    }
    held = []
    for descriptor in range(1024):
        try:
            found = os.fstat(descriptor)
        except OSError:
            continue
        held.append(names.get((found.st_dev, found.st_ino)))
    return sorted(name for name in held if name)


def adapter(folder, rank):
    """Write an adapter of one matrix of rank 2; rank: what its config.json gives."""
    sides = {"lora_A": np.ones((2, 256), np.float32), "lora_B": np.ones((256, 2), np.float32)}
    named = {f"{LAYER}.out_projs.0.{side}.weight": array for side, array in sides.items()}
    save_file(named, folder / "lora.safetensors")
    (folder / "config.json").write_text(json.dumps({"lora_rank": rank}))
    return str(folder / "lora.safetensors")


def test_a_source_is_open_within_its_with_only(pico, tmp_path):
    with preparation.open_merged(locate(str(pico)), adapter(tmp_path, 2), quiet=True) as source:
        assert open_below(pico, tmp_path) == ["lora.safetensors", WEIGHTS]
        fewer = preparation.trimmed(source, 8)
        assert fewer.checkpoint.read("out_norm.alpha", 0, 1).size
    assert open_below(pico, tmp_path) == []
    with pytest.raises(UserError, match=f"{WEIGHTS}: not readable"):
        fewer.checkpoint.read("out_norm.alpha", 0, 1)
    source.close()  # which may be done again


def test_what_cannot_be_opened_or_planned_is_closed(pico, pico_copy, tmp_path):
    (pico_copy / CODEC).write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        open_source(locate(str(pico_copy)))
    location = locate(str(pico))
    with pytest.raises(UserError, match="where rank 3 makes it"):
        preparation.open_merged(location, adapter(tmp_path, 3), quiet=True)
    with pytest.raises(UserError, match="groups of 128"):
        preparation.prepare(location, uniform(QuantizationConfig(4, 128), "mlx", "bfloat16", ("temporal",)))
    assert open_below(pico, tmp_path) == []


def test_programs_close_what_they_open(pico, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokens = pico / "heldout_tokens.safetensors"
    for program, *arguments in (
        (convert, pico, "--dry-run"),
        (convert, pico, "--no-verify", "-o", "out"),
        (verify, "out", "--reference", pico, "--tokens", tokens, "--sequences", 1, "--frames", 4),
        (calibrate, pico, "--tokens", tokens, "-o", "some.safetensors"),
    ):
        done = CliRunner().invoke(program.app, [str(argument) for argument in arguments])
        assert done.exit_code in (0, 1), done.output  # 4 frames are too few to pass or fail a bundle by
        assert open_below(pico, tmp_path) == []


def test_a_file_that_nobody_closed_is_named(pico):
    """Every test of this suite so tells of one: warnings are errors in it."""
    with pytest.warns(ResourceWarning, match=f"{WEIGHTS}: was not closed"):
        TensorFile(pico / WEIGHTS)
    assert open_below(pico) == []
