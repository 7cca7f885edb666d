"""Damages bytes, JSON values, and safetensors files, at random but repeatably."""

import json
import math
import struct
from random import Random
from typing import Any

NAMES = (
    "",
    ".",
    "..",
    "/etc/passwd",
    "../outside/evil",
    "../../../../../../tmp/evil",
    "a/../../evil",
    "C:\\evil",
    "..\\evil",
    "evil\0.pt",
    "\x1b]0;owned\x07",
    "\x1b[2J\x1b[31mred",
    "caf\udce9",
    "\u202egnp.exe",
    "x" * 300,
    "a\nb",
    "ürümqi",
    "-rf",
    "~root",
    "README.md",
    "manifest.json",
    "{{ 7 * 7 }}",
    "%s%n",
    "<script>alert(1)</script>",
)
ODD = ("\x1b]0;owned\x07", "\x1b[2Jred", "caf\udce9", "\u202egnp.exe", "a\nb", "../evil", "/etc/passwd")
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    16,
    31,
    255,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 63) - 1,
    1 << 64,
    10**400,
    -(1 << 63),
    0.0,
    -0.5,
    0.1,
    1e-300,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    "0",
    "4",
    [],
    {},
    [[]],
    [1] * 17,
    [99] * 17,
    [0] * 16,
    {"a": {"b": {}}},
    *NAMES,
)
_INTEGERS = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
)


def edit_bytes(random: Random, data: bytes, most: int = 4) -> bytes:
    """Return bytes with a few faults: flipped bits, runs cut out, doubled or overwritten, numbers, an early end."""
    made = bytearray(data)
    for _ in range(random.randint(1, most)):
        place = random.randrange(len(made) + 1)
        length = random.choice((1, 2, 4, 8, 64, 512, 4096))
        match random.randrange(8):
            case 0 if made:
                made[place % len(made)] ^= 1 << random.randrange(8)
            case 1:
                del made[place : place + length]
            case 2:
                made[place:place] = made[place : place + length]
            case 3:
                made[place : place + length] = random.randbytes(length)
            case 4:
                width = random.choice(["<H", ">H", "<I", ">I", "<Q", ">Q"])
                size = struct.calcsize(width)
                made[place : place + size] = struct.pack(width, random.choice(_INTEGERS) % (1 << 8 * size))
            case 5:
                del made[place:]
            case 6:
                made[place : place + length] = bytes(length)
            case _:
                made += random.choice((b"\0", b"\0" * 512, random.randbytes(100), data[:length]))
    return bytes(made)


def edit_json_file(random: Random, data: bytes) -> bytes:
    """Return a JSON file with faults in its values, or in its bytes."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):  # damaged already
        return edit_bytes(random, data)
    return json_bytes(random, edit_json(random, tree))


def edit_json(random: Random, tree: Any, times: int | None = None) -> Any:
    """Return a parsed JSON value with some values replaced, removed, doubled, renamed or added; may change in place."""
    for _ in range(times or random.choice((1, 1, 1, 2, 5))):
        if random.random() < 0.01:
            return random.choice(VALUES)
        holders = _holders(tree)
        if not holders:
            return random.choice(VALUES)
        holder = random.choice(holders)
        key = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
        match random.randrange(10):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[random.choice(NAMES)] = holder.pop(key)
            case 1:
                holder.append(holder[key])
            case 2 if isinstance(holder, dict):
                holder[random.choice(NAMES)] = random.choice(VALUES)
            case 3 | 4 if type(holder[key]) in (int, float):
                holder[key] = random.choice((-1, 2, 0.5, 3, 1000, 1 + 1e-9)) * holder[key]
            case 5 if isinstance(holder[key], int):
                holder[key] += random.choice((-2, -1, 1, 2, 64))
            case 6 if isinstance(holder[key], str):
                holder[key] += random.choice(NAMES)
            case _:
                holder[key] = random.choice(VALUES)
    return tree


def _holders(tree: Any) -> list[Any]:
    """Return every list and dictionary that holds something; those near the root count more often."""
    found, level, weight = [], [tree], 8
    while level:
        holders = [one for one in level if isinstance(one, dict | list) and one]
        found += holders * weight
        weight = max(1, weight // 2)
        level = [inner for one in holders for inner in (one.values() if isinstance(one, dict) else one)]
    return found


def json_bytes(random: Random, value: Any) -> bytes:
    """Return a value as JSON text, now and then with a doubled key, of another encoding, or nested very deep."""
    text = json.dumps(value, ensure_ascii=random.random() < 0.7)
    data = text.encode("utf-8", "surrogatepass")
    chance = random.random()
    if chance < 0.03 and text.startswith("{") and len(text) > 2:
        return data[:-1] + b"," + data[1:]
    if chance < 0.05:
        return random.choice(
            (text.encode("utf-16", "surrogatepass"), b"\xef\xbb\xbf" + data, b"[" * 100_000, b"{}" * 9)
        )
    return edit_bytes(random, data, 2) if chance < 0.12 else data


def edit_safetensors(random: Random, data: bytes) -> bytes:
    """Return a safetensors file with faults in its header, in its values, or anywhere."""
    length = int.from_bytes(data[:8], "little")
    header, values = data[8 : 8 + length], data[8 + length :]
    try:
        tree = json.loads(header)
    except ValueError:  # damaged already
        return edit_bytes(random, data)
    match random.randrange(8):
        case 0:
            return edit_bytes(random, data)
        case 1:
            made = bytearray(values)
            for _ in range(random.randint(1, 4)):
                place = random.randrange(max(1, len(made) - 4))
                made[place : place + 4] = random.choice((b"\xff\xff\xff\xff", b"\0\0\x80\x7f", random.randbytes(4)))
            return data[: 8 + length] + bytes(made[: len(values)])
        case 2:
            return random.choice(_INTEGERS).to_bytes(8, "little") + data[8:]
        case 3:
            return data[: 8 + length] + values[: random.randrange(len(values) + 1)]
        case _:
            return with_header(random, _edit_header(random, tree), values)


def _edit_header(random: Random, tree: Any) -> Any:
    names = [name for name, entry in tree.items() if isinstance(entry, dict) and "data_offsets" in entry]
    if len(names) < len(tree) - 1 or not names:  # damaged already
        return edit_json(random, tree)
    name, other = random.choice(names), random.choice(names)
    entry = tree[name]
    match random.randrange(8):
        case 0:
            entry["dtype"] = random.choice(
                ("F32", "BF16", "F16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F4", "XX", "")
            )
        case 1:
            entry["shape"] = random.choice(
                (entry["shape"][::-1], [], [0], [1 << 40], [-1], [1.5], entry["shape"] + [1])
            )
        case 2:
            entry["data_offsets"] = random.choice(([0, 0], tree[other]["data_offsets"], [-1, 5], [5, 1], [0, 1 << 62]))
        case 3:
            tree[random.choice((other, other + ".x", *NAMES))] = tree.pop(name)
        case 4:
            tree[name], tree[other] = tree[other], tree[name]
        case 5:
            tree["__metadata__"] = random.choice(({"a": "b" * 100_000}, {"a": 1}, [], {"\x1b[2J": "\x1b[2J"}))
        case 6:
            size, kind = entry["data_offsets"][1] - entry["data_offsets"][0], random.choice(("F32", "BF16", "U8"))
            width = {"F32": 4, "BF16": 2, "U8": 1}[kind]
            entry.update(dtype=kind, shape=[size // width])
        case _:
            return edit_json(random, tree)
    return tree


def with_header(random: Random, tree: Any, values: bytes) -> bytes:
    """Return a safetensors file of a header and values, sometimes with an entry that stands there twice."""
    text = json.dumps(tree).encode()
    if isinstance(tree, dict) and len(tree) > 1 and random.random() < 0.1:
        name = random.choice(list(tree))
        text = text[:-1] + b"," + json.dumps({name: tree[name]}).encode()[1:]
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + values


def edit_text(random: Random, text: str) -> str:
    """Return text with lines and words removed, doubled, swapped or replaced."""
    lines = text.split("\n")
    for _ in range(random.choice((1, 1, 2, 3, 8))):
        place, other = random.randrange(len(lines)), random.randrange(len(lines))
        words = lines[place].split(" ")
        match random.randrange(6):
            case 0:
                lines[place : place + 1] = []
                lines = lines or [""]
            case 1:
                lines.insert(other, lines[place])
            case 2:
                lines[place], lines[other] = lines[other], lines[place]
            case 3:
                words[random.randrange(len(words))] = _written(random.choice(VALUES))
                lines[place] = " ".join(words)
            case 4:
                cut = random.randrange(len(lines[place]) + 1)
                lines[place] = lines[place][:cut] + random.choice(
                    ("", '"', "[", "]", "=", "#", "\\", "\t", "\0", "é", "1")
                )
            case _:
                key, equals, _ = lines[place].partition("=")
                lines[place] = f"{key}{equals} {_written(random.choice(VALUES))}"
    return "\n".join(lines)


def _written(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, float) else str(value)
