"""What every relations reader gives: tracks of boxes, who does what to whom and when, all in half-open frames.

Boxes are (left, top, right, bottom), in pixels unless said otherwise; NaN where an object is out of view.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

Boxes = Float64[np.ndarray, "_frames 4"]
Triplet = tuple[str, str, str]  # subject, predicate, object


class Relation(NamedTuple):
    """A triplet with the boxes of both sides at each frame of [begin, end), and how sure its author is."""

    triplet: Triplet
    begin: int
    end: int
    subject: Boxes
    object: Boxes
    score: float = 1.0


class Track(NamedTuple):
    """An object's boxes at the frames from `begin` on."""

    category: str
    begin: int
    boxes: Boxes

    @property
    def end(self) -> int:
        return self.begin + len(self.boxes)

    def during(self, begin: int, end: int) -> Boxes:
        """The boxes at the frames of [begin, end), NaN where there are none."""
        boxes = np.full((end - begin, 4), np.nan)
        first, last = max(begin, self.begin), min(end, self.end)
        if first < last:
            boxes[first - begin : last - begin] = self.boxes[first - self.begin : last - self.begin]
        return boxes


class Instance(NamedTuple):
    """A relation between two tracks of a clip, at the frames of [begin, end)."""

    subject: int
    predicate: str
    object: int
    begin: int
    end: int
    score: float = 1.0


@dataclass(frozen=True)
class Clip:
    """A video's annotation: size in pixels, tracks by id, relations between them; width and height 0 if unknown."""

    name: str
    frames: int
    width: int
    height: int
    fps: float
    tracks: Mapping[int, Track]
    instances: Sequence[Instance]

    @property
    def triplets(self) -> list[Triplet]:
        """Of each instance, in order."""
        category = {tid: track.category for tid, track in self.tracks.items()}
        return [(category[i.subject], i.predicate, category[i.object]) for i in self.instances]

    def relations(self) -> list[Relation]:
        """The instances with their boxes."""
        return [
            Relation(
                triplet,
                i.begin,
                i.end,
                self.tracks[i.subject].during(i.begin, i.end),
                self.tracks[i.object].during(i.begin, i.end),
                i.score,
            )
            for triplet, i in zip(self.triplets, self.instances, strict=True)
        ]


@dataclass(frozen=True)
class RelationSet:
    """Relations of several videos by name, with the videos' (width, height) where known.

    `normalised`: boxes are shares of width and height instead of pixels.
    """

    videos: Mapping[str, Sequence[Relation]]
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    normalised: bool = False

    @property
    def triplets(self) -> set[Triplet]:
        """Those that occur."""
        return {relation.triplet for relations in self.videos.values() for relation in relations}


def as_set(clips: Sequence[Clip]) -> RelationSet:
    """The relations of the clips, by name."""
    sizes = {clip.name: (clip.width, clip.height) for clip in clips if clip.width and clip.height}
    return RelationSet({clip.name: clip.relations() for clip in clips}, sizes)
