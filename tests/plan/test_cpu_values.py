"""On which programs a CPU takes values: where its kernels are, and are expected to gain."""

import pytest
import torch
from chains import call_of
from tuned import bottleneck, bottleneck_call

from resnet_fused.library import status
from resnet_fused.plan import choose, cpu_values, lower, variants
from resnet_fused.plan.devices import DEVICES
from resnet_fused.plan.variants import Variant
from resnet_fused.steps import Average, Conv, Norm, StepTensors, residual_program
from resnet_fused.steps.average import AverageConvolve
from resnet_fused.steps.program import Averaging, Call, Convolution, Normalisation, Program


@pytest.fixture
def values_on_cpu(monkeypatch):
    """A CPU whose kernels run on values, whichever this one is."""
    if not status().cpu.loaded:
        pytest.skip(f"the compiled library is {status().cpu.reason}")
    monkeypatch.setattr(cpu_values, "level", lambda: "avx512")


def wide(channels=64, size=56, inner=64, batch=2, dtype=torch.float32, backend="auto"):
    """ResNet-50's bottleneck as the plan takes it, of tensors that nobody reads."""
    step = [(Conv(), Norm()), (Conv(padding=(1, 1)), Norm()), (Conv(), Norm())]
    program = residual_program(step, None, residual="x", relu=True, sampled=False, pool=None, backend=backend)
    shapes = ((inner, channels, 1, 1), (inner, inner, 3, 3), (channels, inner, 1, 1))
    tensors = []
    for shape in shapes:
        vectors = [torch.empty(shape[0]) for _ in range(4)]
        tensors += [StepTensors(torch.empty(shape)), StepTensors(None, None, *vectors, torch.tensor(0))]
    return Call(program, torch.empty(batch, channels, size, size, dtype=dtype), [*tensors, StepTensors(None)])


def modelled(call):
    with choose.fusing_all():
        return variants.modelled(call, call.shapes())


def test_bottlenecks_are_on_values_and_join_as_on_tensors(values_on_cpu):
    assert modelled(wide(256, 56, 64, 16)) == Variant(True, gram=True)
    assert modelled(wide(2048, 7, 512, 16)) == Variant(True)


@pytest.mark.parametrize(
    "call",
    [
        lambda: wide(24, 56, 24),  # channels that leave vectors half empty
        lambda: wide(256, 7, 64, 2),  # few pixels
        lambda: wide(256, 56, 64, 16, torch.bfloat16),
        lambda: wide(256, 56, 64, 16, torch.float64),
        lambda: wide(256, 56, 64, 16, backend="reference"),
    ],
)
def test_on_tensors_where_the_kernels_do_not_gain_or_are_not(values_on_cpu, call):
    assert not modelled(call()).values


def test_on_tensors_below_avx512(values_on_cpu, monkeypatch):
    monkeypatch.setattr(cpu_values, "level", lambda: "avx2")
    assert not modelled(wide(256, 56, 64, 16)).values


def test_a_gpu_that_is_planned_for_is_no_cpu(values_on_cpu):
    with choose.planning_for(DEVICES["h100"]):
        assert not cpu_values.serve(wide())


def test_measured_are_both_ways(values_on_cpu):
    chain, tensors = bottleneck()
    found = [v for v in lower.allowed(call_of(chain, torch.randn(2, 6, 4, 4), tensors)) if not v.stock]
    on_tensors = [Variant(False, bool(main), bool(other)) for main, other in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert found == [*on_tensors, Variant(True), Variant(True, True), Variant(True, True, True)]
    other = [v for v in variants.every(bottleneck_call(torch.randn(2, 6, 4, 4), kernel=3)) if v.values]
    assert not other  # its last convolution is for oneDNN


@pytest.mark.parametrize(
    ("outputs", "size", "dtype", "bias", "device", "on_value"),
    [
        (16, 28, torch.float32, False, None, True),
        (24, 28, torch.float32, False, None, False),  # vectors half empty
        (16, 13, torch.float32, False, None, False),  # few pixels
        (16, 28, torch.float64, False, None, False),
        (16, 28, torch.float32, True, None, False),
        (16, 13, torch.bfloat16, False, "h100", True),
    ],
)
def test_a_transition_is_on_values_where_that_pays(values_on_cpu, outputs, size, dtype, bias, device, on_value):
    program = Program((Normalisation(0, Norm()), Convolution(1, Conv()), Averaging(2, Average())))
    vectors = [torch.empty(32) for _ in range(4)]
    conv = StepTensors(torch.empty(outputs, 32, 1, 1, dtype=dtype), torch.empty(outputs, dtype=dtype) if bias else None)
    tensors = [StepTensors(None, None, *vectors, torch.tensor(0)), conv, StepTensors(None)]
    call = Call(program, torch.empty(1, 32, size, size, dtype=dtype), tensors)
    with choose.fusing_all() if device is None else choose.planning_for(DEVICES[device]):
        *_, last = lower.steps_of(call, variants.modelled(call, call.shapes())).steps
    assert last == AverageConvolve(3, on_value, on_value and device is None)  # and its statistics, which cost nothing
