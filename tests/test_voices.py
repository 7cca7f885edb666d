import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from ppx.convert.architecture import from_config, read_config
from ppx.convert.problems import UserError
from ppx.convert.voices import PRESETS, read_voices


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
        with pytest.raises(UserError, match=r"do not use this file|not a voice"):
            read_voices(archive(tmp_path / "v.tgz", [("voices/EVIL.pt", data)]), architecture)
        assert not touched.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a voice that torch can read"),
        (b"PK\x03\x04 no zip", "not a voice that torch can read"),
        (voice(cache=None), "not embeddings and cache"),
        (voice(more=torch.zeros(1)), "not embeddings and cache"),
        (voice(embeddings=torch.zeros(6, 1, 1, 255, dtype=torch.bfloat16)), r"embeddings have shape \[6, 1, 1, 255\]"),
        (voice(embeddings=torch.full((6, 1, 1, 256), torch.nan, dtype=torch.bfloat16)), "not finite"),
        (voice(embeddings="x"), "embeddings is str"),
        (voice(cache=torch.zeros(1, 16, 4, dtype=torch.int64)), r"cache has shape \[1, 16, 4\]"),
        (voice(cache=torch.full((1, 17, 4), 1 << 40)), "no tokens of this model"),
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
