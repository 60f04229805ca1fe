"""`examples/degradation.py` and `examples/same_training.py`, and that fused training is the same training."""

import csv
import importlib

import pytest
import torch

for needed in ("tqdm", "matplotlib", "mlxtend"):
    pytest.importorskip(needed)
degradation, same_training = map(importlib.import_module, ("degradation", "same_training"))


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_degradation_draws_each_net(tmp_path, capsys):
    out = tmp_path / "small"
    degradation.main(
        ["--depths", "8", "14", "--epochs", "2", "--take", "64", "--batch", "16", "--size", "12", "--out", str(out)]
    )
    found = rows(out.with_suffix(".csv"))
    nets = ["plain 8", "residual 8", "plain 14", "residual 14"]
    assert [(row["net"], row["epoch"]) for row in found] == [(net, epoch) for net in nets for epoch in "12"]
    assert all(0 <= float(row[name]) <= 100 for row in found for name in ("train_error", "test_error"))
    assert out.with_suffix(".png").stat().st_size > 1000
    assert "residual 14: training error" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="21 is not 6n"):
        degradation.main(["--depths", "21", "--out", str(out)])


def test_depths_are_layers_with_weights():
    for depth in (8, 20):
        for kind in ("plain", "residual"):
            layers = [m for m in degradation.network(kind, depth).modules() if isinstance(m, torch.nn.Conv2d)]
            assert len(layers) + 1 == depth  # and the linear one


@pytest.mark.slow
def test_fused_losses_are_as_near_as_stocks_own(tmp_path):
    """Up to each step, the largest distance of fused is not much more than that of stock, summed in another order."""
    runs = same_training.main(["--steps", "80", "--size", "20", "--batch", "32", "--out", str(tmp_path / "small")])
    stock, other, fused = (torch.tensor(run, dtype=torch.float64) for run in runs.values())
    assert stock[-10:].mean() < 0.6 * stock[:10].mean(), "nothing was learned"
    farthest, ours = ((run - stock).abs().cummax(0).values for run in (other, fused))
    assert 0 < farthest[4] < 0.1, "the order of sums should matter a little"
    assert (ours <= 5 * farthest + 1e-6).all(), (ours / farthest).max()
    assert list(rows(tmp_path / "small.csv")[0]) == ["step", *runs]
    assert (tmp_path / "small.png").stat().st_size > 1000
