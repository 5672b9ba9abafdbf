"""Who answers for a video's relations, and that a model's answer is the model's."""

import numpy as np
import polars as pl
import pytest
import torch
from moezoo.cli import main
from moezoo.datasets.relations import RelationsData
from moezoo.datasets.relations_formats import write_clips
from moezoo.datasets.relations_table import Clip, Track, as_set
from moezoo.tasks.relations import class_loss, predicate_loss
from moezoo.tasks.relations_answers import answer, fitness, model_relations
from moezoo.tasks.relations_eval import evaluate
from moezoo.zoo.moevrd import Labels, MoEVRD


@pytest.fixture(scope="module")
def data():
    return RelationsData(features="geom", files={"train": 60, "valid": 1, "test": 8, "frames": 60, "noise": 0.1})


@pytest.fixture(scope="module")
def model(data):
    """A mixture trained for some seconds."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MoEVRD(schema=data.schema, hidden=24, experts=4, top_k=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(9):
            for batch in data.train_dataloader():
                labels = Labels(batch.subject_class, batch.object_class, batch.predicate)
                output = model(batch.subject, batch.object, batch.position, labels=labels)
                loss = class_loss(output.subject, labels.subject, 2.0) + class_loss(output.object, labels.object, 2.0)
                loss = loss + predicate_loss(output.predicate, labels.predicate, 2.0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval()


def bare(clip, category=None):
    """The clip's tracks alone."""
    tracks = {k: t._replace(category=category or t.category) for k, t in clip.tracks.items()}
    return Clip(clip.name, clip.frames, clip.width, clip.height, clip.fps, tracks, [])


def with_instances(clip, instances):
    return Clip(clip.name, clip.frames, clip.width, clip.height, clip.fps, clip.tracks, instances)


def test_a_model_that_knows_the_classes_answers(data, model):
    found = []
    for clip in data.clips("test"):
        given = answer(bare(clip), model, "relations/some")
        assert (given.source, given.note) == ("model", "Relations by the model relations/some.")
        assert given.instances == sorted(given.instances, key=lambda i: -i.score)
        used = {i.predicate for i in given.instances}
        assert used <= set(given.gates)
        for weights in given.gates.values():
            assert len(weights) == 4
            assert sum(weights) == pytest.approx(1, abs=1e-5)
        found.append(with_instances(clip, given.instances))
    scores = evaluate(data.truth("test"), as_set(found))
    assert scores.metrics["map"] > 0.4  # 0.67 when trained a little longer; chance is below 0.1
    assert {"chase", "ride", "past"} & {i.predicate for clip in found for i in clip.instances}  # no rule has these


def test_what_it_says_of_a_pair_is_what_the_model_says(data, model):
    """One window, one pair at a time: the same predicates with the same scores."""
    clip = data.clips("test")[0]
    short = Clip(clip.name, 30, clip.width, clip.height, clip.fps, {
        k: Track(t.category, 0, t.boxes[:30]) for k, t in clip.tracks.items()
    }, [])  # fmt: skip
    together, _ = model_relations(short, model)
    one_by_one = []
    for s in short.tracks:
        for o in short.tracks:
            if s < o:
                two = Clip(short.name, 30, short.width, short.height, short.fps,
                           {k: short.tracks[k] for k in (s, o)}, [])  # fmt: skip
                one_by_one += model_relations(two, model)[0]
    key = {(i.subject, i.predicate, i.object): i.score for i in together}
    assert key
    assert {(i.subject, i.predicate, i.object) for i in one_by_one} == set(key)
    for i in one_by_one:
        assert i.score == pytest.approx(key[i.subject, i.predicate, i.object], abs=1e-5)
        assert (i.begin, i.end) == (0, 30)


def test_a_model_of_shapes_is_never_asked_about_people(data, model):
    clip = bare(data.clips("test")[0], "person")
    given = answer(clip, model, "relations/moevrd_geom")
    assert given.source == "geometry"
    assert "not by a trained model: relations/moevrd_geom knows shapes, not person" in given.note


def test_what_is_against_a_model(data, model):
    clip = bare(data.clips("test")[0])
    assert fitness(clip, model, "m") == (True, "")
    visual = MoEVRD(schema=dict(data.schema, features="visual"))
    assert fitness(clip, visual, "m")[0] is False
    short = Clip("x", 29, 240, 180, 30.0, clip.tracks, [])
    assert fitness(short, model, "m") == (False, "the video has 29 frames, a window of m 30")
    coco = MoEVRD(schema=dict(data.schema, objects=["watercraft", "person"], num_features=8))
    boat = bare(data.clips("test")[0], "boat")
    assert fitness(boat, coco, "m") == (True, "")  # COCO's word for it
    assert "knows 2 classes, not cat" in fitness(bare(data.clips("test")[0], "cat"), coco, "m")[1]


def test_a_relation_spans_the_frames_in_which_both_are_in_view(data, model):
    clip = data.clips("test")[0]
    tracks = dict(clip.tracks)
    first = next(iter(tracks))
    tracks[first] = Track(tracks[first].category, 20, tracks[first].boxes[20:50])
    found, _ = model_relations(Clip("x", 60, clip.width, clip.height, clip.fps, tracks, []), model)
    mine = [i for i in found if first in (i.subject, i.object)]
    assert mine
    assert all(20 <= i.begin < i.end <= 50 for i in mine)


def test_the_command_asks_the_users_weights(data, model, tmp_path, capsys):
    pytest.importorskip("av", reason="pip install 'moezoo[relations]'", exc_type=ImportError)
    from moezoo.datasets.relations_render import render
    from moezoo.datasets.relations_video import Writer

    clip = data.clips("test")[1]
    model.save_pretrained(tmp_path / "weights")
    write_clips(tmp_path / "tracks", [bare(clip)])
    with Writer(tmp_path / "clip.mp4", clip.width, clip.height, clip.fps) as writer:
        for picture in render(clip, 0, np.random.default_rng(0)):
            writer.add(picture)
    words = ["relations", "video", str(tmp_path / "clip.mp4"), "--output", str(tmp_path / "out"),
             "--tracks", str(tmp_path / "tracks" / f"{clip.name}.json")]  # fmt: skip
    assert main([*words, "--weights", str(tmp_path / "weights")]) == 0
    table = pl.read_parquet(tmp_path / "out" / "relations.parquet")
    assert set(table["source"]) == {"model"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'data-source="model"' in page
    assert "mean weight of experts" in page
