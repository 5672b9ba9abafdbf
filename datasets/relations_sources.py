"""Where clips come from: the generator, VidVRD and VidOR folders; each with a fixed vocabulary."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ..errors import UserError
from . import relations_render, relations_shapes
from .relations_formats import annotation_files, read_clips
from .relations_shapes import OBJECTS, PREDICATES, ShapesOptions, make_world, motion, scenes
from .relations_table import Clip
from .relations_windows import WINDOW, Proposal, Scene, cut_tracks, window_begins

SPLITS = ("train", "valid", "test")
MOTION = ("speed_x", "speed_y", "growth_x", "growth_y", "width", "height")
_SURE = 0.9  # of an annotated class in a posterior


@dataclass(frozen=True)
class Source:
    """Clips before they are read.

    Attributes:
        name: on the leaderboard; `-oracle` where annotated tracks stand in for a detector's.
        content: the files whose bytes are the data.
        objects, predicates: the vocabularies, fixed whatever is loaded.
        num_features: of each tracklet.
        frames: of a window that a relation must cover to count.
        add_truth: annotated tracks may join the tracklets of training windows.
        read: a split's scenes.
    """

    name: str
    content: tuple[Path, ...]
    objects: tuple[str, ...]
    predicates: tuple[str, ...]
    num_features: int
    frames: int
    add_truth: bool
    read: Callable[[str], list[Scene]]


def open_moving_shapes(features: str, **options: Any) -> Source:
    """The generator; see `ShapesOptions`."""
    given: dict[str, Any] = asdict(ShapesOptions()) | options
    for name in (*SPLITS, "domains"):
        if not _is_count(given[name]):
            raise UserError(f"data.files.{name}={given[name]!r}: expected a whole number of at least 1")
    if not _is_count(given["frames"]) or given["frames"] < WINDOW:
        raise UserError(f"data.files.frames={given['frames']!r}: expected a whole number from {WINDOW}, a window")
    if given["test_domains"] not in ("seen", "withheld"):
        raise UserError(f"data.files.test_domains={given['test_domains']!r}: expected 'seen' or 'withheld'")
    if not isinstance(given["noise"], int | float) or not given["noise"] >= 0:
        raise UserError(f"data.files.noise={given['noise']!r}: expected 0 or more")
    if not isinstance(given["world"], int) or given["world"] < 0:
        raise UserError(f"data.files.world={given['world']!r}: expected a seed, a whole number from 0")
    chosen = ShapesOptions(**given | {"noise": float(given["noise"])})

    def read(split: str) -> list[Scene]:
        world = make_world(chosen.world, chosen.domains + 1)
        seen = range(chosen.domains)
        withheld = split == "test" and chosen.test_domains == "withheld"
        return scenes(
            world,
            SPLITS.index(split),
            range(getattr(chosen, split)),
            [chosen.domains] if withheld else seen,
            chosen.frames,
            chosen.noise,
            features,
            new_triplets=split == "test",
        )

    width = {
        "visual": relations_shapes.FEATURES,
        "geom": len(OBJECTS) + len(MOTION),
        "pixels": relations_render.FEATURES,
    }
    modules = [relations_shapes, relations_render] if features == "pixels" else [relations_shapes]
    makers = tuple(Path(str(module.__file__)) for module in modules)
    name = "moving_shapes" if features == "visual" else f"moving_shapes-{features}"
    name += "-new-domain" if chosen.test_domains == "withheld" else ""
    return Source(name, makers, OBJECTS, PREDICATES, width[features], 20, True, read)


def open_vidvrd(
    features: str, train: str, test: str, objects: str, predicates: str,
    valid: str | None = None, tracks: str | None = None,
) -> Source:  # fmt: skip
    """ImageNet-VidVRD annotations.

    Args:
        train, test: folders with one JSON a video.
        objects, predicates: vocabularies, a name a line; ids are the lines, whatever is loaded.
        valid: another folder; default: a tenth of the training videos, by name.
        tracks: folder of a detector's or tracker's tracks in the same form, a file a video; without it annotated
            tracks are used, and the data's name says `oracle`.
    """
    return _folders("vidvrd", features, 20, train, test, objects, predicates, valid, tracks)


def open_vidor(
    features: str, train: str, test: str, objects: str, predicates: str,
    valid: str | None = None, tracks: str | None = None,
) -> Source:  # fmt: skip
    """VidOR annotations: `train` is its `training`, `test` its `validation`; arguments as for VidVRD."""
    return _folders("vidor", features, 3, train, test, objects, predicates, valid, tracks)


def read_vocabulary(path: Path | str) -> tuple[str, ...]:
    """Names, a line each, or the leaves of VidOR's taxonomy (a CSV with a column `id`), in the file's order.

    Raises:
        UserError: the file is missing or empty, or a name is there twice.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a vocabulary, a name a line")
    if path.suffix == ".csv":
        try:
            ids = [str(value) for value in pl.read_csv(path)["id"]]
        except (OSError, pl.exceptions.PolarsError) as error:
            raise UserError(f"{path}: expected a CSV with a column 'id' ({' '.join(str(error).split())})") from error
        inner = {name.rpartition(".")[0] for name in ids}
        names = [name.rpartition(".")[2] for name in ids if name not in inner]
    else:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise UserError(f"{path}: empty; expected a name a line")
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise UserError(f"{path}: {twice[0]!r} is there twice; expected each name once")
    return tuple(names)


def _folders(
    name: str, features: str, frames: int, train: str, test: str, objects: str, predicates: str,
    valid: str | None, tracks: str | None,
) -> Source:  # fmt: skip
    if features != "geom":
        raise UserError(
            f"data.features={features}: annotations have no pictures to look at; expected data.features=geom, which "
            f"reads classes and motion"
        )
    vocabulary = read_vocabulary(objects), read_vocabulary(predicates)
    given = {"train": train, "test": test} | ({"valid": valid} if valid else {})
    paths = {split: Path(path).expanduser() for split, path in given.items()}
    files = [file for path in paths.values() for file in annotation_files(path)]
    detected = Path(tracks).expanduser() if tracks else None
    if detected is not None:
        files += annotation_files(detected)
    content = (*files, Path(objects).expanduser(), Path(predicates).expanduser())

    def read(split: str) -> list[Scene]:
        found = read_clips(paths["train" if split == "valid" and "valid" not in paths else split])
        if "valid" not in paths and split != "test":
            if len(found) < 2:
                raise UserError(f"{paths['train']}: one video; expected two or more, or give data.files.valid")
            found = _share(found, split)
        for clip in found:
            _check_words(clip, *vocabulary, paths.get(split, paths["train"]))
        return [_scene(clip, vocabulary[0], _tracks_of(clip, detected)) for clip in found]

    width = len(vocabulary[0]) + len(MOTION)
    oracle = "" if detected else "-oracle"
    return Source(f"{name}{oracle}", content, *vocabulary, width, frames, detected is not None, read)


def _share(clips: Sequence[Clip], split: str) -> list[Clip]:
    """Every tenth video validates, at least one, chosen by its name alone."""
    ranked = sorted(clips, key=lambda clip: hashlib.sha256(clip.name.encode()).digest())
    cut = max(len(clips) // 10, 1)
    names = {clip.name for clip in (ranked[:cut] if split == "valid" else ranked[cut:])}
    return [clip for clip in clips if clip.name in names]


def _check_words(clip: Clip, objects: Sequence[str], predicates: Sequence[str], where: Path) -> None:
    for kind, words, known in (
        ("category", [track.category for track in clip.tracks.values()], objects),
        ("predicate", [i.predicate for i in clip.instances], predicates),
    ):
        strange = sorted(set(words) - set(known))
        if strange:
            raise UserError(
                f"{where}: video {clip.name}: {kind} '{strange[0]}' is not in the vocabulary of {len(known)} names; "
                f"add it to data.files.{'objects' if kind == 'category' else 'predicates'}"
            )


def _tracks_of(clip: Clip, detected: Path | None) -> Clip:
    """The clip whose tracks are used: a detector's where there are such."""
    if detected is None:
        return clip
    for name in (f"{clip.name}.json", f"{clip.name}.json.gz"):
        for file in detected.rglob(name):
            return read_clips(file)[0]
    raise UserError(f"{detected}: no {clip.name}.json here or below; expected the tracks of each video")


def _scene(clip: Clip, objects: Sequence[str], shown: Clip) -> Scene:
    """Tracks cut to windows, described by class and motion."""
    ids = {name: i for i, name in enumerate(objects)}
    whole = {tid: (track.begin, track.boxes) for tid, track in shown.tracks.items()}
    width, height = (float(clip.width or 1), float(clip.height or 1))
    windows = []
    for begin in window_begins(clip.frames):
        some = []
        for tid, (first, boxes) in cut_tracks(whole, begin).items():
            posterior = np.full(len(objects), (1 - _SURE) / len(objects), dtype=np.float32)
            known = ids.get(shown.tracks[tid].category)
            if known is not None:
                posterior[known] += _SURE
            some.append(Proposal(first, boxes, np.concatenate([posterior, motion(boxes, width, height)])))
        windows.append(some)
    return Scene(clip, windows)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


OPENERS: Mapping[str, Callable[..., Source]] = {
    "moving_shapes": open_moving_shapes,
    "vidvrd": open_vidvrd,
    "vidor": open_vidor,
}
