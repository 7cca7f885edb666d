"""An archive of voices with more voices in it, for the consumers that read ``voices.tgz``."""

import gzip
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from .archive import read_archive
from .voices import Voice, is_voice_file


def archive_with(path: Path | None, voices: Sequence[Voice]) -> bytes:
    """Return an archive's voices, byte for byte, and more of them after those, as a ``.tgz``.

    path: None for voices without an archive. Names no time and no user, so that the same voices give the same bytes.
    Raises what ``read_archive`` raises.
    """
    files = read_archive(path, is_voice_file)[0] if path else []
    members = [(str(name), data) for name, data in files]
    members += [(f"voices/{voice.name}.pt", torch_file(voice)) for voice in voices]
    unpacked = io.BytesIO()
    with tarfile.open(fileobj=unpacked, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return gzip.compress(unpacked.getvalue(), mtime=0)


def torch_file(voice: Voice) -> bytes:
    """Return a voice as ``torch.save`` writes a preset: embeddings in bfloat16, the cache in int64."""
    import torch  # seconds that a conversion without such a voice does not need

    embeddings = torch.from_numpy(voice.embeddings.view("<u2").copy()).view(torch.bfloat16)
    file = io.BytesIO()
    torch.save({"embeddings": embeddings, "cache": torch.from_numpy(voice.cache)}, file)
    return file.getvalue()
