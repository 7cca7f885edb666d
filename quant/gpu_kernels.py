"""The inner loops of GPTQ on a GPU: what ``kernels`` and ``column_rounding`` do on a processor, as Triton kernels.

Triton comes with PyTorch's builds for GPUs. A program of the rounding kernel takes a strip of a block of rows; the
grids that a row tries stand side by side in its threads. Sums are taken in another order than on a processor, so codes
may differ where two are as good.
"""

import triton
from triton import language as tl

from .group import BFLOAT16, EPSILON, FLOAT16
from .kernels import HALVINGS, PASSES, STEPS

_MAGIC = tl.constexpr(12582912.0)  # as in ``group``: adding and subtracting it rounds to the nearest even
_BFLOAT16, _FLOAT16 = tl.constexpr(BFLOAT16), tl.constexpr(FLOAT16)
_EPSILON = tl.constexpr(float(EPSILON))
_STEPS, _HALVINGS, _PASSES = tl.constexpr(STEPS), tl.constexpr(HALVINGS), tl.constexpr(PASSES)


@triton.jit
def _stored(value, storage: tl.constexpr):
    """Round to the storage dtype, saturated at its largest value."""
    if storage == _FLOAT16:
        return tl.minimum(tl.maximum(value, -65504.0), 65504.0).to(tl.float16).to(tl.float32)
    if storage == _BFLOAT16:
        return tl.minimum(tl.maximum(value, -3.3895314e38), 3.3895314e38).to(tl.bfloat16).to(tl.float32)
    return value


@triton.jit
def _encoded(values, scale, bias, top: tl.constexpr):
    """Return the nearest code of a grid for each value."""
    code = ((values - bias[:, None]) / scale[:, None] + _MAGIC) - _MAGIC
    return tl.minimum(tl.maximum(code, 0.0), top)


@triton.jit
def _moments(centered, codes, size: tl.constexpr):
    """Return what least squares needs, as ``kernels._moments``."""
    mean = tl.sum(codes, 1) / size
    away = codes - mean[:, None]
    return tl.sum(centered * away, 1), tl.sum(away * away, 1), mean


@triton.jit
def _squared_error(values, codes, scale, bias):
    error = values - (scale[:, None] * codes + bias[:, None])
    return tl.sum(error * error, 1)


@triton.jit
def _clipped(
    centered, low, extent, a, b, best, fitted, mean, left, right, top: tl.constexpr, size: tl.constexpr
):  # fmt: skip
    """Clip a group's range by a and b; return the best so far: what it gains, scale, mean code, and both clips."""
    codes = _encoded(centered, (extent - a - b) / top, low + a, top)
    covariance, variance, center = _moments(centered, codes, size)
    scale = covariance / tl.where(variance > 0.0, variance, 1.0)
    better = (variance > 0.0) & (covariance * scale > best)
    best, fitted, mean = (
        tl.where(better, covariance * scale, best),
        tl.where(better, scale, fitted),
        tl.where(better, center, mean),
    )
    return best, fitted, mean, tl.where(better, a, left), tl.where(better, b, right)


@triton.jit(do_not_specialize=["first_group", "groups", "strips", "lines"])  # compiled once, whatever these are
def fit_groups(
    adjusted, width, first_group, groups, grids, strips, lines, step,
    top: tl.constexpr, storage: tl.constexpr, size: tl.constexpr, height: tl.constexpr,
):  # fmt: skip
    """Find the least-squares grid of each line of a strip in its group; see ``kernels._search`` and ``_improve``."""
    strip = tl.program_id(1)
    group = first_group + strip
    if (group < 0) | (group >= groups):
        return
    line = tl.program_id(0) * height + tl.arange(0, height)
    inside = line < lines
    line += strip * lines
    place = line.to(tl.int64)[:, None] * width + group * size + tl.arange(0, size)[None, :]
    v = tl.load(adjusted + place, mask=inside[:, None], other=0.0)
    low, high = tl.min(v, 1), tl.max(v, 1)
    negative = tl.abs(low) > tl.abs(high)
    widest = tl.maximum((high - low) / top, _EPSILON)
    edge, signed = tl.where(negative, low, high), tl.where(negative, widest, -widest)
    steps = (edge / signed + _MAGIC) - _MAGIC
    zero = steps == 0.0
    exact = tl.where(zero, signed, edge / tl.where(zero, 1.0, steps))
    start = tl.where(zero, 0.0, edge)
    scale, bias = _stored(exact, storage), _stored(start, storage)
    error = _squared_error(v, _encoded(v, exact, start, top), scale, bias)
    middle = tl.sum(v, 1) / size
    centered = v - middle[:, None]
    low = low - middle
    extent = tl.maximum(high - middle - low, _EPSILON * top)
    best, fitted, mean = tl.zeros_like(low) - 1.0, extent / top, tl.zeros_like(low)
    left, right = tl.zeros_like(low), tl.zeros_like(low)
    for trial in tl.static_range(_STEPS):  # both ends alike
        a = trial * step * extent
        best, fitted, mean, left, right = _clipped(
            centered, low, extent, a, a, best, fitted, mean, left, right, top, size
        )
    move = step * extent
    for _ in tl.static_range(_HALVINGS):  # one end alone, from the best pair so far
        move = move / 2.0
        a, b = left, right
        best, fitted, mean, left, right = _clipped(
            centered, low, extent, a + move, b, best, fitted, mean, left, right, top, size
        )
        best, fitted, mean, left, right = _clipped(
            centered, low, extent, a - move, b, best, fitted, mean, left, right, top, size
        )
        best, fitted, mean, left, right = _clipped(
            centered, low, extent, a, b + move, best, fitted, mean, left, right, top, size
        )
        best, fitted, mean, left, right = _clipped(
            centered, low, extent, a, b - move, best, fitted, mean, left, right, top, size
        )
    going = inside
    for _ in tl.static_range(_PASSES):  # least squares for the codes, then codes for the grid as it is stored
        trial_scale = _stored(fitted, storage)
        trial_bias = _stored(middle - trial_scale * mean, storage)
        codes = _encoded(v, trial_scale, trial_bias, top)
        trial_error = _squared_error(v, codes, trial_scale, trial_bias)
        going = going & (trial_scale != 0.0) & (trial_error < error)
        error = tl.where(going, trial_error, error)
        scale, bias = tl.where(going, trial_scale, scale), tl.where(going, trial_bias, bias)
        covariance, variance, mean = _moments(centered, codes, size)
        going = going & (variance > 0.0)
        fitted = covariance / variance
    tl.store(grids + line, scale, mask=inside)
    tl.store(grids + strips * lines + line, bias, mask=inside)


@triton.jit(do_not_specialize=["first_group", "groups", "blocks", "strips"])
def round_strips(
    adjusted, lost, width, first_group, inverses, groups, grids, feedback, errors, fitted, taken, codes, blocks, strips,
    top: tl.constexpr, storage: tl.constexpr,
    size: tl.constexpr, trials: tl.constexpr, rows: tl.constexpr, panel: tl.constexpr,
):  # fmt: skip
    """Round one strip of a block of rows, in the group of columns that it comes to in this wave; see ``round_wave``.

    fitted: ``[2, lines]``, the grids to begin with. rows: of a block. panel: columns that are rounded one after
    another; what earlier panels lost reaches a panel at once. Loops over panels are unrolled and a program is one warp,
    a thread of it for each grid: losses stay in registers.
    """
    block, strip = tl.program_id(0), tl.program_id(1)
    group = first_group + strip
    if (group >= 0) & (group < groups):
        height = rows // strips
        lines = blocks * rows
        index, trial, before = tl.arange(0, size), tl.arange(0, trials), tl.arange(0, rows)
        inner, shifts = tl.arange(0, panel), 8 * tl.arange(0, panel)[:, None]
        share, shift = tl.load(grids + 2 * trial), tl.load(grids + 2 * trial + 1)
        middle = top / 2.0 * (1.0 - share) + shift
        inverse = inverses + group * size * size
        of_block = errors + (group % strips * blocks + block).to(tl.int64) * rows * size
        first = group * size
        row = 0
        while row < height:  # for Triton's interpreter, whose ranges must be known
            line = ((strip * blocks + block) * height + row).to(tl.int64)
            place_in_block = (strips - 1 - strip) * height + row
            own = of_block + place_in_block * size
            whole, low = tl.load(fitted + line), tl.load(fitted + lines + line)
            scale = _stored(whole * share, storage)
            bias = _stored(low + whole * middle, storage)
            steps = tl.where(scale != 0.0, 1.0 / scale, 0.0)
            sums = tl.zeros((trials,), tl.float32)
            ratios = tl.load(feedback + (block * rows + before) * rows + place_in_block)
            earlier = of_block + before[:, None] * size + index[None, :]
            made = tl.load(earlier, mask=(before < place_in_block)[:, None], other=0.0)
            tl.store(own + index, tl.sum(ratios[:, None] * made, 0))
            tl.debug_barrier()
            done, packed = (), ()  # of each panel: losses ``[panel, trials]``, and codes as the bytes of an integer
            for part in tl.static_range(size // panel):
                values = tl.load(adjusted + line * width + first + part * panel + inner)
                begun = tl.zeros((panel, trials), tl.float32) + values[:, None]
                for other in tl.static_range(part):
                    place = (part * panel + inner)[:, None] * size + (other * panel + inner)[None, :]
                    begun -= tl.sum(tl.load(inverse + place)[:, :, None] * done[other][None, :, :], 1)
                losses = tl.zeros((panel, trials), tl.float32)
                chosen = tl.zeros((trials,), tl.int64)
                for within in range(panel):
                    column = part * panel + within
                    here = (inner == within)[:, None]
                    reached = tl.load(inverse + column * size + part * panel + inner)
                    diagonal = tl.load(inverse + column * size + column)
                    now = tl.sum(tl.where(here, begun, 0.0) - reached[:, None] * losses, 0)
                    passed = tl.load(own + column)
                    nearest = ((now + diagonal * passed - bias) * steps + _MAGIC) - _MAGIC
                    nearest = tl.minimum(tl.maximum(nearest, 0.0), top)
                    loss = (now - (nearest * scale + bias)) * (1.0 / diagonal)
                    total = loss + passed
                    sums += total * total
                    losses = tl.where(here, loss[None, :], losses)
                    chosen = chosen | (nearest.to(tl.int32).to(tl.int64) << (8 * within))
                done += (losses,)  # type: ignore[assignment]
                packed += (chosen,)  # type: ignore[assignment]
            best = trial == tl.argmin(sums, 0)
            tl.debug_barrier()
            for part in tl.static_range(size // panel):  # the thread of the grid that is taken writes what it has
                place = (part * panel + inner)[:, None] + 0 * trial[None, :]
                tl.store(own + place, done[part], mask=best[None, :])
                code = ((packed[part][None, :] >> shifts) & 255).to(tl.int32)
                rounded = code.to(tl.float32) * scale[None, :] + bias[None, :]
                place += line * width + first
                exact = tl.load(lost + place, mask=best[None, :])
                tl.store(lost + place, exact - rounded, mask=best[None, :])
                tl.store(codes + place, code.to(tl.uint8), mask=best[None, :])
            written = taken + group * lines + line + 0 * trial
            tl.store(written, scale, mask=best)
            tl.store(written + groups * lines, bias, mask=best)
            tl.debug_barrier()
            row += 1
