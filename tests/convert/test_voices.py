import gzip
import io
import os
import pickle
import tarfile
import tracemalloc
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from ppx.convert.errors import UserError
from ppx.convert.source.architecture import from_config, read_config
from ppx.convert.source.torch_file import read_tensors
from ppx.convert.source.voices import PRESETS, read_voices


@pytest.fixture
def architecture(pico):
    return from_config(read_config(pico / "config.json"))


def voice(**changes: object) -> bytes:
    held = {
        "embeddings": torch.zeros(6, 1, 1, 256, dtype=torch.bfloat16),
        "cache": torch.zeros(1, 17, 4, dtype=torch.int64),
    } | changes
    file = io.BytesIO()
    torch.save({key: value for key, value in held.items() if value is not None}, file)
    return file.getvalue()


def archive(
    path: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]] = (), leave_out: Collection[str] = ()
) -> Path:
    """Write an archive with all presets and some more members: (name or TarInfo, bytes)."""
    with tarfile.open(path, "w:gz") as made:
        for name in PRESETS:
            if name not in leave_out:
                add(made, f"voices/{name}.pt", voice())
        for member, data in members:
            add(made, member, data)
    return path


def add(made: tarfile.TarFile, name: str | tarfile.TarInfo, data: bytes) -> None:
    member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
    member.size = len(data)
    made.addfile(member, io.BytesIO(data))


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def test_all_presets_of_pico_are_read_exactly(pico, architecture):
    voices, others = read_voices(pico / "voices.tgz", architecture)
    assert [v.name for v in voices] == sorted(PRESETS)
    assert others == []
    with tarfile.open(pico / "voices.tgz") as packed:
        for mine in voices:
            file = packed.extractfile(f"voices/{mine.name}.pt")
            assert file is not None
            held = torch.load(io.BytesIO(file.read()), weights_only=True)
            np.testing.assert_array_equal(
                mine.embeddings.view(np.uint16), held["embeddings"].view(torch.uint16).numpy()
            )
            np.testing.assert_array_equal(mine.cache, held["cache"].numpy())


def test_extra_voices_come_along_and_other_files_do_not(tmp_path, architecture):
    path = archive(tmp_path / "v.tgz", [("voices/MyOwn-1.pt", voice()), ("voices/._NATF0.pt", b"x"), ("README", b"x")])
    voices, others = read_voices(path, architecture)
    assert "MyOwn-1" in [v.name for v in voices]
    assert len(voices) == 19
    assert others == ["voices/._NATF0.pt", "README"]


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (("/etc/evil.pt", b""), "points outside"),
        (("voices/../../evil.pt", b""), "points outside"),
        (("..\\evil.pt", b""), "points outside"),
        ((special("voices/link.pt", tarfile.SYMTYPE, "/etc/passwd"), b""), "is a link"),
        ((special("voices/hard.pt", tarfile.LNKTYPE, "voices/NATF0.pt"), b""), "is a link"),
        ((special("voices/device.pt", tarfile.CHRTYPE), b""), "device"),
        ((special("voices/pipe.pt", tarfile.FIFOTYPE), b""), "device"),
    ],
)
def test_members_that_reach_out_are_refused(member, message, tmp_path, architecture):
    path = archive(tmp_path / "v.tgz", [member])
    with pytest.raises(UserError, match=message):
        read_voices(path, architecture)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.tgz"]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_wants_code_gets_none(tmp_path, architecture):
    touched = tmp_path / "touched"
    plain = pickle.dumps({"embeddings": Evil(touched), "cache": 0})
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Evil(touched), protocol=2))
        file.writestr("archive/version", "3\n")
    for data in (plain, zipped.getvalue()):
        with pytest.raises(
            UserError, match=r"asks for more than tensors \(posix.system\): do not|not a file that torch.save writes"
        ):
            read_voices(archive(tmp_path / "v.tgz", [("voices/EVIL.pt", data)]), architecture)
        assert not touched.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a file that torch.save writes"),
        (b"PK\x03\x04 no zip", "not a file that torch.save writes"),
        (voice(cache=None), "not embeddings and cache"),
        (voice(more=torch.zeros(1)), "not embeddings and cache"),
        (voice(embeddings=torch.zeros(6, 1, 1, 255, dtype=torch.bfloat16)), r"embeddings have shape \[6, 1, 1, 255\]"),
        (voice(embeddings=torch.full((6, 1, 1, 256), torch.nan, dtype=torch.bfloat16)), "not finite"),
        (voice(embeddings="x"), "embeddings is str"),
        (voice(cache=torch.zeros(1, 16, 4, dtype=torch.int64)), r"cache has shape \[1, 16, 4\]"),
        (voice(cache=torch.full((1, 17, 4), 1 << 40)), "tokens that this model does not have"),
        (voice(cache=torch.zeros(1, 17, 0, dtype=torch.int64)), r"cache has shape \[1, 17, 0\]"),
        (voice(cache=torch.zeros(1, 17, 1, dtype=torch.int64).expand(1, 17, 10**9)), "claims 136000000000 bytes"),
        (voice(embeddings=torch.zeros(1, 1, 1, 256).expand(10**8, 1, 1, 256)), "claims 102400000000 bytes"),
    ],
)
def test_a_voice_that_is_none_is_named(data, message, tmp_path, architecture):
    with pytest.raises(UserError, match=f"voices/BAD.pt: .*{message}"):
        read_voices(archive(tmp_path / "v.tgz", [("voices/BAD.pt", data)]), architecture)


def test_damaged_voices_end_in_a_line(tmp_path, architecture):
    random = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(voice())
        for place in random.integers(0, len(data), 3):
            data[place] = random.integers(256)
        try:
            read_voices(
                archive(tmp_path / "v.tgz", [("voices/BAD.pt", bytes(data))], leave_out=PRESETS[1:]), architecture
            )
        except UserError as error:
            assert error.problems  # noqa: PT017


def test_damaged_archives_end_in_a_line(pico, tmp_path, architecture):
    random = np.random.default_rng(0)
    whole = (pico / "voices.tgz").read_bytes()
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for place in random.integers(10, len(data), 3):
            data[place] = random.integers(256)
        (tmp_path / "v.tgz").write_bytes(data)
        try:
            read_voices(tmp_path / "v.tgz", architecture)
        except UserError:
            refused += 1
    assert refused > 50


def test_a_member_of_absurd_size_is_not_unpacked(tmp_path, architecture):
    path = tmp_path / "v.tgz"
    with tarfile.open(path, "w:gz") as made:
        add(made, "voices/BIG.pt", bytes(20 << 20))
    with pytest.raises(UserError, match="larger than any archive of voices"):
        read_voices(path, architecture)


def test_missing_and_doubled_voices(tmp_path, architecture):
    with pytest.raises(UserError, match="voices are missing: NATF3, VARM4"):
        read_voices(archive(tmp_path / "v.tgz", leave_out=("NATF3", "VARM4")), architecture)
    with pytest.raises(UserError, match="NATM0 is there twice"):
        read_voices(archive(tmp_path / "v.tgz", [("more/NATM0.pt", voice())]), architecture)


@pytest.mark.parametrize("cut", [0, 100, -100])
def test_an_archive_that_is_cut_off(cut, pico, tmp_path, architecture):
    (tmp_path / "v.tgz").write_bytes((pico / "voices.tgz").read_bytes()[:cut])
    with pytest.raises(UserError, match=r"not a readable \.tgz"):
        read_voices(tmp_path / "v.tgz", architecture)


def compressed(size):
    """Return a voice whose data record is deflated: so many zeros."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(voice())) as plain, zipfile.ZipFile(file, "w") as packed:
        for entry in plain.infolist():
            data = bytes(size) if entry.filename.endswith("data/0") else plain.read(entry)
            packed.writestr(entry.filename, data, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def header_of_size(kind, size):
    """Return the header block of a member that claims more than follows."""
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def gzipped(path, *parts):
    path.write_bytes(gzip.compress(b"".join(parts), compresslevel=1))
    return path


def refused_small(path, architecture, match):
    """Assert that an archive is refused, and that little memory was taken before it was."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=match):
            read_voices(path, architecture)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_compressed_record_is_refused_before_it_is_unpacked(tmp_path, architecture):
    path = archive(tmp_path / "v.tgz", [("voices/BOMB.pt", compressed(64 << 20))], leave_out=PRESETS)
    refused_small(path, architecture, r"BOMB.pt: record 'archive/data.pkl' is compressed .* do not use this file")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_long_header_is_refused_before_it_is_unpacked(kind, tmp_path, architecture):
    path = gzipped(tmp_path / "v.tgz", header_of_size(kind, 2600 << 20), bytes(64 << 20))
    refused_small(path, architecture, "larger than any archive of voices")


@pytest.mark.parametrize("size", [-512, -(1 << 40), 1 << 60])
def test_a_member_of_impossible_size_ends_in_a_line(size, tmp_path, architecture):
    path = gzipped(tmp_path / "v.tgz", header_of_size(tarfile.REGTYPE, size), bytes(1 << 20))
    refused_small(path, architecture, "larger than any archive of voices")


@pytest.mark.parametrize(
    "records",
    [
        b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n26 GNU.sparse.name=voices\n",
        b"27 GNU.sparse.map=1,x,,-4,y\n",
        b"25 GNU.sparse.size=banana\n",
        b"99999 path=x\n",
        b"0 path=x\n",
        b"14 size=banana\n",
        b"\xff\xfe",
    ],
)
def test_malformed_pax_headers_end_in_a_line(records, tmp_path, architecture):
    header = header_of_size(tarfile.XHDTYPE, len(records)) + records.ljust(512, b"\0")
    path = gzipped(tmp_path / "v.tgz", header, tarfile.TarInfo("voices/X.pt").tobuf(), bytes(1024))
    with pytest.raises(UserError, match=r"special file: do not use this archive|not a readable \.tgz"):
        read_voices(path, architecture)


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_in_both_formats(tar_format, tmp_path, architecture):
    long = "voices/" + "deep/" * 40
    with tarfile.open(tmp_path / "v.tgz", "w:gz", format=tar_format) as made:
        for name in PRESETS:
            add(made, f"{long}{name}.pt", voice())
        add(made, f"{long}ürümqi.txt", b"x")
    voices, others = read_voices(tmp_path / "v.tgz", architecture)
    assert [found.name for found in voices] == sorted(PRESETS)
    assert others == [f"{long}ürümqi.txt"]


@pytest.mark.parametrize("name", ["voices/caf\udce9.txt", "voices/\x1b]0;owned\x07.txt", "voices/\x1b[2Jx/NATF9.pt"])
def test_names_that_are_not_text_are_refused(name, tmp_path, architecture):
    with pytest.raises(UserError, match="not a name that can be printed") as caught:
        read_voices(archive(tmp_path / "v.tgz", [(name, b"x")]), architecture)
    assert str(caught.value).isascii()
    assert "\x1b" not in str(caught.value)


def test_every_flipped_bit_of_the_compressed_stream_is_found(pico, tmp_path, architecture):
    whole = (pico / "voices.tgz").read_bytes()
    begin = whole.index(b"\0", 10) + 1  # past the gzip header and the name in it, which no checksum covers
    for place in np.linspace(begin, len(whole) - 1, 16).astype(int):
        data = bytearray(whole)
        data[place] ^= 1 << int(place) % 8
        (tmp_path / "v.tgz").write_bytes(data)
        with pytest.raises(UserError):
            read_voices(tmp_path / "v.tgz", architecture)


@pytest.mark.parametrize("more", [b"more", gzip.compress(b"more", mtime=0), b"\0\0more"])
def test_what_follows_an_archive_is_found(more, pico, tmp_path, architecture):
    (tmp_path / "v.tgz").write_bytes((pico / "voices.tgz").read_bytes() + more)
    with pytest.raises(UserError, match=r"not a readable \.tgz"):
        read_voices(tmp_path / "v.tgz", architecture)


@pytest.mark.parametrize(
    "program",
    [
        pickle.dumps({("a",) * 3: 1}, protocol=2),  # keys are strings
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a memo of 2 billion entries: torch's and Python's allocate it
        b"\x80\x02" + b"((" * 20000 + b"t." * 20000,
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
        b"t.",
        b"\x80\x02",
        b"\x80\x02cexec",
    ],
)
def test_pickles_of_other_things_build_nothing(program):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("archive/data.pkl", program)
    tracemalloc.start()
    try:
        try:
            assert read_tensors(file.getvalue()) == {}
        except ValueError as error:
            assert str(error)  # noqa: PT017
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
        torch.arange(24).reshape(2, 3, 4)[:, ::2],
        torch.arange(24).reshape(4, 6)[1:3, 2:],
        torch.randn(5, 1, 1, 8, generator=torch.Generator().manual_seed(0)).bfloat16(),
        torch.zeros(0, 3),
        torch.tensor(5),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.stride()}",
)
def test_tensors_of_any_strides_are_read_as_torch_does(tensor):
    file = io.BytesIO()
    torch.save({"held": tensor}, file)
    found = read_tensors(file.getvalue())["held"]
    assert found.shape == tuple(tensor.shape)
    assert (found.astype(np.float32) == tensor.float().numpy()).all()


def test_a_tensor_that_unpacks_into_more_than_its_record_is_refused():
    file = io.BytesIO()
    torch.save({"held": torch.zeros(1).expand(1 << 14, 1 << 14)}, file)
    with pytest.raises(ValueError, match="claims 1073741824 bytes of 4"):
        read_tensors(file.getvalue())
