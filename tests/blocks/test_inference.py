"""What folded inference keeps between calls: how much, for how long, and that every write is seen."""

import contextlib
import copy
import threading
import weakref

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused.backends import onednn
from resnet_fused.library import status
from resnet_fused.models import BasicBlock, Bottleneck
from resnet_fused.plan import choose
from resnet_fused.steps import folding, unfolded
from resnet_fused.steps.conv import HAS_AVX512

pytestmark = [
    pytest.mark.skipif(not status().cpu.loaded, reason=f"the compiled library is {status().cpu.reason}"),
    pytest.mark.skipif(torch.float32 not in onednn.SERVED, reason=onednn.missing(torch.float32)),
]
needs_bf16 = pytest.mark.skipif(torch.bfloat16 not in onednn.SERVED, reason=onednn.missing(torch.bfloat16))


@pytest.fixture(autouse=True)
def folded(monkeypatch):
    """1x1 convolutions are folded too, as where they have no kernel that reads the weight as it is."""
    monkeypatch.setattr(unfolded, "IS_FAST", False)


@pytest.fixture
def packs(monkeypatch):
    """The input shapes and dtypes that weights are packed for, in order; nothing is known of any shape."""
    seen, original = [], onednn.prepack

    def counted(weight, shape, *args):
        seen.append((tuple(shape), weight.dtype))
        return original(weight, shape, *args)

    monkeypatch.setattr(onednn, "prepack", counted)
    monkeypatch.setattr(folding, "_layouts", folding._Layouts())
    return seen


def block(kind=Bottleneck, width=4):
    torch.manual_seed(0)
    model = kind(16, width) if kind is Bottleneck else kind(16, 16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval().to(memory_format=torch.channels_last)


def images(size, n=1):
    return torch.randn(n, 16, size, size).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_many_image_sizes_pack_once_for_each_layout(packs):
    model, sizes = resnet_fused.fuse(block()), range(8, 28, 2)
    for _ in range(2):  # once as new shapes, once as known
        for size in sizes:
            model(images(size))
    packs.clear()
    for _ in range(3):
        for size in sizes:
            model(images(size))
    assert packs == []


@torch.no_grad()
def test_a_shape_seen_once_is_not_packed_for(packs):
    model = resnet_fused.fuse(block())
    for size in range(8, 28, 2):
        model(images(size))
    assert [shape[2] for shape, _ in packs] == [8, 8, 8]


@torch.no_grad()
def test_what_is_kept_is_bounded_and_the_same_layout_is_kept_once(monkeypatch):
    model, layouts = resnet_fused.fuse(block()), iter(range(1000))
    monkeypatch.setattr(folding, "_layouts", folding._Layouts())
    monkeypatch.setattr(onednn, "layout_of", lambda packed: str(next(layouts) // 3).encode())
    for size in range(8, 28, 2):
        for _ in range(2):
            model(images(size))
    kept = folding._kept[model.bn2].packed[torch.float32]
    assert len(kept) == folding.LAYOUTS
    assert len({one.layout for one in kept}) == len(kept)


def test_layouts_are_forgotten_in_the_order_of_use():
    layouts = folding._Layouts()
    layouts.LIMIT = 2
    layouts["a",] = b"x"
    assert layouts.look(("a",)) == (True, b"x")
    assert layouts.look(("b",)) == (False, None) and layouts.look(("b",)) == (True, None)
    assert layouts.look(("a",)) == (True, b"x")
    assert layouts.look(("c",)) == (False, None)
    assert layouts.look(("a",)) == (True, b"x") and layouts.look(("b",)) == (False, None)


def test_serialised_layouts_of_one_layout_are_equal():
    """What the compiler leaves uninitialised in them is left out."""
    weight = torch.randn(64, 64, 1, 1)
    sizes, seen = (16, 20, 24, 32, 40, 56), set()
    for size in sizes:
        again = {onednn.layout_of(onednn.prepack(weight, (1, 64, size, size))) for _ in range(3)}
        assert len(again) == 1
        seen |= again
    assert len(seen) == (1 if HAS_AVX512 else 2)  # without, oneDNN has another for one of these sizes
    assert onednn.layout_of(onednn.prepack(torch.randn(64, 32, 1, 1), (1, 32, 16, 16))) not in seen


def test_threads_that_meet_keep_no_more_than_one(monkeypatch):
    model = resnet_fused.fuse(block())
    expected = {size: model(images(size).fill_(1)).detach() for size in range(6, 30)}
    together, wrong = threading.Barrier(4), []

    def work():
        together.wait()
        for _ in range(3):
            for size, wanted in expected.items():
                with torch.no_grad():
                    got = model(images(size).fill_(1))
                if not torch.allclose(got, wanted, atol=1e-5):
                    wrong.append(size)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for norm in (model.bn1, model.bn2, model.bn3):
        kept = folding._kept[norm].packed
        assert list(kept) == [torch.float32] and 1 <= len(kept[torch.float32]) <= folding.LAYOUTS


def test_two_threads_that_pack_at_once_leave_no_more_than_the_limit(monkeypatch):
    """Both meet in the middle of packing for shapes of their own; what is alive afterwards is what is kept."""
    model, alive, met = resnet_fused.fuse(block(BasicBlock)), [], threading.Barrier(2)
    original, meeting = onednn.prepack, threading.Event()

    def noted(*args):
        packed = original(*args)
        alive.append(weakref.ref(packed))
        if meeting.is_set():
            with contextlib.suppress(threading.BrokenBarrierError):
                met.wait(1)
        return packed

    def call(*sizes):
        with torch.no_grad(), choose.fusing_all():  # in each thread
            for size in sizes:
                model(images(size)), model(images(size))

    monkeypatch.setattr(onednn, "prepack", noted)
    call(8, 10)
    meeting.set()
    threads = [threading.Thread(target=call, args=(size,)) for size in (12, 14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    meeting.clear()
    call(*range(16, 48, 2))
    assert 2 <= sum(one() is not None for one in alive) <= 2 * folding.LAYOUTS


@needs_bf16
@torch.no_grad()
def test_autocast_keeps_what_it_made_beside_float32(packs):
    model, x = resnet_fused.fuse(block()), images(16)
    for _ in range(3):
        model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
    assert [dtype for _, dtype in packs] == 3 * [torch.float32] + 3 * [torch.bfloat16]


def in_memory(weight):
    """A channels_last weight's elements in the order in which they lie, as a view."""
    return weight.data.permute(0, 2, 3, 1).view(-1)


WRITES = {
    "weight": lambda m: m.conv2.weight.data.mul_(2),
    "weight by numpy": lambda m: m.conv2.weight.detach().numpy().__imul__(2),
    "pairs of signs": lambda m: in_memory(m.conv2.weight)[:128].neg_(),
    "strides": lambda m: setattr(m.conv2.weight, "data", in_memory(m.conv2.weight).view(m.conv2.weight.shape)),
    "one element": lambda m: m.conv1.weight.data.view(-1)[5:6].add_(9),
    "gamma": lambda m: m.bn2.weight.data.mul_(2),
    "beta": lambda m: m.bn3.bias.data.add_(1),
    "running_mean": lambda m: m.bn1.running_mean.numpy().__iadd__(1),
    "running_var": lambda m: m.bn3.running_var.data.mul_(4),
    "eps": lambda m: setattr(m.bn2, "eps", 0.5),
    "another weight": lambda m: setattr(m.conv2, "weight", nn.Parameter(m.conv2.weight * 2)),
}


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=needs_bf16)])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@torch.no_grad()
def test_every_write_is_seen_at_the_next_call(write, autocast):
    stock = block()
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), images(12)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = fused(x)
        write(stock), write(fused)
        wanted, got = stock(x).float(), fused(x).float()
    assert (got - before.float()).norm() > 0.02 * before.float().norm()
    assert (got - wanted).norm() <= (3e-2 if autocast else 1e-5) * wanted.norm()


@pytest.mark.parametrize("words", [[0, 64], [3, 1283], [0, 1, 64, 65], range(4096)])
@pytest.mark.parametrize("bit", [0, 15, 22, 23, 30, 31])
def test_a_bit_that_changes_in_several_elements_changes_the_checksum(words, bit):
    content = torch.randint(-(2**31), 2**31 - 1, (4096,)).int()
    (before,) = torch.ops.resnet_fused.checksum([content])
    content[list(words)] ^= torch.tensor(-(2**31) if bit == 31 else 1 << bit).int()
    assert torch.ops.resnet_fused.checksum([content]) != [before]


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e38])
@pytest.mark.parametrize("name", ["bn1.weight", "bn1.running_var", "bn2.bias", "conv2.weight"])
@torch.no_grad()
def test_what_is_not_finite_stays_where_stock_has_it(name, value):
    stock, x = block(BasicBlock), images(6, 3)
    stock.state_dict()[name][1] = value
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    for _ in range(2):
        torch.testing.assert_close(fused(x), stock(x), equal_nan=True)


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("kind", [Bottleneck, BasicBlock])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["autocast", "module"])
@torch.no_grad()
def test_at_most_twice_stocks_error(kind, dtype, how):
    stock, x = block(kind), images(14, 4)
    exact = copy.deepcopy(stock).double()(x.double())
    if how == "module":
        stock, x = stock.to(dtype), x.to(dtype)
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    with torch.autocast("cpu", dtype, enabled=how == "autocast" and dtype != torch.float32):
        wanted, got = stock(x), fused(x)
    assert got.dtype == wanted.dtype
    assert error(got, exact) <= 2 * error(wanted, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_images_of_one_pixel(dtype):
    stock = block().to(dtype)
    fused, x = resnet_fused.fuse(copy.deepcopy(stock)), images(1, 4).to(dtype)
    for name in ("auto", "cpu", "reference"):
        with resnet_fused.use(name):
            assert error(fused(x), stock(x).double()) < (1e-12 if dtype == torch.float64 else 2e-2)


@torch.no_grad()
def test_a_convolution_before_two_norms_is_kept_for_both(packs):
    first = resnet_fused.fuse(block())
    second = resnet_fused.fuse(block())
    second.conv1 = first.conv1
    for _ in range(3):
        first(images(12)), second(images(12))
    assert len(packs) == 6
