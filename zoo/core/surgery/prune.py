"""Fewer experts in a trained layer: prune those that do little, merge those that do alike."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..experts import MLPExperts
from ..moe import MoE
from ..routing import LinearGate, NoisyTopKRouter, Router, Routing, StaticGate, TaskGate, TopKRouter
from ..routing.permutation import best_assignment
from ..routing.router import ExpertMask, GatedRouter


@torch.no_grad()
def prune_experts(moe: MoE, keep: Sequence[int]) -> MoE:
    """A layer of the experts `keep`, in that order, that computes what `moe` does with the others switched off.

    Only a capacity changes, which follows the number of experts. Experts lose their weights and the router's gates the
    rows of the others; extra experts stay. The given layer is left as it is. Which to keep: those with load
    (`statistics.expert_load`), or without which a metric falls.

    Raises:
        ValueError: the layer is no `MoE` of `MLPExperts` with a linear gate, `keep` is not a set of its experts or
            smaller than the router's `top_k` less extra experts, or the router chooses within groups.
    """
    router, experts = _parts(moe)
    if not isinstance(router, GatedRouter):
        raise ValueError(f"prune_experts needs a router with a gate, not {type(router).__name__}")
    if len(set(keep)) != len(keep) or not all(0 <= e < experts.num_experts for e in keep):
        raise ValueError(f"keep={list(keep)} must be different experts out of 0 to {experts.num_experts - 1}")
    if getattr(router, "num_groups", None) is not None:
        raise ValueError("the router chooses within groups of experts; pruned groups would no longer be equal")
    dense = router.top_k == router.num_experts
    if not dense and len(keep) + router.num_extra < router.top_k:
        raise ValueError(f"keep={list(keep)} leaves less than the router's top_k={router.top_k} experts")
    if len(keep) == 1 and router.top_k == 1 and getattr(router, "norm_topk_prob", False):
        raise ValueError("one expert is no mixture; take it out of the layer instead")
    pruned = copy.deepcopy(moe)
    device = next(experts.parameters()).device
    columns = torch.tensor([*keep, *range(experts.num_experts, experts.num_experts + router.num_extra)], device=device)
    _keep_gates(pruned.router, columns, len(keep), dense)
    pruned.experts = take_experts(experts, torch.tensor(list(keep), device=device))
    return pruned


@torch.no_grad()
def take_experts(experts: MLPExperts, index: Int[Tensor, "kept"]) -> MLPExperts:
    """Copies of some of the experts; an expert may be taken twice."""
    taken = copy.deepcopy(experts)
    taken.num_experts = len(index)
    for layer in taken.layers:
        for name, parameter in list(layer.named_parameters()):
            new = nn.Parameter(parameter.index_select(0, index), requires_grad=parameter.requires_grad)
            layer.register_parameter(name, new)
    return taken


class MergedRouter(Router):
    """A router over experts that were merged: it decides among the old ones, `target` says what became of each.

    Slots of one token that now name the same expert add up.
    """

    target: Tensor

    def __init__(self, router: Router, target: Int[Tensor, "experts"]) -> None:
        merged = int(target.max()) + 1
        super().__init__(merged, min(router.top_k, merged + router.num_extra), router.num_extra)
        self.router = router
        extra = torch.arange(router.num_extra, device=target.device) + merged
        self.register_buffer("target", torch.cat([target, extra]))

    @property
    def active_experts(self) -> float:
        return min(self.router.active_experts, float(self.num_experts))

    def forward(
        self,
        x: Float[Tensor, "tokens *features"],
        *,
        token_mask: Bool[Tensor, "tokens"] | None = None,
        task_id: Int[Tensor, "tokens *slots"] | None = None,
        expert_mask: ExpertMask | None = None,
        state: Any = None,
        **router_kw: Any,
    ) -> Routing:
        """`expert_mask` is over the merged experts."""
        old_mask = None if expert_mask is None else expert_mask[self.target]
        record: Routing = self.router(
            x, token_mask=token_mask, task_id=task_id, expert_mask=old_mask, state=state, **router_kw
        )
        indices = self.target[record.indices.clamp_min(0)].masked_fill(record.indices < 0, -1)
        columns = self.num_experts + self.num_extra
        scores = record.scores.new_zeros(len(record.scores), columns).index_add(1, self.target, record.scores)
        logits = record.logits.new_full((len(scores), columns), -torch.inf)
        logits = logits.scatter_reduce(1, self.target.expand_as(record.logits), record.logits, "amax")
        return dataclasses.replace(record, indices=indices, scores=scores, logits=logits)


@torch.no_grad()
def merge_experts(
    moe: MoE, groups: Sequence[Sequence[int]], usage: Float[Tensor, "experts"] | None = None, align: bool = True
) -> MoE:
    """A layer with one expert per group, the average of its members (MC-SMoE, Li et al. 2024).

    The router stays: it decides among the old experts, and those of a group lead to the same new one. Members that
    compute the same function, be it with their neurons in another order, are merged without any change.

    Args: see `average_experts`.
    """
    router, experts = _parts(moe)
    merged = average_experts(experts, groups, usage, align)
    target = torch.empty(experts.num_experts, dtype=torch.int64, device=next(experts.parameters()).device)
    for g, group in enumerate(groups):
        target[list(group)] = g
    new = copy.deepcopy(moe)
    new.router, new.experts = MergedRouter(copy.deepcopy(router), target), merged
    return new


@torch.no_grad()
def average_experts(
    experts: MLPExperts,
    groups: Sequence[Sequence[int]],
    usage: Float[Tensor, "experts"] | None = None,
    align: bool = True,
) -> MLPExperts:
    """One expert per group, the average of its members.

    Args:
        groups: of experts, each expert in one; see `group_alike`.
        usage: how much each expert counts in the average, such as its load; alike by default.
        align: bring the neurons of each member into the order of the group's most used one first (the best
            assignment by incoming and outgoing weights). Needs one hidden layer without gates; else members are
            averaged as they lie.
    """
    total = experts.num_experts
    if sorted(e for group in groups for e in group) != list(range(total)):
        raise ValueError(f"groups={[list(g) for g in groups]} must contain each of {total} experts once")
    device = next(experts.parameters()).device
    usage = torch.ones(total, device=device) if usage is None else usage.to(device)
    leads = [max(group, key=lambda e: float(usage[e])) for group in groups]
    merged = take_experts(experts, torch.tensor(leads, device=device))
    simple = (
        len(experts.layers) == 2
        and experts.layers[0].get_parameter("weight").shape[1] == experts.layers[1].get_parameter("weight").shape[2]
    )
    for g, group in enumerate(groups):
        share = usage[list(group)].double().clamp_min(1e-9)
        share = share / share.sum()
        members = [_expert(experts, e) for e in group]
        if align and simple:
            members = [_aligned(member, _expert(experts, leads[g])) for member in members]
        for name, parameter in merged.named_parameters():
            mean = sum(s * member[name].double() for s, member in zip(share, members, strict=True))
            parameter[g] = torch.as_tensor(mean).to(parameter)
    return merged


def group_alike(similarity: Float[Tensor, "experts experts"], groups: int) -> list[list[int]]:
    """So many groups of experts, by joining the two most alike groups again and again (average linkage).

    `similarity` is `statistics.expert_similarity` of their outputs, or any other symmetric matrix.
    """
    if not 1 <= groups <= len(similarity):
        raise ValueError(f"groups={groups} must lie between 1 and {len(similarity)} experts")
    table = similarity.detach().double().cpu()
    found = [[e] for e in range(len(table))]
    while len(found) > groups:
        pairs = [(i, j) for i in range(len(found)) for j in range(i + 1, len(found))]
        i, j = max(pairs, key=lambda pair: float(table[found[pair[0]]][:, found[pair[1]]].mean()))
        found[i] += found.pop(j)
    return [sorted(group) for group in found]


def _parts(moe: MoE) -> tuple[Router, MLPExperts]:
    router, experts = moe.router, moe.experts
    if not isinstance(experts, MLPExperts):
        raise ValueError(f"needs a layer of MLPExperts, not {type(experts).__name__}")
    return router, experts


def _keep_gates(router: Router, columns: Int[Tensor, "columns"], kept: int, dense: bool) -> None:
    """Cut a router down to some columns, in place."""
    assert isinstance(router, GatedRouter)
    gates = [router.gate, *([router.noise_gate] if isinstance(router, NoisyTopKRouter) else [])]
    for gate in gates:
        if not isinstance(gate, LinearGate | TaskGate | StaticGate):
            raise ValueError(f"the router's gate must be linear to lose experts, not {type(gate).__name__}")
        for name, parameter in list(gate.named_parameters(recurse=False)):
            dim = 1 if isinstance(gate, TaskGate | StaticGate) else 0
            new = nn.Parameter(parameter.index_select(dim, columns), requires_grad=parameter.requires_grad)
            gate.register_parameter(name, new)
        gate.out_features = len(columns)
    if isinstance(getattr(router, "bias", None), nn.Parameter):  # DenseRouter's
        router.bias = nn.Parameter(router.get_parameter("bias").index_select(0, columns))
    if isinstance(router, TopKRouter) and router.balance == "bias":
        router.expert_bias = router.expert_bias.index_select(0, columns)
        router.expert_counts = router.expert_counts.index_select(0, columns)
    router.num_experts = kept
    if dense:
        router.top_k = kept


def _expert(experts: MLPExperts, e: int) -> dict[str, Tensor]:
    return {name: parameter[e].detach() for name, parameter in experts.named_parameters()}


def _aligned(member: dict[str, Tensor], to: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same one-hidden-layer network with its neurons in the order that lies nearest to another's."""
    order = best_assignment(_neurons(to) @ _neurons(member).T)
    moved = {"layers.0.weight": member["layers.0.weight"][order]}
    moved["layers.1.weight"] = member["layers.1.weight"][:, order]
    if "layers.0.bias" in member:
        moved["layers.0.bias"] = member["layers.0.bias"][order]
    return {**member, **moved}


def _neurons(expert: dict[str, Tensor]) -> Float[Tensor, "hidden features"]:
    """What each hidden neuron reads and writes, in one row."""
    parts = [expert["layers.0.weight"], expert["layers.1.weight"].T]
    if "layers.0.bias" in expert:
        parts.append(expert["layers.0.bias"][:, None])
    return torch.cat(parts, dim=1).double()
