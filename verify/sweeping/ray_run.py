"""Running a sweep's work on a Ray cluster: one task a piece, which Ray runs again where a node or a process dies."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...convert.errors import UserError, reason
from ...convert.hints import Hint
from .jobs import Job
from .place import Place
from .settings import Resources
from .work import Outcome, perform

AUTO = "auto"
_LOCAL = "local"
_WAIT = 1.0  # seconds, after which progress is shown again
_OBJECTS = 128 << 20  # bytes of a local cluster's object store: outcomes are small, files travel by path or URL
_log = logging.getLogger(__name__)


@contextmanager
def cluster(address: str, resources: Resources) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine; disconnect at the end.

    address: of the cluster, or ``auto`` for the one that RAY_ADDRESS names, else a local one. Raises UserError without
    Ray, for a cluster that does not answer, and for cells that need more than this machine has.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a library must not tell others what it runs
    try:
        import ray
    except ImportError:
        raise UserError("Ray is not installed (pip install 'ppx-convert[cluster]')", Hint.WITHOUT_RAY) from None
    where = os.environ.get("RAY_ADDRESS") or _LOCAL if address == AUTO else address
    local = where == _LOCAL
    more: dict[str, Any] = {"object_store_memory": _OBJECTS} if local else {}
    try:
        ray.init(where, log_to_driver=False, logging_level=logging.ERROR, **more)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"Ray at {where}: {reason(error)}", Hint.START_RAY) from None
    try:
        if not slots(resources):
            message = f"no node has what a cell may take ({resources.cores} cores, {resources.gpus:g} GPUs)"
            if local:
                raise UserError(f"{message}: ask for less under [resources]")
            _log.warning("%s: waiting for one that has", message)
        yield
    finally:
        ray.shutdown()


def slots(resources: Resources) -> int:
    """Return how many cells the nodes that are alive run at the same time."""
    import ray

    nodes: Any = ray.nodes
    there = [node["Resources"] for node in nodes() if node["Alive"]]
    return sum(resources.slots(node.get("CPU", 0), node.get("memory", 0), node.get("GPU", 0)) for node in there)


def run_on_ray(jobs: Sequence[Job], place: Place, resources: Resources) -> Iterator[tuple[Job, Outcome] | None]:
    """Do the work on the cluster; yields each job with its outcome as it ends, None now and then while none does."""
    import ray

    task: Any = ray.remote(perform)
    options: dict[str, Any] = {"num_cpus": resources.cores, "num_gpus": resources.gpus}
    options |= {"max_retries": resources.retries, "retry_exceptions": False, "scheduling_strategy": "SPREAD"}
    if resources.memory:
        options["memory"] = resources.memory
    references: dict[str, Any] = {}
    waiting: dict[Any, Job] = {}
    shared = ray.put(place)
    for job in jobs:
        needs = [references[need] for need in job.needs]
        named = task.options(name=job.label, **options)
        references[job.work.key] = named.remote(job.work, shared, resources, *needs)
        waiting[references[job.work.key]] = job
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_WAIT)
        if not ready:
            yield None
        for reference in ready:
            job = waiting.pop(reference)
            yield job, _outcome(job, reference)


def _outcome(job: Job, reference: Any) -> Outcome:
    """Return what a task ended with: an error where it, or one that it needs, died more often than it is started."""
    import ray
    from ray.exceptions import RayError

    try:
        outcome: Outcome = ray.get(reference)
    except RayError as error:
        return Outcome(job.work.key, 0.0, f"{type(error).__name__}: {reason(error)}", kind="failed")
    return outcome
