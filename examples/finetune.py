"""Fine-tune a checkpoint of torchvision, timm or your own on other classes, fused.

    python examples/finetune.py --model torchvision:resnet50 --weights resnet50-11ad3fa6.pth --data DIR --freeze-norms
    python examples/finetune.py --model timm:resnet50d --weights model.safetensors --data DIR
    python examples/finetune.py --model resnet20 --weights runs/train/weights.pt        # on digits again

DIR holds train/CLASS/* and val/CLASS/*. The last layer is new, with as many outputs as there are classes.
"""

from __future__ import annotations

import argparse
import pathlib

import asked
import image_data
import outputs
import results
import resumable
import torch
import torch.nn.functional as F
from asked import first_line, not_negative, positive
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import resnet_fused


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="of resnet_fused.models, timm:NAME or torchvision:NAME")
    add("--weights", type=pathlib.Path, required=True, help="its state_dict, as .pth or .safetensors")
    add("--data", default="digits", help='"digits", or a folder with train/CLASS and val/CLASS, or with CIFAR-10')
    add("--size", type=positive, help="pixels along an edge [224 for a folder of images, else 32]")
    add("--take", type=positive, help="so many training images, and so many for testing, only")
    add("--epochs", type=positive, default=3, help="[%(default)s]")
    add("--batch", type=positive, default=32, help="[%(default)s]")
    add("--lr", type=not_negative, default=0.003, help="of what was trained before [%(default)s]")
    add("--head-lr", type=not_negative, default=0.03, help="of the new layer [%(default)s]")
    add("--freeze-norms", action="store_true", help="batch norm keeps its statistics and parameters")
    add("--stock", action="store_true", help="as it is, not fused")
    add("--seed", type=asked.seed, default=0, help="[%(default)s]")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=asked.device, default=default, help="[%(default)s]")
    add("--workers", type=asked.workers, default=0, help="processes that read images [%(default)s]")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/finetune"), help="folder for results [%(default)s]")
    return parser.parse_args(argv)


def read_weights(path: pathlib.Path) -> dict[str, torch.Tensor]:
    """The state_dict in a file, also where it is an entry "state_dict" or "model" of it, as timm's scripts write it."""
    if not path.is_file():
        raise SystemExit(f"--weights: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise SystemExit(f"--weights {path} needs safetensors ({error}): pip install safetensors") from error
    except Exception as error:  # what is in other files can raise anything
        raise SystemExit(f"--weights: {path} does not hold a state_dict ({first_line(error)})") from error
    for name in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise SystemExit(f"--weights: {path} does not hold a state_dict, tensors by their names")
    return {name.removeprefix("module."): value for name, value in state.items()}  # DDP's


def head_of(network: nn.Module) -> str:
    """The name of the layer that scores classes: timm's own word, else the last linear one."""
    named = (getattr(network, "default_cfg", None) or {}).get("classifier")
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not isinstance(named, str) and not linear:
        raise SystemExit(f"--model: {type(network).__name__} has no linear layer to replace")
    return named if isinstance(named, str) else linear[-1]


def network(args: argparse.Namespace, classes: int) -> tuple[nn.Module, str]:
    """The network with the weights of the file, but for a new head, and the head's name."""
    made = asked.network(args.model, classes)
    head = head_of(made) + "."
    known = {name: value for name, value in read_weights(args.weights).items() if not name.startswith(head)}
    try:
        missing, unexpected = made.load_state_dict(known, strict=False)
    except RuntimeError as error:  # sizes differ
        raise SystemExit(f"--weights: {args.weights} is not of {args.model}: {error}") from error
    missing = [name for name in missing if not name.startswith(head)]
    if missing or unexpected:
        raise SystemExit(
            f"--weights: {args.weights} is not of {args.model}: {len(missing)} of its tensors are missing "
            f"{missing[:3]}, {len(unexpected)} are others {list(unexpected)[:3]}"
        )
    return made, head


def freeze_norms(network: nn.Module) -> None:
    """Batch norms as in evaluation, from now to the next ``network.train()``, and nothing of them to be trained."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.requires_grad_(False)


def train_epoch(net: nn.Module, images: DataLoader, optimizer, args: argparse.Namespace) -> float:
    """Percent of the training images recognised in an epoch."""
    net.train()
    if args.freeze_norms:
        freeze_norms(net)
    right = count = 0
    for batch, classes in tqdm(image_data.read(images), total=len(images), disable=None, leave=False):
        scores = asked.scores_of(args.model, net(batch.to(args.device, memory_format=torch.channels_last)))
        classes = classes.to(args.device)
        loss = F.cross_entropy(scores, classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right += (scores.argmax(1) == classes).sum()
        count += len(classes)
    return 100 * int(right) / count


@torch.no_grad()
def accuracy(net: nn.Module, images: DataLoader, args: argparse.Namespace) -> float:
    """Percent of the test images recognised."""
    net.eval()
    right = count = 0
    for batch, classes in image_data.read(images):
        scores = net(batch.to(args.device, memory_format=torch.channels_last))
        right += (scores.argmax(1) == classes.to(args.device)).sum()
        count += len(classes)
    return 100 * int(right) / count


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    with outputs.held_together(args.out):
        tune(args)


def tune(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    data = image_data.load(args.data, args.size, args.seed)
    net, head = network(args, len(data.classes))
    net.to(args.device, memory_format=torch.channels_last)
    if not args.stock:
        resnet_fused.fuse(net)
        print(resnet_fused.report(net))
    if args.freeze_norms:
        freeze_norms(net)
    order = image_data.Order(image_data.spread(len(data.train), args.take), args.batch, args.seed)
    train_images = DataLoader(data.train, args.batch, sampler=order, num_workers=args.workers)
    tested = Subset(data.test, image_data.spread(len(data.test), args.take))
    test_images = DataLoader(tested, args.batch, num_workers=args.workers)
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if not name.startswith(head)], "lr": args.lr},
        {"params": [p for name, p in trained if name.startswith(head)], "lr": args.head_lr},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    rows = []
    for epoch in range(args.epochs):
        order.epoch = epoch
        row = {"epoch": epoch + 1, "train_accuracy": train_epoch(net, train_images, optimizer, args)}
        schedule.step()
        rows.append(row | {"test_accuracy": accuracy(net, test_images, args)})
        print("  ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
        results.write_csv(rows, args.out / "log.csv")
    resumable.save(net.state_dict(), args.out / "weights.pt")


if __name__ == "__main__":
    main()
