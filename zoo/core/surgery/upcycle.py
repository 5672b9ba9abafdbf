"""From one dense network to experts: copies to start from (sparse upcycling, EvoMoE's diversification, BAM)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..experts import MLPExperts
from ..moe import MoE
from ..routing import Router, TopKRouter
from .dense import experts_like, read_mlp


@torch.no_grad()
def upcycle_mlp(
    mlp: nn.Module | list[nn.Module],
    num_experts: int,
    *,
    noise: float = 0.0,
    mask: float = 0.0,
    generator: torch.Generator | None = None,
) -> MLPExperts:
    """E experts that are copies of a dense MLP (Komatsuzaki et al. 2023), or of several in turn (BAM, BTX).

    A layer of them computes what the MLP did as long as its router's weights sum to one. Copies of one MLP that get
    the same tokens also get the same gradients: either the router tells them apart, or `noise` and `mask` do.

    Args:
        mlp: an `nn.Sequential` as `read_mlp` takes, or a list of such of one shape: expert e starts as number
            `e mod len`.
        noise, mask: see `diversify_experts`.

    Raises:
        ValueError: an MLP has another form or shape.
    """
    dense = [read_mlp(one) for one in (mlp if isinstance(mlp, list) else [mlp])]
    shapes = [[tuple(layer.weight.shape) for layer in one.layers] + [one.act] for one in dense]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"the MLPs must have one form, got {', '.join(map(str, shapes))}")
    experts = experts_like(dense[0], num_experts)
    for e in range(num_experts):
        for stacked, layer in zip(experts.layers, dense[e % len(dense)].layers, strict=True):
            stacked.get_parameter("weight")[e] = layer.weight
            if layer.bias is not None:
                stacked.get_parameter("bias")[e] = layer.bias
    diversify_experts(experts, noise=noise, mask=mask, generator=generator)
    return experts


@torch.no_grad()
def diversify_experts(
    experts: MLPExperts,
    source: int | None = None,
    *,
    noise: float = 0.0,
    mask: float = 0.3,
    generator: torch.Generator | None = None,
) -> None:
    """Make experts differ, in place: EvoMoE's step from one trained expert to E (Nie et al. 2022).

    Args:
        source: this expert is copied over all others first; None keeps what each is.
        noise: add Gaussian noise of this size, in units of the standard deviation of each layer's weights.
        mask: set this share of each expert's weights to zero, another share in every expert. That EvoMoE takes 0.3
            is from memory of the paper.
    """
    if not 0 <= mask < 1 or noise < 0:
        raise ValueError(f"mask={mask} must lie in [0, 1) and noise={noise} not be negative")
    if source is not None and not 0 <= source < experts.num_experts:
        raise ValueError(f"source={source} must be one of {experts.num_experts} experts")
    for layer in experts.layers:
        weight, bias = layer.get_parameter("weight"), layer.bias
        if source is not None:
            weight.copy_(weight[source].clone().expand_as(weight))
            if isinstance(bias, Tensor):
                bias.copy_(bias[source].clone().expand_as(bias))
        if noise > 0:
            weight.add_(_draw(weight, generator, torch.randn) * (noise * weight.std()))
        if mask > 0:
            weight.mul_(_draw(weight, generator, torch.rand) >= mask)


def upcycle(
    mlp: nn.Module, num_experts: int, top_k: int, *, router: Router | None = None, noise: float = 0.0, mask: float = 0.0
) -> MoE:
    """A mixture in the place of a dense MLP: `upcycle_mlp` behind a fresh router, a `TopKRouter` by default.

    With one expert per token and renormalised weights a router would not learn; with its bare probability as weight
    the layer would not start as the MLP. So `top_k=1` gets the probability times E, about 1 at first.
    """
    experts = upcycle_mlp(mlp, num_experts, noise=noise, mask=mask)
    if router is None:
        single = top_k == 1 and num_experts > 1
        scale = float(num_experts) if single else 1.0
        router = TopKRouter(experts.dim, num_experts, top_k, norm_topk_prob=not single, routed_scaling_factor=scale)
        weight = experts.layers[0].get_parameter("weight")
        router.to(weight.device)
    return MoE(router, experts)


class MixtureOfAttention(nn.Module):
    """Attention modules mixed softly, `y = Σ_e softmax(W x)_e · attention_e(x)`: BAM's attention experts.

    BAM (Zhang et al. 2024) upcycles attention as well as feed-forward layers: each of E specialised networks gives its
    attention, and every token uses all of them. What is common, such as keys and values, may be shared by the
    modules themselves.

    Args:
        attention: E modules [batch, time, dim] -> [batch, time, dim], such as copies of one with noise.
    """

    def __init__(self, dim: int, attention: list[nn.Module]) -> None:
        super().__init__()
        if not attention:
            raise ValueError("attention is empty: give at least one module")
        self.attention = nn.ModuleList(attention)
        self.gate = nn.Linear(dim, len(attention), bias=False)
        nn.init.normal_(self.gate.weight, std=0.02)

    def forward(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        weights = self.gate(x).softmax(-1)
        outputs = torch.stack([module(x) for module in self.attention], dim=2)
        mixed: Tensor = torch.einsum("bte,bted->btd", weights.to(outputs.dtype), outputs)
        return mixed


def _draw(like: Tensor, generator: torch.Generator | None, kind: Callable[..., Tensor]) -> Tensor:
    """Random numbers where the generator lives, then where they are needed."""
    device = like.device if generator is None else generator.device
    return kind(like.shape, generator=generator, device=device, dtype=torch.float32).to(like)
