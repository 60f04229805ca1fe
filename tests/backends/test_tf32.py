"""Whether TF32 is allowed, read whichever of PyTorch's interfaces said so."""

import pytest
import torch

from resnet_fused.backends import tf32
from resnet_fused.plan import keys
from resnet_fused.plan.devices import DEVICES
from resnet_fused.steps.program import Call, Program

cudnn = torch.backends.cudnn


@pytest.fixture(autouse=True)
def restored():
    """What PyTorch starts with, before and after."""

    def restore():
        for owner, value in [(torch.backends, "none"), (cudnn, "none"), (cudnn.rnn, "tf32"), (cudnn.conv, "tf32")]:
            owner.fp32_precision = value
        cudnn.allow_tf32 = True

    restore()
    yield
    restore()


def test_the_older_interface():
    assert tf32.allowed()
    cudnn.allow_tf32 = False
    assert not tf32.allowed()


@pytest.mark.parametrize("owner", [torch.backends, cudnn, cudnn.conv], ids=["all", "cudnn", "convolutions"])
@pytest.mark.parametrize("value", ["ieee", "tf32"])
def test_the_newer_interface(owner, value):
    cudnn.conv.fp32_precision = "none"  # inherits
    owner.fp32_precision = value
    assert tf32.allowed() == (value == "tf32")


def test_where_the_older_interface_cannot_be_read_the_plan_can_be_made():
    cudnn.conv.fp32_precision = "ieee"
    with pytest.raises(RuntimeError):  # what the newer interface is read for
        _ = cudnn.allow_tf32
    device = DEVICES["h100"]
    assert device.peak(torch.float32) == device.single
    call = Call(Program(()), torch.empty(1, device="meta"), [])
    assert not keys.settings(call).endswith("tf32")
    cudnn.conv.fp32_precision = "tf32"
    assert device.peak(torch.float32) == device.tf32
    assert keys.settings(call).endswith("tf32")


def test_products_of_triton_follow():
    pytest.importorskip("triton", reason="Triton is not installed")
    from resnet_fused.backends.triton import gemm

    cudnn.conv.fp32_precision = "ieee"
    assert gemm.precision(torch.float32) == "ieee"
    cudnn.conv.fp32_precision = "tf32"
    assert (gemm.precision(torch.float32), gemm.precision(torch.bfloat16)) == ("tf32", "ieee")


def test_it_can_be_asked_while_a_graph_is_traced():
    def double(x):
        return 2 * x if tf32.allowed() else x

    for value, expected in (("tf32", 2.0), ("ieee", 1.0)):
        torch.compiler.reset()
        cudnn.conv.fp32_precision = value
        assert torch.compile(double, backend="eager", fullgraph=True)(torch.ones(())) == expected
