"""The model card of a bundle, ``README.md``, and its ``NOTICE``: rendered from the manifest and the report alone."""

import re
import shlex
import string
from collections.abc import Sequence
from importlib.resources import files as resources
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from ...convert.bundle.describe import count, size
from ...convert.bundle.manifest import TOOLKIT, Manifest
from ...convert.bundle.records import CalibrationRecord
from ...convert.bundle.run_memory import memory_of
from ...convert.bundle.targets import TARGETS
from ...convert.errors import UserError
from ...convert.source import demo
from ...convert.source.license import UNKNOWN, License
from ...convert.source.source import HUB_ID, anywhere, is_hub_id
from ...convert.source.tensors import roles
from ...model.kernel_test import workarounds
from ...model.tokens import CALIBRATION_FRAMES, CALIBRATION_SESSIONS, SELF_GENERATED
from ...quant.affine import method_name
from .. import headline
from .. import report as reports
from ..records import Report

README, NOTICE = "README.md", "NOTICE"
PIPELINE = "audio-to-audio"
KYUTAI_NOTICE = "Derived from Moshi by Kyutai, whose weights are under CC BY 4.0."
NVIDIA_NOTICE = "Licensed by NVIDIA Corporation under the NVIDIA Open Model License"


def files(
    manifest: Manifest,
    report: Report | None,
    repository: str = "USER/NAME",
    objections: Sequence[str] = (),
    base_model: str | None = None,
) -> dict[str, str]:
    """Return the texts that go beside a bundle: its card, and the notice that redistribution asks for.

    repository: what commands in the card call it. objections: why it should not have been published. base_model: the
    repository of a source or adapter that was read from this machine; raises UserError where that is known.
    """
    source_license, bases = manifest.source.license or UNKNOWN, base_models(manifest, base_model)
    data, target = metadata(manifest, source_license, bases), TARGETS.get(manifest.target)
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)  # noqa: S701  (Markdown)
    environment.filters |= {"size": size, "count": count, "short": reports.short}
    environment.filters |= {"plain": _plain, "code": _code, "literal": _literal, "methods": _methods}
    text = environment.from_string((resources(__package__) / "templates" / "card.md").read_text("utf-8")).render(
        manifest=manifest,
        report=report,
        verdict=headline.verdict(report) if report else "",
        headline=headline.headline(report) if report else "",
        meaning=headline.MEANING,
        figures=reports.figures(report) if report else [],
        controls=reports.controls(report) if report else [],
        comparison=headline.comparison(report) if report else "",
        memory=memory_of(manifest),
        programs=target.programs_of(bool(manifest.voices)) if target else _plain(manifest.target),
        title=title(manifest, bases),
        base_model=base_model,
        replaced=workarounds(report.kernels) if report else [],
        repository=repository,
        objections=objections,
        license=source_license,
        bits=bits_of(manifest),
        total=manifest.nbytes,
        command=command(manifest),
        resampled=resampled(manifest.calibration),
        made_up=_is_random(manifest),
        notice=NVIDIA_NOTICE if source_license.of_nvidia else "",
        kyutai="" if _is_random(manifest) else KYUTAI_NOTICE,
        linked=is_on_hub(manifest),
    )
    return {README: f"---\n{data.to_yaml()}\n---\n\n{text}\n", NOTICE: _notice(manifest, source_license)}


def title(manifest: Manifest, bases: Sequence[str]) -> str:
    """Return the name of the fine-tune that was quantized, the bits, and what loads it."""
    bits, name = bits_of(manifest), bases[-1].split("/")[-1] if bases else manifest.source.id
    return f"{name}, {f'{bits} bit' if bits else manifest.dtype}, for {manifest.target}"


def base_models(manifest: Manifest, named: str | None = None) -> list[str]:
    """Return the repositories that a bundle was made from, the fine-tune last.

    named: that of a source or an adapter whose files were on this machine. Raises UserError for what is not a name, and
    for a name of what has one already.
    """
    adapter = manifest.source.adapter
    known = [manifest.source.id] if is_on_hub(manifest) else []
    merged = [adapter.id] if adapter and adapter.revision else []
    if named is None:
        return known + merged if known else []
    check_base_model(named)
    if _is_random(manifest):
        raise UserError(f"{named}: not the base model of {manifest.source.id}, which the toolkit makes itself")
    if known and (merged or not adapter):
        raise UserError(f"{named}: not the base model: the bundle was made from {' and '.join(known + merged)}")
    return [*known, named, *merged]


def check_base_model(named: str) -> None:
    """Raise UserError for what is no name of a repository."""
    if not HUB_ID.fullmatch(named):
        raise UserError(f"{named}: not the name of a base model: give USER/NAME of a repository on the Hub")


def metadata(manifest: Manifest, source_license: License, base: Sequence[str]) -> ModelCardData:
    """Return what the Hub reads of a card."""
    bits = bits_of(manifest)
    tags = ["mlx", "personaplex", "moshi", "speech-to-speech", "full-duplex", manifest.target]
    tags += [f"{bits}-bit"] if bits else []
    related: dict[str, Any] = {"base_model_relation": "quantized"} if base else {}
    return ModelCardData(
        language="en",
        license=source_license.license,
        license_name=source_license.license_name,
        license_link=source_license.license_link,
        library_name="mlx",
        pipeline_tag=PIPELINE,
        tags=tags,
        base_model=list(base) or None,
        **related,
    )


def is_on_hub(manifest: Manifest) -> bool:
    """Tell whether a bundle's source is a repository that a card can link to."""
    return manifest.source.revision is not None and is_hub_id(manifest.source.id)


def bits_of(manifest: Manifest) -> int | None:
    """Return the bits that most quantized weights of a bundle have, None if none are quantized."""
    known = roles(manifest.architecture)
    counts: dict[int, int] = {}
    for tensor in manifest.tensors:
        if tensor.bits is not None and tensor.source in known:
            first, last = tensor.rows
            count = (last - first) * known[tensor.source].shape[-1]
            counts[tensor.bits] = counts.get(tensor.bits, 0) + count
    return max(counts, key=lambda bits: counts[bits]) if counts else None


def command(manifest: Manifest) -> str:
    """Return the command that makes a bundle again, from the recipe that stands in the card.

    ``path/to`` stands for the folders above a source that is not on the Hub.
    """
    source, adapter, calibration = manifest.source, manifest.source.adapter, manifest.calibration
    words = [TOOLKIT, *([source.id, "--revision", source.revision] if source.revision else [anywhere(source.id)])]
    words += ["--adapter", "@".join(filter(None, (adapter.id, adapter.revision)))] if adapter else []
    words += ["--fill-depformer-steps"] if source.copied_steps else []
    for voice in manifest.recorded_voices:
        words += ["--voice", f"{voice.name}.safetensors"]
    if calibration:
        words += ["--tokens", calibration.file] if calibration.file and not resampled(calibration) else []
        words += ["--refine", str(calibration.refined_steps)] if calibration.refined_steps else []
    return shlex.join([*words, "--recipe", "recipe.toml", "--output", "bundle"])


def resampled(calibration: CalibrationRecord | None) -> bool:
    """Tell whether a conversion to which no calibration tokens are given generates these itself."""
    if calibration is None or calibration.kind != SELF_GENERATED:
        return False
    return (calibration.sequences, calibration.frames) == (CALIBRATION_SESSIONS, CALIBRATION_FRAMES)


def _is_random(manifest: Manifest) -> bool:
    return manifest.source.id in demo.SIZES


def _notice(manifest: Manifest, source_license: License) -> str:
    source = manifest.source
    at = f" at {source.revision}" if source.revision else ""
    lines = [f"These weights were made from {_plain(source.id)}{at} by {TOOLKIT}, which changed their format."]
    link = f" ({source_license.license_link})" if source_license.license_link else ""
    lines.append(f"License of the source: {source_license.title}{link}")
    if source_license.non_commercial:
        lines.append("Commercial use is not allowed.")
    lines += [NVIDIA_NOTICE] if source_license.of_nvidia else []
    lines += [] if _is_random(manifest) else [KYUTAI_NOTICE]
    return "\n".join(lines) + "\n"


def _plain(text: object) -> str:
    """Return an untrusted name so that Markdown shows it and does nothing else with it."""
    return "".join(character if character.isalnum() or character in " -_./:+," else "?" for character in str(text))


def _literal(text: str) -> str:
    """Return untrusted words so that Markdown shows every character as it is."""
    return "".join(f"\\{one}" if one in string.punctuation else one for one in text if one.isprintable())


def _methods(recipe: str) -> str:
    """Return a stored recipe with its methods as people call them, which a recipe file may."""
    return re.sub(r"\blsq(_unweighted)?\b", lambda found: method_name(found[0]), recipe)


def _code(text: str) -> str:
    """Return untrusted lines so that they end no block of code and command no terminal."""
    kept = "".join(character for character in text if character.isprintable() or character == "\n")
    return kept.replace("```", "'''").strip()
