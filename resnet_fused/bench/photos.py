"""Real photographs without a download: the ones inside installed scikit-image and scikit-learn wheels."""

from __future__ import annotations

import importlib.metadata
import pathlib

import torch

from .errors import Refused

#: Colour photographs by distribution. Which of them a version's wheel carries is looked up, never fetched.
NAMES = {
    "scikit-image": (
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "rocket.jpg",
        "motorcycle_left.png",
        "hubble_deep_field.jpg",
        "retina.jpg",
        "ihc.png",
    ),
    "scikit-learn": ("china.jpg", "flower.jpg"),
}
MEAN = (0.485, 0.456, 0.406)  # ImageNet's, as every pretrained residual network expects
STD = (0.229, 0.224, 0.225)


def installed() -> list[pathlib.Path]:
    """Paths of all photographs that an installed wheel lists among its own files."""
    found = []
    for distribution, names in NAMES.items():
        try:
            files = importlib.metadata.files(distribution) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        paths = {file.name: file.locate() for file in files if file.name in names}
        found += [pathlib.Path(paths[name]) for name in names if name in paths and pathlib.Path(paths[name]).is_file()]
    return found


def batches(count: int, batch: int, size: int) -> list[torch.Tensor]:
    """`count` batches of `batch` photographs: float32 ``[batch, 3, size, size]``, channels_last, normalised.

    Consecutive images are different photographs; when all have been used, the next round takes another square of each.

    Raises:
        Refused: no photograph is installed, or Pillow, which reads them, is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise Refused(f"reading photographs needs Pillow ({error}); pip install pillow scikit-image") from error
    paths = installed()
    if not paths:
        raise Refused("no photographs found; pip install scikit-image, whose wheel carries some")
    opened = [Image.open(path).convert("RGB") for path in paths]
    images = [
        to_tensor(square(opened[index % len(opened)], index // len(opened)).resize((size, size), Image.BICUBIC))
        for index in range(count * batch)
    ]
    stacked = [torch.stack(images[i * batch : (i + 1) * batch]) for i in range(count)]
    return [b.contiguous(memory_format=torch.channels_last) for b in stacked]


def square(image, round_: int):
    """The largest centred square of `image`; in later rounds smaller and smaller off-centre ones, mirrored in turn."""
    width, height = image.size
    edge = int(min(width, height) * 0.9**round_)
    left = (width - edge) // 2 if round_ == 0 else (width - edge) * (round_ * 5 % 8) // 8
    top = (height - edge) // 2 if round_ == 0 else (height - edge) * (round_ * 3 % 8) // 8
    crop = image.crop((left, top, left + edge, top + edge))
    return crop.transpose(0) if round_ % 2 else crop  # 0: Image.FLIP_LEFT_RIGHT


def to_tensor(image) -> torch.Tensor:
    """A PIL image as float32 ``[3, H, W]``, normalised as ImageNet models expect."""
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = raw.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
