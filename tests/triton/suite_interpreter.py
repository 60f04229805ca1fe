"""What tests/support/quick_interpreter.py leaves out of Triton's interpreter changes no bit.

Not collected by itself: test_interpreter.py runs it in a process with TRITON_INTERPRET=1.
"""

import dataclasses

import pytest
import torch
from triton.language import core
from triton.runtime import interpreter

from resnet_fused.backends.selfcheck.cases import cases
from resnet_fused.backends.selfcheck.draws import place

OPS = ("bn_stats", "norm_add_relu_backward", "norm_act", "conv1x1_dgrad", "conv1x1_wgrad", "norm_relu_pool", "gram")


def results(op, dtype):
    case = place(cases(op, dtype)[0], dtype, torch.device("cpu"))
    found = getattr(torch.ops.resnet_fused_triton, op)(*case.args, **case.kwargs)
    return [t for t in ([found] if isinstance(found, torch.Tensor) else found) if t is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_results_are_those_of_triton_alone(monkeypatch, op, dtype):
    quick = results(op, dtype)
    for name in ("_patch_lang", "_get_np_dtype"):
        monkeypatch.setattr(interpreter, name, getattr(interpreter, name).args[0])
    monkeypatch.setattr(core.block_type, "__init__", core.block_type.__init__.__wrapped__)
    options = interpreter.interpreter_builder.options
    alone_options = dataclasses.replace(options, sanitize_overflow=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", alone_options)
    assert alone_options == type(options)(), "Triton's own"
    alone = results(op, dtype)
    assert len(quick) == len(alone) > 0
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(quick, alone, strict=True))
