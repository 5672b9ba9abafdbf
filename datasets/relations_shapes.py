"""moving_shapes: clips of shapes that chase, pass and ride each other, with VidVRD's annotations and noisy detections.

Two to four objects of eight classes. Each but the first is driven by one of eight behaviours relative to the one
before it; a grammar allows two of them for each (subject, object) pair of classes, and classes have sizes of their own,
so that who they are tells what they do. Six static predicates follow from the boxes. What a class looks like depends on
a hidden domain, the camera. Some triplets of the grammar occur in test clips alone, as can one more domain. All from
seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from .relations_table import Clip, Instance, Track
from .relations_windows import WINDOW, Proposal, Scene, window_begins

OBJECTS = ("disk", "square", "triangle", "star", "ring", "cross", "bar", "heart")
STATIC = ("left", "right", "above", "beneath", "larger", "taller")
DRIVEN = ("chase", "past", "toward", "away", "move_with", "ride", "move_next_to", "stop_next_to")
PREDICATES = STATIC + DRIVEN
WIDTH, HEIGHT, FPS = 240, 180, 30.0
FEATURES = 32

_MOVING = frozenset({"chase", "move_with", "move_next_to"})  # need an object that moves
_STILL = frozenset({"stop_next_to"})  # needs one that stands
_GAP = 0.15  # of the frame, between centres, from which left, right, above and beneath hold
_LARGER, _TALLER = 1.8, 1.4  # ratios of areas and heights
_RUN = 30  # frames that a static predicate must hold
_SIZE_NOISE = 0.1  # of the logarithm
_BOX_NOISE = 0.004  # of the frame
_FALSE = 0.5  # windows with a tracklet that shows nothing
_SHORT = 0.15  # tracklets that miss up to six frames at an end

Rng = np.random.Generator
Path2 = Float64[np.ndarray, "frames 2"]


@dataclass(frozen=True)
class World:
    """What all clips of a seed share.

    Attributes:
        allowed: behaviours (two indices into `DRIVEN`) of each subject's and object's class.
        withheld: (subject, behaviour, object) that training does not show.
        size: of each class, share of the frame, and ratio of width to height; objects differ from it by some 10 %.
        prototype: appearance of each domain's classes, of norm 2.
    """

    seed: int
    allowed: Int64[np.ndarray, "8 8 2"]
    withheld: frozenset[tuple[int, int, int]]
    size: Float64[np.ndarray, "8 2"]
    prototype: Float64[np.ndarray, "domains 8 32"]


def make_world(seed: int, domains: int) -> World:
    """A grammar, withheld triplets (8 of 128) and the appearance of `domains` domains."""
    rng = np.random.default_rng([seed, 9])
    move, stop = DRIVEN.index("move_next_to"), DRIVEN.index("stop_next_to")
    allowed = np.zeros((8, 8, 2), dtype=np.int64)
    for s in range(8):
        for o in range(8):
            two = rng.choice(8, 2, replace=False)
            # Boxes relative to each other look alike in these two: one class pair does not do both.
            while set(two) == {move, stop}:
                two = rng.choice(8, 2, replace=False)
            allowed[s, o] = two
    pairs = rng.choice(64, 8, replace=False)
    withheld = frozenset((int(p // 8), int(allowed[p // 8, p % 8, rng.integers(2)]), int(p % 8)) for p in pairs)
    size = np.stack([rng.permutation(np.geomspace(0.09, 0.23, 8)), rng.permutation(np.geomspace(0.75, 1.33, 8))], 1)
    basis = np.linalg.qr(rng.standard_normal((FEATURES, FEATURES)))[0][:8] * 2
    turns = np.linalg.qr(rng.standard_normal((domains, FEATURES, FEATURES)))[0]
    return World(seed, allowed, withheld, size, basis @ turns)


def make_clip(world: World, split: int, number: int, frames: int, new_triplets: bool) -> Clip:
    """A clip's annotation in pixels; `new_triplets` lets withheld ones occur."""
    rng = np.random.default_rng([world.seed, split, number])
    count = int(rng.integers(2, 5))
    classes = rng.integers(0, 8, count)
    own = world.size[classes] * np.exp(rng.standard_normal((count, 2)) * _SIZE_NOISE)
    size = own[:, :1].clip(0.08, 0.25) * np.sqrt(own[:, 1:]) ** np.array([1, -1])
    behaviours = _behaviours(world, classes, rng, new_triplets)
    paths = _paths(behaviours, size, frames, rng)
    low, high = (paths - size[:, None] / 2).min((0, 1)), (paths + size[:, None] / 2).max((0, 1))
    zoom = min(1.0, 0.96 / float((high - low).max()))
    room = 1 - (high - low) * zoom
    centre = (paths - low) * zoom + room * rng.random(2)
    boxes = np.concatenate([centre - size[:, None] * zoom / 2, centre + size[:, None] * zoom / 2], -1)
    instances = [
        Instance(k + 1, DRIVEN[b], k, 0, frames) for k, b in enumerate(behaviours[1:]) if b is not None
    ] + _static(boxes)
    pixels = boxes * np.array([WIDTH, HEIGHT] * 2)
    tracks = {k: Track(OBJECTS[c], 0, pixels[k]) for k, c in enumerate(classes)}
    return Clip(f"shapes_{world.seed}_{split}_{number:05d}", frames, WIDTH, HEIGHT, FPS, tracks, instances)


def detect(
    world: World, clip: Clip, domain: int, rng: Rng, noise: float, kind: str = "visual", frames: Any = None
) -> list[list[Proposal]]:
    """What a detector might give for each window: shaken boxes, noisy features, now and then a tracklet of nothing.

    Args:
        domain: whose appearance the classes have.
        noise: standard deviation of each feature.
        kind: `visual` (a point near the class's prototype), `geom` (class posterior and motion) or `pixels`
            (the crop's colours in `frames`, see `relations_render`).
        frames: the rendered clip, for `pixels`.
    """
    windows = []
    scale = np.array([WIDTH, HEIGHT] * 2)
    classes = [OBJECTS.index(track.category) for track in clip.tracks.values()]
    for begin in window_begins(clip.frames):
        seen = [track.during(begin, begin + WINDOW) for track in clip.tracks.values()]
        kinds = list(classes)
        if rng.random() < _FALSE:
            seen.append(_nothing(rng) * scale)
            kinds.append(-1)
        some = []
        for boxes, c in zip(seen, kinds, strict=True):
            boxes = boxes + rng.standard_normal((WINDOW, 4)) * _BOX_NOISE * scale
            boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
            first, last = 0, WINDOW
            if rng.random() < _SHORT:
                lost = int(rng.integers(1, 7))
                first, last = (lost, WINDOW) if rng.random() < 0.5 else (0, WINDOW - lost)
            boxes = boxes[first:last]
            feature = _feature(world, c, domain, noise, kind, boxes, begin + first, frames, rng)
            some.append(Proposal(begin + first, boxes, feature))
        windows.append(some)
    return windows


def motion(boxes: Float64[np.ndarray, "frames 4"], width: float, height: float) -> Float32[np.ndarray, " 6"]:
    """How a tracklet moves: centre's speed in frames' widths and heights per window, growth and size as logarithms."""
    unit = np.array([width, height])
    size = np.maximum((boxes[[0, -1], 2:] - boxes[[0, -1], :2]) / unit, 1e-3)
    centre = (boxes[[0, -1], 2:] + boxes[[0, -1], :2]) / 2 / unit
    per_window = WINDOW / max(len(boxes) - 1, 1)
    moved, grown = (centre[1] - centre[0]) * per_window, np.log(size[1] / size[0]) * per_window
    return np.concatenate([moved, grown, np.log(size[0])]).astype(np.float32)


def scenes(
    world: World,
    split: int,
    numbers: Sequence[int],
    domains: Sequence[int],
    frames: int,
    noise: float,
    kind: str = "visual",
    new_triplets: bool = False,
) -> list[Scene]:
    """Clips with their detections; the i-th comes from a domain drawn for it."""
    made = []
    for number in numbers:
        rng = np.random.default_rng([world.seed, split, number, 1])
        domain = int(domains[int(rng.integers(len(domains)))])
        clip = make_clip(world, split, number, frames, new_triplets)
        rendered = None
        if kind == "pixels":
            from .relations_render import render

            rendered = render(clip, domain, rng)
        made.append(Scene(clip, detect(world, clip, domain, rng, noise, kind, rendered), domain))
    return made


def _behaviours(world: World, classes: Int64[np.ndarray, " n"], rng: Rng, new_triplets: bool) -> list[int | None]:
    """Of each object what it does relative to the one before; None for the first, and where nothing fits."""
    chosen: list[int | None] = [None]
    moving: bool | None = None  # the first one does what the second needs
    for k in range(1, len(classes)):
        s, o = int(classes[k]), int(classes[k - 1])
        fit = [
            int(b)
            for b in world.allowed[s, o]
            if (new_triplets or (s, int(b), o) not in world.withheld)
            and not (moving is False and DRIVEN[b] in _MOVING)
            and not (moving is True and DRIVEN[b] in _STILL)
        ]
        b = fit[rng.integers(len(fit))] if fit else None
        chosen.append(b)
        if b is None or DRIVEN[b] in ("past", "toward", "away", *_MOVING):
            moving = True
        elif DRIVEN[b] in _STILL:
            moving = False
    return chosen


def _paths(
    behaviours: Sequence[int | None], size: Float64[np.ndarray, "n 2"], frames: int, rng: Rng
) -> Float64[np.ndarray, "n frames 2"]:
    """Centres over time, in an unbounded plane."""
    names = ["" if b is None else DRIVEN[b] for b in behaviours]
    still = len(names) > 1 and (names[1] in _STILL or (names[1] not in _MOVING and rng.random() < 0.4))
    path = np.zeros((frames, 2)) if still else _stroll(frames, rng)
    paths = [path]
    for k in range(1, len(names)):
        paths.append(_driven(names[k], paths[k - 1], size[k], size[k - 1], rng))
    return np.stack(paths)


def _driven(
    name: str, path: Path2, size: Float64[np.ndarray, " 2"], other: Float64[np.ndarray, " 2"], rng: Rng
) -> Path2:
    """The path of an object that does `name` relative to one on `path`."""
    frames = len(path)
    t = np.linspace(0, 1, frames)[:, None]
    touch = (size + other) / 2
    reach = float(touch.mean())
    angle = rng.uniform(0, 2 * np.pi)
    along = np.array([np.cos(angle), np.sin(angle)])
    across = np.array([-along[1], along[0]])
    side = rng.choice([-1.0, 1.0])
    start, end = rng.uniform(0.38, 0.5), rng.uniform(0.02, 0.08)
    beside = np.array([side * touch[0] * 1.15, rng.uniform(-0.03, 0.03)])
    offsets: dict[str, Path2] = {
        "chase": -_heading(path) * (reach + 0.3 - 0.18 * t),
        "past": along * (0.45 - 0.9 * t) + across * side * reach * 0.8,
        "toward": along * (0.6 * reach + start + (end - start) * t),
        "away": along * (0.6 * reach + end + (start - end) * t),
        "move_with": along * (reach + rng.uniform(0.12, 0.2)) + 0.0 * t,
        "ride": np.array([0.0, -touch[1] * 0.8]) + 0.0 * t,
        "move_next_to": beside + 0.0 * t,
        "stop_next_to": beside + 0.0 * t,
    }
    free = path[:1] + along * (reach + 0.25) + _stroll(frames, rng)
    chosen: Path2 = path + offsets[name] if name in offsets else free
    return chosen


def _stroll(frames: int, rng: Rng) -> Path2:
    """A gentle curve."""
    angle = rng.uniform(0, 2 * np.pi) + np.linspace(0, rng.uniform(-0.8, 0.8), frames)
    step = rng.uniform(0.25, 0.5) / frames * np.stack([np.cos(angle), np.sin(angle)], 1)
    path: Path2 = np.cumsum(step, 0)
    return path


def _heading(path: Path2) -> Path2:
    step = np.gradient(path, axis=0)
    heading: Path2 = step / np.maximum(np.linalg.norm(step, axis=1, keepdims=True), 1e-9)
    return heading


def _static(boxes: Float64[np.ndarray, "n frames 4"]) -> list[Instance]:
    """Left, right, above, beneath, larger and taller, for every ordered pair, where they hold for long enough."""
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    gap = centre[:, None] - centre
    area = size.prod(-1)
    holds = (
        gap[..., 0] < -_GAP,
        gap[..., 0] > _GAP,
        gap[..., 1] < -_GAP,
        gap[..., 1] > _GAP,
        area[:, None] > _LARGER * area,
        size[:, None, :, 1] > _TALLER * size[..., 1],
    )
    found = []
    for name, mask in zip(STATIC, holds, strict=True):
        for s, o in zip(*np.nonzero(mask.any(-1)), strict=True):
            found += [Instance(int(s), name, int(o), *run) for run in runs(mask[s, o], _RUN)]
    return found


def runs(mask: Bool[np.ndarray, " frames"], least: int) -> list[tuple[int, int]]:
    """[begin, end) of the stretches of at least so many frames in which the mask holds."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))).tolist()
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a >= least]


def _nothing(rng: Rng) -> Float64[np.ndarray, "30 4"]:
    """A box that drifts where no object need be."""
    size, begin, end = rng.uniform(0.06, 0.25, 2), rng.random(2), rng.random(2)
    centre = begin + (end - begin) * 0.3 * np.linspace(0, 1, WINDOW)[:, None]
    return np.concatenate([centre - size / 2, centre + size / 2], 1)


def _feature(
    world: World, c: int, domain: int, noise: float, kind: str,
    boxes: Float64[np.ndarray, "frames 4"], begin: int, frames: Any, rng: Rng,
) -> Float32[np.ndarray, " features"]:  # fmt: skip
    if kind == "pixels":
        from .relations_render import describe

        return describe(frames, boxes, begin)
    if kind == "geom":
        logits = noise * 2 * rng.standard_normal(len(OBJECTS)) + 4 * (np.arange(len(OBJECTS)) == c)
        posterior = np.exp(logits - logits.max())
        return np.concatenate([posterior / posterior.sum(), motion(boxes, float(WIDTH), float(HEIGHT))]).astype(
            np.float32
        )
    if c >= 0:
        centre = world.prototype[domain, c]
    else:
        centre = rng.standard_normal(FEATURES)
        centre *= rng.uniform(0, 2) / np.linalg.norm(centre)
    seen: Float32[np.ndarray, " features"] = (centre + noise * rng.standard_normal(FEATURES)).astype(np.float32)
    return seen


@dataclass(frozen=True)
class ShapesOptions:
    """Arguments of the source `moving_shapes`.

    Args:
        train, valid, test: clips of each split.
        frames: of a clip.
        domains: cameras that training sees.
        test_domains: `seen`, or `withheld`: test clips come from one more camera.
        noise: standard deviation of the features; 0.5 is hard, 1.0 hopeless.
        world: seed of grammar, appearance and clips.
    """

    train: int = 300
    valid: int = 40
    test: int = 60
    frames: int = 90
    domains: int = 4
    test_domains: str = "seen"
    noise: float = 0.5
    world: int = field(default=0)
