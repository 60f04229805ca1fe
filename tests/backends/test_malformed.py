"""Arguments that are of no convolution: reasons never raise, and leave it to the op to say what is wrong."""

import pytest
import torch

from resnet_fused.backends import cuda_conv, cuda_gradients, dispatch

NONE = [None] * 5
STEP = [0, -1, 1, 1, 1, 1, 1, 1, 1]


@pytest.fixture(autouse=True)
def built(monkeypatch):
    monkeypatch.setattr(cuda_conv, "_unbuilt", lambda arch: "")


def data(*shape):
    return torch.empty(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("weight", "stride", "padding", "dilation"),
    [
        (data(16, 8, 3, 3), (0, 0), (1, 1), (1, 1)),
        (data(16, 8, 3, 3), (1,), (1, 1), (1, 1)),
        (data(16, 8, 3, 3), (1, 1, 1), (1, 1), (1, 1)),
        (data(16, 8, 3, 3), 1, (1, 1), (1, 1)),
        (data(16, 8, 3, 3), (1, 1), (1, 1), (0, 1)),
        (data(16, 8, 3, 3), (1, 1), (-1, -1), (1, 1)),
        (data(16, 8, 9, 9), (1, 1), (1, 1), (1, 1)),
        (data(16, 8, 3, 3), (1, 1), (-9, 1), (1, 1)),
        (data(16, 9, 3, 3), (1, 1), (1, 1), (1, 1)),  # of no number of groups
        (data(16, 0, 3, 3), (1, 1), (1, 1), (1, 1)),
        (torch.empty(16, 8, dtype=torch.bfloat16), (1, 1), (1, 1), (1, 1)),
        (torch.empty(16, 8, 3, dtype=torch.bfloat16), (1, 1), (1, 1), (1, 1)),
    ],
)
def test_a_convolution(weight, stride, padding, dilation):
    x, where, vector = data(2, 8, 5, 5), (stride, padding, dilation), torch.empty(16)
    assert cuda_conv.conv_norm_reasons(x, weight, *NONE, 1.0, None, *where) == []
    assert cuda_conv.conv_reasons(x, weight, None, None, *where) == []
    assert cuda_conv.conv_values_reasons(x, weight, None, None, *where) == []
    assert cuda_conv.conv_join_reasons(x, weight, vector, vector, None, *where) == []
    if isinstance(stride, tuple) and len(stride) == 2:
        step = [0, -1, 1, *stride, *padding, *dilation]
        assert cuda_conv.chain_reasons(x, None, [weight, *NONE] * 2, step * 2, [1.0, 1.0]) == []


def test_gradients_of_no_images():
    g, weight = torch.empty(16, 5, 5, dtype=torch.bfloat16), data(16, 8, 1, 1)
    told = ["takes channels_last tensors only"]
    assert cuda_gradients.dgrad_reasons(g, weight) == cuda_gradients.wgrad_reasons(g, data(2, 8, 5, 5)) == told


def test_sizes_beyond_all_numbers():
    """Of a tensor that there cannot be; the next convolution would read it."""
    x, weight, far = data(2, 8, 5, 5), data(8, 8, 1, 1), [0, -1, 1, 1, 1, 1 << 40, 1 << 40, 1, 1]
    told = cuda_conv.chain_reasons(x, None, [weight, *NONE] * 2, [*far, 1, *STEP[1:]], [1.0, 1.0])
    assert len(told) == 2 and "32768 pixels" in told[0] and "2^31 elements" in told[1]


@pytest.mark.parametrize(
    ("tensors", "steps", "eps", "text"),
    [
        ([None] * 6, STEP, [1.0], "convolution 1 of 1: has no weight"),
        ([data(16, 8, 3, 3)], STEP, [1.0], "got 1 tensors, 9 integers and 1 eps"),
        ([data(16, 8, 3, 3), *NONE], STEP[:2], [1.0], "got 6 tensors, 2 integers and 1 eps"),
        ([data(16, 8, 3, 3), *NONE], STEP, [1.0, 1.0], "got 6 tensors, 9 integers and 2 eps"),
        ([data(16, 8, 3, 3), *NONE], [3, *STEP[1:]], [1.0], "reads the values 3 and -1"),
        ([data(16, 8, 3, 3), *NONE], [0, 2, *STEP[2:]], [1.0], "reads the values 0 and 2"),
    ],
)
def test_a_chain(tensors, steps, eps, text):
    """With the text of the CPU's kernel, which checks as the GPU's does."""
    assert cuda_conv.chain_reasons(data(2, 8, 5, 5), None, tensors, steps, eps) == []
    if dispatch.backends()["cpu"].unavailable:
        pytest.skip("nothing is compiled here")
    tensors = [None if t is None else t.float() for t in tensors]
    with pytest.raises(RuntimeError, match=f"^conv_chain.*{text}"):
        dispatch.run("conv_chain", data(2, 8, 5, 5).float(), None, tensors, steps, eps)
