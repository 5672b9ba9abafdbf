"""Batches of indices for datasets that build a whole batch at once."""

import math
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

_WINDOW = 16  # batches among which samples of similar size are put together


class IndexBatches(Sampler[list[int]]):
    """Lists of sample indices, each process of a distributed run its share.

    The order of an epoch follows from torch's seed and the epoch alone, so a resumed run sees what an uninterrupted
    one would have seen. With `sizes`, a number for each sample, a shuffled batch has samples of similar size: every 16
    batches' worth of samples is sorted by size, then the batches are shuffled.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        wanted: int | None = None,
        shuffle: bool = False,
        sizes: Tensor | None = None,
    ) -> None:
        self.count, self.batch_size, self.shuffle, self.sizes = count, batch_size, shuffle, sizes
        self.wanted = count if wanted is None else wanted
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(torch.initial_seed() + self.epoch)
        order = torch.randperm(self.count, generator=generator) if self.shuffle else torch.arange(self.count)
        rank, world = _place()
        # Modulo: processes get equal shares, if need be by repeating a sample (tests drop the repeats).
        own = order[(torch.arange(self._share()) * world + rank) % self.wanted]
        batches: Iterable[int] = range(len(self))
        if self.shuffle and self.sizes is not None:
            own = self._by_size(own[: len(self) * self.batch_size], self.sizes)
            batches = torch.randperm(len(self), generator=generator).tolist()
        chosen = own.tolist()
        for i in batches:
            yield chosen[i * self.batch_size : (i + 1) * self.batch_size]

    def _by_size(self, order: Tensor, sizes: Tensor) -> Tensor:
        """Sorted by size within windows."""
        window = torch.arange(len(order)) // (_WINDOW * self.batch_size)
        by_size = sizes[order].argsort(stable=True)
        return order[by_size[window[by_size].argsort(stable=True)]]

    def __len__(self) -> int:
        if self.shuffle:  # a ragged last batch would only add noise
            return max(self._share() // self.batch_size, 1)
        return math.ceil(self._share() / self.batch_size)

    def _share(self) -> int:
        return math.ceil(self.wanted / _place()[1])


def _place() -> tuple[int, int]:
    """This process's rank and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
