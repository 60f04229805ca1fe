"""Without the compiled library everything still imports, fuses and agrees; the reference and oneDNN serve."""

import pathlib
import shutil
import subprocess
import sys

import resnet_fused

CODE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]  # it would find _C
import copy, torch, resnet_fused
from resnet_fused import library
from resnet_fused.models.resnet import Bottleneck
assert not library.status().cpu.loaded, library.status()
torch.manual_seed(0)
stock = Bottleneck(32, 8)
fused = resnet_fused.fuse(copy.deepcopy(stock))
assert resnet_fused.report(fused).fused
x = torch.randn(3, 32, 9, 9)
for model in (stock, fused):
    model(x).square().sum().backward()
for (name, a), b in zip(stock.named_parameters(), fused.parameters()):
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-3, msg=name)
with torch.no_grad():
    torch.testing.assert_close(fused.eval()(x), stock.eval()(x), rtol=1e-4, atol=1e-4)
print("agrees")
"""


def test_fuse_without_compiled_code(tmp_path):
    source = pathlib.Path(resnet_fused.__file__).parent
    shutil.copytree(source, tmp_path / "resnet_fused", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "agrees" in done.stdout
