"""What the command line says of arguments that it cannot take: one line."""

import subprocess
import sys

import pytest

from resnet_fused.cli import main

MISTAKES = {
    "no command": ([], "info | verify | warmup | bench | explain"),
    "unknown command": (["train"], "'train' (choose from"),
    "unknown model": (["bench", "--model", "resnet51"], "unknown model 'resnet51'; pass one of resnet18"),
    "unknown source": (["explain", "keras:resnet50"], "timm:NAME, or torchvision:NAME"),
    "unknown dtype": (["bench", "--dtype", "fp8"], "'fp8' (choose from"),
    "unknown device": (["bench", "--device", "tpu"], "unknown device 'tpu'; pass cpu, cuda or cuda:N"),
    "unknown peer": (["bench", "--peers", "tvm"], "unknown peer 'tvm'; accepted are compile"),
    "no input size": (["explain", "resnet18", "--input", "224"], "pass N,C,H,W, e.g. 16,3,224,224"),
    "unknown device to plan for": (
        ["explain", "--device", "tpu"],
        "unknown device 'tpu'; pass cpu, cuda, cuda:N, a100, h100, h200, b200 or rtx4090",
    ),
    "two models": (["explain", "resnet18", "--model", "resnet34"], "two models, 'resnet18' and 'resnet34'; pass one"),
    "size given twice": (["explain", "--input", "2,3,64,64", "--size", "32"], "pass it, or --batch and --size"),
    "no batch to plan": (["explain", "--batch", "0"], "'0' is not a positive number"),
    "no batch": (["bench", "--batch", "-3"], "not a positive number"),
    "unknown part": (["gpu-report", "--parts", "weather"], "unknown part 'weather'; pass some of environment"),
    "no minutes": (["gpu-report", "--minutes", "-1"], "not a positive number of minutes"),
    "nowhere to record": (["bench", "--record", "/no/such"], "no folder that can be written to; pass benchmarks"),
    "no such directory": (["bench", "--json", "/no/such/directory/x.json"], "a file in a directory that exists"),
    "no capability": (["warmup", "resnet50", "--device-capability", "hopper"], "pass one such as 9.0"),
    "capability given twice": (
        ["warmup", "--device", "h100", "--device-capability", "9.0"],
        "both say what to compile for; pass one",
    ),
    "nothing to warm up": (["warmup", "--device", "cpu"], "not for cpu; pass a GPU, or --device-capability, e.g. 9.0"),
    "no model to verify": (["verify", "--batch", "8"], "name the model too"),
    "too small": (["explain", "resnet18", "--batch", "1", "--size", "1"], "an input of 1x3x1x1: Expected more than 1"),
    "too small to bench": (["bench", "resnet18", "--batch", "1", "--size", "8"], "an input of 1x3x8x8: Expected more"),
    "too small to tune": (["tune", "resnet18", "--batch", "1", "--size", "8", "--device", "cpu"], "see --size"),
    "too small to warm up": (["warmup", "resnet18", "--batch", "1", "--size", "8", "--device", "H100"], "see --size"),
    "cannot be written": (["explain", "resnet18", "--json", "/proc/x.json"], "a file in a directory that exists"),
    "no GPU to warm up": (["warmup", "resnet18", "--device", "cuda:7"], "pass --device-capability, e.g. 9.0,"),
    "no picture": (["bench", "--plot", "x.txt"], ".png, .svg or .pdf"),
}


#: What argparse refuses, what a command does, and what a model's first run does.
IN_A_PROCESS = ("no command", "unknown model", "too small to tune")
NOT_SHOWN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)  # by a process, by default


def is_one_line(code, out, err, expected):
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert expected in err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake, capfd, recwarn):
    """And nothing is warned of beside it; in this process, as a new one takes seconds to find its first mistake."""
    arguments, expected = MISTAKES[mistake]
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code
    is_one_line(code, *capfd.readouterr(), expected)
    assert [w.message for w in recwarn if not issubclass(w.category, NOT_SHOWN)] == []


@pytest.mark.parametrize("mistake", IN_A_PROCESS)
def test_mistakes_end_a_process_with_one_line(mistake):
    arguments, expected = MISTAKES[mistake]
    command = [sys.executable, "-m", "resnet_fused", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    is_one_line(ran.returncode, ran.stdout, ran.stderr, expected)
