"""On which programs a CPU takes values: where its kernels are, and are expected to gain."""

import pytest
import torch
from chains import call_of
from tuned import bottleneck, bottleneck_call

from resnet_fused.library import status
from resnet_fused.plan import choose, cpu_values, lower, too_small, variants
from resnet_fused.plan.devices import DEVICES
from resnet_fused.plan.variants import Variant
from resnet_fused.steps import Conv, Norm, StepTensors, residual_program
from resnet_fused.steps.program import Addition, Call, Convolution, Normalisation, Program


@pytest.fixture
def values_on_cpu(monkeypatch):
    """A CPU whose kernels run on values, whichever this one is."""
    if not status().cpu.loaded:
        pytest.skip(f"the compiled library is {status().cpu.reason}")
    monkeypatch.setattr(cpu_values, "level", lambda: "avx512")
    monkeypatch.setattr(cpu_values, "MULTIPLIES_BF16", True)


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
        lambda: wide(256, 56, 48, 16, torch.bfloat16),  # vectors of pairs half empty
        lambda: wide(256, 56, 64, 16, torch.float16),
        lambda: wide(256, 56, 64, 16, torch.float64),
        lambda: wide(256, 56, 64, 16, backend="reference"),
    ],
)
def test_on_tensors_where_the_kernels_do_not_gain_or_are_not(values_on_cpu, call):
    assert not modelled(call()).values


def test_bfloat16_is_on_values_with_plain_joins_where_the_processor_multiplies_it(values_on_cpu, monkeypatch):
    assert modelled(wide(256, 56, 64, 16, torch.bfloat16)) == Variant(False, gram=True)  # saves more than values do
    call = wide(1024, 14, 256, 16, torch.bfloat16)
    assert modelled(call) == Variant(True)
    assert [v for v in variants.every(call) if v.values] == [Variant(True)]
    monkeypatch.setattr(cpu_values, "MULTIPLIES_BF16", False)
    assert not modelled(call).values and not any(v.values for v in variants.every(call))


def test_a_sum_with_a_convolution_has_no_product_in_bfloat16(values_on_cpu):
    program = Program((Convolution(0, Conv()), Normalisation(1, Norm(), True), Convolution(2, Conv()), Addition(3, 0)))
    tensors = [StepTensors(torch.empty(64, 64, 1, 1)), StepTensors(None, None, *(torch.empty(64) for _ in range(4)))]
    tensors += [StepTensors(torch.empty(64, 64, 1, 1)), StepTensors(None)]
    for dtype, served in ((torch.float32, True), (torch.bfloat16, False)):
        assert cpu_values.serve(Call(program, torch.empty(2, 64, 8, 8, dtype=dtype), tensors)) == served


@pytest.mark.plans_small
def test_in_bfloat16_they_outweigh_python_in_the_cache_too(values_on_cpu, monkeypatch):
    """ResNet-50's layer3 at batch 16 stays in a cache of 32 MiB, and gains all the same; not at batch 1."""
    monkeypatch.setattr(too_small, "HAS_AVX512", True)
    monkeypatch.setattr(too_small, "SLOW_PRODUCTS", True)
    monkeypatch.setattr(too_small, "cache_bytes", lambda: 32 << 20)
    monkeypatch.setattr(too_small, "rate", lambda dtype: 400e9)
    monkeypatch.setattr(too_small, "threads", lambda: 2)
    for batch, small in ((16, False), (1, True)):
        call = wide(1024, 14, 256, batch, torch.bfloat16)
        assert variants.is_small(call, call.shapes()) == small
    call = wide(1024, 14, 256, 16, torch.float16)
    assert variants.is_small(call, call.shapes())


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
