"""What is special to the CPU backend: dispatcher ops, thread counts, prepacked weights, argument errors."""

import pytest
import torch

from resnet_fused import backends
from resnet_fused.backends import onednn
from resnet_fused.library import CPU_OPS, Library, status
from resnet_fused.ops import OPS
from resnet_fused.ops.contract import channels_last_like
from resnet_fused.testing import cases

CPU = backends.backends()["cpu"]
needs_library = pytest.mark.skipif(not status().cpu.loaded, reason=f"the compiled library is {status().cpu.reason}")


def activations(*shape):
    return channels_last_like(torch.empty(shape)).copy_(torch.randn(shape))


def written(out, x, residual=None, adds=False):
    """Arguments of `conv_norm_add_relu_` with a weight that keeps the shape of `x`."""
    weight = torch.eye(x.shape[1]).view(*2 * x.shape[1:2], 1, 1)
    return out, x, weight, *[None] * 5, 1e-5, residual, [1, 1], [0, 0], [1, 1], False, adds


def late(z):
    """One sample of the memory of `z`, from the last element of the first on."""
    return z[:1].as_strided(z[:1].shape, z.stride(), z[0].numel() - 1)


def narrow(value):
    if isinstance(value, list):
        return list(map(narrow, value))
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@needs_library
@pytest.mark.parametrize("op", [*CPU_OPS, *onednn.NAMES])
def test_opcheck(op):
    """Schema (aliasing, mutation) and fake kernel, by torch's own tool; of what the CPU takes."""
    for case in [case for case in cases(op, torch.float32) if "empty" not in case.name][::7]:
        args, kwargs = tuple(map(narrow, case.args)), {key: narrow(value) for key, value in case.kwargs.items()}
        if op.startswith("lazy_grad_apply") and CPU.reasons(op, args, kwargs):
            continue
        packet = getattr(torch.ops.resnet_fused, op).default
        torch.library.opcheck(packet, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@needs_library
@pytest.mark.parametrize("shape", [(4, 64, 28, 28), (2, 200, 30, 30), (3, 5, 50, 50)], ids=str)
def test_results_do_not_depend_on_the_thread_count(shape):
    z, g, residual = activations(*shape), activations(*shape), activations(*shape)
    vector, rows = torch.randn(shape[1]), torch.randn(100)
    weight, square, product = (torch.randn(*size) for size in ((100, shape[1], 1, 1), 2 * shape[1:2], (100, shape[1])))
    over = activations(shape[0], 100, *shape[2:])
    both_grads = (*(None,) * 4, (1, 1), (1, 1), None, True)
    calls = [
        ("bn_stats", z),
        ("norm_add_relu_backward", g, z, vector, vector, vector, None, residual, vector),
        ("gram", z, vector),
        ("conv1x1", z, weight, vector, vector),
        ("conv1x1_join", z, weight, rows, rows),
        ("conv1x1_dgrad", over, weight, None, over, rows, rows, rows, *(None,) * 3, z, *(vector,) * 3, *both_grads),
        ("conv1x1_wgrad", over, z),
        ("conv_norm_add_relu", z, weight, None, rows, rows.abs() + 0.1, rows, rows, 1e-5, over),
        ("gram_norm", weight, square, vector, vector, z),
        ("gram_grad", weight, product, square, vector, vector, rows, rows, rows, z),
    ]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([t for op, *args in calls for t in getattr(torch.ops.resnet_fused, op)(*args)])
            total = z.clone()
            results[-1] += [*torch.ops.resnet_fused.add_stats_(total, g), total]
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
def test_every_half_and_bfloat16_survives_and_rounding_is_to_nearest_even():
    ones, zeros = torch.ones(64), torch.zeros(64)
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        z = every.view(1, 32, 32, 64).permute(0, 3, 1, 2)
        out, _ = backends.run("norm_add_relu", z, ones, zeros, relu=False, backend="cpu")
        torch.testing.assert_close(out, z, rtol=0, atol=0, equal_nan=True)
        scale = torch.rand(64) * 3
        out, _ = backends.run("norm_add_relu", z, scale, zeros, relu=False, backend="cpu")
        expected = (z.float() * scale.view(1, -1, 1, 1)).to(dtype)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("groups", "size", "channels", "padding"),
    [(1, 1, 16, 0), (1, 1, 16, 1), (1, 3, 16, 0), (1, 3, 1, 0), (4, 3, 16, 0)],
)
def test_joins_that_onednn_does_not_run_as_one_are_rounded_once(groups, size, channels, padding, dtype):
    x = torch.randn(2, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, channels // groups, 1, 1).to(dtype)
    residual, shift = (
        activations(2, 8, size + 2 * padding, size + 2 * padding).to(dtype),
        torch.randn(8, dtype=torch.promote_types(dtype, torch.float32)),
    )
    exact = torch.conv2d(x.double(), weight.double(), shift.double(), padding=padding, groups=groups)
    expected = torch.relu(exact + residual.double()).to(dtype)
    places = ([1, 1], [padding] * 2, [1, 1], groups, True)
    got = backends.run("conv_add_relu", x, weight, shift, residual, *places, backend="cpu")
    backends.run("conv_add_relu_", residual, x, weight, shift, *places, backend="cpu")
    for value in (got, residual):
        torch.testing.assert_close(
            value, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-2 if dtype.itemsize < 8 else 0
        )


@pytest.mark.parametrize("groups", [1, 4])
def test_prepacked_weight_gives_the_plain_weights_result(groups):
    x, weight, residual = activations(2, 32, 9, 9), torch.randn(16, 32 // groups, 3, 3), activations(2, 16, 5, 5)
    places = ([2, 2], [1, 1], [1, 1], groups, True)
    packed = onednn.prepack(weight, x.shape, *places[:-1])
    expected = OPS["conv_add_relu"].reference(x, weight, torch.ones(16), residual, *places)
    got = backends.run("conv_add_relu", x, packed, torch.ones(16), residual, *places, backend="cpu")
    torch.testing.assert_close(got, expected)
    backends.run("conv_add_relu_", residual, x, packed, torch.ones(16), *places, backend="cpu")
    torch.testing.assert_close(residual, expected)


@needs_library
def test_contiguous_input_is_refused_with_a_reason_and_by_the_kernel():
    z = torch.randn(2, 8, 4, 4)
    assert backends.choose("bn_stats", (z,), {}).name == "reference"
    with pytest.raises(RuntimeError, match="cpu: takes channels_last tensors only"):
        backends.run("bn_stats", z, backend="cpu")
    with pytest.raises(RuntimeError, match=r"bn_stats: z of shape \[2, 8, 4, 4\] is not channels_last; pass z.contig"):
        torch.ops.resnet_fused.bn_stats(z)


@needs_library
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("emit_grad", [False, True])
def test_no_channels_have_empty_sums(emit_grad, with_residual):
    z, v = activations(2, 0, 4, 4), torch.ones(0)
    more = {"residual": z, "residual_mean": v} if with_residual else {}
    found = torch.ops.resnet_fused.norm_add_relu_backward(z, z, v, v, v, emit_grad=emit_grad, **more)
    assert all(t.numel() == 0 for t in found)


@needs_library
@pytest.mark.parametrize(
    ("op", "args", "text"),
    [
        ("norm_add_relu", lambda z, v: (z, v[:-1], v), r"scale has shape \[7\] but the activations have 8 channels"),
        ("norm_add_relu", lambda z, v: (z, v.double(), v), "scale is Double; pass Float for Float activations"),
        ("norm_add_relu", lambda z, v: (z, v, v, z[:1]), r"residual has shape \[1, 8, 4, 4\] but z has \[2, 8, 4, 4\]"),
        ("norm_add_relu", lambda z, v: (z, v, v, z.half()), "residual is Half but z is Float; pass one dtype"),
        ("norm_add_relu_backward", lambda z, v: (z,), "with relu, pass mask, or z, scale and shift"),
        ("norm_add_relu_backward", lambda z, v: (z, z, None, v, v), "got z without mean; pass both or neither"),
        ("lazy_grad_apply", lambda z, v: (z, None, v, v, v), "got b without z; pass z too"),
        ("lazy_grad_apply", lambda z, v: (z, None, v, *[None] * 5, z[:1]), r"residual has shape \[1, .* but g has"),
        ("lazy_grad_apply", lambda z, v: (z, None, v, *[None] * 5, z.half()), "residual is Half but g is Float"),
        ("lazy_grad_apply_", lambda z, v: (z, None, v, *[None] * 5, z), "residual shares memory with g, which"),
        ("lazy_grad_apply_", lambda z, v: (z[:1], None, v, *[None] * 5, late(z)), "residual shares memory with g"),
        ("conv_norm_add_relu_", lambda z, v: written(z, z), "x shares memory with out, which is written"),
        ("conv_norm_add_relu_", lambda z, v: written(z[:1], z[1:], late(z)), "residual shares memory with out"),
        ("conv_norm_add_relu_", lambda z, v: written(z[:1], z + 1), r"out is Float of shape \[1, 8, 4, 4\] but the"),
        ("conv_norm_add_relu_", lambda z, v: written(z, z + 1, z, adds=True), "got a residual where out itself is one"),
        ("add_stats_", lambda z, v: (z, z), "other shares memory with out, which is written"),
        ("add_stats_", lambda z, v: (z[:1], late(z)), "other shares memory with out, which is written"),
        ("add_stats_", lambda z, v: (z, z[:1]), r"other has shape \[1, 8, 4, 4\] but out has \[2, 8, 4, 4\]"),
        ("add_stats_", lambda z, v: (z, z.half()), "other is Half but out is Float; pass one dtype"),
        ("add_stats_", lambda z, v: (z, z.clone(), v), r"sample_factor has shape \[8\] but .* 2 samples"),
        ("gram", lambda z, v: (z, v[:3]), r"centre has shape \[3\] but the activations have 8 channels"),
        ("gram", lambda z, v: (z, v, None, None, [0, 1]), r"stride is \[0, 1\]; pass two positive numbers"),
        ("bn_stats", lambda z, v: (v,), r"z has shape \[8\]; pass a \[N, C, H, W\] tensor"),
        ("bn_stats", lambda z, v: (z.int(),), "z is Int; pass Float, BFloat16 or Half, or Double"),
    ],
)
def test_argument_errors(op, args, text):
    with pytest.raises(RuntimeError, match=f"{op}: {text}"):
        getattr(torch.ops.resnet_fused, op)(*args(activations(2, 8, 4, 4), torch.ones(8)))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("outputs", "channels"), [(0, 3), (3, 0), (1, 1), (5, 3), (48, 16), (7, 65)], ids=str)
def test_gram_join_without_pixels_channels_or_outputs_and_of_few(outputs, channels, dtype):
    """Against the reference, and through a Gram matrix with inf in it: which results are finite is part of it."""
    torch.manual_seed(outputs)
    weight, wide = torch.randn(outputs, channels, 1, 1, dtype=dtype), torch.promote_types(dtype, torch.float32)
    square, product = torch.randn(channels, channels, dtype=wide), torch.randn(outputs, channels, dtype=wide)
    vector, rows, z = torch.randn(channels, dtype=wide), torch.randn(outputs, dtype=wide), activations(2, 4, 3, 5)
    square = square @ square.T
    for gram, a in ((square, z), (square, z[:0]), (square.index_fill(0, torch.arange(channels)[-1:], torch.inf), z)):
        for op, *args in (
            ("gram_norm", weight, gram, vector, vector, a),
            ("gram_grad", weight, product, gram, vector, vector, rows, rows, rows, a),
        ):
            got, expected = getattr(torch.ops.resnet_fused, op)(*args), OPS[op].reference(*args)
            for one, other in zip(got, expected, strict=True):
                assert one.stride() == other.stride()
                loose = {"rtol": 1e-4, "atol": 1e-4} if one.dtype == torch.float32 else {}
                torch.testing.assert_close(one, other, equal_nan=True, **loose)


class Built:
    """A loaded library on a CPU of some level, to ask what is declared there."""

    def __init__(self, cpu_level: str):
        self.cpu, self.build_info = Library("_C.so"), {"cpu_level": cpu_level}


def test_gram_join_takes_contiguous_matrices_and_reads_only_the_shape_of_the_activations(monkeypatch):
    monkeypatch.setattr("resnet_fused.backends.cpu.status", lambda: Built("avx2"))
    weight, square, vector = torch.randn(6, 4, 1, 1), torch.eye(4), torch.randn(4)
    other = torch.randn(2, 9, 5, 3)[..., ::2]  # neither its channels nor its layout matter
    assert CPU.reasons("gram_norm", (weight, square, vector, vector, other), {}) == []
    strided = torch.eye(8)[::2, ::2]
    assert CPU.reasons("gram_norm", (weight, strided, vector, vector, other), {}) == ["takes contiguous tensors only"]
    by_column = torch.randn(4, 6, 1, 1).transpose(0, 1)
    assert CPU.reasons("gram_norm", (by_column, square, vector, vector, other), {}) == ["takes contiguous tensors only"]
    monkeypatch.setattr("resnet_fused.backends.cpu.status", lambda: Built("baseline"))
    reasons = CPU.reasons("gram_norm", (weight, square, vector, vector, other), {})
    assert reasons == ["is slower than BLAS without AVX2"]


@needs_library
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: torch.randn(6, 4, 3, 3)}, r"weight has shape \[6, 4, 3, 3\]; pass a \[K, C, 1, 1\] weight"),
        ({0: torch.randn(6, 4)}, r"weight has shape \[6, 4\]; pass a \[K, C, 1, 1\] weight"),
        ({0: torch.ones(6, 4, 1, 1, dtype=torch.int32)}, "weight is Int; pass Float, BFloat16 or Half, or Double"),
        ({0: torch.randn(4, 6, 1, 1).transpose(0, 1)}, r"weight of shape \[6, 4, 1, 1\] is not channels_last"),
        ({1: torch.eye(3)}, r"gram has shape \[3, 3\] but weight has \[6, 4, 1, 1\]; pass gram of shape \[4, 4\]"),
        ({1: torch.eye(8)[::2, ::2]}, r"gram is not contiguous; pass gram.contiguous\(\)"),
        ({2: torch.ones(4).double()}, "total is Double; pass Float for a Float weight"),
        ({3: torch.ones(4, 1)}, r"centre has shape \[4, 1\] but weight has .* pass centre of shape \[4\]"),
        ({4: torch.ones(4)}, r"a has shape \[4\]; pass a \[N, C, H, W\] tensor of as many pixels"),
    ],
    ids=[f"case{i}" for i in range(9)],
)
def test_gram_join_argument_errors(change, text):
    weight, square, vector, rows, a = (
        torch.randn(6, 4, 1, 1),
        torch.eye(4),
        torch.ones(4),
        torch.ones(6),
        torch.ones(1, 4, 2, 2),
    )
    args = [change.get(i, t) for i, t in enumerate((weight, square, vector, vector, a))]
    with pytest.raises(RuntimeError, match=f"gram_norm: {text}"):
        torch.ops.resnet_fused.gram_norm(*args)
    with pytest.raises(RuntimeError, match=f"gram_grad: {text}"):
        torch.ops.resnet_fused.gram_grad(args[0], torch.ones(6, 4), *args[1:4], rows, rows, rows, args[4])
    with pytest.raises(RuntimeError, match=r"gram_grad: rstd has shape \[5\] .* pass rstd of shape \[6\]"):
        torch.ops.resnet_fused.gram_grad(weight, torch.ones(6, 4), square, vector, vector, rows, rows, rows[:5], a)


def test_join_refuses_a_residual_of_another_shape():
    x, weight = activations(2, 8, 4, 4), torch.randn(6, 8, 1, 1)
    with pytest.raises(RuntimeError, match=r"residual has shape \[2, 6, 4, 3\] but the convolution's result has"):
        backends.run("conv_add_relu", x, weight, None, activations(2, 6, 4, 3), backend="cpu")


def test_without_the_library_the_reference_serves(monkeypatch):
    class NotBuilt:
        class cpu:
            loaded, reason = False, "not built"

    monkeypatch.setattr("resnet_fused.backends.cpu.status", lambda: NotBuilt)
    z = activations(2, 8, 4, 4)
    assert CPU.reasons("bn_stats", (z,), {}) == ["the compiled library is not built"]
    assert backends.choose("bn_stats", (z,), {}).name == "reference"
