"""Second moments of gradients, block by block, against one backward pass through the whole model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ppx.calibrate import gradients
from ppx.calibrate.work import GRADIENT_FRAMES, gradient_sequences
from ppx.convert.source.source import locate, open_source
from ppx.model.reference import reference_of
from ppx.model.tokens import read_tokens
from torch.nn.functional import log_softmax


def likeliest(logits, _generator):
    return logits.argmax(-1).numpy().astype(np.int32)


def whole_pass(model, token_set):
    """The gradients ``[frames, rows]`` at the outputs of all matrices, from the differentiable forward pass."""
    outputs = {}

    def keep(name, step, x):
        product = model.product(name, step, x)
        outputs[name, step or 0] = product
        if not product.requires_grad:
            product.requires_grad_()
        return product

    half = model.architecture.n_q // 2
    text, audio = replace(model, input_hook=keep).logits(token_set.tokens, token_set.targets, half)
    loss = torch.zeros(())
    for stream in range(half + 1):
        logits = text if stream == 0 else audio[:, :, stream - 1]
        drawn = logits.argmax(-1, keepdim=True)
        each = log_softmax(logits, -1).gather(-1, drawn)[..., 0] * torch.from_numpy(token_set.counted[:, stream])
        loss = loss + each.sum() * (1 if stream == 0 else half**-0.5)
    keys = [key for key in outputs if "layers" in key[0] or key[0].startswith("depformer_in")]
    behind = torch.autograd.grad(loss, [outputs[key] for key in keys])
    return {key: each.flatten(0, -2) for key, each in zip(keys, behind, strict=True)}


@pytest.mark.parametrize("fill", [False, True], ids=["all counted", "some frames unknown"])
def test_they_are_those_of_one_backward_pass(fill, pico, monkeypatch):
    with open_source(locate(str(pico))) as source:
        token_set = read_tokens(pico / "calibration_tokens.safetensors", source.architecture, 2, 24)
        if fill:
            token_set.counted[1, :, 5:9] = False
        monkeypatch.setattr(gradients, "sample_tokens", likeliest)
        model = reference_of(source.checkpoint)
        sums = gradients.output_gradients(model, token_set)
        expected = whole_pass(model, token_set)
    agent = {key for key in expected if float(expected[key].abs().max()) > 0}
    assert set(sums) == agent
    for key, each in expected.items():
        for number, block in enumerate(each.split(64, 1)):
            height = block.shape[1]
            assert torch.allclose(sums[key][number][:height, :height], block.T @ block, rtol=1e-3, atol=1e-5), key
            assert not sums[key][number][height:].any()


def test_predictions_that_are_not_finite_say_nothing(pico):
    with open_source(locate(str(pico))) as source:
        token_set = read_tokens(pico / "calibration_tokens.safetensors", source.architecture, 1, 12)
        model = reference_of(source.checkpoint)
        weights = model.weights

        def broken(name, step):
            values = weights(name, step)
            return values * torch.nan if name == "text_linear.weight" else values

        sums = gradients.output_gradients(replace(model, weights=broken), token_set)
    assert all(bool(torch.isfinite(total).all()) for total in sums.values())


def test_few_sequences_are_enough():
    assert gradient_sequences(GRADIENT_FRAMES // 4) == 4
    assert gradient_sequences(GRADIENT_FRAMES * 3) == 1
