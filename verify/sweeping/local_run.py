"""Running a sweep's work in this process, one piece after another."""

from collections.abc import Iterator, Sequence

from .jobs import Job
from .place import Place
from .settings import Resources
from .work import Outcome, perform


def run_here(jobs: Sequence[Job], place: Place, resources: Resources) -> Iterator[tuple[Job, Outcome]]:
    """Do the work, in order; yields each job with its outcome. resources: of a cell, and at most this machine's."""
    outcomes: dict[str, Outcome] = {}
    for job in jobs:
        needs = [outcomes[need] for need in job.needs]
        outcomes[job.work.key] = perform(job.work, place, resources, *needs)
        yield job, outcomes[job.work.key]
