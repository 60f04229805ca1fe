"""A rewritten method is its class's own method: its names, defaults, lines and errors, whatever was changed since."""

import copy
import importlib
import inspect
import re
import sys
import textwrap
import traceback

import pytest
import torch
from nets import assert_same, observe
from torch import nn

import resnet_fused

HEAD = """
from __future__ import annotations
import torch
from torch import nn
from torch.nn import functional as F

class Base(nn.Module):
    SCALE = 3.0

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.maxpool, self.fc = nn.MaxPool2d(2), nn.Linear(4, 2)

    def head(self, x):
        return self.fc(F.dropout(x, 0.0, self.training).mean((2, 3)))
"""
PLAIN = """
    def forward(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        return self.head(x)
"""


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


def model_of(load, methods, base="Base"):
    """A model of class ``Net`` with `methods`."""
    module, _ = load(f"\nclass Net({base}):\n" + textwrap.indent(textwrap.dedent(methods), "    "))
    return make(module)


def make(module):
    torch.manual_seed(0)
    return module.Net().double()


def images():
    return torch.randn(2, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def fused_copy(model, stems=("conv1-bn1-relu-maxpool",)):
    fused = resnet_fused.fuse(copy.deepcopy(model)) if stems else copy.deepcopy(model)
    rows = [row for row in resnet_fused.report(fused).fused if not row.name]
    assert [row.what for row in rows] == [", ".join(stems)] if stems else not rows
    return fused


def assert_stays_stock(model):
    with pytest.warns(UserWarning, match="nothing to fuse"):
        fused = resnet_fused.fuse(copy.deepcopy(model))
    assert type(fused) is type(model)


def outcome(run):
    """What `run` returns, or the kind and text of what it raises."""
    try:
        return run()
    except Exception as error:
        return type(error), str(error)


FORMS = {
    "statements": (PLAIN, "conv1-bn1-relu-maxpool"),
    "nested": (
        "def forward(self, x): return self.head(self.maxpool(self.relu(self.bn1(self.conv1(x)))))\n",
        "conv1-bn1-relu-maxpool",
    ),
    "nested with a loose end": (
        "def forward(self, x): return self.head(self.fc(self.relu(self.bn1(self.conv1(x))).transpose(1, 3)))\n"
        "def head(self, x): return x.sum((1, 2))\n",
        "conv1-bn1-relu",
    ),
    "partly nested": (
        """
        def forward(self, images, scale=2.0, *, shift=1.0):
            y = self.bn1(self.conv1(images))
            y = self.relu(y)
            return self.head(y) * scale + shift
        """,
        "conv1-bn1-relu",
    ),
    "within blocks": (
        """
        def forward(this, x):
            "Its documentation."
            for _ in range(1):
                try:
                    if this.training:
                        x = this.conv1(x)
                        x = this.bn1(x)
                        x = this.relu(x)
                    else:
                        x = this.relu(this.bn1(this.conv1(x)))
                finally:
                    pass
            with torch.autograd.profiler.record_function("head"):
                return this.head(x)
        """,
        "conv1-bn1-relu",
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_forms_of_a_stem(load, form, training):
    methods, stem = FORMS[form]
    model = model_of(load, methods).train(training)
    fused = fused_copy(model, (stem,))
    assert_same(observe(fused, images()), observe(model, images()), 1e-8, 1e-8)
    for look in (inspect.signature, inspect.getsource, inspect.getdoc):
        assert look(fused.forward) == look(model.forward)


SCOPES = {
    "private names and a default of the class body": """
        def __init__(self):
            super().__init__()
            self.__conv, self.__head = self.conv1, nn.Linear(4, 5)
        def forward(self, x, scale=Base.SCALE):
            x = self.__stem(x)
            return self.__head(x.mean((2, 3))) * scale
        def __stem(self, x):
            x = self.__conv(x)
            x = self.bn1(x)
            x = self.relu(x)
            return x
        """,
    "the class cell": """
        def forward(self, x):
            x = self.relu(self.bn1(self.conv1(x)))
            return super().head(x) * __class__.SCALE
        """,
}


@pytest.mark.parametrize("scope", SCOPES)
def test_names_mean_what_they_mean_in_the_class(load, scope):
    model = model_of(load, SCOPES[scope])
    names = "_Net__conv-bn1-relu" if "private" in scope else "conv1-bn1-relu"
    fused = fused_copy(model, (names,))
    assert_same(observe(fused, images()), observe(model, images()), 1e-8, 1e-8)


def test_closures_and_a_base_that_a_subclass_calls(load):
    module, _ = load(
        """
def build(factor):
    class Net(Base):
        def stem(self, x):
            x = self.relu(self.bn1(self.conv1(x)))
            return x * factor
        def forward(self, x):
            return self.head(self.stem(x))
    return Net

class Net(build(2.0)):
    def forward(self, x):
        return super().forward(x) + 1
    def stem(self, x):
        return super().stem(x) if self.SCALE else x

class Inherits(build(3.0)):
    pass
"""
    )
    for kind in (module.build(2.0), module.Inherits):
        model = kind().double()
        fused = fused_copy(model, ("conv1-bn1-relu",))
        assert_same(observe(fused, images()), observe(model, images()), 1e-8, 1e-8)
        forward = type(fused).forward
        fused.__class__ = type(
            "Sub", (type(fused),), {"forward": lambda self, x, forward=forward: forward(self, x) * 5}
        )
        assert torch.allclose(fused(images()), model(images()) * 5, rtol=1e-10)
    assert_stays_stock(make(module))  # the method with the stem is not the class's own: super() cannot be led elsewhere


def test_a_file_edited_after_import_runs_the_code_that_was_imported(load):
    module, path = load("\nclass Net(Base):" + PLAIN.replace("return self", "return 1.0 * self"))
    model = make(module)
    path.write_text(path.read_text().replace("1.0 *", "100.0 *") + "\n# longer\n")
    assert_stays_stock(model)
    importlib.reload(module)
    new = make(module)
    fused = fused_copy(new)
    assert torch.allclose(fused(images()), new(images())) and torch.allclose(new(images()), 100 * model(images()))


@pytest.mark.parametrize(
    "edit", [("self.head(x)", "self.head( x)"), ("        x = self.conv1", "\n        x = self.conv1")]
)
def test_lines_that_moved_are_not_the_code(load, edit):
    module, path = load("\nclass Net(Base):" + PLAIN)
    path.write_text(path.read_text().replace(*edit))
    assert_stays_stock(make(module))


def test_tracebacks_name_the_lines_of_the_file(load):
    module, path = load(
        '''
class Net(Base):
    def forward(self, x):
        """Two lines
        of words."""
        x = self.relu(self.bn1(self.conv1(x)))
        return self.tail(x)

    def tail(self, x):
        raise RuntimeError("here")
'''
    )

    def lines(model):
        with pytest.raises(RuntimeError) as caught:
            model(images())
        frames = traceback.extract_tb(caught.value.__traceback__)
        return [(f.lineno, f.name, f.line) for f in frames if f.filename == str(path)]

    model = make(module)
    fused = fused_copy(model, ("conv1-bn1-relu",))
    assert len(lines(model)) == 2 and lines(fused) == lines(model)
    del model.bn1, fused.bn1
    with pytest.raises(AttributeError, match="bn1"):
        fused(images())


UNCERTAIN = {
    "another receiver": "def forward(self, x):\n    self = self.me\n    return self.relu(self.bn1(self.conv1(x)))",
    "a receiver of an inner function": """
        def forward(self, x):
            def other():
                nonlocal self
                self = self.me
            other()
            return self.relu(self.bn1(self.conv1(x)))
        """,
    "a variable that an inner function reads": """
        def forward(self, x):
            see = lambda: x
            x = self.conv1(x)
            x = self.bn1(x)
            x = self.relu(x)
            return see()
        """,
    "a global": """
        def forward(self, images):
            global seen
            seen = images
            seen = self.conv1(seen)
            seen = self.bn1(seen)
            seen = self.relu(seen)
            return seen
        """,
    "a comprehension": "def forward(self, x): return [self.relu(self.bn1(self.conv1(x))) for x in [x]][0]",
    "a decorator": "@torch.jit.unused\ndef forward(self, x): return self.head(self.relu(self.bn1(self.conv1(x))))",
    "a generator": "def stem(self, x): yield self.relu(self.bn1(self.conv1(x)))\n"
    "def forward(self, x): return next(self.stem(x))",
    "a static method": "@staticmethod\ndef stem(self, x): return self.relu(self.bn1(self.conv1(x)))\n"
    "def forward(self, x): return self.stem(self, x)",
    "an argument with effects": "def forward(self, x):\n"
    "    return self.head(self.relu(self.bn1(self.conv1(self.maxpool(x)))))",
    "another variable between": """
        def forward(self, x):
            y = self.conv1(x)
            x = self.bn1(y)
            x = self.relu(x)
            return x * y
        """,
}


@pytest.mark.parametrize("case", UNCERTAIN)
def test_what_cannot_be_certain_stays_stock(load, case):
    model = model_of(
        load, UNCERTAIN[case] + "\nme = property(lambda self: self)\n" if "me" in case else UNCERTAIN[case]
    )
    assert_stays_stock(model)


def test_a_shadowed_method_is_not_brought_back(load):
    module, _ = load(
        """
class Old(Base):
    def stem(self, x):
        return self.relu(self.bn1(self.conv1(x)))

class Net(Old):
    @property
    def stem(self):
        return lambda x: self.conv1(x) * 2
    def forward(self, x):
        return self.stem(x)
"""
    )
    assert_stays_stock(make(module))


REPLACED = {
    "on the stock class": lambda net, fused: setattr(net, "forward", lambda self, x: x.sum()),
    "on the class of the model": lambda net, fused: setattr(type(fused), "forward", lambda self, x: x.sum()),
    "on the instance": lambda net, fused: setattr(fused, "forward", lambda x: x.sum()),
    "its code": lambda net, fused: setattr(net.forward, "__code__", (lambda self, x: x.sum()).__code__),
}


@pytest.mark.parametrize("place", REPLACED)
def test_a_method_replaced_after_fuse_wins(load, place):
    model = model_of(load, PLAIN)
    fused = fused_copy(model)
    REPLACED[place](type(model), fused)
    assert fused(images()) == images().sum()


@pytest.mark.parametrize("owner", ["Base", "Net"])
def test_a_replaced_method_of_many_arguments_gets_them(load, owner):
    module, _ = load(
        """
def forward(self, x, /, a, b=2, *rest, c, d=4, **others):
    x = self.relu(self.bn1(self.conv1(x)))
    return self.head(x), (a, b, rest, c, d, others)

Base.forward = forward

class Net(Base):
    pass
"""
    )
    model = make(module)
    fused = fused_copy(model, ("conv1-bn1-relu",))
    args, kwargs = (images(), 1, 7, 8, 9), {"c": 3, "e": 5}
    assert fused(*args, **kwargs)[1] == model(*args, **kwargs)[1] == (1, 7, (8, 9), 3, 4, {"e": 5})
    getattr(module, owner).forward = lambda self, *args, **kwargs: (args, kwargs)
    assert "was given another forward" in resnet_fused.report(fused).left[0].reason
    assert fused(*args, **kwargs) == (args, kwargs)


class Counting(nn.BatchNorm2d):
    def forward(self, x):
        self.num_batches_tracked += 100
        return super().forward(x)


def with_class_attribute(model):
    type(model).relu = nn.Tanh()  # found before the child of that name


CHANGES = {
    "no norm": lambda m: delattr(m, "bn1"),
    "no ReLU, behind a norm with effects": lambda m: (setattr(m, "bn1", Counting(4).double()), delattr(m, "relu")),
    "no pool": lambda m: delattr(m, "maxpool"),
    "None": lambda m: setattr(m, "relu", None),
    "a pool that is None": lambda m: setattr(m, "maxpool", None),
    "another activation": lambda m: setattr(m, "relu", nn.Sigmoid()),
    "another pool": lambda m: setattr(m, "maxpool", nn.AvgPool2d(2)),
    "a function": lambda m: (delattr(m, "maxpool"), m.__dict__.update(maxpool=lambda x: x * 2)),
    "a class attribute": with_class_attribute,
    "a Sequential": lambda m: setattr(m, "conv1", nn.Sequential(m.conv1)),
    "an empty Sequential": lambda m: setattr(m, "conv1", nn.Sequential()),
    "other channels": lambda m: setattr(m, "bn1", nn.BatchNorm2d(5).double()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("methods", [PLAIN, FORMS["nested"][0]], ids=["statements", "nested"])
def test_children_changed_after_fuse(load, change, methods):
    model = model_of(load, methods)
    fused = fused_copy(model)
    for each in (model, fused):
        CHANGES[change](each)
    resnet_fused.report(fused)
    got, want = outcome(lambda: fused(images())), outcome(lambda: model(images()))
    if isinstance(want, torch.Tensor):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    else:
        assert (got[0], re.sub("Fused", "", got[1])) == want
    assert_same(fused.state_dict(), model.state_dict(), 1e-8, 1e-8)


def test_fusing_again_after_a_change_takes_what_is_there(load):
    model = model_of(load, PLAIN)
    fused = fused_copy(model)
    for each in (model, fused):
        each.maxpool, each.conv1 = (
            nn.AvgPool2d(2),
            nn.Sequential(each.conv1, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)),
        )
        each.double()
        each.conv1[3].load_state_dict(model.conv1[3].state_dict())
    assert [row.what for row in resnet_fused.report(resnet_fused.fuse(fused)).fused] == ["conv1-bn1-relu"]
    assert_same(observe(fused, images()), observe(model, images()), 1e-8, 1e-8)
    fused.relu = nn.GELU()
    assert "call fuse() again" in resnet_fused.report(fused).left[0].reason
    resnet_fused.fuse(fused)
    assert type(fused) is type(model)


@pytest.mark.parametrize("form", FORMS)
def test_fx_traces_stocks_graph(load, form):
    model = model_of(load, FORMS[form][0]).eval()
    fused = fused_copy(model, (FORMS[form][1],))
    want, got = torch.fx.symbolic_trace(model), torch.fx.symbolic_trace(fused)
    assert [str(node) for node in got.graph.nodes] == [str(node) for node in want.graph.nodes]
    assert [node.target for node in got.graph.nodes] == [node.target for node in want.graph.nodes]
    assert torch.equal(got(images()), want(images()))


def test_compiles_in_one_graph_with_the_stem_fused(load):
    model = model_of(load, PLAIN).eval()
    fused = fused_copy(model)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fused, fullgraph=True, backend=backend)(images()), model(images()))
    assert seen and not any("batch_norm" in target for target in seen)


def test_the_compilers_warnings_are_not_repeated(load, recwarn):
    model = model_of(load, textwrap.dedent(PLAIN) + 'def other(self):\n    return "\\d" if 1 is 2 else 3\n')
    recwarn.clear()
    fused_copy(model)
    assert not recwarn.list
