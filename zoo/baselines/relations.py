"""What MoE-VRD must beat: one expert as wide as those that are active or as all, its variants, and frequencies alone.

Every class takes the data's `schema` and the same arguments of `forward`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...errors import UserError
from ..base import ZooModel
from ..core import Plan, Routing
from ..moevrd import (
    Belief,
    IterativeModel,
    Labels,
    PairExperts,
    Preference,
    Preferences,
    RelationOutput,
    Unseen,
    check_sizes,
    sizes_of,
)


class RelationExpert(IterativeModel):
    """One relation expert: VidVRD-II's classifier, and with `hidden` wide enough the dense twin of a mixture.

    Args:
        schema: the data's sizes.
        hidden: width.
        dropout: after the first layers.
        preference: `iterative`, `cascade`, or `none` for the independent classifier.
        frequencies: smoothed frequencies of training triplets, with a learned factor, instead of learned preferences
            (the n-gram variant).
        smoothing: added to each count, for `frequencies`.
        teacher: training corrects with the true labels of the other sides, or (`predicted`, the refine variant) with
            what is seen.
        unseen: see `Preferences`.
        steps: of inference.
        soft: see `MoEVRD`.

    Raises:
        UserError: sizes below 1, a smoothing that is not positive.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        hidden: int = 48,
        dropout: float = 0.2,
        preference: Preference = "iterative",
        frequencies: bool = False,
        smoothing: float = 100.0,
        teacher: Literal["truth", "predicted"] = "truth",
        unseen: Unseen = "global_median",
        steps: int = 3,
        soft: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(hidden, steps)
        if not smoothing > 0:
            raise UserError(f"smoothing={smoothing}: expected more than 0")
        self.steps, self.soft, self.teacher, self.smoothing = steps, soft, teacher, smoothing
        features, classes, predicates = sizes_of(schema)
        self.expert = PairExperts(1, features, classes, predicates, hidden, dropout)
        self.preferences = Preferences(classes, predicates, preference, None, unseen, frequencies)

    def _seen(
        self, x: Float[Tensor, "pairs dim"]
    ) -> tuple[Float[Tensor, "pairs slots out"], Float[Tensor, "pairs k"] | None, dict[str, Routing], Plan | None]:
        return self.expert.dense(x), None, {}, None


class FrequencyPrior(ZooModel):
    """Classes by the nearest class mean, predicates by how often they held between those classes in training.

    In closed form; reads no position. Each class has a mean, all classes share one variance per feature.

    Args:
        schema: the data's sizes.
        smoothing: pairs without any predicate that every pair of classes is given.
    """

    mean: Tensor
    scale: Tensor
    log_prior: Tensor
    held: Tensor

    def __init__(self, schema: Mapping[str, Any], smoothing: float = 1.0) -> None:
        super().__init__()
        if not smoothing > 0:
            raise UserError(f"smoothing={smoothing}: expected more than 0")
        self.smoothing = smoothing
        features, classes, predicates = sizes_of(schema)
        self.register_buffer("mean", torch.zeros(classes, features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("log_prior", torch.zeros(classes))
        self.register_buffer("held", torch.zeros(classes, classes, predicates))

    @torch.no_grad()
    def fit(self, loader: Iterable[Any]) -> None:
        """Means, variances and frequencies over one pass of the training pairs."""
        classes, features = self.mean.shape
        count, total = torch.zeros(classes), torch.zeros(classes, features)
        square = torch.zeros(features)
        pairs, held = torch.zeros(classes, classes), torch.zeros(self.held.shape)
        for batch in loader:
            known = batch.subject_class >= 0
            sides = [
                (x[known].float().cpu(), F.one_hot(c[known], classes).float().cpu())
                for x, c in ((batch.subject, batch.subject_class), (batch.object, batch.object_class))
            ]
            for x, one_hot in sides:
                count += one_hot.sum(0)
                total += one_hot.T @ x
                square += x.square().sum(0)
            (_, s), (_, o) = sides
            pairs += s.T @ o
            held += torch.einsum("ns,no,np->sop", s, o, batch.predicate[known].float().cpu())
        mean = total / count.clamp_min(1)[:, None]
        variance = (square - (count[:, None] * mean.square()).sum(0)) / count.sum().clamp_min(1)
        self.mean.copy_(mean)
        self.scale.copy_(variance.clamp_min(1e-6).sqrt())
        self.log_prior.copy_(((count + 1) / (count + 1).sum()).log())
        self.held.copy_(held / (pairs[..., None] + self.smoothing))

    def forward(
        self,
        subject: Float[Tensor, "pairs features"],
        object: Float[Tensor, "pairs features"],
        position: Float[Tensor, "pairs 12"],
        labels: Labels | None = None,
        start: Belief | None = None,
    ) -> RelationOutput:
        """What each pair shows; labels and start are not read."""
        s, o = (self._classes(side) for side in (subject, object))
        p = torch.einsum("ns,no,sop->np", s.exp(), o.exp(), self.held.to(s.dtype)).clamp(1e-6, 1 - 1e-6)
        return RelationOutput(s, o, p.logit(), {})

    def _classes(self, x: Float[Tensor, "pairs features"]) -> Float[Tensor, "pairs classes"]:
        distance = torch.cdist(x / self.scale, self.mean / self.scale).square()
        return (self.log_prior - distance / 2).log_softmax(-1)
