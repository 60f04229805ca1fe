"""Programs in evaluation through the Triton kernels against stock operations in float64."""

import contextlib
import dataclasses

import pytest
import torch
from evaluated import evaluate
from programs import CASES, F64, NONE, P1, P3, S1, S3, conv_tensors, norm_tensors

from resnet_fused.backends.triton import common
from resnet_fused.plan import choose
from resnet_fused.plan.devices import DEVICES
from resnet_fused.steps import Norm, Pool
from resnet_fused.steps.program import Call, Normalisation
from resnet_fused.steps.residual import residual_program
from resnet_fused.steps.stock import program_output

pytestmark = pytest.mark.usefixtures("poisoned_outputs", "full_float32")
DEVICE = torch.device("cpu" if common.INTERPRETING else "cuda")
#: Beyond twice stock's own error: a few roundings of sums.
FLOOR = {torch.float32: 4e-6, torch.bfloat16: 4e-3}
FROZEN = Norm(batch_stats=False)


def bottleneck(stride=1, projected=False):
    steps = [(P1, FROZEN), (S3 if stride > 1 else P3, FROZEN), (P1, FROZEN)]
    shortcut = (S1 if stride > 1 else P1, FROZEN) if projected else None
    tensors = [conv_tensors(6, 4), norm_tensors(4), conv_tensors(4, 4, 3), norm_tensors(4)]
    tensors += [conv_tensors(4, 6), norm_tensors(6), *([conv_tensors(6, 6), norm_tensors(6)] if projected else [])]
    return residual_program(steps, shortcut, residual="" if projected else "x"), [*tensors, NONE]


def stem():
    return residual_program([(S3, FROZEN)], pool=Pool()), [conv_tensors(6, 8, 3), norm_tensors(8), NONE]


MORE = {
    "bottleneck": bottleneck,
    "bottleneck with projection": lambda: bottleneck(1, True),
    "bottleneck with strided projection": lambda: bottleneck(2, True),
    "stem": stem,
}


def called(program, x, tensors, dtype):
    """The call in `dtype`, batch norm's tensors in float32 (float64 for float64)."""
    wide = torch.float64 if dtype == F64 else torch.float32
    placed = [
        type(own)(*(None if t is None else t.detach().to(DEVICE, dtype if i < 2 else wide) for i, t in enumerate(own)))
        for own in tensors
    ]
    return Call(program, x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last), placed)


@pytest.mark.parametrize("dtype", FLOOR, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_values(name, dtype):
    torch.manual_seed(0)
    program, tensors = (CASES | MORE)[name]()
    nodes = [dataclasses.replace(n, norm=FROZEN) if isinstance(n, Normalisation) else n for n in program.nodes]
    program = dataclasses.replace(program, nodes=tuple(nodes), backend="triton")
    x = torch.randn(3, 6, 5, 6).to(dtype)
    tensors = [own._replace(weight=None if own.weight is None else own.weight.to(dtype)) for own in tensors]

    def stocks(dtype):
        call = called(program, x, tensors, dtype)
        return program_output(call).double()

    exact, theirs = stocks(F64), stocks(dtype)
    with choose.planning_for(DEVICES["h100"]) if common.INTERPRETING else contextlib.nullcontext():
        ours = evaluate(called(program, x, tensors, dtype)).double()
    scale = exact.abs().max()
    assert (ours - exact).abs().max() / scale <= 2 * (theirs - exact).abs().max() / scale + FLOOR[dtype]
