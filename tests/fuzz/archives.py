"""Archives of voices with faults at every level: gzip, tar, zip, pickle, tensor."""

import gzip
import io
import os
import pickle
import tarfile
import zipfile
import zlib
from functools import cache
from random import Random
from typing import Any

from mutate import NAMES, ODD, edit_bytes

_TYPES = (b"0", b"\0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"L", b"K", b"x", b"g", b"S", b"X", b"V", b"M", b"Z")
_SIZES = (0, 1, 511, 512, 513, 1 << 20, 1 << 24, 1 << 31, 1 << 33, 1 << 40, 1 << 62, -1, -512, -(1 << 40))
_BOMB = 16 << 20  # bytes of zeros, packed once
_TIMES = 90  # 1.4 GiB unpacked


class _Runs:
    """Asks to be built by a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@cache
def _packed_zeros() -> bytes:
    return gzip.compress(bytes(_BOMB), 6)


@cache
def _deflated_zeros() -> tuple[bytes, int]:
    """Return a deflated run of zeros of 1.4 GiB, and its checksum."""
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    block = packer.compress(bytes(_BOMB)) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum, zeros = 0, bytes(_BOMB)
    for _ in range(_TIMES):
        checksum = zlib.crc32(zeros, checksum)
    return block * _TIMES + b"\x03\x00", checksum


def edit_archive(random: Random, data: bytes) -> bytes:
    """Return a ``.tgz`` with faults at a random level."""
    match random.randrange(6):
        case 0:
            return edit_bytes(random, data)
        case 1:
            whole = gzip.decompress(data)
            return gzip.compress(edit_bytes(random, whole), 1)
        case 2:
            return data + random.choice((b"\0", b"\0" * 600, b"x", data, gzip.compress(b"x")))
        case 3:
            return _bomb(random, data)
        case _:
            return _rebuilt(random, gzip.decompress(data))


def _bomb(random: Random, data: bytes) -> bytes:
    """Return an archive that unpacks to 1.4 GiB: in a header, in a member, or behind its end."""
    info = tarfile.TarInfo(random.choice(("voices/BOMB.pt", "readme", "././@LongLink")))
    info.type = random.choice((b"L", b"K", b"x", b"g", b"0", b"S"))
    info.size = random.choice((_BOMB * _TIMES, 1 << 33, 1 << 20, _BOMB))
    start = gzip.compress(info.tobuf(tarfile.GNU_FORMAT))
    return random.choice((start, data)) + _packed_zeros() * _TIMES


def _rebuilt(random: Random, whole: bytes) -> bytes:
    """Return the archive written anew, with faults in some members."""
    made = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(whole)) as given:
        members = [(info, given.extractfile(info).read() if info.isfile() else b"") for info in given.getmembers()]  # type: ignore[union-attr]
    chosen = {random.randrange(len(members)) for _ in range(random.choice((1, 1, 2, 5)))}
    for number, (info, data) in enumerate(members):
        if number not in chosen:
            made.write(_member(info, data))
            continue
        match random.randrange(8):
            case 0:
                pass
            case 1:
                made.write(_member(info, data) * 2)
            case 2:
                made.write(_header_faults(random, info) + data + bytes(-len(data) % 512))
            case 3:
                made.write(_pax(random) + _member(info, data))
            case 4:
                odd = random.choice(random.choice((NAMES, ODD)))
                info.name = random.choice((odd, f"voices/{odd}.pt", f"{odd}/x.pt", f"voices/{odd}.txt"))
                made.write(_member(info, data))
            case _:
                made.write(_member(info, edit_voice(random, data)))
    made.write(bytes(random.choice((1024, 1024, 512, 0, 10240))))
    return gzip.compress(made.getvalue(), 1)


def _member(info: tarfile.TarInfo, data: bytes) -> bytes:
    info.size = len(data)
    info.name = info.name.replace("\0", "?")
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512)


def _header_faults(random: Random, info: tarfile.TarInfo) -> bytes:
    info.type = random.choice(_TYPES)
    info.linkname = random.choice(("/etc/passwd", "voices/NATF0.pt", ".."))
    if random.random() < 0.6:
        info.size = random.choice(_SIZES)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-512:])
    if random.random() < 0.3:
        place = random.randrange(512)
        block[place] = random.randrange(256)
        if random.random() < 0.7:
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _pax(random: Random) -> bytes:
    """Return a pax header with odd records."""
    pairs = (
        ("path", random.choice(NAMES)),
        ("size", random.choice(("-1", "banana", "9" * 30, "0", "100"))),
        ("GNU.sparse.map", random.choice(("1", "1,x,,-4", "0,1,5"))),
        ("GNU.sparse.major", random.choice(("1", "x"))),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.size", random.choice(("banana", "-5", "99999999999"))),
        ("GNU.sparse.realsize", "x"),
        ("hdrcharset", "BINARY"),
        ("mtime", "nan"),
        ("\x1b[2J", "x"),
    )
    records = b""
    for key, value in random.sample(pairs, random.randint(1, 4)):
        body = f" {key}={value}\n".encode("utf-8", "surrogateescape")
        length = len(body) + random.choice((2, 2, 2, 3, 1))
        records += str(length).encode() + body
    info = tarfile.TarInfo("pax")
    info.type, info.size = random.choice((b"x", b"x", b"g")), len(records)
    return info.tobuf(tarfile.GNU_FORMAT) + records + bytes(-len(records) % 512)


def edit_voice(random: Random, data: bytes) -> bytes:
    """Return a voice's file with faults in its zip container, its pickle or its values."""
    if random.random() < 0.25 or not zipfile.is_zipfile(io.BytesIO(data)):
        return random.choice(
            (b"", b"PK", b"\x80\x02.", edit_bytes(random, data), pickle.dumps(_Runs(os.system, "true")))
        )
    with zipfile.ZipFile(io.BytesIO(data)) as given:
        records = {name: given.read(name) for name in given.namelist()}
    name = random.choice(list(records))
    method = zipfile.ZIP_STORED
    match random.randrange(8):
        case 0:
            records[name] = edit_bytes(random, records[name])
        case 1:
            records["archive/data.pkl"] = _pickle(random, records["archive/data.pkl"])
        case 2:
            records[random.choice(NAMES) or "x"] = records.pop(name)
        case 3:
            method = random.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        case 4:
            return _zip_bomb(records)
        case 5:
            values = bytearray(records["archive/data/0"])
            values[0:2] = random.choice((b"\xc0\x7f", b"\x80\x7f", b"\x80\xff"))
            records["archive/data/0"] = bytes(values)
        case 6:
            records["archive/data/1"] = random.choice((-1, 1 << 40, 99999)).to_bytes(8, "little", signed=True) * 68
        case _:
            records["archive/data.pkl"] = edit_bytes(random, records["archive/data.pkl"], 2)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as packed:
        for key, value in records.items():
            packed.writestr(key.replace("\0", "?").encode("utf-8", "replace").decode() or "x", value)
    return made.getvalue() if random.random() < 0.9 else edit_bytes(random, made.getvalue(), 1)


def _pickle(random: Random, program: bytes) -> bytes:
    """Return a pickle that asks for code, for much memory or time, or for other types."""
    doubling = b"\x80\x02)" + b"q\0h\0h\0\x86" * 60
    return random.choice(
        (
            pickle.dumps(_Runs(os.system, "touch evil"), 2),
            pickle.dumps({"embeddings": _Runs(bytearray, 3 << 30), "cache": 0}, 2),
            b"\x80\x02}r\xff\xff\xff\x7f.",
            doubling + b".",
            b"\x80\x02}" + doubling[2:] + b"K\x01s.",
            b"\x80\x02" + b"(" * 30_000 + b"t" * 30_000 + b".",
            b"\x80\x02" + b"]a" * 1000 + b".",
            b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
            program.replace(b"BFloat16Storage", random.choice((b"FloatStorage", b"LongStorage", b"QUInt8Storage"))),
            program.replace(b"torch", b"posix"),
            program[:-1],
            program + program,
        )
    )


def _zip_bomb(records: dict[str, bytes]) -> bytes:
    """Return a zip file one of whose records is deflated, and 1.4 GiB unpacked."""
    made = io.BytesIO()
    packed, checksum = _deflated_zeros()
    with zipfile.ZipFile(made, "w") as file:
        for name, value in records.items():
            file.writestr(name, packed if name.endswith("/0") else value)
    data = bytearray(made.getvalue())
    for signature, method, crc, size in ((b"PK\x03\x04", 8, 14, 22), (b"PK\x01\x02", 10, 16, 24)):
        place, wanted = data.find(signature), len(packed).to_bytes(4, "little")
        while place >= 0:
            if data[place + size : place + size + 4] == wanted:
                data[place + method : place + method + 2] = b"\x08\0"
                data[place + crc : place + crc + 4] = checksum.to_bytes(4, "little")
                data[place + size : place + size + 4] = (_BOMB * _TIMES).to_bytes(4, "little")
            place = data.find(signature, place + 4)
    return bytes(data)
