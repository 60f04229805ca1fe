"""The pytest plugin of ``timm_tests.py``: each test runs twice, with models as timm makes them and fused.

In quick runs the fused side comes first, and the stock side runs only where the fused one did not pass.
"""

from __future__ import annotations

import ast
import fnmatch
import json
import re
import warnings

import pytest
import torch

import resnet_fused
from resnet_fused.blocks import plan
from resnet_fused.testing.vision import import_torchvision

import_torchvision()  # before timm's tests import it

SIDE = re.compile(r"-?side:(stock|fused)-?")
#: Tensors that differ by less, relative to the largest value, differ in rounding.
ROUNDING = 1e-3
REASON = 300  # characters of a reason
_passed_fused: set[str] = set()  # tests of this process


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resnet_fused")
    group.addoption("--fused-log", default="")
    group.addoption("--fused-filter", action="append", default=[])
    group.addoption("--fused-max-parameters", type=float, default=0.0)
    group.addoption("--fused-quick", action="store_true")


def pytest_configure(config: pytest.Config) -> None:
    for name in ("base", "cfg", "torchscript", "features", "fxforward", "fxbackward", "timeout"):
        config.addinivalue_line("markers", f"{name}: timm's")


def test_and_side(node_id: str) -> tuple[str, str]:
    """The name of a test without what this plugin and pytest-xdist add to it, and the side it runs."""
    name = node_id.partition("]@")[0] + "]" if "]@" in node_id else node_id
    found = SIDE.search(name)
    if found is None:
        raise ValueError(f"{node_id} names no side")
    inner = "-" if found[0].startswith("-") and found[0].endswith("-") else ""
    return SIDE.sub(inner, name).replace("[]", ""), found[1]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the models asked for; the two sides of a test run one after the other in the same process."""
    wanted, kept = config.getoption("--fused-filter"), []
    for item in items:
        name = item.callspec.params.get("model_name", "")
        if not wanted or any(fnmatch.fnmatch(name, pattern) for pattern in wanted):
            kept.append(item)
            item.add_marker(pytest.mark.xdist_group(test_and_side(item.nodeid)[0]))
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = sorted(kept, key=lambda item: test_and_side(item.nodeid))  # fused comes before stock


@pytest.fixture(autouse=True, params=["fused", "stock"], ids="side:{}".format)
def side(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Put our ``create_model`` in the place of timm's, in the test's module and in timm."""
    import timm

    name, quick = test_and_side(request.node.nodeid)[0], request.config.getoption("--fused-quick")
    if request.param == "stock" and quick and name in _passed_fused:
        pytest.skip("passed fused")
    limit = request.config.getoption("--fused-max-parameters")
    original, properties = timm.create_model, request.node.user_properties

    def create_model(*args, **kwargs):
        if limit and (millions := parameters(original, args, kwargs) / 1e6) > limit:
            pytest.skip(f"{millions:.0f} M parameters")
        model = original(*args, **kwargs)
        if request.param == "stock":
            return model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of models with little or nothing to fuse
            resnet_fused.fuse(model)
        fused = len(resnet_fused.report(model).fused)
        properties.append(("fused", fused))
        if quick and not fused:
            pytest.skip("nothing is fused")
        return model

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(request.module, "create_model", create_model)
    torch.manual_seed(0)
    with plan.fusing_all():  # small as the images are
        yield request.param


def parameters(create, args: tuple, kwargs: dict) -> int:
    """Parameters of a model that is made without its values, where that can be done."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in create(*args, **kwargs).parameters())
    except (RuntimeError, NotImplementedError):  # reads a value while it is made
        return sum(p.numel() for p in create(*args, **kwargs).parameters())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    if call.excinfo is not None and call.excinfo.errisinstance(AssertionError):
        item.user_properties.append(("bitwise", bitwise(call.excinfo.traceback[-1])))
    report = yield
    name, side = test_and_side(item.nodeid)
    if side == "fused" and report.when == "call" and report.passed:
        _passed_fused.add(name)
    return report


def bitwise(entry) -> str:
    """What differs if the assertion that failed at `entry` compares floating point bit by bit; empty if it does not.

    Compared are ``a == b``, ``torch.equal(a, b)`` and any ``allclose`` without tolerance; and only tensors that agree
    to rounding count: a wrong value is no matter of bits.
    """
    try:
        tree = ast.parse(str(entry.statement).strip())
    except SyntaxError:
        return ""
    for node in ast.walk(tree):
        operands = exact_operands(node)
        if operands is None:
            continue
        values = [entry.frame.eval(ast.unparse(operand)) for operand in operands]
        if all(isinstance(value, torch.Tensor) and value.is_floating_point() for value in values):
            a, b = (value.detach().double() for value in values)
            if a.shape == b.shape and a.numel():
                error, largest = float((a - b).abs().max()), float(b.abs().max())
                if 0 < error <= ROUNDING * largest:
                    return f"{ast.unparse(node)}: largest difference {error:.1e} of {largest:.1e}"
    return ""


def exact_operands(node: ast.AST) -> list[ast.expr] | None:
    """The two expressions that `node` compares without tolerance."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq):
        return [node.left, node.comparators[0]]
    if not isinstance(node, ast.Call) or len(node.args) < 2:
        return None
    function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    tolerances = [ast.unparse(k.value) for k in node.keywords if k.arg in ("rtol", "atol")]
    exact = len(tolerances) == 2 and all(float(text) == 0 for text in tolerances)
    if function == "equal" or (function in ("allclose", "assert_close") and exact):
        return node.args[:2]
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Write the log from the process that hears of all tests, also of those that end a worker, as they end."""
    path = session.config.getoption("--fused-log")
    if path and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Log(path))


class Log:
    """One line for every outcome."""

    def __init__(self, path: str) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        test, side = test_and_side(report.nodeid)
        found = dict(report.user_properties)
        row = {"test": test, "side": side, "outcome": report.outcome, "reason": reason_of(report)}
        row |= {"bitwise": found.get("bitwise", ""), "fused": found.get("fused")}
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


def reason_of(report: pytest.TestReport) -> str:
    """Why a test did not pass, in one line."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return " ".join(str(report.longrepr or "").split())[:REASON]
    return f"line {crash.lineno}: " + " ".join(crash.message.split())[:REASON]
