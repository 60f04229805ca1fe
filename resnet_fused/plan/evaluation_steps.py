"""The steps of a program in evaluation, once it is known which kernels there are: see :mod:`.lower_evaluation`."""

from __future__ import annotations

import dataclasses

from ..steps.activated_evaluation import ActPass, NormActPass
from ..steps.evaluation_flow import ForwardStep, Lowered
from ..steps.evaluation_kinds import (
    FoldedConvolution,
    NormPass,
    NormValue,
    RawAverage,
    RawPool,
    StockAverage,
    StockNorm,
    StockPool,
    UnfoldedConvolution,
    WinogradConvolution,
)
from ..steps.folding import Part
from ..steps.gpu_evaluation_kinds import Add, CompiledConvolution, ConvolveRaw, Product
from ..steps.program import Addition, Averaging, Convolution, Node, Normalisation, Pooling, Program
from ..steps.stem_evaluation import StemPool


def _sole_reader(program: Program, value: int) -> tuple[int | None, Node | None]:
    """The number and the node of the only reader of a value."""
    readers = program.readers(value)
    return (readers[0], program.maker(readers[0])) if len(readers) == 1 else (None, None)


def carries_sum(program: Program, value: int) -> bool:
    """Whether a value is the branch of an addition, read by that alone, and linear in what it is made of."""
    _, add = _sole_reader(program, value)
    if not isinstance(add, Addition) or add.branch != value or add.other == value:
        return False
    return isinstance(program.maker(value), Convolution) or program.is_affine(value)


class Steps:
    """The steps of a program. `pointwise`: on a GPU, its 1x1 convolutions, and what launch makes the shift of each that
    has no norm; None: on a CPU. `few`: all with the weights as they are, since pixels are few. `filtered`: the
    convolutions that run by minimal filtering, and how many outputs to a side their tiles have. `unfolded`: those that
    take the weight as it is; on a GPU they alone have an epilogue. `stems`: those of few channels that can take norm,
    ReLU and pool with them. `whole`: the averages of whole windows.

    `carriers`: the convolutions with an epilogue; `projections`: those that another's kernel computes as well; `lazy`:
    the norms that their readers apply on load.
    """

    def __init__(
        self,
        program: Program,
        pointwise: dict[int, str] | None = None,
        few: bool = False,
        filtered: dict[int, int] | None = None,
        unfolded: frozenset[int] = frozenset(),
        stems: frozenset[int] = frozenset(),
        whole: frozenset[int] = frozenset(),
    ) -> None:
        self.program, self.gpu, self.few, self.filtered = program, pointwise is not None, few, filtered or {}
        self.unfolded, self.stems, self.whole = unfolded, stems, whole
        self.written = not self.gpu or bool(unfolded)  # what a carrier adds: only Triton's kernels take norms as values
        self.projections: set[int] = set()
        self.lazy: set[int] = set()
        self.carriers = {value for value, node in program.numbered if isinstance(node, Convolution)}
        if self.gpu and unfolded:
            self.carriers = {value for value in unfolded if self._norm_behind(value) or carries_sum(program, value)}
        elif pointwise is not None:
            self.carriers = {value for value in pointwise if self._has_epilogue(value)}
            self.projections = self._projections(pointwise)
            self.carriers = {value for value in self.carriers - self.projections if self._pays(value, pointwise)}
            self.projections = self._projections(pointwise)
            self.lazy = {value for value, _ in program.numbered if self._is_lazy(value)}

    def _norm_behind(self, conv: int) -> int | None:
        """The norm that alone reads a convolution."""
        number, reader = _sole_reader(self.program, conv)
        is_conv = isinstance(self.program.maker(conv), Convolution)
        return number if is_conv and isinstance(reader, Normalisation) else None

    def _has_epilogue(self, conv: int) -> bool:
        """Whether there is something that a product's epilogue would spare."""
        end = self._norm_behind(conv)
        end = conv if end is None else end
        _, reader = _sole_reader(self.program, end)
        if self.program.maker(conv).conv.stride != (1, 1) or isinstance(reader, Pooling):
            return False
        return carries_sum(self.program, end) if isinstance(reader, Addition) and self._is_linear(end) else end != conv

    def _is_linear(self, value: int) -> bool:
        return isinstance(self.program.maker(value), Convolution) or self.program.is_affine(value)

    def _folded(self, end: int) -> Part | None:
        """The convolution, or convolution and norm, that make a value and carry what is behind it."""
        if end in self.carriers:
            return Part(end)
        part = self._pair(end)
        return part if part is not None and part.conv in self.carriers else None

    def _pair(self, norm: int) -> Part | None:
        """A norm and the convolution that it alone reads."""
        node = self.program.maker(norm)
        is_pair = isinstance(node, Normalisation) and self._norm_behind(node.source) == norm
        return Part(node.source, norm) if is_pair else None

    def _projection(self, other: int) -> Part | None:
        """The convolution, or convolution and norm, that make a summand and nothing else."""
        if _sole_reader(self.program, other)[0] is None or not self._is_linear(other):
            return None
        return Part(other) if isinstance(self.program.maker(other), Convolution) else self._pair(other)

    def _projections(self, pointwise: dict[int, str]) -> set[int]:
        additions = [node for node in self.program.nodes if isinstance(node, Addition) and self._folded(node.branch)]
        found = [self._projection(node.other) for node in additions]
        return {part.conv for part in found if part is not None and part.conv in pointwise}

    def _is_lazy(self, value: int) -> bool:
        """Whether all readers of a norm with ReLU apply it on load."""
        node, readers = self.program.maker(value), self.program.readers(value)
        if not isinstance(node, Normalisation) or not node.relu or self._folded(value) is not None:
            return False
        return bool(readers) and all(reader in self.carriers for reader in readers)

    def _pays(self, conv: int, shifts: dict[int, str]) -> bool:
        """Whether a product is no launch more than stock: without a norm it wants vectors of ones and of shifts."""
        node, (_, add) = self.program.maker(conv), _sole_reader(self.program, conv)
        if not isinstance(add, Addition):
            return True
        part = self._projection(add.other)
        projected = part is not None and part.conv in self.projections
        made = [shifts[conv], *([shifts[part.conv]] if projected and part.norm is None else [])]
        spared = add.relu + projected + (self._is_lazy(node.source) and self.program.readers(node.source) == (conv,))
        return made.count("cast") + ("zeros" in made) <= spared

    def lowered(self) -> Lowered:
        steps: list[ForwardStep] = []
        made = {
            Convolution: self._convolution,
            Normalisation: self._norm,
            Addition: self._addition,
            Pooling: self._pool,
            Averaging: self._average,
        }
        for value, node in self.program.numbered:
            steps += made[type(node)](value, node)
        last = {value: i for i, step in enumerate(steps) for value in step.reads if value != self.program.output}
        dead = tuple(tuple(value for value, at in last.items() if at == i) for i in range(len(steps)))
        measured: set[int] = set()
        for step in reversed(steps):
            is_read = step.value in measured and not isinstance(step, UnfoldedConvolution)  # which tells no bound
            if is_read or (isinstance(step, FoldedConvolution) and step.asks_bound):
                measured |= set(step.reads)
        inputs = self.program.inputs
        parts = [value for step in steps if step.part is not None for value in step.part if value is not None]
        folded = tuple(sorted({value - inputs for value in parts}))
        return Lowered(self.program, tuple(steps), dead, tuple(i in measured for i in range(inputs)), folded)

    def _carry(self, value: int, part: Part, other: int | None = None, relu: bool = False) -> list[ForwardStep]:
        """The step of a convolution that carries all up to `value`."""
        node = self.program.maker(part.conv)
        in_place = other is not None and other >= self.program.inputs and len(self.program.readers(other)) == 1
        if self.few or part.conv in self.unfolded:
            more = {"main": part, "conv": node.conv, "few": self.few, "in_place": in_place}
            kind = CompiledConvolution if self.gpu else UnfoldedConvolution
            return [kind(value, node.source, other, relu, **more)]
        if part.conv in self.filtered:
            more = {"folded": part, "conv": node.conv, "outputs": self.filtered[part.conv]}
            return [WinogradConvolution(value, node.source, other, relu, **more)]
        if not self.gpu:
            more = {"folded": part, "conv": node.conv, "in_place": in_place}
            return [FoldedConvolution(value, node.source, other, relu, **more)]
        second = None if other is None else self._projection(other)
        if second is None or second.conv not in self.projections:
            return [Product(value, node.source, other, relu, main=part)]
        more = {"projection": second, "projected": self.program.maker(second.conv).source}
        return [Product(value, node.source, None, relu, main=part, **more)]

    def _convolution(self, value: int, node: Convolution) -> list[ForwardStep]:
        norm = self._norm_behind(value)
        if value in self.projections:
            return []
        if self._average_of(value) is not None:
            return []  # which is taken first, and then it
        if value not in self.carriers:
            return [ConvolveRaw(value, node.source, biased=norm is None or self._is_bare(norm))]
        behind = norm is not None or carries_sum(self.program, value)  # which brings it
        return [] if behind else self._carry(value, Part(value))

    def _is_bare(self, norm: int) -> bool:
        """Whether a norm without ReLU has nothing behind it that takes it as a value."""
        _, add = _sole_reader(self.program, norm)
        if not self.program.is_affine(norm) or not isinstance(add, Addition):
            return self.program.is_affine(norm)
        return self.written and norm != add.branch and self._folded(add.branch) is not None

    def _norm(self, value: int, node: Normalisation) -> list[ForwardStep]:
        part = self._folded(value)
        if node.source in self.projections or (part is not None and carries_sum(self.program, value)):
            return []
        if self.stem(value) is not None:
            return []  # the pool's step does it
        if node.act is not None:
            return self._activated(value, node, part)
        if part is not None:
            return self._carry(value, part, relu=node.relu)
        if self.few or self._is_bare(value):
            return [StockNorm(value, node.source, relu=node.relu)]
        _, reader = _sole_reader(self.program, value)
        taken = (
            not node.relu or value in self.lazy or isinstance(reader, Pooling) or self._average_of(value) is not None
        )
        made = NormValue(value, node.source, biased=self._pair(value) is not None)
        return [made] if taken else [made, NormPass(value, value, relu=True)]

    def _activated(self, value: int, node: Normalisation, part: Part | None) -> list[ForwardStep]:
        """A norm with an activation but ReLU: in oneDNN's epilogue, in a pass with the norm, or by itself, in place."""
        if part is None and not self.few:
            made = NormValue(value, node.source, biased=self._pair(value) is not None)
            return [made, NormActPass(value, value, act=node.act)]
        made = [StockNorm(value, node.source)] if part is None else self._carry(value, part)
        if isinstance(made[0], FoldedConvolution):
            return [dataclasses.replace(made[0], act=node.act)]
        return [*made, ActPass(value, value, act=node.act)]

    def _addition(self, value: int, node: Addition) -> list[ForwardStep]:
        part = self._folded(node.branch)
        if part is not None:
            return self._carry(value, part, node.other, node.relu)
        if self.program.is_affine(node.branch) and not self.few:
            return [NormPass(value, node.branch, node.other, node.relu)]
        if self.program.is_affine(node.other) and not self.few and not self._is_bare(node.other):
            return [NormPass(value, node.other, node.branch, node.relu)]
        return [Add(value, node.branch, node.other, node.relu)]

    def stem(self, norm: int) -> Part | None:
        """The convolution of few channels and the norm with ReLU, `norm`, that a pool alone reads."""
        part, node, (_, reader) = self._pair(norm), self.program.maker(norm), _sole_reader(self.program, norm)
        whole = part is not None and part.conv in self.stems and node.relu and isinstance(reader, Pooling)
        return part if whole else None

    def _pool(self, value: int, node: Pooling) -> list[ForwardStep]:
        stem = self.stem(node.source)
        if stem is not None:
            conv = self.program.maker(stem.conv)
            return [StemPool(value, conv.source, relu=True, main=stem, conv=conv.conv)]
        raw = not self.few and self._folded(node.source) is None
        return [(RawPool if raw else StockPool)(value, node.source)]

    def _average_of(self, value: int) -> int | None:
        """The average of whole windows that alone reads a norm, or the convolution that alone reads it, or is that."""
        number, reader = _sole_reader(self.program, value)
        if isinstance(reader, Convolution) and isinstance(self.program.maker(value), Normalisation):
            number, reader = _sole_reader(self.program, number)
            return number if isinstance(reader, Averaging) and number in self.whole else None
        return number if isinstance(reader, Averaging) and number in self.whole else None

    def _average(self, value: int, node: Averaging) -> list[ForwardStep]:
        conv, read = self.program.maker(node.source), node.source
        if not isinstance(conv, Convolution) or value not in self.whole:
            raw = value in self.whole and self._is_raw(read)
            return [(RawAverage if raw else StockAverage)(value, read, average=value)]
        norm = conv.source
        first = (RawAverage if self._is_raw(norm) else StockAverage)(norm, norm, average=value)
        if node.source in self.carriers:
            return [first, *self._carry(value, Part(node.source))]
        return [first, ConvolveRaw(value, norm, conv=node.source)]

    def _is_raw(self, norm: int) -> bool:
        """Whether a value is a norm's that nobody wrote."""
        is_norm = isinstance(self.program.maker(norm), Normalisation) and self._average_of(norm) is not None
        return is_norm and not self.few and self._folded(norm) is None
