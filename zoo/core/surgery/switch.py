"""Reading and switching experts of a trained model at inference: fTRI and the interventions of MoTE."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..experts import Experts
from ..routing import ExpertMask, Router, Routing
from .pools import restored

Activity = dict[str, Float[Tensor, "experts"]]


@contextmanager
def switched_experts(model: nn.Module, masks: Mapping[str, ExpertMask]) -> Iterator[None]:
    """Within the block, the named routers of `model` get these `expert_mask`s: -1 or False off, 1 forced on.

    Names are those of `model.named_modules()`; "" is the model itself. Weights stay as they are, so that the next
    forward outside the block is the old one. A mask that the model itself gives to the router is overridden.

    Raises:
        ValueError: a name is that of no router, or a mask has another length than the router has experts.
    """
    parts = dict(model.named_modules())
    handles = []
    try:
        for name, mask in masks.items():
            router = parts.get(name)
            if not isinstance(router, Router):
                known = ", ".join(repr(n) for n, part in parts.items() if isinstance(part, Router)) or "none"
                raise ValueError(f"{name!r} is no router of the model; its routers: {known}")
            if len(mask) != router.num_experts + router.num_extra:
                raise ValueError(
                    f"the mask of {name!r} has {len(mask)} entries, the router {router.num_experts + router.num_extra} "
                    "experts"
                )
            handles.append(router.register_forward_pre_hook(_giving(mask), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def silenced_experts(experts: Experts, off: Sequence[int]) -> Iterator[None]:
    """Within the block, these experts answer zero: for gates that know no mask. Their routing weight goes to nobody.

    Args:
        experts: one of `expert_pools`.
    """
    if not all(0 <= e < experts.num_experts for e in off):
        raise ValueError(f"off={list(off)} must be experts out of 0 to {experts.num_experts - 1}")
    with restored(experts):
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter[list(off)] = 0.0
        yield


def expert_activity(records: Iterable[Mapping[str, Routing]]) -> Activity:
    """How strongly each expert answers to a set of inputs: the mean |weight| a routed token gives it, by layer.

    Args:
        records: what the model's forwards over the inputs returned as `routing`, one mapping per batch.
    """
    sums: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}
    for batch in records:
        for name, record in batch.items():
            weights = record.dense_weights(extra=True).detach().abs().double()
            routed = (record.indices >= 0).any(1).sum()
            sums[name] = sums.get(name, torch.zeros_like(weights[0])) + weights.sum(0)
            tokens[name] = tokens.get(name, torch.zeros_like(routed)) + routed
    return {name: total / tokens[name].clamp_min(1) for name, total in sums.items()}


def answers_by_label(
    weights: Float[Tensor, "tokens experts"], labels: Int[Tensor, "tokens"], num_labels: int
) -> Float[Tensor, "labels experts"]:
    """The mean share of its weight that a token of each label gives to each expert; rows sum to one.

    Rows of labels that no routed token has are zero. Labels outside `[0, num_labels)` are left out.

    Args:
        weights: `Routing.dense_weights()`; tokens that give no weight are left out.
    """
    size = weights.detach().abs().double()
    total = size.sum(1, keepdim=True)
    kept = (total[:, 0] > 0) & (labels >= 0) & (labels < num_labels)
    shares = torch.where(kept[:, None], size / total.clamp_min(1e-20), 0.0)
    place = labels.clamp(0, num_labels - 1)
    sums = shares.new_zeros(num_labels, size.shape[1]).index_add(0, place, shares)
    counts = shares.new_zeros(num_labels).index_add(0, place, kept.double())
    return sums / counts.clamp_min(1)[:, None]


class Response(NamedTuple):
    """How much more an expert answers to one set of inputs than to the other."""

    layer: str
    expert: int
    difference: float


def rank_by_response(to: Activity, than: Activity) -> list[Response]:
    """All experts of all layers, those first whose activity differs most between two sets of inputs.

    MoTE's functional token resonance (from its abstract and our notes, not its text): mean routing weight per expert
    over each set, the difference of the two, the greatest absolute ones on top. Its authors then switch the top ten
    off, or force them on.
    """
    if to.keys() != than.keys():
        raise ValueError(f"the two sets were recorded in other layers: {sorted(to)} and {sorted(than)}")
    found = [
        Response(name, e, difference)
        for name, activity in to.items()
        for e, difference in enumerate((activity - than[name]).tolist())
    ]
    return sorted(found, key=lambda response: (-abs(response.difference), response.layer, response.expert))


def masks_of(chosen: Iterable[Response], activity: Activity, on: bool = False) -> dict[str, ExpertMask]:
    """The int8 masks that switch the chosen experts off, or force them on, by layer: for `switched_experts`."""
    masks: dict[str, ExpertMask] = {}
    for layer, expert, _ in chosen:
        if layer not in masks:
            masks[layer] = torch.zeros(len(activity[layer]), dtype=torch.int8, device=activity[layer].device)
        masks[layer][expert] = 1 if on else -1
    return masks


def _giving(mask: ExpertMask) -> Any:
    def give(router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x: Tensor = args[0] if args else kwargs["x"]
        return args, {**kwargs, "expert_mask": mask.to(x.device)}

    return give
