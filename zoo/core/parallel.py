"""Expert parallelism: every rank of a mesh holds some of the experts, and rows travel to them and back.

The files that compute know nothing of it: `shard_experts` swaps experts for others with the same interface.
"""

import copy
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.func import functional_call

from .dispatch import Plan, combine, dispatch, make_plan
from .experts import Experts, ModuleExperts
from .grouped import Backend
from .moe import MoE


def shard_experts(module: nn.Module, mesh: DeviceMesh, *, average: bool = True) -> set[nn.Parameter]:
    """Give each rank of `mesh` an equal part of the experts of every `MoE` in `module`, in place.

    Experts are split if all their parameters list them one after another along the first dimension, as
    `MLPExperts` do: the parameters become `DTensor`s with placement `Shard(0)` under the names they had, so
    that full checkpoints are those of the unsharded module. Values are those of the mesh's first rank. Other
    experts (`ModuleExperts`) stay whole on every rank. Returns the parameters that were split; all others are
    for FSDP2 to handle, over the same mesh:

        split = shard_experts(model, mesh)
        fully_shard(model, mesh=mesh, ignored_params=split)

    Call it before the optimiser is made. Afterwards every rank must run each layer equally often, if need be
    on no tokens at all.

    Args:
        mesh: one-dimensional; its ranks see different tokens (the data-parallel ranks, as a rule).
        average: divide the gradients of the experts, which hold the sum over the ranks' losses, by the number
            of ranks: what data parallelism does to all other gradients.

    Raises:
        ValueError: the mesh has several dimensions, no `MoE` in `module` has experts to split, or their number
            is not a multiple of the number of ranks.
    """
    if mesh.ndim != 1:
        raise ValueError(f"experts are split over one dimension, but the mesh has {mesh.ndim}: pass mesh['name']")
    layers = [part for part in module.modules() if isinstance(part, MoE) and _is_stacked(part.experts)]
    if not layers:
        raise ValueError(
            f"{type(module).__name__} holds no MoE whose experts can be split (stacked parameters, as MLPExperts "
            "have), or all of them are split already"
        )
    parallel: dict[Experts, ParallelExperts] = {}  # layers may share experts
    split: set[nn.Parameter] = set()
    for layer in layers:
        if layer.experts not in parallel:
            split |= _split_parameters(layer.experts, mesh)
            parallel[layer.experts] = ParallelExperts(layer.experts, mesh, average)
        layer.experts = parallel[layer.experts]
    return split


class ParallelExperts(Experts):
    """Experts of which this rank holds a part; made by `shard_experts`.

    Rows sorted by expert go to the ranks that hold their experts (all-to-all), are sorted by expert once
    more, computed as ever, and return. How many rows go where is known on the device alone, while the
    collective wants it on the host: each call waits for the device once.
    """

    local: Experts

    def __init__(self, experts: Experts, mesh: DeviceMesh, average: bool) -> None:
        super().__init__(experts.num_experts)
        local = copy.copy(experts)
        local.num_experts = experts.num_experts // mesh.size()
        object.__setattr__(self, "local", local)  # no submodule, or its parameters would change their names
        self._parameters, self._buffers, self._modules = local._parameters, local._buffers, local._modules
        self.mesh, self.average = mesh, average
        self.train(experts.training)

    def forward(
        self,
        x_sorted: Float[Tensor, "rows *dims"],
        plan: Plan,
        *,
        backend: Backend | Literal["auto"] = "auto",
    ) -> Float[Tensor, "rows *out_dims"]:
        group, experts = self.mesh.get_group(), self.local.num_experts
        to_send = plan.counts.view(-1, experts).long()
        to_receive = all_to_all_single(to_send, None, None, group)
        send, receive = torch.stack([to_send.sum(1), to_receive.sum(1)]).tolist()

        x = _exchange(x_sorted[: sum(send)], send, receive, group)
        # Rows arrive rank by rank, each rank's sorted by expert.
        expert = torch.arange(experts, device=x.device).repeat(len(receive))
        expert = expert.repeat_interleave(to_receive.flatten(), output_size=sum(receive))
        here = make_plan(expert[:, None], experts, dropless=True)
        y = functional_call(self.local, self._shards(), (dispatch(x, here), here), {"backend": backend})
        y = combine(y, y.new_ones(y.shape[0], 1), here)
        y = _exchange(y, receive, send, group)

        tail = y.new_zeros(x_sorted.shape[0] - y.shape[0], *y.shape[1:])
        return torch.cat([y, tail]) if tail.shape[0] else y

    def dense(
        self, x: Float[Tensor, "tokens *dims"], weights: Float[Tensor, "tokens experts"] | None = None
    ) -> Float[Tensor, "tokens *out_dims"]:
        tokens = x.shape[0]
        everyone = torch.arange(self.num_experts, device=x.device).expand(tokens, -1)
        if weights is not None:
            return self.gather(x, weights, everyone)
        plan = make_plan(everyone, self.num_experts, dropless=True)
        y: Tensor = self(dispatch(x, plan), plan)
        return y.view(self.num_experts, tokens, *y.shape[1:]).transpose(0, 1)

    def gather(
        self, x: Float[Tensor, "tokens *dims"], weights: Float[Tensor, "tokens k"], indices: Int[Tensor, "tokens k"]
    ) -> Float[Tensor, "tokens *out_dims"]:
        plan = make_plan(indices, self.num_experts, dropless=True)
        return combine(self(dispatch(x, plan), plan), weights, plan)

    def select(self, x: Tensor, top_k: int) -> Backend:
        return "segment"  # rows have to be sorted to travel; each rank then chooses for what it received

    def train(self, mode: bool = True) -> "ParallelExperts":
        self.local.training = mode
        return super().train(mode)

    def _shards(self) -> dict[str, Tensor]:
        """The parameters held here, as the plain tensors that the experts compute with."""
        shards = {name: p.to_local() for name, p in self.named_parameters() if isinstance(p, DTensor)}
        if self.average and torch.is_grad_enabled():
            ranks = self.mesh.size()
            for shard in shards.values():
                if shard.requires_grad:
                    shard.register_hook(lambda grad: grad / ranks)
        return shards

    def extra_repr(self) -> str:
        return f"{type(self.local).__name__} over {self.mesh.size()} ranks, {self.local.num_experts} on each"


def _is_stacked(experts: Experts) -> bool:
    parameters = list(experts.parameters())
    return (
        not isinstance(experts, ModuleExperts | ParallelExperts)
        and len(parameters) > 0
        and all(p.dim() > 0 and p.shape[0] % experts.num_experts == 0 for p in parameters)
    )


def _split_parameters(experts: Experts, mesh: DeviceMesh) -> set[nn.Parameter]:
    if experts.num_experts % mesh.size():
        raise ValueError(
            f"{experts.num_experts} experts cannot be split evenly over {mesh.size()} ranks: "
            "choose a multiple, or a smaller mesh"
        )
    split = set()
    for module in experts.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            shard = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            replacement = nn.Parameter(shard, requires_grad=parameter.requires_grad)
            setattr(module, name, replacement)
            split.add(replacement)
    return split


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
    """Send `send[r]` of the rows to rank r and get `receive[r]` from it; gradients go the other way."""
    exchanged: Tensor = all_to_all_single_autograd(rows, receive, send, group)
    return exchanged
