"""The store of quantized matrices as layer-wise GPTQ fills it: written while the next ones are computed."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch

from ..convert.bundle.output_tensor import Output
from ..convert.bundle.quantized_store import MatrixKey, QuantizedStore, quantizations_of
from ..convert.bundle.records import Adjustment
from ..quant.affine import DATA_DRIVEN, FLOAT32, QuantizationConfig
from ..quant.packed_matrix import PackedMatrix


class StoreWriter:
    """Adds matrices to a store in a thread, those of one block after those of the one before; a context manager."""

    def __init__(self, store: QuantizedStore) -> None:
        """Write nothing yet."""
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ppx-store")
        self._pending: Future[None] | None = None
        self._stream: torch.cuda.Stream | None = None

    def add(
        self, block: str, matrices: Mapping[MatrixKey, PackedMatrix], adjusted: Mapping[MatrixKey, Adjustment]
    ) -> None:
        """Have matrices added to the store, after those before; raises what writing those raised.

        The thread also copies them from a GPU, which computes on meanwhile.
        """
        self.finish()
        self._pending = self._thread.submit(self._add, block, matrices, adjusted, _computed(matrices))

    def _add(
        self,
        block: str,
        matrices: Mapping[MatrixKey, PackedMatrix],
        adjusted: Mapping[MatrixKey, Adjustment],
        computed: torch.cuda.Event | None,
    ) -> None:
        if computed is not None:
            matrices = self._copied(matrices, computed)
        self._store.add(block, {key: matrix.quantized(FLOAT32) for key, matrix in matrices.items()}, adjusted)

    def _copied(
        self, matrices: Mapping[MatrixKey, PackedMatrix], computed: torch.cuda.Event
    ) -> dict[MatrixKey, PackedMatrix]:
        """Return matrices in the memory of the processor, copied by a stream of their own."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(computed.device)  # type: ignore[no-untyped-call]
        self._stream.wait_event(computed)
        with torch.cuda.stream(self._stream):
            there = {
                key: PackedMatrix(*(_on_host(part) for part in (matrix.weight, matrix.scales, matrix.biases)))
                for key, matrix in matrices.items()
            }
        self._stream.synchronize()
        return there

    def finish(self) -> None:
        """Return when all are in the store; raises what writing them raised."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()


def _computed(matrices: Mapping[MatrixKey, PackedMatrix]) -> torch.cuda.Event | None:
    """Return what is reached when a CUDA GPU has computed matrices that are there."""
    devices = [matrix.weight.device for matrix in matrices.values() if matrix.weight.device.type == "cuda"]
    if not devices:
        return None
    event: torch.cuda.Event = torch.cuda.current_stream(devices[0]).record_event()
    return event


def _on_host(values: torch.Tensor) -> torch.Tensor:
    """Return a copy in the memory of the processor, in pinned memory: the GPU computes on meanwhile."""
    try:
        return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
    except RuntimeError:  # not as much memory may be pinned
        return values.cpu()


def kept_text(store: QuantizedStore, outputs: list[Output]) -> str:
    """Return how much of a plan's outputs a store holds, as an interrupted program says it; empty for nothing."""
    return (
        f"{len(store.files)} of {data_driven_count(quantizations_of(outputs))} matrices are kept" if store.files else ""
    )


def data_driven_count(quantizations: Mapping[MatrixKey, tuple[QuantizationConfig, str]]) -> int:
    """Return how many matrices are quantized by their inputs."""
    return sum(quantization.method in DATA_DRIVEN for quantization, _ in quantizations.values())


def label_of(names: Sequence[str]) -> str:
    """Return what the file of matrices is called in a store, without its ending."""
    return names[0].removesuffix("weight").rstrip("._")
