"""Which checkpoint and adapter a bundle was made from, and the command that compares it with them again."""

import re
import shlex
from pathlib import Path

from ..convert.bundle.location import published_as
from ..convert.bundle.records import SourceRecord
from ..convert.errors import UserError, printable
from ..convert.hints import Hint
from ..convert.source import adapter as adapters
from ..convert.source import demo
from ..convert.source.source import Source, anywhere, is_hub_id
from ..model.mlx_device import ARITHMETICS
from .options import VerifyOptions


def reference_of(bundle: Path, named: str | None, made_from: SourceRecord) -> tuple[str, str | None]:
    """Return the source to compare with, and its commit: the one that is named, else the one it was made from.

    Raises UserError for a bundle that was made from a folder, which has to be named.
    """
    identity = named or made_from.id
    if identity == made_from.id and is_hub_id(identity):
        commit = made_from.revision
        return identity, commit if commit and re.fullmatch("[0-9a-f]{40}", commit) else None
    if named or identity in demo.SIZES:
        return identity, None
    raise UserError(f"{bundle}: was made from a folder called {identity}", Hint.GIVE_REFERENCE)


def adapter_of(bundle: Path, named: str | None, made_from: SourceRecord) -> str | None:
    """Return the adapter to merge into the reference, None for a bundle that has none."""
    recorded = made_from.adapter
    if not recorded:
        if named:
            raise UserError(f"{bundle}: was made without an adapter", Hint.LEAVE_ADAPTER_OUT)
        return None
    if named or recorded.revision:
        return named or f"{recorded.id}@{recorded.revision}"
    raise UserError(f"{bundle}: an adapter was merged into it ({recorded.id})", Hint.GIVE_ADAPTER)


def check_adapter(opened: Source, made_from: SourceRecord) -> None:
    """Raise UserError if another adapter is merged into a reference than into the bundle."""
    used, recorded = opened.adapter, made_from.adapter
    if used is None or recorded is None:
        return
    if (used.sha256, used.rank, used.scaling) != (recorded.sha256, recorded.rank, recorded.scaling):
        raise UserError(f"{used.id}: not the adapter that was merged ({recorded.id})", Hint.OTHER_ADAPTER)


def command_of(bundle: Path, reference: str | None, adapter: str | None, options: VerifyOptions) -> str:
    """Return the command that runs a verification again; ``path/to`` stands for the folders above what is local."""
    published = published_as(bundle)
    words = ["ppx-verify", published[0] if published else bundle.resolve().name]
    words += ["--revision", published[1]] if published else []
    words += ["--reference", anywhere(reference)] if reference else []
    if adapter:
        words += ["--adapter", adapters.named(adapter)]
    for option, path in (("--tokens", options.tokens), ("--audio", options.audio)):
        words += [option, f"path/to/{path.name}"] if path else []
    for option, number in (
        ("--sequences", options.sequences),
        ("--frames", options.frames),
        ("--rollout", options.rollout),
    ):
        words += [option, str(number)] if number else []
    for bits in options.controls:
        words += ["--controls", str(bits)]
    words += ["--arithmetic", options.arithmetic] if options.arithmetic != ARITHMETICS[0] else []
    words += ["--device", options.device] if options.device else []
    return printable(shlex.join(words))
