"""Verdicts of the first-use check, without a GPU: wrong kernels injected into a backend for the CPU."""

import json
import threading
import warnings

import pytest
import torch
from injected import CPU, F32, Injected, a_bit_off, files, z

from resnet_fused import backends
from resnet_fused.backends.declaration import Kernel
from resnet_fused.backends.selfcheck import cases, compare, judge
from resnet_fused.ops import OPS


def test_wrong_kernel_is_switched_off_with_one_warning_and_the_next_backend_serves(inject):
    injected = inject("bn_stats", a_bit_off)
    with pytest.warns(RuntimeWarning, match=r"switched off injected bn_stats \(float32\)") as caught:
        first = backends.run("bn_stats", z())
        again = backends.run("bn_stats", z())
    assert len(caught) == 1
    for got, same, expected in zip(first, again, OPS["bn_stats"].reference(z()), strict=True):
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(same, expected)
    assert injected.runs == len(cases.cases("bn_stats", F32)), "ran beyond its check"
    with pytest.raises(RuntimeError, match="injected: failed its self-check on cpu"):
        backends.run("bn_stats", z(), backend="injected")


def test_verdict_outlives_the_process(inject):
    injected = inject("bn_stats", a_bit_off)
    with pytest.warns(RuntimeWarning):
        objection = injected.objection()
    runs, (file,) = injected.runs, files()
    assert json.loads(file.read_text())["objection"] == objection != ""
    judge.forget()  # as a new process would begin
    with pytest.warns(RuntimeWarning, match="switched off injected"):
        assert injected.objection() == objection
    assert injected.runs == runs


def test_right_kernel_is_trusted_for_its_dtype_and_build(inject):
    injected = inject("bn_stats")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.run("bn_stats", z())
        backends.run("bn_stats", z())
        checks = len(cases.cases("bn_stats", F32))
        assert injected.runs == checks + 2 and len(files()) == 1
        assert injected.objection(torch.bfloat16) == ""
    assert injected.runs == 2 * checks + 2 and len(files()) == 2
    judge.forget()
    rebuilt = inject("bn_stats", a_bit_off, build="build 2")
    with pytest.warns(RuntimeWarning):
        assert rebuilt.objection() != "", "took the verdict of another build"


def test_kernel_that_raises_is_off_for_this_process_only(inject):
    def fail(*args, **kwargs):
        raise MemoryError("none left")

    inject("bn_stats", fail)
    with pytest.warns(RuntimeWarning, match="raised MemoryError: none left"):
        backends.run("bn_stats", z())
    assert files() == []


def test_kernel_that_takes_no_case_is_not_trusted(inject):
    injected = inject("bn_stats")
    kernel = injected.backend.kernels["bn_stats"]
    picky = Kernel(
        kernel.run, kernel.dtypes, lambda z, **kwargs: ["takes multiples of 64"], needs_selfcheck=True, build="b"
    )
    injected.backend.kernels["bn_stats"] = picky
    with pytest.warns(RuntimeWarning, match="took none of its self-check's cases: .* takes multiples of 64"):
        assert injected.objection() != ""


def test_kernel_without_a_case_is_not_trusted(inject, monkeypatch):
    injected = inject("bn_stats")
    monkeypatch.setattr(cases, "cases", lambda op, dtype: [])
    with pytest.warns(RuntimeWarning, match="switched off injected bn_stats .*, which has no case in its self-check"):
        assert injected.objection() == "has no case in its self-check"
    assert injected.runs == 0


def test_kernel_without_build_identity_is_checked_in_every_process(inject):
    assert inject("bn_stats", build="").objection() == ""
    assert files() == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"key": {}, "objection": ""}', b"null"])
def test_corrupt_verdict_is_ignored_and_rewritten(inject, content):
    injected = inject("bn_stats")
    assert injected.objection() == ""
    (file,) = files()
    good = file.read_bytes()
    file.write_bytes(content)
    judge.forget()
    runs = injected.runs
    assert injected.objection() == ""
    assert injected.runs == 2 * runs and files() == [file] and file.read_bytes() == good


def test_cache_directory_that_cannot_be_written(inject, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    injected = inject("bn_stats")
    assert injected.objection() == ""
    runs = injected.runs
    assert injected.objection() == "" and injected.runs == runs


def in_threads(count, work):
    start = threading.Barrier(count)

    def run():
        start.wait()
        work()

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_concurrent_first_uses_check_once(inject):
    injected = inject("bn_stats")
    in_threads(8, injected.objection)
    assert injected.runs == len(cases.cases("bn_stats", F32))


def test_concurrent_writers_leave_one_whole_file(inject):
    key = judge.identity(inject("bn_stats").backend, "bn_stats", F32, CPU)
    seen = []

    def work():
        for _ in range(20):
            judge.keep(key, "x" * 10000)
            seen.append(judge.recall(key))

    in_threads(8, work)
    assert set(seen) == {"x" * 10000}, "read a file that was half written"
    assert len(files()) == 1, "left temporary files"


@pytest.mark.parametrize(("own", "passes"), [(0.0, False), (0.02, False), (0.04, True), (float("inf"), False)])
def test_in_16_bits_a_kernel_on_a_cpu_may_err_twice_as_much_as_pytorch(monkeypatch, own, passes):
    """But not without limit where PyTorch has NaN or infinity elsewhere."""
    (case, *_), error = cases.cases("norm_add_relu", torch.bfloat16), 0.06
    found = iter([error, own, *[0.0] * 9])
    monkeypatch.setattr(compare, "difference", lambda got, expected: next(found))
    row = compare.check_case(Injected("norm_add_relu").backend, "norm_add_relu", case, torch.bfloat16, CPU)
    assert row.passed == passes, row


def test_in_float32_a_kernel_may_not(monkeypatch):
    (case, *_), found = cases.cases("norm_add_relu", F32), iter([0.06, 0.04])
    monkeypatch.setattr(compare, "difference", lambda got, expected: next(found))
    assert not compare.check_case(Injected("norm_add_relu").backend, "norm_add_relu", case, F32, CPU).passed
