"""Kernels that MLX computes wrongly: seen on the bundle's own shapes, worked around, or blamed on MLX."""

import json
import shutil
import threading
from contextlib import closing
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from ppx.convert.bundle.manifest import manifest_of
from ppx.convert.bundle.reader import Bundle, layout_of
from ppx.convert.errors import CheckFailed
from ppx.convert.progress import bar
from ppx.convert.source.source import locate, open_source
from ppx.model import kernel_test, mlx_device
from ppx.model.matmul import FLOAT_DTYPES, TRIED_TILES, QuantizedMatmul, Shape, shape_of
from ppx.model.session import SILENCE, system_prompt
from ppx.quant.affine import BITS, GROUP_SIZES
from ppx.speak import kernel_cache, loader
from ppx.speak.generation import Conversation
from ppx.speak.sampling import GREEDY
from ppx.verify import report as reports
from ppx.verify import rollout
from ppx.verify.options import VerifyOptions
from ppx.verify.publishing import card
from ppx.verify.records import Report, Verdict
from ppx.verify.verification import verify

SWIFT = ("--recipe", "4bit")
QUICK = VerifyOptions(sequences=1, frames=30, device="cpu")


@pytest.fixture(autouse=True)
def on_the_cpu():
    with mx.stream(mx.cpu):
        yield


class Broken:
    """Stands in for quantized_matmul: wrong for weights of so many rows and columns, for two rows of input or more."""

    def __init__(self, size: tuple[int, int], fewest: int = 2) -> None:
        self.size, self.fewest = size, fewest
        self.calls: list[tuple[int, tuple[int, int]]] = []

    def __call__(self, x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, **settings: Any) -> mx.array:
        size = (weight.shape[0], scales.shape[1] * settings["group_size"])
        self.calls.append((len(x), size))
        found = mx.quantized_matmul(x, weight, scales, biases, **settings)
        wrong = size == self.size and len(x) >= self.fewest
        return found[::-1] + 1 if wrong else found


def wrong_product(x, matrix, stream):
    return mx.zeros((len(x), matrix.weight.shape[0]), x.dtype, stream=stream)


@pytest.fixture(scope="module")
def opened(bundle):
    folder = bundle(*SWIFT)
    with closing(Bundle(folder, *layout_of(folder))) as held:
        yield held


@pytest.fixture(scope="module")
def model(opened):
    with mx.stream(mx.cpu):
        return loader.load(opened, "float32")


@pytest.fixture
def size(model):
    """Rows and columns of a matrix that the temporal transformer multiplies by."""
    shape = shape_of(model.layers[0].linear_out.parts[0][0], mx.float32)
    return shape.rows, shape.columns


def test_this_mlx_is_within_what_rounding_explains():
    """Measured on two processors, with one thread and two: at most .35 of the bound, which holds for a sum in order."""
    shares = []
    for dtype in FLOAT_DTYPES:
        shapes = [Shape(96, 384, bits, size, dtype, dtype) for bits in BITS for size in GROUP_SIZES]
        rows, matmul = kernel_test.check(shapes)
        assert len(rows) == 3 * len(shapes)
        assert [row.positions for row in rows[:3]] == [1, 4, 8]
        assert not matmul.replaced
        shares += [(row.relative_l2 or 0.0) / row.bound for row in rows]
    assert 0 < max(shares) < 0.8


def test_the_shapes_are_the_bundles_own(opened, model):
    shapes = kernel_test.shapes_of(opened.layout, opened.manifest.dtype, "float32", 1)
    a = model.architecture
    sizes = {(shape.rows, shape.columns) for shape in shapes}
    assert {(3 * a.dim, a.dim), (2 * a.hidden, a.dim), (a.dim, a.hidden), (a.dim, a.dim)} <= sizes
    assert (3 * a.depformer_dim, a.depformer_dim) in sizes  # of one depformer step, not of all that are stacked
    assert (a.text_card + 1, a.dim) not in sizes  # a table is looked up
    halves = kernel_test.shapes_of(opened.layout, opened.manifest.dtype, "float32", 2)
    assert {(2 * shape.rows, shape.columns) for shape in halves} == sizes  # as they are shared out over streams


@pytest.mark.parametrize(("rows", "columns"), [(300, 64), (64, 128)])
def test_an_error_at_one_edge_of_a_weight_is_seen(rows, columns):
    def edge(x, weight, scales, biases, **settings):
        found = mx.quantized_matmul(x, weight, scales, biases, **settings)
        return mx.where(mx.arange(rows) < rows - 1, found, 0)

    found, _ = kernel_test.check([Shape(rows, columns, 4, 32, "bfloat16", "bfloat16")], QuantizedMatmul(packed=edge))
    assert [row.replaced for row in found] == [True] * 3


def test_only_the_shape_and_the_rows_of_input_that_are_wrong_are_replaced():
    shapes = [Shape(96, columns, 4, 32, "float32", "float32") for columns in (64, 128)]
    broken = Broken((96, 64))
    rows, matmul = kernel_test.check(shapes, QuantizedMatmul(packed=broken))
    assert matmul.replaced == {(shapes[0], 4), (shapes[0], 8)}
    assert matmul.workarounds() == ["96x64, 4 bit group 32, float32, 4, 8 rows of input"]
    assert [row.replaced for row in rows] == [False, True, True, False, False, False]
    assert not kernel_test.failures(rows)
    random = np.random.default_rng(0)
    for shape in shapes:
        matrix, _ = kernel_test._weight(shape, random)
        for count in (1, 2, 5, 30):
            x = mx.array(random.standard_normal((count, shape.columns), np.float32))
            expected = np.array(x @ matrix.float32().T)
            np.testing.assert_allclose(np.array(matmul(x, matrix)), expected, atol=1e-4)


def test_rows_of_input_are_filled_up_to_what_was_tested():
    broken, shape = Broken((0, 0)), Shape(32, 64, 4, 32, "float32", "float32")
    padded, random = QuantizedMatmul(padded=True, packed=broken), np.random.default_rng(0)
    assert padded.tried == TRIED_TILES == (1, 64, 1088)
    assert [padded.tried_as(count) for count in (1, 2, 64, 65, 1088, 5000)] == [1, 64, 64, 1088, 1088, 1088]
    matrix, _ = kernel_test._weight(shape, random)
    for count in (1, 2, 4, 5, 64, 65):
        x = mx.array(random.standard_normal((count, 64), np.float32))
        np.testing.assert_allclose(np.array(padded(x, matrix)), np.array(x @ matrix.float32().T), atol=1e-4)
    assert [rows for rows, _ in broken.calls] == [1, 64, 64, 64, 64, 128]


@pytest.fixture(scope="module")
def source(pico):
    with open_source(locate(str(pico))) as held:
        yield held


@pytest.fixture
def share(opened):
    """Rows and columns that a verification multiplies by: one stream's share of such a matrix."""
    shapes = kernel_test.shapes_of(opened.layout, opened.manifest.dtype, "float32", len(mlx_device.streams()))
    return next((shape.rows, shape.columns) for shape in shapes if shape.columns == opened.architecture.hidden)


def test_a_verification_works_around_a_kernel_and_says_so(bundle, source, share):
    folder, broken = bundle(*SWIFT), Broken(share, fewest=1)
    right = verify(source, folder, QUICK, "", quiet=True)
    found = verify(source, folder, QUICK, "", quiet=True, matmul=QuantizedMatmul(packed=broken))
    assert found.verdict == Verdict(passed=True, failures=())
    assert {(row.rows, row.columns) for row in found.kernels if row.replaced} == {share}
    assert [rows for rows, size in broken.calls if size == share] == [1, 4, 8]  # in the test alone
    for stream in ("text", "agent"):
        one, other = (report.predictions[stream].bundle.kl for report in (right, found))
        assert one
        assert other
        assert one.mean == pytest.approx(other.mean, rel=1e-3)  # float32, in another order
    report = Report.from_json(json.loads(json.dumps(reports.finish(found).to_json())))
    manifest = manifest_of(folder)
    for page in (reports.markdown(report), reports.html(report), card.files(manifest, report)["README.md"]):
        assert f"{share[0]}x{share[1]}, 4 bit group 64, float32, 1, 4, 8 rows of input" in page
        assert "wrongly" in page
    assert "wrongly" not in reports.markdown(reports.finish(right))


def test_a_rollout_works_around_a_kernel(opened, source, share):
    broken = Broken(share, fewest=1)
    _, matmul = kernel_test.check(
        kernel_test.shapes_of(opened.layout, opened.manifest.dtype, "float32", len(mlx_device.streams())),
        QuantizedMatmul(packed=broken),
    )
    silence = [token % source.architecture.card for token in SILENCE[: source.architecture.n_q // 2]]
    played = rollout.Script(source.voices[0].name, [5], [silence])
    with bar("", 0, "frame", quiet=True) as progress:
        found = rollout.run(source, opened, played, progress, matmul=matmul)
    assert len(found.agreement) == 1
    assert [rows for rows, size in broken.calls if size == share] == [1, 4, 8]  # in the test alone


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """An empty cache: what programs of other tests found right is not known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ppx-convert"


@pytest.mark.usefixtures("no_cache")
def test_with_nothing_to_work_around_with_mlx_is_blamed_and_not_the_bundle(bundle, source, share, size, model):
    hopeless = QuantizedMatmul(packed=Broken(share), plain=wrong_product)
    found = verify(source, bundle(*SWIFT), QUICK, "", quiet=True, matmul=hopeless).verdict.failures
    assert {failure.check for failure in found} == {"kernels"}
    for words in ("MLX ", "computes wrongly on this device (cpu ", "the bundle may be sound", f"{share[0]}x{share[1]}"):
        assert words in found[0].message
    with pytest.raises(CheckFailed, match="the bundle may be sound"):
        kernel_cache.on_tested_kernels(model, matmul=replace(hopeless, packed=Broken(size)))


def self_generated(model, voice):
    session = Conversation(model, voice, system_prompt(model.architecture, [5, 9]), GREEDY)
    users = np.random.default_rng(1).integers(0, model.architecture.card, (6, 8))
    return [(text, *agent.tolist()) for text, agent in map(session.step, users)]


def test_a_conversation_works_around_a_kernel(opened, model, size, no_cache):
    voice = opened.voices()[0]
    expected = self_generated(model, voice)
    for fewest in (1, 2):
        broken = QuantizedMatmul(packed=Broken(size, fewest))
        shutil.rmtree(no_cache, ignore_errors=True)
        mended = kernel_cache.on_tested_kernels(model, matmul=broken)
        assert {shape.rows for shape, _ in mended.matmul.replaced} == {size[0]}
        assert self_generated(mended, voice) == expected
        wrong = kernel_cache.with_matmul(model, broken)
        assert self_generated(wrong, voice) != expected


def test_a_test_costs_once_and_no_cache_is_trusted_blindly(model, size, no_cache):
    broken = Broken(size)

    def tested():
        before = len(broken.calls)
        found = kernel_cache.on_tested_kernels(model, matmul=QuantizedMatmul(packed=broken)).matmul.replaced
        return found, len(broken.calls) - before

    replaced, calls = tested()
    assert replaced
    assert calls == 3 * len(
        {shape_of(part, mx.float32) for one in kernel_cache.linears(model) for part, _ in one.parts if part.packing}
    )
    assert tested() == (replaced, 0)
    (file,) = no_cache.glob("kernels-*.json")
    whole = file.read_text()
    held = json.loads(whole)
    edited = [row | {"relative_l2": 0.0, "replaced": False} for row in held["rows"]]
    negative = [row | {"relative_l2": -1.0} for row in held["rows"]]
    for damaged in (
        whole[: len(whole) // 2],
        "[]",
        "{}",
        '{"rows": 3}',
        json.dumps(held | {"rows": edited}),
        json.dumps(held | {"mlx": "0.1"}),
        json.dumps(held | {"device": "gpu Another One"}),
        json.dumps(held | {"rows": negative, "sha256": kernel_cache._digest(negative)}),
        json.dumps(held | {"rows": [1], "sha256": kernel_cache._digest([1])}),
        "[" * 100_000,
    ):
        file.write_text(damaged)
        assert tested() == (replaced, calls), damaged[:80]
        assert not [path for path in no_cache.iterdir() if path.name.startswith(".")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_cache, "version", lambda _: "99.0")  # another MLX
        assert tested() == (replaced, calls)
    shape = sorted(kernel_cache.read(file))[0]
    kernel_cache.write(file, {shape: kernel_cache.read(file)[shape]})
    assert tested() == (replaced, calls - 3)  # what is known of one shape says nothing of others
    shutil.rmtree(no_cache)
    no_cache.write_text("in the way")
    assert tested() == (replaced, calls)


def test_a_library_call_leaves_mlx_s_default_device_alone(bundle, source, monkeypatch):
    def refuse(device):
        raise AssertionError(f"the default device was set to {device}")

    monkeypatch.setattr(mx, "set_default_device", refuse)
    monkeypatch.setattr(mx, "set_default_stream", refuse)
    before = mx.default_device(), mx.default_stream(mx.cpu)
    verify(source, bundle(*SWIFT), QUICK, "", quiet=True)
    assert (mx.default_device(), mx.default_stream(mx.cpu)) == before


def test_streams_are_made_once_for_each_thread():
    assert mlx_device.streams() is mlx_device.streams()
    other = []
    thread = threading.Thread(target=lambda: other.append(mlx_device.streams()))
    thread.start()
    thread.join()
    assert set(map(str, other[0])).isdisjoint(map(str, mlx_device.streams()))
