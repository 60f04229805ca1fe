"""`Lazy`, `LazyGrad` and the steps that chains are made of, each with its forward and backward."""

from .lazy import Lazy, LazyGrad
from .spec import Chain, Conv, Norm, Pool, Step, StepGrads, StepTensors, flatten, regroup

__all__ = [
    "Chain",
    "Conv",
    "Lazy",
    "LazyGrad",
    "Norm",
    "Pool",
    "Step",
    "StepGrads",
    "StepTensors",
    "flatten",
    "regroup",
]
