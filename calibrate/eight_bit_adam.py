"""Adam with 8-bit moments (torchao's), which takes its steps in the backward pass.

A parameter is changed as soon as its gradient is there, and the gradient is dropped: those of all weights are never in
memory at once (PyTorch's recipe "optimizer step in backward").
"""

import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..convert.bundle.quantized_store import MatrixKey
from ..convert.errors import UserError
from ..model.torch_device import compiles
from .parameters import BETAS, DAMPING, LowMemoryMatrix, learning_rate_share, parameter_groups

# Gradients are those of the loss times about the number of weights. One weight's share of the loss is so small (1e-7 to
# 1e-6 in a model of 4.6 million parameters) that torchao's 8-bit second moments, whose scales are 1e-12 at least, could
# not hold it. Scaled like this gradients are about 1, and _EPSILON is to them what Adam's usual 1e-8 is to the others:
# where a second moment is rounded to 0, it bounds the update.
_EPSILON = 1e-2
MISSING = "fine-tuning at this size needs one more package: pip install 'ppx-convert[fine-tuning]'"


@dataclass(frozen=True)
class AdamInBackward:
    """The optimizers of all matrices.

    scale: what losses are multiplied by. not_finite: how many gradients of each matrix were not finite, on the device:
    to look at one while others are computed would keep a GPU waiting.
    """

    scale: float
    optimizers: dict[MatrixKey, Optimizer]
    not_finite: dict[MatrixKey, Tensor] = field(default_factory=dict)

    def skipped(self) -> dict[MatrixKey, int]:
        """Return how many gradients were not finite, of matrices that had such."""
        counts = torch.stack(list(self.not_finite.values())).tolist()
        return {key: count for key, count in zip(self.not_finite, counts, strict=True) if count}


def torchao_optimizer() -> Any:
    """Return torchao's AdamW8bit; raises UserError if torchao is not installed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torchao warns of kernels for quantized products, which are not used here
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise UserError(MISSING) from None
    finally:
        logging.disable(before)
    return AdamW8bit


def adam_in_backward(matrices: Mapping[MatrixKey, LowMemoryMatrix]) -> AdamInBackward:
    """Return optimizers that change the parameters of matrices whenever a backward pass reaches them."""
    weights = sum(matrix.codes.numel() for matrix in matrices.values())
    make, adam = torchao_optimizer(), AdamInBackward(2.0 ** round(math.log2(weights)), {})
    for key, matrix in matrices.items():
        groups = parameter_groups([matrix.scales, matrix.biases], [matrix.offsets])
        groups[1]["weight_decay"] = DAMPING
        optimizer = make(groups, betas=BETAS, eps=_EPSILON, weight_decay=0, bf16_stochastic_round=True)
        adam.optimizers[key] = optimizer
        adam.not_finite[key] = torch.zeros((), dtype=torch.int64, device=matrix.offsets.device)
        for parameter in (matrix.scales, matrix.biases, matrix.offsets):
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(_update, optimizer, adam.not_finite[key])
            )
        matrix.offsets.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            partial(_carry, matrix)  # behind the update: hooks run in the order in which they are registered
        )
    return adam


def take_step_in_backward(adam: AdamInBackward, loss: Tensor) -> bool:
    """Take a step down the gradient of a loss; return False, and change nothing, if the loss is not finite."""
    if not bool(torch.isfinite(loss)):
        return False
    # torchao compiles its step, which is several times as fast on a GPU.
    with torch.compiler.set_stance("default" if compiles() else "force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")  # PyTorch's, of torchao's tensors
        torch.autograd.backward(loss * adam.scale)
    return True


def _update(optimizer: Optimizer, not_finite: Tensor, parameter: Tensor) -> None:
    """Change a parameter that has its gradient; one that is not finite is counted, and taken for zero.

    ``take_step`` leaves all parameters as they are where any gradient is not finite. Here those whose gradients came
    before are changed already.
    """
    if parameter.grad is not None:
        broken = ~torch.isfinite(parameter.grad).all()
        not_finite.add_(broken)
        parameter.grad.masked_fill_(broken, 0)
        optimizer.step()  # of those that have a gradient: this one
        parameter.grad = None


def _carry(matrix: LowMemoryMatrix, _: Tensor) -> None:
    matrix.carry()


def set_learning_rates(adam: AdamInBackward, step: int, steps: int, warm_up: int) -> None:
    """Set the learning rates of a step; see ``learning_rate_share``."""
    share = learning_rate_share(step, steps, warm_up)
    for optimizer in adam.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"].fill_(share * group["usual"])
