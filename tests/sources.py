"""Sources as others publish them, made of a whole one: base Moshi, shards, projections apart, other file names."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from ppx.convert.source import demo
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


def base_moshi(folder: Path, card: int = 128) -> Path:
    """Make a base Moshi of random weights: 8 depformer steps, no voices, a config as Kyutai writes them."""
    small = replace(demo.SIZES["demo"], steps=8, num_layers=2, depformer_num_layers=2, card=card)
    demo.make("demo", folder, quiet=True, architecture=small)
    (folder / "voices.tgz").unlink()
    edit_config(folder, lambda config: config | {"model_type": "moshi", "depformer_context": 8, "lm_gen_config": {}})
    return folder


def edit_config(folder: Path, change: Callable[[dict[str, object]], dict[str, object]]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def rename(folder: Path, **names: str) -> None:
    """Give files other names, by their keys in config.json."""
    usual = {
        "moshi_name": "model.safetensors",
        "mimi_name": "tokenizer-e351c8d8-checkpoint125.safetensors",
        "tokenizer_name": "tokenizer_spm_32k_3.model",
    }
    for key, name in names.items():
        (folder / usual[key]).rename(folder / name)
    edit_config(folder, lambda config: config | names)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def keep_apart(folder: Path) -> list[str]:
    """Store attention's projections as newer code of moshi does, one tensor a step; return their names."""
    stored, apart = weights(folder), []
    steps = json.loads((folder / "config.json").read_text())["dep_q"]
    for name in list(stored):
        module = next((m for m in ("in_proj", "out_proj") if f".self_attn.{m}" in name), None)
        if module:
            count = steps if name.startswith("depformer") else 1
            stem = name.partition(f".{module}")[0]
            for step, part in enumerate(stored.pop(name).chunk(count)):
                apart.append(f"{stem}.{module}s.{step}.weight")
                stored[apart[-1]] = part.clone()
    save_file(stored, folder / "model.safetensors")
    return apart


def shard(folder: Path, count: int = 3) -> dict[str, str]:
    """Cut the weights into shards with an index, tensor after tensor; return which shard holds each."""
    stored = weights(folder)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    placed = {tensor: names[place % count] for place, tensor in enumerate(sorted(stored))}
    for name in names:
        save_file({tensor: stored[tensor] for tensor in stored if placed[tensor] == name}, folder / name)
    total = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": placed}))
    (folder / "model.safetensors").unlink()
    return placed


def copy_of(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("golden", "*_tokens.safetensors"))
    return target
