"""Functions whose answers a traced graph keeps as constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def constant_in_graphs(function: Function) -> Function:
    """Let `function` run when a graph is traced, and the graph keep its answer.

    As ``torch.compiler.assume_constant_result``, which imports all of ``torch._dynamo`` to set this mark: seconds for
    every process that imports this package.
    """
    function._dynamo_marked_constant = True
    return function
