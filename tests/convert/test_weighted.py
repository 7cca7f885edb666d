"""Which norms weigh the errors of which matrices, and that a conversion does so."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ppx.calibrate.quantized_model import quantized_weights
from ppx.convert import preparation
from ppx.convert.bundle.build import build
from ppx.convert.bundle.output_tensor import Output
from ppx.convert.bundle.plan import Plan, make_plan
from ppx.convert.bundle.quantized_store import QuantizedStore, quantizations_of
from ppx.convert.bundle.recipe import uniform
from ppx.convert.source.source import Source, locate, open_source
from ppx.convert.tensorfile import DTYPES
from ppx.model.reference import reference_of
from ppx.model.weights import source_weights
from ppx.quant.affine import QuantizationConfig, dequantize, quantize
from safetensors.numpy import load_file

NORM = "transformer.layers.0.norm1.alpha"
READERS = {
    NORM: "transformer.layers.0.self_attn.in_proj_weight",
    "depformer.layers.0.norm1.alpha": "depformer.layers.0.self_attn.in_proj_weight",  # of all steps, stacked
}


@pytest.fixture(scope="module")
def source(pico: Path) -> Iterator[Source]:
    """Pico with gains over decades in two norms, which an adapter could have put there."""
    with open_source(locate(str(pico))) as opened:

        def altered(name: str, _: int, values: NDArray[Any]) -> NDArray[Any]:
            spread = 10 ** np.random.default_rng(len(name)).uniform(-2, 1, values.shape)
            return np.asarray(values * spread, np.float32)

        checkpoint = opened.checkpoint.with_adapter(altered, READERS, opened.checkpoint.file)
        yield replace(opened, checkpoint=checkpoint)


def plan_of(source: Source, method: str, target: str = "speech-swift") -> Plan:
    recipe = uniform(QuantizationConfig(4, 64, method), target, "float16", ("temporal", "depformer"))
    return make_plan(preparation.inventory(source), recipe)


def expected(source: Source, output: Output, weighted: bool) -> NDArray[np.uint32]:
    first, last = output.rows
    weight = source.checkpoint.read(output.role.name, first, last)
    importance = None
    if weighted and output.role.norm:
        importance = np.square(source.checkpoint.read(output.role.norm, 0, 1).astype(np.float64).reshape(-1))
    assert output.quantization is not None
    plain = replace(output.quantization, method="lsq")
    return quantize(weight, plain, DTYPES[output.dtype], importance).weight


def test_a_norm_weighs_the_matrices_that_multiply_its_output(pico):
    """In the reference: gains twice as large make exactly the inputs of these twice as large."""
    with open_source(locate(str(pico))) as opened:
        checkpoint = opened.checkpoint
        tokens = np.zeros((1, 1 + checkpoint.architecture.n_q, 3), np.int32)
        read = source_weights(checkpoint)
        kept: dict[tuple[str, int | None], torch.Tensor] = {}

        def inputs(doubled: str) -> dict[str, torch.Tensor]:
            found: dict[str, list[torch.Tensor]] = {}
            model = reference_of(checkpoint)

            def weights(name: str, step: int | None) -> torch.Tensor:
                key = (name, step)
                if key not in kept:
                    kept[key] = read(name, step)
                return kept[key] * 2 if name == doubled else kept[key]

            def hook(name: str, _: int | None, x: torch.Tensor) -> None:
                found.setdefault(name, []).append(x.flatten().clone())  # of each depformer step

            with torch.inference_mode():
                replace(model, weights=weights, input_hook=hook).logits(tokens, tokens)
            return {name: torch.cat(parts) for name, parts in found.items()}

        plain = inputs("")
        assert set(plain) == {role.name for role in of_roles(checkpoint) if role.kind == "linear"}
        for norm in (role.name for role in of_roles(checkpoint) if role.kind == "norm"):
            changed = inputs(norm)
            readers = {name for name, x in plain.items() if torch.equal(changed[name], 2 * x)}
            assert readers == {role.name for role in of_roles(checkpoint) if role.norm == norm}
            assert readers


def of_roles(checkpoint: Any) -> list[Any]:
    return [tensor.role for tensor in checkpoint.tensors.values()]


@pytest.mark.parametrize("target", ["speech-swift", "mlx"])
@pytest.mark.parametrize("method", ["lsq", "lsq_unweighted"])
def test_a_conversion_weighs_errors_by_the_gains_of_the_checkpoint_that_it_reads(method, target, source, tmp_path):
    plan = plan_of(source, method, target)
    build(source, plan, tmp_path / "out", quiet=True)
    entries = {(one["file"], one["outputs"][0]): one for one in manifest_entries(tmp_path / "out") if "bits" in one}
    quantized = {(file.name, out.name): out for file in plan.files for out in file.outputs if out.quantization}
    stored = {name: load_file(tmp_path / "out" / name) for name in {file for file, _ in quantized}}
    different = 0
    for (file, name), output in quantized.items():
        weighted = expected(source, output, method == "lsq")
        assert stored[file][name].tobytes() == weighted.tobytes(), name
        entry = entries[file, name]
        assert entry.get("weighted_by") == (output.role.norm or None if method == "lsq" else None)
        assert entry["method"] == method
        if output.role.name in READERS.values():
            different += weighted.tobytes() != expected(source, output, False).tobytes()
    assert different == (sum(o.role.name in READERS.values() for o in quantized.values()) if method == "lsq" else 0)
    assert entries.keys() == quantized.keys()


def manifest_entries(folder: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((folder / "manifest.json").read_text())["tensors"]
    return entries


def test_layerwise_gptq_sees_other_matrices_as_they_are_converted(source, tmp_path):
    """A recipe may mix methods."""
    plan = plan_of(source, "lsq")
    (output,) = (output for output in plan.outputs if output.role.norm == NORM)
    with QuantizedStore(tmp_path / "store", "x") as store:
        values = quantized_weights(source, quantizations_of(plan.outputs), store)(output.role.name, None)
    assert output.quantization is not None
    importance = source.checkpoint.importance(output.role.name)
    weight = source.checkpoint.read(output.role.name, *output.rows)
    made = quantize(weight, output.quantization, DTYPES[output.dtype], importance)
    np.testing.assert_array_equal(values.numpy(), dequantize(made, output.quantization))


def test_weighting_changes_the_fingerprint(source):
    """Files of an unfinished bundle of an earlier version, which did not weigh, are not taken over."""
    outputs = {output.name: output.weighted_by for output in plan_of(source, "lsq").outputs}
    assert any(outputs.values())
    assert not any(
        output.weighted_by for method in ("rtn", "gptq", "lsq_unweighted") for output in plan_of(source, method).outputs
    )
