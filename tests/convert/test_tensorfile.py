import json
from contextlib import closing

import numpy as np
import pytest
from ppx.convert.errors import UserError
from ppx.convert.tensorfile import Spec, TensorFile, TensorWriter, header_of
from safetensors.numpy import load_file, save_file


def test_header_bytes():
    header = header_of([Spec("b", "U32", (2, 1)), Spec("a", "F16", (3,))], {"format": "mlx"})
    text = (
        b'{"__metadata__":{"format":"mlx"},"b":{"dtype":"U32","shape":[2,1],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F16","shape":[3],"data_offsets":[8,14]}}'
    )
    assert header == (len(text) + -len(text) % 8).to_bytes(8, "little") + text + b" " * (-len(text) % 8)


def test_the_library_reads_what_is_written(tmp_path):
    path = tmp_path / "x.safetensors"
    words, floats = np.arange(12, dtype="<u4").reshape(3, 4), np.arange(3, dtype="<f2")
    writer = TensorWriter(path, [Spec("w", "U32", (3, 4)), Spec("f", "F16", (3,))], {})
    writer.append("w", words[:2])
    writer.append("w", words[2:])
    writer.append("f", floats)
    writer.finish()
    loaded = load_file(path)
    np.testing.assert_array_equal(loaded["w"], words)
    np.testing.assert_array_equal(loaded["f"], floats)


def test_tensors_out_of_turn_or_cut_short_are_refused(tmp_path):
    writer = TensorWriter(tmp_path / "x", [Spec("a", "F32", (2,)), Spec("b", "F32", (2,))], {})
    with pytest.raises(ValueError, match="came where 8 of a belong"):
        writer.append("b", np.zeros(2, np.float32))
    writer.close()
    writer = TensorWriter(tmp_path / "y", [Spec("a", "F32", (2,))], {})
    writer.append("a", np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="a is not whole"):
        writer.finish()
    writer.close()


def test_rows_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    save_file({"a": array, "z": np.zeros(5, np.float16)}, path)
    with closing(TensorFile(path)) as file:
        np.testing.assert_array_equal(file.read("a", 1, 4), array.reshape(6, 4)[1:4])
        assert file.specs["z"].shape == (5,)


def damage(kind: str, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if kind == "truncated":
        return data[:-1]
    if kind == "empty":
        return b""
    if kind == "huge header":
        return (1 << 62).to_bytes(8, "little") + data[8:]
    if kind == "doubled":
        text = json.dumps(header["a"])
        raw = f'{{"a":{text},"a":{text}}}'.encode()
        raw += b" " * (-len(raw) % 8)
        return len(raw).to_bytes(8, "little") + raw + data[8 + length :]
    header["a"]["data_offsets"] = [4, 1 << 40]
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]


@pytest.mark.parametrize("kind", ["truncated", "empty", "huge header", "offsets"])
def test_damaged_files_end_in_one_line(kind, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(8, np.float32)}, path)
    path.write_bytes(damage(kind, path.read_bytes()))
    with pytest.raises(UserError, match="download it again") as caught:
        TensorFile(path)
    assert len(caught.value.problems) == 1


def test_doubled_names_are_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(8, np.float32)}, path)
    with closing(TensorFile(path)) as file:
        assert file.doubled == []
    path.write_bytes(damage("doubled", path.read_bytes()))
    with closing(TensorFile(path)) as file:
        assert file.doubled == ["a"]


def test_a_file_cut_off_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros((4, 8), np.float32)}, path)
    with closing(TensorFile(path)) as file:
        with path.open("r+b") as other:
            other.truncate(path.stat().st_size - 8)
        with pytest.raises(UserError, match="while it was read"):
            file.read("a", 0, 4)
