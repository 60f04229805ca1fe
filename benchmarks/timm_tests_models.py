"""Models for ``timm_tests.py``, fused or not, and a look at failures: what processes that run timm's tests do."""

from __future__ import annotations

import ast
import contextlib
import warnings
from collections.abc import Callable
from typing import NoReturn

import pytest
import torch

import resnet_fused
from resnet_fused.plan import choose
from resnet_fused.testing.vision import import_torchvision

import_torchvision()  # before timm's tests import it

#: Tensors that differ by less, relative to the largest value, differ in rounding.
ROUNDING = 1e-3
#: Where a tolerance is given, it may be less than this many units in the last place of the largest value.
ULPS = 8
_sizes: dict[str, float] = {}  # millions of parameters, by the arguments of create_model
_untouched: dict[str, bool] = {}  # by the name of a model


@pytest.fixture(autouse=True)
def replaced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Put our ``create_model`` in the place of timm's, in the test's module and in timm."""
    import timm

    option, original = request.config.getoption, timm.create_model
    limit, quick = option("--fused-max-parameters"), option("--fused-quick")

    def create_model(*args, **kwargs):
        if quick and untouched(original, args[0] if args else kwargs["model_name"]):
            leave_out(request.node, "nothing is fused")
        if limit and (millions := size(original, args, kwargs)) > limit:
            leave_out(request.node, f"{millions:.0f} M parameters")
        model = original(*args, **kwargs)
        if option("--fused-side") == "stock":
            return model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of models with little or nothing to fuse
            resnet_fused.fuse(model)
        fused = len(resnet_fused.report(model).fused)
        request.node.user_properties.append(("fused", fused))
        if quick and not fused:
            leave_out(request.node, "nothing is fused")
        return model

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(request.module, "create_model", create_model)
    torch.manual_seed(0)
    with contextlib.nullcontext() if option("--fused-as-planned") else choose.fusing_all():
        yield


def leave_out(item: pytest.Item, why: str) -> NoReturn:
    """End a test that was not asked for: no outcome of its own."""
    item.user_properties.append(("left_out", why))
    pytest.skip(why)


def without_values(create: Callable[..., torch.nn.Module], *args, **kwargs) -> torch.nn.Module | None:
    """A model of no memory; None of one that reads a value while it is made, which such tensors refuse."""
    try:
        with torch.device("meta"):
            return create(*args, **kwargs)
    except (RuntimeError, NotImplementedError):
        return None


def size(create: Callable[..., torch.nn.Module], args: tuple, kwargs: dict) -> float:
    """Millions of parameters of a model, made without values where that can be done."""
    key = repr((args, kwargs))
    if key not in _sizes:
        model = without_values(create, *args, **kwargs) or create(*args, **kwargs)
        _sizes[key] = sum(p.numel() for p in model.parameters()) / 1e6
    return _sizes[key]


def untouched(create: Callable[..., torch.nn.Module], name: str) -> bool:
    """Whether ``fuse`` leaves every module of a model the class that it was; asked once, of a model without values."""
    if name not in _untouched:
        model = without_values(create, name)
        if model is None:
            return _untouched.setdefault(name, False)
        classes = [type(module) for module in model.modules()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            resnet_fused.fuse(model)
        _untouched[name] = classes == [type(module) for module in model.modules()]
    return _untouched[name]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    if call.excinfo is not None and call.excinfo.errisinstance(AssertionError):
        item.user_properties.append(comparison(call.excinfo.traceback[-1]))
    return (yield)


def comparison(entry) -> tuple[str, str]:
    """What the assertion that failed at `entry` compares and by how much it differs, and under which name to log it.

    "bitwise" where floating point is compared without tolerance, or with one below what its dtype resolves, and agrees
    to rounding; "difference" where it is compared otherwise, or is another value. The text is empty where no tensors of
    one shape are compared.
    """
    try:
        tree = ast.parse(str(entry.statement).strip())
    except SyntaxError:
        return "difference", ""
    for node in ast.walk(tree):
        found = operands(node)
        values = [entry.frame.eval(ast.unparse(operand)) for operand in found[0]] if found else []
        if not values or not all(isinstance(value, torch.Tensor) and value.is_floating_point() for value in values):
            continue
        unit = max(torch.finfo(value.dtype).eps for value in values)
        a, b = (value.detach().double() for value in values)
        if a.shape == b.shape and a.numel() and not torch.equal(a, b):
            error, largest = float((a - b).abs().max()), float(b.abs().max())
            rounding = error <= (ROUNDING if found[1] else ULPS * unit) * largest
            text = f"{ast.unparse(node)}: largest difference {error:.1e} of {largest:.1e}"
            return ("bitwise" if rounding else "difference"), text
    return "difference", ""


def operands(node: ast.AST) -> tuple[list[ast.expr], bool] | None:
    """The two expressions that `node` compares, and whether it does so without tolerance."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq):
        return [node.left, node.comparators[0]], True
    if not isinstance(node, ast.Call) or len(node.args) < 2:
        return None
    function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if function == "equal":
        return node.args[:2], True
    if function not in ("allclose", "assert_close"):
        return None
    given = [*node.args[2:4], *(keyword.value for keyword in node.keywords if keyword.arg in ("rtol", "atol"))]
    exact = len(given) == 2 and all(isinstance(value, ast.Constant) and value.value == 0 for value in given)
    return node.args[:2], exact
