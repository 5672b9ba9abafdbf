"""Who does what to whom in the tracks of one video: a relation model where it knows the classes, else geometry."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ..datasets.relations_shapes import OBJECTS, motion
from ..datasets.relations_table import Clip, Instance
from ..datasets.relations_windows import WINDOW, Labelling, Proposal, RelationBatch, Scene, build, cut_tracks
from ..datasets.relations_windows import window_begins as begins_of
from ..errors import UserError
from ..zoo.base import ZooModel
from .relations_association import candidates, suppress
from .relations_geometry import RULES, geometry_relations

# COCO's word for a class, and VidVRD's.
ALIASES = {
    "boat": "watercraft", "cow": "cattle", "cat": "domestic_cat", "couch": "sofa", "sports ball": "ball",
}  # fmt: skip
_SURE = 0.9  # of a track's class in a posterior, as in training on annotations
_PAIRS = 1 << 14  # that a model is shown at a time


@dataclass(frozen=True)
class Answer:
    """Relations of a video and where they are from.

    Attributes:
        instances: by falling score.
        source: `model`, `geometry`, or `none` where there is no pair of objects.
        note: one sentence that says which and why, for the user.
        gates: mean weight of each expert over the pairs that give the relations, by predicate; empty without a mixture.
    """

    instances: list[Instance]
    source: str
    note: str
    gates: Mapping[str, Sequence[float]] = field(default_factory=dict)


def answer(clip: Clip, model: ZooModel | None, name: str, why: str = "") -> Answer:
    """The relations of a clip's tracks.

    Args:
        clip: size, frame rate and tracks.
        model: trained relation model, or None.
        name: of its weights.
        why: there is no model, for the note.
    """
    if len(clip.tracks) < 2:
        return Answer([], "none", f"{len(clip.tracks)} object in the video: no pair, no relation.")
    if model is not None:
        fits, why = fitness(clip, model, name)
        if fits:
            found, gates = model_relations(clip, model)
            return Answer(found, "model", f"Relations by the model {name}.", gates)
    rules = ", ".join(rule.predicate for rule in RULES)
    note = f"Relations by geometry rules, not by a trained model: {why}. The rules know {rules}."
    return Answer(geometry_relations(clip.tracks, clip.frames, clip.fps), "geometry", note)


def fitness(clip: Clip, model: ZooModel, name: str) -> tuple[bool, str]:
    """Whether a model may speak about a clip, and what is against it.

    It must read classes and motion (`features: geom`), know every class of the tracks, and the clip must fill a window.
    A model of generated shapes is never asked about other things: it knows none of their classes.
    """
    schema = _schema(model)
    if schema is None or "position" not in signature(model.forward).parameters:
        return False, f"{name} is no model of what pairs of tracks look like"
    if schema.get("features") != "geom":
        return False, f"{name} looks at the data's own features ({schema.get('features')}), which a video has not"
    strangers = sorted({track.category for track in clip.tracks.values()} - set(_words(schema)))
    if strangers:
        known = "shapes" if set(schema["objects"]) == set(OBJECTS) else f"{len(schema['objects'])} classes"
        return False, f"{name} knows {known}, not {', '.join(strangers[:3])}{' …' if len(strangers) > 3 else ''}"
    if clip.frames < WINDOW:
        return False, f"the video has {clip.frames} frames, a window of {name} {WINDOW}"
    return True, ""


def model_relations(
    clip: Clip, model: ZooModel, threshold: float = 0.2, most: int = 200
) -> tuple[list[Instance], dict[str, list[float]]]:
    """What a model says of each pair of tracks in each window, joined over windows; see `Answer`.

    Windows that follow one another are joined where the same tracks have the same predicate: the tracks are known, so
    that nothing needs to be linked by overlap. The score is the mean over windows.

    Args:
        threshold: what classes and predicates must exceed.
        most: relations that are returned.
    """
    schema = _schema(model)
    if schema is None:
        raise UserError(f"{type(model).__name__} is no relation model; expected one with objects and predicates")
    scene, tids = _scene(clip, schema)
    width = int(schema["num_features"])
    windows = build([scene], schema["objects"], schema["predicates"], Labelling(), False, width)
    inputs = [name for name in signature(model.forward).parameters if name in RelationBatch._fields]
    names = schema["predicates"]
    held: dict[tuple[int, str, int], list[tuple[int, int, float]]] = {}
    gates: dict[str, list[torch.Tensor]] = {}
    edges = _blocks(windows.count)
    for low, high in edges:
        batch = windows.batch(torch.arange(low, high))
        with torch.inference_mode():
            output = model(**{name: getattr(batch, name) for name in inputs})
        found = candidates(output.subject.float().exp(), output.predicate.float().sigmoid(),
                           output.object.float().exp(), batch.window, threshold, threshold)  # fmt: skip
        weights = next((record.dense_weights() for record in output.routing.values()), None)
        rows = found.pair
        found = suppress(found._replace(pair=batch.pair[rows]), windows)
        for pair, p, score in zip(found.pair.tolist(), found.predicate.tolist(), found.score.tolist(), strict=True):
            s, o = tids[int(windows.subject[pair])], tids[int(windows.object[pair])]
            begin = int(windows.window_begin[windows.pair_window[pair]])
            held.setdefault((s, names[p], o), []).append((begin, begin + WINDOW, score))
            if weights is not None:
                gates.setdefault(names[p], []).append(weights[pair - low])
    instances = [i for key, parts in held.items() for i in _joined(clip, key, parts)]
    usage = {name: torch.stack(rows).float().mean(0).tolist() for name, rows in gates.items()}
    return sorted(instances, key=lambda i: -i.score)[:most], usage


def _schema(model: ZooModel) -> Mapping[str, Any] | None:
    schema = model.init_args.get("schema")
    return schema if isinstance(schema, Mapping) and {"objects", "predicates", "num_features"} <= set(schema) else None


def _words(schema: Mapping[str, Any]) -> dict[str, int]:
    """Index of every class by its name and by COCO's."""
    own = {name: i for i, name in enumerate(schema["objects"])}
    return own | {coco: own[name] for coco, name in ALIASES.items() if name in own and coco not in own}


def _scene(clip: Clip, schema: Mapping[str, Any]) -> tuple[Scene, list[int]]:
    """Tracks cut to windows, described by class and motion; and each tracklet's track."""
    words = _words(schema)
    objects = schema["objects"]
    whole = {tid: (track.begin, track.boxes) for tid, track in clip.tracks.items()}
    windows, tids = [], []
    for begin in begins_of(clip.frames):
        some = []
        for tid, (first, boxes) in cut_tracks(whole, begin).items():
            posterior = np.full(len(objects), (1 - _SURE) / len(objects), dtype=np.float32)
            posterior[words[clip.tracks[tid].category]] += _SURE
            feature = np.concatenate([posterior, motion(boxes, float(clip.width), float(clip.height))])
            some.append(Proposal(first, boxes, feature))
            tids.append(tid)
        windows.append(some)
    nameless = Clip(clip.name, clip.frames, clip.width, clip.height, clip.fps, {}, [])
    return Scene(nameless, windows), tids


def _blocks(count: torch.Tensor) -> list[tuple[int, int]]:
    """Rows of pairs of whole windows, a bounded number at a time."""
    ends = count.cumsum(0).tolist()
    edges = [0]
    for end, after in zip(ends, [*ends[1:], None], strict=True):
        if end > edges[-1] and (after is None or after - edges[-1] > _PAIRS):
            edges.append(end)
    return list(pairwise(edges))


def _joined(clip: Clip, key: tuple[int, str, int], parts: list[tuple[int, int, float]]) -> list[Instance]:
    """Spans of one triplet that touch become one, cut to the frames in which both tracks have a box."""
    best: dict[tuple[int, int], float] = {}
    for begin, end, score in parts:  # a triplet may have several classes; the tracks' own counts
        best[begin, end] = max(score, best.get((begin, end), 0.0))
    runs: list[tuple[int, int, list[float]]] = []
    for (begin, end), score in sorted(best.items()):
        if runs and begin <= runs[-1][1]:
            runs[-1] = (runs[-1][0], end, [*runs[-1][2], score])
        else:
            runs.append((begin, end, [score]))
    s, predicate, o = key
    found = []
    for begin, end, scores in runs:
        both = np.isfinite(np.stack([clip.tracks[tid].during(begin, end)[:, 0] for tid in (s, o)])).all(0)
        frames = np.flatnonzero(both)
        if len(frames) >= 2:
            span = begin + int(frames[0]), begin + int(frames[-1]) + 1
            found.append(Instance(s, predicate, o, *span, float(np.mean(scores))))
    return found
