"""Where PyTorch computes."""

import os

import torch


def device() -> str:
    """Return ``cuda`` where there is a GPU that PyTorch knows, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def memory() -> int:
    """Return how many bytes of memory the device has."""
    if device() == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return host_memory()


def host_memory() -> int:
    """Return how many bytes of memory the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
