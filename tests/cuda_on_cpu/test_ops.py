"""The CUDA ops, their checks and allocations included, run on the CPU through the contract that every backend meets."""

from __future__ import annotations

import on_cpu
import pytest
import torch

import build_support
from resnet_fused.backends import Backend, Kernel, cuda, cuda_conv
from resnet_fused.ops import DATA_DTYPES, OPS
from resnet_fused.testing import cases, check, poisoned_allocations

pytestmark = on_cpu.needed
NAMESPACE = "resnet_fused_cuda_on_cpu"
FILES = {path.stem for path in (on_cpu.SOURCES.parents[1] / "csrc" / "cuda").glob("*.cu")}
CUDA_OPS = sorted(name for name in OPS if name.removesuffix("_") in FILES)
#: On tensor cores: float32 would be rounded to TF32, beyond the contract's bounds; test_conv.py has it.
ROUNDED = cuda.CONVOLUTIONS
WRAPPED = tuple(op for op in ROUNDED if op not in CUDA_OPS)  # in Python, around the others


def _reasons(op):
    return cuda.CONVOLUTION_REASONS.get(op, cuda.layout_reasons)


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    schemas = torch.library.Library(NAMESPACE, "DEF")
    for name in CUDA_OPS:
        schemas.define(name + OPS[name].schema)
    _, torch_dir = build_support.find_torch()
    link = [
        "-Wl,-Bsymbolic",
        "-Wl,--no-as-needed",
        f"-L{torch_dir / 'lib'}",
        "-ltorch",
    ]  # our stream and guard, not its
    flags = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(torch_dir / "include")]
    torch.ops.load_library(on_cpu.compiled("ops.cpp", tmp_path_factory.mktemp("cuda_on_cpu"), *flags, *link))
    ops = getattr(torch.ops, NAMESPACE)
    kernels = {name: Kernel(getattr(ops, name).default, DATA_DTYPES, _reasons(name)) for name in CUDA_OPS}
    kernels |= {name: Kernel(getattr(cuda_conv, name), DATA_DTYPES, _reasons(name)) for name in WRAPPED}
    with poisoned_allocations(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_conv, "_op", lambda name: getattr(ops, name).default)
        patch.setattr(cuda_conv, "_unbuilt", lambda arch: "")
        yield Backend("cuda on cpu", ("cpu",), kernels)


@pytest.mark.parametrize("dtype", DATA_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("op", [*CUDA_OPS, *WRAPPED])
def test_every_case(backend, op, dtype):
    if op in ROUNDED and dtype == torch.float32:
        pytest.skip("rounds float32 to TF32")
    failed = []
    for case in cases(op, dtype)[:: 3 if op == "conv_norm_add_relu_" else 1]:  # the kernel of the op without "_"
        try:
            reasons = check(backend, op, case, dtype, torch.device("cpu"))
            assert reasons == [] or "groups" in reasons[0]
        except AssertionError as error:
            failed.append(f"{case.name}: {error}")
    assert not failed, "\n".join(failed)


def activation(channels=4):
    return torch.ones(2, channels, 3, 3).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 4, 3), torch.ones(4), torch.ones(4)), r"z has shape \[2, 4, 3\]; pass a \[N, C, H, W\] tensor"),
        ((torch.ones(2, 4, 3, 3), torch.ones(4), torch.ones(4)), "z of shape .* is not channels_last"),
        ((activation().int(), torch.ones(4), torch.ones(4)), "z is Int; pass Float, BFloat16 or Half"),
        ((activation(), torch.ones(5), torch.ones(4)), r"scale has shape \[5\] but the activations have 4 channels"),
        ((activation(), torch.ones(4).half(), torch.ones(4)), "scale is Half; pass Float for Float"),
        ((activation(), torch.ones(8)[::2], torch.ones(4)), "scale is not contiguous"),
        ((activation(), torch.ones(4), torch.ones(4), activation(8)), r"residual has shape \[2, 8, 3, 3\] but z has"),
        ((activation(), torch.ones(4), torch.ones(4), activation().half()), "residual is Half but z is Float"),
        ((activation(), torch.ones(4), torch.ones(4), None, torch.ones(4)), "residual_scale without residual"),
        ((activation(), torch.ones(4), torch.ones(4), activation(), torch.ones(4)), "without residual_shift"),
        (
            (activation(), *torch.ones(2, 4), None, None, None, torch.ones(3)),
            r"sample_factor has shape \[3\] .* samples",
        ),
    ],
)
def test_forward_refuses(backend, arguments, message):
    with pytest.raises(RuntimeError, match=f"^norm_add_relu: .*{message}"):
        backend.kernels["norm_add_relu"].run(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "with relu, pass mask, or z, scale and shift"),
        ({"scale": torch.ones(4)}, "got scale without shift"),
        (
            {"mask": torch.zeros(18, 2, dtype=torch.uint8)},
            r"mask has shape \[18, 2\]; pass the .* \[18, 1\] mask",
        ),
        ({"mask": activation().half()}, "mask is Half but grad_out is Float"),
        ({"relu": False, "z": activation(8)}, r"z has shape \[2, 8, 3, 3\]"),
        ({"relu": False, "z": activation()}, "got z without mean; pass both or neither"),
        ({"relu": False, "residual_mean": torch.ones(4)}, "got residual_mean without residual"),
    ],
)
def test_backward_refuses(backend, options, message):
    with pytest.raises(RuntimeError, match=f"^norm_add_relu_backward: .*{message}"):
        backend.kernels["norm_add_relu_backward"].run(activation(), **options)


def convolved(**changed):
    """Arguments of a convolution that is taken, but for what is changed."""
    x, weight = activation(8).half(), torch.ones(4, 8, 3, 3).half().contiguous(memory_format=torch.channels_last)
    given = {"x": x, "weight": weight, **dict.fromkeys(("bias", "mean", "var", "gamma", "beta")), "eps": 1e-5}
    return given | {"residual": None, "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]} | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(2, 8, 3, 3).half()}, "x of shape .* is not channels_last"),
        ({"weight": torch.ones(4, 8, 3, 3)}, "got Half x and Float weight; pass one dtype for both"),
        ({"weight": torch.ones(4, 4, 3, 3).half()}, "does not fit x .* without groups"),
        ({"weight": torch.ones(8, 4, 3, 3).half().transpose(0, 1)}, "weight is neither contiguous nor channels_last"),
        ({"bias": torch.ones(4).half()}, "bias is Half; pass Float for Half"),
        ({"mean": torch.ones(4)}, "got mean without var; pass both or neither"),
        ({"residual": activation(8).half()}, "residual has shape"),
        ({"padding": [1 << 14, 1]}, "32771 padded pixels to a side .* pass less than 32768, or use another backend"),
        ({"padding": [16000, 16000]}, "or the result has 2.31 elements or more; pass a smaller batch"),
    ],
)
def test_convolution_refuses(backend, changed, message):
    with pytest.raises(RuntimeError, match=f"^conv_norm_add_relu: .*{message}"):
        backend.kernels["conv_norm_add_relu"].run(*convolved(**changed).values())


def test_a_contiguous_weight_is_taken_as_one_in_channels_last(backend):
    run, weight = backend.kernels["conv_norm_add_relu"].run, torch.randn(4, 8, 3, 3).half()
    layouts = (weight, weight.contiguous(memory_format=torch.channels_last))
    first, second = (run(*convolved(weight=each).values()) for each in layouts)
    assert torch.equal(first, second) and first.count_nonzero() > 0


def test_the_sum_of_a_convolution_shares_no_memory_with_what_it_reads(backend):
    given = convolved(weight=torch.ones(8, 8, 3, 3).half().contiguous(memory_format=torch.channels_last))
    with pytest.raises(RuntimeError, match=r"^conv_norm_add_relu_: x shares memory with out"):
        backend.kernels["conv_norm_add_relu_"].run(given["x"], *given.values())
