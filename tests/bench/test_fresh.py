"""Times from processes of their own."""

import torch

from resnet_fused.bench import fresh, peers
from resnet_fused.bench.run import Options, Plan
from resnet_fused.bench.timing import Rounds

PLAN = Plan(2, 32, (1,), Rounds(1), Rounds(1), Rounds(1))


def test_pairs_of_processes_become_rows(monkeypatch):
    seen, progress = [], []

    def process(options, plan, device, peer, environment):
        seen.append((peer, bool(environment)))
        return {"evaluation, batch 1": 10.0 * len(seen)}

    monkeypatch.setattr(fresh, "_process", process)
    rows = fresh.measure(Options(), PLAN, torch.device("cpu"), 2, progress.append)
    stock, ours = peers.STOCK, peers.OURS
    order = [stock, ours, ours, stock]  # neither always goes first
    assert seen == [(peer, False) for peer in order] + [(peer, True) for peer in order]
    assert progress[-1] == 1.0
    assert [(row.peer, row.median, row.q10, row.q90, row.n) for row in rows[:2]] == [
        (stock, 25.0, 10.0, 40.0, 2), (ours, 25.0, 20.0, 30.0, 2)
    ]  # fmt: skip
    assert (rows[1].ratio_low, rows[1].ratio_high) == (0.5, 40 / 30)
    assert rows[0].name.endswith("default allocator") and rows[2].name.endswith("allocator keeps memory")


def test_a_process_measures_one_contender():
    options = Options(model="resnet18", quick=True)
    found = fresh._process(options, PLAN, torch.device("cpu"), peers.OURS, fresh.KEPT)
    assert found.keys() == {"training step, batch 2", "evaluation, batch 1"}
    assert all(0 < ms < 1e5 for ms in found.values())
