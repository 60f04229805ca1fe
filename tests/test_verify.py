"""What the command ``verify`` selects, without running it."""

import pytest
import torch

from resnet_fused.cli import main, verify


@pytest.mark.parametrize(
    ("dtype", "kernels", "blocks"), [("f32", "float32", "f32"), ("bf16", "bfloat16", "bf16"), (None, None, None)]
)
def test_verify_selects_a_dtype(monkeypatch, dtype, kernels, blocks):
    checked, compared = [], []
    monkeypatch.setattr(verify, "check_all", lambda device, dtype: checked.append(dtype) or [])
    monkeypatch.setattr(
        verify.equality, "check_block", lambda *pair_block_cast: compared.append(pair_block_cast[2:]) or []
    )
    assert main(["verify", "--device", "cpu", *(["--dtype", dtype] if dtype else [])]) == 0
    assert checked == [kernels and getattr(torch, kernels)]
    casts = {block.name.rpartition(", ")[2]: cast for block, cast in compared}
    every = {"f32": None, "bf16": torch.bfloat16, "f16": torch.float16}
    assert casts == ({blocks: every[blocks]} if blocks else every)
