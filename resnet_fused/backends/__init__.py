"""Who can run the ops. `auto` asks the backends in the order in which this file registers them."""

from . import cpu, cuda, reference, triton
from .declaration import Backend, Kernel
from .dispatch import backends, check_all, check_call, check_name, choose, current, objection, register, run, use

for _module in (triton, cuda, cpu, reference):
    register(_module.BACKEND)

__all__ = [
    "Backend",
    "Kernel",
    "backends",
    "check_all",
    "check_call",
    "check_name",
    "choose",
    "current",
    "objection",
    "register",
    "run",
    "use",
]
