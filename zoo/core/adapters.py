"""Low-rank experts throughout a network: every chosen linear layer gets E of them, and each row says which it takes.

The network runs once over rows that need not agree on an expert, in training as in evaluation; a loop that switches
one adapter on at a time gives the same numbers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jaxtyping import Float, Int
from torch import Tensor, nn

from .experts import LoRALinear


class AdapterChoice:
    """Which experts the adapted layers of one network apply, while `choosing` runs it; none outside.

    Attributes:
        indices: the expert of each row [rows]; outside `[0, experts)` none.
        weights: a mixture for each row [rows, experts], or one for each row and layer [rows, layers, experts].
    """

    def __init__(self) -> None:
        self.indices: Tensor | None = None
        self.weights: Tensor | None = None

    @contextmanager
    def choosing(
        self,
        indices: Int[Tensor, "rows"] | None = None,
        weights: Float[Tensor, "rows *layers experts"] | None = None,
    ) -> Iterator[None]:
        """Apply the experts in the block. Backward passes may come later, activation checkpointing may not."""
        before = self.indices, self.weights
        self.indices, self.weights = indices, weights
        try:
            yield
        finally:
            self.indices, self.weights = before

    @contextmanager
    def taking(self, rows: Int[Tensor, "some"]) -> Iterator[None]:
        """Apply the experts chosen for `rows` in the block: of rows sorted anew, or some of them."""
        indices = None if self.indices is None else self.indices.index_select(0, rows)
        weights = None if self.weights is None else self.weights.index_select(0, rows)
        with self.choosing(indices, weights):
            yield


class AdaptedLinear(LoRALinear):
    """A `LoRALinear` inside a network that calls it with nothing but x [rows, ..., in_dim].

    Args:
        base: the layer it replaces; itself adapted, perhaps, by another set.
        choice: shared by all layers of the set.
        layer: its place among them.
        num_experts, rank, alpha, dropout: as of `LoRALinear`.
    """

    def __init__(
        self,
        base: nn.Linear | LoRALinear,
        choice: AdapterChoice,
        layer: int,
        num_experts: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base, num_experts, rank, alpha, dropout, freeze_base=False)
        self.choice, self.layer = choice, layer

    def forward(self, x: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch out_dim"]:  # type: ignore[override]
        weights = self.choice.weights
        if weights is not None and weights.dim() == 3:
            weights = weights[:, self.layer]
        return super().forward(x, weights, self.choice.indices)


class Adapters(nn.Module):
    """A set of adapted layers of one network, and how its experts are chosen.

    The layers stay where they are, in the network: this module holds neither them nor any parameter.
    """

    def __init__(self, layers: Sequence[AdaptedLinear], choice: AdapterChoice) -> None:
        super().__init__()
        self.choice = choice
        self._layers = tuple(layers)  # a tuple: not registered, so that the state has every weight once

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the low-rank experts, without those of the layers they change."""
        for layer in self._layers:
            yield from layer.experts.parameters()


def adapt(
    network: nn.Module, targets: Sequence[str], num_experts: int, rank: int, alpha: float, dropout: float = 0.0
) -> Adapters:
    """Put E low-rank experts beside every linear layer whose name ends in one of `targets`; changes `network`.

    A layer that another set adapts already gets this one on top. Nothing is frozen.

    Args:
        targets: last parts of names, e.g. `["q_proj", "v_proj"]`; each must be found.

    Raises:
        ValueError: a target that no linear layer bears.
    """
    linears = [
        (path, layer)
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear | LoRALinear) and path.rpartition(".")[2] in targets
    ]
    names = {path.rpartition(".")[2] for path, _ in linears}
    if missing := [target for target in targets if target not in names]:
        found = sorted({p.rpartition(".")[2] for p, m in network.named_modules() if isinstance(m, nn.Linear)})
        has = ", ".join(found) or "none (low-rank experts stand beside nn.Linear, not beside GPT-2's Conv1D)"
        raise ValueError(f"target {missing[0]!r} names no linear layer; the network has {has}")
    choice = AdapterChoice()
    layers: list[AdaptedLinear] = []
    for path, layer in linears:
        parent, _, name = path.rpartition(".")
        adapted = AdaptedLinear(layer, choice, len(layers), num_experts, rank, alpha, dropout)
        adapted.train(layer.training)
        setattr(network.get_submodule(parent), name, adapted)
        layers.append(adapted)
    return Adapters(layers, choice)
