"""Images in memory: decoded once, checked for size and colour, each mistake told with the name of its file."""

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError

Colour = Literal["rgb", "grey"]
_MODES = {"RGB": "rgb", "L": "grey", "1": "grey"}  # Pillow's names
_LONG_WORK = 20_000  # images whose decoding takes long enough to show how far it is


@dataclass(frozen=True)
class Images:
    """Images of one split and their classes.

    Attributes:
        image: uint8 [n, channels, size, size].
        label: int64 [n].
    """

    image: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class ImageSource:
    """A dataset as read: its name on the leaderboard, the names of its classes, and the two splits all of them have."""

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images

    def fingerprint(self) -> str:
        """sha256 (hex) of sizes, pixels and labels: the same in whichever format the images came."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            digest.update(repr((tuple(part.image.shape), self.classes)).encode())
            digest.update(part.image.contiguous().numpy().data)
            digest.update(part.label.contiguous().numpy().data)
        return digest.hexdigest()


def make_source(
    name: str,
    where: Path,
    classes: Sequence[str],
    train: tuple[UInt8[Tensor, "train channels h w"], Int[Tensor, " labels"]],
    test: tuple[UInt8[Tensor, "test c h2 w2"], Int[Tensor, " test_labels"]],
) -> ImageSource:
    """Checks what no single file shows: that there are images, alike in both splits, and labels of known classes.

    Raises:
        UserError: naming `where` the files lie.
    """
    for split, (image, label) in {"train": train, "test": test}.items():
        if not len(image):
            raise UserError(f"{where}: no {split} images; expected at least one")
        if len(label) != len(image):
            raise UserError(f"{where}: {len(image)} {split} images but {len(label)} labels; expected one each")
        if image.shape[2] != image.shape[3]:
            height, width = image.shape[2:]
            raise UserError(f"{where}: images of {width}x{height} pixels; expected squares, crop or resize them")
        low, high = int(label.min()), int(label.max())
        if low < 0 or high >= len(classes):
            raise UserError(
                f"{where}: {split} label {low if low < 0 else high} is out of range; expected 0 to "
                f"{len(classes) - 1} for {len(classes)} classes"
            )
    if train[0].shape[1:] != test[0].shape[1:]:
        (c, h, w), (tc, th, tw) = train[0].shape[1:], test[0].shape[1:]
        raise UserError(f"{where}: train images are {w}x{h} with {c} channels, test images {tw}x{th} with {tc}")
    if len(classes) < 2:
        raise UserError(f"{where}: one class ({classes[0]}); expected at least two")
    return ImageSource(name, tuple(classes), *(Images(image, label.long()) for image, label in (train, test)))


def decode(
    images: Sequence[bytes] | Sequence[Path], named: Callable[[int], str], colour: Colour | None = None
) -> UInt8[Tensor, "images channels height width"]:
    """Pixels of encoded images (PNG, WebP, JPEG), all of one size and colour.

    Args:
        images: contents or files.
        named: what to call the i-th in an error.
        colour: turn all into this; by default all must be alike, RGB or grey.

    Raises:
        UserError: one that cannot be read, or differs in size or colour from the first, is named.
    """
    if not images:
        return torch.empty(0, 3 if colour != "grey" else 1, 0, 0, dtype=torch.uint8)
    first = _pixels(images[0], named(0), colour)
    shape = first.shape
    out = np.empty((len(images), *shape), np.uint8)

    def one(i: int) -> None:
        pixels = first if i == 0 else _pixels(images[i], named(i), colour)
        if pixels.shape != shape:
            raise UserError(f"{named(i)}: {_described(pixels)}, but {named(0)} is {_described(first)}; make all alike")
        out[i] = pixels

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock
        for _ in _shown(pool.map(one, range(len(images)), chunksize=64), len(images)):
            pass
    return torch.from_numpy(out)


def _pixels(image: bytes | Path, name: str, colour: Colour | None) -> NDArray[np.uint8]:
    """[channels, height, width]."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as picture:
            found = _MODES.get(picture.mode)
            if colour is None and found is None:
                raise UserError(
                    f"{name}: colour mode {picture.mode}; expected RGB or grey (L): convert it, or give "
                    "data.files.colour=rgb (or grey) to have it converted"
                )
            wanted = {"rgb": "RGB", "grey": "L"}[colour or found or "rgb"]
            pixels = np.asarray(picture.convert(wanted) if picture.mode != wanted else picture)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except Exception as error:  # Pillow's decoders raise whatever comes
        raise UserError(f"{name}: not a readable image ({' '.join(str(error).split())[:120]})") from None
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))


def _described(pixels: NDArray[np.uint8]) -> str:
    channels, height, width = pixels.shape
    return f"{width}x{height} {'RGB' if channels == 3 else 'grey'}"


def _shown(work: Iterable[None], total: int) -> Iterable[None]:
    if total < _LONG_WORK:
        return work
    from rich.console import Console
    from rich.progress import track

    return track(work, f"reading {total:,} images", total, console=Console(stderr=True), transient=True)
