"""Writing quantized matrices to their store while the next ones are computed."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from ..convert.bundle.quantized_store import MatrixKey, QuantizedStore
from ..convert.bundle.records import Adjustment
from ..quant.affine import Quantized


class StoreWriter:
    """Adds matrices to a store in a thread, those of one block after those of the one before; a context manager."""

    def __init__(self, store: QuantizedStore) -> None:
        """Write nothing yet."""
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ppx-store")
        self._pending: Future[None] | None = None

    def add(
        self, block: str, matrices: Mapping[MatrixKey, Quantized], adjusted: Mapping[MatrixKey, Adjustment]
    ) -> None:
        """Have matrices added, as ``QuantizedStore.add`` does, after those before; raises what writing those raised."""
        self.finish()
        self._pending = self._thread.submit(self._store.add, block, matrices, adjusted)

    def finish(self) -> None:
        """Return when all are in the store; raises what writing them raised."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
