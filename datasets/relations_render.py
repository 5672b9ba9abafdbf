"""moving_shapes as pictures: frames of a clip, and what a crop of them looks like."""

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8

from .relations_table import Clip

FEATURES = 48
_GRID = 4  # a crop is described by 4 x 4 mean colours
_LOOKS = 4  # frames of a tracklet that are looked at
_PALETTE = np.array(
    [[230, 60, 60], [60, 160, 230], [70, 190, 90], [240, 180, 40], [160, 80, 200], [240, 120, 180], [60, 200, 200],
     [150, 110, 70]]
)  # fmt: skip
_BACKGROUND = np.array([[236, 236, 230], [40, 44, 52], [180, 200, 180], [90, 70, 90], [210, 190, 150]])

Frames = UInt8[np.ndarray, "frames height width 3"]
Plane = Float64[np.ndarray, "rows columns"]


def render(clip: Clip, domain: int, rng: np.random.Generator) -> Frames:
    """The clip's frames, RGB; a domain has its own background, palette and stripes."""
    ground = _BACKGROUND[domain % len(_BACKGROUND)]
    noise = rng.integers(-6, 7, (clip.height, clip.width, 1))
    frames = np.tile(np.clip(ground + noise, 0, 255).astype(np.uint8), (clip.frames, 1, 1, 1))
    shift = np.random.default_rng([domain, 77]).permutation(len(_PALETTE))
    for k, track in clip.tracks.items():
        c = _SHAPES.index(track.category)
        colour = _PALETTE[shift[c]]
        for frame, box in enumerate(track.boxes, track.begin):
            if np.isfinite(box[0]):
                _paint(frames[frame], box, c, colour, domain, k)
    return frames


def describe(frames: Frames, boxes: Float64[np.ndarray, "boxes 4"], begin: int) -> Float32[np.ndarray, " 48"]:
    """Mean colours of a 4 x 4 grid over the box, averaged over some of its frames, in [-1, 1]."""
    looks = np.linspace(0, len(boxes) - 1, _LOOKS).round().astype(int)
    share = (np.arange(_GRID * 4) + 0.5) / (_GRID * 4)
    _, height, width, _ = frames.shape
    x = boxes[looks, :1] + (boxes[looks, 2:3] - boxes[looks, :1]) * share
    y = boxes[looks, 1:2] + (boxes[looks, 3:] - boxes[looks, 1:2]) * share
    columns, rows = np.clip(x, 0, width - 1).astype(int), np.clip(y, 0, height - 1).astype(int)
    at = np.clip(begin + looks, 0, len(frames) - 1)
    crop = frames[at[:, None, None], rows[:, :, None], columns[:, None, :]].astype(np.float32)
    means = crop.reshape(_LOOKS, _GRID, 4, _GRID, 4, 3).mean((0, 2, 4))
    colours: Float32[np.ndarray, " 48"] = (means.ravel() / 127.5 - 1).astype(np.float32)
    return colours


def _paint(
    frame: UInt8[np.ndarray, "height width 3"], box: Float64[np.ndarray, " 4"], c: int,
    colour: np.ndarray, domain: int, k: int,
) -> None:  # fmt: skip
    height, width, _ = frame.shape
    left, top = max(int(box[0]), 0), max(int(box[1]), 0)
    right, bottom = min(int(np.ceil(box[2])), width), min(int(np.ceil(box[3])), height)
    if right <= left or bottom <= top:
        return
    u = (np.arange(left, right) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
    v = (np.arange(top, bottom) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    u, v = np.meshgrid(u, v)
    inside = _mask(c, u, v) & (np.abs(u) <= 1) & (np.abs(v) <= 1)
    stripes = ((u if domain % 2 else v) * (3 + domain) + k) % 1 < 0.3
    paint = np.where(stripes[..., None] & (domain > 0), colour * 0.6, colour)
    part = frame[top:bottom, left:right]
    part[inside] = paint[inside].astype(np.uint8)


def _mask(c: int, u: Plane, v: Plane) -> Bool[np.ndarray, "rows columns"]:
    """Where the c-th shape is, in coordinates from -1 to 1; v points down."""
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    x, y = 1.2 * u, -1.15 * v + 0.1
    inside: dict[str, Bool[np.ndarray, "rows columns"]] = {
        "disk": radius <= 1,
        "square": np.maximum(np.abs(u), np.abs(v)) <= 1,
        "triangle": np.abs(u) <= (v + 1) / 2,
        "star": radius <= 0.62 + 0.38 * np.cos(5 * (angle + np.pi / 2)),
        "ring": (radius <= 1) & (radius >= 0.55),
        "cross": np.minimum(np.abs(u), np.abs(v)) <= 0.33,
        "bar": np.abs(v) <= 0.45,
        "heart": (x**2 + y**2 - 1) ** 3 <= x**2 * y**3,  # the heart curve
    }
    return inside[_SHAPES[c]]


_SHAPES = ("disk", "square", "triangle", "star", "ring", "cross", "bar", "heart")
