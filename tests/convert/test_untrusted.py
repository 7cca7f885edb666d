"""What others made is refused where it is read, in one line: devices, damaged codecs, forged manifests and reports."""

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from ppx.calibrate import sensitivity
from ppx.convert.bundle import shipped
from ppx.convert.bundle.inspect import read_contents
from ppx.convert.bundle.manifest import manifest_of
from ppx.convert.errors import CheckFailed, UserError
from ppx.convert.file_names import CODEC, TOKENIZER
from ppx.convert.regular_files import check_regular, open_regular, read_json, read_regular
from ppx.convert.schema import TEXT, Each, Maybe, mismatch, number, whole
from ppx.convert.source import adapter
from ppx.convert.source.architecture import from_config, read_config
from ppx.convert.source.license import license_of
from ppx.convert.source.source import fingerprint, locate, open_source
from ppx.convert.tensorfile import TensorFile
from ppx.model.tokens import read_token_file
from ppx.recipes.cli import console
from ppx.speak import audio_files
from ppx.verify import report
from ppx.verify.publishing import gate

SWIFT = ("--recipe", "4bit")


@pytest.fixture
def strange(tmp_path):
    """Return files that are none: a pipe, devices, a folder, and one of 5 GB that takes no place."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(5 << 30)
    (tmp_path / "link").symlink_to("/dev/zero")
    return [*(tmp_path / name for name in ("pipe", "folder", "huge", "link")), Path("/dev/zero"), Path("/dev/stdin")]


@pytest.mark.parametrize(
    "read",
    [
        lambda path, _: read_regular(path, 1 << 20),
        lambda path, _: check_regular(path, 1 << 20),
        lambda path, _: shipped.load(str(path)),
        lambda path, _: read_config(path),
        lambda path, _: sensitivity.read(path),
        lambda path, _: report.read(path),
        lambda path, a: read_token_file(path, a),
        lambda path, a: adapter.open_adapter(str(path), a, quiet=True),
        lambda path, _: TensorFile(path),
    ],
)
def test_only_regular_files_of_bounded_size_are_read(read, strange, pico):
    architecture = from_config(read_config(pico / "config.json"))
    for path in strange:
        with pytest.raises(UserError) as caught:
            read(path, architecture)
        assert str(path) in str(caught.value)


def test_a_strange_audio_file_is_refused_at_once(strange):
    pytest.importorskip("soundfile")
    for path in strange:
        for read in (audio_files.read, lambda path: audio_files.reading(path).__enter__()):
            with pytest.raises(UserError, match=rf"{path}: (is a|has 5368709120 bytes|No such)"):
                read(path)


def test_a_file_that_cannot_be_mapped_ends_in_a_line(tmp_path):
    with (tmp_path / "huge.safetensors").open("wb") as file:
        file.truncate(1 << 36)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 35, before[1]))
    try:
        with pytest.raises(UserError, match="too large for this process's address space"):
            TensorFile(tmp_path / "huge.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_card_that_is_a_pipe_states_no_license(tmp_path):
    os.mkfifo(tmp_path / "README.md")
    assert license_of(tmp_path) is None


@pytest.mark.parametrize("name", ["caf\udce9", "\x1b[2Jpico"])
def test_names_that_cannot_be_printed_are_refused_before_a_manifest_holds_them(name, pico, tmp_path):
    shutil.copytree(pico, tmp_path / f"{name} copy")
    (tmp_path / f"{name}.toml").write_text("")
    (tmp_path / f"{name}.safetensors").write_bytes(b"")
    for read in (
        lambda: locate(str(tmp_path / f"{name} copy")),
        lambda: shipped.load(str(tmp_path / f"{name}.toml")),
        lambda: adapter.locate(str(tmp_path / f"{name}.safetensors")),
    ):
        with pytest.raises(UserError, match="its name has characters that cannot be printed: rename it") as caught:
            read()
        assert str(caught.value).isascii()


def test_an_adapter_of_somebody_unknown_is_no_file() -> None:
    with pytest.raises(UserError, match="no such file"):
        adapter.locate("~nobody-of-this-name/lora.safetensors")


def test_a_name_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="not the name of a file"):
        open_regular(Path("a\0b"))
    with pytest.raises(UserError, match="No such file or directory: check the path"):
        open_regular(tmp_path / "nothing")


@pytest.mark.parametrize(
    "text", ["[" * 70 + "]" * 70, "[" * 100000, "NaN", '{"a": -Infinity}', "1" * 5000, "{", "\xff"]
)
def test_json_that_is_none_or_nests_deeply_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises((ValueError, RecursionError)):
        read_json(tmp_path / "a.json", 1 << 20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads is 3: it does not divide dim, 256"),
        ({"num_heads": 256}, "heads of dim 256 are 1 wide, RoPE needs pairs"),
        ({"depformer_num_heads": 128}, "depformer_num_heads is 128: it does not divide depformer_dim, 64"),
        ({"delays": [99] * 17}, r"delays is \[99, 99, .*: whole numbers from 0 to 32 are needed"),
        ({"delays": [0] * 16}, "delays has 16 entries"),
        ({"delays": [0] * 16 + [-1]}, "whole numbers from 0 to 32 are needed"),
        ({"delays": [16] * 17}, "context is 16: it must be longer than the longest delay, 16"),
        ({"existing_text_padding_id": 400}, "existing_text_padding_id is 400: the text vocabulary, text_card, is 400"),
        ({"n_q": 15, "delays": [0] * 16}, "n_q is 15: an even number is needed"),
        ({"dep_q": 17}, r"dep_q is 17: from 8 \(the agent's\) to 16"),
        ({"dep_q": 7}, r"dep_q is 7: from 8 \(the agent's\) to 16"),
        ({"hidden_scale": 0.1, "dim": 2, "num_heads": 1}, "nothing is left of the MLP"),
    ],
)
def test_impossible_sizes_are_refused(changes, message, pico):
    config = json.loads((pico / "config.json").read_text())
    with pytest.raises(UserError, match=message):
        from_config(config | changes)


def test_delays_must_fit_into_the_voices(pico_copy):
    config = json.loads((pico_copy / "config.json").read_text())
    (pico_copy / "config.json").write_text(json.dumps(config | {"delays": [0, *[5] * 16]}))
    with pytest.raises(UserError, match="cache has 4 columns of tokens, where the model's delays need 7"):
        open_source(locate(str(pico_copy)))


def codec(path, values, doubled=False):
    """Write a codec of one tensor; doubled: whether its header holds it twice."""
    entry = f'"aa":{{"dtype":"F32","shape":{list(values.shape)},"data_offsets":[0,{values.nbytes}]}}'
    header = f"{{{','.join([entry] * (1 + doubled))}}}".encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())


def test_all_that_is_wrong_with_a_source_is_said_at_once(pico_copy):
    config = json.loads((pico_copy / "config.json").read_text())
    (pico_copy / "config.json").write_text(json.dumps(config | {"num_heads": 3, "existing_text_padding_id": 999}))
    codec(pico_copy / CODEC, np.zeros((2, 2), np.float32), doubled=True)
    (pico_copy / TOKENIZER).write_text("<!DOCTYPE html><html><body>Sign in</body></html>")
    (pico_copy / "voices.tgz").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        open_source(locate(str(pico_copy)))
    lines = str(caught.value).splitlines()
    for message in ("num_heads is 3", "padding_id is 999", "aa: stands there twice", "sentencepiece model", ".tgz"):
        assert any(message in line for line in lines), message


def test_a_codec_that_is_not_finite_is_refused_when_it_is_read(pico_copy):
    codec(pico_copy / CODEC, np.array([[1, np.nan], [np.inf, 0]], np.float32))
    with (
        open_source(locate(str(pico_copy))) as source,
        pytest.raises(UserError, match=r"tokenizer.*: aa: 2 values are NaN or infinite"),
    ):
        fingerprint(source, quiet=True)
    Codec = pytest.importorskip("ppx.speak.codec").Codec
    pytest.importorskip("rustymimi")
    for doubled, message in ((False, "aa: 2 values are NaN"), (True, "aa: stands there twice")):
        codec(pico_copy / CODEC, np.array([[1, np.nan], [np.inf, 0]], np.float32), doubled)
        with pytest.raises(UserError, match=message):
            Codec(pico_copy / CODEC, 8)


@pytest.fixture
def copied(bundle, tmp_path):
    """A copy of a bundle, and a way to change its manifest or report."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundle(*SWIFT), folder)
    return folder


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["tensors"][0].update(file="/etc/passwd"), r"tensors\[0\].file is '/etc/passwd', which is not one"),
        (lambda m: m["tensors"][0].update(file="../x"), r"tensors\[0\].file is '../x', which is not one"),
        (lambda m: m["tensors"][0].update(file="README.md"), "which is not one of the bundle's files"),
        (lambda m: m["tensors"][0].update(rows=[5, 5]), r"tensors\[0\].rows"),
        (lambda m: m["tensors"][0].update(rows=[-1, 5]), r"tensors\[0\].rows\[0\] is -1"),
        (lambda m: m["files"].update({"/etc/passwd": m["files"]["config.json"]}), "names files outside of its folder"),
        (lambda m: m["files"].update({"link": m["files"]["config.json"]}), "names files outside of its folder"),
        (lambda m: m.update(bits_per_weight="x"), "bits_per_weight is 'x': a number of at least 0 is needed"),
        (lambda m: m.update(bits_per_weight=float("nan")), "holds NaN, which is not JSON"),
        (lambda m: m.update(voices=["\x1b[2J"]), r"voices\[0\] is '\\x1b\[2J': a line of printable text is needed"),
        (lambda m: m["architecture"].update(num_heads=3), "architecture: num_heads is 3"),
        (lambda m: m["architecture"].update(delays=[99] * 17), "architecture: delays"),
        (lambda m: m.update(toolkit={}), "toolkit.name is missing"),
        (lambda m: m["source"].update(filled={"a\x1b": "b"}), "source.filled has the name"),
        (lambda m: m.pop("tensors"), "tensors is not a list"),
    ],
)
def test_a_forged_manifest_is_refused_where_it_is_read(change, message, copied):
    (copied / "link").symlink_to("/etc/passwd")
    edit(copied / "manifest.json", change)
    for read in (manifest_of, read_contents, lambda folder: gate.ready(folder, "me/it", quiet=True)):
        with pytest.raises(UserError, match=message) as caught:
            read(copied)
        assert "\x1b" not in str(caught.value)


@pytest.fixture(scope="session")
def reported(program, pico, bundle, tmp_path_factory):
    """A bundle with its report."""
    folder = tmp_path_factory.mktemp("reported") / "bundle"
    shutil.copytree(bundle(*SWIFT), folder)
    options = ("--reference", pico, "--sequences", 2, "--frames", 48)
    program("ppx-verify", folder, *options, cwd=folder.parent)
    return folder


def divergence(value):
    return lambda r: r["predictions"]["text"]["bundle"]["kl"].update(mean=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (divergence(-3.0), "predictions.text.bundle.kl.mean is -3.0: a number of at least 0 is needed"),
        (divergence("0"), "predictions.text.bundle.kl.mean is '0'"),
        (divergence(True), "predictions.text.bundle.kl.mean is True"),
        (divergence(float("nan")), "not a report of ppx-verify"),
        (divergence(float("inf")), "not a report of ppx-verify"),
        (lambda r: r["predictions"]["agent"]["bundle"]["top1"].update(agreement=7), "a number from 0 to 1 is needed"),
        (lambda r: r["limits"].update(text_kl=-1), "limits.text_kl is -1"),
        (lambda r: r["limits"].pop("text_kl"), "limits.text_kl is missing"),
        (lambda r: r["predictions"].pop("agent"), "predictions.agent is missing"),
        (lambda r: r["weights"][0].update(relative_rmse=-0.5), r"weights\[0\].relative_rmse is -0.5"),
        (lambda r: r["activations"][3]["local"].update(relative_l2=-1), r"activations\[3\].local.relative_l2 is -1"),
        (lambda r: r["ran_on"].update(toolkit="\x1b]0;x\x07"), "ran_on.toolkit"),
        (lambda r: r.update(command="\u202e"), "command"),
    ],
)
def test_a_forged_report_is_not_published(change, message, reported, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(reported, folder)
    edit(folder / "parity" / "report.json", change)
    with pytest.raises(CheckFailed, match=message) as caught:
        gate.ready(folder, "me/it", quiet=True)
    assert "\x1b" not in str(caught.value)


def test_a_report_as_it_is_written_fits(reported):
    assert report.read(reported).verdict.passed
    assert gate.ready(reported, "me/it", quiet=True).objections == []


def test_schemas_name_the_place():
    schema = {"a": [Each(number(0, 1))], "b": Maybe(whole(1)), "c": TEXT}
    assert mismatch({"a": [{"x": 1, "y": 0.5}], "c": "text", "more": object()}, schema) is None
    for value, message in (
        ({"a": [], "c": ""}, None),
        ({"c": ""}, "a is missing"),
        ([], "it is a list: names with values are needed"),
        ({"a": {}, "c": ""}, "a is a dict: a list is needed"),
        ({"a": [{"x": 2}], "c": ""}, "a[0].x is 2: a number from 0 to 1 is needed"),
        ({"a": [{"\n": 2}], "c": ""}, "a[0] has the name '\\n': printable text is needed"),
        ({"a": [], "b": True, "c": ""}, "b is True: a whole number of at least 1 is needed"),
        ({"a": [], "c": "\x1b"}, "c is '\\x1b': a line of printable text is needed"),
    ):
        assert mismatch(value, schema) == message


def test_what_is_shown_cannot_command_a_terminal(capsys):
    console.show("one\x1b[2J\ntwo\udce9 – ≤\n")
    assert capsys.readouterr().out == "one\ufffd[2J\ntwo\ufffd – ≤\n\n"
