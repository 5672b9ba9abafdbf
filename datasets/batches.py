"""Batches of indices for datasets that build a whole batch at once."""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.utils.data import Sampler


class IndexBatches(Sampler[list[int]]):
    """Lists of sample indices, each process of a distributed run its share.

    The order of an epoch follows from torch's seed and the epoch alone, so a resumed run sees what an uninterrupted
    one would have seen.
    """

    def __init__(self, count: int, batch_size: int, wanted: int | None = None, shuffle: bool = False) -> None:
        self.count, self.batch_size, self.shuffle = count, batch_size, shuffle
        self.wanted = count if wanted is None else wanted
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.arange(self.count)
        if self.shuffle:
            order = torch.randperm(
                self.count, generator=torch.Generator().manual_seed(torch.initial_seed() + self.epoch)
            )
        rank, world = _place()
        # Modulo: processes get equal shares, if need be by repeating a sample (tests drop the repeats).
        own = order[(torch.arange(self._share()) * world + rank) % self.wanted].tolist()
        for i in range(len(self)):
            yield own[i * self.batch_size : (i + 1) * self.batch_size]

    def __len__(self) -> int:
        if self.shuffle:  # a ragged last batch would only add noise
            return max(self._share() // self.batch_size, 1)
        return math.ceil(self._share() / self.batch_size)

    def _share(self) -> int:
        return math.ceil(self.wanted / _place()[1])


def _place() -> tuple[int, int]:
    """This process's rank and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
