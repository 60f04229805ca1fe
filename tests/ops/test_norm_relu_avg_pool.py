"""The ops that average over windows, of some channels of a tensor in channels_last, and what they refuse."""

import pytest
import torch

from resnet_fused import library, ops
from resnet_fused.backends import run
from resnet_fused.ops.contract import is_slice

pytestmark = pytest.mark.skipif(not library.status().cpu.loaded, reason="kernels of the compiled library")


def buffer(channels=24, size=7):
    shape = (3, channels, size, size - 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)


def arguments(x):
    generator = torch.Generator().manual_seed(1)
    a, b, d, mean, scale, shift = torch.randn((6, x.shape[1]), generator=generator)
    grad = ops.norm_relu_avg_pool.reference(x, scale, shift).flip(0).contiguous(memory_format=torch.channels_last)
    return {
        "norm_relu_avg_pool": (x, scale, shift),
        "norm_relu_avg_pool_backward": (grad, x, mean, scale, shift),
        "norm_relu_avg_pool_apply": (grad, x, a, b, d, scale, shift),
    }


OPS = ("norm_relu_avg_pool", "norm_relu_avg_pool_backward", "norm_relu_avg_pool_apply")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("channels", [(0, 8), (5, 6), (7, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_of_a_tensor_are_read_where_they_lie(op, channels, dtype):
    x = buffer().to(dtype)[:, slice(*channels)]
    assert is_slice(x) and not x.is_contiguous(memory_format=torch.channels_last)
    dense = x.contiguous(memory_format=torch.channels_last)
    given, copied = arguments(x)[op], arguments(dense)[op]
    got, want = run(op, *given, backend="cpu"), run(op, *copied, backend="cpu")
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    if op != OPS[1]:
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("x", "is_one"),
    [
        (buffer()[:, 3:5], True),
        (buffer()[:, :, ::2], False),
        (buffer()[:, ::2], False),
        (buffer()[:, :, :, 1:], False),
        (buffer().contiguous(), False),
        (buffer(size=2)[:, 1:2, :1, :1], True),
        (buffer()[:0, ::2], True),
    ],
)
def test_what_is_no_slice_goes_elsewhere(x, is_one):
    """The kernels refuse it, so that dispatch never offers it to them."""
    assert is_slice(x) is is_one
    if x.shape[2] < 2:
        return
    scale = torch.ones(x.shape[1])
    if is_one:
        torch.ops.resnet_fused.norm_relu_avg_pool(x, scale, scale)
        return
    with pytest.raises(RuntimeError, match="neither channels_last nor channels of such a tensor"):
        torch.ops.resnet_fused.norm_relu_avg_pool(x, scale, scale)
    torch.testing.assert_close(run(OPS[0], x, scale, scale), ops.norm_relu_avg_pool.reference(x, scale, scale))


REFUSED = [
    ({"kernel": [0, 2]}, "kernel size should be greater than zero"),
    ({"stride": [0, 1]}, "stride should not be zero"),
    ({"stride": [-1, 1]}, "stride should be greater than zero"),
    ({"kernel": [8, 2]}, "Output size is too small"),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("window", "text"), REFUSED)
def test_windows_that_stock_refuses(op, window, text):
    given = arguments(buffer())[op]
    for call in (getattr(torch.ops.resnet_fused, op), getattr(ops, op).reference, getattr(ops, op).fake):
        with pytest.raises(RuntimeError, match=text):
            call(*given, **window)
    with pytest.raises(RuntimeError):
        torch.nn.functional.avg_pool2d(buffer(), window.get("kernel", 2), window.get("stride", 2))


@pytest.mark.parametrize("op", OPS[1:])
def test_a_gradient_of_another_size(op):
    grad, *rest = arguments(buffer())[op]
    for wrong, text in ((grad[:, :, 1:], "grad_out has shape"), (grad.double(), "grad_out is Double; pass Float")):
        with pytest.raises(RuntimeError, match=text):
            getattr(torch.ops.resnet_fused, op)(wrong, *rest)
    with pytest.raises(RuntimeError, match=r"grad_out of shape .* is not channels_last"):
        getattr(torch.ops.resnet_fused, op)(grad.contiguous(), *rest)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_gives_the_same_bits(threads):
    before, given = torch.get_num_threads(), arguments(buffer(64, 41))
    want = [run(op, *given[op], backend="cpu") for op in OPS]
    try:
        torch.set_num_threads(threads)
        got = [run(op, *given[op], backend="cpu") for op in OPS]
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
