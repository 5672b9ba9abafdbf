"""Relation detection and tagging as the field scores them, in three dialects that must not be mixed.

Shang et al., VidVRD (2017) and VidVRD-II (2021). Detection: a prediction finds an instance of its triplet when both
tracks overlap it, vIoU >= 0.5. Tagging: which triplets a video holds, tracks ignored.

- `exact`: vIoU without the +1 pixel, so units do not matter; P@K misses count for what was not predicted.
- `helper`: VidVRD-helper and most papers: boxes in pixels, +1, P@K over the triplets that were predicted.
- `legacy_normalized`: VidVRD-II before 2022 and MoE-VRD: +1 on boxes in [0, 1], which inflates vIoU.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
from jaxtyping import Bool, Float64, Int64

from ..datasets.relations_overlap import Tracks, stack, viou
from ..datasets.relations_table import Relation, RelationSet, Triplet
from ..errors import UserError

Dialect = Literal["exact", "helper", "legacy_normalized"]
DIALECTS: tuple[str, ...] = get_args(Dialect)
RETURNS = (50, 100)  # predictions of each video that recall looks at
TAGS = (1, 5, 10)  # triplets of each video that precision looks at


@dataclass(frozen=True)
class RelationScores:
    """Scores between 0 and 1, what perfect predictions would score, and the rows they come from.

    `metrics`, `ceilings`: map, recall_at_50, recall_at_100, precision_at_1, precision_at_5, precision_at_10.
    `videos`: a row a video with an instance: video, instances, predictions, ap, hits_at_50, ..., precision_at_10.
    `predicates`: a row a predicate: instances, predictions, hits, recall, ap (pooled over videos by score).
    """

    metrics: dict[str, float]
    ceilings: dict[str, float]
    videos: pl.DataFrame
    predicates: pl.DataFrame
    dialect: str

    @property
    def mean_predicate_ap(self) -> float:
        """Mean over the predicates that occur; NaN where none does."""
        ap = self.predicates.filter(pl.col("instances") > 0)["ap"].to_numpy()
        return float(ap.mean()) if len(ap) else float("nan")


def evaluate(
    truth: RelationSet,
    predictions: RelationSet,
    dialect: Dialect = "exact",
    threshold: float = 0.5,
    size: tuple[int, int] | None = None,
) -> RelationScores:
    """Scores of predictions against the truth.

    A video without predictions scores 0, predictions for a video without instances are ignored. Equal scores keep the
    order in which they were given.

    Args:
        truth, predictions: by video; boxes in pixels or normalised.
        dialect: see above.
        threshold: of the smaller of both sides' vIoU.
        size: width and height in pixels of videos whose size the sets do not say.

    Raises:
        UserError: no instance at all; sizes are needed and unknown.
    """
    if dialect not in DIALECTS:
        raise UserError(f"--dialect {dialect}: expected one of {', '.join(DIALECTS)}")
    names = [name for name, relations in truth.videos.items() if relations]
    if not names:
        raise UserError("the ground truth holds no relation instance: nothing can be scored")
    videos = [
        _score_video(
            truth.videos[name],
            predictions.videos.get(name, ()),
            _scales(name, truth, predictions, dialect, size),
            dialect,
            threshold,
        )
        for name in names
    ]
    table = pl.DataFrame([{"video": name} | video.row for name, video in zip(names, videos, strict=True)])
    total = int(table["instances"].sum())
    metrics, ceilings = {"map": _mean(table["ap"])}, {"map": 1.0}
    for k in RETURNS:
        metrics[f"recall_at_{k}"] = float(table[f"hits_at_{k}"].sum()) / total
        ceilings[f"recall_at_{k}"] = float(table["instances"].clip(upper_bound=k).sum()) / total
    for k in TAGS:
        metrics[f"precision_at_{k}"] = _mean(table[f"precision_at_{k}"])
        # The helper divides by what was predicted: a few right ones are all it asks.
        best = table["triplets"].clip(upper_bound=k) / k
        ceilings[f"precision_at_{k}"] = 1.0 if dialect == "helper" else _mean(best)
    return RelationScores(metrics, ceilings, table.drop("triplets"), _predicates(videos), dialect)


def evaluate_zero_shot(
    truth: RelationSet,
    predictions: RelationSet,
    train: Collection[Triplet],
    dialect: Dialect = "exact",
    threshold: float = 0.5,
    size: tuple[int, int] | None = None,
    generalised: bool = False,
) -> RelationScores | None:
    """Scores on the triplets of the truth that `train` lacks; None where it lacks none.

    Zero-shot counts only predictions of such triplets; generalised zero-shot all predictions, among which the new ones
    must be found (the protocol of 2017).
    """
    new = truth.triplets - set(train)
    if not new:
        return None
    filtered = _only(truth, new)
    videos = {name: predictions.videos.get(name, ()) for name in filtered.videos}
    kept = RelationSet(videos, predictions.sizes, predictions.normalised)
    return evaluate(filtered, kept if generalised else _only(kept, new, empty=True), dialect, threshold, size)


def average_precision(hits: Bool[np.ndarray, " predictions"], instances: int) -> float:
    """Area under the all-point interpolated precision-recall curve (VOC 2010) of hits in order of score."""
    if not len(hits) or not instances:
        return 0.0
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[hits].sum() / instances)


def match(
    truth: Sequence[Relation],
    predictions: Sequence[Relation],
    threshold: float = 0.5,
    plus: float = 0.0,
    scales: tuple[Sequence[float], Sequence[float]] = ((1.0, 1.0), (1.0, 1.0)),
) -> Int64[np.ndarray, " predictions"]:
    """The instance that each prediction finds, -1 for none; predictions come by falling score.

    Each takes of the instances of its triplet that are left the one it overlaps most, the first of equals.

    Args:
        plus: added to widths and heights.
        scales: factors of x and y, for the truth's boxes and for the predictions'.
    """
    found = np.full(len(predictions), -1)
    ids: dict[Triplet, int] = {}
    wanted = np.array([ids.setdefault(r.triplet, len(ids)) for r in truth], dtype=np.int64)
    given = np.array([ids.get(r.triplet, -1) for r in predictions], dtype=np.int64)
    which, instance = np.nonzero(given[:, None] == wanted)
    if not len(which):
        return found
    used, left = np.unique(which, return_inverse=True)
    some, right = np.unique(instance, return_inverse=True)
    overlap = np.minimum(
        *(
            viou(
                _side([predictions[i] for i in used], side, scales[1]),
                _side([truth[i] for i in some], side, scales[0]),
                left,
                right,
                plus,
            )
            for side in ("subject", "object")
        )
    )
    enough = overlap >= threshold
    which, instance, overlap = which[enough], instance[enough], overlap[enough]
    taken = np.zeros(len(truth), bool)
    for i in np.lexsort((instance, -overlap, which)):
        if found[which[i]] < 0 and not taken[instance[i]]:
            found[which[i]], taken[instance[i]] = instance[i], True
    return found


@dataclass(frozen=True)
class _Video:
    """What one video adds to the sums."""

    row: dict[str, Any]
    wanted: list[str]
    given: list[str]
    scores: Float64[np.ndarray, " predictions"]
    hits: Bool[np.ndarray, " predictions"]


def _score_video(
    truth: Sequence[Relation],
    predictions: Sequence[Relation],
    scales: tuple[Sequence[float], Sequence[float]],
    dialect: str,
    threshold: float,
) -> _Video:
    scores = np.array([r.score for r in predictions], dtype=np.float64)
    order = np.argsort(-scores, kind="stable")
    ranked = [predictions[i] for i in order]
    hits = match(truth, ranked, threshold, 0.0 if dialect == "exact" else 1.0, scales) >= 0
    triplets = {r.triplet for r in truth}
    tags = np.array([triplet in triplets for triplet in dict.fromkeys(r.triplet for r in ranked)], dtype=bool)
    row: dict[str, Any] = {
        "instances": len(truth),
        "predictions": len(ranked),
        "triplets": len(triplets),
        "ap": average_precision(hits, len(truth)),
    }
    row |= {f"hits_at_{k}": int(hits[:k].sum()) for k in RETURNS}
    for k in TAGS:
        among = min(k, len(tags)) if dialect == "helper" else k
        row[f"precision_at_{k}"] = float(tags[:k].sum() / among) if len(tags) else 0.0
    return _Video(row, [r.triplet[1] for r in truth], [r.triplet[1] for r in ranked], scores[order], hits)


def _predicates(videos: Sequence[_Video]) -> pl.DataFrame:
    """Average precision of each predicate over all videos at once, by score."""
    wanted = pl.DataFrame({"predicate": [name for video in videos for name in video.wanted]}, {"predicate": pl.String})
    given = pl.DataFrame(
        {
            "predicate": pl.Series([name for video in videos for name in video.given], dtype=pl.String),
            "score": np.concatenate([video.scores for video in videos]),
            "hit": np.concatenate([video.hits for video in videos]),
        }
    )
    ranked = given.sort("score", descending=True, maintain_order=True)
    groups = {str(key[0]): rows["hit"].to_numpy() for key, rows in ranked.group_by("predicate")}
    counts = dict(wanted.group_by("predicate").len().iter_rows())
    rows = []
    for name in sorted(counts.keys() | groups.keys()):
        instances, hits = counts.get(name, 0), groups.get(name, np.zeros(0, bool))
        found = int(hits.sum())
        rows.append(
            {
                "predicate": name,
                "instances": instances,
                "predictions": len(hits),
                "hits": found,
                "recall": found / instances if instances else None,
                "ap": average_precision(hits, instances) if instances else None,
            }
        )
    types: Any = {"predicate": pl.String, "recall": pl.Float64, "ap": pl.Float64}
    return pl.DataFrame(rows, schema_overrides=types)


def _scales(
    name: str, truth: RelationSet, predictions: RelationSet, dialect: str, size: tuple[int, int] | None
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Factors that bring the truth's and the predictions' boxes to the dialect's unit."""
    one = (1.0, 1.0)
    shares = dialect == "legacy_normalized" or (dialect == "exact" and truth.normalised != predictions.normalised)
    if dialect == "exact" and not shares:
        return one, one
    wrong = [given.normalised != shares for given in (truth, predictions)]
    if not any(wrong):
        return one, one
    found = truth.sizes.get(name) or predictions.sizes.get(name) or size
    if found is None:
        raise UserError(
            f"video {name}: its width and height are not known, which dialect '{dialect}' needs to bring boxes to "
            f"{'shares of the frame' if shares else 'pixels'}; give annotations that say them, or --size 1280x720"
        )
    factor = (1 / found[0], 1 / found[1]) if shares else (float(found[0]), float(found[1]))
    return (factor if wrong[0] else one), (factor if wrong[1] else one)


def _side(relations: Sequence[Relation], side: Literal["subject", "object"], scale: Sequence[float]) -> Tracks:
    return stack([getattr(r, side) for r in relations], [r.begin for r in relations], scale)


def _only(given: RelationSet, triplets: set[Triplet], empty: bool = False) -> RelationSet:
    """The relations of these triplets, and videos that have any (with `empty` all videos)."""
    videos: Mapping[str, list[Relation]] = {
        name: [r for r in relations if r.triplet in triplets] for name, relations in given.videos.items()
    }
    kept = {name: relations for name, relations in videos.items() if relations or empty}
    return RelationSet(kept, given.sizes, given.normalised)


def _mean(values: pl.Series) -> float:
    return float(values.to_numpy().mean())
