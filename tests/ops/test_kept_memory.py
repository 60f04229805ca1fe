"""Outputs on kept memory: whose it is, when it is taken again, and that a tensor on it is like any other."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch

import resnet_fused
from resnet_fused import library

KEEPS = library.status().cpu.loaded and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
pytestmark = pytest.mark.skipif(not KEEPS, reason="nothing is kept without the compiled library, or by torch 2.10")
SHAPE = (2, 64, 128, 64)  # 4 MiB, two huge pages
BYTES = 2 * 64 * 128 * 64 * 4


@pytest.fixture(autouse=True)
def nothing_kept():
    resnet_fused.empty_cache()
    yield
    resnet_fused.empty_cache()


@pytest.fixture(scope="module")
def z() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)


def normalise(z: torch.Tensor) -> torch.Tensor:
    vector = torch.linspace(-1, 1, z.shape[1])
    return torch.ops.resnet_fused.norm_add_relu(z, vector, vector)[0]


def expected(z: torch.Tensor) -> torch.Tensor:
    vector = torch.linspace(-1, 1, z.shape[1]).view(1, -1, 1, 1)
    return torch.relu(z * vector + vector)


def test_memory_is_taken_again_only_when_no_tensor_has_it(z):
    first = normalise(z)
    place = first.data_ptr()
    assert place % 2**16 == 0
    second = normalise(z)
    assert second.data_ptr() != place
    view = first[1, 3:5]
    del first
    assert resnet_fused.empty_cache() == 0  # a view has it
    kept = view.clone()
    third = normalise(-z)
    assert third.data_ptr() != place
    assert torch.equal(view, kept)
    del view
    again = normalise(z)
    assert again.data_ptr() == place
    torch.testing.assert_close(again, expected(z))
    del second, third, again
    assert resnet_fused.empty_cache() == 3 * BYTES
    assert resnet_fused.empty_cache() == 0


def test_numpy_and_autograd_hold_it(z):
    array = normalise(z).numpy()
    assert resnet_fused.empty_cache() == 0
    torch.testing.assert_close(torch.from_numpy(array), expected(z))
    leaf = torch.ones(1, requires_grad=True)
    out = normalise(z) * leaf  # saved for the gradient of `leaf`
    del array
    assert resnet_fused.empty_cache() == BYTES
    other = normalise(-z)
    out.sum().backward()
    torch.testing.assert_close(leaf.grad[0], expected(z).sum(), rtol=1e-4, atol=0)
    assert torch.equal(other, normalise(-z))


def test_a_tensor_on_it_copies_pickles_and_is_shared(z):
    out, like = normalise(z), expected(z)
    for other in (copy.deepcopy(out), pickle.loads(pickle.dumps(out)), out.share_memory_()):
        torch.testing.assert_close(other, like)
    assert out.is_shared()
    assert resnet_fused.empty_cache() == BYTES  # what it lay on before it was shared
    with torch.inference_mode():
        assert normalise(z).is_inference()


def test_what_is_left_of_a_larger_one_goes_back_in_time(z):
    big = torch.cat([z, z]).contiguous(memory_format=torch.channels_last)
    place = normalise(big).data_ptr()  # free now, and twice what follows needs
    assert all(normalise(z).data_ptr() == place for _ in range(600))
    assert resnet_fused.empty_cache() == BYTES


STEPS = """
import resource, torch, resnet_fused
vector = torch.ones(64)
large = torch.zeros(16, 64, 128, 64).contiguous(memory_format=torch.channels_last)
small = [torch.zeros(n, 64, 128, 64).contiguous(memory_format=torch.channels_last) for n in (2, 3, 5, 9)]

def run(x):
    return torch.ops.resnet_fused.norm_add_relu(x, vector, vector)[0]

def step():
    for x in small:
        run(x)
    kept = run(large)
    return kept, run(large)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    step()
before = faults()
for _ in range(5):
    step()
print(faults() - before, resnet_fused.empty_cache())
"""


def test_steps_map_nothing_anew_where_their_peak_has_other_sizes():
    """In a process of its own. The small ones together are more than a quarter of the large ones."""
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    faults, kept = map(int, done.stdout.split())
    assert faults < 5 * 16  # the large ones alone are 32 huge pages, and many more small ones
    assert kept == 16 * BYTES


MANY_SIZES = """
import torch, resnet_fused
vector = torch.ones(64)
inputs = [torch.zeros(n, 64, 128, 64).contiguous(memory_format=torch.channels_last) for n in range(2, 20)]
for x in inputs + inputs[::-1]:
    torch.ops.resnet_fused.norm_add_relu(x, vector, vector)  # one output at a time
print(resnet_fused.empty_cache())
"""


def test_buffers_of_many_sizes_are_bounded_by_what_tensors_had_at_once():
    """In a process of its own: what earlier tests had at once counts for hundreds of requests."""
    done = subprocess.run([sys.executable, "-c", MANY_SIZES], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) <= 1.25 * 20 * BYTES // 2


def test_it_is_not_resized_beyond_what_it_has(z):
    out = normalise(z)
    with pytest.raises(RuntimeError, match="not resizable"):
        out.resize_(4, 64, 128, 64)
    assert normalise(z).resize_(1, 64, 128, 64).shape[0] == 1


def test_threads_do_not_share_what_they_hold(z):
    like, wrong = expected(z), []

    def work() -> None:
        for _ in range(30):
            if not torch.allclose(normalise(z), like, rtol=1e-5, atol=1e-5):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert resnet_fused.empty_cache() <= 4 * BYTES


SCRIPT = """
import torch, resnet_fused
z = torch.randn(2, 64, 128, 64).contiguous(memory_format=torch.channels_last)
torch.ops.resnet_fused.norm_add_relu(z, torch.ones(64), torch.ones(64))
print(resnet_fused.empty_cache())
"""


@pytest.mark.parametrize(("word", "kept"), [("0", 0), ("1", BYTES)])
def test_the_environment_turns_it_off(word, kept):
    environment = {**os.environ, "RESNET_FUSED_KEEP_MEMORY": word}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == kept


LIMITED = """
import os, resource, sys, torch, resnet_fused
z = torch.ones(2, 64, 128, 64).contiguous(memory_format=torch.channels_last)
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]) << 20, -1))
out, _ = torch.ops.resnet_fused.norm_add_relu(z, torch.ones(64), torch.ones(64))
child = os.fork()
if child == 0:
    again, _ = torch.ops.resnet_fused.norm_add_relu(z, torch.ones(64), torch.ones(64))
    os._exit(0 if torch.equal(again, out) else 1)
assert os.waitpid(child, 0)[1] == 0
del out
print(resnet_fused.empty_cache())
"""


@pytest.mark.parametrize(("limit", "kept"), [(4000, 0), (16000, BYTES)])
def test_a_limit_on_addresses_leaves_most_of_them_to_others(limit, kept):
    """`limit` in MiB: of 4 GiB and more a quarter at most is reserved, of less nothing. A child process goes on."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # no threads that a fork would lose
    command = [sys.executable, "-c", LIMITED, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) == kept
