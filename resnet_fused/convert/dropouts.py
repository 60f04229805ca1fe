"""Dropout in a traced forward: a stock call where it draws, and nothing at all where it does not.

A block with dropout between its convolutions has two forms. While it draws, dropout is called where stock calls it,
between the programs before and behind it. In evaluation, or with probability 0, it returns its argument, and the block
is one program as if it were not there (its *quiet* form). Which of both, every call asks the modules.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn

from ..blocks.site import find
from .instructions import Ref
from .outside import called

MODULES = (nn.Dropout, nn.Dropout2d)
_FUNCTIONS = ("dropout", "dropout2d")
#: ``self.training`` as the argument of a function: what the block's is at the call.
TRAINING = "self.training"
_ARGUMENTS = {"p": 0.5, "training": True, "inplace": False}


def arguments(node: fx.Node) -> dict[str, object] | None:
    """The settings of a call of ``F.dropout``; None of all else."""
    if node.op != "call_function" or called(node) not in _FUNCTIONS or len(node.args) > 4:
        return None
    given = dict(zip(_ARGUMENTS, node.args[1:], strict=False)) | node.kwargs
    return _ARGUMENTS | given if given.keys() <= _ARGUMENTS.keys() and node.args else None


def name_training(training: fx.Graph, evaluation: fx.Graph) -> None:
    """Where only a dropout's argument `training` differs between two graphs of one forward, and is ``self.training``.

    Both then have the name of that in its place.
    """
    for node, other in zip(training.nodes, evaluation.nodes, strict=False):
        own, others = arguments(node), arguments(other)
        if own and others and (own["training"], others["training"]) == (True, False):
            for changed, settings in ((node, own), (other, others)):
                changed.args, changed.kwargs = changed.args[:1], settings | {"training": Ref(TRAINING)}


def decided_by(node: fx.Node, module: nn.Module | None) -> str | None:
    """Whose state decides whether a node's dropout draws: a module's, by name, or that of the block, ``""``.

    None where it always does, or is none.
    """
    if type(module) in MODULES:
        return node.target
    settings = arguments(node)
    if settings is None or settings["training"] is True:
        return None
    return "" if settings["training"] == Ref(TRAINING) else None


def are_quiet(block: nn.Module, names: Iterable[str]) -> bool:
    """Whether none of the dropouts that :func:`decided_by` named draws, or raises an error."""
    for name in names:
        module = find(block, name) if name else block
        if name and (type(module) not in MODULES or not 0 <= module.p <= 1):
            return False
        if module.training and (not name or module.p != 0):
            return False
    return True
