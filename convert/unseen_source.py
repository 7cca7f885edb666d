"""A source on the Hub of which nothing is on this machine: what a plan can know from the list of its files."""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace

from .bundle.plan import Inventory, inventory_of_7b
from .errors import refuse
from .file_names import CODEC, CONFIG, FILES, INDEX, TOKENIZER, VOICES, WEIGHTS
from .source import hub
from .source.source import DEFAULT

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_log = logging.getLogger(__name__)


def unseen(source: str, revision: str | None) -> tuple[Inventory, int]:
    """Return what is known of a source, with PersonaPlex-7B's shapes, and how many bytes the Hub's cache lacks of it.

    Warns of what is not known: none of its files is read. Raises UserError for a repository or a revision that does not
    exist, and for one that lacks files.
    """
    listing = hub.remote_sizes(source, revision)
    _log.warning("%s is not on this machine: planned from the published layout of %s", source, DEFAULT)
    known = inventory_of_7b(source)
    if listing is None:
        _log.warning("the Hub was not reached: whether it has %s, and in what size, is not known", source)
        return known, _missing(source, revision, known.sizes)
    files = _files(source, listing)
    sizes = {kind: sum(listing[name] for name in names) for kind, names in files.items()}
    unnamed = [kind for kind in (WEIGHTS, CODEC, TOKENIZER) if kind not in files]
    if unnamed:
        _log.warning(
            "%s: has no %s: its %s may name other files, whose sizes are not known",
            source,
            ", ".join(unnamed),
            CONFIG,
        )
    sizes |= {kind: known.sizes[kind] for kind in unnamed}
    if abs(sizes[WEIGHTS] - known.sizes[WEIGHTS]) > 0.01 * known.sizes[WEIGHTS]:
        _log.warning(
            "%s: its %s has %s, other than that of %s: this plan is not its own",
            source,
            WEIGHTS,
            f"{sizes[WEIGHTS]:,} bytes",
            DEFAULT,
        )
    voices = known.voices if VOICES in files else {}
    remote = {name: listing[name] for names in files.values() for name in names}
    remote |= {kind: known.sizes[kind] for kind in unnamed}
    return replace(known, sizes=sizes, voices=voices), _missing(source, revision, remote)


def _files(source: str, listing: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Return the names of a source's files, under those that PersonaPlex's have: shards where it has no single file."""
    files: dict[str, tuple[str, ...]] = {kind: (kind,) for kind in FILES if kind in listing}
    shards = tuple(sorted(name for name in listing if _SHARD.fullmatch(name)))
    if WEIGHTS not in files and INDEX in listing and shards:
        files[WEIGHTS] = shards
    needed = FILES if source == DEFAULT else () if CONFIG in listing else (WEIGHTS, CODEC, TOKENIZER)
    refuse([f"{source}: has no {kind}: is this the right repository?" for kind in needed if kind not in files])
    return files


def _missing(source: str, revision: str | None, sizes: Mapping[str, int]) -> int:
    return sum(size for name, size in sizes.items() if not hub.cached(source, revision, [name]))
