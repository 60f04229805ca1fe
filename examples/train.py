"""Train a residual network, fused, on digits, CIFAR-10 or a folder of images; killed at any moment, it resumes exactly.

    python examples/train.py                                        # resnet20 on 4,000 digits, a few minutes
    python examples/train.py --data DIR --model timm:resnet50d --amp bf16 --ema 0.999
    torchrun --nproc-per-node 2 examples/train.py --data DIR --model resnet50
    python examples/train.py --resume                               # goes on after the last step that was saved

In --out are then log.csv and curves.png, checkpoint.pt, and weights.pt: a state_dict that the stock model loads, with
--ema of the averaged weights.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import pathlib

import asked
import image_data
import outputs
import results
import resumable
import torch
import torch.nn.functional as F
from asked import not_negative, positive
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import resnet_fused

#: Options that decide what comes out: a checkpoint is of a run with the same.
DECIDING = "model stock data size take epochs batch accumulate lr weight_decay warmup ema amp sync_bn seed".split()


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="resnet20", help="of resnet_fused.models, timm:NAME or torchvision:NAME [%(default)s]")
    add("--stock", action="store_true", help="as it is, not fused")
    add("--data", default="digits", help='"digits", or a folder with train/CLASS and val/CLASS, or with CIFAR-10')
    add("--size", type=positive, help="pixels along an edge [224 for a folder of images, else 32]")
    add("--take", type=positive, help="so many training images, and so many for testing, only")
    add("--epochs", type=positive, default=10, help="[%(default)s]")
    add("--batch", type=positive, default=64, help="images at once, of each process [%(default)s]")
    add("--accumulate", type=positive, default=1, help="batches whose gradients make one step [%(default)s]")
    add("--lr", type=not_negative, default=0.1, help="highest learning rate, of the whole step [%(default)s]")
    add("--weight-decay", type=not_negative, default=5e-4, help="not of norms and biases [%(default)s]")
    add("--warmup", type=not_negative, default=1.0, help="epochs until the highest learning rate [%(default)s]")
    add("--ema", type=asked.number(float, 0, 1), help="keep an average of the weights too, with this decay, as 0.999")
    add("--amp", choices=["bf16"], help="autocast")
    add("--sync-bn", action="store_true", help="statistics of all processes' images, where there are several, on GPUs")
    add("--seed", type=asked.seed, default=0, help="[%(default)s]")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=asked.device, default=default, help="[%(default)s]")
    add("--workers", type=asked.workers, default=0, help="processes that read images, of each process [%(default)s]")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/train"), help="folder for results [%(default)s]")
    add(
        "--save-every",
        type=positive,
        metavar="STEPS",
        help="save within epochs too, after so many steps each",
    )
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    return parser.parse_args(argv)


class Run:
    """A network in training, and everything that its next step depends on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, args.device
        together = distributed.is_initialized()
        self.rank, self.world = (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        resumable.seed(args.seed + self.rank)  # what differs in weights, rank 0 settles
        data = image_data.load(args.data, args.size, args.seed)
        taken = image_data.spread(len(data.train), args.take)
        self.order = image_data.Order(taken, args.batch * args.accumulate, args.seed, self.rank, self.world)
        self.train_images = DataLoader(
            data.train,
            args.batch,
            sampler=self.order,
            num_workers=args.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
            persistent_workers=args.workers > 0,
        )  # fmt: skip - with a generator of its own it draws no number that a model would have drawn
        mine = image_data.spread(len(data.test), args.take)[self.rank :: self.world]
        self.test_images = DataLoader(Subset(data.test, mine), args.batch, generator=torch.Generator())
        self.settings = self._settings(data)
        self.network = self._network(len(data.classes))
        self.model = self.network
        if together:
            self.model = DistributedDataParallel(self.network)
        self.optimizer = torch.optim.SGD(self._parameters(), args.lr, momentum=0.9, nesterov=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._share_of_rate)
        self.average = None
        if args.ema is not None:
            averaging = get_ema_multi_avg_fn(args.ema)
            self.average = AveragedModel(self.network, multi_avg_fn=averaging, use_buffers=True)
        self.epoch = self.step = 0  # the next one; steps count anew in each epoch
        self.sums = torch.zeros(3, device=self.device, dtype=torch.float64)  # of this epoch: loss, right, images
        self.history: list[dict] = []

    def _settings(self, data: image_data.Data) -> dict[str, object]:
        """What decides, as it was decided: two ways to ask for the same, a default being one, are one setting."""
        asked_for = {name: getattr(self.args, name) for name in DECIDING}
        take = self.args.take if (self.args.take or math.inf) < max(len(data.train), len(data.test)) else None
        sync = self._synchronised()
        decided = {"data": data.source, "size": data.size, "take": take, "sync_bn": sync, "processes": self.world}
        return asked_for | decided

    def _synchronised(self) -> bool:
        return self.args.sync_bn and self.world > 1 and self.device.type == "cuda"

    def _network(self, classes: int) -> nn.Module:
        network = asked.network(self.args.model, classes)
        if self._synchronised():
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        elif self.args.sync_bn:
            self.say(f"--sync-bn: of {self.world} process(es) on {self.device.type}, each has statistics of its own")
        network.to(self.device, memory_format=torch.channels_last)
        if not self.args.stock:
            resnet_fused.fuse(network)
            self.say(str(resnet_fused.report(network)).splitlines()[0])
        return network

    def _parameters(self) -> list[dict]:
        weights = [p for p in self.network.parameters() if p.ndim > 1]
        others = [p for p in self.network.parameters() if p.ndim <= 1]
        return [{"params": weights, "weight_decay": self.args.weight_decay}, {"params": others, "weight_decay": 0.0}]

    def _share_of_rate(self, step: int) -> float:
        """Linear to 1 within the first epochs, then a half cosine to 0."""
        total, rising = self.args.epochs * self.order.steps, self.args.warmup * self.order.steps
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def state(self) -> dict:
        """All of it, at the boundary of a step, as :func:`resumable.save` writes it."""
        return {
            "settings": self.settings,
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "random": resumable.random_states(),
            "epoch": self.epoch,
            "step": self.step,
            "sums": self._summed(self.sums),
            "history": self.history,
        }

    def restore(self, state: dict) -> None:
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
        self.sums.copy_(state["sums"]).mul_(self.rank == 0)
        resumable.restore_random(state["random"])

    def _summed(self, sums: torch.Tensor) -> torch.Tensor:
        """`sums` of all processes."""
        total = sums.clone()
        if self.world > 1:
            distributed.all_reduce(total)
        return total

    def save(self) -> None:
        state = self.state()  # all processes, as they tell each other their random states
        if self.rank == 0:
            resumable.save(state, self.args.out / "checkpoint.pt")

    def train_epoch(self) -> None:
        self.model.train()
        self.order.epoch, self.order.start = self.epoch, self.step
        bar = tqdm(
            total=self.order.steps, initial=self.step, desc=f"epoch {self.epoch + 1}/{self.args.epochs}", unit="step",
            leave=False, disable=None if self.rank == 0 else True,
        )  # fmt: skip
        batches = image_data.read(self.train_images)
        for _ in range(self.order.steps - self.step):
            self.train_step([next(batches) for _ in range(self.args.accumulate)])
            bar.update()
            self.step += 1
            if self.args.save_every and self.step % self.args.save_every == 0:
                self.save()
            if self.step % 20 == 0:
                bar.set_postfix(loss=f"{self.sums[0] / self.sums[2]:.3f}")
        bar.close()

    def train_step(self, batches: list) -> None:
        self.optimizer.zero_grad()
        for place, (images, classes) in enumerate(batches, 1):
            more = self.world > 1 and place < len(batches)
            with self.model.no_sync() if more else contextlib.nullcontext():
                loss, right = self.measured(self.model, images, classes)
                (loss / len(batches)).backward()
            self.sums += torch.stack([loss.detach() * len(classes), right, right.new_tensor(len(classes))])
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.network)

    def measured(self, model: nn.Module, images: torch.Tensor, classes: torch.Tensor):
        """The mean loss over some images, and how many are recognised."""
        images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        classes = classes.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp == "bf16"):
            scores = asked.scores_of(self.args.model, model(images))
        scores = scores.float()
        return F.cross_entropy(scores, classes), (scores.argmax(1) == classes).sum().double()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Mean loss and percent recognised of the test images, each process some of them."""
        model.eval()
        for buffer in model.buffers() if self.world > 1 else ():
            distributed.broadcast(buffer, 0)  # each process has seen other images
        sums = torch.zeros_like(self.sums)
        for images, classes in image_data.read(self.test_images):
            loss, right = self.measured(model, images, classes)
            sums += torch.stack([loss * len(classes), right, right.new_tensor(len(classes))])
        loss, right, count = self._summed(sums).tolist()
        return loss / count, 100 * right / count

    def finish_epoch(self) -> None:
        """Test, log, save."""
        loss, right, count = self._summed(self.sums).tolist()
        if not math.isfinite(loss):
            raise SystemExit(f"the loss became {loss} in epoch {self.epoch + 1}; lower --lr or raise --warmup")
        row = {"epoch": self.epoch + 1, "train_loss": loss / count, "train_accuracy": 100 * right / count}
        row["test_loss"], row["test_accuracy"] = self.evaluate(self.network)
        if self.average is not None:
            row["average_test_loss"], row["average_test_accuracy"] = self.evaluate(self.average.module)
        self.history.append(row)
        self.say("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
        self.epoch, self.step = self.epoch + 1, 0
        self.sums.zero_()
        if self.rank == 0:
            results.write_csv(self.history, self.args.out / "log.csv")  # first: a run that ends here writes it again
        self.save()


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    with processes(args), outputs.held_together(args.out):
        checkpoint = args.out / "checkpoint.pt"
        if checkpoint.exists() and not args.resume:
            raise SystemExit(f"{checkpoint} is there already: --resume goes on with it, or give another --out")
        run = Run(args)
        if checkpoint.exists():
            run.restore(resumable.load(checkpoint, run.settings))
            run.say(f"{checkpoint}: goes on in epoch {run.epoch + 1} after {run.step} of {run.order.steps} steps")
        while run.epoch < args.epochs:
            run.train_epoch()
            run.finish_epoch()
        if run.rank == 0:
            best = run.network if run.average is None else run.average.module
            resumable.save(best.state_dict(), args.out / "weights.pt")
            results.plot_training(run.history, args.out / "curves.png")


@contextlib.contextmanager
def processes(args: argparse.Namespace):
    """Within the block, the processes that torchrun started know each other, each with a device of its own."""
    together, cuda = "WORLD_SIZE" in os.environ, args.device.type == "cuda"
    if cuda:
        number, count = int(os.environ["LOCAL_RANK"]) if together else args.device.index or 0, torch.cuda.device_count()
        if number >= count:
            raise SystemExit(f"--nproc-per-node: each process needs a CUDA device of its own, torch sees {count}")
        torch.cuda.set_device(number)  # whose random numbers are saved, and by which processes tell each other things
    if not together:
        yield
        return
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
