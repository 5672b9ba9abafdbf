"""What layers that treat every vector by itself share."""

from abc import ABC, abstractmethod
from typing import Literal, overload

from jaxtyping import Float
from torch import Tensor, nn

from ..routing import Routing


class TokenLayer(nn.Module, ABC):
    """A layer of vectors of any batch shape, with a routing record on demand."""

    @abstractmethod
    def run(self, x: Float[Tensor, "tokens dim"], record: bool) -> tuple[Float[Tensor, "tokens out"], Routing | None]:
        """The output, and the record if asked for."""

    @overload
    def forward(
        self, x: Float[Tensor, "*batch dim"], return_routing: Literal[False] = False
    ) -> Float[Tensor, "*batch out"]: ...

    @overload
    def forward(
        self, x: Float[Tensor, "*batch dim"], return_routing: Literal[True]
    ) -> tuple[Float[Tensor, "*batch out"], Routing]: ...

    def forward(
        self, x: Float[Tensor, "*batch dim"], return_routing: bool = False
    ) -> Float[Tensor, "*batch out"] | tuple[Float[Tensor, "*batch out"], Routing]:
        """The record counts vectors in the flattened order."""
        y, routing = self.run(x.reshape(-1, x.shape[-1]), return_routing)
        y = y.reshape(*x.shape[:-1], y.shape[1])
        return y if routing is None else (y, routing)
