import hashlib
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ppx.convert.errors import UserError
from ppx.convert.source.architecture import from_config, read_config
from ppx.convert.source.checkpoint import open_checkpoint
from ppx.convert.source.source import fingerprint, locate, open_source
from safetensors.torch import load_file, save_file


@pytest.fixture
def architecture(pico):
    return from_config(read_config(pico / "config.json"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a source in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def test_everything_that_does_not_fit_is_listed_at_once(pico_copy, architecture):
    def change(tensors):
        tensors["surprise.weight"] = tensors.pop("out_norm.alpha")
        tensors["emb.3.weight"] = tensors["emb.3.weight"][:, :128]
        tensors["emb.4.weight"] = tensors["emb.4.weight"].double()
        del tensors["linears.15.weight"]

    rewrite(pico_copy, change)
    with pytest.raises(UserError) as caught:
        open_checkpoint(pico_copy / "model.safetensors", architecture)
    lines = [str(problem) for problem in caught.value.problems]
    assert "surprise.weight: unknown, no part of this architecture claims it" in lines
    assert "out_norm.alpha: missing" in lines
    assert "linears.15.weight: missing" in lines
    assert "emb.3.weight: shape [129, 128], where config.json makes it [129, 256]" in lines
    assert "emb.4.weight: dtype F64, where one of BF16, F16, F32 is needed" in lines
    assert len(lines) == 6


def test_a_config_of_another_size_is_noticed(pico):
    config = json.loads((pico / "config.json").read_text()) | {"num_layers": 3}
    with pytest.raises(UserError, match=r"transformer\.layers\.2\.norm1\.alpha: missing"):
        open_checkpoint(pico / "model.safetensors", from_config(config))


def test_values_that_are_not_finite_are_all_named(pico_copy):
    path = pico_copy / "model.safetensors"
    with open_source(locate(str(pico_copy))) as source:
        with path.open("r+b") as file:
            for name, word in (("emb.2.weight", 0x7FC0), ("text_linear.weight", 0xFF80), ("out_norm.alpha", 0x7F80)):
                file.seek(source.checkpoint.file.offsets[name] + 64)
                file.write(struct.pack("<H", word))
        with pytest.raises(UserError) as caught:
            fingerprint(source)
    named = {problem.place for problem in caught.value.problems}
    assert named == {"emb.2.weight", "text_linear.weight", "out_norm.alpha"}
    assert all("1 values are NaN or infinite" in problem.message for problem in caught.value.problems)


def test_fingerprints_are_those_of_the_files(pico):
    with open_source(locate(str(pico))) as source:
        fingerprints = fingerprint(source)
    for name, found in fingerprints.items():
        data = (pico / name).read_bytes()
        assert (found.size, found.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def base_moshi(folder: Path) -> None:
    """Make a source an 8-step one, as base Moshi is."""

    def change(tensors):
        for name in list(tensors):
            parts = name.split(".")
            numbered = {"linears": 8, "depformer_in": 8, "depformer_emb": 7}
            if (parts[0] in numbered and int(parts[1]) >= numbered[parts[0]]) or (
                parts[0] == "depformer" and parts[3] == "gating" and int(parts[4]) >= 8
            ):
                del tensors[name]
            elif parts[0] == "depformer" and parts[3] == "self_attn":
                tensors[name] = tensors[name][: len(tensors[name]) // 2].clone()

    rewrite(folder, change)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dep_q": 8}))


@pytest.mark.slow
def test_eight_steps_are_refused_unless_filling_is_asked_for(pico_copy, program, tmp_path):
    original = load_file(pico_copy / "model.safetensors")
    base_moshi(pico_copy)
    done = program("ppx-convert", pico_copy, "-o", "out", cwd=tmp_path, status=2)
    assert "--fill-depformer-steps copies steps 0-7 to 8-15" in done.stderr
    assert not list(tmp_path.glob("out*"))

    with open_source(locate(str(pico_copy)), fill_depformer_steps=True) as source:
        checkpoint = source.checkpoint
        read = {name: checkpoint.read(name, 0, tensor.spec.rows) for name, tensor in checkpoint.tensors.items()}
        across = checkpoint.read("depformer.layers.0.self_attn.out_proj.weight", 500, 530)

    def expected(name):
        return original[name].reshape(-1, original[name].shape[-1]).view(torch.uint16).numpy()

    def bits(array):
        return array.view(np.uint16)

    np.testing.assert_array_equal(bits(read["linears.11.weight"]), expected("linears.3.weight"))
    np.testing.assert_array_equal(bits(read["depformer_emb.14.weight"]), expected("depformer_emb.6.weight"))
    np.testing.assert_array_equal(bits(read["depformer_emb.6.weight"]), expected("depformer_emb.6.weight"))
    assert not read["depformer_emb.7.weight"].any()
    stacked = expected("depformer.layers.1.self_attn.in_proj_weight")
    half = stacked[: len(stacked) // 2]
    np.testing.assert_array_equal(
        bits(read["depformer.layers.1.self_attn.in_proj_weight"]), np.concatenate([half, half])
    )
    whole = read["depformer.layers.0.self_attn.out_proj.weight"]
    np.testing.assert_array_equal(bits(across), bits(whole[500:530]))

    done = program("ppx-convert", pico_copy, "--fill-depformer-steps", "-o", "out", cwd=tmp_path)
    assert re.search(
        r"^depformer steps 0-7 are copied to 8-15, in \d+ tensors; .*zeros; see manifest.json$", done.stdout, re.M
    )
    copied_steps = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]["filled"]
    assert copied_steps["linears.11.weight"] == "linears.3.weight"
    assert copied_steps["depformer_emb.7.weight"] == "zeros"
    assert copied_steps["depformer.layers.0.self_attn.in_proj_weight"].endswith("its 8 steps, twice")
    adapter = ("--adapter", pico_copy / "model.safetensors")
    done = program("ppx-convert", pico_copy, "--fill-depformer-steps", *adapter, cwd=tmp_path, status=2)
    assert "an adapter and filled depformer steps do not go together" in done.stderr
