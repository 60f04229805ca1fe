"""Activations other than ReLU that a traced forward calls as functions or methods."""

from __future__ import annotations

from torch import fx

from ..blocks.layers import gelu, leaky_relu
from ..ops import activation
from ..steps import Act
from .outside import called

#: By the name of the function: the parameters behind the first, with what they are by default.
_PARAMETERS = {
    "silu": {"inplace": False},
    "hardswish": {"inplace": False},
    "relu6": {"inplace": False},
    "gelu": {"approximate": "none"},
    "leaky_relu": {"negative_slope": 0.01, "inplace": False},
}
_PLAIN = {"silu": activation.SILU, "hardswish": activation.HARDSWISH, "relu6": activation.RELU6}


def read(node: fx.Node | None) -> Act | None:
    """What a node computes; None where it is no such activation, or not of one value with constants."""
    name = "" if node is None or node.op != "call_function" else called(node)
    parameters = _PARAMETERS.get(name)
    if parameters is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    given = dict(zip(parameters, node.args[1:], strict=False)) | node.kwargs
    if len(node.args) > 1 + len(parameters) or not given.keys() <= parameters.keys():
        return None
    settings = parameters | given
    if (
        any(isinstance(value, fx.Node) for value in settings.values())
        or type(settings.get("inplace", False)) is not bool
    ):
        return None
    if name == "gelu":
        return gelu(settings["approximate"])
    return leaky_relu(settings["negative_slope"]) if name == "leaky_relu" else Act(_PLAIN[name])
