"""Measured choices: found where they hold, and never believed where they do not."""

import copy
import json

import pytest
import torch
from chains import Chain, call_of, make_step
from torch import nn
from tuned import CPU, block, bottleneck, ends, images, notes, the_file

import resnet_fused
from resnet_fused.backends import onednn
from resnet_fused.models import Bottleneck
from resnet_fused.plan import choose, keys, measured
from resnet_fused.plan.devices import DEVICES
from resnet_fused.steps import Conv


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
    if torch.bfloat16 not in onednn.SERVED:
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
        {**row, "choice": {"values": True}}, {**row, "choice": {"gram_shortcut": True}},
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
    assert ends(model, x) == ["plain join (measured)"]


def test_read_once_and_only_for_real_tensors(clock, monkeypatch):
    model, x = block(), images()
    resnet_fused.tune(model, x)
    measured.forget()
    reads, read = [], measured._read
    monkeypatch.setattr(measured, "_read", lambda device: reads.append(device) or read(device))
    resnet_fused.explain(model, x.shape)
    with choose.planning_for(DEVICES["h100"]):
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
    if not dynamic:  # whatever the shapes
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
    assert chain.chain == "1x1 64>16, norm, relu, 3x3 16>16, frozen norm, relu, 1x1 16>64, norm, + x, relu"
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
    with resnet_fused.use("reference"):  # "auto" may always choose stock
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
        x, other = torch.randn(2, 6, 4, 4), torch.randn(2, 10, 4, 4)
        residual = {"": None, "x": x, "tensor": other}[residual]
        return keys.geometry(call_of(chain, x, tensors, residual, torch.ones(2) if sampled else None))

    built = [
        bottleneck(), bottleneck(stride=2), bottleneck(kernel=3), bottleneck(projected=False), bottleneck(bias=True),
        bottleneck(batch_stats=False),
    ]  # fmt: skip
    chain, tensors = built[3]
    found = [key(*pair) for pair in built] + [key(chain, tensors, "x"), key(chain, tensors, "tensor")]
    found += [key(chain, tensors, "x", True), key(Chain(chain.steps, relu=False), tensors)]
    for kwargs in ({"groups": 2}, {"stride": 2}):
        step, own = make_step(6, 4, 3, **kwargs)
        found.append(key(Chain((step,)), [own]))
    step, own = make_step(6, 4, 3)
    for geometry in (Conv(), Conv(padding=(1, 1)), Conv(padding=(2, 2), dilation=(2, 2)), Conv(padding=(1, 0))):
        found.append(key(Chain((type(step)(geometry, step.norm),)), [own]))
    assert len(set(found)) == len(found)
