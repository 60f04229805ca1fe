"""Where the first use of a kernel may happen, what its check must catch, and the check of all kernels on demand."""

import warnings

import pytest
import torch
from injected import CPU, F32, Injected, a_bit_off, files, z
from torch._subclasses.fake_tensor import FakeTensorMode

from resnet_fused import backends
from resnet_fused.backends.declaration import Backend, Kernel
from resnet_fused.backends.selfcheck import cases, judge
from resnet_fused.ops import OPS, bn_affine


def drop_nan(results, *args, **kwargs):
    return (results[0].nan_to_num(0.0), results[1])


def one_bit(results, *args, **kwargs):
    out, mask = results
    if mask.numel():
        mask[-1, -1] ^= 1
    return out, mask


def other_strides(results, *args, **kwargs):
    return results[0].contiguous(), results[1]


def naive_moments(results, z, gamma=None, beta=None, eps=None):
    mean = z.mean((0, 2, 3))
    m2 = (z.square().mean((0, 2, 3)) - mean.square()) * (z.numel() // z.shape[1])
    return bn_affine.after(mean, m2, gamma, beta, z, eps)


def last_row_forgotten(results, grad_out, **options):
    results[1].sub_(grad_out[-1, :, -1, -1])
    return results


def sums_in_bfloat16(results, *args, **kwargs):
    return results[0], *(total.bfloat16().float() for total in results[1:])


@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("norm_add_relu", drop_nan),
        ("norm_add_relu", one_bit),
        ("norm_add_relu", other_strides),
        ("bn_stats", naive_moments),
        ("norm_add_relu_backward", last_row_forgotten),
        ("norm_add_relu_backward", sums_in_bfloat16),
        ("lazy_grad_apply", lambda dz, *args, **kwargs: dz.double()),
        ("lazy_grad_apply", lambda dz, g, *args, **kwargs: dz + 1e-4),
        ("gram", lambda results, *args: (results[0].triu(), results[1])),
    ],
)
def test_faults_that_the_cases_must_catch(inject, op, change):
    with pytest.warns(RuntimeWarning, match="switched off injected"):
        assert inject(op, change).objection() != ""


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_op_has_cases_and_the_reference_passes_them(inject, op):
    assert cases.missing_cases() == []
    assert inject(op).objection() == ""


def under_compile(injected):
    compiled = torch.compile(lambda t: backends.run("bn_stats", t)[0] * 2, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z()), z().mean((0, 2, 3)) * 2)


def under_vmap(injected):
    def function(t):
        assert injected.objection() == ""
        return t * 2

    torch.func.vmap(torch.func.grad(lambda t: function(t).sum()))(torch.ones(3))


def within(context):
    def use(injected):
        with context():
            assert injected.objection() == ""

    use.__name__ = getattr(context, "__name__", "context")
    return use


FIRST_USES = [
    under_compile,
    under_vmap,
    within(FakeTensorMode),
    within(torch.inference_mode),
    within(lambda: torch.autocast("cpu", torch.bfloat16)),
    within(lambda: torch.device("meta")),
]


@pytest.mark.parametrize("use", FIRST_USES, ids=lambda use: use.__name__)
def test_first_use_anywhere(inject, use):
    """The check sees none of the modes around its first use, and leaves the random state alone."""

    def real_and_plain(results, z):
        assert type(z) is torch.Tensor and not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu") and z.device == CPU
        return results

    injected = inject("bn_stats")
    injected.change = lambda results, t, **kwargs: real_and_plain(results, t) if injected.runs <= 3 else results
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        use(injected)
    assert injected.runs >= len(cases.cases("bn_stats", F32)) > 1
    assert torch.equal(torch.get_rng_state(), state)


def test_capture_of_a_graph_passes_over_an_unchecked_kernel(inject, monkeypatch):
    injected = inject("bn_stats")
    monkeypatch.setattr(judge, "_capturing", lambda device: True)
    with pytest.warns(RuntimeWarning, match="cannot be during a CUDA graph capture; run one step before") as caught:
        backends.run("bn_stats", z())
        backends.run("bn_stats", z())
    assert injected.runs == 0 and len(caught) == 1 and files() == []
    monkeypatch.setattr(judge, "_capturing", lambda device: False)
    assert injected.objection() == ""
    monkeypatch.setattr(judge, "_capturing", lambda device: True)
    assert injected.objection() == "", "forgot a verdict during a capture"
    judge.forget()
    assert injected.objection() == "", "did not read the verdict on disk during a capture"


def test_check_all_gives_rows_and_replaces_verdicts(inject):
    injected = inject("bn_stats", a_bit_off)
    with pytest.warns(RuntimeWarning):
        assert injected.objection() != ""
    injected.change = lambda results, *args, **kwargs: results  # "a driver was updated"
    rows = backends.check_all("cpu")
    assert injected.objection() == ""
    ours = [row for row in rows if row.backend == "injected"]
    assert {(row.op, row.dtype) for row in ours} == {("bn_stats", "float32"), ("bn_stats", "bfloat16")}
    assert all(row.passed and row.error <= row.allowed for row in ours)
    reference = [row for row in rows if row.backend == "reference"]
    assert {row.op for row in reference} == set(OPS)
    assert all(row.passed for row in reference), [str(row) for row in reference if not row.passed]
    assert not [str(row) for row in rows if row.status == "failed"]


def test_check_all_of_a_dtype():
    """With the statistics of its activations, which are float32, where a kernel takes those only."""
    vectors = Backend("vectors", ("cpu",), {"bn_affine": Kernel(OPS["bn_affine"].reference, (F32, torch.float64))})
    found = [Injected("bn_stats").backend, vectors]
    for dtype, expected in ((F32, "float32"), (torch.bfloat16, "bfloat16")):
        rows = {(row.backend, row.dtype) for row in judge.check_all(CPU, found, dtype)}
        assert rows == {("injected", expected), ("vectors", "float32")}
