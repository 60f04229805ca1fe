"""Stages of which all blocks repeat tapes, as on a GPU, or fold, as on a CPU: whatever changes is seen."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import resnet_fused
from resnet_fused.blocks import ready
from resnet_fused.convert import settled_stage, stock_forward
from resnet_fused.library import status
from resnet_fused.models.resnet import BasicBlock, Bottleneck
from resnet_fused.ops.contract import channels_last
from resnet_fused.plan import choose

pytestmark = pytest.mark.skipif(not status().cpu.loaded, reason=f"the compiled library is {status().cpu.reason}")
X = torch.randn(2, 16, 6, 5, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True, params=["tapes", "folds"])
def folds(request, monkeypatch):
    """Whether blocks fold; else they repeat tapes, with the CPU's kernels as a GPU's."""
    if request.param == "tapes":
        monkeypatch.setattr(choose, "on_gpu", lambda x: True)
    with torch.no_grad(), resnet_fused.use("cpu"):
        yield request.param == "folds"


def is_settled(stage):
    return any(isinstance(one, settled_stage.Settled) for one in settled_stage._kept.get(stage, {}).values())


@pytest.fixture
def stage():
    """One that has been called often enough."""
    torch.manual_seed(0)
    made = nn.Sequential(Bottleneck(16, 4), BasicBlock(16, 16), Bottleneck(16, 4))
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(t)
    made = resnet_fused.fuse(nn.Sequential(made).to(memory_format=torch.channels_last).eval())[0]
    for _ in range(settled_stage.CALLS + 1):
        made(X)
    assert is_settled(made)
    return made


def close_to_stock(stage, x=X):
    with stock_forward():
        want = stage(x)
    got = stage(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    return got


def test_it_is_what_the_blocks_give_one_by_one(monkeypatch, stage):
    got = close_to_stock(stage)
    again = stage(X)
    assert is_settled(stage) and torch.equal(again, got)
    monkeypatch.setattr(settled_stage, "output", lambda *args: None)
    monkeypatch.setattr(settled_stage, "settle", lambda *args: None)
    assert torch.equal(stage(X), got)


def test_values_are_read_at_every_call(stage, folds):
    """Where weights are folded, the stage has to be settled anew."""
    before = close_to_stock(stage)
    for t in (*stage.parameters(), *stage.buffers()):
        if t.is_floating_point():
            t.data.mul_(1.25)
    assert not torch.equal(close_to_stock(stage), before) and is_settled(stage) is not folds


WRITES = {
    "past the version": lambda t: t.data.mul_(1.25),
    "in place": lambda t: t.mul_(1.25),
    "by NumPy": lambda t: t.detach().numpy().__imul__(1.25),
    "one element": lambda t: t[(0,) * t.dim()].add_(5),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", ["0.conv2.weight", "1.bn2.running_var", "2.bn3.bias"])
def test_a_write_is_seen(stage, write, name):
    before = stage(X)
    WRITES[write](stage.state_dict(keep_vars=True)[name])
    assert not torch.equal(close_to_stock(stage), before)
    for _ in range(settled_stage.CALLS + 1):
        stage(X)
    assert is_settled(stage)
    close_to_stock(stage)


class OneTensor(nn.Module):
    """A block that has no more than that."""

    kept = True

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)

    def forward(self, x):
        return F.relu(self.conv1(x) + x) if self.kept else x * 2


def test_blocks_of_one_tensor(monkeypatch):
    """Whose class has a constant that they read, which one of them has itself."""
    stage = nn.Sequential(OneTensor(), OneTensor()).to(memory_format=torch.channels_last).eval()
    stage[1].kept = True
    stage = resnet_fused.fuse(nn.Sequential(stage))[0]
    for _ in range(settled_stage.CALLS + 2):
        close_to_stock(stage)
    assert is_settled(stage)
    monkeypatch.setattr(OneTensor, "kept", False)
    close_to_stock(stage)


def test_blocks_behind_one_that_runs_other_code():
    """The first has a shortcut that pads with zeros."""
    net = resnet_fused.models.resnet20().to(memory_format=torch.channels_last).eval()
    stage = resnet_fused.fuse(net).layer2
    hook = stage[-1].register_forward_hook(lambda *args: None)
    want = close_to_stock(stage)
    hook.remove()  # which it is not to remember
    for _ in range(settled_stage.CALLS + 1):
        assert torch.equal(stage(X), want)
    assert is_settled(stage)
    stage[0].conv1.weight.data.mul_(1.5)
    assert not torch.equal(close_to_stock(stage), want) and is_settled(stage)
    stage[1].conv1.weight.data.mul_(1.5)
    close_to_stock(stage)
    del stage[1]
    close_to_stock(stage)
    stage[0] = copy.deepcopy(stage[1])
    close_to_stock(stage, channels_last(torch.randn(2, 32, 6, 5)))


def test_forms_that_take_turns_are_settled(stage, folds):
    """What is folded is kept of the last form alone: where another always comes between, a later call settles it."""
    others = [channels_last(torch.randn(n, 16, 6, 5)) for n in (3, 4)]
    settled_stage._kept.clear()
    for _ in range(2 * settled_stage.CALLS):
        for x in others:
            stage(x)
    assert is_settled(stage) is not folds
    for x in (others[0], *others):
        close_to_stock(stage, x)
    assert is_settled(stage)


class Louder(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 1.5 if func is torch.conv2d else out


def test_no_stage_settles_for_who_watches_it(stage):
    settled_stage._kept.clear()
    tangent = torch.randn_like(X)
    for _ in range(settled_stage.CALLS + 2):
        with Louder():
            close_to_stock(stage)
        with forward_ad.dual_level():
            assert forward_ad.unpack_dual(stage(forward_ad.make_dual(X, tangent))).tangent is not None
    assert not is_settled(stage)
    close_to_stock(stage)


@pytest.mark.parametrize("write", ["of values", "of a tensor", "of a setting"])
def test_what_another_thread_changes_while_a_stage_settles_is_seen(monkeypatch, stage, write):
    """It may come between the blocks' results and the record of what these were made from."""
    changes = {
        "of values": lambda: stage[0].conv2.weight.data.mul_(2),
        "of a tensor": lambda: exchange_weight(stage),
        "of a setting": lambda: setattr(stage[1].bn2, "eps", 0.5),
    }
    initialise, changed = settled_stage.Settled.__init__, []

    def late(*args):
        if not changed:
            changed.append(changes[write]())
        initialise(*args)

    monkeypatch.setattr(settled_stage.Settled, "__init__", late)
    settled_stage._kept.clear()
    for _ in range(settled_stage.CALLS + 1):
        stage(X)
    assert changed
    close_to_stock(stage)


def test_a_tensor_that_another_thread_exchanges_within_a_call(monkeypatch, stage):
    keep = ready.keep_evaluation

    def late(*args):
        exchange_weight(stage)
        keep(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ready, "keep_evaluation", late)
        stage(X[:1])
    close_to_stock(stage, X[:1])


def test_number_of_threads(stage):
    before, want = torch.get_num_threads(), stage(X)
    torch.set_num_threads(1)
    try:
        torch.testing.assert_close(stage(X), want)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(stage(X), want)


def exchange_weight(stage):
    stage[0].conv2.weight = nn.Parameter(stage[0].conv2.weight * 2)


CHANGES = {
    "a setting": lambda stage: setattr(stage[1].bn2, "eps", 0.5),
    "a parameter": exchange_weight,
    "its memory": lambda stage: setattr(stage[0].conv2.weight, "data", stage[0].conv2.weight.data * 2),
    "a block": lambda stage: stage.__setitem__(1, copy.deepcopy(stage[2])),
    "a convolution": lambda stage: setattr(stage[2], "conv1", nn.Conv2d(16, 4, 1, bias=True)),
    "a forward of its own": lambda stage: setattr(stage[1], "forward", lambda x: x * 2),
    "one more module": lambda stage: stage.append(nn.Tanh()),
    "a norm in training": lambda stage: stage[0].bn1.train(),
    "a hook": lambda stage: stage[2].conv2.register_forward_hook(lambda module, args, out: out * 3),
    "a hook of a block": lambda stage: stage[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "a shortcut": lambda stage: setattr(stage[0], "downsample", nn.Identity()),
    "a constant that the forward reads": lambda stage: setattr(stage[0], "drop_path", nn.Hardtanh()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(stage, change):
    before, norms = stage(X), [m.running_mean.clone() for m in stage.modules() if isinstance(m, nn.BatchNorm2d)]
    CHANGES[change](stage)
    with stock_forward():
        state = copy.deepcopy(stage.state_dict())
        want = stage(X)
        stage.load_state_dict(state)
    got = stage(X)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    assert change == "a shortcut" or not torch.equal(got, before)
    assert not is_settled(stage) and len(norms) == 8


def test_classes_and_functions_are_asked_for(monkeypatch, stage):
    before = stage(X)
    for place, name, value in (
        (nn.Conv2d, "_conv_forward", lambda self, x, weight, bias: F.conv2d(x, weight, bias, padding=self.padding) * 2),
        (F, "batch_norm", lambda x, *args: x),
        (BasicBlock, "forward", lambda self, x: x * 2),
        (BasicBlock, "conv2", nn.Identity()),
    ):
        for _ in range(settled_stage.CALLS + 1):
            stage(X)
        assert is_settled(stage)
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value, raising=False)
            with stock_forward():
                want = stage(X)
            torch.testing.assert_close(stage(X), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
            assert not is_settled(stage), name
    assert torch.equal(stage(X), before)


def test_other_calls_go_their_own_way(stage):
    close_to_stock(stage, X[:1])
    close_to_stock(stage, X.contiguous())
    with torch.enable_grad():
        assert stage(X).requires_grad
    with torch.inference_mode():
        assert stage(X).is_inference()
    with resnet_fused.use("reference"):
        close_to_stock(stage)
    assert is_settled(stage)


def test_who_is_copied_or_gone_keeps_nothing(stage):
    other = copy.deepcopy(stage)
    assert not is_settled(other) and is_settled(stage)
    for _ in range(settled_stage.CALLS + 1):
        torch.testing.assert_close(other(X), stage(X))
    assert is_settled(other)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
