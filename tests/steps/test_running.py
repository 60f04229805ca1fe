"""Running statistics of several batch norms at once: to the bit what one after the other gives."""

import copy

import pytest
import torch

from resnet_fused.steps import Norm, StepTensors
from resnet_fused.steps import running as module
from resnet_fused.steps.batch_norm import update_running
from resnet_fused.steps.running import update_running_all

DTYPES = (torch.float32, torch.float64)


def item(channels, count, momentum=0.1, dtype=torch.float32, buffers=None, tracked=True):
    """One batch norm; `buffers`: dtype of its running statistics, if another."""
    tensors = StepTensors(torch.empty(0))
    if tracked:
        tensors = tensors._replace(
            running_mean=torch.randn(channels, dtype=buffers or dtype),
            running_var=torch.rand(channels, dtype=buffers or dtype),
            num_batches_tracked=torch.tensor(3),
        )
    return (
        tensors,
        Norm(momentum=momentum),
        torch.randn(channels, dtype=dtype),
        torch.rand(channels, dtype=dtype),
        count,
    )


def check(items):
    """Two updates in a row, against a loop over copies; copying keeps which buffers are shared."""
    expected = copy.deepcopy(items)
    for _ in range(2):
        update_running_all(items)
        for one in expected:
            update_running(*one)
    for got, wanted in zip(items, expected, strict=True):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            a, b = getattr(got[0], name), getattr(wanted[0], name)
            assert (a is None and b is None) or torch.equal(a, b), name
        assert all(torch.equal(a, b) for a, b in zip(got[2:4], wanted[2:4], strict=True)), "statistics were changed"


@pytest.fixture
def one_by_one(monkeypatch):
    """The norms that were handed to `update_running`."""
    seen = []

    def noted(*one):
        seen.append(one)
        update_running(*one)

    monkeypatch.setattr(module, "update_running", noted)
    return seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_one_after_the_other(dtype, one_by_one):
    sizes = ((64, 784), (64, 784), (256, 196), (3, 2), (1, 1))
    check([item(channels, count, dtype=dtype) for channels, count in sizes])
    assert not one_by_one


def test_groups_by_momentum_and_dtype(one_by_one):
    wide = {"buffers": torch.float64}
    check([item(8, 9), item(8, 9, 0.25), item(5, 7, **wide), item(5, 7, 0.25, **wide), item(5, 7), item(3, 4, **wide)])
    check([item(8, 9, 0.0), item(8, 9, 1.0)])
    assert not one_by_one


def test_cumulative_average_goes_one_by_one(one_by_one):
    check([item(8, 9), item(8, 9, None), item(8, 9, 1), item(8, 9)])
    assert [one[1].momentum for one in one_by_one] == [None, 1, None, 1]


def test_16_bit_buffers_on_the_cpu_go_one_by_one(one_by_one):
    check([item(8, 9), item(8, 9, buffers=torch.bfloat16), item(5, 7), item(5, 7, buffers=torch.float16)])
    assert {one[0].running_mean.dtype for one in one_by_one} == {torch.bfloat16, torch.float16}


def test_empty_batches_are_counted_only():
    items = [item(8, 0), item(8, 9), item(4, 0, None), item(4, 0)]
    before = copy.deepcopy(items)
    check(items)
    for index in (0, 2, 3):
        assert torch.equal(items[index][0].running_mean, before[index][0].running_mean)
        assert items[index][0].num_batches_tracked == 5


def test_absent_buffers():
    check([])
    check([item(8, 9, tracked=False), item(8, 9), item(8, 9, None, tracked=False)])
    tensors, *rest = item(8, 9)
    check([(tensors._replace(num_batches_tracked=None), *rest), item(8, 9)])
    check([(tensors._replace(running_mean=None, running_var=None), *rest)])


def test_nan_passes():
    first, second = item(8, 9), item(8, 9)
    first[2][3] = first[3][4] = torch.nan
    update_running_all([first, second])
    assert first[0].running_mean.isnan().nonzero().tolist() == [[3]]
    assert first[0].running_var.isnan().nonzero().tolist() == [[4]]
    assert second[0].running_mean.isfinite().all()


def test_shared_buffers_move_in_order():
    first, other, second = item(8, 9, 0.5), item(4, 9), item(8, 5, 0.25)
    shared = (first[0], *second[1:])
    check([first, other, shared])
    assert first[0].num_batches_tracked == 7
    counter = second[0]._replace(num_batches_tracked=other[0].num_batches_tracked), *second[1:]
    check([other, counter])


def test_shared_buffers_are_seen_through_autograd():
    """Arguments of an autograd function are the caller's tensors, not copies of them."""
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, *buffers):
            seen.append(buffers[0] is buffers[1])
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2, None, None

    buffer = torch.zeros(3)
    Probe.apply(torch.ones(2, requires_grad=True), buffer, buffer)
    assert seen == [True]


class Norms(torch.nn.Module):
    """Statistics of x by way of an autograd function, as in a chain."""

    def __init__(self):
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(channels) for channels in (4, 4, 6))

    class Update(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, *flat):
            items = []
            for at in range(0, len(flat), 3):
                tensors = StepTensors(x, None, None, None, *flat[at : at + 3])
                mean = x.mean() + torch.arange(float(len(flat[at])))
                items.append((tensors, Norm(), mean, mean.square(), x.shape[0] * x.shape[2]))
            update_running_all(items)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2, *[None] * 9

    def forward(self, x):
        flat = [b for norm in self.norms for b in (norm.running_mean, norm.running_var, norm.num_batches_tracked)]
        return self.Update.apply(x, *flat)


def agree(model, ran, expected):
    """Run both, one on batches of several sizes, and compare buffers."""
    for samples in (4, 6, 6):
        x = torch.randn(samples, 3, 5, requires_grad=True)
        ran(x).sum().backward()
        expected(x)
    wanted = dict(expected.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, wanted[name], msg=name)
    assert wanted["norms.0.num_batches_tracked"] == 3


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic):
    torch.compiler.reset()
    model = Norms()
    expected = copy.deepcopy(model)
    agree(model, torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager"), expected)


def test_export():
    model = Norms()
    dynamic = {"x": {0: torch.export.Dim("samples")}}
    exported = torch.export.export(copy.deepcopy(model), (torch.randn(4, 3, 5),), dynamic_shapes=dynamic).module()
    agree(exported, exported, model)


@pytest.mark.parametrize("momentum", [0.1, None, 0, 1, 0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("counted", [True, False])
def test_moves_like_stock_without_a_new_version(momentum, dtype, counted):
    """A graph that has saved the statistics can still go back: stock's batch norm does not mark its writes either."""
    torch.manual_seed(0)
    norms = [torch.nn.BatchNorm2d(5, momentum=momentum) for _ in range(2)]
    for norm in norms:
        norm.running_mean = torch.randn(5, dtype=torch.float32).to(dtype)
        norm.running_var = torch.rand(5, dtype=torch.float32).to(dtype)
        norm.num_batches_tracked = torch.tensor(0) if counted else None
    stock = copy.deepcopy(norms)
    for _ in range(3):
        items = []
        for norm, other in zip(norms, stock, strict=True):
            x = 1e3 + torch.randn(4, 5, 3, 3, dtype=torch.float64)
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            own = StepTensors(x, None, None, None, norm.running_mean, norm.running_var, norm.num_batches_tracked)
            items.append((own, Norm(momentum=momentum), mean.float(), var.float(), 36))
            weight, momentum_now = 0.0, other.momentum
            if counted:
                other.num_batches_tracked.add_(1)
                weight = 1 / float(other.num_batches_tracked)
            weight = weight if momentum_now is None else momentum_now
            for name, batch in (("running_mean", mean), ("running_var", var * 36 / 35)):
                running = getattr(other, name)
                setattr(other, name, ((1 - weight) * running.double() + weight * batch).to(dtype))
        update_running_all(items)
    for norm, other in zip(norms, stock, strict=True):
        assert norm.running_mean._version == norm.running_var._version == 0
        for name, buffer in other.named_buffers():
            rounding = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-5}[dtype]
            torch.testing.assert_close(norm.get_buffer(name), buffer, rtol=rounding, atol=rounding)
            assert norm.get_buffer(name).dtype == buffer.dtype
        assert not counted or norm.num_batches_tracked == 3


def test_the_first_cumulative_average_is_the_batch():
    first = item(8, 9, None)
    first[0].num_batches_tracked.zero_()
    first[0].running_mean.fill_(1e8)
    update_running_all([first])
    assert torch.equal(first[0].running_mean, first[2])


def test_views_of_one_storage_move_in_order():
    """As norms do whose buffers were flattened into one; where they overlap, each moves on what the one before left."""
    shared = torch.rand(12)

    def items(memory):
        torch.manual_seed(0)
        made = [item(8, 9, 0.5), item(8, 9, 0.25)]
        views = [memory[:8], memory[4:]]
        return [(own._replace(running_mean=v), *rest) for (own, *rest), v in zip(made, views, strict=True)]

    got, want = shared.clone(), shared.clone()
    update_running_all(items(got))
    for one in items(want):
        update_running(*one)
    assert torch.equal(got, want)


def test_inference_tensors_move_where_stock_moves_them():
    with torch.inference_mode():
        created = item(8, 9)
        update_running_all([created])
    made = [copy.deepcopy(one) for one in created[2:4]]
    own = created[0]._replace(num_batches_tracked=None)
    before = own.running_mean.clone()
    update_running_all([(own, created[1], *made, 9)])  # outside of inference mode, as by native batch norm
    assert not torch.equal(own.running_mean, before)
    with pytest.raises(RuntimeError, match="inference"):  # stock's module counts first, and fails there
        update_running_all([created])
