"""`examples/finetune.py` on checkpoints from disk."""

import csv
import importlib

import pytest
import torch

for needed in ("tqdm", "matplotlib", "mlxtend"):
    pytest.importorskip(needed)
finetune = importlib.import_module("finetune")

from resnet_fused.bench.errors import Refused  # noqa: E402
from resnet_fused.bench.named import build  # noqa: E402

SHORT = "--take 32 --batch 8 --epochs 1 --size 32".split()


def stock(name):
    try:
        return build(name)
    except Refused as error:
        pytest.skip(str(error))


def tuned(name, weights, out, *options):
    arguments = ["--model", name, "--weights", weights, "--out", out, *SHORT, *options]
    finetune.main(list(map(str, arguments)))
    return torch.load(out / "weights.pt", weights_only=True)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet10t"])
def test_a_checkpoint_gets_a_new_head_and_keeps_its_norms(name, tmp_path, capsys):
    before = stock(name).state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in before.items()}}, tmp_path / "weights.pth")
    after = tuned(name, tmp_path / "weights.pth", tmp_path / "run", "--freeze-norms")
    assert after.keys() == before.keys() and after["fc.weight"].shape[0] == 10
    norms = [key for key in before if ".bn" in key or key.startswith("bn1")]
    assert len(norms) > 20 and all(torch.equal(before[key], after[key]) for key in norms)
    assert not torch.equal(before["layer1.0.conv1.weight"], after["layer1.0.conv1.weight"])
    assert "modules fused, " in capsys.readouterr().out
    (row,) = csv.DictReader((tmp_path / "run" / "log.csv").read_text().splitlines())
    assert row["epoch"] == "1" and 0 <= float(row["test_accuracy"]) <= 100


def test_norms_learn_where_they_are_not_frozen(tmp_path):
    before = stock("resnet20").state_dict()
    torch.save(before, tmp_path / "weights.pt")
    after = tuned("resnet20", tmp_path / "weights.pt", tmp_path / "run", "--stock")
    assert after["bn1.num_batches_tracked"] == 4
    assert not torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])
    assert not torch.equal(before["bn1.weight"], after["bn1.weight"])


def test_safetensors_are_read(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    for name in ("a", "module.a"):  # the latter is DDP's
        save_file({name: torch.arange(3.0)}, tmp_path / "weights.safetensors")
        found = finetune.read_weights(tmp_path / "weights.safetensors")
        assert list(found) == ["a"] and torch.equal(found["a"], torch.arange(3.0))


def test_a_file_without_a_state_dict_is_refused(tmp_path):
    def refusal(path):
        with pytest.raises(SystemExit) as caught:
            finetune.read_weights(path)
        assert str(caught.value).startswith(f"--weights: {path} does not hold a state_dict")
        return str(caught.value)

    path = tmp_path / "weights.pt"
    for text in ("", "some words of a text file\n", "conv1.weight\t1\n" * 50, "\0" * 100):
        path.write_text(text)
        assert len(refusal(path).splitlines()) == 1
    for held in ({1: torch.ones(2)}, {"a": 1}, {"state_dict": {3: torch.ones(2)}}, torch.ones(2)):
        torch.save(held, path)
        refusal(path)
    torch.save({"a": torch.ones(999)}, path)
    path.write_bytes(path.read_bytes()[:500])
    refusal(path)
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "weights.safetensors"
    safetensors.save_file({"a": torch.arange(99.0)}, path)
    whole = path.read_bytes()
    for broken in (whole[:-40], whole[:20], b"", b"text"):
        path.write_bytes(broken)
        refusal(path)


def test_a_model_that_returns_no_scores_is_refused(tmp_path):
    from resnet_fused.models import BUILDERS

    class Pair(torch.nn.Linear):
        def forward(self, x):
            return (super().forward(x.flatten(1)[:, :2]),) * 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUILDERS, "pair", lambda num_classes: torch.nn.Sequential(Pair(2, num_classes)))
        torch.save({}, tmp_path / "weights.pt")
        with pytest.raises(SystemExit, match="--model pair returns tuple, not scores"):
            tuned("pair", tmp_path / "weights.pt", tmp_path / "run", "--stock")


def test_what_is_refused(tmp_path):
    path = tmp_path / "weights.pt"

    def refused(name="resnet20"):
        with pytest.raises(SystemExit) as caught:
            tuned(name, path, tmp_path / "run")
        return str(caught.value)

    assert "there is no file" in refused()
    path.write_bytes(b"no checkpoint")
    assert "does not hold a state_dict" in refused()
    torch.save([1, 2], path)
    assert "does not hold a state_dict" in refused()
    torch.save(build("resnet32").state_dict(), path)
    assert "0 of its tensors are missing [], 72 are others ['layer1.3.conv1.weight'" in refused()
    torch.save(build("resnet20", width=8).state_dict(), path)
    assert "is not of resnet20" in refused() and "size mismatch" in refused()
    assert "unknown model" in refused("resnet21")
    assert not (tmp_path / "run").exists()
