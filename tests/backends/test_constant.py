"""Importing the package does not import PyTorch's compiler, and a graph keeps what it should all the same."""

import subprocess
import sys

import torch

from resnet_fused.backends.constant import constant_in_graphs


def test_the_mark_is_pytorchs():
    def ours():
        pass

    def theirs():
        pass

    assert constant_in_graphs(ours) is ours
    assert torch.compiler.assume_constant_result(theirs) is theirs
    assert vars(ours) == vars(theirs) != {}


def test_the_compiler_is_not_imported():
    code = "import sys, resnet_fused; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
