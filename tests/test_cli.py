"""The command line as a user runs it: in a process of its own where that matters, else in this one, for the seconds
that a process takes to import torch.
"""

import contextlib
import io
import json
import subprocess
import sys

import pytest
import torch

from resnet_fused.backends import Backend, Kernel, dispatch, reference
from resnet_fused.backends.triton import compile
from resnet_fused.bench import named, runs
from resnet_fused.bench.errors import Refused
from resnet_fused.bench.options import DTYPES
from resnet_fused.bench.peers import fused
from resnet_fused.bench.records import Report
from resnet_fused.cli import main, parser, verify
from resnet_fused.ops import DATA_DTYPES
from resnet_fused.plan import measured, timing

pytestmark = pytest.mark.plans_small  # as a process

TINY = ["--model", "resnet18", "--quick", "--size", "64", "--batch", "2"]


def in_a_process(*arguments):
    """Run ``python -m resnet_fused`` with `arguments`."""
    command = [sys.executable, "-m", "resnet_fused", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def resnet_fused(*arguments):
    """The same without a process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def test_info():
    ran = in_a_process("info")
    assert ran.returncode == 0, ran.stderr
    assert "| reference | available |" in ran.stdout
    assert "norm_add_relu_backward" in ran.stdout


def test_info_json():
    found = json.loads(resnet_fused("info", "--json").stdout)
    assert {"versions", "machine", "built", "libraries", "backends", "ops"} <= found.keys()
    for served in found["ops"].values():
        assert served.keys() == found["backends"].keys()
        assert served["reference"] == "yes"


def test_explain():
    ran = resnet_fused("explain", "resnet18", "--input", "2,3,64,64")
    assert ran.returncode == 0, ran.stderr
    assert "| layer1.0    | 64x16x16 |" in ran.stdout
    assert "| whole model |" in ran.stdout


def test_explain_takes_each_dtype_of_the_ops():
    assert set(DTYPES.values()) == set(DATA_DTYPES)
    for name, words in (("bf16", "Under autocast to bfloat16,"), ("f16", "Under autocast to float16,")):
        ran = resnet_fused("explain", "resnet18", "--input", "2,3,32,32", "--dtype", name, "--device", "h100")
        assert ran.returncode == 0 and words in ran.stdout, ran.stderr


def test_explain_takes_what_bench_and_tune_take(tmp_path):
    old = resnet_fused("explain", "resnet18", "--input", "2,3,64,64", "--device", "h100")
    file = tmp_path / "figures.json"
    options = ("--model", "resnet18", "--batch", "2", "--size", "64", "--device", "h100", "--json", str(file))
    new = resnet_fused("explain", *options)
    assert (new.returncode, new.stdout) == (0, old.stdout), new.stderr
    found = json.loads(file.read_text())
    assert found["device"] == "H100 SXM" and found["predicted_seconds"]["H100 SXM"]["fused"]["low"] > 0
    fused = found["predicted_seconds"]["H100 SXM"]["fused"]
    assert fused["low"] < fused["high"] == fused["host"], "so small a step waits for its host"
    assert found["model"]["input"] == [2, 3, 64, 64] and len(found["blocks"]) == 8


def test_commands_share_their_arguments():
    """In flags and spelling; those that plan a GPU's step take another batch and dtype where none is named."""
    commands = parser()._subparsers._group_actions[0].choices
    own = {
        "bench": {"--quick", "--peers", "--json", "--plot", "--fresh", "--record"},
        "tune": set(),
        "explain": {"--input", "--eval", "--json"},
        "verify": {"--eval", "--json"},
        "warmup": {"--eval", "--workers", "--device-capability"},
    }  # fmt: skip
    found = {}
    for name, more in own.items():
        actions = {(*action.option_strings, action.metavar): action for action in commands[name]._actions}
        shared = {key: (a.dest, a.type, a.choices) for key, a in actions.items() if key[0] not in more}
        found[name] = shared
        assert {"--model", "--batch", "--size", "--dtype", "--device", "MODEL"} <= {key[0] for key in shared}
        batch, dtype = (256, "bf16") if name in ("verify", "warmup") else (16, "f32")
        assert f"(default {batch})" in commands[name].format_help()
        assert commands[name].get_default("dtype") == ("" if name == "verify" else dtype)  # "": every one
    assert all(shared == found["bench"] for shared in found.values())


@pytest.mark.slow
def test_verify():
    ran = resnet_fused("verify", "--device", "cpu")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.rstrip().endswith("all within their limits")
    assert "Bottleneck, 8 groups, bf16" in ran.stdout


def test_verify_fails_on_a_wrong_kernel(monkeypatch):
    kernel = reference.BACKEND.kernels["gram"]

    def wrong(*args):
        gram, total = kernel.run(*args)
        return gram * 1.001, total

    alone = Backend("reference", ("cpu",), {"gram": Kernel(wrong, kernel.dtypes)})
    monkeypatch.setattr(dispatch, "_backends", {"reference": alone})
    monkeypatch.setattr(verify, "BLOCKS", {})
    ran = resnet_fused("verify", "--device", "cpu")
    assert ran.returncode == 1, ran.stderr
    assert "FAILED" in ran.stdout
    assert "reference gram (float32)" in ran.stdout


@pytest.mark.slow
def test_bench(tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    files = tmp_path / "rows.json", tmp_path / "bars.png"
    outputs = "--json", str(files[0]), "--plot", str(files[1]), "--record", str(tmp_path)
    ran = in_a_process("bench", *TINY, "--device", "cpu", *outputs)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("| measurement | eager ms (q10-q90) | fused ms (q10-q90) |")
    report = json.loads(files[0].read_text())
    assert report["schema"] == 1
    assert report["provenance"]["model"] == "resnet18"
    (recorded,) = runs.read(tmp_path)
    assert recorded.result == Report.from_json(files[0].read_text())
    assert recorded.provenance["command"].endswith(f"--json rows.json --plot bars.png --record {tmp_path.name}")
    names = {(row["name"], row["unit"], row["peer"]) for row in report["rows"]}
    for name in ("training step, batch 2", "training backward, batch 2", "evaluation, batch 1", "evaluation, batch 4"):
        assert {(name, "ms", "eager"), (name, "ms", "fused")} <= names
    assert any(name.startswith("layer2.0 [2, 64, 16, 16]") for name, _, _ in names)
    for row in report["rows"]:
        assert row["q10"] <= row["median"] <= row["q90"]
        assert row["n"] >= (3 if row["unit"] == "ms" else 1)
    saved = {row["peer"]: row["median"] for row in report["rows"] if row["unit"] == "MB" and "training" in row["name"]}
    assert saved["fused"] < saved["eager"]
    assert all(row["fused"] <= row["limit"] for row in report["equality"])
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_bench_fails_when_the_numbers_disagree(monkeypatch):
    pytest.importorskip("skimage")
    right = fused.prepare

    def wrong(model):
        with torch.no_grad():
            model.layer3[0].bn2.bias += 0.01
        return right(model)

    monkeypatch.setattr(fused, "prepare", wrong)
    ran = resnet_fused("bench", *TINY, "--device", "cpu")
    assert ran.returncode == 1, ran.stderr
    assert "fused and stock disagree in" in ran.stderr
    assert "output in training: fused error" in ran.stderr
    assert ran.stdout == ""


@pytest.fixture
def fake_clock(tmp_path, monkeypatch):
    """Choices are kept in `tmp_path`, and decided by this instead of by time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(timing, "milliseconds", lambda step, device: 1.0 + step.args[0].gram_shortcut)
    measured.forget()
    yield
    measured.forget()


def test_tune(tmp_path, fake_clock):
    ran = resnet_fused("tune", "resnet18", "--batch", "2", "--size", "32", "--device", "cpu")  # no --model
    assert ran.returncode == 0, ran.stderr
    row = next(
        line
        for line in ran.stdout.splitlines()
        if "3x3 64>128 /2, norm, relu, 3x3 128>128, norm, 1x1 64>128 /2, norm, 4 + 6, relu" in line
    )
    assert [cell.strip() for cell in row.split("|")][2:6] == ["2x64x8x8", "1", "plain join, shortcut plain join", "1"]
    assert "(measured)" in ran.stderr
    (file,) = (tmp_path / "resnet_fused" / "plans").iterdir()
    assert f"Kept in {file}" in ran.stdout


def test_warmup_compiles_for_a_gpu_that_is_elsewhere(monkeypatch):
    pytest.importorskip("triton")

    def compile_all(launches, arch, workers, tell):
        done = [compile.Done(launch.kernel.fn.__name__, 0.1, error="no luck") for launch in compile.different(launches)]
        for each in done:
            tell(each, len(done))
        return done

    monkeypatch.setattr(compile, "compile_all", compile_all)
    ran = resnet_fused("warmup", "resnet50", "--batch", "8", "--device", "h100")
    assert ran.returncode == 1, ran.stderr
    first, *failures = ran.stdout.splitlines()
    assert first.startswith(f"{len(failures)} Triton kernels, 0 of them compiled") and len(failures) > 50
    assert "  does not compile: conv1x1_backward_kernel: no luck" in failures


def test_verify_names_the_kernels_of_a_model(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(verify, "BLOCKS", {})
    monkeypatch.setattr(verify, "check_all", lambda device, dtype: [])
    ran = resnet_fused("verify", "resnet50", "--batch", "8", "--device", "cpu")
    assert ran.returncode == 0, ran.stderr
    checked, of, the, wanted = ran.stdout.split()[:4]
    assert (of, the) == ("of", "the") and checked == wanted and int(wanted) > 40
    assert "would be checked, but none runs on cpu" in ran.stdout


@pytest.mark.parametrize(("name", "size"), [("inception_v3", 299), ("maskrcnn_resnet50_fpn", 64)])
def test_models_that_make_no_tensor_are_refused_and_download_nothing(monkeypatch, name, size):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    model = named.build(f"torchvision:{name}")
    with pytest.raises(Refused, match=r"no tensor|does not take an input of 2x3"):
        named.require_taken(model.train(), (2, 3, size, size))


def test_unknown_timm_model_suggests():
    ran = resnet_fused("explain", "timm:resnet5")
    assert ran.returncode == 2
    assert len(ran.stderr.strip().splitlines()) == 1
    assert "timm has no model 'resnet5'; close are" in ran.stderr
