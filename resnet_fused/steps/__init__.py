"""Programs of nodes, and the steps that they are made of, each with its forward and backward."""

from .program import Call
from .residual import residual_program
from .spec import Act, Average, Conv, Norm, Pool, StepTensors

__all__ = ["Act", "Average", "Call", "Conv", "Norm", "Pool", "StepTensors", "residual_program"]
