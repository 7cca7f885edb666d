"""Voices that a bundle has beside its source's: made again from their record, and the consent that they need."""

from ..convert.bundle.manifest import Manifest
from ..convert.errors import Problem, UserError
from ..convert.file_names import MANIFEST, VOICES
from ..convert.hints import Hint
from ..convert.source.recorded_voice import RecordedVoice, check_consent, tables_sha256
from ..convert.source.source import Source
from ..convert.source.voices import PRESETS
from ..model.voice_prompt import make_voice, rows_of


def with_recorded(source: Source, manifest: Manifest) -> tuple[Source, list[Problem]]:
    """Return a source with the voices that a manifest records, made again from their tokens and the source's tables.

    A bundle's own can then be compared with them as presets are. Problems: records that make no voice of this source.
    """
    problems: list[Problem] = []
    tables = tables_sha256(source.checkpoint) if manifest.recorded_voices else ""
    for origin in manifest.recorded_voices:
        place = f"{MANIFEST}: voice {origin.name}"
        if origin.embedding_tables != tables:
            problems.append(Problem(place, "was made from other embedding tables than the source's"))
        try:
            voice = make_voice(origin.name, origin.codes, source.architecture, rows_of(source.checkpoint))
            source = source.with_voices([RecordedVoice(voice, origin)])
        except UserError as error:
            problems += [problem.within(place) for problem in error.problems]
        except ValueError as error:
            problems.append(Problem(place, str(error), Hint.CONVERT_AGAIN))
    return source, problems


def without_consent(manifest: Manifest) -> list[str]:
    """Return the names of a bundle's voices that were added to its source's, and for which no consent is recorded.

    A source has PersonaPlex's presets, voices of its own without any of these, or no voices.
    """
    agreed, recorded = set(), {origin.name for origin in manifest.recorded_voices}
    own = VOICES in manifest.source.files and not any(name in PRESETS for name in manifest.voices)
    for origin in manifest.recorded_voices:
        try:
            check_consent(origin.consent)
        except UserError:
            continue
        agreed.add(origin.name)
    added = [name for name in manifest.voices if name in recorded or not (own or name in PRESETS)]
    return [name for name in added if name not in agreed]
