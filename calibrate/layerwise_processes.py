"""Layer-wise GPTQ by several processes of this host: one for each GPU, or on its processors."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..convert.bundle.output_tensor import Output
from ..convert.bundle.quantized_store import QuantizedStore
from ..convert.preparation import Reopening, reopening
from ..convert.progress import keeping, watched
from ..convert.source.source import Source
from ..model.tokens import TokenSet
from .layerwise import quantize_model
from .processes import compute_together
from .store_writer import kept_text
from .stream_rows import most_workers
from .work import Work
from .workers import Workers


@dataclass(frozen=True)
class _Task:
    """What the processes quantize together, and into which store."""

    source: Reopening
    outputs: list[Output]
    token_set: TokenSet
    folder: Path
    mark: str
    quiet: bool
    weigh: Callable[[Work], float]


def quantize_together(
    processes: int,
    source: Source,
    outputs: list[Output],
    token_set: TokenSet,
    store: QuantizedStore,
    quiet: bool,
    weigh: Callable[[Work], float],
) -> None:
    """Quantize as ``quantize_model`` does, in so many processes, or as many as there are sequences for.

    Each opens the source again, and has the GPU of its rank, where there are GPUs. The store holds the matrices
    afterwards, and, if this is interrupted, those that were done; how many processes there are does not matter to it.
    """
    size = min(processes, most_workers(token_set, source.architecture))
    if size < processes and not quiet:
        sys.stderr.write(f"layer-wise GPTQ: {size} of {processes} GPUs, as each needs a calibration sequence\n")
    task = _Task(reopening(source), outputs, token_set, store.folder.absolute(), store.mark, quiet, weigh)

    def kept() -> str:
        store.refresh()
        return kept_text(store, outputs)

    try:
        with keeping(kept):
            compute_together(partial(_quantize, task), size)
    except BaseException:
        if not quiet and watched():
            sys.stderr.write("\n")  # behind the bar of a process that was ended
        raise
    finally:
        store.refresh()


def _quantize(task: _Task, workers: Workers) -> None:
    """Take part in the work."""
    with task.source.open() as source, QuantizedStore(task.folder, task.mark) as store:
        quiet = task.quiet or not workers.leads
        quantize_model(source, task.outputs, task.token_set, store, None, quiet, task.weigh, workers)
