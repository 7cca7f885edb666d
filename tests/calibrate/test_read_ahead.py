"""Weights that are read while others are computed with."""

import threading

import pytest
import torch
from ppx.calibrate.read_ahead import ReadAhead
from ppx.convert.source.architecture import Architecture
from ppx.convert.source.source import locate, open_source
from ppx.model.blocks import Block, blocks_of


class Disk:
    """Reads matrices that hold their step; remembers which, and in which thread."""

    def __init__(self) -> None:
        self.read: list[tuple[str, int, bool]] = []

    def weights(self, name: str, step: int | None) -> torch.Tensor:
        self.read.append((name, step or 0, threading.current_thread() is threading.main_thread()))
        return torch.tensor(float(step or 0))


@pytest.fixture(scope="module")
def architecture(pico) -> Architecture:
    with open_source(locate(str(pico))) as source:
        return source.architecture


def ask(ahead: ReadAhead, blocks: list[Block], steps: int) -> None:
    """Ask for all matrices of some blocks, as a model does."""
    for block in blocks:
        ahead.at(block)
        for name in [name for stage in block.matrices(steps) for name in stage]:
            stacked = block.component == "depformer" and block.sublayer == "attention"
            for step in range(steps) if stacked else [None]:
                assert ahead.weights(name, step) == (step or 0)


@pytest.mark.parametrize("component", ["temporal", "depformer"])
@pytest.mark.parametrize("backward", [False, True])
def test_every_matrix_is_read_once_and_ahead(architecture, component, backward):
    disk, blocks = Disk(), blocks_of(architecture, component)
    blocks = blocks[::-1] if backward else blocks
    with ReadAhead(disk.weights, architecture) as ahead:
        ahead.follow(blocks, 3)
        ask(ahead, blocks, 3)
        assert ahead.weights("out_norm.alpha", None) == 0
    assert len(disk.read) == len({key[:2] for key in disk.read})
    assert [name for name, _, in_main in disk.read if in_main] == ["out_norm.alpha"]


def test_nothing_is_read_ahead_unless_it_is_active(architecture):
    disk, blocks = Disk(), blocks_of(architecture, "temporal")
    with ReadAhead(disk.weights, architecture, active=False) as ahead:
        ahead.follow(blocks)
        ask(ahead, blocks, architecture.steps)
    assert all(in_main for *_, in_main in disk.read)


def test_an_error_of_reading_is_raised_where_the_matrix_is_asked_for(architecture):
    def broken(name: str, step: int | None) -> torch.Tensor:
        raise OSError(f"{name} {step}")

    blocks = blocks_of(architecture, "temporal")
    with ReadAhead(broken, architecture) as ahead:
        ahead.follow(blocks)
        with pytest.raises(OSError, match="in_proj"):
            ahead.weights(blocks[0].matrices(1)[0][0], None)
