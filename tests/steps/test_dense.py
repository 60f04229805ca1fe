"""Dense blocks on one buffer against stock in float64: outputs, gradients, running statistics, in every state."""

import copy

import pytest
import torch
from dense_blocks import LAYERS, assert_equal, dense_block, fused, images, step
from torch import nn

from resnet_fused.backends import use
from resnet_fused.blocks import runtime
from resnet_fused.ops.contract import is_slice
from resnet_fused.steps.dense import dense_program
from resnet_fused.steps.program import Concatenation
from resnet_fused.steps.saved import unpacked


def norms(block):
    return [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]


def test_program_is_that_of_the_paper():
    program = dense_program(3)
    assert [node.reads for node in program.nodes if isinstance(node, Concatenation)] == [
        (0, 4),
        (0, 4, 9),
        (0, 4, 9, 14),
    ]
    assert program.maker(11).reads == (10,) and program.output == 15


@pytest.mark.parametrize("prefer", ["speed", "memory"])
@pytest.mark.parametrize("layers", [1, LAYERS])
def test_a_step_in_training(prefer, layers):
    stock = dense_block(layers=layers)
    block = fused(stock, prefer=prefer)
    for _ in range(7):  # the sixth and later repeat what the fifth dispatched
        before = runtime.fused_programs()
        assert_equal(step(block, images()), step(stock, images()))
        assert runtime.fused_programs() > before


STATES = {
    "evaluation": lambda block: block.eval(),
    "frozen": lambda block: [norm.eval() for norm in norms(block)],
    "first-frozen": lambda block: [layer.norm1.eval() for layer in block.values()],
    "second-frozen": lambda block: [layer.norm2.eval() for layer in block.values()],
    "one-frozen": lambda block: norms(block)[2].eval(),
    "cumulative": lambda block: [setattr(norm, "momentum", None) for norm in norms(block)],
    "no-statistics": lambda block: [
        norm.__init__(norm.num_features, track_running_stats=False) for norm in norms(block)
    ],
    "not-affine": lambda block: [norm.__init__(norm.num_features, affine=False) for norm in norms(block)],
    "no-weights": lambda block: [p.requires_grad_(False) for p in block.parameters()],
    "convolutions": lambda block: [p.requires_grad_(p.dim() == 4) for p in block.parameters()],
    "last-norm": lambda block: [
        p.requires_grad_(n.startswith("denselayer3.norm2")) for n, p in block.named_parameters()
    ],
    "last-conv": lambda block: [p.requires_grad_(n == "denselayer3.conv2.weight") for n, p in block.named_parameters()],
    "first-layer": lambda block: [p.requires_grad_(n.startswith("denselayer1")) for n, p in block.named_parameters()],
    "eps": lambda block: [setattr(norm, "eps", 1e-3 * i + 1e-3) for i, norm in enumerate(norms(block))],
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("wants", [True, False], ids=["input", "no-input"])
@pytest.mark.parametrize("prefer", ["speed", "memory"])
def test_states(state, wants, prefer):
    stock = dense_block()
    STATES[state](stock)
    stock.double()
    block = fused(stock, prefer=prefer)
    before = runtime.fused_programs()
    assert_equal(step(block, images(), wants), step(stock, images(), wants))
    assert runtime.fused_programs() > before


@pytest.mark.parametrize("training", [True, False])
def test_without_autograd(training):
    stock = dense_block().train(training)
    block = fused(stock)
    for scope in (torch.no_grad, torch.inference_mode):
        for _ in range(7):
            with scope():
                expected, got = stock(images()), block(images())
            assert got.stride() == expected.stride() and not got.requires_grad
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    buffers = dict(stock.named_buffers())
    for name, b in block.named_buffers():
        torch.testing.assert_close(b, buffers[name], rtol=1e-12, atol=1e-12)


def test_contiguous_images_and_what_follows_them():
    stock = dense_block()
    assert_equal(step(fused(stock), images(channels_last=False)), step(stock, images(channels_last=False)))


@pytest.mark.parametrize("maker", ["torchvision", "timm"])
@pytest.mark.parametrize("wants", [True, False], ids=["input", "no-input"])
def test_checkpoints_move_running_statistics_twice(maker, wants):
    pytest.importorskip(maker) if maker == "timm" else None
    stock = dense_block(maker, memory_efficient=True)
    block = fused(stock)
    assert_equal(step(block, images(), wants), step(stock, images(), wants))
    counted = {layer.norm1.num_batches_tracked.item() for layer in [*block.values()][1:]}
    assert counted == {2} and block.denselayer1.norm1.num_batches_tracked == 1 + wants


def test_second_derivatives():
    stock = dense_block()
    found = []
    for block in (stock, fused(stock)):
        x = images().requires_grad_()
        (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [x, *block.parameters()], allow_unused=True))
    for got, expected in zip(*found, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_batched_gradients():
    stock = dense_block()
    found = []
    for block in (stock, fused(stock)):
        x = images().requires_grad_()
        out = block(x)
        directions = torch.randn(3, *out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
        found.append(torch.autograd.grad(out, x, directions, is_grads_batched=True)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def test_two_forwards_and_one_backward():
    stock = dense_block()
    found = []
    for block in (stock, fused(stock)):
        x = images().requires_grad_()
        (block(x) * block(2 * x)).sum().backward()
        found.append([x.grad, *(p.grad for p in block.parameters()), *block.buffers()])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_a_result_that_was_written_to_is_noticed():
    out = fused(dense_block())(images().requires_grad_())
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_nothing_holds_the_node_for_ever():
    """What is saved are views of the result's memory, and none of the result."""
    import weakref

    block = fused(dense_block())
    out = block(images().requires_grad_())
    watched = weakref.ref(out.untyped_storage())
    del out
    assert watched() is None


def bytes_saved(block, x):
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    own = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    return sum(size for place, size in seen.items() if place not in own)


def test_what_is_saved():
    stock, x = dense_block(layers=6), images(n=8, size=12).requires_grad_()
    kept, recomputed = (bytes_saved(fused(stock, prefer=prefer), x) for prefer in ("speed", "memory"))
    pixels, wide = 8 * 12 * 13 * 8, 5 + 6 * 4
    assert recomputed < pixels * wide * 1.1
    assert kept < pixels * (wide + 6 * 8) * 1.1 < 0.35 * bytes_saved(stock, x)


def test_hooks_on_saved_tensors():
    stock = dense_block()
    with torch.autograd.graph.save_on_cpu():
        got = step(fused(stock), images())
    assert_equal(got, step(stock, images()))


def test_layers_may_differ_in_width():
    stock = dense_block()
    stock.denselayer2.conv2 = nn.Conv2d(8, 7, 3, padding=1, bias=False).double()
    stock.denselayer3.norm1, stock.denselayer3.conv1 = (
        nn.BatchNorm2d(16).double(),
        nn.Conv2d(16, 8, 1, bias=False).double(),
    )
    assert_equal(step(fused(stock), images()), step(stock, images()))


def test_named_reference_runs_it_too():
    stock = dense_block()
    with use("reference"):
        got = step(fused(stock, backend="auto"), images())
    assert_equal(got, step(stock, images()))


def test_hooks_that_lose_strides():
    stock, seen = dense_block(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t):
        out = fused(stock)(images().requires_grad_())
    node = out.grad_fn
    for t in unpacked(node.saved_tensors[2:], node.layouts):
        seen += [t] if t.dim() == 4 and t.shape[2:] == out.shape[2:] else []
    assert seen and all(map(is_slice, seen))


def test_norms_that_moved_between_evaluation_and_backward():
    stock = dense_block().eval()
    found = []
    for block in (stock, fused(stock)):
        x = images().requires_grad_()
        out = block(x)
        block.train()(2 * images())
        out.square().sum().backward()
        found.append([x.grad, *(p.grad for p in block.parameters())])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_a_stage_of_two():
    stock = nn.Sequential(dense_block(), dense_block()).double()
    stock[1].denselayer1.norm1, stock[1].denselayer1.conv1 = nn.BatchNorm2d(17), nn.Conv2d(17, 8, 1, bias=False)
    stock[1].denselayer2.norm1, stock[1].denselayer2.conv1 = nn.BatchNorm2d(21), nn.Conv2d(21, 8, 1, bias=False)
    stock[1].denselayer3.norm1, stock[1].denselayer3.conv1 = nn.BatchNorm2d(25), nn.Conv2d(25, 8, 1, bias=False)
    stock.double()
    for layout in (True, False):
        assert_equal(
            step(fused(stock), images(channels_last=layout)), step(copy.deepcopy(stock), images(channels_last=layout))
        )
    stock.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(stock)(images()), stock(images()), rtol=1e-9, atol=1e-9)
