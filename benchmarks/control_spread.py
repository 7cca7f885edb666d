"""How much do intact roundings of one checkpoint differ? From this come the factors of the verdict.

    python benchmarks/control_spread.py SOURCE... [--bits 2 3 4 5 6 8] [--sequences 8] [--frames 200]

Plain rounding with groups that begin at column 0, and 16, 32 and 48 columns later (rows wrap around), and ``lsq``: each
is as intact as the others. Prints for each limited figure the largest ratio of any of them to a plain rounding, with
and without the share of the agent's divergence that the verdict adds (``ppx.verify.limits``), on the system prompt and
on the source's ``heldout_tokens.safetensors``.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from ppx.convert.source.source import Source, locate, open_source
from ppx.model.forward import Floats
from ppx.model.reference import TorchModel, reference_of
from ppx.model.tokens import TokenSet
from ppx.model.walk import forward_blocks, step_inputs
from ppx.model.weights import to_numpy
from ppx.quant.affine import BITS, FLOAT16, QuantizationConfig, dequantize, quantize, round_into
from ppx.verify.limits import FIGURES, NARROW, WIDE, apart, limited
from ppx.verify.metrics import Predictions, mean_of
from ppx.verify.options import VerifyOptions
from ppx.verify.verification import token_set_of

OFFSETS = (0, 16, 32, 48)
KINDS = (*map(str, OFFSETS), "lsq")
MATRICES = ("in_proj", "out_proj", "linear_in", "linear_out", "depformer_in")


def rounded(model: TorchModel, kind: str, bits: int) -> TorchModel:
    """Return a model whose matrices are rounded once, in one of the ways."""
    kept: dict[tuple[str, int | None], torch.Tensor] = {}

    def weights(name: str, step: int | None) -> torch.Tensor:
        values = model.weights(name, step)
        if not any(matrix in name for matrix in MATRICES):
            return values
        if (name, step) not in kept:
            kept[name, step] = torch.from_numpy(rounding(to_numpy(values), kind, bits))
        return kept[name, step]

    return replace(model, weights=weights)


def rounding(weight: np.ndarray, kind: str, bits: int) -> Floats:
    """Return a matrix, rounded."""
    size = 64 if weight.shape[1] % 64 == 0 else 32
    if kind == "lsq":
        quantization = QuantizationConfig(bits, size, kind)
        return dequantize(quantize(weight, quantization, FLOAT16), quantization)
    values = np.empty(weight.shape, np.float32)
    round_into(values, np.roll(weight, int(kind), 1), bits, size, FLOAT16)
    return np.ascontiguousarray(np.roll(values, -int(kind), 1))


def logits(model: TorchModel, source: Source, token_set: TokenSet) -> list[Floats]:
    """Return the logits of the text and of the agent's codebooks, where they count."""
    a = source.architecture
    half = a.n_q // 2
    x = model.embed(token_set.tokens, token_set.vectors(source.voices, a.dim))
    hidden = model.out_norm(forward_blocks(model, a, "temporal", x))
    counted = token_set.counted[:, 1 : 1 + half]
    chosen = counted.any(1)
    inputs = step_inputs(model, hidden[chosen], token_set.targets.transpose(0, 2, 1)[chosen], half)
    out, rows = forward_blocks(model, a, "depformer", inputs), counted.transpose(0, 2, 1)[chosen]
    audio = [model.audio_logits(step, np.ascontiguousarray(out[rows[:, step], step])) for step in range(half)]
    return [model.text_logits(hidden[token_set.counted[:, 0]]), *audio]


def figures(actual: list[Floats], expected: list[Floats]) -> dict[str, float]:
    """Return the limited figures, each as a distance from 0."""
    streams = []
    for one, other in zip(actual, expected, strict=True):
        seen = Predictions()
        seen.add(one, other, None, np.zeros(len(one), np.int64))
        streams.append(seen.summary())
    of = {"text": streams[0], "codebook_0": streams[1], "agent": mean_of(streams[1:])}
    found = {limit: limited(of[stream], limit) for limit, stream in FIGURES.items()}
    return {limit: apart(limit, one.value) for limit, one in found.items() if one and one.value is not None}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument("--bits", type=int, nargs="+", default=BITS)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--frames", type=int, default=200)
    options = parser.parse_args()
    largest: dict[tuple[str, str, str], tuple[float, str]] = {}
    for path in options.sources:
        with open_source(locate(str(path))) as source, torch.inference_mode():
            recorded = VerifyOptions(path / "heldout_tokens.safetensors", None, options.sequences, options.frames)
            asked = {"system prompt": VerifyOptions(), "tokens": recorded}
            sets = {name: token_set_of(source, request) for name, request in asked.items()}
            reference = reference_of(source.checkpoint)
            expected = {name: logits(reference, source, token_set) for name, token_set in sets.items()}
            for bits in options.bits:
                models = {kind: rounded(reference, kind, bits) for kind in KINDS}
                for name, token_set in sets.items():
                    found = {kind: figures(logits(models[kind], source, token_set), expected[name]) for kind in KINDS}
                    compare(found, f"{path.name} {bits} bit", name, largest)
                print(f"{path.name} {bits} bit: done", flush=True)
    for (name, limit, how), (ratio, label) in sorted(largest.items()):
        print(f"{name}, {limit}, {how}: {ratio:.2f} ({label})")


def compare(
    found: dict[str, dict[str, float]], label: str, name: str, largest: dict[tuple[str, str, str], tuple[float, str]]
) -> None:
    """Note the largest ratio of any rounding to a plain one."""
    factors = WIDE if name == "system prompt" else NARROW
    shared: dict[str, Callable[[str], float]] = {
        "alone": lambda _: 0.0,
        "with its share": lambda limit: factors[limit].share,
    }
    for plain, kind in product(map(str, OFFSETS), KINDS):
        for limit, (how, share) in product(found[kind] if plain != kind else (), shared.items()):
            control = found[plain][limit] + share(limit) * found[plain]["agent_kl"]
            ratio = found[kind][limit] / control if control else 0.0
            key = (name, limit, how)
            largest[key] = max(largest.get(key, (0.0, "")), (ratio, f"{label}, {kind} over {plain}"))


if __name__ == "__main__":
    main()
