"""Fused blocks under torch.compile."""

import copy

import pytest
import torch
from nets import assert_same, block, images, observe, pair


@pytest.mark.parametrize("training", [True, False])
def test_compile_in_one_graph(training):
    _, fused = pair(block(8, 8, 2).train(training))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=False)
    eager, inside = copy.deepcopy(fused), fused
    assert_same(observe(inside, images(), compiled), observe(eager, images()), 1e-5, 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), eager(images()), rtol=1e-4, atol=1e-4)


def test_a_compiled_block_runs_fused():
    """Compiling a block itself leaves a mark on it, which must not look like a change of the block."""
    _, fused = pair(block(8, 8, 2))
    called = set()

    def note(graph, example):
        called.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(fused, fullgraph=True, backend=note)(images())
    assert not any("convolution" in name or "conv2d" in name for name in called), called
    assert any("FusedProgram" in name or "autograd_function_apply" in name for name in called), called
