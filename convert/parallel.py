"""Work on a stream with several threads, in order and with little in memory at a time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ..quant.processors import cores as cores

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4  # items under way for each worker: enough to keep it busy while the consumer waits for a disk


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield ``function(item)`` for each item, in order, with at most ``workers`` running and a few more waiting.

    The function must release the GIL for most of its time (reads, hashes and the quantization kernels do).
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="ppx") as pool:
        yield from in_order_on(pool, function, items, AHEAD * workers)


def in_order_on(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int | None = None
) -> Iterator[Result]:
    """Do the same on threads that are there already, with at most ``ahead`` items under way."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= (ahead or AHEAD * cores()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
