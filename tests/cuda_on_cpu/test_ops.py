"""The CUDA ops, their checks and allocations included, run on the CPU through the contract that every backend meets."""

from __future__ import annotations

import dataclasses

import cuda_ops
import on_cpu
import pytest
import torch

from resnet_fused.backends import Backend, Kernel, cuda, cuda_conv, cuda_gradients
from resnet_fused.backends.selfcheck.compare import check_case
from resnet_fused.backends.selfcheck.draws import place
from resnet_fused.ops import DATA_DTYPES, conv_chain
from resnet_fused.testing import cases, check, poisoned_allocations

pytestmark = on_cpu.needed
CUDA_OPS = cuda_ops.NAMES
#: On tensor cores: float32 would be rounded to TF32, beyond the contract's bounds; test_conv.py and test_conv1x1.py
#: have it.
ROUNDED = (*cuda.CONVOLUTIONS, *cuda.PRODUCTS)
WRAPPED = tuple(op for op in ROUNDED if op not in CUDA_OPS)  # in Python, around the others


@pytest.fixture(scope="module")
def backend():
    kernels = cuda_ops.kernels()
    kernels |= {name: Kernel(getattr(cuda_conv, name), DATA_DTYPES) for name in WRAPPED}
    declared = cuda.PRODUCTS | {"gram": cuda.GRAM["gram"]}
    for name in (*ROUNDED, "gram"):
        reasons = declared[name]["unsupported"] if name in declared else cuda.CONVOLUTION_REASONS[name]
        kernels[name] = dataclasses.replace(kernels[name], unsupported=reasons)
    with poisoned_allocations(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_conv, "_op", lambda name: getattr(cuda_ops.registered(), name).default)
        patch.setattr(cuda_conv, "_unbuilt", lambda arch: "")
        patch.setattr(cuda_gradients, "_joins", lambda: "gram_grad" in CUDA_OPS)
        yield Backend("cuda on cpu", ("cpu",), kernels)


@pytest.mark.parametrize("dtype", DATA_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("op", [*CUDA_OPS, *WRAPPED, "norm_relu_coefficients"])
def test_every_case(backend, op, dtype):
    if op in ROUNDED and dtype == torch.float32:
        pytest.skip("rounds float32 to TF32")
    failed = []
    for case in cases(op, dtype)[:: 3 if op == "conv_norm_add_relu_" else 1]:  # the kernel of the op without "_"
        try:
            reasons = check(backend, op, case, dtype, torch.device("cpu"))
            assert reasons == [] or "groups" in reasons[0] or "Gram join" in reasons[0]
        except AssertionError as error:
            failed.append(f"{case.name}: {error}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("dtype", DATA_DTYPES, ids=str)
@pytest.mark.parametrize("op", cuda.GRAM)
def test_the_cases_of_its_own_self_check(backend, op, dtype):
    """Of the Gram family: in several tiles, splits and steps."""
    for case in cuda.GRAM[op]["more_cases"](dtype):
        verdict = check_case(backend, op, case, dtype, torch.device("cpu"))
        assert verdict.passed, verdict


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


def test_parameters_are_of_any_floating_dtype_and_at_any_stride(backend):
    z, gamma, beta = (
        torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last),
        *torch.randn(2, 4).bfloat16(),
    )
    want = backend.kernels["bn_stats"].run(z, gamma.float(), beta.float(), 1e-5)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        spread = gamma.to(dtype).repeat_interleave(3)[::3]
        got = backend.kernels["bn_stats"].run(z, spread, beta.to(dtype), 1e-5)
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("bn_stats", (activation(), torch.ones(4)), "got gamma or beta without eps"),
        (
            "bn_stats",
            (activation(), torch.ones(5), None, 1e-5),
            r"gamma is Float of shape \[5\]; pass a floating \[4\]",
        ),
        ("bn_affine", (*torch.ones(2, 4).double(), None, None, activation(), 1e-5), "mean is Double; pass Float"),
        ("bn_affine", (torch.ones(4), torch.ones(5), None, None, activation(), 1e-5), r"m2 is Float of shape \[5\]"),
        ("bn_coefficients", (*torch.ones(5, 4).double(), activation()), "sum_g is Double; pass Float"),
        ("lazy_grad_apply", (activation(), None, *torch.ones(3, 4)), "got b without z; pass z too"),
        (
            "lazy_grad_apply",
            (activation(), None, *[None] * 7, torch.zeros(18, 2, dtype=torch.uint8)),
            r"mask has shape \[18, 2\]; pass the .* \[18, 1\] mask",
        ),
        ("lazy_grad_apply", (activation(), None, *[None] * 7, activation()), "mask is Float; pass packed bits, Byte"),
        ("conv_values", (activation(), torch.ones(4, 2, 3, 3)), "^conv_values: weight .* without groups"),
        ("conv_values", (activation(), torch.ones(4, 4, 3, 3), torch.ones(4)), "got x_scale without x_shift"),
        (
            "conv_join",
            (activation(), torch.ones(4, 2, 3, 3), *torch.ones(2, 4)),
            "^conv_join: .* without groups",
        ),
        (
            "conv_join",
            (activation(), torch.ones(8, 4, 1, 1), *torch.ones(2, 4)),
            r"scale is Float of shape \[4\]; pass a contiguous \[8\]",
        ),
        ("conv_join", (activation(), torch.ones(4, 4, 1, 1), *torch.ones(2, 4), activation(8)), "residual has shape"),
        ("norm_relu_pool", (activation(), *torch.ones(2, 5)), r"scale has shape \[5\]"),
    ],
)
def test_others_refuse(backend, op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        backend.kernels[op].run(*arguments)


def test_in_place_shares_no_memory_with_the_residual(backend):
    g = activation()
    with pytest.raises(RuntimeError, match=r"^lazy_grad_apply_: residual shares memory with g"):
        backend.kernels["lazy_grad_apply_"].run(g, None, torch.ones(4), residual=g)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_chain_is_its_convolutions_to_the_bit(backend, dtype):
    """Or, where it adds a projection, the op that is both."""
    joins = 0
    for case in cases("conv_chain", dtype):
        x, residual, tensors, steps, eps = place(case, dtype, torch.device("cpu")).args
        values = [x] if residual is None else [x, residual]
        links, inputs = conv_chain.links(steps), len(values)
        joined = conv_chain.joined(links, [weight.shape for weight in tensors[::6]], inputs)
        for i, link in enumerate(links):
            own = tensors[6 * i : 6 * i + 6]
            if i in joined:
                other, at = links[joined[i]], 6 * joined[i]
                its = tensors[at : at + 6]
                first = values[link.source], own[0], *affine(*own[1:], eps[i], own[0])
                second = values[other.source], its[0], *affine(*its[1:], eps[joined[i]], its[0])
                given = (*first, *[None] * 5, *second, other.stride, None, link.relu)
                values.append(backend.kernels["conv1x1_join"].run(*given)[0])
                joins += 1
            else:
                given = conv_chain.arguments(values, own, link, eps[i])
                values.append(backend.kernels["conv_norm_add_relu"].run(*given))
        got = backend.kernels["conv_chain"].run(x, residual, tensors, steps, eps)
        assert torch.equal(got, values[-1]) and got.stride() == values[-1].stride(), case.name
    assert joins >= 2


def affine(bias, mean, var, gamma, beta, eps, weight):
    """Scale and shift of what a convolution gives."""
    bias = torch.zeros(weight.shape[0]) if bias is None else bias
    if mean is None:
        return torch.ones(weight.shape[0]), bias
    scale = gamma / (var + eps).sqrt()
    return scale, (bias - mean) * scale + beta


def chain(steps=(0, -1, 1, *[1] * 6), weights=None, residual=None, eps=1):
    """Arguments of a chain of two 3x3 convolutions with `steps` for the second."""
    x = activation(8).half()
    weight = torch.ones(8, 8, 3, 3).half()
    tensors = [t for w in (weights or [weight, weight]) for t in (w, *[None] * 5)]
    return x, residual, tensors, [0, -1, 1, *[1] * 6, *steps], [1e-5] * 2 * eps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (chain(steps=(2, -1, 1, *[1] * 6)), ", convolution 2 of 2: reads the values 2 and -1; pass those .* below 2"),
        (chain(steps=(1, 2, 1, *[1] * 6)), ", convolution 2 of 2: reads the values 1 and 2;"),
        (chain(steps=(1, -1)), ": got 12 tensors, 11 integers and 2 eps; pass 6, 9 and 1 for each convolution"),
        (chain(eps=0), ": got 12 tensors, 18 integers and 0 eps; pass"),
        (chain(weights=[torch.ones(8, 8, 3, 3).half(), None]), ", convolution 2 of 2: has no weight; pass one"),
        (
            chain(weights=[torch.ones(6, 8, 3, 3).half(), torch.ones(8, 8, 3, 3).half()], steps=(1, -1, *[1] * 7)),
            r", convolution 2 of 2: weight \[8, 8, 3, 3\] does not fit x \[2, 6, 3, 3\]; pass",
        ),
        (
            chain(steps=(0, 1, 1, 2, 2, *[1] * 4)),
            r", convolution 2 of 2: residual has shape \[2, 8, 3, 3\] but the result has \[2, 8, 2, 2\]",
        ),
    ],
)
def test_a_chain_refuses_and_names_the_convolution(backend, arguments, message):
    with pytest.raises(RuntimeError, match=f"^conv_chain{message}"):
        backend.kernels["conv_chain"].run(*arguments)


def test_a_chain_frees_what_it_has_read(backend):
    """Of eight convolutions never more than two results are there."""
    from torch.profiler import profile

    weight, link = torch.randn(8, 8, 1, 1).half(), [1, 1, 0, 0, 1, 1]
    steps = [number for i in range(8) for number in (i, -1, 1, *link)]
    x = torch.randn(1, 8, 64, 64).half().contiguous(memory_format=torch.channels_last)
    with profile(profile_memory=True) as found:
        backend.kernels["conv_chain"].run(x, None, [weight, *[None] * 5] * 8, steps, [1.0] * 8)
    at = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            at += event.nbytes()
            most = max(most, at)
    assert most <= 2 * x.numel() * x.element_size() + 1024
