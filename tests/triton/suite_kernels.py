"""The Triton kernels against float64: on CPU tensors in the interpreter, or on a GPU.

Collected where there is a GPU; test_interpreter.py runs it in a process with TRITON_INTERPRET=1.
"""

import itertools

import pytest
import smallest
import torch
import triton
import triton.language as tl

from resnet_fused import backends
from resnet_fused.backends import triton as room
from resnet_fused.backends.selfcheck import judge
from resnet_fused.backends.selfcheck.cases import cases
from resnet_fused.backends.selfcheck.draws import ODD, Case, Draw, surrounded
from resnet_fused.backends.selfcheck.gate_cases import by_sample
from resnet_fused.backends.triton import (
    bn_stats,
    chunk_sums,
    common,
    gate_add_relu,
    gate_add_relu_backward,
    lazy_grad_apply,
    norm_add_relu,
    norm_add_relu_backward,
)
from resnet_fused.ops.contract import channels_last_like, pack_mask, unpack_mask

pytestmark = pytest.mark.usefixtures("poisoned_outputs", "full_float32")
DEVICE = torch.device("cpu" if common.INTERPRETING else "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ONE_ROW, MANY_CHANNELS, ALIGNED = (1, 64, 1, 1), (2, 73, 2, 3), (3, 24, 4, 5)
SHAPES = (ODD, ONE_ROW, MANY_CHANNELS, ALIGNED, (5, 1, 2, 2))


def check(op, args, kwargs=None, dtype=torch.float32):
    """Compare values, shapes, dtypes and strides with float64."""
    row = judge.check_case(room.BACKEND, op, Case("test", args, kwargs or {}), dtype, DEVICE)
    assert row.passed, row


def on_device(t, dtype=torch.float32):
    return t.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.to(DEVICE, dtype)


def forward_options(draw, residual, affine, factor):
    options = {"residual": draw.data()} if residual else {}
    if affine:
        options |= {"residual_scale": draw.vector(), "residual_shift": draw.vector()}
    return options | ({"sample_factor": draw.factor()} if factor else {})


def backward_options(draw, keep, z, residual, factor):
    """Options by the way the mask comes: recomputed, as the forward's output, as bits, or not at all."""
    options = {"z": draw.data(), "mean": draw.vector()} if z or keep == "recompute" else {}
    if keep == "recompute":
        options |= {"scale": draw.vector(), "shift": draw.vector()}
    elif keep != "none":
        output = draw.data().clamp_min(0)
        options["mask"] = output if keep == "output" else pack_mask(output > 0)
    options |= {"residual": draw.data(), "residual_mean": draw.vector()} if residual else {}
    return options | ({"sample_factor": draw.factor()} if factor else {}) | {"relu": keep != "none"}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype, shape):
    draw = Draw(shape)
    check("bn_stats", (draw.data(),), dtype=dtype)
    options = forward_options(draw, True, True, True)
    check("norm_add_relu", (draw.data(), draw.vector(), draw.vector()), options | {"emit_mask": True}, dtype)
    for keep in ("recompute", "bits"):
        check("norm_add_relu_backward", (draw.data(),), backward_options(draw, keep, True, keep == "bits", True), dtype)
    vectors = {name: draw.vector() for name in ("a", "b", "d", "scale", "shift")}
    options = vectors | {"sample_factor": draw.factor(), "residual": draw.data()}
    check("lazy_grad_apply", (draw.data(), draw.data()), options, dtype)
    options = {"term": by_sample(draw), "residual": draw.data()}
    check("gate_add_relu", (draw.data(), by_sample(draw)), options, dtype)
    check("gate_add_relu_backward", (draw.data(), draw.data(), draw.data().clamp_min(0)), {}, dtype)


@pytest.mark.parametrize("op", room.OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selfcheck_cases(dtype, op):
    """In the interpreter, which computes in float32 whatever it loads, each dtype of 16 bits has half of the cases."""
    halves = common.INTERPRETING and dtype != torch.float32 and len(cases(op, dtype)) > 1
    for case in cases(op, dtype)[DTYPES.index(dtype) - 1 :: 2] if halves else cases(op, dtype):
        row = judge.check_case(room.BACKEND, op, case, dtype, DEVICE)
        refused = op == "conv1x1_backward" and dtype == torch.float32
        assert row.status == "skipped" if refused else row.passed, row


def test_every_option_of_forward():
    draw = Draw(ODD)
    for residual, affine, factor, relu, mask in itertools.product((False, True), repeat=5):
        if residual or not affine:
            options = forward_options(draw, residual, affine, factor) | {"relu": relu, "emit_mask": mask}
            check("norm_add_relu", (draw.data(), draw.vector(), draw.vector()), options, torch.bfloat16)


@pytest.mark.parametrize("keep", ["recompute", "output", "bits", "none"])
def test_every_option_of_backward(keep):
    draw = Draw(ODD)
    for z, residual, factor, emit in itertools.product((False, True), repeat=4):
        options = backward_options(draw, keep, z, residual, factor) | {"emit_grad": emit}
        check("norm_add_relu_backward", (draw.data(),), options, torch.bfloat16)


def test_every_option_of_apply():
    draw = Draw(ODD)
    for affine, sign, factor, residual in itertools.product((False, True), repeat=4):
        options = {"z": draw.data() if affine or sign else None, "a": draw.vector()}
        options |= {"b": draw.vector(), "d": draw.vector()} if affine else {}
        options |= {"scale": draw.vector(), "shift": draw.vector()} if sign else {}
        options |= {"sample_factor": draw.factor()} if factor else {}
        options |= {"residual": draw.data()} if residual else {}
        check("lazy_grad_apply", (draw.data(),), options, torch.bfloat16)


def test_empty_batch_launches_nothing(monkeypatch):
    monkeypatch.setattr(common, "start", lambda *args, **kwargs: pytest.fail("launched a kernel on an empty tensor"))
    draw = Draw((0, 8, 3, 3))
    empty, v = draw.data(), draw.vector()
    check("bn_stats", (empty,))
    check("norm_add_relu", (empty, v, v), {"residual": empty, "emit_mask": True})
    options = {"z": empty, "mean": v, "scale": v, "shift": v, "residual": empty, "residual_mean": v}
    check("norm_add_relu_backward", (empty,), options)
    check("lazy_grad_apply", (empty, empty, v, v, v), {"residual": empty})
    check("gate_add_relu", (empty, by_sample(draw)), {"residual": empty})
    check("gate_add_relu_backward", (empty, empty))


@pytest.mark.parametrize("programs", [1, 3, 100])
def test_any_split_into_chunks(monkeypatch, programs):
    """One chunk of many tiles, chunks of several with a short last one, and one tile each."""
    monkeypatch.setattr(common, "REDUCTION_PROGRAMS", programs)
    monkeypatch.setattr(common, "POINTWISE_PROGRAMS", programs)
    for module in (bn_stats, gate_add_relu_backward, norm_add_relu_backward):
        monkeypatch.setattr(module, "MIN_TILES", 1)
        monkeypatch.setattr(module, "TILE", 64)
    monkeypatch.setattr(bn_stats, "MERGE_CHUNKS", 4)
    monkeypatch.setattr(chunk_sums, "CHUNKS", 4)
    for module in (gate_add_relu, norm_add_relu, lazy_grad_apply):
        monkeypatch.setattr(module, "TILE", 64)
    draw = Draw((3, 12, 5, 5))
    check("bn_stats", (draw.data(),))
    check("bn_stats", (draw.far_from_zero(torch.float32),))
    check("norm_add_relu", (draw.data(), draw.vector(), draw.vector()), {"emit_mask": True})
    check("norm_add_relu_backward", (draw.data(),), backward_options(draw, "bits", True, True, True))
    arguments = (draw.data(), draw.data(), draw.vector(), draw.vector(), draw.vector())
    check("lazy_grad_apply", arguments, {"residual": draw.data()})
    check("gate_add_relu", (draw.data(), by_sample(draw)), {"term": by_sample(draw)})
    check("gate_add_relu_backward", (draw.data(), draw.data(), draw.data()))


@pytest.mark.parametrize("first_rows", [0, 1, 40])
def test_statistics_far_from_zero(first_rows):
    """Mean 1e4 and deviation 1e-2 in float32, also where the rows that set the shift are zeros."""
    generator = torch.Generator().manual_seed(1)
    rows = 1e4 + 1e-2 * torch.randn(300, 5, generator=generator)
    rows[:first_rows] = 0
    z = on_device(rows.view(3, 10, 10, 5).permute(0, 3, 1, 2))
    mean, m2, *_ = torch.ops.resnet_fused_triton.bn_stats(z)
    wide = z.double().cpu().permute(0, 2, 3, 1).reshape(300, 5)
    torch.testing.assert_close(mean.double().cpu(), wide.mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(m2.double().cpu(), wide.var(0, correction=0) * 300, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_negative_zero_pass_the_relu(dtype):
    z = on_device(torch.tensor([torch.nan, -0.0, 0.0, -1.0, 1.0, torch.inf, -torch.inf, 2.0]).view(1, 8, 1, 1), dtype)
    one, minus_zero = torch.ones(8, device=DEVICE), torch.full((8,), -0.0, device=DEVICE)
    out, mask = torch.ops.resnet_fused_triton.norm_add_relu(z, one, minus_zero, emit_mask=True)
    out = out.flatten().cpu().float()
    expected = torch.tensor([torch.nan, -0.0, 0.0, 0.0, 1.0, torch.inf, 0.0, 2.0])
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=0, atol=0)
    assert out.signbit().tolist()[1:3] == [True, False]
    assert mask.tolist() == [[0b10110001]]  # NaN, 1, inf and 2


def test_backward_recomputes_the_sign_that_forward_clamped():
    """Pre-activations a rounding away from zero: a multiply-add fused in one kernel only would change their sign."""
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(4, 8, 6, 6, generator=generator)
    scale = torch.randn(8, generator=generator)
    shift = -(z[0, :, 0, 0] * scale)  # cancels up to rounding at one pixel of each channel
    z[:, :, ::2] = z[:1, :, :1, :1]
    z, scale, shift = on_device(z), on_device(scale), on_device(shift)
    ops = torch.ops.resnet_fused_triton
    _, mask = ops.norm_add_relu(z, scale, shift, emit_mask=True)
    ones = on_device(torch.ones(z.shape))
    g = ops.norm_add_relu_backward(ones, z, scale, scale, shift)[0]
    dz = ops.lazy_grad_apply(ones, z, torch.ones(8, device=DEVICE), scale=scale, shift=shift)
    assert torch.equal(g.bool(), unpack_mask(mask, z))
    assert torch.equal(dz, g)


def test_same_bits_every_time():
    draw = Draw((4, 24, 7, 7))
    grad, z = on_device(draw.data() / 3), on_device(draw.data() / 7)
    runs = [
        (
            *torch.ops.resnet_fused_triton.bn_stats(z),
            *torch.ops.resnet_fused_triton.norm_add_relu_backward(grad, z, z[0, :, 0, 0].contiguous(), mask=z),
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@triton.jit
def first_row_kernel(out_ptr, chunk_ptr, tiles_ptr, BLOCK_M: tl.constexpr):
    tl.store(out_ptr, common.first_row(tl.load(chunk_ptr), tl.load(tiles_ptr), 3, BLOCK_M))


def test_rows_are_counted_in_int64():
    """All kernels take their row from `first_row`; its arguments are int32, its result must not be."""
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    chunk, tiles = (torch.tensor([n], dtype=torch.int32, device=DEVICE) for n in (1 << 20, 1 << 12))
    first_row_kernel[(1,)](out, chunk, tiles, BLOCK_M=64)
    assert out.item() == ((1 << 20) * (1 << 12) + 3) * 64


def test_writes_stay_inside(monkeypatch):
    """Data outputs lie between guard values, which must survive."""
    allocated = []

    def guarded(x, dtype=None):
        out = surrounded(channels_last_like(x, dtype).fill_(0))
        allocated.append(out)
        return out

    for module in (norm_add_relu, norm_add_relu_backward, lazy_grad_apply):
        monkeypatch.setattr(module, "channels_last_like", guarded)
    for shape in (ODD, MANY_CHANNELS):
        draw = Draw(shape)
        z, v = on_device(draw.data()), on_device(draw.vector())
        norm_add_relu.run(z, v, v, emit_mask=True)
        norm_add_relu_backward.run(z, z, v, v, v)
        lazy_grad_apply.run(z, None, v)
    assert len(allocated) == 6
    for out in allocated:
        whole = out.new_empty(0).set_(out.untyped_storage())
        assert whole.isnan().sum() == whole.numel() - out.numel()
        assert not out.isnan().any()


@pytest.mark.parametrize("op", room.OPS)
def test_opcheck(op):
    case = smallest.of_the_richest(cases(op, torch.float32))  # which is run several times

    def move(t):
        if not isinstance(t, torch.Tensor):
            return t
        return on_device(t.nan_to_num(0.5)) if t.is_floating_point() else t.to(DEVICE)  # NaN differs from itself

    args, kwargs = tuple(map(move, case.args)), {name: move(t) for name, t in case.kwargs.items()}
    torch.library.opcheck(getattr(torch.ops.resnet_fused_triton, op).default, args, kwargs)


def bad_calls():
    z, v = on_device(Draw(ODD).data()), torch.ones(7, device=DEVICE)
    ops = torch.ops.resnet_fused_triton
    yield "not channels_last; pass z.contiguous", lambda: ops.bn_stats(z.contiguous())
    yield "pass a \\[N, C, H, W\\] tensor", lambda: ops.bn_stats(z[0])
    yield "z is torch.float64; pass float32, bfloat16 or float16", lambda: ops.bn_stats(z.double())
    yield "scale has shape \\[6\\] but the activations have 7 channels", lambda: ops.norm_add_relu(z, v[:6], v[:6])
    yield "scale is torch.float64; pass float32", lambda: ops.norm_add_relu(z, v.double(), v)
    yield "residual has shape .* pass tensors of one shape", lambda: ops.norm_add_relu(z, v, v, z[:1])
    yield "residual is torch.float16 but z is torch.float32", lambda: ops.norm_add_relu(z, v, v, z.half())
    yield "residual_scale without residual;", lambda: ops.norm_add_relu(z, v, v, None, v, v)
    yield "residual_scale without residual_shift", lambda: ops.norm_add_relu(z, v, v, z, v)
    yield "have 2 samples; pass a \\[2\\] vector", lambda: ops.norm_add_relu(z, v, v, sample_factor=v)
    yield "pass mask, or z, scale and shift", lambda: ops.norm_add_relu_backward(z, z, v)
    wrong_mask = torch.zeros(30, 2, dtype=torch.uint8, device=DEVICE)
    yield "pass the contiguous \\[30, 1\\] mask", lambda: ops.norm_add_relu_backward(z, mask=wrong_mask)
    yield "got b without z", lambda: ops.lazy_grad_apply(z, None, v, v, v)
    yield "residual has shape .* pass tensors of one", lambda: ops.lazy_grad_apply(z, None, v, residual=z[:1])
    yield "residual is torch.float16 but g is", lambda: ops.lazy_grad_apply(z, None, v, residual=z.half())
    yield "not contiguous; pass a.contiguous", lambda: ops.lazy_grad_apply(z, None, torch.ones(14, device=DEVICE)[::2])


def test_wrong_arguments_are_refused():
    for text, call in bad_calls():
        with pytest.raises(RuntimeError, match=text):
            call()


def test_dispatch_checks_the_kernel_and_uses_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    judge.forget()
    z = on_device(Draw(ODD).data())
    mean, *_ = backends.run("bn_stats", z, backend="triton")
    torch.testing.assert_close(mean, z.mean((0, 2, 3)))
    assert [file.name.split("-")[:3] for file in judge.cache_dir().iterdir()] == [["triton", "bn_stats", "float32"]]
    assert backends.choose("bn_stats", (z.contiguous(),), {}).name != "triton"
