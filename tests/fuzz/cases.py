"""The kinds of cases: each writes damaged files into a folder, and returns the programs that read them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from archives import edit_archive
from base import FILES, Base
from mutate import NAMES, VALUES, edit_bytes, edit_json, edit_json_file, edit_safetensors, edit_text, json_bytes
from server import Command

_RECIPES = ("4bit", "8bit", "bf16", "moshi-q4", "moshi-q8", "mixed")
_TELLING = (
    *("num_heads", "depformer_num_heads", "delays", "existing_text_padding_id", "context", "n_q", "dep_q", "card"),
    *("text_card", "hidden_scale", "max_period", "depformer_dim_feedforward"),
)
_HTML = b"<!DOCTYPE html><html><head><title>401</title></head><body>Sign in</body></html>\n"
_QUICK = ("--sequences", "1", "--frames", "40", "--device", "cpu")


def _copy(base: Path, folder: Path) -> None:
    """Put links to a folder's files where copies are not needed."""
    folder.mkdir()
    for path in base.rglob("*"):
        target = folder / path.relative_to(base)
        target.mkdir() if path.is_dir() else os.link(path, target)


def _replace(path: Path, data: bytes) -> None:
    """Write a file that may be a link to a base's, which stays."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def _odd(random: Random, path: Path) -> None:
    """Put something else in a file's place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    match random.randrange(9):
        case 0:
            os.mkfifo(path)
        case 1:
            path.symlink_to(random.choice(("/dev/zero", "/dev/stdin", "/etc/passwd", "/nowhere", ".", path.name)))
        case 2:
            path.mkdir()
        case 3:
            with path.open("wb") as file:
                file.truncate(random.choice((1, 1 << 24, 1 << 36)))
        case 4:
            path.write_bytes(b"")
        case 5:
            path.write_bytes(_HTML)
        case 6:
            path.write_bytes(random.randbytes(random.choice((1, 100, 100_000))))
        case 7:
            path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        case _:
            pass


def _renamed(random: Random, path: Path) -> str:
    """Give a file or folder an odd name now and then; return the name that it has."""
    if random.random() < 0.95 or not path.exists():
        return path.name
    odd = random.choice(NAMES).replace("/", "_").replace("\0", "_")
    name = f"{path.stem}{odd}"[:100] + path.suffix
    path.rename(path.with_name(name))
    return name


def _convert(random: Random, source: str, deep: float, *more: str) -> list[Command]:
    """Return a dry run, and now and then the conversion, with what comes after it."""
    recipe = random.choice(_RECIPES)
    options: tuple[str, ...] = (
        () if "--recipe" in more else random.choice((("--recipe", recipe), ("--no-quantize",), ("--bits", "3")))
    )
    options += more + (("--depformer-steps", "8") if random.random() < 0.1 else ())
    dry = Command("convert", (source, *options, "--dry-run", *(("--json",) if random.random() < 0.3 else ())))
    found = [dry]
    if random.random() < deep:
        found = [*random.choice(([], [dry])), Command("convert", (source, *options, "--no-verify", "-o", "out"))]
        found.append(Command("inspect", ("out", "--check")))
        if random.random() < 0.5:
            found.append(Command("verify", ("out", "--reference", source, *_adapters(more), *_QUICK)))
    return found


def _adapters(options: tuple[str, ...]) -> tuple[str, ...]:
    return ("--adapter", options[options.index("--adapter") + 1]) if "--adapter" in options else ()


def sources(random: Random, base: Base, folder: Path, deep: float) -> list[Command]:
    """A source of five files, one or two of them damaged."""
    source = folder / "source"
    _copy(base.source, source)
    for _ in range(random.choice((1, 1, 1, 2))):
        name = random.choice((*FILES, "voices.tgz", "voices.tgz", "config.json", "config.json", "README.md"))
        path = source / name
        if not path.is_file() or random.random() < 0.08:
            _odd(random, path)
        elif name == "config.json":
            config = json.loads((base.source / name).read_text())
            if random.random() < 0.7:  # one key at a time reaches deeper
                key = random.choice((random.choice(list(config)), random.choice(_TELLING)))
                lists = ([99] * 17, [0] * 17, [3] * 17, [0] * 16, [0, *[33] * 16], config["delays"][::-1])
                sizes = (*range(1, 20), 32, 64, 128, 256, 400, 512, 1 << 20)
                config[key] = random.choice(lists if key == "delays" else random.choice((sizes, VALUES)))
                deep = min(1.0, 5 * deep)
            else:
                config = edit_json(random, config)
            _replace(path, json_bytes(random, config))
        elif name == "voices.tgz":
            _replace(path, edit_archive(random, (base.source / name).read_bytes()))
        elif name.endswith(".safetensors"):
            _replace(path, edit_safetensors(random, path.read_bytes()))
        elif name == "README.md":
            _replace(path, _card(random))
        else:
            _replace(path, edit_bytes(random, path.read_bytes()))
    named = _renamed(random, source)
    if random.random() < 0.1:
        return [Command("inspect", (named, "--tensors", *random.choice(((), ("--json",)))))]
    return _convert(random, named, deep)


def _card(random: Random) -> bytes:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    value = random.choice((bomb, f"license: {random.choice(VALUES)!r}", "license: !!python/name:os.system", "[" * 5000))
    return f"---\n{value}\nlicense: *a39\n---\n".encode("utf-8", "replace")


def bundles(random: Random, base: Base, folder: Path, deep: float) -> list[Command]:
    """A bundle, one or two of whose files are damaged, sometimes with the hashes written anew."""
    given = random.choice(base.bundles)
    bundle = folder / "bundle"
    _copy(given, bundle)
    files = [path for path in bundle.rglob("*") if path.is_file()]
    plain = ("manifest.json", "manifest.json", "config.json", "parity/report.json", "parity/report.json")
    for _ in range(random.choice((1, 1, 1, 2))):
        path = random.choice((random.choice(files), *(bundle / name for name in plain)))
        if not path.is_file() or random.random() < 0.06:
            _odd(random, path) if path.parent.is_dir() else None
        elif path.suffix == ".json":
            _replace(path, edit_json_file(random, path.read_bytes()))
        elif path.suffix == ".safetensors":
            _replace(path, edit_safetensors(random, path.read_bytes()))
        elif path.suffix == ".tgz":
            _replace(path, edit_archive(random, path.read_bytes()))
        else:
            _replace(path, edit_bytes(random, path.read_bytes()))
    if random.random() < 0.15:
        _odd(random, bundle / f"x{random.choice(NAMES)}".replace("/", "_").replace("\0", "_")[:100])
    shutil.copy(base.recording, folder / "q.wav")
    _copy(base.source, folder / "source")
    cheap = [
        Command("inspect", ("bundle", "--check")),
        Command("inspect", ("bundle", "--tensors")),
        Command("inspect", ("bundle", "--json", "--tensors")),
        Command("publish", ("bundle", "me/it", "--dry-run")),
        Command("publish", ("bundle", "me/it", "--dry-run", "--force")),
        Command("verify", ("bundle", str(base.bundles[0]))),
        Command("speak", ("bundle", "q.wav", "-o", "a.wav", *_codec(base))),
    ]
    dear = [
        Command("verify", ("bundle", "--reference", "source", *_QUICK)),
        Command("verify", ("bundle", "--reference", "source", *_QUICK, "--rollout", "3")),
        Command("bench", ("bundle", "--frames", "2", "--json")),
    ]
    return [random.choice(dear if random.random() < deep else cheap)]


def recipes(random: Random, base: Base, folder: Path, deep: float) -> list[Command]:
    """A recipe with faults in its lines or bytes, or something else in its place."""
    path = folder / "recipe.toml"
    text = random.choice(base.recipes).read_text()
    data = edit_text(random, text).encode("utf-8", "surrogatepass")
    path.write_bytes(edit_bytes(random, data, 2) if random.random() < 0.1 else data)
    if random.random() < 0.08:
        _odd(random, path)
    name = _renamed(random, path)
    if random.random() < 0.05:
        name = random.choice(("/dev/zero", "/dev/stdin", *NAMES)).replace("\0", "?")
    _copy(base.source, folder / "source")
    return _convert(random, "source", deep / 2, "--recipe", name)


def tokens(random: Random, base: Base, folder: Path, deep: float) -> list[Command]:
    """A damaged file of tokens."""
    path = folder / "tokens.safetensors"
    path.write_bytes(edit_safetensors(random, base.tokens.read_bytes()))
    if random.random() < 0.1:
        _odd(random, path)
    _copy(base.source, folder / "source")
    _copy(base.bundles[0], folder / "bundle")
    if random.random() < max(deep, 0.1):
        verify = ("bundle", "--reference", "source", "--tokens", path.name, *_QUICK)
        return [Command("verify", verify)]
    frames = random.choice(("10", "250", "1"))
    return [Command("calibrate", ("source", "--tokens", path.name, "--frames", frames, "-o", "c.safetensors"))]


def audio(random: Random, base: Base, folder: Path, deep: float) -> list[Command]:
    """A damaged recording."""
    name = random.choice(("question.wav", "question.flac", "question.ogg", "question.raw", "question.mp3"))
    path = folder / name
    data = base.recording.read_bytes()
    if random.random() < 0.6:  # the header decides the most
        data = edit_bytes(random, data[:44], 3) + data[44:]
    path.write_bytes(edit_bytes(random, data) if random.random() < 0.5 else data)
    if random.random() < 0.12:
        _odd(random, path)
    _copy(base.source, folder / "source")
    _copy(base.bundles[random.randrange(2)], folder / "bundle")
    return [
        random.choice(
            (
                Command("speak", ("bundle", name, "-o", "a.wav", *_codec(base))),
                Command("calibrate", ("source", "--audio", name, "-o", "c.safetensors")),
                Command("verify", ("bundle", "--reference", "source", "--audio", name, "--device", "cpu")),
                Command("verify", ("bundle", "--round-trip", name)),
            )[: 4 if random.random() < deep else 2]
        )
    ]


def adapters(random: Random, base: Base, folder: Path, deep: float) -> list[Command]:
    """A damaged LoRA, or its settings."""
    adapter = folder / "adapter"
    _copy(base.adapter, adapter)
    for name in random.choice((("lora.safetensors",), ("config.json",), ("lora.safetensors", "config.json"))):
        path = adapter / name
        if random.random() < 0.1:
            _odd(random, path)
        elif name == "config.json":
            _replace(path, edit_json_file(random, path.read_bytes()))
        else:
            _replace(path, edit_safetensors(random, path.read_bytes()))
    _copy(base.source, folder / "source")
    named = _renamed(random, adapter)
    return _convert(random, "source", deep, "--adapter", random.choice((named, f"{named}/lora.safetensors")))


def _codec(base: Base) -> tuple[str, ...]:
    return ("--codec", str(base.codec), "--prompt", "") if base.codec else ()  # its context has no room for a prompt


Case = Callable[[Random, Base, Path, float], list[Command]]
KINDS: dict[str, tuple[Case, int]] = {  # what makes a case, and how many of 20 cases are of its kind
    "sources": (sources, 8),
    "bundles": (bundles, 5),
    "recipes": (recipes, 3),
    "tokens": (tokens, 1),
    "audio": (audio, 2),
    "adapters": (adapters, 1),
}


def kind_of(number: int, only: str | None) -> str:
    """Return the kind of a case, by its number."""
    every: list[Any] = [kind for kind, (_, share) in KINDS.items() for _ in range(share)]
    return only or every[number * 7 % len(every)]
