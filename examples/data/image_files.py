"""Image files as tensors: one file, or a folder with a subfolder for each class.

An image is turned upright, laid on white where it is transparent, scaled until it covers a square, and cut to it
around its centre. Shapes: T images, C channels (1 or 3), S side of the square.
"""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from expertmesh import ConfigError

FEWEST = 5
"""Images of a class, of which some are held out."""


def read_folder(folder: Path, side: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """All images [T, C, S, S] (float32 from 0 to 1), their classes [T] (int64), and the names of the classes.

    Each subfolder of `folder` is a class of that name. Hidden files are left out. Raises ConfigError that names the
    file for anything else that is no image, for fewer than two classes, and for a class of fewer than 5 images.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: it is no folder; give one that has a subfolder of images for each class")
    classes = [path for path in _visible(folder) if path.is_dir()]
    if len(classes) < 2:
        raise ConfigError(
            f"{folder}: it has {len(classes)} subfolders; there must be one for each class, and at least two classes"
        )
    files = [(path, number) for number, own in enumerate(classes) for path in _images_of(own)]
    images = as_images(torch.stack([read_image(path, side) for path, _ in files]))
    return images, torch.tensor([number for _, number in files]), tuple(own.name for own in classes)


def read_image(path: Path, side: int, where: str = "") -> Tensor:
    """The image as uint8 [3, S, S]. Raises ConfigError, which begins with `where` (by default the path)."""
    told = f"{where}: image {str(path)!r}" if where else str(path)
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ConfigError(f"{told} has more than 8 bits a channel: save it with 8")
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except FileNotFoundError:
        raise ConfigError(f"{told} does not exist") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{told} cannot be read as an image: mend it or take it away ({error})") from None
    ground = Image.new("RGBA", upright.size, "white")
    ground.alpha_composite(upright)
    square = ImageOps.fit(ground.convert("RGB"), (side, side))
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)


def as_images(pixels: Tensor) -> Tensor:
    """Pixels uint8 [T, 3, S, S] as float32 [T, C, S, S] from 0 to 1, with one channel where nothing has a colour."""
    grey = bool((pixels == pixels[:, :1]).all())
    return (pixels[:, :1] if grey else pixels).float() / 255


def _images_of(folder: Path) -> list[Path]:
    found = _visible(folder)
    for path in found:
        if path.is_dir():
            raise ConfigError(
                f"{path}: it is a folder inside the class {folder.name!r}, and a class has images alone; if "
                f"{folder.name!r} is one part of the data, as in train and test, give {folder} itself"
            )
    if len(found) < FEWEST:
        raise ConfigError(f"{folder}: the class has {len(found)} images; add some, at least {FEWEST} are needed")
    return found


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
