"""What the plan leaves to stock runs stock's own forward from the second call on, until its choice could be another."""

import copy
import pickle

import pytest
import small_cache
import torch
from small_cache import image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused
from resnet_fused.backends import onednn
from resnet_fused.convert import as_stock, fused_module, stage
from resnet_fused.models import BasicBlock, resnet18
from resnet_fused.plan import choose, measured, too_small

pytestmark = pytest.mark.plans_small


@pytest.fixture(autouse=True)
def where_small_is_stock(monkeypatch):
    small_cache.assume(monkeypatch)


def pair():
    torch.manual_seed(0)
    stock = BasicBlock(8, 8)
    return stock, resnet_fused.fuse(copy.deepcopy(stock))


@pytest.fixture
def known():
    """A block that ran as stock once, and a call that it knows."""
    model = pair()[1]
    model(image())
    assert as_stock.is_known(model, image())
    return model


@pytest.mark.parametrize("settings", [{"backend": "cpu"}, {"precision": "fast"}], ids=str)
def test_fused_with_other_settings_it_is_asked_again(known, settings):
    resnet_fused.fuse(known, **settings)
    assert not as_stock.is_known(known, image())
    resnet_fused.fuse(known, backend="auto", precision="default")
    assert as_stock.is_known(known, image())


def test_another_precision_is_asked_for_itself(known):
    with resnet_fused.precision("fast"):
        assert not as_stock.is_known(known, image())
    assert as_stock.is_known(known, image())


def test_a_known_call_proves_nothing_and_is_stock_to_the_bit(monkeypatch):
    stock, model = pair()
    for step in range(3):
        if step == 1:
            monkeypatch.setattr(fused_module, "runnable", lambda block: pytest.fail("was proven again"))
        ours, theirs = model(image()), stock(image())
        ours.square().sum().backward(), theirs.square().sum().backward()
        assert ours.equal(theirs) and ours.stride() == theirs.stride()
    for mine, other in zip(model.parameters(), stock.parameters(), strict=True):
        assert mine.grad.equal(other.grad)
    assert all(mine.equal(other) for mine, other in zip(model.buffers(), stock.buffers(), strict=True))


def test_a_whole_network_is_known_with_its_stem_and_stages():
    model, x = resnet_fused.fuse(resnet18(num_classes=3)), torch.randn(2, 3, 16, 16)
    model(x)
    assert as_stock.is_known(model, x)
    assert as_stock.is_known(model.layer1, torch.randn(2, 64, 4, 4).requires_grad_().clone())


def test_what_runs_fused_is_not_known(monkeypatch):
    monkeypatch.setattr(too_small, "is_small_in_evaluation", lambda *args: False)
    model = pair()[1].eval()
    with torch.no_grad():
        model(image()), model(image())
        assert not as_stock.is_known(model, image())
    model.train()
    with choose.fusing_all():
        model(image())
    assert not as_stock.is_known(model, image())


def _freeze(model):
    for p in model.parameters():
        p.requires_grad_(False)


@pytest.mark.parametrize(
    "change",
    [
        _freeze,
        lambda model: model.eval(),
        lambda model: model.bn2.eval(),
        lambda model: setattr(model, "conv1", nn.Conv2d(8, 8, 3, padding=1, bias=False)),
        lambda model: measured.forget(),
        lambda model: setattr(model, "extra", nn.Identity()),
    ],
    ids=["frozen", "eval", "one norm in eval", "a child replaced", "choices forgotten", "a child added"],
)
def test_changes_ask_the_plan_again(known, change):
    change(known)
    assert not as_stock.is_known(known, image())


@pytest.mark.parametrize(
    "scope",
    [
        choose.fusing_all,
        choose.observing,
        lambda: choose.planning_for(choose.CPU_CORE),
        lambda: choose.tuning(lambda *args: None),
        lambda: resnet_fused.use("reference"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.no_grad,
    ],
    ids=["fusing_all", "observing", "planning_for", "tuning", "use", "autocast", "no_grad"],
)
def test_scopes_ask_the_plan_again(known, scope):
    with scope():
        assert not as_stock.is_known(known, image())
    assert as_stock.is_known(known, image())


def test_other_inputs_ask_the_plan_again(known):
    others = (image(3), image().double(), image().requires_grad_(), nn.Parameter(image()), image().to("meta"), None)
    assert not any(as_stock.is_known(known, x) for x in others)


def test_other_threads_ask_the_plan_again(known, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    assert not as_stock.is_known(known, image())


def test_evaluation_where_no_convolution_has_an_epilogue(monkeypatch):
    monkeypatch.setattr(onednn, "SERVED", frozenset())
    stock, model = (module.eval() for module in pair())
    with torch.no_grad():
        assert model(image()).equal(stock(image()))
        assert as_stock.is_known(model, image())
        with resnet_fused.use("cpu"):
            assert not as_stock.is_known(model, image())


def test_hooks_and_replaced_methods_run_in_a_known_call(known):
    seen = []
    known.bn1.register_forward_hook(lambda *args: seen.append("hook"))
    known.conv2.forward = lambda x: seen.append("method") or torch.zeros_like(x)
    assert as_stock.is_known(known, image())
    known(image())
    assert seen == ["hook", "method"]


def test_nothing_travels_with_copies(known):
    for other in (copy.deepcopy(known), pickle.loads(pickle.dumps(known))):
        assert not as_stock.is_known(other, image())


def test_keys_are_bounded(known, monkeypatch):
    monkeypatch.setattr(as_stock, "_LIMIT", 3)
    for n in range(2, 8):
        known(image(n))
    assert len(as_stock._kept[known].keys) <= 3
    assert as_stock.is_known(known, image(7))


def test_only_the_smallest_stems_are_left_to_stock(monkeypatch):
    """A convolution's output of 2 x 64 x 8 x 8 elements."""
    x = torch.randn(2, 3, 16, 16)
    for limit, kept in ((8191, False), (8192, True)):
        monkeypatch.setattr(too_small, "FEW_POOLED", limit)
        model = resnet_fused.fuse(resnet18(num_classes=3))
        model(x)
        assert as_stock.is_known(model, x) is kept


@torch.no_grad()
def test_a_stage_that_is_stocks_in_part_proves_the_other_blocks(monkeypatch):
    monkeypatch.setattr(too_small, "is_small_in_evaluation", lambda call, *_: call.tensors[0].weight.shape[0] < 16)
    torch.manual_seed(0)
    wide = BasicBlock(8, 16, downsample=nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)))
    stock = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8), wide).eval()
    model, x = resnet_fused.fuse(copy.deepcopy(stock)), image()
    for _ in range(2):
        torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-4)
    proven, original = [], fused_module.runnable
    monkeypatch.setattr(fused_module, "runnable", lambda block: proven.append(block) or original(block))
    torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-4)
    assert len(proven) == 1 and proven[0] is model[2]
    for one in (model, stock):  # while the first block runs, the last one changes
        one[0].conv1.register_forward_hook(lambda *args, one=one: setattr(one[2].bn1, "eps", 1.0))
    torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-4)


class Scaled(BasicBlock):
    """A block with somebody else's code behind its program."""

    def forward(self, x):
        return 0.5 * self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


@torch.no_grad()
def test_a_stage_with_other_code_in_it_is_proven_once(monkeypatch):
    torch.manual_seed(0)
    stock = nn.Sequential(BasicBlock(8, 8), Scaled(8, 8)).eval()
    model, x = resnet_fused.fuse(copy.deepcopy(stock)), image()
    assert type(model) is stage.FusedStage
    torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(stage, "runnable", lambda block: pytest.fail("was proven again"))
    torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-4)
    for one in (model, stock):
        one[0].conv1.register_forward_hook(lambda *args: args[-1].neg())
    torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_stage_that_hooks_kept_stock_is_proven_again():
    model, x = resnet_fused.fuse(nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))).eval(), image()
    hooks = [block.conv1.register_forward_hook(lambda *args: None) for block in model]
    model(x)
    for hook in hooks:
        hook.remove()
    assert not as_stock.is_known(model, x) and not as_stock.is_known(model, x, stage._IN_PART)


class _Watches(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("kind", [BasicBlock, "mixed"])
def test_a_stage_that_a_mode_kept_stock_is_proven_again(kind):
    last = BasicBlock if kind is BasicBlock else Scaled
    model, x = resnet_fused.fuse(nn.Sequential(BasicBlock(8, 8), last(8, 8))).eval(), image()
    with _Watches():
        model(x)
    assert not as_stock.is_known(model, x) and not any(as_stock.is_known(block, x) for block in model)
    assert kind == "mixed" or not as_stock.is_known(model, x, stage._IN_PART)


@torch.no_grad()
def test_a_stage_with_other_code_is_known_where_all_its_programs_are_small(monkeypatch):
    monkeypatch.setattr(too_small, "is_small_in_evaluation", lambda *args: True)
    stock = nn.Sequential(BasicBlock(8, 8), Scaled(8, 8)).eval()
    model, x = resnet_fused.fuse(copy.deepcopy(stock)), image()
    assert model(x).equal(stock(x)) and as_stock.is_known(model, x)
    monkeypatch.setattr(fused_module, "run_block", lambda *args: pytest.fail("was asked again"))
    assert model(x).equal(stock(x))
