"""`examples/degradation.py` and `examples/same_training.py`, and that fused training is the same training."""

import csv
import importlib

import pytest
import torch

for needed in ("tqdm", "matplotlib", "mlxtend"):
    pytest.importorskip(needed)
degradation, results, same_training = map(importlib.import_module, ("degradation", "results", "same_training"))


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


def test_what_degradation_cannot_do_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(degradation, "train", lambda *_: pytest.fail("was trained"))
    for wrong, text in (
        ("--depths 8 21", "21 is not 6n"),
        ("--depths 8 2", "2 is not 6n"),
        ("--take 9", "lower --batch"),
    ):
        with pytest.raises(SystemExit, match=text):
            degradation.main([*wrong.split(), "--out", str(tmp_path / "small")])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def drawn(monkeypatch):
    """The axes of pictures that were drawn."""
    found, original = [], results.finish

    def finish(figure, path):
        original(figure, path)
        found.append(figure.axes)

    monkeypatch.setattr(results, "finish", finish)
    return found


def seen(line):
    return len(line.get_xdata()) > 1 or line.get_marker() not in ("None", None, "")


def test_one_epoch_of_many_nets_is_seen(tmp_path, drawn):
    depths = [8, 14, 20, 26, 32]
    nets = [f"{kind} {depth}" for kind in ("plain", "residual") for depth in depths]
    row = {"epoch": 1, "train_error": 50.0, "test_error": 60.0}
    degradation.plot([{"net": net, **row} for net in nets], depths, tmp_path / "a.png")
    for axis in drawn[0]:
        assert len(axis.lines) == 10 and all(map(seen, axis.lines))
        assert len({str(line.get_color()) for line in axis.lines}) == 5
        assert all(tick == int(tick) for tick in axis.get_xticks())


@pytest.mark.parametrize("steps", [1, 4, 9, 10, 11])
def test_few_steps_are_drawn(steps, tmp_path, drawn):
    runs = {run: [2.0 - i / 9 + off for i in range(steps)] for run, off in zip(
        (same_training.STOCK, same_training.OTHER, same_training.FUSED), (0, 1e-3, 2e-3), strict=True
    )}  # fmt: skip
    same_training.plot(runs, tmp_path / "a.png")
    curves, distances = drawn[0]
    assert len(curves.lines) == 3 and len(distances.lines) == 2
    assert all(map(seen, (*curves.lines, *distances.lines)))
    assert all(line.get_xdata()[-1] == steps for line in (*curves.lines, *distances.lines))


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
    other, fused = distances("--steps 40 --size 20", tmp_path / "small")
    assert 0 < other[4] < 0.1, "the order of sums should matter a little"
    assert (fused <= 5 * other + 1e-6).all(), (fused / other).max()
    assert list(rows(tmp_path / "small.csv")[0]) == ["step", "stock, channels_last", "stock, contiguous", "fused"]
    assert (tmp_path / "small.png").stat().st_size > 1000


@pytest.mark.slow
def test_fused_losses_in_double_precision_are_as_near(tmp_path):
    """There a gradient that is off by a thousandth is 1e9 times as far as the order of sums is."""
    other, fused = distances("--double --steps 20 --size 16", tmp_path / "small")
    assert 0 < other[4] < 1e-10, "the order of sums should matter a little"
    assert (fused <= 1e4 * other + 1e-14).all(), (fused / other).max()
