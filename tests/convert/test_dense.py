"""Dense blocks of torchvision, timm and ours under fuse(): the same in every state, or stock with a reason."""

import copy
import io
import pickle

import pytest
import torch
from dense_blocks import assert_equal, dense_block, fused, images, ran_fused, step

import resnet_fused
from resnet_fused import library
from resnet_fused.backends import use
from resnet_fused.blocks import dense as known
from resnet_fused.blocks import runtime
from resnet_fused.convert import stock_forward
from resnet_fused.models import densenet
from resnet_fused.testing.vision import import_torchvision


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


def test_explain_counts_a_block_on_a_gpu():
    """Of which Triton's kernels are taken to be sound; widths that they do not take stay stock."""
    block = densenet.DenseBlock(6, 64, 4, 32, 0.0)
    gpu = resnet_fused.explain(block, (256, 64, 56, 56), dtype=torch.bfloat16, device="h100")
    assert gpu.model.plan == "dense layers on one buffer"
    assert gpu.model.fused.bytes < 0.31 * gpu.model.stock.bytes
    assert gpu.model.fused_saved < 0.32 * gpu.model.stock_saved
    assert gpu.model.fused.launches < gpu.model.stock.launches
    wide = resnet_fused.explain(densenet.DenseBlock(2, 8, 10, 32, 0.0), (4, 8, 6, 6), device="h100")
    assert "stock (dense_conv1x1_backward takes up to 256 output channels, not 320)" in str(wide)
    with use("cpu"):
        named = resnet_fused.explain(block, (4, 64, 8, 8), device="h100")
    assert "stock (no sound kernel of dense_enter)" in str(named)


def test_preferences():
    block = dense_block()
    with pytest.raises(ValueError, match="'speed', 'memory'"):
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
