"""Compiling beforehand: what is compiled, where, and that a launch finds it."""

import pytest
import torch
from triton_processes import rows_of

import resnet_fused
from resnet_fused.backends import cards
from resnet_fused.backends import triton as room
from resnet_fused.backends.triton import compile
from resnet_fused.models import BasicBlock, Bottleneck
from resnet_fused.plan import devices
from resnet_fused.traffic import warmup as warming
from resnet_fused.traffic.calls import calls


def test_a_launch_finds_what_workers_compiled(tmp_path):
    (told,) = rows_of("script_warmup.py", tmp_path)
    names = {"bn_coefficients_kernel", "lazy_grad_apply_kernel"}
    assert {tuple(done) for done in told["first"]} == {(name, False, "") for name in names}
    assert {tuple(done) for done in told["second"]} == {(name, True, "") for name in names}
    assert told["hits"] == [True, True], "a launch compiled again"
    ((kernel, cached, error),) = told["failed"]
    assert kernel == "bn_coefficients_kernel" and not cached and error.startswith("CompilationError")


@pytest.fixture
def compiled(monkeypatch):
    """Instead of compiling: the binaries that would be, by architecture."""
    noted = {}

    def note(launches, arch, workers, tell):
        different = compile.different(launches)
        noted.setdefault(arch, set()).update(launch.binary for launch in different)
        done = [
            compile.Done(launch.kernel.fn.__name__, 1.0, cached=index == 0) for index, launch in enumerate(different)
        ]
        for each in done:
            tell(each, len(done))
        return done

    monkeypatch.setattr(compile, "compile_all", note)
    return noted


def test_everything_that_a_step_starts_is_compiled(compiled):
    model, x = Bottleneck(256, 64), torch.empty(64, 256, 56, 56, device="meta", dtype=torch.bfloat16)
    warmed = resnet_fused.warmup(model, x, capability=90)
    assert warmed.kernels == len(compiled[90]) == warmed.compiled + 1 > 20  # one of them was compiled before
    started = set()
    for call in calls(model, x, True, devices.find("h100"), torch.bfloat16):
        if call.op in room.kernels():
            started |= {launch.binary for launch in room.kernels()[call.op].launches(call.args, {}, cards.H100)}
    assert len(started) > 10 and started <= compiled[90]
    assert type(model) is Bottleneck and model.conv1.weight.dtype == torch.float32, "touched the model"


def test_an_evaluation_and_another_architecture(compiled):
    model, x = BasicBlock(64, 64), torch.empty(64, 64, 56, 56, device="meta", dtype=torch.bfloat16)
    resnet_fused.warmup(model, x, capability=80)
    resnet_fused.warmup(model.eval(), x, capability=120)
    assert len(compiled[80]) > len(compiled.get(120, ()))


def test_without_a_gpu_it_says_what_to_pass():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="pass capability, e"):
        resnet_fused.warmup(BasicBlock(64, 64), torch.empty(1, 64, 8, 8))


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_of_a_machine_compiles_and_the_others_wait(monkeypatch, compiled, rank):
    order = []
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank + 8)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: order.append(("barrier", len(compiled))))
    x = torch.empty(4, 64, 8, 8, device="meta", dtype=torch.bfloat16)
    warmed = resnet_fused.warmup(BasicBlock(64, 64), x, capability=90)
    assert order == [("barrier", 1 - rank)], "the barrier comes after compiling"
    assert (warmed.kernels > 0) == (rank == 0)


def test_progress_is_told(monkeypatch, capsys):
    now = iter(range(0, 100, 3))
    monkeypatch.setattr(warming.time, "perf_counter", lambda: next(now))
    lines = warming._Lines()
    for _ in range(4):
        lines(None, 4)
    assert capsys.readouterr().err.splitlines()[0] == "resnet_fused: compiled 2 of 4 Triton kernels"
