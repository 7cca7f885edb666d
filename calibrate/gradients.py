"""How much errors of each matrix's outputs matter: second moments of the gradients there, for ``quant.gptq``.

Tokens are drawn from the original's own predictions, and the gradients are those of their log likelihood (the Fisher
information): to second order, the divergence grows by the mean of (g · e)² where e is the outputs' error. The backward
pass goes block by block, as everything here does: memory holds the streams in front of all blocks for some frames, and
the weights of one. Workers take some of the sequences each. They put predictions together before tokens are drawn, so
that these do not depend on how many workers there are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax, pad

from ..convert.bundle.quantized_store import MatrixKey
from ..model.blocks import Block, blocks_of
from ..model.forward import Tokens
from ..model.reference import TorchModel
from ..model.tokens import TokenSet, evenly_spaced
from ..model.weights import kept_by
from ..quant.column_rounding import ROWS
from .read_ahead import ReadAhead
from .work import gradient_sequences
from .workers import Workers

_ALONE = Workers()
Sums = dict[MatrixKey, Tensor]


@dataclass(frozen=True)
class _Pass:
    """A forward and backward pass of the original model.

    kept: weights of the block at hand. progress: called with the share of the work that is done. idle: whether this
    worker has no sequence of its own, and only draws tokens with the others. sums: the result.
    """

    model: TorchModel
    random: torch.Generator
    kept: dict[MatrixKey, Tensor]
    progress: Callable[[float], object]
    workers: Workers
    ahead: ReadAhead
    idle: bool
    sums: Sums = field(default_factory=dict)

    def forward(self, component: str, x: Tensor) -> tuple[list[tuple[Block, Tensor]], Tensor]:
        """Return what goes into each block, and what comes out of the last."""
        before = []
        for block in blocks_of(self.model.architecture, component):
            self.ahead.at(block)
            before.append((block, x))
            x = x.clone()
            self.model.advance(block, x)
            self._done(component, 1)
        return before, x

    def backward(self, before: Sequence[tuple[Block, Tensor]], gradient: Tensor) -> Tensor:
        """Take the gradient behind the last block to what is in front of the first, in place."""
        self.ahead.follow([block for block, _ in reversed(before)], self.model.architecture.n_q // 2)
        for block, x in reversed(before):
            self.ahead.at(block)
            for rows in block.batches(x.shape):
                gradient[rows] += self._through(block, x[rows], gradient[rows])
            self._done(block.component, 2)
        return gradient

    def _done(self, component: str, passes: int) -> None:
        """Drop a block's weights; count it. The weights of all of a component's blocks are taken to be alike."""
        self.kept.clear()
        a = self.model.architecture
        steps = a.n_q // 2
        size = {
            "temporal": a.dim * (4 * a.dim + 3 * a.hidden),
            "depformer": steps * a.depformer_dim * (4 * a.depformer_dim + 3 * a.depformer_hidden),
        }
        whole = 3 * sum(len(blocks_of(a, name)) * each for name, each in size.items())
        self.progress(passes * size[component] / whole)

    def _through(self, block: Block, x: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient of what a block computes at its input; add those at its matrices' outputs."""
        outputs: dict[MatrixKey, Tensor] = {}

        def capture(name: str, step: int | None, matrix_input: Tensor) -> Tensor:
            product = self.model.product(name, step, matrix_input)
            outputs[name, step or 0] = product
            return product

        with torch.enable_grad():
            start = x.clone().requires_grad_()
            added = replace(self.model, input_hook=capture).added(block, start)
            total = (added * gradient).sum()  # of a single number: for others PyTorch loads sympy, a second's work
        first, *others = torch.autograd.grad(total, [start, *outputs.values()])
        for key, each in zip(outputs, others, strict=True):
            self.add(key, each)
        return first

    def add(self, key: MatrixKey, gradient: Tensor) -> None:
        """Add gradients ``[..., rows]`` at the outputs of a matrix."""
        flat = gradient.flatten(0, -2)
        blocks = pad(flat, (0, -flat.shape[1] % ROWS)).reshape(len(flat), -1, ROWS).permute(1, 2, 0)
        total = torch.bmm(blocks, blocks.transpose(1, 2))
        self.sums[key] = self.sums[key] + total if key in self.sums else total

    def head(self, name: str, x: Tensor, counted: Tensor, weight: float) -> Tensor:
        """Return the gradient at a head's input ``[rows, frames, dim]``, of the log likelihood of drawn tokens.

        Zeros where predictions are not finite.
        """
        with torch.enable_grad():
            start = x.clone().requires_grad_()
            predicted = log_softmax(self.model.product(name, None, start), -1)
            whole, own = self.workers.concatenated(predicted.detach()[: 0 if self.idle else None])
            if not bool(torch.isfinite(whole).all()):
                return torch.zeros_like(x)
            tokens = sample_tokens(whole, self.random)[own]
            if self.idle:
                return torch.zeros_like(x)
            drawn = torch.from_numpy(tokens).long().to(predicted.device)
            chosen = predicted.gather(-1, drawn[..., None])[..., 0]
            (gradient,) = torch.autograd.grad((chosen * counted.to(chosen.device)).sum() * weight, start)
        return gradient


def output_gradients(
    model: TorchModel,
    token_set: TokenSet,
    progress: Callable[[float], object] = lambda _: None,
    workers: Workers = _ALONE,
    ahead: ReadAhead | None = None,
) -> Sums:
    """Return second moments ``[blocks, 64, 64]`` of gradients at the outputs of matrices, on the model's device.

    They are of blocks of 64 rows, the last one filled up with zeros. model: the original. Some sequences are used,
    evenly spaced. The loss is that of fine-tuning: the text's divergence plus the mean of the agent's codebooks.
    Matrices that neither depends on, those of the user's depformer steps, have none. progress: called with the share of
    the work that is done, each time. workers: all give the same tokens, and get the same sums. ahead: what the
    model reads its weights with, if anything is read ahead.
    """
    a = model.architecture
    which = evenly_spaced(len(token_set.tokens), gradient_sequences(token_set.tokens.shape[2]))
    steps = a.n_q // 2
    if not token_set.counted[which, 1 : steps + 1].any((1, 2)).all():
        workers = Workers()  # a worker could be left without audio: all compute all
    own = which[workers.share(len(which))]
    chosen = token_set.chosen(own if len(own) else which[:1])  # the same work as others do, which does not count
    kept: dict[MatrixKey, Tensor] = {}
    random = torch.Generator(model.device).manual_seed(0)
    read = replace(model, weights=kept_by(kept, model.weights, model.device))
    ahead = ahead or ReadAhead(model.weights, a, active=False)
    run = _Pass(read, random, kept, progress, workers, ahead, not len(own))
    with torch.no_grad():
        ahead.follow([*blocks_of(a, "temporal"), *blocks_of(a, "depformer")], steps)
        before, x = run.forward("temporal", run.model.embedded(chosen.tokens))
        hidden = run.model.hidden_states(x)
        counted = torch.from_numpy(chosen.counted)
        gradient = run.head("text_linear.weight", hidden, counted[:, 0], 1.0)
        of_audio = chosen.counted[:, 1 : steps + 1].any(1)
        known = torch.from_numpy(of_audio)
        of_steps, targets = counted[:, 1 : steps + 1].permute(0, 2, 1)[known], chosen.targets.transpose(0, 2, 1)
        known = known.to(hidden.device)
        gradient[known] += _depformer(run, hidden[known], targets[of_audio], of_steps)
        kept.clear()
        with torch.enable_grad():
            start = x.clone().requires_grad_()
            total = (run.model.hidden_states(start) * gradient).sum()
        (behind,) = torch.autograd.grad(total, start)
        run.backward(before, behind)
    if run.idle:
        run.sums.update({key: torch.zeros_like(total) for key, total in run.sums.items()})
    workers.add_up(*run.sums.values())
    return run.sums


def _depformer(run: _Pass, hidden: Tensor, targets: Tokens, counted: Tensor) -> Tensor:
    """Return the gradient of the agent's codebooks at the hidden states ``[rows, dim]`` that the depformer reads."""
    steps = counted.shape[1]
    before, x = run.forward("depformer", run.model.step_inputs(hidden, targets, steps))
    gradient = torch.empty_like(x)
    for step in range(steps):
        name, of_step = f"linears.{step}.weight", slice(step, step + 1)
        gradient[:, of_step] = run.head(name, x[:, of_step], counted[:, of_step], steps**-0.5)
    run.kept.clear()
    gradient = run.backward(before, gradient)
    total = torch.zeros_like(hidden)
    for step in range(steps):
        name = f"depformer_in.{step}.weight"
        run.add((name, 0), gradient[:, step])
        total += gradient[:, step] @ run.model.weights(name, None).to(total)
    return total


def sample_tokens(logits: Tensor, generator: torch.Generator) -> Tokens:
    """Return a token for each of logits ``[rows, frames, card]``, drawn from what they predict."""
    flat = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator)
    tokens: Tokens = flat.reshape(logits.shape[:2]).cpu().numpy().astype(np.int32)
    return tokens
