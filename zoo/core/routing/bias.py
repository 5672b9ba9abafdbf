"""Loss-free balancing (Wang et al. 2024; DeepSeek-V3, section 2.1.2)."""

from typing import Any

import torch
from torch import nn

from .topk import TopKRouter


@torch.no_grad()
def update_router_bias(module: nn.Module, process_group: Any = None) -> None:
    """One step `b += u (s - mean(s))`, `s = sign(mean(c) - c)`, for every router in `module` with balance="bias".

    Call it once per optimiser step. c are the slots that each real expert got in training forwards since the
    last call, summed over the processes of `process_group` (all of them by default); then they start again from
    zero. Taking the mean of s away keeps the biases from drifting together. The biases of extra experts
    stay as they are. Activation checkpointing runs forwards twice, which doubles all counts alike and so
    changes nothing.
    """
    routers = [m for m in module.modules() if isinstance(m, TopKRouter) and m.balance == "bias"]
    if not routers:
        return
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        every = torch.cat([router.expert_counts for router in routers])
        torch.distributed.all_reduce(every, group=process_group)
        for router, counts in zip(routers, every.split([len(r.expert_counts) for r in routers]), strict=True):
            router.expert_counts.copy_(counts)
    for router in routers:
        counts = router.expert_counts[: router.num_experts]
        step = (counts.mean() - counts).sign()
        router.expert_bias[: router.num_experts] += router.bias_update_rate * (step - step.mean())
        router.expert_counts.zero_()
