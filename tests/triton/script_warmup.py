"""Compile launches in worker processes, then take them through Triton's own launch in this one; print what was cached.

Run by test_warmup.py in a process of its own, where Triton does not interpret.
"""

import dataclasses
import json

import torch
import triton

from resnet_fused.backends import cards
from resnet_fused.backends import triton as room
from resnet_fused.backends.selfcheck import cases, draws
from resnet_fused.backends.triton import common, compile

CPU = torch.device("cpu")


def launches_of(op, dtype, card):
    case = draws.place(cases.one(op, dtype), dtype, CPU)
    return case, room.kernels()[op].launches(case.args, case.kwargs, card)


def main():
    card, found, cases = cards.Card(90), [], []
    for op, dtype in (("bn_coefficients", torch.float32), ("lazy_grad_apply", torch.bfloat16)):
        case, launches = launches_of(op, dtype, card)
        cases.append((op, case))
        found += launches
    first = compile.compile_all(found, 90, workers=2)
    broken = dataclasses.replace(found[0], named=found[0].named | {"BLOCK_C": 3})
    second = compile.compile_all([*found, broken], 90, workers=1)
    hits = []
    triton.knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
    triton.runtime.driver.set_active(compile.NamesItsTarget(90))

    def start(kernel, programs, *args, warps=common.NUM_WARPS, stages=common.NUM_STAGES, registers=None, **meta):
        """As a real launch, but for the launch."""
        options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
        kernel.warmup(*args, **meta, **options, enable_fp_fusion=common.ENABLE_FP_FUSION, grid=(programs,))

    common.start = start
    for op, case in cases:
        room.importlib.import_module(f"{room.__name__}.{op}").run(*case.args, **case.kwargs)
    rows = {"first": first, "second": [done for done in second if not done.error]}
    rows["failed"] = [done for done in second if done.error]
    told = {name: [(done.kernel, done.cached, done.error) for done in row] for name, row in rows.items()}
    print(json.dumps(told | {"hits": hits}))


if __name__ == "__main__":
    main()
