"""The tensors of Mimi, the audio codec, as its published file names them (Défossez et al., 2024, arXiv:2410.00037).

Nothing of it is converted: bundles take it over as it is. A demo source needs one that loads.
"""

from collections.abc import Iterator

RATE = 24000  # samples a second
FRAME = 1920  # samples of a frame: 80 ms
_RATIOS = (4, 5, 6, 8)  # by which the encoder's convolutions shorten; the frame rate is halved after them
_WIDTH, _FIRST, _LAYERS, _BINS, _CODEBOOK = 512, 64, 8, 2048, 256
_CODEBOOKS = 32  # in the file; the model uses the first eight

Named = tuple[str, tuple[int, ...]]


def tensors(codebooks: int = _CODEBOOKS) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor, all float32, of a codec with so many codebooks."""
    found = [*_encoder(), *_decoder()]
    for name in ("encoder_transformer", "decoder_transformer"):
        found += _transformer(name)
    found += [
        ("downsample.conv.conv.conv.weight", (_WIDTH, _WIDTH, 4)),
        ("upsample.convtr.convtr.convtr.weight", (_WIDTH, 1, 4)),
    ]
    for name, layers in (("quantizer.rvq_first", 1), ("quantizer.rvq_rest", codebooks - 1)):
        found += [
            (f"{name}.input_proj.weight", (_CODEBOOK, _WIDTH, 1)),
            (f"{name}.output_proj.weight", (_WIDTH, _CODEBOOK, 1)),
        ]
        for layer in range(layers):
            prefix = f"{name}.vq.layers.{layer}._codebook"
            found += [(f"{prefix}._initialized", (1,)), (f"{prefix}.cluster_usage", (_BINS,))]
            found += [(f"{prefix}.embedding_sum", (_BINS, _CODEBOOK))]
    return dict(found)


def _convolution(name: str, shape: tuple[int, ...], outputs: int) -> Iterator[Named]:
    """Yield a convolution whose weights have their norms apart."""
    yield f"{name}.bias", (outputs,)
    yield f"{name}.weight_g", (shape[0], 1, 1)
    yield f"{name}.weight_v", shape


def _block(index: int, side: str, width: int) -> Iterator[Named]:
    prefix = f"{side}.model.{index}.block"
    yield from _convolution(f"{prefix}.1.conv.conv", (width // 2, width, 3), width // 2)
    yield from _convolution(f"{prefix}.3.conv.conv", (width, width // 2, 1), width)


def _encoder() -> Iterator[Named]:
    yield from _convolution("encoder.model.0.conv.conv", (_FIRST, 1, 7), _FIRST)
    width = _FIRST
    for number, ratio in enumerate(_RATIOS):
        yield from _block(1 + 3 * number, "encoder", width)
        name = f"encoder.model.{3 + 3 * number}.conv.conv"
        yield from _convolution(name, (2 * width, width, 2 * ratio), 2 * width)
        width *= 2
    yield from _convolution("encoder.model.14.conv.conv", (_WIDTH, width, 3), _WIDTH)


def _decoder() -> Iterator[Named]:
    width = _FIRST << len(_RATIOS)
    yield from _convolution("decoder.model.0.conv.conv", (width, _WIDTH, 7), width)
    for number, ratio in enumerate(reversed(_RATIOS)):
        name = f"decoder.model.{2 + 3 * number}.convtr.convtr"
        yield from _convolution(name, (width, width // 2, 2 * ratio), width // 2)
        width //= 2
        yield from _block(3 + 3 * number, "decoder", width)
    yield from _convolution("decoder.model.14.conv.conv", (1, width, 3), 1)


def _transformer(name: str) -> Iterator[Named]:
    for layer in range(_LAYERS):
        prefix = f"{name}.transformer.layers.{layer}"
        for part in (
            "norm1.bias",
            "norm1.weight",
            "norm2.bias",
            "norm2.weight",
            "layer_scale_1.scale",
            "layer_scale_2.scale",
        ):
            yield f"{prefix}.{part}", (_WIDTH,)
        yield f"{prefix}.self_attn.in_proj_weight", (3 * _WIDTH, _WIDTH)
        yield f"{prefix}.self_attn.out_proj.weight", (_WIDTH, _WIDTH)
        yield f"{prefix}.linear1.weight", (4 * _WIDTH, _WIDTH)
        yield f"{prefix}.linear2.weight", (_WIDTH, 4 * _WIDTH)
