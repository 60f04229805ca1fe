"""Everything around a model that must keep working once it is fused."""

import copy

import pytest
import torch
from nets import assert_same, block, images, observe, pair, small_resnet
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import resnet_fused
from resnet_fused.convert import stock_forward


def bf16_error(got, exact):
    return (got.float() - exact).norm() / exact.norm()


def test_autocast_matches_stock_autocast():
    stock, fused = pair(block(32, 8))
    x = images(channels=32)
    exact = observe(copy.deepcopy(stock), x)

    def under(model):
        def run(h):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return model(h.bfloat16()).float()

        return observe(model, x, run)

    theirs, ours = under(stock), under(fused)
    for name in exact:
        if exact[name].is_floating_point():
            assert bf16_error(ours[name], exact[name]) <= 2 * bf16_error(theirs[name], exact[name]) + 1e-3, name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for training in (True, False):
            assert fused.train(training)(x).dtype == stock.train(training)(x).dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    stock, fused = (m.to(dtype) for m in pair(block()))
    x = images().to(dtype)
    for training in (True, False):
        want, got = stock.train(training)(x), fused.train(training)(x)
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("target", ["conv1", "bn2", "relu", "downsample"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_on_bypassed_modules_fire(target, kind):
    stock, fused = pair(block())
    calls = {id(stock): 0, id(fused): 0}
    for model in (stock, fused):

        def hook(*args, model=model):
            calls[id(model)] += 1

        module = model.get_submodule(target)
        register = {
            "forward": module.register_forward_hook,
            "pre": module.register_forward_pre_hook,
            "backward": module.register_full_backward_hook,
        }[kind]
        register(hook)
    if kind == "backward":  # stock refuses such hooks beside in-place modules
        for model in (stock, fused):
            model.relu.inplace = False
    assert_same(observe(fused, images()), observe(stock, images()), 1e-6, 1e-6)
    assert calls[id(fused)] == calls[id(stock)] > 0


def test_hooks_on_the_block_itself_leave_it_fused():
    _, fused = pair(block())
    seen = []
    fused.register_forward_hook(lambda *args: seen.append(1))
    fused(images())
    assert seen == [1]
    assert resnet_fused.report(fused).fused


def test_pruning_and_parametrisation():
    stock, fused = pair(block())
    for model in (stock, fused):
        torch.manual_seed(0)
        prune.l1_unstructured(model.conv2, "weight", amount=0.5)
        parametrizations.weight_norm(model.conv3)
    assert_same(observe(fused, images()), observe(stock, images()))


def test_sync_batch_norm_conversion_afterwards():
    stock, fused = pair(block())
    stock, fused = (nn.SyncBatchNorm.convert_sync_batchnorm(m) for m in (stock, fused))
    assert "SyncBatchNorm" in resnet_fused.report(fused).left[0].reason
    x = images()
    assert_same(  # one process: evaluation runs on the CPU, training needs an accelerator, in stock as well
        {"out": fused.eval()(x)}, {"out": stock.eval()(x)}, 1e-5, 1e-5
    )


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    stock, fused = pair(block())

    def through(model):
        return observe(model, images(), lambda x: checkpoint(model, x, use_reentrant=use_reentrant))

    assert_same(through(fused), through(stock))


def test_frozen_norms_one_by_one():
    stock, fused = pair(block())
    for model in (stock, fused):
        model.bn2.eval()
        model.bn3.requires_grad_(False)
        model.downsample[1].eval().requires_grad_(False)
    assert_same(observe(fused, images()), observe(stock, images()))


@pytest.mark.parametrize(
    "change",
    [
        lambda bn: setattr(bn, "momentum", None),
        lambda bn: setattr(bn, "track_running_stats", False),
        lambda bn: bn.__init__(bn.num_features, affine=False),
        lambda bn: bn.__init__(bn.num_features, track_running_stats=False),
        lambda bn: nn.init.constant_(bn.weight, -1.0),
        lambda bn: nn.init.zeros_(bn.weight[:3].detach()),
    ],
)
def test_settings_of_batch_norm(change):
    stock = block()
    for name in ("bn1", "bn3"):
        change(stock.get_submodule(name))
    stock, fused = pair(stock)
    for training in (True, True, False):
        assert_same(observe(fused.train(training), images()), observe(stock.train(training), images()))


def test_layouts_and_views():
    stock, fused = pair(block())
    x = images(n=8)
    for view in (x, x.contiguous(memory_format=torch.channels_last), x[::2], x.transpose(2, 3), x[:, :, 1:-1, ::2]):
        assert_same(observe(fused, view), observe(stock, view), 1e-3, 1e-3)


@pytest.mark.parametrize("size", [(1, 8, 1, 1), (2, 8, 1, 1), (1, 8, 3, 1), (2, 8, 8, 1)])
def test_small_inputs(size):
    stock, fused = pair(block(8, 8))
    x = torch.randn(size)
    if size[0] * size[2] * size[3] == 1:
        for model in (stock, fused):
            with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
                model(x)
        assert fused.bn1.num_batches_tracked == 0
    else:
        assert_same(observe(fused, x), observe(stock, x), 2e-3, 2e-3)
    assert_same({"out": fused.eval()(x)}, {"out": stock.eval()(x)}, 1e-4, 1e-4)


def test_empty_batch():
    stock, fused = pair(block())
    x = torch.randn(0, 8, 6, 6)
    assert fused(x).shape == stock(x).shape
    assert fused.bn1.num_batches_tracked == stock.bn1.num_batches_tracked == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "bad",
    [
        torch.randn(2, 5, 6, 6),
        torch.randn(8, 6, 6),
        torch.randn(2, 8, 6),
        torch.randn(2, 8, 6, 6, dtype=torch.float64),
        torch.ones(2, 8, 6, 6, dtype=torch.int64),
        torch.randn(2, 8, 6, 6, device="meta"),
        "an image",
    ],
    ids=["channels", "3d", "3d batch", "dtype", "integers", "device", "text"],
)
def test_bad_input_gets_stocks_error(bad, training):
    stock, fused = pair(block().train(training))
    errors = []
    for model in (stock, fused):
        with pytest.raises(Exception) as info:
            model(bad)
        errors.append((type(info.value), str(info.value)))
    assert errors[0] == errors[1]


def test_norm_of_another_width_gets_stocks_error():
    stock, fused = pair(block())
    for model in (stock, fused):
        model.bn2 = nn.BatchNorm2d(7)
        with pytest.raises(RuntimeError, match="running_mean should contain 8 elements not 7"):
            model(images())


@pytest.mark.parametrize("training", [True, False])
def test_inference_mode(training):
    stock, fused = (m.train(training) for m in pair(small_resnet()))
    x = images(channels=3, size=32)
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(fused(x), stock(x), rtol=1e-3, atol=1e-3)
    _, block_of_two = pair(block().eval())
    with torch.inference_mode():
        h = block_of_two(images())
        h[0, 0, 0, 0] = float("nan")  # no version counter tells of this write
        assert pair(block(32, 8).eval())[1](h).isnan().any()
    torch.testing.assert_close(fused.eval()(x), stock.eval()(x), rtol=1e-3, atol=1e-3)


def test_nan_and_infinity_pass_as_in_stock():
    stock, fused = pair(block())
    for value in (float("nan"), float("inf")):
        x = images()
        x[0, 0, 0, 0] = value
        assert torch.equal(fused(x).isnan(), stock(x).isnan())
        with torch.no_grad():
            assert torch.equal(fused.eval()(x).isfinite(), stock.eval()(x).isfinite())
        for model in (stock.train(), fused.train()):
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.reset_running_stats()


def test_function_transforms_and_forward_mode_run_stock():
    _, fused = pair(block().eval())
    x = images()
    batched = torch.func.vmap(fused)(torch.stack([x, x]))
    torch.testing.assert_close(batched[0], fused(x), rtol=1e-4, atol=1e-4)
    _, tangent = torch.func.jvp(fused, (x,), (torch.ones_like(x),))
    assert tangent.shape == fused(x).shape


def test_second_derivatives_of_a_model():
    stock, fused = pair(block())
    results = []
    for model in (stock, fused):
        x = images().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        results.append({"x": x.grad, "weight": model.conv2.weight.grad})
    assert_same(results[1], results[0], 1e-3, 1e-3)


def test_weights_can_be_shared_and_retained_graphs_repeat():
    _, fused = pair(block(32, 8))
    x = images(channels=32).requires_grad_()
    out = fused(fused(x)).sum()
    first = torch.autograd.grad(out, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, x)[0])


def test_fx_tracing_sees_stock_modules():
    _, fused = pair(block())
    graph = torch.fx.symbolic_trace(fused.eval())
    assert "conv2" in {node.target for node in graph.graph.nodes}
    torch.testing.assert_close(graph(images()), fused(images()), rtol=1e-4, atol=1e-4)


def test_export_is_portable():
    _, fused = pair(small_resnet().eval())
    x = images(channels=3, size=32)
    program = torch.export.export(fused, (x,))
    assert not [n for n in program.graph.nodes if "resnet_fused" in str(n.target)]
    torch.testing.assert_close(program.module()(x), fused(x), rtol=1e-4, atol=1e-4)


def test_stock_forward_is_stock():
    stock, fused = pair(small_resnet())
    with stock_forward():
        assert_same(
            observe(fused, images(channels=3, size=32)), observe(stock, images(channels=3, size=32)), 1e-6, 1e-6
        )
