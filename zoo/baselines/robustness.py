"""What AdvMoE must beat: the same CNN without experts, in full width, in a pathway's width, or of equal cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..advmoe import RobustModel, RobustOutput
from ..cnns import build_backbone


class DenseCNN(RobustModel):
    """A CNN without experts: AT(Dense) for `ratio` 1, AT(S-Dense) for the ratio of a pathway.

    Args:
        schema: as for `AdvMoE`.
        backbone: as for `AdvMoE`.
        ratio: of all widths, the stem's too.
        widths, blocks, stem_stride: in place of the backbone's own.
        backbone_args: more arguments of a timm model.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        backbone: str = "resnet18",
        ratio: float = 1.0,
        widths: Sequence[int] | None = None,
        blocks: Sequence[int] | None = None,
        stem_stride: int | None = None,
        backbone_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(schema)
        self.network = build_backbone(
            backbone,
            int(schema["channels"]),
            int(schema["num_classes"]),
            ratio,
            widths=widths,
            blocks=blocks,
            stem_stride=stem_stride,
            arguments=backbone_args,
        )

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> RobustOutput:
        """Classify images in [0, 1]."""
        return RobustOutput(self.network(self.normalise(image)), {}, {})
