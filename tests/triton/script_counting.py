"""Count the bytes that every Triton op loads and stores, in the interpreter; print one JSON row for each call.

Run by test_counting.py in a process of its own, where TRITON_INTERPRET=1. Every load and store of the
interpreter passes through `Counter`, which notes the addresses under the mask, launch by launch and buffer by buffer:

* unique bytes: each byte of a buffer once per launch that reads it and once per launch that writes it. That is the
  DRAM traffic of a GPU whose L2 serves what a launch reads again, and what ``OPS[op].bytes()`` promises.
* issued bytes: every element of every access. Their excess over the unique ones is what L1 and L2 have to serve.

Buffers are told apart by what the caller sees of them: "tensors" are arguments and results of two dimensions or more,
"vectors" those of one (a gate's factors are [N, C]), "workspace" is what an op allocates for itself. An address outside
of all of them is an error.
"""

import contextlib
import dataclasses
import importlib
import json

import numpy
import quick_interpreter
import torch
from layer_calls import Layer, calls
from triton.runtime.interpreter import InterpreterBuilder

from resnet_fused.backends import triton as room
from resnet_fused.backends.triton import common
from resnet_fused.ops import OPS

WAYS = ("read", "written")


# Counting -------------------------------------------------------------------------------------------------------


class Buffer:
    """The memory of one storage in one launch: which bytes were read and written, and how many were asked for."""

    def __init__(self, t):
        self.tensor = t  # kept alive: no later tensor may come to lie there while addresses are compared
        storage = t.untyped_storage()
        self.start, self.size, self.key = storage.data_ptr(), storage.nbytes(), storage._cdata
        self.touched = {way: numpy.zeros(self.size if self.start else 0, bool) for way in WAYS}
        self.issued = dict.fromkeys(WAYS, 0)

    def note(self, way, addresses, itemsize):
        """One access of `itemsize` bytes at each of `addresses`, all of which must lie inside."""
        at = addresses.astype(numpy.int64) - self.start
        assert at.min() >= 0 and at.max() + itemsize <= self.size, f"{way} outside of its tensor"
        for byte in range(itemsize):
            self.touched[way][at + byte] = True
        self.issued[way] += at.size * itemsize


@dataclasses.dataclass
class Launch:
    """One start of a kernel: sizes, blocks and options by name, and the buffer of each pointer by name."""

    kernel: str
    programs: int
    sizes: dict
    buffers: dict


def launch_of(kernel, programs, args, meta):
    given = dict(zip(kernel.arg_names, args, strict=False)) | meta
    buffers, by_storage = {}, {}
    for name, t in given.items():
        if isinstance(t, torch.Tensor):
            key = t.untyped_storage()._cdata
            by_storage[key] = by_storage.get(key) or Buffer(t)
            buffers[name] = by_storage[key]
    return Launch(kernel.fn.__name__, programs, {n: v for n, v in given.items() if isinstance(v, int)}, buffers)


class Counter:
    """While it is entered, `launches` grows; with `run` False the kernels are only noted, as for meta tensors."""

    def __init__(self, run=True):
        self.run, self.launches, self._stack = run, [], contextlib.ExitStack()

    def __enter__(self):
        start, load, store = common.start, InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counted_start(kernel, programs, *args, **meta):
            self.launches.append(launch_of(kernel, programs, args, meta))
            if self.run:
                start(kernel, programs, *args, **meta)

        def counted_load(builder, ptrs, mask, *rest):
            self._note("read", ptrs, mask)
            return load(builder, ptrs, mask, *rest)

        def counted_store(builder, ptrs, value, mask, *rest):
            self._note("written", ptrs, mask)
            return store(builder, ptrs, value, mask, *rest)

        self._replace(common, "start", counted_start)
        self._replace(InterpreterBuilder, "create_masked_load", counted_load)
        self._replace(InterpreterBuilder, "create_masked_store", counted_store)
        return self

    def __exit__(self, *error):
        self._stack.close()

    def _replace(self, owner, name, value):
        self._stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def _note(self, way, ptrs, mask):
        addresses = ptrs.data[mask.data]
        if addresses.size:
            launch, first = self.launches[-1], int(addresses.flat[0])
            home = [b for b in launch.buffers.values() if b.start <= first < b.start + b.size]
            assert home, f"{launch.kernel}: {way} outside of every tensor"
            home[0].note(way, addresses, ptrs.get_element_ty().primitive_bitwidth // 8)


# Running --------------------------------------------------------------------------------------------------------


def count(op, args, kwargs, run):
    """The launches of one call as dictionaries, each buffer with its kind, size, unique and issued bytes."""
    module = importlib.import_module(f"{room.__name__}.{op}")
    with Counter(run) as counter:
        results = module.run(*args, **kwargs)
    results = [results] if isinstance(results, torch.Tensor) else results or ()
    seen = [t for t in (*args, *kwargs.values(), *results) if isinstance(t, torch.Tensor)]
    most = 2 if op.startswith("gate_") else 1
    kinds = {t.untyped_storage()._cdata: "vectors" if t.dim() <= most else "tensors" for t in seen}
    launches = []
    for launch in counter.launches:
        buffers = {}
        for name, b in launch.buffers.items():
            if b not in (other for other, _ in buffers.values()):
                ways = {way: [int(b.touched[way].sum()), b.issued[way]] for way in WAYS}
                buffers[name] = b, {"kind": kinds.get(b.key, "workspace"), "size": b.size, **ways}
        described = {name: row for name, (_, row) in buffers.items()}
        launches.append(
            {"kernel": launch.kernel, "programs": launch.programs, "sizes": launch.sizes, "buffers": described}
        )
    return launches


LAYERS = {
    "toy": Layer(2, 16, 64, 256, device="cpu"),  # several programs and splits of each kernel
    "odd": Layer(3, 5, 33, 65, device="cpu"),
    "56x56": Layer(256, 56, 64, 256),
    "7x7": Layer(256, 7, 512, 2048),
}


def main():
    quick_interpreter.install()
    for layer, at in LAYERS.items():
        for op, options, args, kwargs in calls(at):
            row = {"layer": layer, "op": op, "options": options, "declared": OPS[op].bytes(*args, **kwargs)}
            row["launches"] = count(op, args, kwargs, run=at.device == "cpu")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
