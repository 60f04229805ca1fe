"""Programs of nodes, and the steps that they are made of, each with its forward and backward."""

from .lazy import Lazy, LazyGrad
from .program import Call, Program, residual_program
from .spec import Act, Average, Conv, Norm, Pool, StepGrads, StepTensors, flatten, regroup

__all__ = [
    "Act",
    "Average",
    "Call",
    "Conv",
    "Lazy",
    "LazyGrad",
    "Norm",
    "Pool",
    "Program",
    "StepGrads",
    "StepTensors",
    "flatten",
    "regroup",
    "residual_program",
]
