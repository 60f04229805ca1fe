"""A rewritten method is its class's own method: its names, defaults, lines and errors."""

import importlib
import inspect
import textwrap
import traceback

import pytest
import torch
from nets import assert_same, observe
from stems import FORMS, PLAIN, assert_stays_stock, fused_copy, images, make, model_of


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


@pytest.mark.parametrize("form", FORMS)
def test_fx_traces_stocks_graph(load, form):
    model = model_of(load, FORMS[form][0]).eval()
    fused = fused_copy(model, (FORMS[form][1],))
    want, got = torch.fx.symbolic_trace(model), torch.fx.symbolic_trace(fused)
    assert [str(node) for node in got.graph.nodes] == [str(node) for node in want.graph.nodes]
    assert [node.target for node in got.graph.nodes] == [node.target for node in want.graph.nodes]
    assert torch.equal(got(images()), want(images()))


def test_compiles_in_one_graph_with_the_stem_fused(load):
    model = model_of(load, PLAIN).float().eval()
    fused = fused_copy(model)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x = images().float()  # what a CPU folds; other dtypes run as stock there
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fused, fullgraph=True, backend=backend)(x), model(x))
    assert seen and not any("batch_norm" in target for target in seen)


def test_the_compilers_warnings_are_not_repeated(load, recwarn):
    model = model_of(load, textwrap.dedent(PLAIN) + 'def other(self):\n    return "\\d" if 1 is 2 else 3\n')
    recwarn.clear()
    fused_copy(model)
    assert not recwarn.list
