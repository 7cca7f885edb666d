"""LoRA adapters that are merged while the weights are read, against weights that were merged apart."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import Repository, running, sha256
from ppx.convert import preparation
from ppx.convert.bundle import shipped
from ppx.convert.bundle.build import build
from ppx.convert.errors import UserError
from ppx.convert.source.adapter import open_adapter
from ppx.convert.source.architecture import Architecture, from_config, read_config
from ppx.convert.source.source import fingerprint, locate
from ppx.convert.source.tensors import roles
from safetensors.torch import load_file, save_file

RANK, SCALING = 4, 1.5


def architecture_of(folder: Path) -> Architecture:
    return from_config(read_config(folder / "config.json"))


def layers(pico: Path) -> dict[str, tuple[str, int, int, int]]:
    """Names of layers as moshi-finetune writes them, with tensor, first row, rows and columns."""
    known = roles(architecture_of(pico))
    height = known["depformer.layers.0.self_attn.in_proj_weight"]
    step = height.shape[0] // height.stacked
    dim = known["depformer.layers.1.self_attn.out_proj.weight"].shape[1]
    found: dict[str, tuple[str, int, int | None]] = {
        "transformer.layers.0.self_attn.in_projs.0": ("transformer.layers.0.self_attn.in_proj_weight", 0, None),
        "transformer.layers.1.self_attn.in_proj": ("transformer.layers.1.self_attn.in_proj_weight", 0, None),
        "transformer.layers.1.self_attn.out_projs.0": ("transformer.layers.1.self_attn.out_proj.weight", 0, None),
        "transformer.layers.0.gating.linear_in": ("transformer.layers.0.gating.linear_in.weight", 0, None),
        "depformer.layers.0.self_attn.in_projs.3": ("depformer.layers.0.self_attn.in_proj_weight", 3 * step, step),
        "depformer.layers.0.self_attn.in_projs.5": ("depformer.layers.0.self_attn.in_proj_weight", 5 * step, step),
        "depformer.layers.1.self_attn.out_projs.15": ("depformer.layers.1.self_attn.out_proj.weight", 15 * dim, dim),
        "depformer.layers.0.gating.7.linear_out": ("depformer.layers.0.gating.7.linear_out.weight", 0, None),
        "depformer_in.2": ("depformer_in.2.weight", 0, None),
        "linears.11": ("linears.11.weight", 0, None),
        "text_linear": ("text_linear.weight", 0, None),
    }
    return {
        stem: (name, first, rows or known[name].shape[0], known[name].shape[1])
        for stem, (name, first, rows) in found.items()
    }


def matrices(pico: Path, rank: int = RANK) -> dict[str, torch.Tensor]:
    """An adapter's tensors, large enough that they show."""
    random = torch.Generator().manual_seed(7)
    tensors = {}
    for stem, (_, _, rows, columns) in layers(pico).items():
        tensors[f"{stem}.lora_A.weight"] = (torch.randn(rank, columns, generator=random) / 8).bfloat16()
        tensors[f"{stem}.lora_B.weight"] = (torch.randn(rows, rank, generator=random) / 8).bfloat16()
    return tensors


def write(folder: Path, tensors: dict[str, torch.Tensor], config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "lora.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def adapter(pico, tmp_path):
    return write(tmp_path / "run", matrices(pico), {"lora_rank": RANK, "lora_scaling": SCALING, "lora": True})


@pytest.fixture
def merged(pico_copy, pico):
    """The checkpoint with the same adapter merged by torch, in float32."""
    weights, tensors = load_file(pico_copy / "model.safetensors"), matrices(pico)
    for stem, (name, first, rows, _) in layers(pico).items():
        a, b = (tensors[f"{stem}.lora_{side}.weight"].double() for side in "AB")
        whole = weights[name].double()
        whole[first : first + rows] += SCALING * (b @ a)
        weights[name] = whole.float()
    save_file(weights, pico_copy / "model.safetensors")
    return pico_copy


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents of a bundle that do not name its source."""
    kept = [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".safetensors", ".model")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


@pytest.mark.parametrize(
    "options",
    [
        ["--no-quantize", "--target", "mlx"],
        ["--bits", "4"],
        ["--recipe", "moshi-q4"],
    ],
)
def test_a_merged_adapter_is_what_merging_apart_gives(options, program, pico, adapter, merged, tmp_path):
    program("ppx-convert", pico, "--adapter", adapter, *options, "-o", tmp_path / "streamed", cwd=tmp_path)
    program("ppx-convert", merged, *options, "-o", tmp_path / "apart", cwd=tmp_path)
    assert files_of(tmp_path / "streamed") == files_of(tmp_path / "apart")


def test_an_adapter_that_changes_meanwhile_is_noticed(pico, adapter, tmp_path):
    location, recipe = locate(str(pico)), shipped.load("4bit")
    source, plan = preparation.prepare(location, recipe, quiet=True, adapter=str(adapter))
    with source:
        fingerprints = fingerprint(source, quiet=True)
        write(adapter, matrices(pico) | {"linears.11.lora_A.weight": torch.zeros(RANK, 64).bfloat16()}, None)
        with pytest.raises(UserError, match=r"lora\.safetensors: changed while it was converted"):
            build(source, plan, tmp_path / "out", quiet=True, fingerprints=fingerprints)
    assert not (tmp_path / "out").exists()


def test_several_jobs_make_the_same_bundle(program, pico, adapter, tmp_path):
    for jobs in ("1", "3"):
        program("ppx-convert", pico, "--adapter", adapter, "--jobs", jobs, "-o", tmp_path / jobs, cwd=tmp_path)
    one, three = (json.loads((tmp_path / jobs / "manifest.json").read_text()) for jobs in ("1", "3"))
    assert one == three


def test_steps_that_lie_in_one_pair_of_matrices(program, pico, tmp_path):
    """Code before ``in_projs`` stacked the steps' matrices like their weights."""
    known = roles(architecture_of(pico))["depformer.layers.0.self_attn.in_proj_weight"]
    steps, (rows, columns) = known.stacked, known.shape
    random = torch.Generator().manual_seed(3)
    a = torch.randn(steps * RANK, columns, generator=random) / 8
    b = torch.randn(rows, RANK, generator=random) / 8
    stem, config = "depformer.layers.0.self_attn", {"lora_rank": RANK}
    apart = {}
    for step in range(steps):
        apart[f"{stem}.in_projs.{step}.lora_A.weight"] = a[step * RANK : (step + 1) * RANK].clone()
        apart[f"{stem}.in_projs.{step}.lora_B.weight"] = b[step * rows // steps : (step + 1) * rows // steps].clone()
    together = {f"{stem}.in_proj.lora_A.weight": a, f"{stem}.in_proj.lora_B.weight": b}
    for name, tensors in (("apart", apart), ("together", together)):
        folder = write(tmp_path / f"adapter-{name}", tensors, config)
        program("ppx-convert", pico, "--adapter", folder, "-o", tmp_path / name, cwd=tmp_path)
    assert files_of(tmp_path / "apart") == files_of(tmp_path / "together")


def test_the_manifest_and_the_card_name_it(program, pico, adapter, tmp_path):
    done = program("ppx-convert", pico, "--adapter", adapter / "lora.safetensors", "-o", "out", cwd=tmp_path)
    assert "lora.safetensors was merged into 10 tensors" in done.stdout
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]["adapter"]
    data = (adapter / "lora.safetensors").read_bytes()
    assert record == {
        "id": "lora.safetensors",
        "revision": None,
        "rank": RANK,
        "scaling": SCALING,
        "size": len(data),
        "sha256": sha256(data),
        "merged": sorted({name for name, *_ in layers(pico).values()}),
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The adapter lora.safetensors was merged into 10 tensors in float32 (rank 4, scaling 1.5" in card
    assert "--adapter lora.safetensors" in card


def renamed(tensors: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """The same matrices as others store them."""
    if layout == "peft":
        return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    if layout == "peft with the adapter's name":
        return {f"base_model.model.{name.replace('.weight', '.default.weight')}": t for name, t in tensors.items()}
    lower = {name.replace("lora_A", "lora_a").replace("lora_B", "lora_b"): t for name, t in tensors.items()}
    if layout == "lower case":
        return lower
    bare = {name.removesuffix(".weight"): tensor for name, tensor in lower.items()}
    return bare if layout == "lower case, bare" else {name: t.T.contiguous() for name, t in bare.items()}


SIDE = {  # every one stands for rank 4 and scaling 1.5
    "adapter_config.json": {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", "rank_pattern": {}},
    "lora_config.json": {"rank": 4, "alpha": 6.0},
    "config.yaml": "lora:\n  enable: true\n  rank: 4\n  scaling: 1.5\n",
    "params.json": {"batch_size": 16, "lora": {"enable": True, "rank": 4, "scaling": 1.5}},
    "config.json": {"lora_rank": 4, "lora_alpha": 3, "use_rslora": True},
}


def write_side(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("layout", "file", "side"),
    [
        ("peft", "adapter_model.safetensors", "adapter_config.json"),
        ("peft with the adapter's name", "adapter_model.safetensors", "adapter_config.json"),
        ("lower case", "lora.safetensors", "lora_config.json"),
        ("lower case, bare", "lora.safetensors", "config.yaml"),
        ("lower case, bare", "lora.safetensors", "params.json"),
        ("transposed", "adapters.safetensors", "config.json"),
    ],
)
def test_other_layouts_are_the_same_adapter(layout, file, side, pico, adapter, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    save_file(renamed(matrices(pico), layout), folder / file)
    write_side(folder, side, SIDE[side])
    one, other = (open_adapter(str(path), architecture_of(pico), quiet=True) for path in (adapter, folder))
    with one.file, other.file:
        assert (other.rank, other.scaling) == (one.rank, one.scaling) == (RANK, SCALING)
        assert other.pieces.keys() == one.pieces.keys()
        for name in one.pieces:
            role = roles(architecture_of(pico))[name]
            rows = np.zeros((role.shape[0] - 3, role.shape[1]), np.float32)
            added = one.merged(name, 3, rows)
            assert added.any()
            np.testing.assert_array_equal(other.merged(name, 3, rows), added)


@pytest.mark.parametrize(
    ("side", "content", "message"),
    [
        ("", "", "rank and scaling is not known: put a side file with rank and alpha beside it (config.json, adapter_"),
        ("lora_config.json", {"rank": 4}, "a scaling is not known"),
        ("lora_config.json", {"alpha": 4}, "gives alpha without a rank: add it as lora_rank"),
        ("lora_config.json", {"rank": 8, "alpha": 8}, "where rank 8 makes it [8, "),
        ("lora_config.json", {"rank": 4, "alpha": "inf"}, "alpha is 'inf': a number is needed"),
        (
            "lora_config.json",
            {"rank": 4, "alpha": 6, "scaling": 2},
            "gives the scaling 2, and alpha and rank make it 1.5",
        ),
        ("adapter_config.json", {"r": True, "lora_alpha": 4}, "r is True: a whole number above 0 is needed"),
        ("adapter_config.json", {"r": 4, "lora_alpha": 6, "use_dora": True}, "use_dora is True, and such an adapter"),
        ("adapter_config.json", {"r": 4, "lora_alpha": 6, "alpha_pattern": {"linears": 1}}, "alpha_pattern is {'lin"),
        ("config.yaml", "lora: !!python/object/apply:os.system ['true']", "not an adapter's configuration"),
        ("config.yaml", "- 1", "not an adapter's configuration (holds a list)"),
        ("config.yaml", "lora: {rank: 4, alpha: .nan}", "alpha is nan: a number is needed"),
    ],
)
def test_side_files_are_not_trusted(side, content, message, pico, tmp_path):
    save_file(renamed(matrices(pico), "lower case"), tmp_path / "lora.safetensors")
    if side:
        write_side(tmp_path, side, content)
    with pytest.raises(UserError) as caught:
        open_adapter(str(tmp_path), architecture_of(pico), quiet=True)
    assert message in str(caught.value)


def test_a_peft_adapter_from_the_hub_is_merged(program, pico, tmp_path):
    save_file(renamed(matrices(pico), "peft"), tmp_path / "adapter_model.safetensors")
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    with running() as hub:
        side = json.dumps(SIDE["adapter_config.json"]).encode()
        hub.repositories["me/peft"] = Repository({"adapter_model.safetensors": data, "adapter_config.json": side})
        where = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        program("ppx-convert", pico, "--adapter", "me/peft", "-o", "out", cwd=tmp_path, environment=where)
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]["adapter"]
    assert (record["rank"], record["scaling"], record["sha256"]) == (4, 1.5, sha256(data))
    assert len(record["merged"]) == 10


def test_without_a_configuration_rank_and_scaling_are_those_of_moshi_finetune(program, pico, tmp_path):
    bare = write(tmp_path / "bare", matrices(pico, 128), None)
    program("ppx-convert", pico, "--adapter", bare, "-o", "out", cwd=tmp_path)
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]["adapter"]
    assert (record["rank"], record["scaling"]) == (128, 2.0)


def test_another_adapter_is_another_bundle(program, pico, adapter, tmp_path):
    program("ppx-convert", pico, "--adapter", adapter, "-o", "out", cwd=tmp_path)
    (adapter / "config.json").write_text(json.dumps({"lora_rank": RANK, "lora_scaling": 2.5}))
    done = program("ppx-convert", pico, "--adapter", adapter, "-o", "out", cwd=tmp_path, status=2)
    assert "--force" in done.stderr


def damage(pico: Path, what: str) -> tuple[dict[str, torch.Tensor], object]:
    tensors = matrices(pico)
    config: object = {"lora_rank": RANK}
    first = "transformer.layers.0.self_attn.in_projs.0"
    if what == "stranger":
        for side, shape in (("A", (RANK, 8)), ("B", (8, RANK))):
            tensors[f"transformer.layers.99.gating.linear_in.lora_{side}.weight"] = torch.ones(shape)
            tensors[f"base_model.model.text_linear.lora_{side}.weight"] = torch.ones(shape)
    elif what == "embedding":
        tensors |= {f"text_emb.lora_{side}.weight": torch.ones(RANK, RANK) for side in "AB"}
    elif what == "step":
        name = "depformer.layers.0.self_attn.in_projs"
        tensors |= {f"{name}.16.lora_{side}.weight": tensors[f"{name}.3.lora_{side}.weight"].clone() for side in "AB"}
    elif what == "half":
        del tensors[f"{first}.lora_B.weight"]
    elif what == "rank":
        config = {"lora_rank": 8}
    elif what == "twice":
        tensors |= {f"{first[:-3]}.lora_{side}.weight": tensors[f"{first}.lora_{side}.weight"].clone() for side in "AB"}
    elif what == "nan":
        tensors[f"{first}.lora_A.weight"][0, 0] = np.nan
    elif what == "other tensor":
        tensors["text_emb.weight"] = torch.ones(2, 2)
    elif what == "integers":
        tensors[f"{first}.lora_A.weight"] = tensors[f"{first}.lora_A.weight"].to(torch.int32)
    elif what == "empty":
        tensors = {}
    elif what == "scaling":
        config = {"lora_rank": RANK, "lora_scaling": "much"}
    elif what == "no rank":
        config = {"lora_rank": 0}
    elif what == "list":
        config = []
    return tensors, config


@pytest.mark.parametrize(
    ("what", "messages"),
    [
        (
            "stranger",
            [
                "transformer.layers.99.gating.linear_in: matches no linear layer of this architecture",
                "base_model.model.text_linear: matches no linear layer",
            ],
        ),
        ("embedding", ["text_emb: matches no linear layer"]),
        ("step", ["depformer.layers.0.self_attn.in_projs.16: matches no linear layer"]),
        ("half", ["transformer.layers.0.self_attn.in_projs.0.lora_B.weight: missing"]),
        ("rank", ["text_linear.lora_A.weight: shape [4, ", "where rank 8 makes it [8, "]),
        ("twice", ["another matrix of the adapter is for the same rows"]),
        ("nan", ["transformer.layers.0.self_attn.in_projs.0.lora_A.weight: 1 values are NaN or infinite"]),
        ("other tensor", ["text_emb.weight: not a matrix of a LoRA"]),
        ("integers", ["in_projs.0.lora_A.weight: not a matrix of a LoRA"]),
        ("empty", ["has no matrices"]),
        ("scaling", ["lora_scaling is 'much': a number is needed"]),
        ("no rank", ["lora_rank is 0: a whole number above 0 is needed"]),
        ("list", ["not an adapter's configuration"]),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(what, messages, pico, tmp_path):
    folder = write(tmp_path / "run", *damage(pico, what))
    with pytest.raises(UserError) as caught:
        open_adapter(str(folder), architecture_of(pico), quiet=True)
    for message in messages:
        assert message in str(caught.value)


def test_a_refused_adapter_leaves_nothing(program, pico, tmp_path):
    folder = write(tmp_path / "run", *damage(pico, "half"))
    done = program("ppx-convert", pico, "--adapter", folder, "-o", "out", cwd=tmp_path, status=2)
    assert done.stderr.endswith("transformer.layers.0.self_attn.in_projs.0.lora_B.weight: missing\n")
    assert not list(tmp_path.glob("out*"))
    done = program("ppx-convert", pico, "--adapter", "./nothing", cwd=tmp_path, status=2)
    assert "nothing: no such file: give a lora.safetensors, the folder that holds it, or a Hub id" in done.stderr


def test_an_adapter_from_the_hub(program, pico, adapter, tmp_path):
    with running() as hub:
        hub.repositories["me/tune"] = Repository(
            {name: (adapter / name).read_bytes() for name in ("lora.safetensors", "config.json")}
        )
        first = hub.repositories["me/tune"].heads["main"]
        environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        program(
            "ppx-convert",
            pico,
            "--adapter",
            "me/tune",
            "--no-quantize",
            "-o",
            "out",
            cwd=tmp_path,
            environment=environment,
        )
        record = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]["adapter"]
        assert (record["id"], record["revision"], record["rank"]) == ("me/tune", first, RANK)
        assert f"--adapter me/tune@{first}" in (tmp_path / "out" / "README.md").read_text()
        hub.repositories["me/tune"].commit("main", {"lora.safetensors": b"another"})
        sizes = ("--sequences", "1", "--frames", "40")  # the adapter of the bundle, not the newest
        program("ppx-verify", "out", "--reference", pico, *sizes, cwd=tmp_path, environment=environment)


def test_a_bundle_with_an_adapter_is_verified_with_it(program, pico, adapter, tmp_path):
    program("ppx-convert", pico, "--adapter", adapter, "--no-quantize", "--verify", "-o", "out", cwd=tmp_path)
    report = json.loads((tmp_path / "out" / "parity" / "report.json").read_text())
    assert report["verdict"]["passed"]
    assert "--adapter run" in report["command"]
    sizes = ("--sequences", "1", "--frames", "40")
    reference = ("--reference", str(pico), *sizes)
    done = program("ppx-verify", "out", *reference, cwd=tmp_path, status=2)
    assert "an adapter was merged into it (run/lora.safetensors): give its file as --adapter" in done.stderr
    program("ppx-verify", "out", *reference, "--adapter", adapter, cwd=tmp_path)
    other = write(tmp_path / "other", matrices(pico), {"lora_rank": RANK, "lora_scaling": 9.0})
    done = program("ppx-verify", "out", *reference, "--adapter", other, cwd=tmp_path, status=2)
    assert "not the adapter that was merged" in done.stderr
    program("ppx-convert", pico, "-o", "plain", cwd=tmp_path)
    done = program("ppx-verify", "plain", *reference, "--adapter", adapter, cwd=tmp_path, status=2)
    assert "was made without an adapter" in done.stderr


def test_a_bundle_whose_adapter_was_not_merged_fails(program, pico, adapter, tmp_path):
    """What the verification would say of a converter that forgot it."""
    program("ppx-convert", pico, "--adapter", adapter, "-o", "with", cwd=tmp_path)
    program("ppx-convert", pico, "-o", "without", cwd=tmp_path)
    record = json.loads((tmp_path / "with" / "manifest.json").read_text())
    manifest = json.loads((tmp_path / "without" / "manifest.json").read_text())
    manifest["source"]["adapter"] = record["source"]["adapter"]
    (tmp_path / "without" / "manifest.json").write_text(json.dumps(manifest))
    sizes = ("--sequences", "1", "--frames", "40")
    done = program("ppx-verify", "without", "--reference", pico, "--adapter", adapter, *sizes, cwd=tmp_path, status=1)
    assert "check failed" in done.stderr
