"""The layer: router, dispatch, experts, combine."""

from typing import Any, Literal, overload

from jaxtyping import Float
from torch import Tensor, nn

from .dispatch import combine, dispatch, make_plan
from .experts import Experts
from .grouped import BACKENDS, Backend
from .routing import Router, Routing


class MoE(nn.Module):
    """`y = Σ_slots weight · expert(x)`, plus what every token shares.

    Args:
        router: chooses experts and weights.
        experts: E of them; as many as the router knows.
        shared: a module that every token passes, added to the routed output (DeepSeekMoE).
        residual: instead of adding, mix the two with learned weights per token, `c_0 shared(x) +
            c_1 routed(x)`, `c = softmax(W x + b)` (PR-MoE, Rajbhandari et al. 2022). Needs `shared` and
            experts that know their input width.
        backend: how the experts are computed; "auto" leaves it to them.

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
        backend: Backend | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        if router.num_experts != experts.num_experts:
            raise ValueError(f"the router knows {router.num_experts} experts, but {experts.num_experts} were given")
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} must be 'auto' or one of {', '.join(BACKENDS)}")
        self.router = router
        self.experts = experts
        self.shared = shared
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
        """Route every vector of x. `token_mask` and `task_id`, if given, have the batch shape of x.

        The record returned counts tokens in the flattened order.
        """
        batch = x.shape[:-1]
        tokens = x.reshape(-1, x.shape[-1])
        for name in ("token_mask", "task_id"):
            if router_kw.get(name) is not None:
                router_kw[name] = router_kw[name].flatten(0, len(batch) - 1)
        routing: Routing = self.router(tokens, **router_kw)
        self.last_routing = routing.detach()
        y = self._routed(tokens, routing)
        if self.shared is not None:
            y = self._with_shared(tokens, y)
        y = y.reshape(*batch, *y.shape[1:])
        return (y, routing) if return_routing else y

    def _routed(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Float[Tensor, "tokens out"]:
        backend = self.experts.select(x, routing.top_k) if self.backend == "auto" else self.backend
        if backend == "dense":
            y: Tensor = self.experts.dense(x, routing.dense_weights())
            return y
        plan = make_plan(routing.indices, self.experts.num_experts, dropless=routing.dropless)
        y_sorted = self.experts(dispatch(x, plan), plan, backend=self.backend)
        return combine(y_sorted, routing.weights, plan)

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


def _residual_dim(experts: Experts, shared: nn.Module | None) -> int:
    dim = getattr(experts, "dim", None)
    if shared is None or not isinstance(dim, int):
        raise ValueError("residual=True needs a shared module, and experts with a `dim` (MLPExperts)")
    return dim
