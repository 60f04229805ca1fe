"""The pytest plugin of ``timm_tests.py``: timm's tests, with models as timm makes them or fused, and a log.

The models are of ``timm_tests_models.py``, for the processes that run tests: the one that hands them out to others need
not import torch, timm and torchvision.
"""

from __future__ import annotations

import fnmatch
import json
import pathlib

import pytest

REASON = 300  # characters of a reason


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resnet_fused")
    group.addoption("--fused-side", choices=("stock", "fused"), required=True)
    group.addoption("--fused-log", required=True, help="a JSON object a test is added to this file")
    group.addoption("--fused-only", help="a file of test ids, one a line: run no others")
    group.addoption("--fused-filter", action="append", default=[])
    group.addoption("--fused-max-parameters", type=float, default=0.0)
    group.addoption("--fused-quick", action="store_true")
    group.addoption("--fused-as-planned", action="store_true")


def pytest_configure(config: pytest.Config) -> None:
    for name in ("base", "cfg", "torchscript", "features", "fxforward", "fxbackward", "timeout"):
        config.addinivalue_line("markers", f"{name}: timm's")
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", 0):
        config.pluginmanager.import_plugin("timm_tests_models")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the models and the tests asked for."""
    patterns, only = config.getoption("--fused-filter"), config.getoption("--fused-only")
    chosen = None if only is None else set(pathlib.Path(only).read_text().splitlines())

    def wanted(item: pytest.Item) -> bool:
        name = item.callspec.params.get("model_name", "") if hasattr(item, "callspec") else ""
        named = not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        return named and (chosen is None or item.nodeid in chosen)

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = filter(wanted, items)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Write the log from the process that hears of all tests, also of those that end a worker, as they end."""
    if not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Log(session.config))


class Log:
    """One line for every outcome."""

    def __init__(self, config: pytest.Config) -> None:
        self.path, self.side = config.getoption("--fused-log"), config.getoption("--fused-side")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        found = dict(report.user_properties)
        row = {"test": report.nodeid, "side": self.side, "outcome": report.outcome}
        row |= {"reason": found.get("difference") or reason_of(report)}
        row |= {"bitwise": found.get("bitwise", ""), "fused": found.get("fused")}
        if "left_out" in found:
            row |= {"outcome": "left out", "reason": found["left_out"]}
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


def reason_of(report: pytest.TestReport) -> str:
    """Why a test did not pass, in one line."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return " ".join(str(report.longrepr or "").split())[:REASON]
    return f"line {crash.lineno}: " + " ".join(crash.message.split())[:REASON]
