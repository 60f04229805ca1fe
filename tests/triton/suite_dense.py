"""Dense blocks through the Triton kernels: against stock in float64, and called over and over; cases of their calls."""

import copy

import pytest
import torch
from dense_blocks import dense_block, images, step

import resnet_fused
from resnet_fused.backends import cards
from resnet_fused.backends import triton as room
from resnet_fused.backends.selfcheck import configurations, judge
from resnet_fused.backends.selfcheck.dense_cases import sliced
from resnet_fused.backends.triton import common
from resnet_fused.blocks import runtime

pytestmark = pytest.mark.usefixtures("poisoned_outputs", "full_float32")
DEVICE = torch.device("cpu" if common.INTERPRETING else "cuda")
#: Beyond twice stock's own error: a few roundings of sums.
FLOOR = {torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture
def trusted(monkeypatch):
    """Kernels without a self-check: `suite_kernels` has its cases."""
    monkeypatch.setattr(judge, "doubt", lambda *call: "")
    monkeypatch.setattr(judge, "objection", lambda *args, **kwargs: "")


def triton_step(block, x):
    """A step of a block whose every op has to be Triton's; 16-bit activations under autocast."""
    before = runtime.fused_programs()
    with resnet_fused.use("triton"), torch.autocast(DEVICE.type, x.dtype, enabled=x.dtype != torch.float32):
        found = step(block, x)
    assert runtime.fused_programs() > before
    return found


@pytest.mark.parametrize("saves", ["speed", "memory"])
@pytest.mark.parametrize("dtype", FLOOR, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_a_block_against_stock(dtype, saves, trusted):
    """Outputs, each gradient by name, running statistics. Odd numbers of channels, one after the other."""
    stock, x = dense_block().to(DEVICE), images().to(DEVICE)
    block = resnet_fused.fuse(copy.deepcopy(stock).float(), prefer=saves)
    exact = step(copy.deepcopy(stock), x.to(dtype).double())
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        theirs = step(stock.float(), x.to(dtype))
    ours = triton_step(block, x.to(dtype))
    assert ours.keys() == exact.keys()
    for name, expected in exact.items():
        if "num_batches" in name:
            assert ours[name] == expected
            continue
        stocks, error = ((side[name].double() - expected).norm() / expected.norm() for side in (theirs, ours))
        assert error <= 2 * stocks + FLOOR[dtype], f"{name}: error {error:.2e}, stock's {stocks:.2e}"


@pytest.mark.parametrize("size", [(4, 1, 1), (1, 3, 1)], ids=str)
def test_few_pixels(size, trusted):
    stock = dense_block(layers=2).to(DEVICE)
    block = resnet_fused.fuse(copy.deepcopy(stock).float())
    n, h, w = size
    x = torch.randn(n, 5, h, w, device=DEVICE).contiguous(memory_format=torch.channels_last)
    exact, ours = step(stock, x.double()), triton_step(block, x)
    for name, expected in exact.items():
        torch.testing.assert_close(ours[name].double(), expected.double(), rtol=2e-4, atol=2e-4, msg=name)


def test_a_block_is_repeated_to_the_bit(trusted):
    block = resnet_fused.fuse(dense_block(layers=2).float().to(DEVICE))
    state, x, seen = copy.deepcopy(block.state_dict()), images(dtype=torch.float32).to(DEVICE), []
    for _ in range(7):  # the sixth and later repeat what the fifth dispatched
        block.load_state_dict(state)
        seen.append(triton_step(block, x))
    for again in seen[1:]:
        assert all(torch.equal(again[name], first) for name, first in seen[0].items())


def layer(k, g, c, dtype):
    """Calls of each op, in a buffer with other channels beside the slices."""
    torch.manual_seed(0)

    def data(channels, pixels=(3, 7, 5)):
        n, h, w = pixels
        x = torch.randint(-16, 17, (n, channels, h, w)).to(dtype) / 8
        return sliced(x.contiguous(memory_format=torch.channels_last))

    def dense(channels):
        return data(channels).contiguous(memory_format=torch.channels_last)

    def vectors(count, size):
        return [torch.randint(-8, 9, (size,)).float() / 8 for _ in range(count)]

    w1 = torch.randn(k, c, 1, 1).to(dtype) / 8
    w3 = (torch.randn(g, k, 3, 3).to(dtype) / 8).contiguous(memory_format=torch.channels_last)
    yield "dense_enter", (dense(c), data(c))
    yield "dense_leave", (data(c), data(c), *vectors(2, c))
    yield "dense_conv1x1", (data(c), w1, *vectors(2, c))
    yield "dense_conv3x3", (dense(k), w3, *vectors(2, k), data(g))
    yield "dense_conv3x3_backward", (data(g), data(g), *vectors(2, g), dense(k), w3, *vectors(3, k))
    yield "dense_conv1x1_backward", (data(c), None, dense(k), dense(k), *vectors(3, k), data(c), w1, *vectors(3, c))


def test_a_call_is_checked_by_cases_on_slices():
    """Cases that stand for a call start its binaries: pitches, and a contiguous 3x3 weight, are part of them."""
    kernels, card = room.kernels(), cards.H100.small()
    for op, args in layer(16, 4, 12, torch.bfloat16):
        for call in (args, tuple(t.contiguous() if t is not None and t.shape[-1] == 3 else t for t in args)):
            wanted = configurations.of_call(kernels[op], call, {}, card)
            made = configurations.cases(kernels[op], op, call, {}, card)
            assert all(judge.check_case(room.BACKEND, op, case, torch.bfloat16, DEVICE).passed for case in made)
            assert wanted.features, op
