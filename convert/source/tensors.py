"""The tensors of a PersonaPlex checkpoint: what each is called, what it is for, and its shape."""

from dataclasses import dataclass

from .architecture import Architecture

COMPONENTS = ("temporal", "depformer", "embeddings", "heads")
_OUT_NORM = "out_norm.alpha"


@dataclass(frozen=True)
class Role:
    """What one source tensor is.

    component: one of COMPONENTS. module: its place in a layer, such as ``self_attn.in_proj``, or its own name outside
    of layers. kind: ``linear``, ``embedding`` or ``norm``. layer, step: where it belongs, None where it has none.
    stacked: how many depformer steps lie one after another on its rows (1 for a tensor of one step or none). norm: the
    RMSNorm whose output a matrix multiplies, empty where it reads something else.
    """

    name: str
    shape: tuple[int, ...]
    component: str
    module: str
    kind: str
    layer: int | None = None
    step: int | None = None
    stacked: int = 1
    norm: str = ""

    @property
    def height(self) -> int:
        """Rows of each step that is stacked; all rows of a tensor of one step or none."""
        return self.shape[0] // self.stacked


def stored_as(role: Role) -> tuple[tuple[str, ...], ...]:
    """Return the ways in which checkpoints name a tensor: each is one name, or one for each depformer step.

    Newer code of moshi keeps attention's projections apart, as ``in_projs.N`` and ``out_projs.N``; the temporal
    transformer has one of each.
    """
    module = role.module.removeprefix("self_attn.")
    if module not in ("in_proj", "out_proj"):
        return ((role.name,),)
    stem = role.name.rpartition(f".{module}")[0]
    apart = tuple(f"{stem}.{module}s.{step}.weight" for step in range(role.stacked))
    joined = f"{stem}.{module}.weight"
    return ((role.name,), apart) if joined == role.name else ((role.name,), (joined,), apart)


def roles(architecture: Architecture) -> dict[str, Role]:
    """Return the role of every tensor that a checkpoint of this architecture holds, by name; no name comes twice."""
    a = architecture
    all_roles = [
        Role("text_emb.weight", (a.text_card + 1, a.dim), "embeddings", "text_emb", "embedding"),
        Role("text_linear.weight", (a.text_card, a.dim), "heads", "text_linear", "linear", norm=_OUT_NORM),
        Role(_OUT_NORM, (1, 1, a.dim), "temporal", "out_norm", "norm"),
        Role(
            "depformer_text_emb.weight",
            (a.text_card + 1, a.depformer_dim),
            "embeddings",
            "depformer_text_emb",
            "embedding",
            step=0,
        ),
    ]
    for codebook in range(a.n_q):
        all_roles.append(Role(f"emb.{codebook}.weight", (a.card + 1, a.dim), "embeddings", "emb", "embedding"))
    for layer in range(a.num_layers):
        all_roles += _layer(f"transformer.layers.{layer}", "temporal", a.dim, a.hidden, layer)
    for step in range(a.steps):
        shape = (a.depformer_dim, a.dim)
        name = f"depformer_in.{step}.weight"
        all_roles.append(Role(name, shape, "depformer", "depformer_in", "linear", step=step, norm=_OUT_NORM))
        shape = (a.card, a.depformer_dim)
        all_roles.append(Role(f"linears.{step}.weight", shape, "heads", "linears", "linear", step=step))
    for step in range(1, a.steps):  # step 0 reads the text token, step k the codebook k - 1
        name, shape = f"depformer_emb.{step - 1}.weight", (a.card + 1, a.depformer_dim)
        all_roles.append(Role(name, shape, "embeddings", "depformer_emb", "embedding", step=step))
    for layer in range(a.depformer_num_layers):
        all_roles += _layer(
            f"depformer.layers.{layer}", "depformer", a.depformer_dim, a.depformer_hidden, layer, stacked=a.steps
        )
    return {role.name: role for role in all_roles}


def _layer(prefix: str, component: str, dim: int, hidden: int, layer: int, stacked: int = 1) -> list[Role]:
    """Return the tensors of one transformer layer; a depformer's has one MLP a step, and stacks its attention."""
    steps = [None] if component == "temporal" else list(range(stacked))
    layer_roles = [
        Role(f"{prefix}.norm1.alpha", (1, 1, dim), component, "norm1", "norm", layer),
        Role(f"{prefix}.norm2.alpha", (1, 1, dim), component, "norm2", "norm", layer),
        *(
            Role(f"{prefix}.self_attn.{name}", shape, component, module, "linear", layer, stacked=stacked, norm=norm)
            for name, module, shape, norm in (
                ("in_proj_weight", "self_attn.in_proj", (3 * dim * stacked, dim), f"{prefix}.norm1.alpha"),
                ("out_proj.weight", "self_attn.out_proj", (dim * stacked, dim), ""),
            )
        ),
    ]
    for step in steps:
        gating = f"{prefix}.gating" if step is None else f"{prefix}.gating.{step}"
        norm2 = f"{prefix}.norm2.alpha"
        for module, shape, norm in (("linear_in", (2 * hidden, dim), norm2), ("linear_out", (dim, hidden), "")):
            name = f"{gating}.{module}.weight"
            layer_roles.append(Role(name, shape, component, f"gating.{module}", "linear", layer, step, norm=norm))
    return layer_roles
