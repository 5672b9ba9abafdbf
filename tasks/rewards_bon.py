"""Best-of-n: what the best of n responses by a proxy reward is truly worth, for every n, without sampling.

Pools of N candidates are rows of matrices, padded with NaN where a pool has fewer.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class BestOfN(NamedTuple):
    """The curve over n, averaged over pools: `kl` in nats, `gold` and `proxy` in the units of the rewards."""

    n: Int[Tensor, " sizes"]
    kl: Float[Tensor, " sizes"]
    gold: Float[Tensor, " sizes"]
    proxy: Float[Tensor, " sizes"]
    gold_se: Float[Tensor, " sizes"]


class Overoptimisation(NamedTuple):
    """How far gold fell from its best: `score` = gold at the peak - gold at the largest n; `peak` is the best n."""

    score: float
    peak: int


def kl_of_best(n: int | float) -> float:
    """KL(best of n || one draw) = log n - (n - 1) / n, in nats (Stiennon et al. 2020); an upper bound for ties."""
    return math.log(n) - (n - 1) / n


def sizes_up_to(candidates: int) -> list[int]:
    """1, 2, 4, ... and the number of candidates itself."""
    powers = [2**k for k in range(candidates.bit_length()) if 2**k <= candidates]
    return powers if powers[-1] == candidates else [*powers, candidates]


def best_of_n(
    proxy: Float[Tensor, "pools candidates"],
    gold: Float[Tensor, "pools candidates"],
    sizes: Sequence[int] | None = None,
) -> BestOfN:
    """Expected gold and proxy reward of the proxy's favourite among n candidates drawn without repetition.

    Unbiased: with candidates in order of the proxy, the i-th (from 1) of N is the best of a random n-subset with
    probability C(i-1, n-1) / C(N, n) (Nakano et al. 2021). Tied candidates share their probability. Candidates with
    NaN gold or proxy are left out; sizes beyond a pool's own number leave that pool out.

    Args:
        sizes: the n; default: powers of two and the number of candidates of the smallest pool.

    Raises:
        ValueError: a size below 1 or beyond every pool, or an empty pool.
    """
    proxy, gold = proxy.double(), gold.double()
    known = ~(proxy.isnan() | gold.isnan())
    count = known.sum(1)
    if not len(count) or int(count.min()) < 1:
        raise ValueError("best_of_n: every pool needs a candidate with proxy and gold reward")
    sizes = sizes_up_to(int(count.min())) if sizes is None else sizes
    if not sizes or min(sizes) < 1 or max(sizes) > int(count.max()):
        raise ValueError(f"best_of_n: sizes {list(sizes)} must lie between 1 and {int(count.max())}")
    rank_gold, rank_proxy = _by_proxy(proxy, gold, known)
    weights = torch.stack([_chances(count, rank_gold.shape[1], n) for n in sizes], 1)
    values = [torch.einsum("psc,pc->ps", weights, ranked) for ranked in (rank_gold, rank_proxy)]
    large = count[:, None] >= torch.tensor(sizes)
    pools = large.sum(0)
    means = [(value * large).sum(0) / pools for value in values]
    variance = ((values[0] - means[0]).square() * large).sum(0) / (pools - 1)  # NaN with one pool
    return BestOfN(
        n=torch.tensor(sizes),
        kl=torch.tensor([kl_of_best(n) for n in sizes], dtype=torch.double),
        gold=means[0],
        proxy=means[1],
        gold_se=(variance / pools).sqrt(),
    )


def overoptimisation(n: Int[Tensor, " sizes"], gold: Float[Tensor, " sizes"]) -> Overoptimisation:
    """Fall of a curve's gold reward from its peak to the largest n, and where the peak is (the first of equals)."""
    peak = int(gold.argmax())
    return Overoptimisation(float(gold[peak] - gold[int(n.argmax())]), int(n[peak]))


def pool_matrix(
    reward: Float[Tensor, "pairs 2"], gold: Float[Tensor, "pairs 2"], pool: Int[Tensor, " pairs"]
) -> tuple[Float[Tensor, "pools candidates"], Float[Tensor, "pools candidates"]]:
    """Proxy and gold rewards of the pools in a `PreferenceBatch`'s rows, NaN padded; other rows (-1) are left out.

    Repeated candidates (NaN gold) are dropped, as is what a distributed sampler doubled if the caller kept it: give
    each row once.
    """
    keep = (pool >= 0)[:, None] & ~gold.isnan()
    owner = pool[:, None].expand_as(gold)[keep]
    _, dense, count = owner.unique(return_inverse=True, return_counts=True)
    order = dense.argsort(stable=True)
    place = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[dense[order]]
    shape = (len(count), int(count.max()) if len(count) else 0)
    matrices = []
    for values in (reward, gold):
        matrix = torch.full(shape, torch.nan, dtype=torch.double, device=values.device)
        matrix[dense[order], place] = values[keep][order].double()
        matrices.append(matrix)
    return matrices[0], matrices[1]


def _by_proxy(
    proxy: Float[Tensor, "pools candidates"], gold: Float[Tensor, "pools candidates"], known: Tensor
) -> tuple[Float[Tensor, "pools candidates"], Float[Tensor, "pools candidates"]]:
    """Gold and proxy in ascending order of the proxy, unknown last and 0; tied candidates have their mean gold."""
    order = proxy.masked_fill(~known, torch.inf).argsort(dim=1, stable=True)
    ranked, value, there = (x.gather(1, order) for x in (proxy, gold, known))
    ranked, value = ranked.masked_fill(~there, 0.0), value.masked_fill(~there, 0.0)
    new = torch.ones_like(there)
    new[:, 1:] = (ranked[:, 1:] != ranked[:, :-1]) | (there[:, 1:] != there[:, :-1])
    run = new.cumsum(1) - 1
    total, size = (torch.zeros_like(value).scatter_add(1, run, x) for x in (value, torch.ones_like(value)))
    return (total / size.clamp(min=1)).gather(1, run), ranked


def _chances(count: Int[Tensor, " pools"], width: int, n: int) -> Float[Tensor, "pools candidates"]:
    """C(i-1, n-1) / C(N, n) for i = 1 ... N of each pool, 0 beyond."""
    place = torch.arange(1, width + 1, dtype=torch.double)
    top = count[:, None].double()

    def log_choose(a: Tensor, b: int) -> Tensor:
        return torch.lgamma(a + 1) - math.lgamma(b + 1) - torch.lgamma((a - b).clamp(min=0) + 1)

    chance = (log_choose(place - 1, n - 1) - log_choose(top, n)).exp()
    return chance.masked_fill((place < n) | (place > top), 0.0)
