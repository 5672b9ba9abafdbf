"""The layer: router, dispatch, experts, combine."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .activations import Activation
from .dispatch import make_plan
from .experts import Experts, MLPExperts, ZeroExpert
from .grouped import BACKENDS, Backend
from .routing import Router, Routing, TopKRouter


class MoE(nn.Module):
    """`y = Σ_slots weight · expert(x)`, plus what every token shares.

    Args:
        router: chooses experts and weights.
        experts: E of them; as many as the router knows.
        shared: a module that every token passes, added to the routed output (DeepSeekMoE).
        residual: instead of adding, mix the two with learned weights per token, `c_0 shared(x) +
            c_1 routed(x)`, `c = softmax(W x + b)` (PR-MoE, Rajbhandari et al. 2022). Needs `shared` and
            experts that know their input width.
        extra_experts: cheap experts with the ids after the E real ones, such as `ZeroExpert`, `CopyExpert` and
            `ConstantExpert` (AdaMoE, MoE++); as many as the router's `num_extra`.
        backend: how the experts are computed; "auto" decides by shape, see `select_backend`.

    `last_routing` is a detached copy of the last call's record, for telemetry only: never saved, never
    copied. The balance loss to train on is that of the record which `return_routing=True` returns.
    """

    last_routing: Routing | None

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared: nn.Module | None = None,
        residual: bool = False,
        extra_experts: Sequence[nn.Module] = (),
        backend: Backend | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        if router.num_experts != experts.num_experts:
            raise ValueError(f"the router knows {router.num_experts} experts, but {experts.num_experts} were given")
        if router.num_extra != len(extra_experts):
            raise ValueError(
                f"the router knows {router.num_extra} extra experts, but {len(extra_experts)} were given: "
                "pass the same number as the router's num_extra"
            )
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} must be 'auto' or one of {', '.join(BACKENDS)}")
        self.router = router
        self.experts = experts
        self.shared = shared
        self.extra_experts = nn.ModuleList(extra_experts)
        self.backend: Backend | Literal["auto"] = backend
        self.mixture = nn.Linear(_residual_dim(experts, shared), 2) if residual else None
        self.last_routing = None

    @overload
    def forward(
        self, x: Float[Tensor, "*batch dim"], return_routing: Literal[False] = False, **router_kw: Any
    ) -> Float[Tensor, "*batch out"]: ...

    @overload
    def forward(
        self, x: Float[Tensor, "*batch dim"], return_routing: Literal[True], **router_kw: Any
    ) -> tuple[Float[Tensor, "*batch out"], Routing]: ...

    def forward(
        self, x: Float[Tensor, "*batch dim"], return_routing: bool = False, **router_kw: Any
    ) -> Float[Tensor, "*batch out"] | tuple[Float[Tensor, "*batch out"], Routing]:
        """Route every vector of x. `token_mask`, `task_id` and `sequence_id`, if given, have the batch shape of x.

        The record returned counts tokens in the flattened order.
        """
        batch = x.shape[:-1]
        tokens = x.reshape(-1, x.shape[-1])
        for name in ("token_mask", "task_id", "sequence_id"):
            if router_kw.get(name) is not None:
                router_kw[name] = router_kw[name].flatten(0, len(batch) - 1)
        routing: Routing = self.router(tokens, **router_kw)
        # Past nn.Module.__setattr__, which takes longer than a small matmul.
        object.__setattr__(self, "last_routing", routing.detach())
        y = self._routed(tokens, routing)
        if self.shared is not None:
            y = self._with_shared(tokens, y)
        y = y.reshape(*batch, *y.shape[1:])
        return (y, routing) if return_routing else y

    def _routed(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Float[Tensor, "tokens out"]:
        experts, real = self.experts, self.experts.num_experts
        backend = experts.select(x, routing.top_k) if self.backend == "auto" else self.backend
        if backend == "dense":
            y = experts.dense(x, routing.dense_weights())
        elif backend == "gather" and routing.dropless and not torch.is_grad_enabled():
            y = experts.gather(x, routing.weights, routing.indices)
        else:
            plan = make_plan(routing.indices, real, dropless=routing.dropless)
            y = experts.routed(x, routing.weights, plan, backend=self.backend)
        return self._with_extra(x, routing, y) if self.extra_experts else y

    def _with_extra(
        self, x: Float[Tensor, "tokens dim"], routing: Routing, y: Float[Tensor, "tokens out"]
    ) -> Float[Tensor, "tokens out"]:
        weights = routing.dense_weights(extra=True)[:, self.experts.num_experts :].to(y.dtype).unbind(1)
        for weight, expert in zip(weights, self.extra_experts, strict=True):
            if not isinstance(expert, ZeroExpert):
                y = y + weight[:, None] * expert(x)
        return y

    def _with_shared(
        self, x: Float[Tensor, "tokens dim"], routed: Float[Tensor, "tokens out"]
    ) -> Float[Tensor, "tokens out"]:
        assert self.shared is not None
        shared: Tensor = self.shared(x)
        if self.mixture is None:
            return shared + routed
        share = self.mixture(x).softmax(-1)
        mixed: Tensor = share[:, :1] * shared + share[:, 1:] * routed
        return mixed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_routing": None}

    def extra_repr(self) -> str:
        return f"backend={self.backend}"


class MultiGateMoE(nn.Module):
    """One pool of experts, one gate per task: `y_t = Σ_e g_t(x)_e · expert_e(x)` (MMoE, Ma et al. 2018, eqs. 6, 7).

    Every expert sees every token once, whatever the number of tasks. For one gate per task where each token belongs
    to one task (M³ViT), use `MoE` with a router whose gate is a `TaskGate`.
    """

    def __init__(self, routers: Sequence[Router], experts: Experts) -> None:
        super().__init__()
        for router in routers:
            if (router.num_experts, router.num_extra) != (experts.num_experts, 0):
                raise ValueError(
                    f"a router knows {router.num_experts} experts and {router.num_extra} extra ones, "
                    f"but {experts.num_experts} and 0 were given"
                )
        if not routers:
            raise ValueError("routers is empty: give one per task")
        self.routers = nn.ModuleList(routers)
        self.experts = experts

    def forward(
        self, x: Float[Tensor, "..."], gate_input: Float[Tensor, "*batch gate_dim"] | None = None, **router_kw: Any
    ) -> tuple[Float[Tensor, "tasks *batch out"], list[Routing]]:
        """The output and the record of every task, in the order of the routers.

        The gates read x [*batch, dim], or `gate_input` where it is given: experts may then read whole sequences,
        x [*batch, time, dim], while gates read a summary of each.
        """
        gate_input = x if gate_input is None else gate_input
        batch = gate_input.shape[:-1]
        if x.shape[: len(batch)] != batch:
            raise ValueError(f"x {list(x.shape)} must begin with the batch shape of gate_input {list(batch)}")
        gate_tokens = gate_input.reshape(-1, gate_input.shape[-1])
        records: list[Routing] = [router(gate_tokens, **router_kw) for router in self.routers]
        y = self.experts.dense(x.reshape(-1, *x.shape[len(batch) :]))
        weights = torch.stack([record.dense_weights() for record in records]).to(y.dtype)
        mixed = torch.einsum("tne,neo->tno", weights, y.flatten(2))
        return mixed.reshape(len(records), *batch, *y.shape[2:]), records


def fine_grained_moe(
    dim: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    *,
    split: int = 4,
    num_shared: int = 1,
    act: Activation = "gelu",
    router: type[TopKRouter] = TopKRouter,
    **router_kw: Any,
) -> MoE:
    """DeepSeekMoE's layer of the same cost as `num_experts` experts of width `hidden`, `top_k` of them active.

    Every expert is split into `split` of width `hidden / split`; `num_shared` of them serve every token (as one
    wider MLP) and `split · top_k - num_shared` of the other `split · num_experts - num_shared` are routed to
    (Dai et al. 2024, eqs. 6 to 11).

    Raises:
        ValueError: `hidden` is no multiple of `split`, or no routed expert would be left.
    """
    routed, active = split * num_experts - num_shared, split * top_k - num_shared
    if hidden % split or active < 1:
        raise ValueError(
            f"hidden={hidden} must be a multiple of split={split}, and num_shared={num_shared} less than "
            f"split * top_k = {split * top_k}"
        )
    width = hidden // split
    shared = _SharedMLP(MLPExperts(1, dim, width * num_shared, act=act)) if num_shared else None
    return MoE(router(dim, routed, active, **router_kw), MLPExperts(routed, dim, width, act=act), shared=shared)


class _SharedMLP(nn.Module):
    def __init__(self, mlp: MLPExperts) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens out"]:
        return self.mlp.dense(x)[:, 0]


def _residual_dim(experts: Experts, shared: nn.Module | None) -> int:
    dim = getattr(experts, "dim", None)
    if shared is None or not isinstance(dim, int):
        raise ValueError("residual=True needs a shared module, and experts with a `dim` (MLPExperts)")
    return dim
