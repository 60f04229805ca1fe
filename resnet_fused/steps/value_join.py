"""Where a branch ends, on values: what :mod:`.join` does, written only where it must be.

The same two kinds of branches. As a *Gram join* convolution, batch norm, residual or projection and ReLU are one
product that writes the output once (:mod:`.folded_join` has the mathematics). Its gradient g = keep*grad is never
written either: the sign bits of the output are, and readers mask on load. *Written*, z has come with its statistics,
and is normalised and added in one more pass.

Small matrices of a Gram join: one launch forward (`gram_norm`). Backward they follow the weight gradient's partial
sums, with one launch more than its own.
"""

from __future__ import annotations

import dataclasses

import torch

from ..backends import run
from . import folded_join, pointwise
from .batch_norm import Coefficients, coefficients
from .flow import Backward, Forward, merged
from .folded_join import Folded, FoldedGrads
from .join import join_ops, needs_of, note_grads
from .kinds import norm_grads
from .lazy import EVERY, Lazy, LazyGrad, Pending, Value
from .pointwise import parts
from .program import Convolution, Program, Terms
from .spec import Step, StepGrads, StepTensors
from .value_kinds import give_read, read_alone

Tensor = torch.Tensor

#: Outputs for each input from which one pass and a correction move less than two: 4C against 2K + K/8 bytes a pixel in
#: 16 bits. At 2 they would move 2% less (Wide ResNet's layer1), with one more kernel.
CORRECTION_PAYS = 3


@dataclasses.dataclass(frozen=True)
class ValueJoin:
    """The sum that makes `value`, or the norm that does and ends the block; of 1x1 convolutions on values.

    `gram`: its branch is a Gram join; `gram_other`: so is what is added to it, a projection. `one_pass`: both gradients
    of their narrow convolutions come from one pass.
    """

    value: int
    gram: bool = False
    gram_other: bool = False
    one_pass: bool = False

    def ops(self, program: Program) -> tuple[str, ...]:
        product = ("conv1x1_join", "conv1x1_dgrad", "conv1x1_wgrad") if self.gram else ("norm_add_relu",)
        more = ("conv1x1_backward",) if self.one_pass else ()
        folded = join_ops(program, self.value, self.gram, self.gram_other)
        return (*product, "norm_add_relu_backward", *more, *folded)

    def forward(self, f: Forward) -> None:
        terms = f.program.terms(self.value)
        options = {"sample_factor": f.sample_factor if terms.sampled else None}
        options |= {"relu": terms.relu, "emit_mask": terms.relu}
        out, mask = _product(f, terms, self.gram_other, options) if self.gram else _pass(f, terms, options)
        f.output = out
        if terms.other is not None or self.gram:
            f.values[self.value] = out
        if terms.relu:
            f.masks[self.value] = mask

    def backward(self, b: Backward) -> None:
        terms, grad = b.program.terms(self.value), b.dense(self.value)
        if grad is None:
            return
        mask, grad_out = b.masks.get(self.value), grad.grad
        factor = b.sample_factor if terms.sampled else None
        is_norm = terms.other is not None and b.program.is_affine(terms.other)
        branch = None if self.gram else b.values[terms.branch]
        other = b.values[terms.other] if is_norm and not self.gram_other else None
        sums = None
        if branch is not None or other is not None:
            options = {} if branch is None else {"z": branch.z, "mean": branch.bn.mean}
            options |= {} if other is None else {"residual": other.z, "residual_mean": other.bn.mean}
            options |= {"mask": mask, "sample_factor": factor, "relu": terms.relu, "emit_grad": False}
            _, *sums = run("norm_add_relu_backward", grad_out, **options, backend=b.backend)
        if is_norm:
            self._branch(b, terms.other, other, grad_out, mask, sums and sums[2:], None)
        elif terms.other is not None:
            b.give(terms.other, Pending(grad_out, False, mask=mask))
        self._branch(b, terms.branch, branch, grad_out, mask, sums and sums[:2], factor)

    def _branch(self, b: Backward, norm: int, lazy: Lazy | None, g: Tensor, mask, sums, factor) -> None:
        """The gradient at a branch's convolution, as a value; of a Gram join all that is behind it too."""
        if not b.wanted[norm]:
            return
        node = b.program.maker(norm)
        if lazy is None:
            bn = b.folded[norm].bn
            scaled = LazyGrad(g, None, Coefficients(bn.scale, None, None, None, None), bn, mask=mask)
            _GramBranch(b, norm, scaled, self.one_pass).backward()
            return
        c = coefficients(lazy.bn, *sums, g, node.norm, b.backend)
        at_conv = LazyGrad(g, lazy.z, c, lazy.bn, sample_factor=factor, mask=mask)
        norm_grads(b, norm, at_conv)
        if b.wanted[node.source]:
            b.give(node.source, Pending(at_conv, False))


def _fold(f: Forward, norm: int, like: Tensor) -> tuple[Value, StepTensors, Step, Folded]:
    """A branch that is not written: batch norm of its convolution without the convolution.

    `like`: any tensor of as many pixels as its output.
    """
    node = f.program.maker(norm)
    conv = f.program.maker(node.source)
    value, own, step = f.values[conv.source], merged(f.tensors, node.source, norm), Step(conv.conv, node.norm)
    raw, scale, shift = parts(value)
    centre = value.bn.centre if isinstance(value, Lazy) else None
    if centre is None and node.norm.batch_stats:
        centre = folded_join.sample_mean(value, f.backend, conv.conv)
    stride = conv.conv.stride
    folded, statistics = folded_join.fold(raw, own, step, centre, f.backend, scale, shift, stride, like)
    f.folded[norm] = folded
    f.note(norm, statistics)
    return value, own, step, folded


def _other(f: Forward, terms: Terms) -> dict[str, Tensor]:
    """What is added, where that is a tensor or what was written raw."""
    if terms.other is None:
        return {}
    if not f.program.is_affine(terms.other):
        return {"residual": f.tensor(terms.other)}
    z, bn = f.values[terms.other][:2]
    return {"residual": z, "residual_scale": bn.scale, "residual_shift": bn.shift}


def _product(f: Forward, terms: Terms, gram_other: bool, options: dict) -> tuple[Tensor, Tensor]:
    """The join as one matrix product, over ``[value | x]`` where the projection is a Gram join too."""
    main = f.program.maker(f.program.maker(terms.branch).source)
    like = parts(f.values[main.source])[0]
    value, own, _, folded = _fold(f, terms.branch, like)
    if gram_other:
        _, projection, step, shortcut = _fold(f, terms.other, like)
        x = f.tensor(f.program.maker(f.program.maker(terms.other).source).source)  # nothing is applied to it on load
        options |= {"x2": x, "stride2": step.conv.stride, "weight2": projection.weight.contiguous()}
        options |= {"scale2": shortcut.bn.scale, "shift2": shortcut.bn.shift}
    else:
        options |= _other(f, terms)
    raw, scale, shift = parts(value)
    arguments = (raw, own.weight.contiguous(), folded.bn.scale, folded.bn.shift, scale, shift)
    return run("conv1x1_join", *arguments, **options, backend=f.backend)


def _pass(f: Forward, terms: Terms, options: dict) -> tuple[Tensor, Tensor]:
    """The join as one pass over the branch's raw output."""
    z, bn = f.values[terms.branch][:2]
    return run("norm_add_relu", z, bn.scale, bn.shift, **_other(f, terms), **options, backend=f.backend)


class _GramBranch:
    """Backward of a branch that was never written; `grad`: ``scale * g``, the rest of the gradient is a correction."""

    def __init__(self, b: Backward, norm: int, grad: LazyGrad, one_pass: bool) -> None:
        node = b.program.maker(norm)
        self.b, self.norm, self.conv, self.grad = b, norm, node.source, grad
        conv = b.program.maker(node.source)
        self.source, self.step = conv.source, Step(conv.conv, node.norm)
        self.own, self.folded = merged(b.tensors, node.source, norm), b.folded[norm]
        self.needs, self.wanted = needs_of(b, node.source, norm), b.wanted[conv.source]
        self.read, self.previous = read_alone(b, self.source)
        if self.previous is None:
            self.read = b.tensor(self.source)  # a correction is a product with the activation
        self.one_pass = one_pass and self._in_one_pass()

    def _in_one_pass(self) -> bool:
        """Whether both gradients should come from one pass over this one's.

        The input's is then corrected in a pass of its own, once the weight's is known: two reads of C channels, where a
        second read of the K channels of g is saved. A tensor that another convolution reads again is corrected there.
        """
        if not (self.wanted and pointwise.narrow(self.step, self.own.weight)):
            return False
        outputs, inputs = self.own.weight.shape[:2]
        if self.step.norm.batch_stats:
            return self.previous is None or outputs >= CORRECTION_PAYS * inputs
        return any(self.needs)

    def backward(self) -> None:
        b, step, stride = self.b, self.step, self.step.conv.stride
        grad, weight, other, correction = self.grad, self.own.weight, self._other_path(), None
        if self.one_pass:
            grad, found, correction = self._both(other)
            weight = None
            if correction is None:
                return give_read(b, self.source, grad, stride)
        else:
            found = self._parameters()
            correction = None if found is None or found.coupling is None else (found.coupling, found.constant)
        if self.one_pass and other is None and self._is_read_again():
            b.give(self.source, Pending(grad.g, True, stride, correction=correction))
        elif self.wanted:
            arguments = (grad, self.read, step, self.previous, weight, b.backend, other, correction)
            give_read(b, self.source, pointwise.input_grad(*arguments), stride)

    def _other_path(self) -> Pending | None:
        """The gradient from other readers that the product adds."""
        if not self.wanted or self.previous is not None or self.step.conv.stride != EVERY:
            return None
        return self.b.take(self.source, corrected=True)  # the product has a correction of its own

    def _is_read_again(self) -> bool:
        """Whether a convolution whose backward is still to come reads the same tensor, and can add the correction."""
        b = self.b
        before = [b.program.maker(reader) for reader in b.program.readers(self.source) if reader < self.conv]
        return isinstance(b.values[self.source], Tensor) and any(isinstance(node, Convolution) for node in before)

    def _both(self, other: Pending | None):
        """The one pass, and the correction that the input's gradient still lacks, or None."""
        b, complete, scale = self.b, not self.step.norm.batch_stats, self.folded.bn.scale
        plain = self.grad._replace(coefficients=self.grad.coefficients._replace(a=None))
        path = other if complete else None
        both = pointwise.both_grads(plain, self.read, self.previous, self.own.weight, b.backend, path, scale, complete)
        found = self._found(both.weight, both.sum_dz)
        return both.value, found, None if complete else (found.coupling, found.constant)

    def _parameters(self) -> FoldedGrads | None:
        """Gradients of the parameters, and the correction of the input's."""
        if not (any(self.needs) or (self.wanted and self.step.norm.batch_stats)):
            return None
        x, x_scale, x_shift = parts(self.b.values[self.source])
        options = {"mask": self.grad.mask, "x_scale": x_scale, "x_shift": x_shift, "stride": self.step.conv.stride}
        if not self.step.norm.batch_stats:
            product, sum_g, *_ = run("conv1x1_wgrad", self.grad.g, x, **options, backend=self.b.backend)
            return self._found(product, sum_g)
        bn, weight = self.folded.bn, self.own.weight
        options |= self.folded.gram._asdict()
        options |= {"join_weight": weight.contiguous(), "join_scale": bn.scale, "join_rstd": bn.rstd}
        product, sum_g, *others = run("conv1x1_wgrad", self.grad.g, x, **options, backend=self.b.backend)
        return self._note(FoldedGrads(product.view(weight.shape), *others), sum_g)

    def _found(self, product: Tensor, sum_g: Tensor) -> FoldedGrads:
        arguments = (product, sum_g, self.grad.g, self.own, self.step, self.folded, self.b.backend)
        return self._note(folded_join.parameter_grads(*arguments), sum_g)

    def _note(self, found: FoldedGrads, sum_g: Tensor) -> FoldedGrads:
        values = StepGrads(found.weight, None, found.gamma, sum_g)
        wanted = [value if need else None for value, need in zip(values, self.needs, strict=True)]
        note_grads(self.b, self.conv, self.norm, StepGrads(*wanted))
        return found
