"""Dense blocks of torchvision, timm and ours under fuse(): the same in every state, or stock with a reason."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from dense_blocks import MAKERS, assert_equal, dense_block, fused, images, step
from torch import nn
from torch.nn.utils import parametrize, prune

import resnet_fused
from resnet_fused import library
from resnet_fused.backends import use
from resnet_fused.blocks import dense as known
from resnet_fused.blocks import runtime
from resnet_fused.convert import stock_forward
from resnet_fused.models import densenet
from resnet_fused.models.preact import PreActBasicBlock
from resnet_fused.steps import batch_norm
from resnet_fused.testing.vision import import_torchvision


@pytest.fixture(params=MAKERS)
def maker(request):
    if request.param != "ours":
        pytest.importorskip("timm") if request.param == "timm" else import_torchvision()
    return request.param


def ran_fused(run):
    before = runtime.fused_programs()
    result = run()
    return result, runtime.fused_programs() > before


@pytest.mark.parametrize("training", [True, False])
def test_each_class(maker, training):
    stock = dense_block(maker).train(training)
    block = fused(stock)
    for _ in range(6):
        got, was_fused = ran_fused(lambda: step(block, images()))
        assert was_fused
        assert_equal(got, step(stock, images()))
    assert "3 layers norm1-relu-conv1-norm2-relu-conv2 on one buffer; 6 of 6" in str(resnet_fused.report(block))


def test_nothing_is_touched_and_all_is_undone(maker):
    stock = dense_block(maker)
    block, state = copy.deepcopy(stock), torch.get_rng_state()
    names = [name for name, _ in block.named_modules()]
    known._tested.clear()
    resnet_fused.fuse(block, backend="reference")
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(block, type(stock)) and [name for name, _ in block.named_modules()] == names
    for name, value in stock.state_dict().items():
        assert torch.equal(block.state_dict()[name], value)
    assert type(resnet_fused.unfuse(block)) is type(stock)


def test_copies_and_pickles(maker):
    stock = dense_block(maker)
    block = fused(stock, prefer="memory")
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), torch.load(file, weights_only=False)):
        got, was_fused = ran_fused(lambda other=other: step(other, images()))
        assert was_fused and "again" in str(resnet_fused.report(other))
        assert_equal(got, step(copy.deepcopy(stock), images()))


def layer(block):
    return block.denselayer2


def replace_relu(block):
    name, holder = ("act", layer(block).norm1) if hasattr(layer(block).norm1, "act") else ("relu1", layer(block))
    setattr(holder, name, nn.LeakyReLU(0.5))


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class OtherConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def other_conv(block):
    conv = OtherConv(8, 4, 3, padding=1, bias=False).double()
    conv.load_state_dict(layer(block).conv2.state_dict())
    layer(block).conv2 = conv


def set_forward(block):
    own = layer(block).forward
    layer(block).forward = lambda features: 2 * own(features)


def with_bias(block):
    layer(block).conv1 = nn.Conv2d(9, 8, 1).double()


def strided(block):
    for one in block.values():
        one.conv2.padding = (2, 2)
        one.conv2.dilation = (2, 2)


CHANGES = {  # what is done to a block, and what the report says of it
    "hook on a layer": (lambda b: layer(b).register_forward_hook(lambda m, i, o: 2 * o), "hooks"),
    "hook on a norm": (lambda b: layer(b).norm2.register_forward_hook(lambda m, i, o: 2 * o), "hooks"),
    "pre-hook on a convolution": (
        lambda b: layer(b).conv2.register_forward_pre_hook(lambda m, i: (2 * i[0],)),
        "hooks",
    ),
    "activation": (replace_relu, ""),
    "forward of a layer": (set_forward, "replaced"),
    "pruned": (lambda b: prune.l1_unstructured(layer(b).conv1, "weight", 0.5), ""),
    "parametrised": (lambda b: parametrize.register_parametrization(layer(b).conv2, "weight", Doubled()), ""),
    "another convolution": (other_conv, "OtherConv"),
    "one layer more": (lambda b: b.add_module("more", copy.deepcopy(b.denselayer3)), "changed after fuse"),
    "one layer fewer": (lambda b: b._modules.pop("denselayer3"), "changed after fuse"),
    "layer replaced": (lambda b: b.add_module("denselayer3", Appended()), "changed after fuse"),
    "group norm": (lambda b: setattr(layer(b), "norm2", nn.GroupNorm(2, 8).double()), ""),
    "odd momentum": (lambda b: setattr(layer(b).norm1, "momentum", torch.tensor(0.2)), "momentum of class Tensor"),
}


class Appended(nn.Module):
    def forward(self, features):
        return features[0][:, :4] * 3


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_fuse_run_as_stock(maker, change):
    stock = dense_block(maker)
    block = fused(stock)
    step(block, images()), step(stock, images())
    for one in (stock, block):
        torch.manual_seed(5)
        CHANGES[change][0](one)
    if change == "one layer more":
        x = images()
        for one in (stock, block):
            with pytest.raises(RuntimeError, match=r"running_mean|channels"):
                one(x)
    else:
        got, was_fused = ran_fused(lambda: step(block, images()))
        assert not was_fused
        assert_equal(got, step(stock, images()))
    assert "; 0 of" in str(resnet_fused.report(block)) and CHANGES[change][1] in str(resnet_fused.report(block))


RUN_BY_STOCK = {
    "bias": with_bias,
    "geometry": strided,
}


@pytest.mark.parametrize("change", RUN_BY_STOCK)
def test_what_no_step_takes_is_stock(change):
    stock = dense_block()
    torch.manual_seed(5)
    RUN_BY_STOCK[change](stock)
    block = fused(stock)
    for _ in range(3):
        got, was_fused = ran_fused(lambda: step(block, images()))
        assert not was_fused
        assert_equal(got, step(stock, images()))


def test_dropout_draws_as_stock(maker):
    stock = dense_block(maker, drop_rate=0.3)
    block = fused(stock)
    for one in (stock, block):
        torch.manual_seed(3)
        one.seen = step(one, images())
    assert_equal(block.seen, stock.seen)
    assert "dropout behind its layers, in training" in str(resnet_fused.report(block))
    for one in (stock, block):
        one.eval()
    got, was_fused = ran_fused(lambda: step(block, images()))
    assert was_fused
    assert_equal(got, step(stock, images()))


@pytest.mark.parametrize("name", ["memory_efficient", "grad_checkpointing"])
def test_memory_efficient_set_later(maker, name):
    stock = dense_block(maker)
    if not hasattr(stock.denselayer1, name):
        pytest.skip("an attribute of other classes")
    block = fused(stock)
    for one in (stock, block):
        for inner in one.values():
            setattr(inner, name, True)
    got, was_fused = ran_fused(lambda: step(block, images()))
    assert not was_fused and f"{name} was changed after fuse" in str(resnet_fused.report(block))
    assert_equal(got, step(stock, images()))
    resnet_fused.fuse(block, backend="reference")
    got, was_fused = ran_fused(lambda: step(block, images()))
    assert was_fused
    assert_equal(got, step(stock, images()))


@pytest.mark.parametrize("where", ["forward", "layer", "code", "cat", "global"])
def test_replaced_code_is_noticed(monkeypatch, where):
    stock = dense_block()
    block = fused(stock)
    kind, inner = densenet.DenseBlock, densenet.DenseLayer

    def halved(self, features):
        return torch.cat([features, self.denselayer1([features])], 1) / 2

    if where == "forward":
        monkeypatch.setattr(kind, "forward", halved)
    elif where == "layer":
        monkeypatch.setattr(inner, "bottleneck", lambda self, *features: self.conv1(torch.cat(features, 1)))
    elif where == "code":
        before = inner.bottleneck.__code__
        inner.bottleneck.__code__ = (lambda self, *features: self.conv1(torch.cat(features, 1))).__code__
    elif where == "cat":
        own = torch.cat
        monkeypatch.setattr(torch, "cat", lambda tensors, dim=0: own(tensors, dim) * 2)
    else:
        monkeypatch.setattr(
            densenet, "torch", type("T", (), {"cat": staticmethod(lambda ts, dim: torch.cat(ts, dim) * 2)})
        )
    try:
        got, was_fused = ran_fused(lambda: step(block, images()))
        assert not was_fused
        assert_equal(got, step(stock, images()))
    finally:
        if where == "code":
            inner.bottleneck.__code__ = before
    assert ran_fused(lambda: monkeypatch.undo() or step(block, images()))[1]


def test_a_class_of_the_name_that_does_something_else(monkeypatch):
    class Impostor(densenet.DenseBlock):
        def forward(self, x):
            return super().forward(x) * 1.5

    Impostor.__module__, Impostor.__qualname__ = densenet.DenseBlock.__module__, densenet.DenseBlock.__qualname__
    stock = Impostor(2, 5, 2, 4, 0.0).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block = fused(stock)
    assert "does not compute what a dense block" in str(resnet_fused.report(block))
    assert_equal(step(block, images()), step(stock, images()))


def test_subclasses_are_not_known():
    class Mine(densenet.DenseBlock):
        pass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block = fused(Mine(2, 5, 2, 4, 0.0))
    assert type(block) is Mine


def test_other_activations_and_norms_stay_stock():
    timm = pytest.importorskip("timm.models.densenet")
    for options in ({"act_layer": nn.SiLU}, {}):
        norm = type("Norm", (timm.BatchNormAct2d,), {}) if not options else None
        make = norm or (lambda n, **more: timm.BatchNormAct2d(n, act_layer=nn.SiLU, **more))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            block = fused(timm.DenseBlock(2, 5, 2, 4, norm_layer=make).double())
        assert type(block) is timm.DenseBlock


def test_sync_batch_norm_stays_stock():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block = fused(nn.SyncBatchNorm.convert_sync_batchnorm(dense_block()))
    assert type(block) is densenet.DenseBlock
    assert "SyncBatchNorm" in str(resnet_fused.report(block))


def test_errors_are_stocks_and_move_nothing():
    stock = dense_block()
    block = fused(stock)
    before = copy.deepcopy(block.state_dict())
    calls = {
        "one pixel": torch.randn(1, 5, 1, 1, dtype=torch.float64),
        "channels": images(channels=6),
        "dtype": images(dtype=torch.float32),
        "dimensions": images()[0],
    }
    for name, x in calls.items():
        messages = []
        for one in (stock, block):
            with pytest.raises((RuntimeError, ValueError)) as caught:
                one(x)
            messages.append((caught.type, str(caught.value)))
        assert messages[0] == messages[1], name
    x = images()[:0]
    assert torch.equal(block(x), stock(x))
    after = block.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if "num_batches" not in key)


def test_stock_forward_and_autocast():
    stock = dense_block().float()
    block = fused(stock)
    x = images(dtype=torch.float32)
    with stock_forward():
        assert not ran_fused(lambda: block(x))[1]
    stock(x)
    with torch.autocast("cpu", torch.bfloat16):
        got, was_fused = ran_fused(lambda: block(x))
        assert not was_fused and torch.equal(got, stock(x))
    for (name, a), b in zip(block.named_buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_transforms_and_subclasses_see_stock():
    stock = dense_block().eval()
    block = fused(stock)
    x = images()
    expected = torch.func.jvp(stock, (x,), (x,))
    for got, want in zip(torch.func.jvp(block, (x,), (x,)), expected, strict=True):
        torch.testing.assert_close(got, want)
    mapped = torch.func.vmap(block, randomness="error")(torch.stack([x, 2 * x]))
    torch.testing.assert_close(mapped, torch.stack([stock(x), stock(2 * x)]))


def test_graphs_see_stock(maker):
    stock = dense_block(maker).eval()
    block, x = fused(stock), images()
    torch.testing.assert_close(torch.jit.trace(block, x)(2 * x), stock(2 * x))
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), stock(x))
    exported = torch.export.export(block, (x,)).module()
    torch.testing.assert_close(exported(x), stock(x))


def whole(maker):
    torch.manual_seed(0)
    if maker == "timm":
        import timm

        return timm.create_model("densenet121", num_classes=5)
    if maker == "torchvision":
        return import_torchvision().models.densenet121(num_classes=5)
    return densenet.densenet121(num_classes=5)


def test_whole_densenets(maker):
    stock = whole(maker).double()
    model = fused(stock)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = runtime.fused_programs()
    got = step(model, x)
    assert runtime.fused_programs() - before >= 4
    assert_equal(got, step(stock, x), 1e-8)
    text = str(resnet_fused.report(model))
    assert all(f"features.denseblock{i} " in text for i in range(1, 5))


@pytest.mark.skipif(not library.status().cpu.loaded, reason="kernels of the compiled library")
def test_explain_counts_a_block():
    block = densenet.DenseBlock(6, 64, 4, 32, 0.0)
    rows = resnet_fused.explain(block, (4, 64, 28, 28))
    assert "dense layers on one buffer" in str(rows)
    assert rows.model.fused.bytes < 0.6 * rows.model.stock.bytes
    assert rows.model.fused_saved < 0.45 * rows.model.stock_saved
    saving = resnet_fused.explain(resnet_fused.fuse(block, prefer="memory"), (4, 64, 28, 28))
    assert saving.model.fused_saved < 0.6 * rows.model.fused_saved
    gpu = resnet_fused.explain(block, (4, 64, 28, 28), dtype=torch.bfloat16, device="h100")
    assert "stock (no kernels of dense blocks but the CPU's)" in str(gpu)


def test_preferences():
    block = dense_block()
    with pytest.raises(ValueError, match="'speed' or 'memory'"):
        resnet_fused.fuse(block, prefer="both")
    resnet_fused.fuse(block, prefer="memory")
    assert "again" in str(resnet_fused.report(resnet_fused.fuse(block)))
    assert "again" not in str(resnet_fused.report(resnet_fused.fuse(block, prefer="speed")))


def test_public_module():
    stock = dense_block()
    block = resnet_fused.FusedDenseBlock(3, 5, 2, 4, 0.0).double()
    block.load_state_dict(stock.state_dict())
    with use("reference"):
        for _ in range(6):
            got, was_fused = ran_fused(lambda: step(block, images()))
            assert was_fused
            assert_equal(got, step(stock, images()))
        for one in (stock, block):
            one.denselayer1.conv1.register_forward_hook(lambda m, i, o: 2 * o)
        got, was_fused = ran_fused(lambda: step(block, images()))
        assert not was_fused
        assert_equal(got, step(stock, images()))
    assert resnet_fused.FusedDenseBlock(0, 5, 2, 4, 0.0)(images()).shape == images().shape
    assert "built fused" in str(resnet_fused.report(block))


@pytest.fixture
def reads(monkeypatch):
    """Channels of every tensor that is read for its statistics alone."""
    found, original = [], batch_norm.normalise
    monkeypatch.setattr(batch_norm, "normalise", lambda z, *rest: found.append(z.shape[1]) or original(z, *rest))
    return found


def followed(*between):
    """A stem, a dense block of 17 channels, modules, and a pre-activation block that begins with a norm."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(inplace=True)
    return nn.Sequential(*stem, dense_block(), *between, PreActBasicBlock(17, 17)).double()


class WritesOver(nn.Module):
    def forward(self, x):
        return x.clone().mul_(2)


@pytest.mark.parametrize("between", [(), (WritesOver(),)], ids=["next", "apart"])
def test_statistics_reach_the_next_block_alone(reads, between):
    stock = followed(*between)
    model = fused(stock)
    assert_equal(step(model, images(channels=3)), step(stock, images(channels=3)))
    assert reads.count(17) == 1 + len(between)  # its second norm is of as many


def test_a_value_that_two_read_carries_no_statistics(reads):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.block, self.next = *list(followed())[:2], dense_block(), PreActBasicBlock(17, 17)

        def forward(self, x):
            h = self.block(self.bn(self.conv(x)))
            return self.next(h) + h

    torch.manual_seed(0)
    stock = Twice().double()
    model = fused(stock)
    assert_equal(step(model, images(channels=3)), step(stock, images(channels=3)))
    assert reads.count(17) == 2


needs_kernels = pytest.mark.skipif(not library.status().cpu.loaded, reason="kernels of the compiled library")


@needs_kernels
@pytest.mark.parametrize("prefer", ["speed", "memory"])
@pytest.mark.parametrize("training", [True, False])
def test_float32_by_kernels_is_as_exact_as_stock(maker, prefer, training):
    """At twice stock's own error, each by name."""
    exact = dense_block(maker).train(training)
    stock = copy.deepcopy(exact).float()
    block = fused(stock, backend="auto", prefer=prefer)
    wide = images(n=4, size=13)
    for _ in range(6):
        (got, was_fused), near, want = ran_fused(lambda: step(block, wide.float())), step(stock, wide.float()), None
        assert was_fused
    want = [step(exact, wide) for _ in range(6)][-1]
    for name, value in want.items():
        errors = [(found[name].double() - value).norm() for found in (got, near)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * value.double().norm(), name


@pytest.mark.plans_small
def test_few_values_per_channel_are_stock():
    stock = dense_block().float()
    block = fused(stock, backend="auto")
    assert not ran_fused(lambda: block(images(n=1, size=6, dtype=torch.float32)))[1]
    assert ran_fused(lambda: block(images(n=2, size=6, dtype=torch.float32)))[1] == library.status().cpu.loaded


def test_other_dtypes_are_stock():
    block = dense_block().bfloat16()
    x = images(dtype=torch.bfloat16)
    got, was_fused = ran_fused(lambda: fused(block, backend="auto")(x))
    assert not was_fused and torch.equal(got, block(x))


@needs_kernels
def test_no_activation_of_a_densenet_is_read_for_its_statistics_alone(reads):
    """Blocks write them with what they make, and transitions get them handed; a pool or a stem emits its own."""
    stock = import_torchvision().models.DenseNet(8, (2, 2, 2), 16, num_classes=5)
    model = fused(stock, backend="auto")
    model(torch.randn(4, 3, 64, 64))
    assert [channels for channels in reads if channels in (32, 40)] == []
    resnet_fused.unfuse(model.features.denseblock1)
    model(torch.randn(4, 3, 64, 64))
    assert reads.count(32) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dtype", "backend"), [(torch.float64, "reference"), (torch.float32, "cpu")])
def test_what_is_not_finite_reaches_the_gradients_that_it_reaches_in_stock(value, training, dtype, backend):
    """Frozen norms have no term in what they read, and nobody in the block reads the last layer's channels."""
    if backend == "cpu" and not library.status().cpu.loaded:
        pytest.skip("the compiled library is not there")
    stock = dense_block("ours").train(training).to(dtype)
    block, x = fused(stock, backend=backend), images(dtype=dtype)
    x[0, 3, 4, 5] = value
    want, got = (reached(module, x) for module in (stock, block))
    for name, pattern in want.items():
        assert torch.equal(got[name], pattern), name


def reached(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where gradients are NaN."""
    x = x.clone().requires_grad_()
    module(x).sum().backward()
    return {"x": x.grad.isnan()} | {name: p.grad.isnan() for name, p in module.named_parameters()}


def test_layers_of_which_nothing_wants_a_gradient_are_not_run_again():
    stock = densenet.DenseBlock(3, 16, 2, 8, 0.0, memory_efficient=True)
    stock.denselayer1.requires_grad_(False)
    block = fused(stock)
    for module in (stock, block):
        module(torch.randn(4, 16, 16, 16)).sum().backward()
    counted = [[layer.norm1.num_batches_tracked.item() for layer in module.children()] for module in (stock, block)]
    assert counted[0] == counted[1] == [1, 1, 2]
