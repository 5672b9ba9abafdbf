"""Routers with a memory from layer to layer: RMoE's recurrence and MoE++'s gating residuals.

Give each layer the last one's `Routing.state`:

    state = None
    for moe in layers:
        y, routing = moe(x, return_routing=True, state=state)
        x, state = x + y, routing.state
"""

import dataclasses
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .gates import Gate, linear_logits
from .record import Routing
from .router import ExpertMask, GatedRouter, Router, full_precision


class RecurrentRouter(Router):
    """Routes by a recurrent state over depth, `s_l = GRU(W_l x, s_{l-1})` with s_0 = 0 (RMoE, Qiu et al. 2024).

    The GRU is one for all layers, W_l and the router that reads s_l are the layer's own. `Routing.state` is
    s_l, [tokens, state].

    Args:
        router: decides from s_l; any router built for inputs of the cell's `hidden_size`.
        cell: the shared `nn.GRUCell`; its two sizes are equal. Sizes of 128 to 256 are from memory of the paper.
    """

    def __init__(self, dim: int, router: Router, cell: nn.GRUCell) -> None:
        super().__init__(router.num_experts, router.top_k, router.num_extra)
        if cell.input_size != cell.hidden_size:
            raise ValueError(f"the cell's input_size={cell.input_size} must be its hidden_size={cell.hidden_size}")
        self.router = router
        self.cell = cell
        self.weight = nn.Parameter(torch.empty(cell.hidden_size, dim).uniform_(-(dim**-0.5), dim**-0.5))

    @property
    def active_experts(self) -> float:
        return self.router.active_experts

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        *,
        token_mask: Bool[Tensor, "tokens"] | None = None,
        task_id: Int[Tensor, "tokens *slots"] | None = None,
        expert_mask: ExpertMask | None = None,
        state: Float[Tensor, "tokens state"] | None = None,
        **router_kw: Any,
    ) -> Routing:
        with full_precision(x):
            state = gru(linear_logits(x, self.weight), state, self.cell)
        record: Routing = self.router(
            state, token_mask=token_mask, task_id=task_id, expert_mask=expert_mask, **router_kw
        )
        return dataclasses.replace(record, state=state)


class GatingResidualRouter(Router):
    """Adds the last layer's logits to this one's: `l_l = gate(x) + W l_{l-1}` (MoE++, Jin et al. 2024, eq. 6).

    `Routing.state` are the logits [tokens, columns], of extra experts too; the first layer has none and W no
    gradient there. MoE++'s own router is `GatingResidualRouter(NullExpertRouter(…, num_null=1, num_other=3))`.

    Args:
        router: any router with a gate, which passes into this one's keeping. W is zero at first, so the layer
            starts as the router alone.
    """

    def __init__(self, router: GatedRouter) -> None:
        super().__init__(router.num_experts, router.top_k, router.num_extra)
        self.gate = router.gate
        columns = self.gate.out_features
        router.gate = _LogitsThemselves(columns)
        self.router = router
        self.weight = nn.Parameter(torch.zeros(columns, columns))

    @property
    def active_experts(self) -> float:
        return self.router.active_experts

    def forward(
        self,
        x: Float[Tensor, "tokens *features"],
        *,
        token_mask: Bool[Tensor, "tokens"] | None = None,
        task_id: Int[Tensor, "tokens *slots"] | None = None,
        expert_mask: ExpertMask | None = None,
        state: Float[Tensor, "tokens columns"] | None = None,
        **router_kw: Any,
    ) -> Routing:
        with full_precision(x):
            logits = self.gate(x, task_id)
            if state is not None:
                logits = logits + linear_logits(state, self.weight)
        record: Routing = self.router(
            logits, token_mask=token_mask, task_id=task_id, expert_mask=expert_mask, **router_kw
        )
        return dataclasses.replace(record, state=logits)  # before experts are switched off


class _LogitsThemselves(Gate):
    def forward(
        self, x: Float[Tensor, "tokens columns"], task_id: Int[Tensor, "tokens *slots"] | None = None
    ) -> Float[Tensor, "tokens columns"]:
        return x


def gru(
    x: Float[Tensor, "tokens state"], state: Float[Tensor, "tokens state"] | None, cell: nn.GRUCell
) -> Float[Tensor, "tokens state"]:
    """The step of `nn.GRUCell`, in at least fp32 whatever dtype the cell has; no state is a state of zeros."""
    bias_x, bias_h = (cell.bias_ih, cell.bias_hh) if cell.bias else (None, None)
    from_x = linear_logits(x, cell.weight_ih, bias_x)
    state = torch.zeros_like(x) if state is None else state
    from_state = linear_logits(state, cell.weight_hh, bias_h)
    reset_x, update_x, new_x = from_x.chunk(3, dim=-1)
    reset_h, update_h, new_h = from_state.chunk(3, dim=-1)
    new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
    update = torch.sigmoid(update_x + update_h)
    mixed: Tensor = new + update * (state - new)
    return mixed
