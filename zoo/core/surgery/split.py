"""The experts that are in a dense MLP already: EMoE splits its hidden layer by what the neurons answer to."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..moe import MoE
from ..routing import Gate, LinearGate
from ..routing.router import Choice, ChoosingRouter, ExpertMask, choose, softmax_over_experts
from .dense import experts_like, read_mlp


class EmergentRouter(ChoosingRouter):
    """The k experts with the largest logits, each with weight 1: their outputs add up as neurons of an MLP do.

    Nothing of it learns from the output, since weights are constant (EMoE, Qiu et al. 2024).
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, gate: Gate | None = None) -> None:
        super().__init__(dim, num_experts, top_k, gate)

    def choice(
        self,
        logits: Float[Tensor, "tokens experts"],
        token_mask: Bool[Tensor, "tokens"] | None,
        expert_mask: ExpertMask | None,
    ) -> Choice:
        indices = choose(logits, self.top_k, expert_mask)
        return Choice(softmax_over_experts(logits), (indices >= 0).to(logits.dtype), indices)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}"


@torch.no_grad()
def split_mlp(mlp: nn.Module, num_experts: int, top_k: int, generator: torch.Generator | None = None) -> MoE:
    """Split a dense MLP with one hidden layer into E experts of `hidden / E` neurons (EMoE, Qiu et al. 2024).

    Neurons with alike incoming weights come together (`balanced_clusters`); an expert's key in the router is the mean
    of its neurons' weights; a token runs the k experts whose keys it matches best, their outputs unweighted, each with
    the share `b_2 / k` of the last bias. With k = E the layer is the MLP.

    Raises:
        ValueError: the MLP has another form, or a hidden width that E does not divide.
    """
    dense = read_mlp(mlp)
    if len(dense.layers) != 2:
        raise ValueError(f"split_mlp needs one hidden layer, the MLP has {len(dense.layers) - 1}")
    first, last = dense.layers
    if first.out_features % num_experts:
        raise ValueError(f"num_experts={num_experts} must divide the hidden width {first.out_features}")
    clusters = balanced_clusters(nn.functional.normalize(first.weight.float(), dim=1), num_experts, generator)
    experts = experts_like(dense, num_experts, [first.out_features // num_experts])
    inner, outer = experts.layers
    inner.get_parameter("weight").copy_(first.weight[clusters])
    outer.get_parameter("weight").copy_(last.weight[:, clusters].transpose(0, 1))
    if first.bias is not None and last.bias is not None:
        inner.get_parameter("bias").copy_(first.bias[clusters])
        outer.get_parameter("bias").copy_((last.bias / top_k).expand(num_experts, -1))
    gate = LinearGate(first.in_features, num_experts)
    gate.weight.copy_(first.weight[clusters].mean(1))
    router = EmergentRouter(first.in_features, num_experts, top_k, gate.to(first.weight.device))
    return MoE(router, experts)


def balanced_clusters(
    points: Float[Tensor, "points dim"], clusters: int, generator: torch.Generator | None = None, rounds: int = 20
) -> Int[Tensor, "clusters size"]:
    """Clusters of equal size by constrained k-means: which points are in each. On the host.

    In each round, centres are the means, and pairs of point and cluster are granted by similarity while the
    cluster has room. It stops when nothing changes, and the best round counts.
    """
    points = points.detach().cpu()
    size = len(points) // clusters
    host = None if generator is None or generator.device.type != "cpu" else generator
    centres = points[torch.randperm(len(points), generator=host)[:clusters]]
    best, best_score, before = torch.arange(len(points)).view(clusters, size), -torch.inf, None
    for _ in range(rounds):
        similarity = points @ centres.T - centres.square().sum(1) / 2  # least distance first
        members: list[list[int]] = [[] for _ in range(clusters)]
        placed = [False] * len(points)
        for pair in similarity.flatten().argsort(descending=True).tolist():
            point, cluster = divmod(pair, clusters)
            if not placed[point] and len(members[cluster]) < size:
                members[cluster].append(point)
                placed[point] = True
        chosen = torch.tensor(members)
        centres = points[chosen].mean(1)
        score = float(centres.square().sum())  # more, the less points differ from their centres
        if score > best_score:
            best, best_score = chosen, score
        if members == before:
            break
        before = members
    return best
