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


def distances(options, out):
    """Of stock summed in another order and of fused: the largest distance from stock so far, at each step."""
    runs = same_training.main([*options.split(), "--batch", "32", "--out", str(out)])
    stock, other, fused = (torch.tensor(run, dtype=torch.float64) for run in runs.values())
    assert stock[-5:].mean() < 0.9 * stock[:5].mean(), "nothing was learned"
    return ((run - stock).abs().cummax(0).values for run in (other, fused))


@pytest.mark.slow
def test_fused_losses_are_as_near_as_stocks_own(tmp_path):
    other, fused = distances("--steps 80 --size 20", tmp_path / "small")
    assert 0 < other[4] < 0.1, "the order of sums should matter a little"
    assert (fused <= 5 * other + 1e-6).all(), (fused / other).max()
    assert list(rows(tmp_path / "small.csv")[0]) == ["step", "stock, channels_last", "stock, contiguous", "fused"]
    assert (tmp_path / "small.png").stat().st_size > 1000


@pytest.mark.slow
def test_fused_losses_in_double_precision_are_as_near(tmp_path):
    """There a gradient that is off by a thousandth is 1e9 times as far as the order of sums is."""
    other, fused = distances("--double --steps 25 --size 16", tmp_path / "small")
    assert 0 < other[4] < 1e-10, "the order of sums should matter a little"
    assert (fused <= 1e4 * other + 1e-14).all(), (fused / other).max()
