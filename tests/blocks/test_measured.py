"""Measured choices: what may be chosen, that it is kept, found again, and never believed where it does not hold."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from test_chain import make_step
from torch import nn

import resnet_fused
from resnet_fused.blocks import chain_key, measured, plan, trial
from resnet_fused.blocks.devices import DEVICES
from resnet_fused.blocks.measured import Variant
from resnet_fused.blocks.trial import Candidate, fastest
from resnet_fused.models import Bottleneck
from resnet_fused.steps import Chain, StepTensors

CPU = torch.device("cpu")
PLAIN, GRAM = Variant(), Variant(gram=True)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is remembered, and nothing of what is kept stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trial, "REPEATS", (1, 1))
    measured.forget()
    torch.manual_seed(0)
    yield tmp_path / "resnet_fused" / "plans"
    measured.forget()


@pytest.fixture
def clock(monkeypatch):
    """A clock by which the variants that ``clock.wins`` accepts take half as long as all others."""

    class Clock:
        runs = 0

        def milliseconds(self, step, device):
            step()
            self.runs += 1
            return 1.0 if self.wins(step.args[0]) else 2.0

        def wins(self, variant):
            return not variant.gram  # the cost model would have it otherwise

    found = Clock()
    monkeypatch.setattr(trial, "milliseconds", found.milliseconds)
    return found


def block(**kwargs):
    return nn.Sequential(resnet_fused.fuse(Bottleneck(64, 16, **kwargs)))


def images(n=4, size=8):
    return torch.randn(n, 64, size, size)


def notes(model, x):
    """What the plan says of each chain."""
    said = []
    plan.observers.append(said.append)
    try:
        model(x)
    finally:
        plan.observers.pop()
    return said


def the_file(cache):
    (file,) = cache.iterdir()
    return file


# What is chosen -------------------------------------------------------------------------------------------------


def test_the_fastest_is_chosen_kept_and_found_again(clock, cache):
    model, x = block(), images()
    assert notes(model, x)[0].startswith("Gram join (costs ")
    tuned = resnet_fused.tune(model, x)
    (chain,) = tuned.chains
    assert chain.chain == "1x1 64>16, 3x3 16>16, 1x1 16>64 + x, relu"
    assert (chain.chosen, chain.modelled, chain.alike) == ("plain join", "Gram join", 1)
    assert [c.variant for c in chain.candidates] == ["plain join", "Gram join"]
    assert chain.candidates[0].saved > chain.candidates[1].saved > 0
    assert notes(model, x) == ["plain join (measured)"]
    measured.forget()
    assert notes(model, x) == ["plain join (measured)"]
    assert tuned.file == str(the_file(cache))
    assert "| plain join | 1   |" in str(tuned) and tuned.file in str(tuned)


ANOTHER_PROCESS = """
import torch, resnet_fused
from resnet_fused.blocks import plan
from resnet_fused.models import Bottleneck
torch.set_num_threads({threads})
plan.observers.append(print)
resnet_fused.fuse(Bottleneck(64, 16))(torch.randn(4, 64, 8, 8))
"""


def test_another_process_finds_it(clock):
    resnet_fused.tune(block(), images())
    code = ANOTHER_PROCESS.format(threads=torch.get_num_threads())
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "plain join (measured)\n"


def test_a_real_clock():
    (chain,) = resnet_fused.tune(block(), images(2, 4)).chains
    assert all(candidate.milliseconds > 0 for candidate in chain.candidates)


def test_alike_chains_are_measured_once(clock):
    model = nn.Sequential(*(resnet_fused.fuse(Bottleneck(64, 16)) for _ in range(3)))
    (chain,) = resnet_fused.tune(model, images()).chains
    assert chain.alike == 3
    assert clock.runs == 2 * (trial.WARMUP + 1)


def test_tuning_again_replaces_and_adds(clock, cache):
    model = block()
    resnet_fused.tune(model, images(4))
    resnet_fused.tune(model, images(6))
    clock.wins = lambda variant: variant.gram
    resnet_fused.tune(model, images(4))
    for _ in range(2):
        assert notes(model, images(4)) == ["Gram join (measured)"]
        assert notes(model, images(6)) == ["plain join (measured)"]
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


# What may be chosen ---------------------------------------------------------------------------------------------


def single(tensors):
    return [
        StepTensors(*(t if t is None or t.dtype == torch.int64 else t.detach().float() for t in own)) for own in tensors
    ]


def bottleneck(stride=1, kernel=1, projected=True, **kwargs):
    """A chain with its tensors; the last convolution has `kernel`, the projection `stride`."""
    pairs = [make_step(6, 4, **kwargs), make_step(4, 4, 3, stride=stride, **kwargs), make_step(4, 10, kernel, **kwargs)]
    pairs += [make_step(6, 10, stride=stride, **kwargs)] if projected else []
    steps = tuple(step for step, _ in pairs)
    return Chain(steps[:3], steps[3] if projected else None), single(own for _, own in pairs)


def kinds(chain, tensors, x=None, factor=None):
    x = torch.randn(2, 6, 4, 4) if x is None else x
    return [(v.lazy, v.gram, v.gram_shortcut, v.keep) for v in plan.variants(chain, x, tensors, factor)]


def joins(*pairs):
    return [(False, *pair, False) for pair in pairs]


def test_variants_on_the_cpu():
    every = joins((0, 0), (0, 1), (1, 0), (1, 1))
    assert kinds(*bottleneck()) == every
    assert kinds(*bottleneck(stride=2)) == every
    assert kinds(*bottleneck(projected=False)) == joins((0, 0), (1, 0))
    assert kinds(*bottleneck(kernel=3)) == joins((0, 0), (0, 1))
    assert kinds(*bottleneck(), factor=torch.ones(2)) == joins((0, 0), (0, 1))
    assert kinds(*bottleneck(bias=True)) == joins((0, 0))
    assert kinds(*bottleneck(bias=True, kernel=3, batch_stats=False)) == every
    assert kinds(*bottleneck(), x=torch.randn(2, 6, 4, 4, dtype=torch.float64)) == joins((0, 0))
    step, own = make_step(6, 24, stride=2)
    assert kinds(Chain((step,)), single([own])) == joins((0, 0))


def test_variants_on_values():
    with plan.planning_for(DEVICES["h100"]):
        grams = ((0, 0), (1, 0), (1, 1))
        lazy = [(True, *gram, keep) for gram in grams for keep in (False, True)]
        assert kinds(*bottleneck()) == [(False, False, False, False), *lazy]
        step, own = make_step(6, 24)
        one = [(False,) * 4, (True, False, False, True), (True, True, False, True)]
        assert kinds(Chain((step,)), single([own])) == one
        assert kinds(*bottleneck(kernel=3)) == joins((0, 0))


@pytest.mark.parametrize("device", [None, *DEVICES])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kwargs", [{}, {"kernel": 3}, {"bias": True}, {"batch_stats": False}, {"projected": False}])
def test_the_cost_model_chooses_among_the_variants(device, stride, kwargs):
    chain, tensors = bottleneck(stride, **kwargs)
    x, size = torch.randn(2, 6, 4, 4), 4 // stride
    shapes = [torch.Size((2, 4, 4, 4)), torch.Size((2, 4, size, size)), torch.Size((2, 10, size, size))]
    for factor in (None, torch.ones(2)):

        def check(factor=factor):
            chosen = plan.modelled(chain, x, tensors, shapes, factor)
            assert chosen in [variant.of(chain) for variant in plan.variants(chain, x, tensors, factor)]

        if device is None:
            check()
        else:
            with plan.planning_for(DEVICES[device]):
                check()


def test_lazy_variants_are_measured_and_run(clock, monkeypatch):
    """Where there are 1x1 kernels; here the reference stands in for them."""
    monkeypatch.setattr(plan, "_lazy_device", lambda chain, x: DEVICES["h100"])
    wanted = Variant(True, True, False, True)
    clock.wins = lambda variant: variant == wanted
    model, x = block(), images()
    (chain,) = resnet_fused.tune(model, x).chains
    assert chain.chosen == "lazy, Gram join, activations kept"
    saved = {candidate.variant: candidate.saved for candidate in chain.candidates}
    assert len(saved) == 5
    assert saved["lazy, plain join"] > saved["lazy, Gram join"]
    assert saved["lazy, Gram join, activations kept"] > saved["lazy, Gram join"]
    assert notes(model, x) == ["lazy, Gram join (measured)"]
    torch.testing.assert_close(model(x), resnet_fused.unfuse(copy.deepcopy(model))(x), rtol=1e-4, atol=1e-4)


# Where it holds -------------------------------------------------------------------------------------------------


def by_the_model(model, x):
    return all("measured" not in note for note in notes(model, x))


def test_another_input_is_left_to_the_cost_model(clock):
    model = block()
    resnet_fused.tune(model, images())
    assert not by_the_model(model, images())
    assert by_the_model(model, images(5))
    assert by_the_model(model, images(size=7))
    assert by_the_model(copy.deepcopy(model).double(), images().double())
    with resnet_fused.use("reference"):
        assert by_the_model(model, images())
    assert by_the_model(copy.deepcopy(model).eval(), images().requires_grad_())  # frozen batch norms
    assert by_the_model(nn.Sequential(resnet_fused.fuse(Bottleneck(64, 16, dilation=2))), images())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert by_the_model(model, images())
    finally:
        torch.set_num_threads(threads)
    assert not by_the_model(model, images())


def test_16_bit_under_autocast(clock):
    if torch.bfloat16 not in plan.onednn.SERVED:
        pytest.skip("no fast bfloat16 convolution on this CPU")
    model, x = block(), images()
    with torch.autocast("cpu", torch.bfloat16):
        (chain,) = resnet_fused.tune(model, x).chains
        assert chain.settings.startswith("bfloat16, auto, ")
        assert not by_the_model(model, x)
    assert by_the_model(model, x)


@pytest.mark.parametrize("changed", ["torch", "triton", "build", "device"])
def test_ignored_after_a_change(clock, cache, monkeypatch, changed):
    model, x = block(), images()
    resnet_fused.tune(model, x)
    measured.forget()
    identity = measured.identity
    with monkeypatch.context() as patch:
        patch.setattr(measured, "identity", lambda device: identity(device) | {changed: "another"})
        assert by_the_model(model, x)
        (cache / measured.file_of(CPU).name).write_text(the_file(cache).read_text())  # a hash that collides
        measured.forget()
        assert by_the_model(model, x)
    measured.forget()
    assert not by_the_model(model, x)


def test_the_identity_follows_versions_and_build(monkeypatch):
    before, build = measured.identity(CPU), measured.build_identity.__wrapped__
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert measured.identity(CPU)["torch"] == "9.9.9"
    monkeypatch.setattr(measured, "SOURCES", ("ops",))
    assert build() != before["build"] == measured.build_identity()


def damaged(text):
    """Every way in which a file can be wrong, as the bytes of one."""
    row, whole = json.loads(text)["rows"][0], json.loads(text)
    rows = [
        5, {}, [], {**row, "chain": 1}, {**row, "shape": [4, 64, 8]}, {**row, "shape": "4648"}, {**row, "choice": None},
        {**row, "choice": {"gram": 1}}, {**row, "choice": {"fast": True}}, {**row, "shape": [4, 64, 8, [8]]},
        {**row, "choice": {"lazy": True}}, {**row, "choice": {"gram_shortcut": True}},
    ]  # fmt: skip
    texts = ["", "{", "[]", "null", text[: len(text) // 2], json.dumps({**whole, "rows": 5})]
    texts += [json.dumps({"key": whole["key"]}), json.dumps({**whole, "rows": rows})]
    return [b"\xff\xfe\x00", *(text.encode() for text in texts)]


def test_damaged_files_are_ignored_and_replaced(clock, cache):
    model, x = block(), images()
    resnet_fused.tune(model, x)
    file = the_file(cache)
    for content in damaged(file.read_text()):
        measured.forget()
        file.write_bytes(content)
        assert by_the_model(model, x), content
    resnet_fused.tune(model, x)
    measured.forget()
    assert not by_the_model(model, x)


def test_an_installation_without_sources_still_runs(clock, monkeypatch):
    model, x = block(), images()
    resnet_fused.tune(model, x)
    measured.forget()

    def fail(device):
        raise RuntimeError("no idea")

    monkeypatch.setattr(measured, "identity", fail)
    assert by_the_model(model, x)


def test_a_directory_that_cannot_be_written(clock, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    model, x = block(), images()
    with pytest.warns(RuntimeWarning, match="for this process only"):
        tuned = resnet_fused.tune(model, x)
    assert "Kept in this process only" in str(tuned)
    assert notes(model, x) == ["plain join (measured)"]


def test_read_once_and_only_for_real_tensors(clock, monkeypatch):
    model, x = block(), images()
    resnet_fused.tune(model, x)
    measured.forget()
    reads, read = [], measured._read
    monkeypatch.setattr(measured, "_read", lambda device: reads.append(device) or read(device))
    resnet_fused.explain(model, x.shape)
    with plan.planning_for(DEVICES["h100"]):
        notes(model, x)
    assert not reads
    for n in (4, 4, 5):
        model(images(n))
    assert reads == [CPU]
    (row,) = resnet_fused.explain(model, x.shape).blocks
    assert "measured" not in row.plan


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(clock, monkeypatch, dynamic):
    """A graph takes what is loaded, for the shapes that were measured; it reads nothing."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    def grams(n):
        graphs.clear()
        with torch.no_grad():
            compiled(images(n))
        return [".gram" in text for text in graphs]

    model = block()
    resnet_fused.tune(model, images(4))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)
    assert grams(4) == [False]
    assert grams(6) == [True]
    assert grams(4) == []
    torch.compiler.reset()
    measured.forget()
    monkeypatch.setattr(measured, "_read", None)
    assert grams(4) == [True]


# The user's things ----------------------------------------------------------------------------------------------


def test_nothing_of_the_user_changes(clock):
    model, x = nn.Sequential(block(), nn.Dropout(0.5)).eval(), images().requires_grad_()
    model(x).sum().backward()
    before, grads = copy.deepcopy(model.state_dict()), {name: p.grad for name, p in model.named_parameters()}
    values, grad, state = {name: g.clone() for name, g in grads.items()}, x.grad.clone(), torch.get_rng_state()
    (chain,) = resnet_fused.tune(model, x).chains
    assert chain.chain.count("frozen") == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(x.grad, grad)
    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name] and torch.equal(parameter.grad, values[name])


def test_statistics_do_not_move_while_measuring(clock):
    """Not even the copy's, beyond its one forward."""
    counts = []
    model = block()
    model[0].register_forward_hook(lambda module, *_: counts.append(module.bn1.num_batches_tracked.item()))
    resnet_fused.tune(model, images())
    assert counts == [1]


def test_batch_norms_that_are_frozen_stay_so(clock):
    model = block().train()
    model[0].bn2.eval()
    (chain,) = resnet_fused.tune(model, images()).chains
    assert chain.chain == "1x1 64>16, 3x3 16>16 frozen, 1x1 16>64 + x, relu"
    assert not by_the_model(model, images())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda context: context.__name__)
def test_without_gradients_around(clock, context):
    with context():
        (chain,) = resnet_fused.tune(block(), images()).chains
    assert chain.chosen == "plain join"


def test_a_compiled_model_is_measured_eagerly(clock):
    def never(graph, inputs):
        raise AssertionError("compiled")

    (chain,) = resnet_fused.tune(torch.compile(block(), backend=never), images()).chains
    assert chain.chosen == "plain join"


def test_chains_with_nothing_to_choose(clock, cache):
    model = nn.Sequential(resnet_fused.FusedConvBNReLU(64, 8, 3), block()[0].double().float())
    tuned = resnet_fused.tune(model[:1], images())
    assert (tuned.chains, tuned.fixed) == ((), 1)
    assert str(tuned) == "Chains with nothing to choose: 1."
    assert not cache.exists()


def test_mistakes(clock):
    with pytest.raises(TypeError, match=r"tune: model is function; pass a torch.nn.Module"):
        resnet_fused.tune(images, images())
    with pytest.raises(TypeError, match=r"tune: example is list; pass the model's input"):
        resnet_fused.tune(block(), [4, 64, 8, 8])
    with pytest.warns(UserWarning, match=r"tune: no fused chain ran in Bottleneck; call fuse\(model\) first"):
        tuned = resnet_fused.tune(Bottleneck(64, 16), images())
    assert str(tuned) == "Chains with nothing to choose: 0."


def test_several_arguments(clock):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = block()

        def forward(self, x, twice):
            return self.inner(x * 2 if twice else x)

    (chain,) = resnet_fused.tune(Two(), (images(), True)).chains
    assert chain.shape == (4, 64, 8, 8)


# Keys -----------------------------------------------------------------------------------------------------------


def test_keys_differ_where_times_may():
    def key(chain, tensors, residual="", sampled=False):
        return chain_key.geometry(chain, tensors, residual, sampled)

    built = [
        bottleneck(), bottleneck(stride=2), bottleneck(kernel=3), bottleneck(projected=False), bottleneck(bias=True),
        bottleneck(batch_stats=False),
    ]  # fmt: skip
    chain, tensors = built[3]
    keys = [key(*pair) for pair in built] + [key(chain, tensors, "x"), key(chain, tensors, "tensor")]
    keys += [key(chain, tensors, "x", True), key(Chain(chain.steps, relu=False), tensors)]
    for kwargs in ({"groups": 2}, {"stride": 2}):
        step, own = make_step(6, 4, 3, **kwargs)
        keys.append(key(Chain((step,)), [own]))
    conv = resnet_fused.blocks.functional.Conv
    step, own = make_step(6, 4, 3)
    for geometry in (conv(), conv(padding=(1, 1)), conv(padding=(2, 2), dilation=(2, 2)), conv(padding=(1, 0))):
        keys.append(key(Chain((type(step)(geometry, step.norm),)), [own]))
    assert len(set(keys)) == len(keys)
