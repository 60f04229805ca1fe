"""Which cases stand for a call: they must start every binary that it starts, in every way."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from resnet_fused.backends import cards
from resnet_fused.backends import triton as room
from resnet_fused.backends.selfcheck import configurations, problems
from resnet_fused.backends.selfcheck.draws import place
from resnet_fused.backends.triton import conv1x1_wgrad
from resnet_fused.models import resnet50
from resnet_fused.plan import devices
from resnet_fused.traffic.calls import calls
from resnet_fused.traffic.coverage import Coverage

CARD = cards.H100


def test_every_op_has_forms():
    assert all(problems.forms(op) for op in room.OPS)


def test_every_binary_of_resnet50_is_run_by_the_cases_of_its_calls():
    """At batch 256 in bfloat16, training: the self-check as it was ran 5 of them."""
    x = torch.empty(256, 3, 224, 224, device="meta")
    coverage = Coverage(CARD)
    found = calls(resnet50(), x, True, devices.find("h100"), torch.bfloat16)
    found = [call for call in found if call.op in room.OPS]  # others are the compiled backend's
    assert sum(coverage.add(call) for call in found) > 40
    assert len(coverage.wanted) > 40
    assert coverage.run == coverage.wanted
    for call in found:
        kernel = room.kernels()[call.op]
        wanted = configurations.of_call(kernel, call.args, {}, CARD)
        whole = problems.problem(call.op, call.args, {})
        covering = configurations.covering(kernel, whole, wanted, CARD)
        reached = frozenset().union(
            *(configurations.of_call(kernel, *c.problem.meta(), c.card).features for c in covering)
        )
        assert wanted.features <= reached, call.op
        if call.op == "running_update":  # of vectors alone, which need not be smaller
            continue
        assert all(c.cost < 3e10 and c.problem.grid[0] == 3 for c in covering), f"{call.op} is checked on its own size"


def wgrad(outputs, inputs, size, dtype=torch.bfloat16):
    g, x = (
        torch.empty(8, c, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for c in (outputs, inputs)
    )
    return g, x


def features(*args, **kwargs):
    kernel = room.kernels()["conv1x1_wgrad"]
    return configurations.of_call(kernel, args, kwargs, CARD)


def test_a_configuration_is_of_tiles_options_and_alignment_not_of_sizes():
    g, x = wgrad(256, 256, 14)
    base = features(g, x)
    assert features(*wgrad(512, 512, 14)).digest == base.digest
    assert features(*wgrad(256, 256, 28)).digest == base.digest
    assert features(*wgrad(64, 64, 14)).digest != base.digest, "narrower tiles"
    assert features(*wgrad(257, 256, 14)).digest != base.digest, "no vectors"
    assert features(*wgrad(256, 256, 2)).digest != base.digest, "no splits"
    assert features(*wgrad(256, 256, 14, torch.float16)).digest != base.digest
    assert features(g, x, x_scale=torch.empty(256), x_shift=torch.empty(256)).digest != base.digest
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].as_strided(x.shape, x.stride())
    shifted = shifted if shifted.data_ptr() % 16 else torch.empty(x.numel() + 2, dtype=x.dtype)[1:]
    shifted = shifted.as_strided(x.shape, x.stride())
    assert features(g, shifted).digest != base.digest, "an address that 16 does not divide"


def test_cases_have_splits_several_steps_and_rests():
    g, x = wgrad(2048, 512, 28)
    wanted = features(g, x)
    kernel = room.kernels()["conv1x1_wgrad"]
    whole = problems.problem("conv1x1_wgrad", (g, x), {})
    launches = []
    for candidate in configurations.covering(kernel, whole, wanted, CARD):
        launches += kernel.launches(*candidate.problem.meta(), candidate.card)
        assert candidate.problem.channels["K"] > 256 and candidate.problem.channels["K"] % 128
        assert candidate.problem.grid[1] * candidate.problem.grid[2] * 3 % 16
    names = [launch.kernel for launch in launches]
    assert conv1x1_wgrad.conv1x1_wgrad_kernel in names and conv1x1_wgrad.conv1x1_wgrad_merge_kernel in names
    assert max(launch.values.get("TILES", 0) for launch in launches) > 1


def test_a_case_keeps_dtypes_and_alignment():
    vector = torch.zeros(9)
    args = (vector[:8], vector[1:], torch.ones(8, dtype=torch.bfloat16), None, torch.zeros(2, 4, 3, 3), 1e-5)
    case = problems.problem("bn_affine", args, {}).case("kept")
    placed = place(case, torch.float32, torch.device("cpu"))
    assert [cards.aligned(t) for t in (placed.args[0], placed.kwargs["m2"])] == [True, False]
    assert placed.kwargs["gamma"].dtype == torch.bfloat16 and placed.kwargs["beta"] is None
    assert place(placed, torch.float64, torch.device("cpu")).kwargs["gamma"].dtype == torch.float64
