"""Blocks whose norms stand before their convolutions: recognised and run as one program, and left alone where not."""

import copy

import pytest
import torch
from nets import observe
from preact_blocks import BLOCKS, F64, assert_equal, made, outcome, plan_of
from torch import nn

import resnet_fused
from resnet_fused.blocks import runtime
from resnet_fused.convert import stock_forward
from resnet_fused.models import Bottleneck
from resnet_fused.models.preact import PreActBottleneck


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_one_program(name):
    block, x = made(name)
    fused = resnet_fused.fuse(copy.deepcopy(block))
    assert any("convolution" in text and "norm on load" in text for text in plan_of(fused, x))
    assert_equal(observe(fused, x), observe(block, x))
    (row,) = resnet_fused.report(fused).fused
    assert row.convolutions.fused == row.convolutions.total and row.passes.fused == row.passes.total and not row.reason


def test_timms_blocks_are_programs_too():
    from resnet_fused.testing.vision import import_torchvision

    import_torchvision()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    stage = timm.create_model("resnetv2_50", num_classes=5).stages[1].double().train()
    stage = nn.Sequential(*list(stage.blocks)[:2])
    fused = resnet_fused.fuse(copy.deepcopy(stage))
    x = torch.randn(2, 256, 6, 6, dtype=F64)
    assert len(resnet_fused.report(fused).fused) == 2
    assert_equal(observe(fused, x), observe(stage, x))


class DropsBranch(PreActBottleneck):
    """With timm's drop path before the addition, as timm has it."""

    def __init__(self, drop):
        super().__init__(16, 4)
        self.drop_path = drop

    def forward(self, x):
        out = self.relu(self.bn1(x))
        out = self.conv2(self.relu(self.bn2(self.conv1(out))))
        out = self.conv3(self.relu(self.bn3(out)))
        return self.drop_path(out) + x


class DropsPostActivation(Bottleneck):
    """The same in a block whose norms stand behind."""

    def __init__(self, drop):
        super().__init__(16, 4)
        self.drop_path = drop

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.drop_path(self.bn3(self.conv3(out)))
        out += x
        return self.relu(out)


def test_drop_path_draws_the_very_same():
    from resnet_fused.testing.vision import import_torchvision

    import_torchvision()
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    block = DropsBranch(layers.DropPath(0.5)).double().train()
    fused = resnet_fused.fuse(copy.deepcopy(block))
    x = torch.randn(6, 16, 5, 5, dtype=F64)
    assert any("norm on load" in text for text in plan_of(fused, x))
    assert_equal(observe(fused, x), observe(block, x))
    assert "* drop_path + x" in resnet_fused.report(fused).fused[0].what


@pytest.mark.plans_small
@pytest.mark.parametrize("kind", [DropsBranch, DropsPostActivation])
def test_drop_path_draws_once_where_the_plan_leaves_the_block_to_stock(kind):
    from resnet_fused.plan import too_small
    from resnet_fused.testing.vision import import_torchvision

    import_torchvision()
    layers = pytest.importorskip("timm.layers")
    if not too_small.HAS_AVX512:
        pytest.skip("nothing is too small without AVX-512")
    torch.manual_seed(0)
    block, x = kind(layers.DropPath(0.5)).train(), torch.randn(6, 16, 5, 5)
    fused = resnet_fused.fuse(copy.deepcopy(block))
    assert any("stays in the cache" in text for text in plan_of(fused, x))
    for _ in range(2):
        got, after = observe(fused, x), torch.get_rng_state()
        want = observe(block, x)
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert torch.equal(after, torch.get_rng_state())


def _evaluate(block, x):
    block.eval()


def _freeze_a_norm(block, x):
    block.bn1.eval()


def _hook_a_norm(block, x):
    block.bn1.register_forward_hook(lambda module, args, out: out * 2)


def _hook_the_last_convolution(block, x):
    block.conv3.register_forward_hook(lambda module, args, out: out + 1)


def _replace_a_norm(block, x):
    block.bn1 = nn.GroupNorm(2, 16).double()


def _replace_the_last_convolution(block, x):
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    block.conv3 = Scaled(4, 16, 1).double()


def _a_forward_of_its_own(block, x):
    block.conv3.forward = lambda x: 3 * torch.conv2d(x, block.conv3.weight)


def _spectral_norm(block, x):
    nn.utils.parametrizations.spectral_norm(block.conv3)


def _other_dtype(block, x):
    block.bn1.float()


def _no_momentum(block, x):
    for norm in (block.bn1, block.bn3):
        norm.momentum = None


def _no_affine(block, x):
    block.bn1 = nn.BatchNorm2d(16, affine=False).double()


def _nothing_tracked(block, x):
    block.bn1 = nn.BatchNorm2d(16, track_running_stats=False).double()


def _parameters_frozen(block, x):
    for parameter in [*block.bn1.parameters(), *block.conv1.parameters()]:
        parameter.requires_grad_(False)


CHANGES = [
    _evaluate, _freeze_a_norm, _hook_a_norm, _hook_the_last_convolution, _replace_a_norm, _replace_the_last_convolution,
    _a_forward_of_its_own, _spectral_norm, _other_dtype, _no_momentum, _no_affine, _nothing_tracked, _parameters_frozen,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_changed_after_fuse_is_followed(change):
    block, x = made("bottleneck")
    fused = resnet_fused.fuse(copy.deepcopy(block))
    observe(fused, x), observe(block, x)
    for side in (fused, block):
        torch.manual_seed(5)
        change(side, x)
    got, want = outcome(fused, x), outcome(block, x)
    for a, b in zip(got, want, strict=True):
        if isinstance(b, tuple):
            assert a == b
        else:
            assert_equal(a, b)
    resnet_fused.report(fused)


def test_autocast_and_its_mixtures():
    block, x = made("bottleneck")
    block = block.float()
    fused = resnet_fused.fuse(copy.deepcopy(block))
    for dtype in (torch.float32, torch.bfloat16):
        for side_dtype in (torch.bfloat16,):
            with torch.autocast("cpu", side_dtype):
                a, b = fused(x.to(dtype)), block(x.to(dtype))
            assert a.dtype == b.dtype
            torch.testing.assert_close(a.float(), b.float(), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("contiguous", [True, False])
def test_the_result_has_stocks_layout(contiguous):
    block, x = made("projection")
    if not contiguous:
        x = x.contiguous(memory_format=torch.channels_last)
    fused = resnet_fused.fuse(copy.deepcopy(block))
    assert fused(x).stride() == block(x).stride()


@pytest.mark.parametrize("size", [(0, 16, 4, 4), (1, 16, 1, 1), (2, 16, 1, 1), (2, 5, 4, 4), (16, 4, 4)])
def test_odd_inputs_and_errors(size):
    block, _ = made("bottleneck")
    fused = resnet_fused.fuse(copy.deepcopy(block))
    x = torch.randn(size, dtype=F64)
    for a, b in zip(outcome(fused, x), outcome(block, x), strict=True):
        assert a == b if isinstance(b, tuple) else assert_equal(a, b) is None


@pytest.mark.plans_small
def test_small_blocks_run_as_stock():
    block, x = made("bottleneck")
    block, x = block.float(), x.float()
    fused = resnet_fused.fuse(copy.deepcopy(block))
    from resnet_fused.plan import too_small

    if not too_small.HAS_AVX512:
        pytest.skip("nothing is too small without AVX-512")
    assert plan_of(fused, x) == ["stock (stays in the cache)"]
    got, want = observe(fused, x), observe(block, x)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_copies_pickles_and_unfuse(tmp_path):
    block, x = made("projection")
    fused = resnet_fused.fuse(copy.deepcopy(block))
    torch.save(fused, tmp_path / "block.pt")
    loaded = torch.load(tmp_path / "block.pt", weights_only=False)
    for other in (copy.deepcopy(fused), loaded):
        assert any("norm on load" in text for text in plan_of(other, x))
    with stock_forward():
        assert not any("norm on load" in text for text in plan_of(fused, x))
    assert type(resnet_fused.unfuse(fused)) is PreActBottleneck


def test_what_was_decided_is_kept_and_decided_anew_for_other_settings(monkeypatch):
    block, x = made("bottleneck")
    fused = resnet_fused.fuse(copy.deepcopy(block))
    lowered = []
    original = runtime.lower
    monkeypatch.setattr(runtime, "lower", lambda program, *args: lowered.append(program) or original(program, *args))

    def calls(value=x):
        lowered.clear()
        assert_equal({"out": fused(value)}, {"out": block(value)})
        return len(lowered)

    assert (calls(), calls()) == (1, 0)
    assert calls(x[:2]) == 1 and calls(x.contiguous(memory_format=torch.channels_last)) == 0
    for side in (fused, block):
        side.bn2.eps = 0.1
        side.conv2.padding = side.conv2.dilation = (2, 2)
    x = x[:, :, :5]
    assert calls(x) == 1
    for side in (fused, block):
        side.conv2.padding = side.conv2.dilation = (1, 1)
    assert (calls(x), calls(x)) == (1, 0)
    for side in (fused, block):
        side.conv2.weight = nn.Parameter(side.conv2.weight[:, :, :, 1:2].clone())
        side.conv2.padding = (1, 0)
    assert (calls(x), calls(x)) == (1, 0)
    with resnet_fused.use("cpu"):
        assert (calls(x), calls(x)) == (1, 0)


@pytest.mark.plans_small
def test_a_call_that_ran_fused_is_not_taken_for_one_that_ran_as_stock(monkeypatch):
    from resnet_fused.plan import variants

    block, x = made("bottleneck")
    fused = resnet_fused.fuse(copy.deepcopy(block))
    monkeypatch.setattr(variants, "is_small", lambda *args: False)
    before = runtime.fused_programs()
    for _ in range(3):
        fused(x)
    assert runtime.fused_programs() == before + 3


def test_a_norm_that_has_lost_its_activation_raises_as_in_stock():
    from resnet_fused.testing.vision import import_torchvision

    import_torchvision()
    timm = pytest.importorskip("timm")
    block = timm.create_model("resnetv2_50", num_classes=5).stages[0].blocks[1].train()
    fused, x = resnet_fused.fuse(copy.deepcopy(block)), torch.randn(2, 256, 6, 6)
    fused(x)
    for side in (fused, block):
        side.norm1.act = None
        with pytest.raises(TypeError, match="not callable"):
            side(x)
