"""A video with its objects framed and, beside the picture, what they do to each other; and a small picture of each."""

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..datasets.relations_progress import progress
from ..datasets.relations_table import Clip, Instance, Track
from ..datasets.relations_video import Picture, Video, Writer
from .relations_geometry import RULES

PALETTE = (
    "#d6123f", "#2a8a3a", "#4363d8", "#c2570c", "#911eb4", "#008080", "#8a5a20", "#c71585", "#6f6f00", "#0f7ea8",
)  # fmt: skip
_CONVERSE = {"left": "right", "right": "left", "above": "beneath", "beneath": "above",
             "next_to": "next_to", "move_with": "move_with"}  # fmt: skip
_RANK = {rule.predicate: number for number, rule in enumerate(RULES)}
_SMALL = 480  # pixels of width below which the picture is enlarged
_THUMB = (120, 90)


class Stills(NamedTuple):
    """JPEG pictures as `data:` URLs: a frame with its overlay, and each object's crop by id."""

    poster: str
    crops: Mapping[int, str]


def name_of(tid: int, track: Track) -> str:
    """What an object is called on pictures and pages."""
    return f"{track.category} {tid}"


def colours(clip: Clip) -> dict[int, str]:
    """Of each track, as a CSS colour."""
    return {tid: PALETTE[i % len(PALETTE)] for i, tid in enumerate(clip.tracks)}


def write_overlay(video: Video, clip: Clip, path: Path, source: str, most_crops: int = 60) -> Stills:
    """Write `path` (H.264 mp4, as many frames as the video) and take the stills.

    Args:
        clip: tracks and relations in frames of the video.
        source: of the relations, see `relations_answers.Answer`.
        most_crops: objects of which a crop is taken, those seen longest.
    """
    canvas = _Canvas(video, clip, source)
    looks = _best_frames(clip, video, most_crops)
    middle = len(video) // 2
    poster, crops = "", {}
    with Writer(path, *canvas.size, video.fps) as writer:
        for frame, picture in progress(video.pictures(), len(video), "overlay"):
            drawn = canvas.draw(frame, picture)
            writer.add(np.asarray(drawn))
            for tid in looks.get(frame, ()):
                crops[tid] = _crop(picture, clip.tracks[tid].during(frame, frame + 1)[0].tolist())
            if frame == middle:
                poster = as_data(drawn, "jpeg")
    return Stills(poster, crops)


def foremost(instances: Sequence[Instance], source: str) -> list[Instance]:
    """The relations worth a line, in order; none that only turns another around."""
    kept: list[Instance] = []
    keys: set[tuple[int, str, int]] = set()
    for i in sorted(instances, key=lambda i: (rank(i.predicate, source), -i.score)):
        if (i.object, _CONVERSE.get(i.predicate, ""), i.subject) not in keys:
            keys.add((i.subject, i.predicate, i.object))
            kept.append(i)
    return kept


def rank(predicate: str, source: str) -> int:
    """What comes before the score: a model's score says how sure it is, a rule's only how long it holds; so of the
    rules, what moves comes before how it lies and how large it is."""
    return _RANK.get(predicate, 0) if source == "geometry" else 0


def as_data(picture: Image.Image, kind: str) -> str:
    """A picture as a `data:` URL."""
    stream = BytesIO()
    picture.save(stream, kind, quality=82)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


class _Canvas:
    """The picture, enlarged if it is small, and a panel to its right."""

    def __init__(self, video: Video, clip: Clip, source: str) -> None:
        self.clip, self.source, self.colour = clip, source, colours(clip)
        self.zoom = max(1, -(-_SMALL // video.width)) if video.width < _SMALL else 1
        self.picture = video.width * self.zoom, video.height * self.zoom
        self.font_size = max(12, min(self.picture[1] // 24, 36))
        self.font = ImageFont.load_default(self.font_size)
        height = max(self.picture[1], 12 * self.font_size)
        width = self.picture[0] + 21 * self.font_size
        self.size = width + width % 2, height + height % 2  # H.264 stores colours for squares of four pixels

    def draw(self, frame: int, picture: Picture) -> Image.Image:
        image = Image.new("RGB", self.size, "#14181f")
        shown = Image.fromarray(picture)
        image.paste(shown.resize(self.picture) if self.zoom > 1 else shown, (0, 0))
        draw = ImageDraw.Draw(image)
        for tid, track in self.clip.tracks.items():
            box = track.during(frame, frame + 1)[0]
            if np.isfinite(box[0]):
                self._frame(draw, (box * self.zoom).tolist(), self.colour[tid], name_of(tid, track))
        draw.rectangle((self.picture[0], 0, *self.size), fill="#14181f")  # labels end at the picture's edge
        self._panel(draw, frame)
        return image

    def _frame(self, draw: ImageDraw.ImageDraw, box: list[float], colour: str, text: str) -> None:
        left, top, right, bottom = box
        draw.rectangle(
            (left, top, max(right, left), max(bottom, top)), outline=colour, width=max(self.font_size // 6, 3)
        )
        length, line = draw.textlength(text, self.font), self.font_size * 1.25
        x = min(max(left, 0), max(self.picture[0] - length - 6, 0))
        y = top - line if top >= line else min(max(top, 0), self.picture[1] - line)
        draw.rectangle((x, y, x + length + 6, y + line), fill=colour)
        draw.text((x + 3, y + line / 2), text, fill="white", font=self.font, anchor="lm")

    def _panel(self, draw: ImageDraw.ImageDraw, frame: int) -> None:
        now = [i for i in self.clip.instances if i.begin <= frame < i.end]
        left, line = float(self.picture[0] + self.font_size), self.font_size * 1.45
        rows = int(self.size[1] / line) - 2
        chosen = foremost(now, self.source)
        seconds = f"{frame / self.clip.fps:.1f} s" if self.clip.fps else f"frame {frame}"
        draw.text((left, line), seconds, fill="#9aa5b5", font=self.font, anchor="lm")
        shown = chosen if len(chosen) <= rows else chosen[: rows - 1]
        for row, i in enumerate(shown, 2):
            self._relation(draw, left, row * line, i)
        if len(shown) < len(chosen):
            y = (len(shown) + 2) * line
            draw.text((left, y), f"and {len(chosen) - len(shown)} more", fill="#9aa5b5", font=self.font, anchor="lm")

    def _relation(self, draw: ImageDraw.ImageDraw, x: float, y: float, i: Instance) -> None:
        sides = [(tid, name_of(tid, self.clip.tracks[tid])) for tid in (i.subject, i.object)]
        words = [(sides[0][1], self.colour[sides[0][0]]), (i.predicate, None), (sides[1][1], self.colour[sides[1][0]])]
        for text, colour in words:
            length = draw.textlength(text, self.font)
            if colour:
                half = self.font_size * 0.62
                draw.rectangle((x, y - half, x + length + 6, y + half), fill=colour)
            draw.text((x + 3, y), text, fill="white", font=self.font, anchor="lm")
            x += length + 12


def _best_frames(clip: Clip, video: Video, most: int) -> dict[int, list[int]]:
    """For each frame the objects whose crop is taken from it: where most of them lies within the picture."""
    longest = sorted(clip.tracks.items(), key=lambda item: -int(np.isfinite(item[1].boxes[:, 0]).sum()))[:most]
    looks: dict[int, list[int]] = {}
    for tid, track in longest:
        low = np.clip(track.boxes, 0, [video.width, video.height] * 2)
        area = np.nan_to_num((low[:, 2:] - low[:, :2]).prod(1))
        looks.setdefault(track.begin + int(area.argmax()), []).append(tid)
    return looks


def _crop(picture: Picture, box: list[float]) -> str:
    height, width, _ = picture.shape
    left, top = min(max(int(box[0]), 0), width - 1), min(max(int(box[1]), 0), height - 1)
    right, bottom = min(max(int(box[2]), left + 1), width), min(max(int(box[3]), top + 1), height)
    image = Image.fromarray(picture[top:bottom, left:right])
    image.thumbnail(_THUMB)
    return as_data(image, "jpeg")
