"""What `report` and `fuse` say: shares by block, equal reasons once, and a warning where little is fused."""

import copy
import warnings

import pytest
import torch
from nets import Bottleneck, block, small_resnet
from torch import nn

import resnet_fused
from resnet_fused.convert.fused_module import STATE, FusedModule
from resnet_fused.models.preact import PreActBottleneck, PreActResNetCifar


class PreActivation(nn.Module):
    """A bottleneck whose norms come before its convolutions."""

    def __init__(self, channels=16, width=4):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        self.bn3, self.conv3 = nn.BatchNorm2d(width), nn.Conv2d(width, channels, 1)
        self.relu = nn.ReLU()

    def forward(self, x):
        h = self.conv1(self.relu(self.bn1(x)))
        h = self.conv2(self.relu(self.bn2(h)))
        h = self.conv3(self.relu(self.bn3(h)))
        return x + h


class Gated(nn.Module):
    """A block whose last pair is scaled by a gate of its own before the addition."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.gate = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = torch.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return torch.relu(x + h * self.gate(h))


class Unreadable(nn.Module):
    """A block that is left: its forward calls a method."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)

    def step(self, x):
        return torch.relu(self.bn(self.conv(x)))

    def forward(self, x):
        return self.step(x).sigmoid()


def fused(model, **kwargs):
    """`model` fused, and the texts of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resnet_fused.fuse(model, **kwargs)
    return model, [str(warning.message) for warning in caught]


def shares(row):
    return tuple(row.convolutions), tuple(row.passes)


@pytest.mark.parametrize(
    ("model", "convolutions", "passes"),
    [
        (block(), (4, 4), (8, 8)),  # four norms, three ReLUs, an addition
        (block(32, 8), (3, 3), (7, 7)),
        (PreActivation(), (3, 3), (7, 7)),
        (PreActivation().eval(), (3, 3), (7, 7)),
        (Gated(), (2, 3), (3, 5)),
        (resnet_fused.FusedBottleneck(32, 8), (3, 3), (7, 7)),
        (resnet_fused.FusedConvBNReLU(3, 4), (1, 1), (2, 2)),
    ],
)
def test_a_block_counts_its_convolutions_and_passes(model, convolutions, passes):
    report = resnet_fused.report(resnet_fused.fuse(copy.deepcopy(model)))
    (row,) = report.fused
    assert shares(row) == (convolutions, passes)
    assert (report.convolutions, report.passes) == (row.convolutions, row.passes)
    assert f"{row.convolutions} convolutions, {row.passes} passes" in str(report)


def test_what_a_fused_block_leaves_has_a_reason():
    report = resnet_fused.report(resnet_fused.fuse(Gated()))
    assert report.fused[0].reason and report.fused[0].reason in str(report)


def test_an_addition_that_is_left_has_a_reason():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.pool = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(3)
            self.conv1, self.bn1 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x):
            h = self.pool(torch.relu(self.bn(self.conv(x))))
            h += self.bn1(self.conv1(x))
            return h

    (row,) = resnet_fused.report(resnet_fused.fuse(Scaled())).fused
    assert row.what == "conv-bn-relu, [pool], conv1-bn1, [iadd]"
    assert row.reason == "an addition in place to what others may read"


def test_a_model_counts_every_module_once():
    model = resnet_fused.fuse(small_resnet())
    report = resnet_fused.report(model)
    assert report.convolutions == (20, 20) == (sum(isinstance(m, nn.Conv2d) for m in model.modules()),) * 2
    assert report.passes == (2 + 4 * 8 + 7,) * 2  # the stem, four blocks with a projection and one without
    (stem,) = (row for row in report.fused if not row.name)
    assert shares(stem) == ((1, 1), (2, 2))


def test_what_is_left_counts_too():
    model, _ = fused(nn.Sequential(block(32, 8), Unreadable(32)))
    report = resnet_fused.report(model)
    assert [shares(row) for row in report.rows] == [((3, 3), (7, 7)), ((0, 1), (0, 1))]
    assert str(report).startswith("1 modules fused, 1 left stock; 3 of 4 convolutions, 7 of 8 passes")


def test_equal_reasons_are_one_line():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(*(block(32, 8) for _ in range(18))))
    report = resnet_fused.report(fused(model)[0])
    assert len(report.left) == 18
    assert str(report).splitlines()[1:] == [
        "Stock, and why:",
        "  0, 1 and 16 more (Bottleneck): SyncBatchNorm needs the statistics of other processes",
    ]


def test_little_that_is_fused_is_one_short_warning():
    model = nn.Sequential(block(32, 8), *(Unreadable(32) for _ in range(60)))
    model, (text,) = fused(model)
    assert text.startswith("fuse: only 3 of 63 convolutions and 7 of 67 passes of Sequential are fused")
    assert "1, 2 and 58 more (Unreadable): its forward uses step" in text
    assert text.endswith("print(resnet_fused.report(model)) lists every module")
    assert len(text) < 500


def test_the_warning_is_short_whatever_the_reasons():
    scope = {"Unreadable": Unreadable}
    for i in range(9):
        exec(f"class Odd{i}(Unreadable):\n    def forward(self, x):\n        return {'y' * 400}{i}(x)", scope)
    _, (text,) = fused(nn.Sequential(*(scope[f"Odd{i}"]() for i in range(9))))
    assert text.startswith("fuse: nothing to fuse in Sequential. What stays stock:\n  0 (Odd0): its forward uses yyy")
    assert len(text.splitlines()) == 6 and "and 6 more reasons" in text
    assert len(text) < 1000


@pytest.mark.parametrize("blocks", [1, 0])
def test_half_is_enough(blocks):
    _, texts = fused(nn.Sequential(block(32, 8), *(Unreadable(32) for _ in range(3 + (not blocks)))))
    assert len(texts) == (not blocks)


def test_what_a_filter_leaves_out_is_not_complained_of():
    _, texts = fused(small_resnet(), filter_fn=lambda name, module: name in ("", "layer1.0"))
    assert texts == []


def no_state(model):
    del model.layer1[0].__dict__[STATE]


def no_stem_state(model):
    del model.__dict__[STATE]


CHANGES = {
    "removed convolution": (lambda m: delattr(m.layer2[1], "conv2"), "layer2.1"),
    "no convolution": (lambda m: setattr(m.layer2[1], "conv2", None), "layer2.1"),
    "another module": (lambda m: setattr(m.layer2[1], "conv2", nn.Linear(2, 2)), "layer2.1"),
    "another norm": (lambda m: setattr(m.layer2[1], "bn2", nn.Softmax(1)), "layer2.1"),
    "removed norm": (lambda m: delattr(m.layer2[1], "bn2"), "layer2.1"),
    "removed activation": (lambda m: delattr(m.layer2[1], "relu"), "layer2.1"),
    "removed projection": (lambda m: delattr(m.layer2[0], "downsample"), "layer2.0"),
    "identity for projection": (lambda m: setattr(m.layer2[0], "downsample", nn.Identity()), "layer2.0"),
    "shorter projection": (lambda m: m.layer2[0].downsample.pop(1), "layer2.0"),
    "no state": (no_state, "layer1.0"),
    "removed stem convolution": (lambda m: delattr(m, "conv1"), ""),
    "no stem norm": (lambda m: setattr(m, "bn1", None), ""),
    "another stem activation": (lambda m: setattr(m, "relu", nn.SiLU()), ""),
    "hook in the stem": (lambda m: m.bn1.register_forward_hook(lambda *_: None), ""),
    "no stem state": (no_stem_state, ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_report_never_raises_and_says_what_was_changed(change):
    model = resnet_fused.fuse(small_resnet())
    before = resnet_fused.report(model)
    edit, name = CHANGES[change]
    edit(model)
    report = resnet_fused.report(model)
    (row,) = (row for row in report.left if row.name == name)
    assert row.reason and not row.convolutions.fused and not row.passes.fused
    assert {row.name for row in report.fused} == {row.name for row in before.fused} - {name}
    assert str(report)


@pytest.mark.filterwarnings("ignore:fuse. only")
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_can_be_fused_and_unfused(change):
    model = resnet_fused.fuse(small_resnet())
    edit, name = CHANGES[change]
    edit(model)
    resnet_fused.fuse(model)
    assert not {"layer1.0", "layer2.0", "layer2.1"} - {name} - {row.name for row in resnet_fused.report(model).fused}
    resnet_fused.unfuse(model)
    assert not resnet_fused.report(model).fused


def test_a_subclass_made_after_fuse_keeps_the_name_of_the_stock_class():
    model = resnet_fused.fuse(block())
    model.__class__ = type("Wrapped", (type(model),), {})
    assert isinstance(model, FusedModule)
    assert resnet_fused.report(model).rows[0].kind == "Bottleneck"


def test_what_has_no_partner_is_named_and_not_called_by_another_name():
    """A pre-activation network: a pool stands behind the stem's convolution, and the last norm reads a stage."""
    model = resnet_fused.fuse(PreActResNetCifar(PreActBottleneck, (1, 1, 1)).eval())
    report = resnet_fused.report(model)
    (row,) = (row for row in report.left if not row.name)
    assert row.reason == "no batch norm right behind conv1, no convolution right before bn"
    blocks = [str(row) for row in report.fused]
    assert len(blocks) == 3 and all("): fused: " in text for text in blocks)
    model.train()
    assert all("): fused: " in str(row) for row in resnet_fused.report(model).fused)


def test_a_norm_of_another_kind_is_a_reason():
    model = nn.Sequential(block(kind=Bottleneck))
    model[0].bn1, model[0].bn2, model[0].bn3, model[0].downsample = (*map(nn.GroupNorm, (2, 2, 2), (8, 8, 32)), None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resnet_fused.fuse(model)
    assert resnet_fused.report(model).left[0].reason == "GroupNorm is not batch norm"
