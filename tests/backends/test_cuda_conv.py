"""What the compiled convolution declares: reasons in words, by the arguments alone."""

import pytest
import torch

from resnet_fused.backends import Backend, Kernel, cuda, cuda_conv
from resnet_fused.backends.cards import Card, assuming
from resnet_fused.backends.selfcheck import conv_cases, gram_cases, judge
from resnet_fused.backends.selfcheck.draws import Case
from resnet_fused.ops import OPS, lazy
from resnet_fused.ops.conv_chain import Link

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def built(monkeypatch):
    """A library for an H100."""
    monkeypatch.setattr(cuda_conv, "_unbuilt", lambda arch: cuda_conv.unbuilt(arch, "9.0"))


def data(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=LAST)


def asked(**changed):
    """What stands against a convolution that is taken, but for what is changed."""
    given = {"x": data(2, 8, 5, 5), "weight": data(16, 8, 3, 3), **dict.fromkeys(("bias", "mean", "var", "gamma"))}
    given |= {"beta": None, "eps": 1e-5, "residual": None, "padding": (1, 1), "relu": True} | changed
    return cuda_conv.conv_norm_reasons(**given)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"x": data(2, 8, 5, 5).contiguous()}, "takes channels_last tensors only"),
        ({"weight": data(16, 8, 3, 3).contiguous()}, ""),
        ({"weight": data(8, 16, 3, 3).transpose(0, 1)}, "takes a dense weight only"),
        ({"weight": data(16, 8, 3, 3).half()}, "takes weight and x of one dtype"),
        ({"weight": data(16, 4, 3, 3)}, "takes no groups"),
        ({"bias": torch.empty(16, device="meta")}, ""),
        ({"bias": torch.empty(16, device="meta").half()}, "takes contiguous float32 vectors only"),
        ({"padding": (1 << 14, 1)}, "of less than 32768 pixels to a side"),
        ({"x": data(1 << 16, 8, 64, 64)}, "takes less than 2^31 elements a tensor; pass a smaller batch"),
    ],
)
def test_reasons(changed, reason):
    found = asked(**changed)
    assert any(reason in one for one in found) if reason else found == []


@pytest.mark.parametrize("allowed", [True, False])
def test_float32_needs_tf32(monkeypatch, allowed):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    found = asked(x=data(2, 8, 5, 5, dtype=torch.float32), weight=data(16, 8, 3, 3, dtype=torch.float32))
    assert found == ([] if allowed else [cuda_conv.FULL_FLOAT32])
    assert cuda_conv.mode(torch.float32) == ("tf32" if allowed else "") and cuda_conv.mode(torch.bfloat16) == ""


@pytest.mark.parametrize(
    ("arch", "built", "reason"),
    [
        (90, "8.0 9.0", ""),
        (86, "8.0", ""),  # a later minor version
        (80, "8.6", "is built for 8.6, not for 8.0; add that to TORCH_CUDA_ARCH_LIST and run `pip install"),
        (120, "8.0 9.0+PTX", ""),
        (100, "9.0a", "is built for 9.0a, not for 10.0"),
        (90, "", "is built for no GPU"),
        (75, "7.5 8.0", "needs tensor cores of compute capability 8.0 or later"),
    ],
)
def test_the_architectures_of_the_build(arch, built, reason):
    found = cuda_conv.unbuilt(arch, built)
    assert reason in found and bool(reason) == bool(found)


def test_the_gpu_is_asked_for():
    with assuming(Card(arch=100)):
        assert asked() == [cuda_conv.unbuilt(100, "9.0")]


def test_results_are_written_in_the_layout_of_x():
    x, weight, none = data(2, 8, 5, 5), data(16, 8, 1, 1), [None] * 5
    for out, fits in ((data(2, 16, 5, 5), True), (data(2, 16, 5, 5).contiguous(), False)):
        assert (cuda_conv.conv_norm_reasons_(out, x, weight, *none, 1.0, adds=True) == []) == fits


def test_a_convolution_without_batch_norm_is_the_one_with_it():
    """By the CPU's kernel of that op: values, and the memory that is written. Groups are refused."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, 8, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    x, residual = x.contiguous(memory_format=LAST), residual.contiguous(memory_format=LAST)
    weight, shift = torch.randn(8, 8, 1, 1, dtype=torch.float64).transpose(0, 1), torch.randn(8, dtype=torch.float64)
    arguments = ([1, 1], [0, 0], [1, 1], 1, True)
    want = OPS["conv_add_relu"].reference(x, weight, shift, residual, *arguments)
    got = cuda_conv.conv_add_relu(x, weight, shift, residual, *arguments)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    cuda_conv.conv_add_relu_(residual, x, weight, shift, *arguments)
    torch.testing.assert_close(residual, want, rtol=1e-12, atol=1e-12)
    assert cuda_conv.conv_reasons(data(2, 8, 5, 5), data(8, 4, 3, 3), groups=2) == [cuda_conv.NO_GROUPS]


@pytest.mark.parametrize("cases", [conv_cases.tiles, lambda: conv_cases.conv_join(torch.bfloat16)])
def test_the_self_check_meets_every_tile(cases):
    """On the GPU with the most multiprocessors that is known: 128x128, 128x64, 64x64, and element by element."""
    met = set()
    for case in cases():
        x, weight, where = case.args[0], case.args[1], case.kwargs
        n, _, h, w = where["residual"].shape if "residual" in where else x.shape
        pixels, outputs = n * h * w, weight.shape[0]
        tiles = [-(-pixels // rows) * -(-outputs // cols) for rows, cols in ((128, 128), (128, 64))]
        if x.shape[1] % 8:
            met.add("elements")
        else:
            met.add("large" if outputs > 64 and tiles[0] >= 188 else "narrow" if tiles[1] >= 188 else "small")
    assert met == {"elements", "large", "narrow", "small"}
    serves = "conv_norm_add_relu", "conv_norm_add_relu_", "conv_add_relu", "conv_add_relu_", "conv_chain"
    assert serves == cuda.CONVOLUTIONS


def test_what_stands_against_a_training_product():
    x, weight, vector = data(2, 8, 5, 5), data(16, 8, 1, 1), torch.empty(8, device="meta")
    assert cuda_conv.conv1x1_reasons(x, weight) == []
    assert cuda_conv.conv1x1_reasons(x, weight, vector, vector, [2, 2], True, vector.half(), None, 1e-3) == []
    for args, reason in (
        ((x.contiguous(), weight), "takes channels_last tensors only"),
        ((x, data(8, 16, 1, 1).transpose(0, 1)), "takes a contiguous weight only"),
        ((x, weight.half()), "takes weight and x of one dtype"),
        ((x, weight, vector.half(), vector.half()), "takes contiguous float32 vectors only"),
        ((x, weight, None, None, [1 << 15, 1]), "of less than 32768 pixels to a side"),
        ((data(1 << 16, 8, 64, 64), weight), "takes less than 2^31 elements a tensor"),
    ):
        assert [one for one in cuda_conv.conv1x1_reasons(*args) if reason in one]
    with assuming(Card(arch=75)):
        assert cuda_conv.conv1x1_reasons(x, weight) == [cuda_conv.unbuilt(75, "9.0")]


def test_what_stands_against_a_convolution_on_values():
    x, weight, vector = data(2, 8, 5, 5), data(16, 8, 3, 3), torch.empty(8, device="meta")
    assert cuda_conv.conv_values_reasons(x, weight.contiguous(), vector, vector, [2, 2], [1, 1]) == []
    for args, reason in (
        ((x.contiguous(), weight), "takes channels_last tensors only"),
        ((x, data(8, 16, 3, 3).transpose(0, 1)), "takes a dense weight only"),
        ((x, data(16, 4, 3, 3)), "takes no groups"),
        ((x, weight, vector.half(), vector.half()), "takes contiguous float32 vectors only"),
        ((x, weight, None, None, [1, 1], [1 << 14, 1]), "of less than 32768 pixels to a side"),
    ):
        assert [one for one in cuda_conv.conv_values_reasons(*args) if reason in one]
    with assuming(Card(arch=75)):
        assert cuda_conv.conv_values_reasons(x, weight) == [cuda_conv.unbuilt(75, "9.0")]


def test_what_stands_against_a_join_by_any_filter():
    x, weight, vector = data(2, 8, 5, 5), data(16, 8, 3, 3), torch.empty(16, device="meta")
    residual, reasons = data(2, 16, 5, 5), cuda_conv.conv_join_reasons
    assert reasons(x, weight.contiguous(), vector, vector, residual, [1, 1], [1, 1]) == []
    assert reasons(x, data(8, 16, 3, 3).transpose(0, 1), vector, vector) == ["takes a dense weight only"]
    assert reasons(x, weight, vector.half(), vector) == ["takes contiguous float32 vectors only"]
    assert reasons(x, weight, vector, vector, residual.half()) == ["takes residual and x of one dtype"]


@pytest.mark.parametrize("allowed", [True, False])
def test_a_training_product_in_float32_needs_tf32(monkeypatch, allowed):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    x, weight = (data(*shape, dtype=torch.float32) for shape in ((2, 8, 5, 5), (16, 8, 1, 1)))
    assert cuda_conv.conv1x1_reasons(x, weight) == ([] if allowed else [cuda_conv.FULL_FLOAT32])


def test_the_self_check_of_a_training_product_meets_every_tile():
    """As above; and a chunk of two tiles, of which there are 16 for each multiprocessor."""
    met = set()
    for case in conv_cases.conv1x1_tiles(torch.bfloat16):
        x, weight, options = *case.args, case.kwargs
        n, _, h, w = lazy.strided_shape(x, weight.shape[0], options["stride"])
        large, narrow = (-(-n * h * w // 128) * -(-weight.shape[0] // cols) for cols in (128, 64))
        if x.shape[1] % 8 or weight.shape[0] % 8:
            met.add("elements")
        elif weight.shape[0] > 64 and large >= 188:
            met.add("large")
        else:
            met.add("small" if narrow < 188 else "chunks" if narrow >= 16 * 188 else "narrow")
    assert met == {"elements", "large", "chunks", "small"}


def test_the_self_check_of_a_convolution_on_values_meets_every_tile():
    """As of the training product; every filter reaches outside the image, where a shift makes something of zero."""
    met = set()
    for case in conv_cases.conv_values(torch.bfloat16):
        x, weight, options = *case.args, case.kwargs
        shape = OPS["conv_values"].fake(*case.args, **options)[0].shape
        pixels, outputs = shape[0] * shape[2] * shape[3], weight.shape[0]
        large, narrow = (-(-pixels // 128) * -(-outputs // cols) for cols in (128, 64))
        assert max(options["padding"]) > 0 and bool((options.get("x_shift", torch.ones(1)) > 0).any())
        if x.shape[1] % 8 or outputs % 8:
            met.add("elements")
        elif outputs > 64 and large >= 188:
            met.add("large")
        else:
            met.add("small" if narrow < 188 else "chunks" if narrow >= 16 * 188 else "narrow")
    assert met == {"elements", "large", "chunks", "small"}


def test_a_kernel_is_judged_by_its_own_cases_too(monkeypatch):
    """Beside those of its op, by which other backends' kernels are judged as well."""
    seen = []
    monkeypatch.setattr(judge, "check", lambda backend, op, dtype, device, make: seen.extend(make()) or [])
    more = lambda dtype: [Case(f"more in {dtype}", (), {})]  # noqa: E731
    kernel = Kernel(OPS["conv1x1"].reference, (torch.float32,), more_cases=more)
    judge.check_kernel(Backend("one", ("cpu",), {"conv1x1": kernel}), "conv1x1", torch.float32, torch.device("cpu"))
    assert [case.name for case in seen[-1:]] == ["more in torch.float32"] and len(seen) > 4


def test_what_stands_against_a_join():
    x, weight, vector = data(2, 8, 5, 5), data(16, 8, 1, 1), torch.empty(16, device="meta")
    x2, given = data(2, 24, 9, 10), (x, weight, vector, vector)
    second = {"x2": x2, "weight2": data(16, 24, 1, 1), "scale2": vector, "shift2": vector, "stride2": [2, 2]}
    assert cuda_conv.conv1x1_join_reasons(*given, residual=data(2, 16, 5, 5)) == []
    assert cuda_conv.conv1x1_join_reasons(*given, **second) == []
    for options, reason in (
        ({"residual": data(2, 16, 5, 5).contiguous()}, "takes channels_last tensors only"),
        ({"residual": data(2, 16, 5, 5).half()}, "takes residual, x2 and x of one dtype"),
        (second | {"x2": x2.contiguous()}, "takes channels_last tensors only"),
        (second | {"weight2": data(24, 16, 1, 1).transpose(0, 1)}, "takes contiguous weights only"),
        (second | {"scale2": vector.half()}, "takes contiguous float32 vectors only"),
        (second | {"stride2": [1 << 15, 1]}, "of less than 32768 pixels to a side"),
        ({"sample_factor": torch.empty(4, device="meta")[::2]}, "takes contiguous float32 vectors only"),
    ):
        assert [one for one in cuda_conv.conv1x1_join_reasons(*given, **options) if reason in one]
    with assuming(Card(arch=75)):
        assert cuda_conv.conv1x1_join_reasons(*given, **second) == [cuda_conv.unbuilt(75, "9.0")]


def test_the_self_check_of_a_join_meets_every_tile():
    """128x64 outputs, 64x64, and element by element; of one product and of two, where 64x64 are all there is."""
    met = set()
    for case in conv_cases.conv1x1_join_tiles(torch.bfloat16):
        (n, c, h, w), k = case.args[0].shape, case.args[1].shape[0]
        many = -(-n * h * w // 128) * -(-k // 64) >= 188
        met.add(("elements" if c % 8 or k % 8 else "many" if many else "few", "x2" in case.kwargs))
    assert met == {(kind, second) for kind in ("elements", "many", "few") for second in (False, True)}


def test_what_stands_against_a_convolution_stands_against_a_chain():
    x, one, three = data(2, 16, 5, 5), data(8, 16, 1, 1), data(16, 8, 3, 3)
    links = Link(0, -1, True, (1, 1), (0, 0), (1, 1)), Link(1, 0, True, (1, 1), (1, 1), (1, 1))
    steps, none = [number for link in links for number in link.integers], [None] * 5

    def found(x=x, three=three, steps=steps):
        return cuda_conv.chain_reasons(x, None, [one, *none, three, *none], steps, [1.0, 1.0])

    assert found() == []
    assert found(x=x.contiguous()) == ["takes channels_last tensors only"]
    assert found(three=three.half()) == ["takes weight and x of one dtype, not torch.float16 and torch.bfloat16"]
    far = [*steps[:-6], 1 << 15, *steps[-5:]]
    assert [one for one in found(steps=far) if "of less than 32768 pixels to a side" in one]
    with assuming(Card(arch=100)):
        assert found() == [cuda_conv.unbuilt(100, "9.0")]


def test_what_stands_against_a_gram_matrix(monkeypatch):
    """Float32 is multiplied in full, so that no setting matters."""
    a, vector = data(2, 8, 5, 5), torch.empty(8, device="meta")
    assert cuda_conv.gram_reasons(a, vector) == [] and cuda_conv.gram_reasons(a, vector, vector, vector, [2, 2]) == []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert cuda_conv.gram_reasons(data(2, 8, 5, 5, dtype=torch.float32), vector) == []
    for args, reason in (
        ((a.contiguous(), vector), "takes channels_last tensors only"),
        ((a, vector.half()), "takes contiguous float32 vectors only"),
        ((a, vector, vector.half(), vector), "takes contiguous float32 vectors only"),
        ((data(1 << 16, 8, 64, 64), vector), "takes less than 2^31 elements a tensor"),
    ):
        assert [one for one in cuda_conv.gram_reasons(*args) if reason in one]
    with assuming(Card(arch=75)):
        assert cuda_conv.gram_reasons(a, vector) == [cuda_conv.unbuilt(75, "9.0")]


def test_what_stands_against_a_gram_joins_matrices():
    weight, square, vector = data(16, 8, 1, 1), torch.empty(8, 8, device="meta"), torch.empty(8, device="meta")
    a = torch.empty(2, 8, 5, 5, device="meta")  # of which the shape is read
    for op in ("gram_norm", "gram_grad"):
        reasons = cuda.accepted(op)[1]
        assert reasons(weight, square, vector, vector, a) == []
        assert reasons(weight, square.T[:4], vector, vector, a) == ["takes contiguous tensors only"]
        assert reasons(data(8, 16, 1, 1).transpose(0, 1), square, vector, vector, a) == [
            "takes contiguous tensors only"
        ]


def test_the_self_check_of_the_gram_family_meets_several_tiles_and_splits():
    """Pairs off the diagonal, rows that end within a split's last stage, chunks and elements; wide weights."""
    met = set()
    for case in gram_cases.gram(torch.bfloat16):
        a, stride = case.args[0], case.kwargs.get("stride", (1, 1))
        n, c, h, w = lazy.strided_shape(a, a.shape[1], stride)
        assert c > 64 and n * h * w >= 2 * 256 and n * h * w % 64
        met.add(("elements" if c % 8 else "chunks", tuple(stride) != (1, 1), "scale" in case.kwargs))
    assert met == {("chunks", False, True), ("elements", True, False)}
    weights = [case.args[0].shape for op in ("gram_norm", "gram_grad") for case in cuda.GRAM[op]["more_cases"](None)]
    assert all(outputs > 64 and inputs > 128 for outputs, inputs, *_ in weights) and len(weights) == 2
