"""Clips cut into windows: tracklets, ordered pairs of them, what they show and what is true of them.

VidVRD-II (Shang et al. 2021), §3: windows of 30 frames every 15, a pair for each ordered two tracklets of a window.
Labels follow its released code, with exact overlap in place of one that adds a pixel to shares of the frame.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64, Shaped, UInt8
from torch import Tensor

from .relations_overlap import Tracks, stack, viou_within
from .relations_table import Boxes, Clip

WINDOW, STRIDE = 30, 15  # frames
POSITION = 12  # numbers that say how two tracklets lie to each other
_SAME = 0.7  # overlap from which a detection shows an annotated object


class Proposal(NamedTuple):
    """A tracklet: boxes (pixels) at the frames from `begin` on, all in one window, and what it looks like."""

    begin: int
    boxes: Boxes
    feature: Float32[np.ndarray, " _features"]
    score: float = 1.0


@dataclass(frozen=True)
class Scene:
    """A clip and what was detected in each of its windows; `domain` is the camera, -1 where unknown."""

    clip: Clip
    windows: Sequence[Sequence[Proposal]]
    domain: int = -1


@dataclass(frozen=True)
class Labelling:
    """When a tracklet shows an annotated object, and when a relation counts for a window.

    Attributes:
        positive: overlap above which it does; the other track is cut to the tracklet's frames first.
        negative: overlap below which it shows no object.
        frames: of the window that a relation must cover.
        add_truth: annotated tracks join the tracklets of training windows, with the features of detections that
            show them.
    """

    positive: float = 0.6
    negative: float = 0.3
    frames: int = 20
    add_truth: bool = True


class RelationBatch(NamedTuple):
    """Ordered pairs of tracklets of some windows.

    Attributes:
        subject, object: what the tracklets look like.
        position: where the subject begins and ends relative to the object, see `relative_position`.
        subject_class, object_class: index into `schema["objects"]`, the number of those for background, -1 unknown.
        predicate: 1 for those that hold, of `schema["predicates"]`.
        pair: row of the split's pairs.
        window: index of the split's windows; in order of clip and time in validation and test.
        domain: camera, -1 where unknown; for reports, no model reads it.
    """

    subject: Float[Tensor, "pairs features"]
    object: Float[Tensor, "pairs features"]
    position: Float[Tensor, "pairs 12"]
    subject_class: Int[Tensor, " pairs"]
    object_class: Int[Tensor, " pairs"]
    predicate: Float[Tensor, "pairs predicates"]
    pair: Int[Tensor, " pairs"]
    window: Int[Tensor, " pairs"]
    domain: Int[Tensor, " pairs"]


@dataclass(frozen=True)
class Windows:
    """All windows of a split: tracklets one behind the other, pairs sorted by window.

    Attributes:
        boxes: of the tracklets, pixels; `first`, `length` (rows) and `begin` (frame of the clip) say whose.
        feature, ends, times: of each tracklet: appearance, first and last box, their frames in the window.
        subject, object: tracklets of each pair. `subject_class`, `object_class`: -1 where a label is not clear.
        truth: row of `table` with the pair's predicates.
        pair_window, count, start: window of each pair; pairs of each window, and the first of them.
        clip, window_begin, domain: of each window.
    """

    boxes: Float[Tensor, "rows 4"]
    first: Int[Tensor, " tracklets"]
    length: Int[Tensor, " tracklets"]
    begin: Int[Tensor, " tracklets"]
    feature: Float[Tensor, "tracklets features"]
    ends: Float[Tensor, "tracklets 2 4"]
    times: Float[Tensor, "tracklets 2"]
    subject: Int[Tensor, " pairs"]
    object: Int[Tensor, " pairs"]
    subject_class: Int[Tensor, " pairs"]
    object_class: Int[Tensor, " pairs"]
    truth: Int[Tensor, " pairs"]
    pair_window: Int[Tensor, " pairs"]
    table: Shaped[Tensor, "sets predicates"]
    start: Int[Tensor, " windows"]
    count: Int[Tensor, " windows"]
    clip: Int[Tensor, " windows"]
    window_begin: Int[Tensor, " windows"]
    domain: Int[Tensor, " windows"]

    def __len__(self) -> int:
        return len(self.count)

    def to(self, device: torch.device) -> "Windows":
        """All tensors on the device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def batch(self, pairs: Int[Tensor, " pairs"]) -> RelationBatch:
        """Gather pairs by their rows; on the device where the tensors lie, without waiting for it."""
        pairs = pairs.to(self.subject.device, non_blocking=True)
        s, o, window = self.subject[pairs], self.object[pairs], self.pair_window[pairs]
        return RelationBatch(
            subject=self.feature[s],
            object=self.feature[o],
            position=relative_position(self.ends[s], self.ends[o], self.times[s], self.times[o]),
            subject_class=self.subject_class[pairs],
            object_class=self.object_class[pairs],
            predicate=self.table[self.truth[pairs]].float(),
            pair=pairs,
            window=window,
            domain=self.domain[window],
        )


def relative_position(
    subject: Float[Tensor, "pairs 2 4"],
    other: Float[Tensor, "pairs 2 4"],
    subject_time: Float[Tensor, "pairs 2"],
    other_time: Float[Tensor, "pairs 2"],
) -> Float[Tensor, "pairs 12"]:
    """Six numbers for the first boxes of both, six for the last (VidVRD-II, eq. 7, by its code).

    Offset of the centres in widths and heights of the object, log ratios of width, height and area, and the subject's
    frame less the object's in windows. The paper's formula divides by the object's centre, which depends on where the
    camera looks; its code divides by the size.
    """
    size_s, size_o = ((box[..., 2:] - box[..., :2]).clamp_min(1e-3) for box in (subject, other))
    offset = ((subject[..., :2] + subject[..., 2:]) - (other[..., :2] + other[..., 2:])) / 2 / size_o
    ratio = (size_s / size_o).log()
    late = (subject_time - other_time) / WINDOW
    return torch.cat([offset, ratio, ratio.sum(-1, keepdim=True), late[..., None]], -1).flatten(1)


def window_begins(frames: int) -> range:
    """First frames of a clip's windows; an incomplete tail has none."""
    return range(0, frames - WINDOW + 1, STRIDE)


def cut_tracks(tracks: Mapping[int, tuple[int, Boxes]], begin: int) -> dict[int, tuple[int, Boxes]]:
    """Of each track (first frame, boxes) what lies in the window from `begin` on, from its first box to its last."""
    cut = {}
    for tid, (first, boxes) in tracks.items():
        low, high = max(begin - first, 0), min(begin + WINDOW - first, len(boxes))
        seen = np.flatnonzero(np.isfinite(boxes[low:high, 0])) if low < high else np.zeros(0, dtype=np.int64)
        if len(seen):
            cut[tid] = (first + low + int(seen[0]), boxes[low + seen[0] : low + seen[-1] + 1])
    return cut


def build(
    scenes: Sequence[Scene],
    objects: Sequence[str],
    predicates: Sequence[str],
    labelling: Labelling,
    train: bool,
    num_features: int,
) -> Windows:
    """The windows of a split.

    Args:
        objects, predicates: the vocabularies; scenes name nothing else.
        train: leave out windows without a relation and pairs whose label is not clear, and add annotated tracks.
        num_features: width of the proposals' features.
    """
    object_ids, predicate_ids = ({name: i for i, name in enumerate(names)} for names in (objects, predicates))
    parts = [
        _Builder(scene, number, object_ids, predicate_ids, labelling, train, num_features).windows()
        for number, scene in enumerate(scenes)
    ]
    return _joined(parts, len(predicates), num_features)


class _Builder:
    """The windows of one clip, in NumPy."""

    def __init__(
        self,
        scene: Scene,
        number: int,
        objects: Mapping[str, int],
        predicates: Mapping[str, int],
        labelling: Labelling,
        train: bool,
        num_features: int,
    ) -> None:
        self.scene, self.number, self.train, self.labelling = scene, number, train, labelling
        self.objects, self.predicates, self.num_features = objects, predicates, num_features
        self.begins = window_begins(scene.clip.frames)

    def windows(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Everything of `Windows`, with indices that count from this clip's first."""
        truth, window_of_truth, classes = self._truth()
        proposals = [(w, p) for w, some in enumerate(self.scene.windows) for p in some]
        tracks = stack([p.boxes for _, p in proposals], [p.begin for _, p in proposals])
        window = np.array([w for w, _ in proposals], dtype=np.int64)
        feature = np.array([p.feature for _, p in proposals], dtype=np.float32).reshape(-1, self.num_features)
        best, overlap = _best(tracks, window, truth, window_of_truth)
        if self.train and self.labelling.add_truth:
            tracks, window, feature, best, overlap = self._with_truth(
                tracks, window, feature, best, overlap, truth, window_of_truth
            )
        shown = np.where(overlap > self.labelling.positive, best, -1)
        nothing = overlap < self.labelling.negative
        order = np.argsort(window, kind="stable")
        count = np.bincount(window, minlength=len(self.begins))
        i, j = (order[index] for index in _products(count, count))
        i, j = i[i != j], j[i != j]
        background = len(self.objects)
        classes = np.append(classes, background)  # index -1
        clear = ((shown[i] >= 0) & (shown[j] >= 0) & (shown[i] != shown[j])) | nothing[i] | nothing[j]
        rows, table = self._predicates(shown[i], shown[j])
        kept = np.ones(len(i), bool)
        if self.train:
            busy = np.zeros(len(self.begins), bool)
            busy[[w for w, _ in self._relations()]] = True
            kept = clear & busy[window[i]]
        i, j, clear, rows = i[kept], j[kept], clear[kept], rows[kept]
        ends, times = _ends(tracks, window, self.begins)
        return {
            "boxes": tracks.boxes,
            "first": tracks.first,
            "length": tracks.length,
            "begin": tracks.begin,
            "feature": feature,
            "ends": ends,
            "times": times,
            "subject": i,
            "object": j,
            "subject_class": np.where(clear, classes[shown[i]], -1),
            "object_class": np.where(clear, classes[shown[j]], -1),
            "truth": rows,
            "pair_window": window[i],
            "table": table,
            "count": np.bincount(window[i], minlength=len(self.begins)),
            "clip": np.full(len(self.begins), self.number),
            "window_begin": np.array(self.begins, dtype=np.int64),
            "domain": np.full(len(self.begins), self.scene.domain),
        }

    def _truth(self) -> tuple[Tracks, Int64[np.ndarray, " tracks"], Int64[np.ndarray, " tracks"]]:
        """Annotated tracks cut to windows, their windows and classes; `self.cut` finds them by window and id."""
        clip = self.scene.clip
        whole = {tid: (track.begin, track.boxes) for tid, track in clip.tracks.items()}
        cuts = [(w, tid, *cut) for w, b in enumerate(self.begins) for tid, cut in cut_tracks(whole, b).items()]
        self.cut = {(w, tid): index for index, (w, tid, _, _) in enumerate(cuts)}
        classes = np.array([self.objects[clip.tracks[tid].category] for _, tid, _, _ in cuts], dtype=np.int64)
        tracks = stack([boxes for *_, boxes in cuts], [begin for _, _, begin, _ in cuts])
        return tracks, np.array([w for w, *_ in cuts], dtype=np.int64), classes

    def _with_truth(
        self,
        tracks: Tracks,
        window: Int64[np.ndarray, " some"],
        feature: Float32[np.ndarray, "some features"],
        best: Int64[np.ndarray, " some"],
        overlap: Shaped[np.ndarray, " some"],
        truth: Tracks,
        window_of_truth: Int64[np.ndarray, " tracks"],
    ) -> tuple[
        Tracks, Shaped[np.ndarray, " n"], Shaped[np.ndarray, "n f"], Shaped[np.ndarray, " n"], Shaped[np.ndarray, " n"]
    ]:
        """The tracklets and behind them annotated tracks that a detection shows, with its features, or their mean."""
        same = np.flatnonzero(overlap > _SAME)
        number = np.bincount(best[same], minlength=len(window_of_truth))
        total = np.zeros((len(number), self.num_features), dtype=np.float32)
        np.add.at(total, best[same], feature[same])
        added = np.flatnonzero(number)
        extra = [truth.boxes[truth.first[t] : truth.first[t] + truth.length[t]] for t in added]
        more = stack(extra, truth.begin[added].tolist())
        tracks = Tracks(
            np.concatenate([tracks.boxes, more.boxes]),
            np.concatenate([tracks.first, more.first + len(tracks.boxes)]),
            np.concatenate([tracks.length, more.length]),
            np.concatenate([tracks.begin, more.begin]),
        )
        return (
            tracks,
            np.concatenate([window, window_of_truth[added]]),
            np.concatenate([feature, total[added] / number[added, None].astype(np.float32)]),
            np.concatenate([best, added]),
            np.concatenate([overlap, np.ones(len(added))]),
        )

    def _relations(self) -> Iterator[tuple[int, tuple[int, int, int]]]:
        """Window and (subject's cut, object's cut, predicate) of each relation that covers enough of the window."""
        for instance in self.scene.clip.instances:
            for w, b in enumerate(self.begins):
                common = min(instance.end, b + WINDOW) - max(instance.begin, b)
                subject, other = (self.cut.get((w, tid)) for tid in (instance.subject, instance.object))
                if common >= self.labelling.frames and subject is not None and other is not None:
                    yield w, (subject, other, self.predicates[instance.predicate])

    def _predicates(
        self, subject: Int64[np.ndarray, " pairs"], other: Int64[np.ndarray, " pairs"]
    ) -> tuple[Int64[np.ndarray, " pairs"], UInt8[np.ndarray, "sets predicates"]]:
        """For each pair of cuts a row of the table of predicates; row 0 has none."""
        found: dict[tuple[int, int], int] = {}
        held = [(found.setdefault((s, o), len(found) + 1), p) for _, (s, o, p) in self._relations()]
        table = np.zeros((len(found) + 1, len(self.predicates)), dtype=np.uint8)
        for row, predicate in held:
            table[row, predicate] = 1
        cuts = len(self.cut)
        keys = np.array([s * cuts + o for s, o in found], dtype=np.int64)
        order = np.argsort(keys)
        key = np.where((subject >= 0) & (other >= 0), subject * cuts + other, -1)
        at = np.searchsorted(keys[order], key).clip(max=max(len(keys) - 1, 0))
        hit = (keys[order][at] == key) if len(keys) else np.zeros(len(key), bool)
        return np.where(hit, order[at] + 1 if len(keys) else 0, 0), table


def _best(
    tracks: Tracks,
    window: Int64[np.ndarray, " tracks"],
    truth: Tracks,
    window_of_truth: Int64[np.ndarray, " cuts"],
) -> tuple[Int64[np.ndarray, " tracks"], Shaped[np.ndarray, " tracks"]]:
    """For each tracklet the annotated track of its window that it overlaps most, and how much; -1 and 0 for none."""
    left, right = np.nonzero(window[:, None] == window_of_truth)
    overlap = viou_within(tracks, truth, left, right)
    order = np.lexsort((-right, overlap))  # the last one written counts: the highest, of equals the first
    best, most = np.full(len(window), -1), np.zeros(len(window))
    best[left[order]], most[left[order]] = right[order], overlap[order]
    return best, most


def _products(
    a: Int64[np.ndarray, " groups"], b: Int64[np.ndarray, " groups"]
) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
    """All pairs of members of the same group, of a and of b elements that lie group by group."""
    pairs = a * b
    step = np.arange(pairs.sum()) - np.repeat(np.cumsum(pairs) - pairs, pairs)
    width = np.repeat(np.maximum(b, 1), pairs)
    first_a, first_b = (np.repeat(np.cumsum(n) - n, pairs) for n in (a, b))
    return first_a + step // width, first_b + step % width


def _ends(
    tracks: Tracks, window: Int64[np.ndarray, " tracks"], begins: range
) -> tuple[Float32[np.ndarray, "tracks 2 4"], Float32[np.ndarray, "tracks 2"]]:
    """First and last box of each tracklet, which are never NaN, and their frames counted from the window's first."""
    last = tracks.first + tracks.length - 1
    boxes = np.stack([tracks.boxes[tracks.first], tracks.boxes[last]], 1)
    at = tracks.begin - np.array(begins, dtype=np.int64)[window]
    return boxes.astype(np.float32), np.stack([at, at + tracks.length - 1], 1).astype(np.float32)


_SHIFTED = {"first": "boxes", "subject": "first", "object": "first", "pair_window": "count"}


def _joined(parts: Sequence[dict[str, Shaped[np.ndarray, "..."]]], predicates: int, num_features: int) -> Windows:
    """The clips one behind the other; what points at rows of another array moves by the rows before."""
    arrays: dict[str, Shaped[np.ndarray, ...]] = {}
    before = {name: np.cumsum([0, *(len(p[name]) for p in parts[:-1])]) for name in ("boxes", "first", "count")}
    rows = np.cumsum([1, *(len(p["table"]) - 1 for p in parts[:-1])])
    for name in parts[0] if parts else ():
        values = [p[name] for p in parts]
        if name in _SHIFTED:
            values = [v + n for v, n in zip(values, before[_SHIFTED[name]], strict=True)]
        elif name == "truth":
            values = [np.where(v > 0, v + n - 1, 0) for v, n in zip(values, rows, strict=True)]
        elif name == "table":
            values = [np.zeros((1, predicates), dtype=np.uint8), *(v[1:] for v in values)]
        arrays[name] = np.concatenate(values)
    if not parts:
        raise ValueError("a split without clips")
    arrays["start"] = np.cumsum(arrays["count"]) - arrays["count"]
    arrays["boxes"] = arrays["boxes"].astype(np.float32)
    return Windows(**{name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()})
