"""Convolutions in bfloat16 by the processor's products: as near to float64 as rounding allows."""

import pytest
import torch

from resnet_fused.backends import run
from resnet_fused.library import multiplies_bf16
from resnet_fused.ops import OPS

pytestmark = pytest.mark.skipif(not multiplies_bf16(), reason="needs a processor that multiplies bfloat16")
#: Samples, inputs, outputs, height, stride: odd channels leave a pair half empty, odd numbers of pixels a pair of rows.
SHAPES = [
    (2, 64, 64, 9, 1),
    (1, 1, 3, 5, 1),
    (3, 3, 1, 4, 2),
    (2, 65, 33, 7, 2),
    (1, 40, 130, 1, 1),
    (5, 96, 20, 13, 1),
]


def image(*shape):
    return torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)


def wide(value):
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if floating else value


def far(a, exact):
    return ((a.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item() if exact.numel() else 0.0


def agree(op, *args, **options):
    """Our results, each compared to those in float64: within twice the error of the reference in bfloat16."""
    ours = run(op, *args, **options, backend="cpu")
    exact = OPS[op].reference(*map(wide, args), **{name: wide(value) for name, value in options.items()})
    rounded = OPS[op].reference(*args, **options)
    if isinstance(ours, torch.Tensor):
        ours, exact, rounded = (ours,), (exact,), (rounded,)
    for i, (a, e, r) in enumerate(zip(ours, exact, rounded, strict=True)):
        assert a.dtype == r.dtype and a.shape == r.shape
        assert far(a, e) <= 2 * far(r, e) + 1e-5, i
    return ours


def lazy_input(channels):
    return {"x_scale": torch.rand(channels) + 0.5, "x_shift": torch.randn(channels)}


def lazy_gradient(n, k, h, w, kind):
    """The arguments by which a gradient is applied on load."""
    g, z = image(n, k, h, w), image(n, k, h, w)
    terms = {"z": z, "a": torch.randn(k), "b": torch.randn(k), "d": torch.randn(k)}
    if kind == "bits":
        mask = torch.randint(0, 256, (n * h * w, -(-k // 8)), dtype=torch.uint8)
        mask[:, -1] &= (1 << ((k - 1) % 8 + 1)) - 1
        return g, terms | {"mask": mask, "sample_factor": torch.rand(n)}
    return g, terms | {"scale": torch.randn(k), "shift": torch.randn(k)} if kind == "sign" else {}


@pytest.mark.parametrize(("n", "c", "k", "h", "stride"), SHAPES)
@pytest.mark.parametrize("lazy", [False, True])
def test_conv1x1(n, c, k, h, stride, lazy):
    torch.manual_seed(0)
    applied = lazy_input(c) if lazy else {}
    agree("conv1x1", image(n, c, h, h + 1), image(k, c, 1, 1), stride=(stride, stride), **applied)


@pytest.mark.parametrize(("n", "c", "k", "h", "stride"), SHAPES)
@pytest.mark.parametrize("kind", ["plain", "bits", "sign"])
def test_both_gradients_through_a_norm(n, c, k, h, stride, kind):
    torch.manual_seed(0)
    rows, columns = -(-h // stride), -(-(h + 1) // stride)
    g, terms = lazy_gradient(n, k, rows, columns, kind)
    options = terms | lazy_input(c) | {"x": image(n, c, h, h + 1), "x_mean": torch.randn(c)}
    agree("conv1x1_dgrad", g, image(k, c, 1, 1), **options, x_stride=(stride, stride), weight_grad=True)


@pytest.mark.parametrize(("n", "c", "k", "h", "stride"), SHAPES)
def test_both_gradients_and_what_is_added(n, c, k, h, stride):
    torch.manual_seed(0)
    g, terms = lazy_gradient(n, k, h, h + 1, "bits")
    residual = image(n, c, -(-h // stride), -(-(h + 1) // stride))
    mask = torch.randint(0, 256, (residual[:, 0].numel(), -(-c // 8)), dtype=torch.uint8)
    mask[:, -1] &= (1 << ((c - 1) % 8 + 1)) - 1
    coupling = image(c, c, 1, 1)
    options = {"residual": residual, "residual_mask": mask, "residual_stride": (stride, stride)}
    options |= {"coupling": (coupling + coupling.transpose(0, 1)).contiguous(), "constant": torch.randn(c)}
    agree("conv1x1_dgrad", g, image(k, c, 1, 1), **terms, **options, x=image(n, c, h, h + 1), weight_grad=True)
    agree("conv1x1_dgrad", image(n, c, h, h + 1), None, **options, x=image(n, c, h, h + 1))


@pytest.mark.parametrize(("n", "c", "k", "h", "stride"), SHAPES)
@pytest.mark.parametrize("rounded", [False, True])
def test_the_weights_gradient_alone(n, c, k, h, stride, rounded):
    torch.manual_seed(0)
    g, terms = lazy_gradient(n, k, -(-h // stride), -(-(h + 1) // stride), "sign")
    more = lazy_input(c) | {"stride": (stride, stride), "rounded": rounded}
    agree("conv1x1_wgrad", g, image(n, c, h, h + 1), **terms, **more)


@pytest.mark.parametrize(
    ("n", "c", "k", "h", "w", "kernel", "stride", "padding", "dilation"),
    [
        (2, 32, 33, 9, 7, 3, 1, 1, 1),
        (3, 65, 32, 7, 7, 3, 2, 1, 1),
        (1, 1, 1, 1, 1, 3, 1, 1, 1),
        (2, 40, 16, 9, 6, 3, 1, 2, 2),
        (2, 3, 20, 21, 20, 7, 2, 3, 1),
        (1, 32, 30, 40, 41, 3, 1, 0, 1),
    ],
)
def test_conv_weight_grad(n, c, k, h, w, kernel, stride, padding, dilation):
    torch.manual_seed(0)
    x, weight, args = image(n, c, h, w), image(k, c, kernel, kernel), [(i, i) for i in (stride, padding, dilation)]
    z = torch.nn.functional.conv2d(x, weight, None, *args)
    agree("conv_weight_grad", image(*z.shape), x, weight, *args)
    agree("conv_weight_grad", image(*z.shape), x, weight.contiguous(), *args)


def test_statistics_about_a_far_mean():
    """The variance of outputs near 300, which steps of 2 round, is that of the rounded ones."""
    torch.manual_seed(0)
    x = torch.rand(4, 2, 30, 30).add(1).bfloat16().contiguous(memory_format=torch.channels_last)
    z, mean, m2, *_ = run("conv1x1", x, torch.full((40, 2, 1, 1), 100.0).bfloat16(), backend="cpu")
    rows = z.permute(0, 2, 3, 1).reshape(-1, 40).double()
    assert far(mean, rows.mean(0)) < 1e-6
    assert far(m2, rows.var(0, correction=0) * len(rows)) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_stays_with_its_pixel(value):
    torch.manual_seed(0)
    x, weight = image(1, 35, 6, 5), image(40, 35, 1, 1)
    x[0, 34, 3, 2] = value
    z = run("conv1x1", x, weight, backend="cpu")[0]
    reached = ~torch.isfinite(z[0]).all(0)
    assert reached.nonzero().tolist() == [[3, 2]]
    assert torch.equal(z.isnan(), torch.nn.functional.conv2d(x.double(), weight.double()).isnan())


def test_nothing_of_nothing():
    empty, weight = image(0, 8, 4, 4), image(6, 8, 1, 1)
    assert run("conv1x1", empty, weight, backend="cpu")[0].shape == (0, 6, 4, 4)
    grad_x, *_, grad_weight = run("conv1x1_dgrad", image(0, 6, 4, 4), weight, x=empty, weight_grad=True, backend="cpu")
    assert grad_x.shape == empty.shape and not grad_weight.any()
    args = [(i, i) for i in (1, 1, 1)]
    assert not run("conv_weight_grad", image(0, 6, 4, 4), empty, image(6, 8, 3, 3), *args, backend="cpu").any()


def test_the_same_bits_with_any_number_of_threads():
    torch.manual_seed(0)
    x, g, weight, args = image(3, 64, 20, 19), image(3, 96, 20, 19), image(96, 64, 1, 1), [(1, 1)] * 3
    options = lazy_input(64) | {"x": x, "x_mean": torch.randn(64), "weight_grad": True}
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append([*run("conv1x1", x, weight, backend="cpu"), *run("conv1x1_dgrad", g, weight, **options)])
        found[-1].append(run("conv_weight_grad", g, x, image(96, 64, 3, 3), *args, backend="cpu"))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_one_dtype_for_all():
    with pytest.raises(RuntimeError, match="weight is Float but the activations are BFloat16"):
        torch.ops.resnet_fused.conv1x1(image(1, 8, 4, 4), image(8, 8, 1, 1).float())
    with pytest.raises(RuntimeError, match="x is Float but the activations are BFloat16"):
        torch.ops.resnet_fused.conv1x1_wgrad(image(1, 8, 4, 4), image(1, 8, 4, 4).float())
    with pytest.raises(RuntimeError, match="residual is Float but the activations are BFloat16"):
        residual = image(1, 8, 4, 4).float()
        torch.ops.resnet_fused.conv1x1_dgrad(image(1, 8, 4, 4), image(8, 8, 1, 1), residual=residual)
    with pytest.raises(RuntimeError, match="x is BFloat16; pass Float on the CPU"):
        vector = torch.ones(8)
        torch.ops.resnet_fused.conv1x1_join(image(1, 8, 4, 4), image(8, 8, 1, 1), vector, vector)
