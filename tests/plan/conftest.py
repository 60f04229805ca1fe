"""Fixtures of the tests of measured choices: a cache of their own for all, and a clock that decides."""

import pytest
import torch

from resnet_fused.plan import cpu_values, measured, timing


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is remembered, and nothing of what is kept stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(timing, "REPEATS", (1, 1))
    measured.build_identity.cache_clear()  # another test's backends may have been there when it was asked first
    measured.forget()
    torch.manual_seed(0)
    yield tmp_path / "resnet_fused" / "plans"
    measured.forget()


@pytest.fixture(autouse=True)
def on_tensors(monkeypatch, request):
    """A CPU plans on tensors, whatever it could, but for the tests of its plans on values."""
    if "values_on_cpu" not in request.fixturenames:
        monkeypatch.setattr(cpu_values, "serve", lambda call: False)


@pytest.fixture
def clock(monkeypatch):
    """A clock by which the variants that ``clock.wins`` accepts take half as long as all others."""

    class Clock:
        runs = 0

        def milliseconds(self, step, device):
            step()
            self.runs += 1
            return 1.0 if self.wins(step.args[0]) else 2.0

        def wins(self, variant):
            return not variant.gram and not variant.stock  # the cost model would have it otherwise

    found = Clock()
    monkeypatch.setattr(timing, "milliseconds", found.milliseconds)
    return found
