"""A backend to inject kernels through, right or wrong, for tests of the self-check."""

import torch

from resnet_fused.backends.declaration import Backend, Kernel
from resnet_fused.backends.selfcheck import draws, judge
from resnet_fused.ops import OPS

CPU = torch.device("cpu")
F32 = torch.float32


class Injected:
    """A backend named "injected", first in line, with one kernel that counts its runs."""

    def __init__(self, op, change=None, build="build 1"):
        self.op, self.runs = op, 0
        self.change = change or (lambda results, *args, **kwargs: results)
        kernel = Kernel(self.run, (F32, torch.bfloat16), needs_selfcheck=True, build=build)
        self.backend = Backend("injected", ("cpu",), {op: kernel})

    def run(self, *args, **kwargs):
        self.runs += 1
        return self.change(OPS[self.op].reference(*args, **kwargs), *args, **kwargs)

    def objection(self, dtype=F32):
        return judge.objection(self.backend, self.op, dtype, CPU)


def files():
    folder = judge.cache_dir()
    return sorted(folder.iterdir()) if folder.exists() else []


def a_bit_off(results, *args, **kwargs):
    mean, *others = results
    return mean * 1.001, *others


def z(dtype=F32):
    return draws.Draw(draws.ODD).data().to(dtype)
