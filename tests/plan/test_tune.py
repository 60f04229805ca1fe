"""Tuning: the fastest variant is chosen, kept and found again; what is the user's stays as it was."""

import json
import subprocess
import sys

import torch
from torch import nn
from tuned import GRAM, PLAIN, block, ends, images, the_file

import resnet_fused
from resnet_fused.models import Bottleneck
from resnet_fused.plan import measured, timing
from resnet_fused.plan.timing import Candidate, fastest
from resnet_fused.plan.variants import Variant


def test_the_fastest_is_chosen_kept_and_found_again(clock, cache):
    model, x = block(), images()
    assert ends(model, x)[0].startswith("Gram join (costs ")
    tuned = resnet_fused.tune(model, x)
    (chain,) = tuned.chains
    assert chain.chain == "1x1 64>16, norm, relu, 3x3 16>16, norm, relu, 1x1 16>64, norm, + x, relu"
    assert (chain.chosen, chain.modelled, chain.alike) == ("plain join", "Gram join", 1)
    assert [c.variant for c in chain.candidates] == ["plain join", "Gram join", "stock"]
    assert chain.candidates[0].saved > chain.candidates[1].saved > 0
    assert ends(model, x) == ["plain join (measured)"]
    measured.forget()
    assert ends(model, x) == ["plain join (measured)"]
    assert tuned.file == str(the_file(cache))
    assert "| plain join | 1   |" in str(tuned) and tuned.file in str(tuned)


ANOTHER_PROCESS = """
import torch, resnet_fused
from resnet_fused.plan import choose
from resnet_fused.models import Bottleneck
torch.set_num_threads({threads})
choose.observers.append(print)
resnet_fused.fuse(Bottleneck(64, 16))(torch.randn(4, 64, 8, 8))
"""


def test_another_process_finds_it(clock):
    resnet_fused.tune(block(), images())
    code = ANOTHER_PROCESS.format(threads=torch.get_num_threads())
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("; plain join (measured)\n")


def test_a_real_clock():
    (chain,) = resnet_fused.tune(block(), images(2, 4)).chains
    assert all(candidate.milliseconds > 0 for candidate in chain.candidates)


def test_alike_chains_are_measured_once(clock):
    model = nn.Sequential(*(resnet_fused.fuse(Bottleneck(64, 16)) for _ in range(3)))
    (chain,) = resnet_fused.tune(model, images()).chains
    assert chain.alike == 3
    assert clock.runs == 3 * (timing.WARMUP + 1)


def test_tuning_again_replaces_and_adds(clock, cache):
    model = block()
    resnet_fused.tune(model, images(4))
    resnet_fused.tune(model, images(6))
    clock.wins = lambda variant: variant.gram
    resnet_fused.tune(model, images(4))
    for _ in range(2):
        assert ends(model, images(4)) == ["Gram join (measured)"]
        assert ends(model, images(6)) == ["plain join (measured)"]
        measured.forget()
    rows = json.loads(the_file(cache).read_text())["rows"]
    assert sorted(row["shape"][0] for row in rows) == [4, 6]


def test_less_memory_wins_unless_more_is_two_percent_faster():
    def chosen(*candidates):
        return fastest({Variant(gram=bool(i)): Candidate("", ms, saved) for i, (ms, saved) in enumerate(candidates)})

    assert chosen((0.985, 2), (1.0, 1)) == GRAM
    assert chosen((0.975, 2), (1.0, 1)) == PLAIN
    assert chosen((1.0, 2), (0.999, 2)) == GRAM
    assert chosen((0.999, 2), (1.0, 2)) == PLAIN
    assert chosen((1.0, 1), (0.985, 2)) == PLAIN
