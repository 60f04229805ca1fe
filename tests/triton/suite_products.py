"""The Triton kernels of 1x1 convolutions, of their gradients and of Gram matrices, against float64.

Collected where there is a GPU; test_interpreter.py runs it in a process with TRITON_INTERPRET=1.
"""

import pytest
import torch

from resnet_fused.backends import triton as room
from resnet_fused.backends.selfcheck import draws
from resnet_fused.backends.selfcheck.draws import ODD, Draw
from resnet_fused.backends.triton import common, configs, conv1x1, conv1x1_dgrad, splits
from resnet_fused.ops.contract import unpack_mask
from resnet_fused.testing import cases, check
from resnet_fused.testing.conv1x1_cases import SHAPES, Pointwise

pytestmark = pytest.mark.usefixtures("poisoned_outputs", "full_float32")
DEVICE = torch.device("cpu" if common.INTERPRETING else "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRODUCTS = ("conv1x1", "conv1x1_join", "conv1x1_dgrad", "conv1x1_wgrad", "conv1x1_backward", "gram")
EVERY = 10 if common.INTERPRETING else 1  # of the contract's cases; the interpreter is slow, and tests/ops has the rest
OPS = torch.ops.resnet_fused_triton


def place(t):
    if isinstance(t, torch.Tensor):
        return t.to(DEVICE, t.dtype if t.dtype == torch.uint8 else torch.float32)
    return t


def dtypes_of(op):
    return room.BACKEND.kernels[op].dtypes


def check_all(op, chosen, dtype):
    """Every case but those whose coupling has more channels than `conv1x1_backward` takes."""
    ran = 0
    for case in chosen:
        try:
            reasons = check(room.BACKEND, op, case, dtype, DEVICE)
        except AssertionError as error:
            raise AssertionError(f"{op}, {dtype}, case {case.name!r}: {error}") from error
        assert all("under a coupling" in reason for reason in reasons), f"{op}, case {case.name!r}: {reasons}"
        ran += not reasons
    assert ran > len(chosen) / 2, f"{op}: refuses most cases"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which the interpreter multiplies NaN with
@pytest.mark.parametrize(("dtype", "op"), [(d, op) for op in PRODUCTS for d in DTYPES if d in dtypes_of(op)], ids=str)
def test_contract(dtype, op):
    """Other cases for each dtype, where not all are run."""
    check_all(op, cases(op, dtype)[DTYPES.index(dtype) :: EVERY], dtype)


def small_tiles(monkeypatch, block, programs):
    """Tiles of `block` rows, columns and depth, and about so many programs or splits of the rows."""

    def config(op, *sizes):
        """`conv1x1_backward` needs all channels of x in a tile under a coupling."""
        return configs.Config(block, 2 * block if op.startswith("conv1x1_backward") else block, block, 4, 2)

    monkeypatch.setattr(configs, "config", config)
    monkeypatch.setattr(conv1x1, "PROGRAMS", programs)
    monkeypatch.setattr(conv1x1, "MIN_PROGRAMS", programs)
    monkeypatch.setattr(conv1x1_dgrad, "CHUNKS", programs)

    def choose(rows, tiles, row_bytes, partial_bytes, block_m, *card, **bounds):
        size = common.cdiv(common.cdiv(rows, block_m), max(1, programs // tiles))
        return splits.Split(common.cdiv(common.cdiv(rows, block_m), size), size, "")

    monkeypatch.setattr(splits, "choose", choose)


@pytest.mark.parametrize("programs", [1, 7, 1000])
@pytest.mark.parametrize("op", PRODUCTS)
def test_any_split_into_tiles(monkeypatch, op, programs):
    """A program with all row tiles, programs with some and a short last one, and programs with one."""
    small_tiles(monkeypatch, 16, programs)
    monkeypatch.setitem(SHAPES, "tile by tile", ((2, 24, 7, 9), 40))
    check_all(op, [case for case in cases(op, torch.bfloat16) if case.name.startswith("tile by tile")], torch.bfloat16)


@pytest.mark.parametrize("arch", [80, 120])
@pytest.mark.parametrize("op", PRODUCTS)
def test_defaults_of_other_architectures(monkeypatch, op, arch):
    """Their tiles, and the other way round of a product where a kernel has two."""
    monkeypatch.setattr(configs, "capability", lambda device: arch)
    wide = [case for case in cases(op, torch.bfloat16) if case.name.startswith("many channels")]
    check_all(op, wide[-1:], torch.bfloat16)


def test_empty_batch_launches_no_product(monkeypatch):
    monkeypatch.setattr(common, "start", lambda *args, **kwargs: pytest.fail("launched a kernel on an empty tensor"))
    for op in PRODUCTS:
        dtype = dtypes_of(op)[0]
        empty = [case for case in cases(op, dtype) if case.name.startswith("empty batch")]
        empty = [case for case in empty if not {"eps", "x_rstd"} & set(case.kwargs)]  # what follows for a channel is
        assert empty
        check_all(op, empty, dtype)


@pytest.mark.parametrize("op", PRODUCTS)
def test_products_have_the_same_bits_every_time(op):
    dtype = dtypes_of(op)[0]
    case = next(case for case in cases(op, dtype) if case.name.startswith("many rows"))
    placed = draws.place(case, dtype, DEVICE)
    runs = [getattr(OPS, op)(*placed.args, **placed.kwargs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_statistics_and_sums_are_of_results_as_rounded():
    """Against float64 this cannot be told: sums of unrounded values are nearer to it."""
    draw = Pointwise((3, 24, 9, 9), 40)

    def narrow(t):
        return t.to(DEVICE, torch.bfloat16)

    lazy = {name: place(t) for name, t in draw.lazy().items()}
    z, mean, m2, *_ = OPS.conv1x1(narrow(draw.normal()), narrow(draw.normal_weight()), **lazy)
    wide = z.double()
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(m2.double() / 243, wide.var((0, 2, 3), correction=0), rtol=1e-5, atol=0)
    x, g, weight = narrow(draw.normal()), narrow(draw.normal(draw.wide)), narrow(draw.normal_weight())
    x_mean = place(draw.vector())
    grad_x, sum_g, sum_gx, *_ = OPS.conv1x1_dgrad(g, weight, x=x, **lazy, x_mean=x_mean)
    wide = grad_x.double()
    torch.testing.assert_close(sum_g.double(), wide.sum((0, 2, 3)), rtol=1e-5, atol=1e-4)
    about_mean = x.double() - x_mean.double().view(1, -1, 1, 1)
    torch.testing.assert_close(sum_gx.double(), (wide * about_mean).sum((0, 2, 3)), rtol=1e-5, atol=1e-4)


def in_doubt():
    """z, scale and shift whose pre-activations are zero up to rounding at every other pixel."""
    draw = Pointwise((4, 8, 6, 6), 8)
    z, scale = draw.normal().float(), draw.normal((8, 1, 1, 1)).flatten().float()
    shift = -(z[0, :, 0, 0] * scale)
    z[:, :, ::2] = z[:1, :, :1, :1]
    return z.to(DEVICE), scale.to(DEVICE), shift.to(DEVICE)


def test_every_kernel_takes_the_sign_that_forward_clamped():
    """A multiply-add fused in one kernel only would change some. The weight is the identity."""
    z, scale, shift = in_doubt()
    identity = torch.eye(8, device=DEVICE).view(8, 8, 1, 1)
    ones = torch.ones(z.shape, device=DEVICE).contiguous(memory_format=torch.channels_last)
    out, mask = OPS.norm_add_relu(z, scale, shift, emit_mask=True)
    keep = unpack_mask(mask, z)
    assert torch.equal(OPS.conv1x1(z, identity, scale, shift)[0], out)
    assert torch.equal(OPS.conv1x1_dgrad(ones, identity, z=z, scale=scale, shift=shift)[0].bool(), keep)
    lazy = {"x": z, "x_scale": scale, "x_shift": shift, "x_mean": shift}
    assert torch.equal(OPS.conv1x1_dgrad(ones, identity, **lazy)[0].bool(), keep)
    sum_g = OPS.conv1x1_wgrad(ones, z, z=z, scale=scale, shift=shift)[1]
    assert torch.equal(sum_g, keep.sum((0, 2, 3)).float())
    one, zero = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    joined, joined_mask = OPS.conv1x1_join(z, identity, one, zero, scale, shift, emit_mask=True)
    assert torch.equal(joined, out) and torch.equal(joined_mask, mask)


def wrong_products():
    draw = Draw(ODD)
    x, w = place(draw.data()), torch.ones(5, 7, 1, 1, device=DEVICE)
    v, five = torch.ones(7, device=DEVICE), torch.ones(5, device=DEVICE)
    g = place(draw.data((2, 5, 5, 3)))
    yield r"conv1x1: weight has shape \[7, 5, 1, 1\]; pass a \[K, 7, 1, 1\]", lambda: OPS.conv1x1(x, w.transpose(0, 1))
    yield "conv1x1: weight is torch.float16 but the activations are", lambda: OPS.conv1x1(x, w.half())
    yield "conv1x1: got x_scale without x_shift; pass both", lambda: OPS.conv1x1(x, w, v)
    yield "conv1x1: x of shape .* is not channels_last", lambda: OPS.conv1x1(x.contiguous(), w)
    yield "conv1x1: stride is", lambda: OPS.conv1x1(x, w, stride=[0, 1])
    yield "conv1x1_join: scale has shape", lambda: OPS.conv1x1_join(x, w, v, v)
    yield "conv1x1_join: residual has shape", lambda: OPS.conv1x1_join(x, w, five, five, residual=x)
    yield "conv1x1_join: got x2 without weight2", lambda: OPS.conv1x1_join(x, w, five, five, x2=x)
    wide = {"weight2": w, "scale2": five, "shift2": five}
    yield "conv1x1_join: .* x2", lambda: OPS.conv1x1_join(x, w, five, five, x2=x, stride2=[2, 2], **wide)
    yield "conv1x1_dgrad: weight has shape", lambda: OPS.conv1x1_dgrad(x, w)
    yield "conv1x1_dgrad: got b without d", lambda: OPS.conv1x1_dgrad(g, w, z=g, b=five)
    yield "conv1x1_dgrad: got scale without z", lambda: OPS.conv1x1_dgrad(g, w, scale=five, shift=five)
    yield (
        "conv1x1_dgrad: got coupling without x",
        lambda: OPS.conv1x1_dgrad(g, w, coupling=torch.ones(7, 7, 1, 1, device=DEVICE)),
    )
    lazy = {"x": x, "x_scale": v, "x_shift": v}
    yield "conv1x1_dgrad: got x_scale without x_mean", lambda: OPS.conv1x1_dgrad(g, w, **lazy)
    yield "conv1x1_dgrad: residual has shape", lambda: OPS.conv1x1_dgrad(g, w, residual=x, residual_stride=[2, 2])
    yield (
        r"conv1x1_dgrad: x has shape \[2, 7, 3, 2\] at a stride of \[2, 2\] but grad_x has \[2, 7, 5, 3\]",
        lambda: OPS.conv1x1_dgrad(g, w, x=x, x_stride=[2, 2]),
    )
    yield "conv1x1_dgrad: x_stride is", lambda: OPS.conv1x1_dgrad(g, w, x=x, x_stride=[0, 1])
    yield "conv1x1_dgrad: mask has shape", lambda: OPS.conv1x1_dgrad(g, w, mask=torch.zeros_like(g, dtype=torch.uint8))
    both = (g.half(), w.half(), x.half())
    yield "conv1x1_backward: x has shape", lambda: OPS.conv1x1_backward(*both[:2], both[0])
    yield "conv1x1_backward: got x_mean without x_scale", lambda: OPS.conv1x1_backward(*both, x_mean=v)
    yield "conv1x1_backward: weight_scale has shape", lambda: OPS.conv1x1_backward(*both, weight_scale=v)
    wide = place(draw.data((2, 300, 5, 3))).half()
    yield (
        "conv1x1_backward: takes up to 256 output channels, not 300",
        lambda: OPS.conv1x1_backward(wide, torch.ones(300, 7, 1, 1, device=DEVICE).half(), both[2]),
    )
    yield "conv1x1_wgrad: a 1x1 convolution of x", lambda: OPS.conv1x1_wgrad(g, x, stride=[2, 2])
    yield "gram: centre has shape", lambda: OPS.gram(x, five)
    yield "gram: got scale without shift", lambda: OPS.gram(x, v, v)
    yield "gram: stride is", lambda: OPS.gram(x, v, stride=[1, 0])


def test_wrong_arguments_of_products_are_refused():
    for text, call in wrong_products():
        with pytest.raises(RuntimeError, match=text):
            call()
