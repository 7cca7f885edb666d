"""What becomes of a conversion whose model overflows: hours of work must not end in a traceback."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from ppx.calibrate import self_generated
from ppx.calibrate.dataset import quantizer_of
from ppx.calibrate.parameters import take_step
from ppx.calibrate.quantized_model import quantized_rows
from ppx.convert import preparation
from ppx.convert.bundle.build import build
from ppx.convert.bundle.plan import make_plan
from ppx.convert.bundle.quantized_store import QuantizedStore, quantizations_of
from ppx.convert.bundle.recipe import uniform
from ppx.convert.errors import UserError
from ppx.convert.source.source import locate, open_source
from ppx.quant.affine import QuantizationConfig
from safetensors.numpy import load_file, save_file

FORM = QuantizationConfig(4, 64, "gptq")
BROKEN = "transformer.layers.1.gating.linear_in.weight"
AFTER = "transformer.layers.1.gating.linear_out.weight"
STACKED = "depformer.layers.0.self_attn.in_proj_weight"  # of all depformer steps


@pytest.fixture
def overflowing(pico):
    """Pico with a layer whose products overflow float32, as activations in 16 bit do in models that are sound."""
    with open_source(locate(str(pico))) as source:

        def altered(_, __, weights):
            return weights.astype(np.float32) * 1e25

        checkpoint = source.checkpoint.with_adapter(altered, [BROKEN], source.checkpoint.file)
        yield replace(source, checkpoint=checkpoint)


@pytest.mark.slow
def test_a_model_that_overflows_is_converted_and_what_was_done_is_told(overflowing, pico, tmp_path, capsys):
    tokens = load_file(pico / "calibration_tokens.safetensors")["tokens"][:2, :, :30].copy()
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    plan = make_plan(
        preparation.inventory(overflowing), uniform(FORM, "speech-swift", "float16", ("temporal", "depformer"))
    )
    weights = sum(output.shape[0] * output.shape[1] for output in plan.outputs if output.quantization)
    quantizer = quantizer_of(overflowing, plan, tmp_path / "tokens.safetensors", 2, quiet=True, memory=20 * weights)
    adjusted = {}

    def solve(store):
        quantizer.quantize(store)
        adjusted.update(store.adjusted)
        with QuantizedStore(store.folder, store.mark) as resumed:
            assert resumed.adjusted == adjusted

    watched = type(quantizer)(quantizer.record, solve)
    build(overflowing, plan, tmp_path / "out", quiet=True, quantizer=watched)

    said = capsys.readouterr().err.splitlines()
    translate_errors = f"{AFTER}: moments are not finite: quantized by its weights alone (lsq)"
    assert translate_errors in said
    assert f"{STACKED} step 0: moments are not finite: quantized by its weights alone (lsq)" in said
    assert "fine-tuning: 2 of 2 steps were skipped: predictions are not finite" in said
    assert (AFTER, 0) in adjusted
    assert (BROKEN, 0) not in adjusted  # its own inputs are sound
    assert {name for name, _ in adjusted} > {STACKED, "depformer_in.15.weight"}
    assert len(adjusted) < len(quantizations_of(plan.outputs))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    entries = {entry["source"]: entry for entry in manifest["tensors"] if "source" in entry}
    reason = {"method": "lsq", "reason": "moments are not finite"}
    assert entries[AFTER]["adjusted"] == [{"step": None, **reason}]
    stacked = entries[STACKED]["adjusted"]
    assert stacked == [{"step": step, **reason} for step in range(16)]
    assert "adjusted" not in entries["transformer.layers.0.self_attn.in_proj_weight"]
    assert all(entry["relative_rmse"] < 0.2 for entry in entries.values() if "adjusted" in entry)


def test_a_model_that_overflows_generates_no_sequences(overflowing):
    with pytest.raises(UserError, match="predictions are not finite in float32, so it cannot generate sequences"):
        self_generated.generate(overflowing, 2, 2, quiet=True)


def test_a_table_that_cannot_be_quantized_is_named(pico):
    """GPTQ reads it, through what it quantizes by its weights alone."""
    table = "text_emb.weight"
    with open_source(locate(str(pico))) as source:

        def altered(_, __, weights):
            return np.resize(np.array([3e38, -3e38], np.float32), weights.shape)

        broken = replace(source, checkpoint=source.checkpoint.with_adapter(altered, [table], source.checkpoint.file))
        read = quantized_rows(broken, {(table, 0): (replace(FORM, method="lsq"), "BF16")})
        with pytest.raises(UserError, match=f"{table} at 4 bit .*too far apart: give a recipe that keeps it float"):
            read(table, np.zeros((1, 1), np.int32))


def test_a_gradient_that_is_not_finite_moves_nothing():
    """Its loss can be finite: a norm divides what overflows by infinity."""
    moved = torch.zeros(2, requires_grad=True)
    adam = torch.optim.Adam([moved], lr=0.1)
    loss = (moved.sqrt() * 0).sum()
    assert loss.item() == 0
    assert not take_step(adam, loss)
    assert not take_step(adam, moved.sum() * torch.inf)
    assert moved.tolist() == [0, 0]
    assert take_step(adam, moved.sum())
    assert moved.tolist() == pytest.approx([-0.1, -0.1])
