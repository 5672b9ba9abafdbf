"""From what a model says of each window's pairs to relations of a whole video.

VidVRD-II (Shang et al. 2021), §4: the best triplets of each window, then greedy association over windows in order of
time. Overlaps are exact; the released code adds a pixel to boxes in shares of the frame, which links almost anything.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..datasets.relations_overlap import Tracks, area, viou
from ..datasets.relations_table import Boxes, Relation, Triplet
from ..datasets.relations_windows import WINDOW, Windows

ScoreOf = Literal["sum", "mean"]


class Tracklet(NamedTuple):
    """Boxes at the frames from `begin` on, none of them NaN."""

    begin: int
    boxes: Boxes

    @property
    def end(self) -> int:
        return self.begin + len(self.boxes)


class WindowRelation(NamedTuple):
    """A triplet between two tracklets of one window. Relations that share a tracklet share the object."""

    triplet: Triplet
    score: float
    subject: Tracklet
    object: Tracklet


class Candidates(NamedTuple):
    """Triplets of pairs, sorted by window and falling score: rows of the pairs, classes, predicate, s · p · o."""

    pair: Int[Tensor, " candidates"]
    subject: Int[Tensor, " candidates"]
    predicate: Int[Tensor, " candidates"]
    object: Int[Tensor, " candidates"]
    score: Float[Tensor, " candidates"]


def candidates(
    subject: Float[Tensor, "pairs classes"],
    predicate: Float[Tensor, "pairs predicates"],
    other: Float[Tensor, "pairs classes"],
    window: Int[Tensor, " pairs"],
    class_threshold: float = 0.2,
    predicate_threshold: float = 0.2,
    most: int = 100,
) -> Candidates:
    """The `most` best triplets of each window.

    Pairs of which a side is most likely background (the last class) give none.

    Args:
        subject, predicate, other: probabilities.
        window: of each pair, not falling.
        class_threshold, predicate_threshold: what a class and a predicate must exceed.
        most: triplets of a window.
    """
    background = subject.shape[1] - 1
    shown = (subject.argmax(1) != background) & (other.argmax(1) != background)
    # No more classes than this can exceed the threshold.
    few = max(min(background, int(1 / class_threshold)), 1) if class_threshold > 0 else background
    p_s, c_s = subject[:, :background].topk(few)
    p_o, c_o = other[:, :background].topk(few)
    sure = [p > class_threshold for p in (p_s, p_o)]
    holds = shown[:, None] & (predicate > predicate_threshold)
    pair, s, p, o = (
        (sure[0][:, :, None, None] & holds[:, None, :, None] & sure[1][:, None, None, :]).nonzero().unbind(1)
    )
    score = p_s[pair, s] * predicate[pair, p] * p_o[pair, o]
    order = score.argsort(descending=True, stable=True)
    order = order[window[pair[order]].argsort(stable=True)]
    in_window = window[pair[order]]
    first = torch.searchsorted(in_window, in_window)
    order = order[torch.arange(len(order), device=order.device) - first < most]
    pair, s, p, o = pair[order], s[order], p[order], o[order]
    return Candidates(pair, c_s[pair, s], p, c_o[pair, o], score[order])


def suppress(found: Candidates, windows: Windows, threshold: float = 0.9) -> Candidates:
    """Without candidates that repeat a better one: same window and triplet, both tracklets overlap it by more.

    Returns:
        on the CPU.
    """
    found = Candidates(*(values.cpu() for values in found))
    subject, other = (tracklets.cpu().numpy()[found.pair.numpy()] for tracklets in (windows.subject, windows.object))
    window = windows.pair_window.cpu().numpy()[found.pair.numpy()]
    triplet = torch.stack([found.subject, found.predicate, found.object], 1).numpy()
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, key in enumerate(zip(window.tolist(), *triplet.T.tolist(), strict=True)):
        groups.setdefault(key, []).append(i)
    pairs = [(a, b) for some in groups.values() for k, a in enumerate(some) for b in some[k + 1 :]]
    if not pairs:
        return found
    better, worse = np.array(pairs).T
    tracks = Tracks(
        windows.boxes.cpu().double().numpy(),
        *(values.cpu().numpy() for values in (windows.first, windows.length, windows.begin)),
    )
    overlap = np.minimum(*(viou(tracks, tracks, side[better], side[worse]) for side in (subject, other)))
    kept = np.ones(len(subject), bool)
    order = np.lexsort((better, worse))
    for i in order[overlap[order] > threshold]:  # a candidate is decided once all better ones are
        kept[worse[i]] &= not kept[better[i]]
    rows = torch.from_numpy(np.flatnonzero(kept))
    return Candidates(*(values[rows] for values in found))


def by_clip(
    found: Candidates, windows: Windows, objects: Sequence[str], predicates: Sequence[str]
) -> dict[int, list[list[WindowRelation]]]:
    """The candidates of each clip (index) and window, named and with their boxes; clips without any are left out."""
    boxes = windows.boxes.cpu().double().numpy()
    first, length, begin = (values.tolist() for values in (windows.first, windows.length, windows.begin))
    tracklets: dict[int, Tracklet] = {}

    def tracklet(index: int) -> Tracklet:
        if index not in tracklets:
            rows = boxes[first[index] : first[index] + length[index]]
            tracklets[index] = Tracklet(begin[index], filled(rows))
        return tracklets[index]

    clip, window_of = windows.clip.tolist(), windows.pair_window.cpu()[found.pair.cpu()].tolist()
    subject, other = (side.cpu()[found.pair.cpu()].tolist() for side in (windows.subject, windows.object))
    grouped: dict[int, dict[int, list[WindowRelation]]] = {}
    classes = zip(found.subject.tolist(), found.predicate.tolist(), found.object.tolist(), strict=True)
    for w, i, j, (s, p, o), score in zip(window_of, subject, other, classes, found.score.tolist(), strict=True):
        relation = WindowRelation((objects[s], predicates[p], objects[o]), score, tracklet(i), tracklet(j))
        grouped.setdefault(clip[w], {}).setdefault(w, []).append(relation)
    return {number: [some for _, some in sorted(parts.items())] for number, parts in grouped.items()}


def associate(
    windows: Iterable[Sequence[WindowRelation]],
    threshold: float = 0.5,
    score: ScoreOf = "sum",
    most_per_window: int = 100,
    most: int = 200,
) -> list[Relation]:
    """Relations of a video, by falling score, from those of its windows in order of time.

    A relation of a window, best first, extends the first of those extended or begun in the window before (best first)
    that has its triplet and whose subject and object it both overlaps by more than `threshold` over their common
    frames; over a gap of less than a window the last box is compared with the first. Extended, boxes are averaged
    where both have one and interpolated over a gap. What is left is cut to the frames of both sides, at least two.

    Args:
        score: of an extended relation: `sum` of its windows' (VidVRD-II; rewards long ones) or `mean` (the helper's).
        most_per_window: relations of a window that take part.
        most: relations that are returned.
    """
    everything: list[_Running] = []
    open_now: list[_Running] = []
    memory = _Memory()
    for found in windows:
        ranked = sorted(open_now, key=lambda r: r.score(score), reverse=True)
        waiting: dict[Triplet, list[_Running]] = {}
        for running in ranked:
            waiting.setdefault(running.triplet, []).append(running)
        open_now = []
        for relation in sorted(found, key=lambda r: r.score, reverse=True)[:most_per_window]:
            same = waiting.get(relation.triplet, [])
            fits = (r for r in same if memory.linked(r.subject, relation.subject) > threshold
                    and memory.linked(r.object, relation.object) > threshold)  # fmt: skip
            current = next(fits, None)
            if current is None:
                current = _Running(relation.triplet, relation.subject, relation.object)
                everything.append(current)
            else:
                same.remove(current)
                current.subject = memory.joined(current.subject, relation.subject)
                current.object = memory.joined(current.object, relation.object)
            current.scores.append(relation.score)
            open_now.append(current)
    finished = [whole for running in everything if (whole := running.finished(score)) is not None]
    return sorted(finished, key=lambda r: r.score, reverse=True)[:most]


def filled(boxes: Boxes) -> Boxes:
    """The boxes with NaN interpolated between the frames around; first and last box are there."""
    missing: Bool[np.ndarray, " frames"] = np.isnan(boxes[:, 0])
    if not missing.any():
        return boxes
    frames = np.arange(len(boxes))
    return np.stack([np.interp(frames, frames[~missing], side[~missing]) for side in boxes.T], 1)


@dataclass(eq=False)
class _Running:
    """A relation that may go on."""

    triplet: Triplet
    subject: Tracklet
    object: Tracklet
    scores: list[float] = field(default_factory=list)

    def score(self, kind: ScoreOf) -> float:
        return sum(self.scores) / (len(self.scores) if kind == "mean" else 1)

    def finished(self, kind: ScoreOf) -> Relation | None:
        begin, end = max(self.subject.begin, self.object.begin), min(self.subject.end, self.object.end)
        if end - begin < 2:
            return None
        subject, other = (t.boxes[begin - t.begin : end - t.begin] for t in (self.subject, self.object))
        return Relation(self.triplet, begin, end, subject, other, self.score(kind))


class _Memory:
    """Overlaps and unions of tracklets, each computed once however many relations share the tracklets."""

    def __init__(self) -> None:
        # The tracklets are kept too, so that no id is used twice.
        self._overlap: dict[tuple[int, int], tuple[float, Tracklet, Tracklet]] = {}
        self._joined: dict[tuple[int, int], tuple[Tracklet, Tracklet, Tracklet]] = {}

    def linked(self, old: Tracklet, new: Tracklet) -> float:
        key = (id(old), id(new))
        if key not in self._overlap:
            self._overlap[key] = (_linked(old, new), old, new)
        return self._overlap[key][0]

    def joined(self, old: Tracklet, new: Tracklet) -> Tracklet:
        key = (id(old), id(new))
        if key not in self._joined:
            self._joined[key] = (_join(old, new), old, new)
        return self._joined[key][0]


def _linked(a: Tracklet, b: Tracklet) -> float:
    """Overlap over the common frames, or of the boxes at both ends of a gap."""
    low, high = max(a.begin, b.begin), min(a.end, b.end)
    if low < high:
        boxes_a, boxes_b = (t.boxes[low - t.begin : high - t.begin] for t in (a, b))
    elif low - high < WINDOW:
        early, late = (a, b) if a.end <= b.begin else (b, a)
        boxes_a, boxes_b = early.boxes[-1:], late.boxes[:1]
    else:
        return 0.0
    common = np.concatenate(
        [np.maximum(boxes_a[:, :2], boxes_b[:, :2]), np.minimum(boxes_a[:, 2:], boxes_b[:, 2:])], axis=1
    )
    shared = area(common).sum()
    union = area(boxes_a).sum() + area(boxes_b).sum() - shared
    return float(shared / union) if union > 0 else 0.0


def _join(a: Tracklet, b: Tracklet) -> Tracklet:
    begin, end = min(a.begin, b.begin), max(a.end, b.end)
    total, count = np.zeros((end - begin, 4)), np.zeros((end - begin, 1))
    for t in (a, b):
        total[t.begin - begin : t.end - begin] += t.boxes
        count[t.begin - begin : t.end - begin] += 1
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return Tracklet(begin, filled(mean))
