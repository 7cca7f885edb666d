"""Where PyTorch computes."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..convert.errors import reason
from ..convert.source.architecture import Architecture
from ..convert.source.tensors import roles
from ..quant.affine import QuantizationConfig
from ..quant.gptq import Moments, gptq
from .reference import TorchModel
from .walk import forward_blocks

_WITHIN = 1e-3  # relative L2 from the CPU: float32 in any order stays far below it, and a broken kernel far above
Block = Callable[[str], Mapping[str, Tensor]]


@cache
def device() -> str:
    """Return ``cuda`` where PyTorch has such a GPU, ``mps`` on an Apple GPU that computes rightly, else ``cpu``.

    A GPU that is left alone is named on standard error, with the reason.
    """
    if torch.cuda.is_available():
        return "cuda"
    if not torch.backends.mps.is_available():
        return "cpu"
    found, why = chosen("mps")
    if why:
        sys.stderr.write(f"{why}\n")
    return found


def chosen(candidate: str, block: Block | None = None) -> tuple[str, str]:
    """Return a device if one block computes there what it does on the CPU, else ``cpu`` and a line that says why not.

    block: computes on a device and returns what to compare, by name; None for a block of the model.
    """
    block = block or one_block
    expected = block("cpu")
    try:
        found = {name: values.cpu().double() for name, values in block(candidate).items()}
    except (RuntimeError, TypeError, ValueError) as error:  # a missing operation is a RuntimeError too
        return "cpu", f"PyTorch computes on the CPU: a block does not run on {candidate} ({reason(error)})"
    for name, values in expected.items():
        exact = values.double()
        off = float((found[name] - exact).norm() / exact.norm())
        if not off <= _WITHIN:
            return (
                "cpu",
                f"PyTorch computes on the CPU: on {candidate} {name} is off by {off:.2g} (at most {_WITHIN:g})",
            )
    return candidate, ""


def one_block(where: str) -> dict[str, Tensor]:
    """Compute attention and MLP of a small layer on a device, second moments of the result, and GPTQ with them."""
    a = Architecture(dim=64, num_heads=2, num_layers=1, text_card=32, card=32, depformer_dim=32, depformer_num_heads=1)
    random = torch.Generator().manual_seed(7)
    known = {
        name: torch.randn(role.shape[0] if role.kind == "linear" else 1, role.shape[-1], generator=random) / 8
        for name, role in roles(a).items()
        if role.layer == 0 and role.component == "temporal"
    }
    model = TorchModel(a, lambda name, _: known[name], lambda name, _: known[name], torch.float32, 16, 16, where)
    x = forward_blocks(model, a, "temporal", torch.randn(2, 96, a.dim, generator=random).numpy())
    inputs = torch.from_numpy(np.ascontiguousarray(x.reshape(-1, a.dim))).to(where)
    second = inputs.T @ inputs
    made = gptq(
        known["transformer.layers.0.self_attn.out_proj.weight"],
        Moments(second, second),
        QuantizationConfig(4, 32),
        np.dtype(np.float32),
    )
    error = torch.tensor([made.squared_error / made.squared_norm])
    return {"the forward pass": inputs.cpu(), "the second moments": second.cpu(), "the error of GPTQ": error.sqrt()}


@cache
def compiles() -> bool:
    """Return whether ``torch.compile`` works on the device: a CUDA GPU, with Triton and a C compiler."""
    if device() != "cuda":
        return False
    try:
        torch.compile(torch.square)(torch.ones(4, device="cuda"))
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError):
        return False
    return True


def memory() -> int:
    """Return how many bytes of memory the device has."""
    if device() == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return host_memory()


def host_memory() -> int:
    """Return how many bytes of memory the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
