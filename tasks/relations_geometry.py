"""Relations that boxes alone tell: where no trained model knows a video's classes, these rules answer.

Lengths are relative to the objects' own sizes, so that neither the picture's size nor the distance matters; they speak
of the picture, not of the world: a moving camera moves everything, and depth is not judged. Left, right, taller and
next_to follow the rules by which the spec's pedestrian check was counted.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from ..datasets.relations_shapes import runs
from ..datasets.relations_table import Instance, Track

Numbers = Float64[np.ndarray, " frames"]
Holds = Bool[np.ndarray, " frames"]

_SECONDS = 0.5  # that a rule must hold
_GAP = 0.15  # seconds for which it may pause
_SPEED = 0.25  # own sizes a second from which an object moves
_HEADING = 0.7  # cosine from which a motion is to or from something
_NEAR = 3.0  # sizes between the centres of objects that move together


class Pair(NamedTuple):
    """What the rules look at, in the frames that subject and object share; NaN where one is out of view.

    Attributes:
        gap_x, gap_y: subject's centre less the object's, pixels.
        width, height, area: subject's and object's, one behind the other.
        size: mean of both square roots of the areas.
        speed: own speed of subject and object, sizes a second.
        subject_approach: subject's speed along the line to the object; away from it below zero.
        approach: how fast the two come closer.
        apart: speed of the subject as the object sees it.
        distance: between centres, sizes.
    """

    gap_x: Numbers
    gap_y: Numbers
    width: tuple[Numbers, Numbers]
    height: tuple[Numbers, Numbers]
    area: tuple[Numbers, Numbers]
    size: Numbers
    speed: tuple[Numbers, Numbers]
    subject_approach: Numbers
    approach: Numbers
    apart: Numbers
    distance: Numbers


class Rule(NamedTuple):
    """A predicate, and when it holds, in words and as a function."""

    predicate: str
    says: str
    holds: Callable[[Pair], Holds]


# What moves, how it lies, how large it is: pictures and pages list relations in this order.
RULES = (
    Rule("toward", "the subject heads for the object, give or take 45°, and they come closer",
         lambda p: (p.subject_approach > np.maximum(_SPEED, _HEADING * p.speed[0])) & (p.approach > _SPEED)),
    Rule("away", "the subject heads off the object, give or take 45°, and they part",
         lambda p: (p.subject_approach < -np.maximum(_SPEED, _HEADING * p.speed[0])) & (p.approach < -_SPEED)),
    Rule("move_with", "both move, near each other, at much the same velocity",
         lambda p: (np.minimum(*p.speed) > _SPEED) & (p.apart < 0.3 * np.maximum(*p.speed)) & (p.distance < _NEAR)),
    Rule("next_to", "centres less than 1.125 mean widths and mean heights apart",
         lambda p: (abs(p.gap_x) < 0.5625 * sum(p.width)) & (abs(p.gap_y) < 0.5625 * sum(p.height))),
    Rule("left", "centre left of the object's by half a mean width or more", lambda p: p.gap_x < -sum(p.width) / 4),
    Rule("right", "centre right of the object's by half a mean width or more", lambda p: p.gap_x > sum(p.width) / 4),
    Rule("above", "the whole box above the object's", lambda p: p.gap_y < -sum(p.height) / 2),
    Rule("beneath", "the whole box beneath the object's", lambda p: p.gap_y > sum(p.height) / 2),
    Rule("larger", "area over 1.8 times the object's", lambda p: p.area[0] > 1.8 * p.area[1]),
    Rule("taller", "height over 1.15 times the object's", lambda p: p.height[0] > 1.15 * p.height[1]),
)  # fmt: skip


def geometry_relations(tracks: Mapping[int, Track], frames: int, fps: float, most: int = 1000) -> list[Instance]:
    """What the rules say of each ordered pair of tracks, by falling score.

    A rule must hold for half a second; pauses of up to 0.15 s in which both are in view do not end it.

    Args:
        frames, fps: of the video.
        most: relations that are returned.

    Returns:
        relations whose score is the share of the video that they last; at every frame both tracks have a box.
    """
    least, pause = max(round(_SECONDS * fps), 2), round(_GAP * fps)
    moving = {tid: _velocity(track, fps) for tid, track in tracks.items()}
    found = []
    for s, subject in tracks.items():
        for o, other in tracks.items():
            begin, end = max(subject.begin, other.begin), min(subject.end, other.end)
            if s == o or end - begin < least:
                continue
            sides = (subject, other)
            boxes = [track.during(begin, end) for track in sides]
            velocity = [moving[tid][begin - t.begin : end - t.begin] for tid, t in zip((s, o), sides, strict=True)]
            visible = np.isfinite(boxes[0][:, 0]) & np.isfinite(boxes[1][:, 0])
            with np.errstate(invalid="ignore", divide="ignore"):
                pair = _pair(*boxes, *velocity)
                held = [(rule.predicate, rule.holds(pair)) for rule in RULES]
            found += [
                Instance(s, predicate, o, begin + a, begin + b, (b - a) / frames)
                for predicate, mask in held
                for a, b in runs(_closed(mask, pause) & visible, least)
            ]
    return sorted(found, key=lambda i: -i.score)[:most]


def _velocity(track: Track, fps: float) -> Float64[np.ndarray, "frames 2"]:
    """Pixels a second, over a quarter of a second to either side."""
    centre = (track.boxes[:, :2] + track.boxes[:, 2:]) / 2
    reach, at = max(round(fps / 4), 1), np.arange(len(centre))
    late, early = np.minimum(at + reach, len(centre) - 1), np.maximum(at - reach, 0)
    result: Float64[np.ndarray, "frames 2"] = (
        (centre[late] - centre[early]) * fps / np.maximum(late - early, 1)[:, None]
    )
    return result


def _pair(
    subject: Float64[np.ndarray, "frames 4"],
    other: Float64[np.ndarray, "frames 4"],
    subject_velocity: Float64[np.ndarray, "frames 2"],
    other_velocity: Float64[np.ndarray, "frames 2"],
) -> Pair:
    sides = [np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-3) for boxes in (subject, other)]
    area = (sides[0].prod(1), sides[1].prod(1))
    own = np.sqrt(area[0]), np.sqrt(area[1])
    size = (own[0] + own[1]) / 2
    gap = (subject[:, :2] + subject[:, 2:] - other[:, :2] - other[:, 2:]) / 2
    distance = np.linalg.norm(gap, axis=1)
    line = -gap / np.maximum(distance, 1e-9)[:, None]
    relative = subject_velocity - other_velocity
    return Pair(
        gap_x=gap[:, 0],
        gap_y=gap[:, 1],
        width=(sides[0][:, 0], sides[1][:, 0]),
        height=(sides[0][:, 1], sides[1][:, 1]),
        area=area,
        size=size,
        speed=(
            np.linalg.norm(subject_velocity, axis=1) / own[0],
            np.linalg.norm(other_velocity, axis=1) / own[1],
        ),
        subject_approach=(subject_velocity * line).sum(1) / own[0],
        approach=(relative * line).sum(1) / size,
        apart=np.linalg.norm(relative, axis=1) / size,
        distance=distance / size,
    )


def _closed(mask: Holds, pause: int) -> Holds:
    """The mask with pauses of up to so many frames between two stretches filled."""
    closed = mask.copy()
    for a, b in runs(~mask, 1):
        if a > 0 and b < len(mask) and b - a <= pause:
            closed[a:b] = True
    return closed
