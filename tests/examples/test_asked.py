"""Options that the examples refuse, each in a line that names it."""

import importlib

import pytest
import torch

for needed in ("tqdm", "matplotlib", "mlxtend"):
    pytest.importorskip(needed)
NEEDED = {"finetune": ["--model", "resnet20", "--weights", "none"]}
EVERYWHERE = ["--epochs 0", "--epochs -1", "--take -5", "--batch 0", "--size 0", "--lr -1", "--lr nan", "--seed -1"]
IN_TRAINING = ["--workers -1", "--device nonsense", "--device meta", "--seed 4294967296", "--seed x", "--take 0"]
ONLY_TRAIN = ["--ema 1", "--ema -0.1", "--ema nan", "--warmup -1", "--warmup inf", "--weight-decay -1"]
OFFERED = {
    "train": EVERYWHERE + IN_TRAINING + ONLY_TRAIN,
    "finetune": [*EVERYWHERE, *IN_TRAINING, "--head-lr -1"],
    "degradation": EVERYWHERE,
    "same_training": ["--steps 0", "--steps -1", "--batch 0", "--size 0", "--lr -1", "--seed -1"],
}


@pytest.mark.parametrize("name", OFFERED)
def test_numbers_out_of_range_are_refused(name, capsys, tmp_path):
    script = importlib.import_module(name)
    for wrong in OFFERED[name]:
        with pytest.raises(SystemExit):
            script.main([*NEEDED.get(name, []), *wrong.split(), "--out", str(tmp_path / "run")])
        last = capsys.readouterr().err.splitlines()[-1]
        option, value = wrong.split()
        assert f"argument {option}: {value} " in last, (wrong, last)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["train", "finetune"])
def test_cuda_that_is_not_there(name, capsys, tmp_path):
    with pytest.raises(SystemExit):
        number = torch.cuda.device_count()
        asked_for = [*NEEDED.get(name, []), "--device", f"cuda:{number}", "--out", str(tmp_path)]
        importlib.import_module(name).main(asked_for)
    assert f"cuda:{number} cannot be used here: torch sees {number} CUDA devices" in capsys.readouterr().err


def test_the_ends_of_ranges_are_accepted(tmp_path):
    given = "--seed 4294967295 --ema 0 --warmup 0 --workers 0 --device cpu".split()
    args = importlib.import_module("train").options(given)
    assert (args.seed, args.ema, args.device) == (2**32 - 1, 0, torch.device("cpu"))
    importlib.import_module("resumable").seed(args.seed + 1)  # of the second process


@pytest.mark.parametrize("name", ["train", "finetune", "same_training"])
def test_an_unknown_model(name, tmp_path):
    given = [*NEEDED.get(name, []), "--model", "resnet21", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="--model: unknown model 'resnet21'"):
        importlib.import_module(name).main(given)
    assert list(tmp_path.iterdir()) == []


def test_each_process_has_a_cuda_device_of_its_own(monkeypatch):
    """By the current one go the random numbers that are saved, and what processes tell each other."""
    train, chosen = importlib.import_module("train"), []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for device in ("cuda", "cuda:1"):
        with train.processes(train.options(["--device", device])):
            pass
    assert chosen == [0, 1]
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit, match="torch sees 2"), train.processes(train.options(["--device", "cuda"])):
        pass
