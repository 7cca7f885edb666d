"""Files of a ``.tgz`` from others, read in one pass with a bound on everything; nothing is unpacked on the disk.

The reader is below ``tarfile``, which reads headers (long names, pax records) of any size into memory, and stops before
the end of the compressed stream, where its checksum is.
"""

import gzip
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import Problem, UserError, refuse
from ..hints import Hint
from ..regular_files import check_regular, open_regular

LARGEST_MEMBER = 16 << 20  # bytes
LARGEST_ARCHIVE = 256 << 20  # bytes, unpacked
MOST_MEMBERS = 2000
_LARGEST_HEADER = 64 << 10  # bytes of a long name or of pax records
_BLOCK = tarfile.BLOCKSIZE
_PAX_RECORD = re.compile(rb"([1-9][0-9]{0,5}) ([^=]+)=")
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = (
    tarfile.DIRTYPE,
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
)
_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_HINT = "do not use this archive"


class _Damaged(Exception):  # noqa: N818  (it never leaves this module)
    """The stream is not a tar archive, or breaks off."""


class _TooLarge(Exception):  # noqa: N818
    """More would have to be read than any archive of voices holds."""


@dataclass(frozen=True)
class _Member:
    name: str
    kind: bytes
    size: int
    sparse: bool


class _Stream:
    """Unpacked bytes, of which at most LARGEST_ARCHIVE are read."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self._file, self._left = file, LARGEST_ARCHIVE

    def take(self, count: int, largest: int) -> bytes:
        """Return so many bytes, and pass over what fills up their last block."""
        if not 0 <= count <= largest:
            raise _TooLarge
        data = self._read(-(-count // _BLOCK) * _BLOCK)
        return data[:count]

    def skip(self, count: int) -> None:
        """Pass over so many bytes, and what fills up their last block."""
        if not 0 <= count <= self._left:
            raise _TooLarge
        blocks = -(-count // _BLOCK)
        while blocks:
            self._read(min(blocks, 128) * _BLOCK)
            blocks -= min(blocks, 128)

    def header(self, first: bool) -> bytes | None:
        """Return the next block, None at the end of the stream."""
        data = self._file.read(_BLOCK)
        self._left -= len(data)
        if self._left < 0:
            raise _TooLarge
        if len(data) < (_BLOCK if data or first else 0):
            raise _Damaged("it ends in the middle of a header")
        return data or None

    def _read(self, count: int) -> bytes:
        if count > self._left:
            raise _TooLarge
        data = self._file.read(count)
        self._left -= count
        if len(data) < count:
            raise _Damaged("it ends in the middle of a file")
        return data

    def finish(self) -> None:
        """Read to the end, which checks the stream's checksum; only zeros may be left."""
        while data := self._file.read(1 << 16):
            self._left -= len(data)
            if self._left < 0:
                raise _TooLarge
            if data.count(0) < len(data):
                raise _Damaged("something follows its end")


def read_archive(
    path: Path, wanted: Callable[[PurePosixPath], bool]
) -> tuple[list[tuple[PurePosixPath, bytes]], list[str]]:
    """Return name and content of the files that are wanted, and the names of the others, in the archive's order.

    Raises UserError with all that is wrong: members that point outside of the archive, links, devices, names that are
    not UTF-8 or command a terminal, more bytes or members than the bounds above, a checksum that does not match.
    """
    files: list[tuple[PurePosixPath, bytes]] = []
    others: list[str] = []
    problems: list[Problem] = []
    check_regular(path, LARGEST_ARCHIVE)
    name = "its beginning"
    try:
        with os.fdopen(open_regular(path), "rb") as packed, gzip.GzipFile(fileobj=packed) as unpacked:
            stream = _Stream(unpacked)
            for number, member in enumerate(_members(stream)):
                name = ascii(member.name)
                if number >= MOST_MEMBERS:
                    raise _TooLarge
                place = PurePosixPath(member.name)
                problem = _problem(member, place)
                if problem:
                    problems.append(Problem(str(path), f"{name} {problem}", _HINT))
                if problem or member.kind not in _FILES:
                    stream.skip(0 if member.kind in _WITHOUT_DATA else member.size)
                elif wanted(place):
                    files.append((place, stream.take(member.size, LARGEST_MEMBER)))
                else:
                    others.append(member.name)
                    stream.skip(member.size)
            stream.finish()
    except _TooLarge:
        message = f"what follows {name} makes it larger than any archive of voices"
        problems.append(Problem(str(path), message, _HINT))
    except (_Damaged, OSError, EOFError, zlib.error, tarfile.TarError) as error:
        if not problems:
            raise UserError(f"{path}: not a readable .tgz ({error})", Hint.DOWNLOAD_AGAIN) from None
    refuse(problems)
    return files, others


def _problem(member: _Member, place: PurePosixPath) -> str | None:
    """Return what is wrong with a member, None if nothing is."""
    if not member.name.isprintable():
        return "is not a name that can be printed"
    if place.is_absolute() or ".." in place.parts or "\\" in member.name or not place.parts:
        return None if not place.parts and member.kind == tarfile.DIRTYPE else "points outside of the archive"
    if member.kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        return "is a link"
    if member.sparse or member.kind not in (*_FILES, tarfile.DIRTYPE):
        return "is a device or another special file"
    return None


def _members(stream: _Stream) -> Iterator[_Member]:
    """Yield the members; what each holds is to be taken before the next."""
    name: str | None = None
    records: dict[bytes, bytes] = {}
    headers = 0
    while block := stream.header(first=not headers):
        if block.count(0) == _BLOCK:  # the end; a second block of zeros follows
            break
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        headers += 1
        if headers > 4 * MOST_MEMBERS:
            raise _TooLarge
        if info.type in _NAMES:
            data = stream.take(info.size, _LARGEST_HEADER)
            name = _text(data.split(b"\0")[0]) if info.type == tarfile.GNUTYPE_LONGNAME else name
        elif info.type in _PAX:
            data = stream.take(info.size, _LARGEST_HEADER)
            records |= _pax_records(data) if info.type != tarfile.XGLTYPE else {}
        else:
            size = records.get(b"size", b"")
            sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith(b"GNU.sparse.") for key in records)
            long_name = _text(records[b"path"]) if b"path" in records else name
            if size and not re.fullmatch(rb"[0-9]{1,18}", size):
                raise _Damaged("a header gives a size that is not a number")
            yield _Member(long_name or info.name, info.type, int(size) if size else info.size, sparse)
            name, records = None, {}


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Return the records of a pax header: ``LENGTH KEY=VALUE`` and a new line each."""
    found, place = {}, 0
    while place < len(data) and data[place]:
        match = _PAX_RECORD.match(data, place)
        end = place + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise _Damaged("a pax header is malformed")
        found[match[2]] = data[match.end() : end - 1]
        place = end
    return found
