"""Monet: √E · √E experts put together from 2 √E halves (Park et al. 2024)."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..activations import Activation, activate, check_ungated
from ..routing import Routing
from ..routing.gates import linear_logits
from ..routing.router import full_precision
from .base import TokenLayer


class Monet(TokenLayer):
    """n² experts of width `hidden`, all combinations of n first and n second halves, for the price of 2n.

    Per head h two gates choose among n: `g = softmax over those logits above a threshold`, where the threshold is
    the one that `top_k` of n standard Gaussians pass (`Φ⁻¹(1 - top_k / n)`, or the best logit if that is lower) and
    the logits are made standard by a BatchNorm without affine: no sort. Expert (i, j) has the weight
    `Σ_h g¹_hi g²_hj`; all is summed without any expert ever being built (Park et al. 2024, section 3):

    - "horizontal": `E_ij(x) = V_j act(U_i x + b_i) + c_j`, first layers and last layers combined freely;
    - "vertical": i gives half the hidden and half the output neurons, j the others.

    `aux_loss` is `uniformity_coef` times the mean of `-log(mean g)`, less its least value log n, plus
    `ambiguity_coef` times the mean of `1 - max g`, in training. These two losses, and their 1e-3, are our reading
    from memory: the public code has no training part.

    Args:
        side: n, so that there are n² experts.
        hidden: neurons of one expert (8 in the paper, with n = 512, 8 heads, top_k 32).
    """

    def __init__(
        self,
        dim: int,
        side: int,
        hidden: int = 8,
        heads: int = 8,
        top_k: int = 8,
        form: Literal["horizontal", "vertical"] = "horizontal",
        act: Activation = "relu",
        out: int | None = None,
        uniformity_coef: float = 1e-3,
        ambiguity_coef: float = 1e-3,
    ) -> None:
        super().__init__()
        out = dim if out is None else out
        if form not in ("horizontal", "vertical"):
            raise ValueError(f"form={form!r} must be 'horizontal' or 'vertical'")
        if form == "vertical" and (hidden % 2 or out % 2):
            raise ValueError(f'form="vertical" halves hidden={hidden} and the output width {out}: both must be even')
        check_ungated(act)
        if not 1 <= top_k < side:
            raise ValueError(f"top_k={top_k} must lie between 1 and side={side} less 1")
        self.side, self.hidden, self.heads, self.top_k, self.form = side, hidden, heads, top_k, form
        self.act = act
        self.uniformity_coef, self.ambiguity_coef = uniformity_coef, ambiguity_coef
        self.threshold = float(torch.special.ndtri(torch.tensor(1 - top_k / side, dtype=torch.float64)))
        self.gate = nn.Parameter(torch.empty(2 * heads * side, dim).normal_(0.0, dim**-0.5))
        self.norm = _Standardised(2 * heads * side, affine=False)
        groups = 1 if form == "horizontal" else 2  # of first layers; each i then has hidden / groups neurons
        bound = dim**-0.5
        self.first = nn.Parameter(torch.empty(groups, side, hidden // groups, dim).uniform_(-bound, bound))
        self.first_bias = nn.Parameter(torch.empty(groups, side, hidden // groups).uniform_(-bound, bound))
        bound = hidden**-0.5
        self.second = nn.Parameter(torch.empty(groups, side, out // groups, hidden).uniform_(-bound, bound))
        self.second_bias = nn.Parameter(torch.empty(groups, side, out // groups).uniform_(-bound, bound))

    def run(self, x: Float[Tensor, "tokens dim"], record: bool) -> tuple[Float[Tensor, "tokens out"], Routing | None]:
        """The record is over the n first halves, then the n second ones, as if each were an expert."""
        with full_precision(x):
            logits = self._logits(x)
            gates = self._gates(logits)
        one, two = gates.to(x.dtype).unbind(1)
        y = (self._horizontal if self.form == "horizontal" else self._vertical)(x, one, two)
        return y, self._record(logits, gates) if record else None

    def _logits(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens 2 heads side"]:
        raw = linear_logits(x, self.gate)
        if self.norm.running_mean is not None:
            raw = raw.to(self.norm.running_mean.dtype)
        # BatchNorm wants two tokens to train on.
        normed: Tensor = self.norm(raw) if raw.shape[0] > 1 or not self.training else raw
        logits: Tensor = normed.unflatten(1, (2, self.heads, self.side))
        return logits

    def _gates(self, logits: Float[Tensor, "tokens 2 heads side"]) -> Float[Tensor, "tokens 2 heads side"]:
        threshold = logits.detach().amax(-1, keepdim=True).clamp_max(self.threshold)
        gates: Tensor = logits.masked_fill(logits.detach() < threshold, -torch.inf).softmax(-1)
        return gates

    def _hidden(self, x: Tensor, group: int) -> Float[Tensor, "tokens side width"]:
        weight, bias = self.first[group], self.first_bias[group]
        wide = nn.functional.linear(x, weight.flatten(0, 1).to(x.dtype), bias.flatten().to(x.dtype))
        hidden: Tensor = activate(wide, self.act).unflatten(1, weight.shape[:2])
        return hidden

    def _horizontal(self, x: Tensor, one: Tensor, two: Tensor) -> Float[Tensor, "tokens out"]:
        inner = one @ self._hidden(x, 0)  # [tokens, heads, hidden]: what each head's first halves give
        spread = torch.einsum("nhj,nhm->njm", two, inner).flatten(1)
        bias = two.sum(1) @ self.second_bias[0].to(x.dtype)  # the first gates sum to one
        return spread @ self.second[0].transpose(1, 2).flatten(0, 1).to(x.dtype) + bias

    def _vertical(self, x: Tensor, one: Tensor, two: Tensor) -> Float[Tensor, "tokens out"]:
        """Half of the output comes from i's rows of the last layer, the other half from j's.

        In each, the half of the hidden neurons that is i's own is summed with i's weight alone, and that of the
        other is first mixed.
        """
        hidden = (self._hidden(x, 0), self._hidden(x, 1))
        gates = (one, two)
        halves = []
        for own in (0, 1):
            other = 1 - own
            weight = self.second[own].to(x.dtype).chunk(2, dim=2)  # for the hidden half of i, then that of j
            weight_own, weight_other = weight[own], weight[other]
            mine = gates[own].sum(1)[..., None] * hidden[own]  # the other's gates sum to one
            mixed = torch.einsum("nhi,nhm->nim", gates[own], gates[other] @ hidden[other])
            y = mine.flatten(1) @ weight_own.transpose(1, 2).flatten(0, 1)
            y = y + mixed.flatten(1) @ weight_other.transpose(1, 2).flatten(0, 1)
            halves.append(y + gates[own].sum(1) @ self.second_bias[own].to(x.dtype))
        return torch.cat(halves, dim=1)

    def _record(self, logits: Tensor, gates: Tensor) -> Routing:
        scores = gates.mean(2).flatten(1) / 2  # [tokens, 2 side], sums to one
        aux_loss = scores.new_zeros(())
        if self.training and self.uniformity_coef != 0:
            mean = gates.sum(0) / max(gates.shape[0], 1)
            unevenness = -(mean.clamp_min(1e-6) * self.side).log().mean()
            aux_loss = aux_loss + self.uniformity_coef * unevenness
        if self.training and self.ambiguity_coef != 0:
            unsure = (1 - gates.amax(-1)).flatten(1).mean(1).sum() / max(gates.shape[0], 1)
            aux_loss = aux_loss + self.ambiguity_coef * unsure
        return Routing(
            weights=scores,
            indices=torch.arange(scores.shape[1], device=scores.device).expand(scores.shape),
            scores=scores,
            logits=logits.mean(2).flatten(1),
            aux_loss=aux_loss,
            dropless=True,
        )

    def extra_repr(self) -> str:
        return f"experts={self.side}², hidden={self.hidden}, heads={self.heads}, top_k={self.top_k}, form={self.form}"


class _Standardised(nn.BatchNorm1d):
    """Keeps its statistics in at least fp32 whatever the layer is moved to, as gates are computed."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = {name: self.get_buffer(name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self.get_buffer(name)
            if after.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, before.to(after.device))
        return self
