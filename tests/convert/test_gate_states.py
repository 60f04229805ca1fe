"""Gates in the states that users bring about: hooks, other modules, copies, checkpoints."""

import copy
import pickle

import pytest
import torch
from gated import GATES, Block, Excite, InPlaceOnMean, assert_near, assert_same, image, observe, runs_gate, scattered
from torch import nn
from torch.utils.checkpoint import checkpoint

import resnet_fused


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def _hook(log):
    return lambda module, args, out: log.append((type(module).__name__, args[0].shape))


@pytest.mark.parametrize("name", ["", "avg_pool"])
def test_hooks_on_what_is_bypassed_make_the_module_a_call(name):
    logs = []

    def edit(block):
        logs.append([])
        block.se.get_submodule(name).register_forward_hook(_hook(logs[-1]))

    fused = assert_same(scattered(Block(8, Excite)), image(2, 8, 5, 5), gated=False, edit=edit)
    assert logs[1] == logs[0] * 2  # it ran twice
    assert logs[0][0][1] == (2, 8, 5, 5)
    assert "hooks" in str(resnet_fused.report(fused))


def test_hooks_on_opaque_modules_run_and_change_values():
    logs = []

    def edit(block):
        logs.append([])
        block.se.fc[2].register_forward_hook(_hook(logs[-1]))
        block.se.fc.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        block.se.fc[2].register_full_backward_hook(lambda module, grads, _: (grads[0] * 3,))

    assert_same(scattered(Block(8, Excite)), image(2, 8, 5, 5), edit=edit)
    assert logs[0] and logs[1] == logs[0] * 2


def test_replaced_and_parametrised_children_are_called():
    def replace(block):
        torch.manual_seed(1)
        block.se.fc = nn.Sequential(nn.Linear(8, 8, dtype=torch.float64), nn.Tanh())
        nn.utils.parametrizations.weight_norm(block.se.fc[0])

    assert_same(scattered(Block(8, Excite)), image(2, 8, 5, 5), edit=replace)


class Other(nn.Module):
    def forward(self, x):
        return x * 2


@pytest.mark.parametrize(
    "edit",
    [
        lambda block: setattr(block, "se", Other()),
        lambda block: setattr(block.se, "forward", lambda x: x * 3),
        lambda block: setattr(block.se, "avg_pool", nn.AdaptiveMaxPool2d(1)),
    ],
    ids=["another module", "another forward", "another pool"],
)
def test_a_changed_module_is_called(edit):
    assert_same(scattered(Block(8, Excite)), image(2, 8, 5, 5), gated=False, edit=edit)


def test_a_replaced_forward_of_the_class_is_called(monkeypatch):
    block = scattered(Block(8, Excite)).eval()
    fused, x = resnet_fused.fuse(copy.deepcopy(block)), image(2, 8, 5, 5)
    assert "opaque" in runs_gate(fused, x)
    monkeypatch.setattr(Excite, "forward", lambda self, x: x * 5)
    assert "opaque" not in runs_gate(fused, x)
    torch.testing.assert_close(fused(x), block(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("gate", [g for g in GATES if isinstance(g, type)])
def test_copies_run_the_gate(gate, copied):
    stock = scattered(Block(8, gate, True))
    fused = copied(resnet_fused.fuse(copy.deepcopy(stock)))
    x = image(2, 8, 5, 5)
    assert "opaque" in runs_gate(copy.deepcopy(fused), x)
    found = observe(fused, x)
    assert_near(found, observe(stock, x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    stock = scattered(Block(8, InPlaceOnMean, True))
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), image(2, 8, 5, 5)
    found = observe(fused, x, lambda x: checkpoint(fused, x, use_reentrant=reentrant))
    assert_near(found, observe(stock, x, lambda x: checkpoint(stock, x, use_reentrant=reentrant)))


def test_gradients_of_some_results_only():
    """The factor's path alone, and the product's alone: what comes back over one of them is nothing."""

    class Detached(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.inner = nn.Conv2d(c, c, 1)

        def forward(self, x):
            return x * self.inner(x.mean((2, 3), keepdim=True))

    def cut(block):
        block.se.inner.register_forward_pre_hook(lambda module, args: (args[0].detach(),))

    assert_same(scattered(Block(8, Detached)), image(2, 8, 5, 5), edit=cut)
