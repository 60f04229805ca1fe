"""Programs of nodes through the Triton kernels against stock operations in float64: values and each gradient."""

import dataclasses

import pytest
import torch
from programs import CASES, leaves_of, observe

from resnet_fused.backends.triton import common
from resnet_fused.plan.lower import steps_of
from resnet_fused.plan.variants import Variant
from resnet_fused.steps import Call, StepTensors
from resnet_fused.steps.program_node import run_program
from resnet_fused.steps.stock import program_output

pytestmark = pytest.mark.usefixtures("poisoned_outputs", "full_float32")
DEVICE = torch.device("cpu" if common.INTERPRETING else "cuda")
#: Beyond twice stock's own error: a few roundings of sums.
FLOOR = {torch.float32: 4e-6, torch.bfloat16: 4e-3}
BIASED = "biases"  # the 1x1 ops take a bias in front of an addition only


def placed(tensors, dtype):
    """Tensors as leaves: convolutions' in `dtype`, batch norm's in float32 (float64 for float64)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def place(t, to):
        return None if t is None else t.detach().to(DEVICE, to).clone().requires_grad_()

    return [StepTensors(*(place(t, dtype if i < 2 else wide) for i, t in enumerate(own[:4]))) for own in tensors]


def seen(run, program, x, tensors, factor, dtype):
    x, own = x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last).requires_grad_(), placed(tensors, dtype)
    found = observe(run(program, x, own, factor), leaves_of(x, own))
    return {name: t.double().cpu() for name, t in found.items()}


def stock(program, x, tensors, factor):
    return program_output(Call(program, x, tensors, None, factor))


def fused(program, x, tensors, factor):
    call = Call(dataclasses.replace(program, backend="triton"), x, tensors, None, factor)
    one_pass = x.dtype != torch.float32
    return run_program(steps_of(call, Variant(True, gram=True, gram_shortcut=True, one_pass=one_pass)), call)


@pytest.mark.parametrize("dtype", FLOOR, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", [name for name in CASES if name != BIASED])
def test_values_and_gradients(name, dtype):
    torch.manual_seed(0)
    program, tensors = CASES[name]()
    x = torch.randn(3, 6, 5, 6).to(dtype)
    factor = torch.rand(3, device=DEVICE) if any(getattr(node, "sampled", False) for node in program.nodes) else None
    exact = seen(stock, program, x, tensors, factor, torch.float64)
    theirs, ours = (seen(run, program, x, tensors, factor, dtype) for run in (stock, fused))
    for key, expected in exact.items():
        stocks, error = ((side[key] - expected).norm() / expected.norm() for side in (theirs, ours))
        assert error <= 2 * stocks + FLOOR[dtype], f"{key}: error {error:.2e}, stock's {stocks:.2e}"
