"""From where a source is to an open source and a plan of its conversion."""

import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from .bundle.plan import Inventory, Plan, inventory_of_7b, inventory_of_demo, make_plan
from .bundle.recipe import Recipe
from .errors import UserError
from .source import demo
from .source.adapter import on_hub, open_adapter
from .source.architecture import PERSONAPLEX_STEPS, impossible
from .source.source import DEFAULT, Location, Source, is_hub_id, locate, locate_here, open_source
from .source.source_files import check_adapter
from .source.voice_archive import archive_with
from .unseen_source import unseen

_log = logging.getLogger(__name__)


def inventory(source: Source) -> Inventory:
    """Return what a plan needs to know of an open source."""
    voices = {voice.name: (voice.embeddings.shape[0], voice.cache.shape[2]) for voice in source.voices}
    added = [recorded.voice for recorded in source.recorded]
    return Inventory(
        identity=source.location.identity,
        architecture=source.architecture,
        sizes={
            kind: sum((source.location.folder / name).stat().st_size for name in names)
            for kind, names in source.location.files.by_kind().items()
        },
        voices=voices,
        others=tuple(source.others),
        copied_steps=tuple(sorted(source.checkpoint.copied_steps.items())),
        archive=archive_with(source.location.voices, added) if added else b"",
    )


def open_merged(
    location: Location,
    adapter: str | None,
    fill_depformer_steps: bool = False,
    thorough: bool = False,
    quiet: bool = False,
) -> Source:
    """Open a source, and an adapter (a file, a folder or a Hub id) that is merged into what is read of it.

    The source that is returned is a context manager, which closes both.
    """
    check_adapter(location.files, adapter is not None)
    source = open_source(location, fill_depformer_steps, thorough, quiet)
    if adapter is None:
        return source
    with ExitStack() as stack:
        stack.callback(source.close)
        if source.checkpoint.copied_steps:
            raise UserError("an adapter and filled depformer steps do not go together: it was trained on other weights")
        opened = open_adapter(adapter, source.architecture, quiet)
        stack.pop_all()
    merged = source.checkpoint.with_adapter(opened.merged, opened.pieces, opened.file)
    return replace(source, checkpoint=merged, adapter=opened.record())


def open_checked(
    location: Location,
    recipe: Recipe,
    fill_depformer_steps: bool = False,
    thorough: bool = False,
    quiet: bool = False,
    adapter: str | None = None,
) -> Source:
    """Open a source, with an adapter if one is given, that a recipe can be made of; the caller closes it.

    Raises UserError with all problems of both; where there are any, thorough reads the weights as well, to list those
    that are not finite with the rest.
    """
    try:
        source = open_merged(location, adapter, fill_depformer_steps, thorough, quiet)
    except UserError as error:
        problems = list(error.problems)
        try:
            check_recipe(recipe)
        except UserError as other:
            problems += other.problems
        raise UserError(problems) from None
    with ExitStack() as stack:
        stack.callback(source.close)
        make_plan(inventory(source), recipe)
        stack.pop_all()
    return source


def open_named(
    source: str,
    revision: str | None = None,
    adapter: str | None = None,
    fill_depformer_steps: bool = False,
    quiet: bool = True,
) -> Source:
    """Find and open a source as ``open_merged`` does: a Hub id, a folder or ``demo``; downloads what is missing."""
    check_revision(source, revision)
    return open_merged(locate(source, revision, quiet), adapter, fill_depformer_steps, quiet=quiet)


def prepare(
    location: Location,
    recipe: Recipe,
    fill_depformer_steps: bool = False,
    thorough: bool = False,
    quiet: bool = False,
    adapter: str | None = None,
) -> tuple[Source, Plan]:
    """Open a source as a recipe takes it, and make the plan; the caller closes the source. Raises as open_checked."""
    return planned(open_checked(location, recipe, fill_depformer_steps, thorough, quiet, adapter), recipe)


def planned(source: Source, recipe: Recipe) -> tuple[Source, Plan]:
    """Return an open source as a recipe takes it, and the plan; raises UserError for what the target cannot load."""
    plan = make_plan(inventory(source), recipe)
    return trimmed(source, plan.inventory.architecture.steps), plan


@dataclass(frozen=True)
class Reopening:
    """What opens a source again, in another process. adapter: the file that was merged. steps: of the depformer."""

    location: Location
    adapter: Path | None
    fill_depformer_steps: bool
    steps: int

    def open(self) -> Source:
        """Open the source as it was; the caller closes it."""
        adapter = str(self.adapter) if self.adapter else None
        return trimmed(open_merged(self.location, adapter, self.fill_depformer_steps, quiet=True), self.steps)


def reopening(source: Source) -> Reopening:
    """Return what opens an open source again."""
    checkpoint = source.checkpoint
    adapter = checkpoint.merge_file.path if checkpoint.merge_file else None
    return Reopening(source.location, adapter, bool(checkpoint.copied_steps), source.architecture.steps)


def trimmed(source: Source, steps: int) -> Source:
    """Return a source as if its model had only the first depformer steps, or itself if it has no more."""
    if steps >= source.architecture.steps:
        return source
    return replace(source, checkpoint=source.checkpoint.trimmed(steps))


def check_recipe(recipe: Recipe) -> None:
    """Raise UserError for what a target cannot load of a recipe, judged on PersonaPlex-7B, before any download."""
    make_plan(inventory_of_7b(DEFAULT), recipe)


def check_sizes(location: Location, recipe: Recipe, fill_depformer_steps: bool = False) -> None:
    """Raise UserError for what a target cannot load of the sizes in config.json, of which alone this judges."""
    architecture, stated = location.architecture()
    if stated and not impossible(architecture):
        architecture = replace(architecture, steps=PERSONAPLEX_STEPS) if fill_depformer_steps else architecture
        make_plan(replace(inventory_of_7b(location.identity), architecture=architecture), recipe)


def check_request(source: str, revision: str | None, recipe: Recipe) -> None:
    """Raise UserError for a revision of what has none, and, before a download, for what the target cannot load."""
    check_revision(source, revision)
    if is_hub_id(source):
        check_recipe(recipe)


def check_revision(source: str, revision: str | None) -> None:
    """Raise UserError for a revision of what has none."""
    if revision and not is_hub_id(source):
        raise UserError(f"a revision has no effect for {source}, which is not on the Hub: leave it out")


def plan(
    source: str | Path,
    recipe: Recipe,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    fill_depformer_steps: bool = False,
    quiet: bool = True,
) -> Plan:
    """Return the plan of a conversion; nothing is written or downloaded for it.

    It is made from the source where that is on this machine, else from what is known of its shapes; a warning then says
    what was not looked at. Raises UserError for what the target cannot load, and for a Hub id that does not exist.
    """
    return plan_and_download(
        source, recipe, revision=revision, adapter=adapter, fill_depformer_steps=fill_depformer_steps, quiet=quiet
    )[0]


def plan_and_download(
    source: str | Path,
    recipe: Recipe,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    fill_depformer_steps: bool = False,
    quiet: bool = True,
) -> tuple[Plan, int]:
    """Return the plan of a conversion as ``plan`` does, and how many bytes of its source the Hub's cache lacks."""
    where = str(source)
    check_request(where, revision, recipe)
    location = locate_here(where, revision, quiet)
    if location is not None:
        local = None if adapter and on_hub(adapter) else adapter
        if adapter != local:
            _log.warning("%s: not looked at: a dry run downloads nothing", adapter)
        opened, of_source = prepare(location, recipe, fill_depformer_steps, adapter=local)
        opened.close()
        return of_source, 0
    if adapter:
        _log.warning("%s: not looked at, as the source is not here", adapter)
    if where in demo.SIZES:
        _log.warning("%s was not made yet: planned from its shapes", where)
        return make_plan(inventory_of_demo(where), recipe), 0
    known, download = unseen(where, revision)
    return make_plan(known, recipe), download
