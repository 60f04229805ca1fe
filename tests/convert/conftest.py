"""Fixtures of the converter's tests."""

import importlib
import sys

import pytest
from dense_blocks import MAKERS
from nets import BasicBlock, block, images, pair
from stems import HEAD, stem_model

from resnet_fused.convert import stage, stem, swap
from resnet_fused.convert.fused_module import FusedModule
from resnet_fused.testing.vision import import_torchvision


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A module from source, and the path of its file."""
    monkeypatch.syspath_prepend(tmp_path)
    loaded = []

    def make(body, head=HEAD):
        name = f"stem_source_{len(loaded)}"
        loaded.append(name)
        path = tmp_path / f"{name}.py"
        path.write_text(head + body)
        importlib.invalidate_caches()
        return importlib.import_module(name), path

    yield make
    for name in loaded:
        sys.modules.pop(name, None)


@pytest.fixture(params=MAKERS)
def maker(request):
    """Whose dense blocks."""
    if request.param != "ours":
        pytest.importorskip("timm") if request.param == "timm" else import_torchvision()
    return request.param


#: What was swapped, how to find it in a model, and an input of that model.
KINDS = {
    "block": (lambda: block(kind=BasicBlock), lambda m: m, FusedModule, images()),
    "stem": (stem_model, lambda m: m, stem.FusedStem, images(channels=3)),
    "stage": (stem_model, lambda m: m.layer1, stage.FusedStage, images(channels=3)),
}


@pytest.fixture(params=KINDS)
def kind(request):
    make, find, mixin, x = KINDS[request.param]
    stock, fused = pair(make())
    assert isinstance(find(fused), mixin) and swap.is_fused(find(fused))
    return stock, fused, find, x
