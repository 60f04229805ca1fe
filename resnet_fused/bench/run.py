"""The benchmark: prove that fused and stock agree, then time them in turn."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import nn

import resnet_fused
from resnet_fused.plan import choose

from . import equality, fresh, memory, named, peers, photos, records
from .blocks import Block, distinct_blocks
from .options import DTYPES, Options, Plan, autocast_dtype, device_of, plan_for
from .progress import Bar
from .timing import Samples, clock_for, interleave, speedup_interval

#: Images that equality is proved on: a float64 ResNet-50 takes seconds for each.
PHOTOS = 4
#: How far a peer's result in evaluation may be from stock's, of its largest value.
TOLERATED = {"f32": 1e-3, "bf16": 5e-2, "f16": 1e-2}


class Disagreement(RuntimeError):
    """Fused and stock differ; the text says where."""


@dataclasses.dataclass
class Bench:
    """One run: the models of all peers on one device, and the report that grows."""

    options: Options
    plan: Plan
    device: torch.device
    models: dict[str, nn.Module]  # peer -> model, stock first; all with the same weights
    bar: Bar
    report: records.Report

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """What --dtype asks for."""
        dtype = autocast_dtype(self.options.dtype)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            yield

    def add_times(self, name: str, timed: dict[str, dict[str, Samples]], lap: str = "total") -> None:
        samples = {peer: laps[lap] for peer, laps in timed.items()}
        stock = samples[peers.STOCK]
        intervals = {peer: speedup_interval(stock, s) for peer, s in samples.items() if s is not stock}
        measured = {p: (s.median, s.quantile(0.1), s.quantile(0.9), len(s)) for p, s in samples.items()}
        self.report.rows += records.rows_of(name, "ms", measured, intervals)

    def add_bytes(self, name: str, found: dict[str, int]) -> None:
        measured = {peer: (count / memory.MB,) * 3 + (1,) for peer, count in found.items()}
        self.report.rows += records.rows_of(name, "MB", measured)

    def fused_names(self) -> list[str]:
        return [row.name for row in resnet_fused.report(self.models[peers.OURS]).fused]

    def equality(self, progress: Callable[[float], None]) -> None:
        """Compare stock and fused on photographs; raises :class:`Disagreement` where they differ."""
        x = photos.batches(1, PHOTOS, self.plan.size)[0].to(self.device)
        stock, fused = self.models[peers.STOCK], self.models[peers.OURS]
        with choose.fusing_all():  # also what so few images leave to stock
            found = equality.check(stock, fused, x, self.fused_names(), autocast_dtype(self.options.dtype), progress)
        self.report.equality = equality.summary(found)
        wrong = [difference for difference in found if not difference.agrees]
        if wrong:
            lines = "\n".join(f"  {difference}" for difference in wrong[:20])
            more = f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else ""
            raise Disagreement(f"fused and stock disagree in {len(wrong)} of {len(found)} tensors:\n{lines}{more}")
        self.bar.say(f"equal: {len(found)} tensors on {len(x)} photographs, each within its limit against float64")

    def training(self, progress: Callable[[float], None]) -> None:
        """A training step of every peer, split in forward and backward; what it keeps; its peak on a GPU."""
        name = f"training step, batch {self.plan.batch}"
        x = photos.batches(1, self.plan.batch, self.plan.size)[0].to(self.device)
        steps = {}
        for peer, model in self.models.items():
            steps[peer] = self.step(model.train(), x)
        counted = [p for p in self.models if p == peers.STOCK or getattr(peers.load(p), "COUNTED", False)]
        self.add_bytes(name, {p: self.saved(self.models[p], x) for p in counted})
        if self.device.type == "cuda":
            peaks = {p: memory.peak_cuda_bytes(lambda p=p: steps[p](lambda lap: None)) for p in steps}
            self.add_bytes("training step, peak memory", peaks)
        timed = interleave(steps, self.plan.training, clock_for(self.device), progress)
        self.add_times(name, timed)
        self.add_times(f"training forward, batch {self.plan.batch}", timed, "forward")
        self.add_times(f"training backward, batch {self.plan.batch}", timed, "backward")

    def step(self, model: nn.Module, x: torch.Tensor) -> Callable:
        """Forward and backward of a classification, as :func:`interleave` calls it."""
        labels = torch.arange(len(x), device=self.device) % 10  # any classes will do
        seeds = itertools.count()  # stochastic depth drops the same of every peer

        def run(lap: Callable[[str], None]) -> None:
            for parameter in model.parameters():
                parameter.grad = None
            torch.manual_seed(next(seeds))
            with self.autocast():
                loss = nn.functional.cross_entropy(model(x), labels)
            lap("forward")
            loss.backward()
            lap("backward")

        return run

    def saved(self, model: nn.Module, x: torch.Tensor) -> int:
        def forward() -> torch.Tensor:
            with self.autocast():
                return model(x)

        return memory.saved_bytes(forward, model.parameters())

    def evaluation(self, batch: int, progress: Callable[[float], None]) -> None:
        """A forward of every peer in evaluation mode, without gradients."""
        x = photos.batches(1, batch, self.plan.size)[0].to(self.device)
        runs = {peer: self.evaluate(model.eval(), x) for peer, model in self.models.items()}
        self.agree(batch, x)
        timed = interleave(runs, self.plan.evaluation, clock_for(self.device), progress)
        self.add_times(f"evaluation, batch {batch}", timed)

    def agree(self, batch: int, x: torch.Tensor) -> None:
        """Raise :class:`Disagreement` where a peer evaluates to something else than stock."""
        with torch.no_grad(), self.autocast():
            computing = {peer: model for peer, model in self.models.items() if not getattr(model, "is_bound", False)}
            expected, *others = [(peer, model(x).float()) for peer, model in computing.items()]
        scale = expected[1].abs().max()
        wrong = {p: ((out - expected[1]).abs().max() / scale).item() for p, out in others}
        wrong = {p: off for p, off in wrong.items() if not off <= TOLERATED[self.options.dtype]}
        if wrong:
            told = ", ".join(f"{peer} by {off:.1e} of the largest value" for peer, off in wrong.items())
            raise Disagreement(f"evaluation at batch {batch} differs from stock's: {told}")

    def evaluate(self, model: nn.Module, x: torch.Tensor) -> Callable:
        """One forward without gradients, as :func:`interleave` calls it."""

        def run(lap: Callable[[str], None]) -> None:
            with torch.no_grad(), self.autocast():
                model(x)
            lap("forward")

        return run

    def blocks(self, progress: Callable[[float], None]) -> None:
        """Forward and backward of every distinct fused block on its activations, stock against fused."""
        x = photos.batches(1, PHOTOS, self.plan.size)[0].to(self.device)
        found = distinct_blocks(self.models[peers.STOCK], self.fused_names(), x)
        for index, block in enumerate(found):
            self.block(block, lambda fraction, index=index: progress((index + fraction) / len(found)))

    def block(self, block: Block, progress: Callable[[float], None]) -> None:
        pair = {p: self.models[p].train().get_submodule(block.name) for p in (peers.STOCK, peers.OURS)}
        rounds = -(-self.plan.batch // PHOTOS)
        x = block.example.repeat(rounds, 1, 1, 1)[: self.plan.batch].contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        with torch.no_grad(), self.autocast():
            out = pair[peers.STOCK](x)
        with choose.observing() as choices, self.autocast():
            pair[peers.OURS](x)
        grad = torch.randn(out.shape).to(out, memory_format=torch.channels_last)

        def runner(module: nn.Module) -> Callable:
            seeds = itertools.count()

            def run(lap: Callable[[str], None]) -> None:
                for tensor in (x, *module.parameters()):
                    tensor.grad = None
                torch.manual_seed(next(seeds))
                with self.autocast():
                    out = module(x)
                lap("forward")
                out.backward(grad)
                lap("backward")

            return run

        runs = {peer: runner(module) for peer, module in pair.items()}
        stocked = choices and all(choice.startswith("stock") for choice in choices)
        label = block.label(self.plan.batch) + (", left to stock" if stocked else "")
        self.add_times(label, interleave(runs, self.plan.blocks, clock_for(self.device), progress))
        self.add_bytes(label, {peer: self.saved(module, x) for peer, module in pair.items()})


def run(options: Options) -> records.Report:
    """Build, fuse, prove equality on photographs, then time; returns the report.

    Raises:
        Refused: unknown model, peer or device, a size that the model does not take, nothing to fuse, or no
            photographs; the text says what is accepted.
        Disagreement: fused and stock differ.
    """
    device = device_of(options.device)
    wanted = [(name, peers.load(name)) for name in dict.fromkeys((peers.STOCK, peers.OURS, *options.peers))]
    torch.manual_seed(0)
    stock = named.build(options.model)
    equality.scatter_norms(stock)
    decided = plan_for(options, stock)
    named.require_taken(stock.train(), (decided.batch, 3, decided.size, decided.size))
    stock = stock.to(device, memory_format=torch.channels_last)
    settings = {"model": options.model, "dtype": options.dtype, "size": decided.size, "layout": "channels_last"}
    settings["command"] = records.command()
    report = records.Report(records.provenance(device, **settings))
    parts = {"equality on photographs": 25.0, "training step": 50.0}
    parts |= {f"evaluation at batch {b}": 3.0 + b / 2 for b in decided.eval_batches} | {"blocks": 30.0}
    parts |= {"fresh processes": 160.0 * options.fresh} if options.fresh else {}
    with Bar(parts) as bar:
        if records.busy():
            bar.say(records.busy())
        bench, only_evaluate = Bench(options, decided, device, {}, bar, report), {}
        for name, peer in wanted:
            takes = options.dtype in getattr(peer, "DTYPES", DTYPES)
            reason = peer.unavailable(device) or ("" if takes else f"not in {options.dtype}")
            if reason:
                bar.say(f"without {name}: {reason}")
                continue
            if getattr(peer, "TRAINS", True):
                bench.models[name] = peer.prepare(copy.deepcopy(stock))
            else:
                only_evaluate[name] = peer
        coverage = resnet_fused.report(bench.models[peers.OURS])
        report.provenance["fused"] = f"{coverage.convolutions} convolutions, {coverage.passes} passes"
        with bar.part("equality on photographs") as progress:
            bench.equality(progress)
        with bar.part("training step") as progress:
            bench.training(progress)
        stock = bench.models[peers.STOCK]  # with the running statistics that training moved, from here on everybody's
        for model in bench.models.values():
            getattr(model, "_orig_mod", model).load_state_dict(stock.state_dict())
        for name, peer in only_evaluate.items():
            bench.models[name] = peer.prepare(copy.deepcopy(stock))
        for batch in decided.eval_batches:
            with bar.part(f"evaluation at batch {batch}") as progress:
                bench.evaluation(batch, progress)
        with bar.part("blocks") as progress:
            bench.blocks(progress)
        if options.fresh:
            bench.models.clear()
            with bar.part("fresh processes") as progress:
                report.rows += fresh.measure(options, decided, device, options.fresh, progress)
    return report
