"""The moments of a block's matrices: what its last ones are given of the residual streams."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ppx.calibrate.moments import added_to, block_moments
from ppx.convert.source.source import locate, open_source
from ppx.model.blocks import Block
from ppx.model.reference import reference_of
from ppx.quant.gptq import Inputs

CASES = {
    "transformer.layers.1.self_attn.in_proj_weight": None,
    "transformer.layers.1.self_attn.out_proj.weight": slice(None),
    "transformer.layers.1.gating.linear_in.weight": None,
    "transformer.layers.1.gating.linear_out.weight": slice(None),
    "depformer.layers.1.self_attn.out_proj.weight": 3,
    "depformer.layers.1.gating.5.linear_in.weight": None,
    "depformer.layers.1.gating.5.linear_out.weight": 5,
}


@pytest.mark.parametrize("count", [2, 40])  # inputs themselves, and their moments
@pytest.mark.parametrize("name", CASES)
def test_the_last_matrices_of_a_block_are_given_what_the_quantized_stream_lacks(name, count, pico):
    component = "temporal" if name.startswith("transformer") else "depformer"
    block = Block(component, 1, "attention" if "self_attn" in name else "mlp")
    key, where = (name, 3 if name.startswith("depformer.layers.1.self_attn") else 0), CASES[name]
    with open_source(locate(str(pico))) as source:
        a = source.architecture
        shape = (count, 60, a.dim) if component == "temporal" else (60 * count, a.steps, a.depformer_dim)
        random = np.random.default_rng(0)
        streams = {
            which: torch.from_numpy(random.standard_normal(shape, np.float32)) for which in ("original", "quantized")
        }
        model, seen = reference_of(source.checkpoint), list[torch.Tensor]()
        found = block_moments({"original": model, "quantized": model}, block, [key], streams)[key]

        def keep(of, step, x):
            if (of, step or 0) == key:
                seen.append(x.flatten(0, -2))

        with torch.inference_mode():
            replace(model, input_hook=keep).added(block, streams["quantized"])
    assert len(seen[0]) == 60 * count
    if where is None:
        assert added_to(block, key, streams) is None
        assert found.residual is None
        return
    lacking = streams["original"] - streams["quantized"]
    expected = (lacking if component == "temporal" else lacking[:, where]).reshape(60 * count, -1)
    assert found.residual is not None
    if isinstance(found, Inputs):
        assert count == 2
        assert torch.equal(found.residual, expected)
    else:
        assert found.frames == 60 * count
        assert torch.allclose(found.residual, expected.T @ seen[0], rtol=1e-3, atol=1e-2)
