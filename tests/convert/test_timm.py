"""A sample of timm's ResNets, one for each of its options; `benchmarks/all_models.py` runs them all."""

import copy
import importlib.util
import pathlib
import re
import sys
import warnings

import pytest
import torch
from nets import assert_near, observe

import resnet_fused
from resnet_fused.bench import equality
from resnet_fused.testing.vision import import_torchvision

try:
    import_torchvision()
    import timm
except ImportError as error:
    pytest.skip(f"timm or torchvision is not installed: {error}", allow_module_level=True)

OPTIONS = {
    "resnet18": {},
    "resnet18d": {},  # deep stem, average pool in the shortcut
    "resnetblur18": {},  # anti-aliasing
    "seresnext26d_32x4d": {},  # squeeze-excite, groups
    "ecaresnet26t": {},  # efficient channel attention
    "resnet26": {"drop_path_rate": 0.3, "drop_block_rate": 0.1},
    "resnetaa34d": {},
    "resnet14t": {"output_stride": 8},  # dilation
}


@pytest.mark.parametrize("name", OPTIONS)
def test_blocks_are_fused_around_options_and_equal_stock(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **OPTIONS[name])
    equality.scatter_norms(model)
    fused = resnet_fused.fuse(copy.deepcopy(model))
    report = resnet_fused.report(fused)
    if "drop_path_rate" in OPTIONS[name]:
        assert any(" * drop_path" in row.what for row in report.fused)
    blocks = [n for n, m in model.named_modules() if type(m).__name__ in ("BasicBlock", "Bottleneck")]
    assert {row.name for row in report.fused} >= {"", *blocks}  # the stem is the model's own row
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert_near(observe(fused, x), observe(model, x))
    torch.testing.assert_close(fused.eval()(x), model.eval()(x), rtol=1e-3, atol=1e-3)


def test_drop_path_draws_what_stock_draws():
    torch.manual_seed(0)
    model = timm.create_model("resnet14t", num_classes=10, drop_path_rate=0.5)
    fused = resnet_fused.fuse(copy.deepcopy(model))
    assert "drop_path" in str(resnet_fused.report(fused))
    x = torch.randn(8, 3, 64, 64)
    for _ in range(3):
        seed = int(torch.randint(1000, ()))
        outputs = []
        for m in (model, fused):
            torch.manual_seed(seed)
            outputs.append((m(x), torch.rand(1)))
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-3)


def test_other_activations_and_norms_stay_stock_with_a_reason():
    model = timm.create_model("resnet10t", num_classes=10, act_layer=torch.nn.SiLU)
    fused = resnet_fused.fuse(copy.deepcopy(model))
    x = torch.randn(2, 3, 64, 64)
    assert_near(observe(fused, x), observe(model, x))
    group = timm.create_model("resnet50_gn", num_classes=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = resnet_fused.report(resnet_fused.fuse(group))
    assert not report.fused
    assert "GroupNorm is not batch norm" in str(report)


def test_features_and_intermediates():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10, features_only=True).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    for got, want in zip(resnet_fused.fuse(model)(x), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    classifier = timm.create_model("resnet18", num_classes=10).eval()
    want = classifier.forward_intermediates(x, intermediates_only=True)
    for a, b in zip(resnet_fused.fuse(classifier).forward_intermediates(x, intermediates_only=True), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_torchvision_models_and_feature_extraction():
    models = import_torchvision().models
    from torchvision.models.feature_extraction import create_feature_extractor

    torch.manual_seed(0)
    model = models.resnet18(num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    names = ["relu", "layer1.0.relu", "layer3.1"]
    want = create_feature_extractor(model, names)(x)
    resnet_fused.fuse(model)
    assert len(resnet_fused.report(model).fused) == 9
    got = create_feature_extractor(model, names)(x)
    for name in names:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)


TESTS = """
import os
import pytest
import torch
from timm import create_model
from timm.models import create_model as stock_model  # which nobody replaces

def fused(model):
    return type(model).__name__.startswith("Fused")

models = pytest.mark.parametrize("model_name", ["test_resnet", "test_vit"])

@models
def test_agrees(model_name):
    assert create_model(model_name).eval()(torch.zeros(1, 3, 160, 160)).shape == (1, 1000)

@models
def test_asks_for_equal_bits(model_name):
    models = []
    for create in (create_model, stock_model):
        torch.manual_seed(0)
        models.append(create(model_name).eval())
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        a, b = (model(x) for model in models)
    assert a.shape == b.shape and torch.equal(a, b)

@models
def test_asks_for_a_class(model_name):
    assert not fused(create_model(model_name))

@models
def test_ends_its_process(model_name):
    if fused(create_model(model_name)):
        os._exit(3)
"""


@pytest.fixture(scope="module")
def timm_tests():
    path = pathlib.Path(__file__).parents[2] / "benchmarks" / "timm_tests.py"
    spec = importlib.util.spec_from_file_location("timm_tests", path)
    sys.modules["timm_tests"] = module = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["timm_tests"]


@pytest.mark.slow
def test_timms_own_tests_are_compared(tmp_path, timm_tests, capfd):
    (tmp_path / "test_models.py").write_text(TESTS)
    options = ["--tests", str(tmp_path), "--workers"]
    assert timm_tests.main([*options, "1", "--quick"]) == 1
    said = capfd.readouterr().out
    rows = dict(re.findall(r"^\| (test_\w+|all) \| (.*) \|$", said, flags=re.MULTILINE))
    # models, with fused modules, stock passed, fused passed, skipped, left out, bitwise, worse
    assert {name: [int(cell) for cell in row.split(" | ")] for name, row in rows.items()} == {
        "test_agrees": [2, 1, 0, 1, 0, 1, 0, 0],
        "test_asks_for_equal_bits": [2, 1, 1, 0, 0, 1, 1, 0],
        "test_asks_for_a_class": [2, 1, 1, 0, 0, 1, 0, 1],
        "test_ends_its_process": [2, 0, 1, 0, 0, 1, 0, 1],
        "all": [8, 3, 3, 1, 0, 4, 1, 2],
    }
    assert "test_asks_for_equal_bits[test_resnet]: failed; torch.equal(a, b): largest difference" in said
    assert "\n8 tests: 2 fail fused where stock passes\n" in said
    assert timm_tests.main([*options, "0", "--filter", "*vit"]) == 0
    assert "| all | 4 | 0 | 4 | 4 | 0 | 0 | 0 | 0 |" in capfd.readouterr().out
