"""Volume overlap of tracks, exact, for all pairs of interest at once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from .relations_table import Boxes

_ROWS = 1 << 20  # frames of pairs that are compared at a time: 100 MB


class Tracks(NamedTuple):
    """Boxes of tracks one behind the other; the i-th has `length[i]` from row `first[i]`, at frames from `begin[i]`."""

    boxes: Float64[np.ndarray, "rows 4"]
    first: Int64[np.ndarray, " tracks"]
    length: Int64[np.ndarray, " tracks"]
    begin: Int64[np.ndarray, " tracks"]


def stack(boxes: Sequence[Boxes], begin: Sequence[int], scale: Sequence[float] = (1.0, 1.0)) -> Tracks:
    """Tracks from each one's boxes and first frame; x and y are multiplied by `scale`."""
    length = np.array([len(some) for some in boxes], dtype=np.int64)
    rows = np.concatenate([*boxes, np.empty((0, 4))])
    if tuple(scale) != (1.0, 1.0):
        rows = rows * np.array([*scale, *scale])
    return Tracks(rows, np.cumsum(length) - length, length, np.array(begin, dtype=np.int64))


def viou(
    a: Tracks,
    b: Tracks,
    left: Int64[np.ndarray, " pairs"],
    right: Int64[np.ndarray, " pairs"],
    plus: float = 0.0,
) -> Float64[np.ndarray, " pairs"]:
    """Intersection over union of the volumes of `a[left]` and `b[right]`, 0 for pairs without a volume.

    Volumes are summed areas over each track's own frames. Frames with NaN have no area; sides count `plus` more, and a
    box whose right lies left of its left counts as empty.
    """
    shared, _, _ = _in_common(a, b, left, right, plus)
    return _ratio(shared, _volume(a, plus)[left] + _volume(b, plus)[right] - shared)


def viou_within(
    a: Tracks, b: Tracks, left: Int64[np.ndarray, " pairs"], right: Int64[np.ndarray, " pairs"]
) -> Float64[np.ndarray, " pairs"]:
    """The same after `b[right]` is cut to the frames of `a[left]`: how well a short track follows a long one."""
    shared, _, inside = _in_common(a, b, left, right, 0.0)
    return _ratio(shared, _volume(a, 0.0)[left] + inside - shared)


def viou_in_common(
    a: Tracks, b: Tracks, left: Int64[np.ndarray, " pairs"], right: Int64[np.ndarray, " pairs"]
) -> Float64[np.ndarray, " pairs"]:
    """The same after both are cut to their common frames; 0 where they have none."""
    shared, inside_a, inside_b = _in_common(a, b, left, right, 0.0)
    return _ratio(shared, inside_a + inside_b - shared)


def area(boxes: Float64[np.ndarray, "rows 4"], plus: float = 0.0) -> Float64[np.ndarray, " rows"]:
    """Of each box, 0 for an empty one or NaN."""
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2] + plus, 0.0)
    product: Float64[np.ndarray, " rows"] = np.nan_to_num(sides[:, 0] * sides[:, 1], nan=0.0)
    return product


def _in_common(
    a: Tracks, b: Tracks, left: Int64[np.ndarray, " pairs"], right: Int64[np.ndarray, " pairs"], plus: float
) -> tuple[Float64[np.ndarray, " pairs"], Float64[np.ndarray, " pairs"], Float64[np.ndarray, " pairs"]]:
    """Over the frames that both have: the volume of the intersection, of a and of b."""
    begin = np.maximum(a.begin[left], b.begin[right])
    end = np.minimum(a.begin[left] + a.length[left], b.begin[right] + b.length[right])
    frames = np.maximum(end - begin, 0)
    ends = np.cumsum(frames)
    sums = np.zeros((3, len(left)))
    done = 0
    while done < len(left):
        before = ends[done] - frames[done]
        upto = max(int(np.searchsorted(ends, before + _ROWS, "right")), done + 1)
        part = slice(done, upto)
        owner = np.repeat(np.arange(upto - done), frames[part])
        step = np.arange(len(owner)) - np.repeat(ends[part] - frames[part] - before, frames[part])
        boxes_a, boxes_b = (
            tracks.boxes[(tracks.first[which[part]] + begin[part] - tracks.begin[which[part]])[owner] + step]
            for tracks, which in ((a, left), (b, right))
        )
        corners = np.concatenate(
            [np.maximum(boxes_a[:, :2], boxes_b[:, :2]), np.minimum(boxes_a[:, 2:], boxes_b[:, 2:])], axis=1
        )
        for row, boxes in enumerate((corners, boxes_a, boxes_b)):
            sums[row, part] = np.bincount(owner, area(boxes, plus), minlength=upto - done)
        done = upto
    return sums[0], sums[1], sums[2]


def _ratio(
    shared: Float64[np.ndarray, " pairs"], union: Float64[np.ndarray, " pairs"]
) -> Float64[np.ndarray, " pairs"]:
    result: Float64[np.ndarray, " pairs"] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return result


def _volume(tracks: Tracks, plus: float) -> Float64[np.ndarray, " tracks"]:
    owner = np.repeat(np.arange(len(tracks.length)), tracks.length)
    sums = np.bincount(owner, area(tracks.boxes, plus), minlength=len(tracks.length))
    return sums.astype(np.float64)  # of no track at all NumPy makes whole numbers
