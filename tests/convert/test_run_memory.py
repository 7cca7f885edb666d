"""The memory of a conversation, computed from a plan or a manifest, against what a conversation allocates."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from ppx.convert.bundle import shipped
from ppx.convert.bundle.manifest import Manifest, manifest_of
from ppx.convert.bundle.reader import open_bundle
from ppx.convert.bundle.run_memory import RunMemory, memory_of, planned_memory
from ppx.convert.preparation import plan
from ppx.convert.source.architecture import Architecture
from ppx.convert.tensorfile import TensorFile
from ppx.speak import loader

HEADERS = 1 << 20  # bytes of a few files' headers


def without_depformer(manifest: Manifest) -> RunMemory:
    return memory_of(replace(manifest, architecture=replace(manifest.architecture, depformer_num_layers=0)))


@pytest.mark.parametrize("recipe", ["4bit", "moshi-q4", "mixed"])
def test_it_is_what_a_conversation_allocates(recipe, bundle, pico):
    folder = bundle("--recipe", recipe)
    manifest = manifest_of(folder)
    estimate, a = memory_of(manifest), manifest.architecture
    tensors = 0
    for name in {tensor.file for tensor in manifest.tensors}:
        with closing(TensorFile(folder / name)) as file:
            tensors += sum(spec.nbytes for spec in file.specs.values())
    assert 0 <= estimate.weights - tensors < HEADERS
    codec = next(pico.glob("tokenizer-*.safetensors"))
    assert estimate.codec == codec.stat().st_size
    with closing(open_bundle(folder)) as opened:
        model = loader.load(opened, manifest.dtype)
    columns = np.zeros((1 + a.n_q, 3 * a.context), np.int32)
    kv_cache = model.prefill(columns)
    assert kv_cache.capacity == model.context == a.context - 1  # of a full ring the reference masks the oldest
    allocated = sum(array.nbytes for array in (*kv_cache.keys, *kv_cache.values))
    assert without_depformer(manifest).kv_cache == allocated * a.context // (a.context - 1)
    assert (
        estimate.kv_cache - without_depformer(manifest).kv_cache
        == 4 * a.depformer_num_layers * a.steps * a.depformer_dim
    )
    assert estimate.total == estimate.weights + estimate.kv_cache + estimate.codec


@pytest.mark.parametrize("recipe", shipped.names())
def test_a_plan_and_a_manifest_give_the_same(recipe, bundle, pico):
    made = bundle("--recipe", recipe)
    assert planned_memory(plan(pico, shipped.load(recipe))) == memory_of(manifest_of(made))


def test_the_kv_cache_of_7b(bundle):
    manifest = replace(manifest_of(bundle("--recipe", "4bit")), architecture=Architecture())
    assert memory_of(manifest).kv_cache == 2 * 2 * (32 * 3000 * 4096 + 6 * 16 * 1024)


def test_a_target_that_is_not_known_has_no_codec(bundle):
    assert memory_of(replace(manifest_of(bundle("--recipe", "4bit")), target="another")).codec == 0
