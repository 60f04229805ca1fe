"""What the compiled gradients of 1x1 convolutions declare: reasons, by the arguments alone, and self-check cases."""

import pytest
import torch

from resnet_fused.backends import cuda, cuda_conv, cuda_gradients
from resnet_fused.backends.cards import Card, assuming
from resnet_fused.backends.selfcheck import conv_gradient_cases

LAST = torch.channels_last
MOST = 188  # multiprocessors of the largest known GPU


@pytest.fixture(autouse=True)
def built(monkeypatch):
    """A library for an H100, without gram_grad."""
    monkeypatch.setattr(cuda_conv, "_unbuilt", lambda arch: cuda_conv.unbuilt(arch, "9.0"))
    monkeypatch.setattr(cuda_gradients, "_joins", lambda: False)


def data(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=LAST)


def vector(size, dtype=torch.float32):
    return torch.empty(size, dtype=dtype, device="meta")


def through(**changed):
    """Of a gradient of 16 channels, through the ReLU before 8: what is taken, but for what is changed."""
    given = {"g": data(2, 16, 5, 5), "weight": data(16, 8, 1, 1), "a": vector(16), "x": data(2, 8, 9, 10)}
    given |= dict.fromkeys(("x_scale", "x_shift", "x_mean", "x_rstd", "constant"), vector(8))
    return given | {"coupling": data(8, 8, 1, 1), "x_stride": [2, 2]} | changed


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({"weight": None, "coupling": None}, ""),
        ({"g": data(2, 16, 5, 5).contiguous()}, "takes channels_last tensors only"),
        ({"x": data(2, 8, 9, 10).contiguous()}, "takes channels_last tensors only"),
        ({"z": data(2, 16, 5, 5).half()}, "takes activations and weights of one dtype"),
        ({"coupling": data(8, 8, 1, 1).half()}, "takes activations and weights of one dtype"),
        ({"weight": data(8, 16, 1, 1).transpose(0, 1)}, "takes contiguous weights only"),
        ({"x_rstd": vector(8, torch.bfloat16)}, "takes contiguous float32 vectors only"),
        ({"sample_factor": vector(4)[::2]}, "takes contiguous float32 vectors only"),
        ({"g": data(1 << 16, 16, 64, 64), "x": None}, "takes less than 2^31 elements a tensor"),
    ],
)
def test_what_stands_against_an_inputs_gradient(changed, reason):
    found = cuda_gradients.dgrad_reasons(**through(**changed))
    assert found == [] if not reason else any(reason in one for one in found)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({"x": data(2, 8, 9, 10).half()}, "takes activations and weights of one dtype"),
        ({"x_shift": vector(16)[::2]}, "takes contiguous float32 vectors only"),
        ({"join_weight": data(16, 8, 1, 1)}, "takes no Gram join, as gram_grad has no compiled kernel"),
    ],
)
def test_what_stands_against_a_weights_gradient(changed, reason):
    given = {"g": data(2, 16, 5, 5), "x": data(2, 8, 9, 10), "x_scale": vector(8), "x_shift": vector(8)}
    found = cuda_gradients.wgrad_reasons(**given | {"stride": [2, 2]} | changed)
    assert found == ([reason + (f", {torch.bfloat16}" if "dtype" in reason else "")] if reason else [])


def test_a_gradient_needs_tensor_cores_and_in_float32_tf32(monkeypatch):
    with assuming(Card(arch=75)):
        assert cuda_gradients.dgrad_reasons(**through()) == [cuda_conv.unbuilt(75, "9.0")]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    single = torch.float32
    assert cuda_gradients.wgrad_reasons(data(2, 16, 5, 5, dtype=single), data(2, 8, 5, 5, dtype=single)) == [
        cuda_conv.FULL_FLOAT32
    ]


def rows_of(t):
    return t.shape[0] * t.shape[2] * t.shape[3]


def test_the_self_check_of_an_inputs_gradient_meets_every_tile():
    """64x128, 64x64 and element by element, with both ends of the kernel; a chunk of several tiles; and no weight."""
    met = set()
    for case in conv_gradient_cases.dgrad_tiles(torch.bfloat16):
        (g, weight), options = case.args, case.kwargs
        c = g.shape[1] if weight is None else weight.shape[1]
        tiles = -(-rows_of(g) // 64)
        kind = "elements" if g.shape[1] % 8 or c % 8 else "wide" if c > 64 and tiles >= MOST else "small"
        met.add((kind, "residual" if "residual" in options else "sums"))
        met |= {name for name in ("weight_grad",) if name in options} | ({"no weight"} if weight is None else set())
        met |= {"chunks"} if tiles >= 2 * 8 * MOST else set()
    kinds = {(kind, end) for kind in ("wide", "small", "elements") for end in ("residual", "sums")}
    assert met == kinds | {"weight_grad", "no weight", "chunks"}


def test_the_self_check_of_a_weights_gradient_meets_every_tile():
    """64x128, 128x64, 64x64 and element by element; one split, few, and so many that threads share sums."""
    met = set()
    for case in conv_gradient_cases.wgrad_tiles(torch.bfloat16):
        (g, x), steps = case.args, -(-rows_of(case.args[0]) // 64)
        k, c = g.shape[1], x.shape[1]
        met.add("elements" if k % 8 or c % 8 else "wide" if c > 64 else "high" if k > 64 else "small")
        met.add("one" if steps == 1 else "many" if steps > 188 else "few")
    assert met == {"elements", "wide", "high", "small", "one", "few", "many"}
    assert {"conv1x1_dgrad", "conv1x1_wgrad"} <= cuda.PRODUCTS.keys()
