"""Random crops and flips of a whole batch at once, on whatever device it is."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def crop_and_flip(
    image: Float[Tensor, "batch channels height width"],
    index: Int[Tensor, " batch"],
    epoch: int,
    seed: int,
    padding: int = 4,
    flip: bool = True,
) -> Float[Tensor, "batch channels height width"]:
    """Each image padded with black on all sides and cropped anew, and half of them mirrored (He et al. 2016, 4.2).

    What becomes of an image follows from its `index`, `epoch` and `seed` alone: not from the batch it is in, the
    device, the number of processes or whether the run was resumed.
    """
    height, width = image.shape[2:]
    draw = [random_bits(index, epoch, 3 * seed + k) for k in range(3)]
    top, left = (value % (2 * padding + 1) for value in draw[:2])
    rows = top[:, None] + torch.arange(height, device=image.device)
    columns = left[:, None] + torch.arange(width, device=image.device)
    if flip:
        columns = torch.where((draw[2] % 2 == 1)[:, None], columns.flip(1), columns)
    padded = F.pad(image, (padding, padding, padding, padding))
    image = padded.gather(2, rows[:, None, :, None].expand(*image.shape[:3], padded.shape[3]))
    return image.gather(3, columns[:, None, None, :].expand(*image.shape[:3], width))


def random_bits(index: Int[Tensor, " batch"], epoch: int, stream: int) -> Int[Tensor, " batch"]:
    """31 random bits for each (index, epoch, stream), by the mixing steps of SplitMix64 (Steele et al. 2014)."""
    x = index.long() + _wrapped(0x9E3779B97F4A7C15 * (1 + epoch)) + _wrapped(0xD1B54A32D192ED03 * (1 + stream))
    x = (x ^ _shifted(x, 30)) * _wrapped(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _wrapped(0x94D049BB133111EB)
    return _shifted(x, 33)


def _shifted(x: Int[Tensor, " batch"], bits: int) -> Int[Tensor, " batch"]:
    """To the right, zeros coming in, which int64 alone does not do."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrapped(value: int) -> int:
    """As int64 holds it."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
