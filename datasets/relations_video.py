"""The user's own video: decoded with PyAV, checked first, its frames at a constant rate."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from ..errors import UserError
from .relations_progress import progress

Picture = UInt8[np.ndarray, "height width 3"]

_TOLERANCE = 1.0  # frames that a frame may lie from where a constant rate puts it
_CUT_OFF = 0.9  # of the length that the file claims
_RATES = (24000 / 1001, 24, 25, 30000 / 1001, 30, 48, 50, 60000 / 1001, 60)


@dataclass(frozen=True)
class Video:
    """A clip that decodes from start to end.

    Attributes:
        width, height: pixels, as shown: turned as the file asks for.
        fps: frames a second, constant.
        source: of each frame the frame of the file that it shows; 0, 1, 2, ... but where the rate was changed.
        stored: frames of the file.
    """

    path: Path
    width: int
    height: int
    fps: float
    source: Int64[np.ndarray, " frames"]
    stored: int

    def __len__(self) -> int:
        return len(self.source)

    def pictures(self, every: int = 1) -> Iterator[tuple[int, Picture]]:
        """Frame number and RGB picture of every so many frames, in order, decoded one at a time.

        Raises:
            UserError: the file changed since it was checked.
        """
        wanted = np.arange(0, len(self), every)
        at = 0
        for number, frame in enumerate(_decoded(self.path)):
            if at == len(wanted):
                return
            if self.source[wanted[at]] != number:
                continue
            picture = _picture(frame, self.width, self.height)
            while at < len(wanted) and self.source[wanted[at]] == number:
                yield int(wanted[at]), picture
                at += 1
        if at < len(wanted):
            raise UserError(f"{self.path}: ended at frame {at} of {len(wanted)}; was it changed meanwhile?")


def open_video(path: Path | str, fps: float | None = None) -> Video:
    """Decode the file once and see that it is whole.

    Args:
        fps: show the frames at this constant rate, repeating and leaving out where needed.

    Raises:
        UserError: no such file; no video, or sound alone; without frames; damaged or cut off; with frames that come
            at a variable rate, unless `fps` is given. PyAV missing.
    """
    path = Path(path).expanduser()
    if fps is not None and not 0.1 <= fps <= 1000:
        raise UserError(f"--fps {fps:g}: expected frames a second, from 0.1 to 1000")
    times, damaged, first, end = list[float | None](), 0, None, 0.0
    for frame in progress(_decoded(path), None, "checking the video"):
        first = first or frame
        times.append(frame.time)
        damaged += bool(frame.is_corrupt)
        end = float((frame.duration or 0) * (frame.time_base or 0)) + (frame.time or 0.0)
    if first is None:
        raise UserError(f"{path}: a video without a frame; expected one that plays")
    if damaged:
        raise UserError(f"{path}: {damaged} of {len(times)} frames are damaged; get the file anew or re-encode it")
    seconds, claimed = _seconds(path, times)
    lasts = max(end - (times[0] or 0.0), seconds[-1])
    if claimed and lasts < _CUT_OFF * claimed:
        raise UserError(
            f"{path}: cut off: it says {claimed:.1f} s, its {len(times)} frames end after {lasts:.1f} s; get it anew"
        )
    rate = _rate(seconds, path) if fps is None else fps
    width, height = (first.height, first.width) if _turns(first) % 2 else (first.width, first.height)
    source = np.arange(len(times)) if fps is None else _resampled(seconds, fps)
    return Video(path, width, height, rate, source, len(times))


def write_video(path: Path, width: int, height: int, fps: float) -> "Writer":
    """An H.264 mp4 file to which RGB pictures of even width and height are added; use it in a `with`."""
    return Writer(path, width, height, fps)


class Writer:
    """See `write_video`."""

    def __init__(self, path: Path, width: int, height: int, fps: float) -> None:
        av = _library()
        from fractions import Fraction

        self._file = av.open(str(path), "w", options={"movflags": "faststart"})
        self._stream = self._file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": "23", "preset": "veryfast"}
        self._frame = av.VideoFrame

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *failed: object) -> None:
        if failed[0] is None:
            self._file.mux(self._stream.encode())
        self._file.close()

    def add(self, picture: Picture) -> None:
        """The next frame."""
        self._file.mux(self._stream.encode(self._frame.from_ndarray(picture, format="rgb24")))


def _library() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError(f"videos need PyAV ({error}); pip install 'moezoo[relations]'") from error
    av.logging.set_level(av.logging.PANIC)  # what is wrong is said once, by us
    return av


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream; whatever FFmpeg has against the file becomes one line."""
    av = _library()
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a video" if not path.exists() else f"{path}: no file")
    if not path.stat().st_size:
        raise UserError(f"{path}: an empty file of 0 bytes; expected a video")
    try:
        with av.open(str(path)) as container:
            cover = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & cover]
            if not streams:
                kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
                what = "sound alone" if container.streams.audio else f"no video in it ({kinds})"
                raise UserError(f"{path}: {what}; expected a file with a video stream")
            streams[0].thread_type = "AUTO"
            yield container, streams[0]
    except av.error.FFmpegError as error:
        raise UserError(f"{path}: damaged or no video ({error.strerror}); expected a file that plays") from error


def _decoded(path: Path) -> Iterator[Any]:
    with _opened(path) as (container, stream):
        yield from container.decode(stream)


def _seconds(path: Path, times: list[float | None]) -> tuple[Float64[np.ndarray, " frames"], float]:
    """When each frame is shown, from the first one's 0, and how long the file says the video is, 0 if it does not."""
    with _opened(path) as (_, stream):
        claimed = float(stream.duration * stream.time_base) if stream.duration else 0.0
        guess = float(stream.guessed_rate or stream.average_rate or 25)
    if any(time is None for time in times):  # a bare stream has no clock
        return np.arange(len(times)) / guess, 0.0
    seconds = np.array(times, dtype=np.float64)
    if (np.diff(seconds) <= 0).any():
        raise UserError(f"{path}: its frames run backwards in time; re-encode it")
    return seconds - seconds[0], claimed


def _rate(seconds: Float64[np.ndarray, " frames"], path: Path) -> float:
    """Frames a second, if that is constant."""
    if len(seconds) < 2:
        return 25.0
    step = float(seconds[-1] / (len(seconds) - 1))
    off = np.abs(seconds / step - np.arange(len(seconds))).max()
    if off > _TOLERANCE:
        gaps = np.diff(seconds) * 1000
        usual = _usual(1000 / float(np.median(gaps)), within=0.03)
        raise UserError(
            f"{path}: variable frame rate: frames come every {gaps.min():.0f} to {gaps.max():.0f} ms; expected a "
            f"constant rate: give --fps {usual:g} to have one made"
        )
    return _usual(1 / step)


def _usual(rate: float, within: float = 1e-3) -> float:
    """The rate of the trade nearest by, if it is as near as that: clocks of files are coarse."""
    near = min(_RATES, key=lambda known: abs(math.log(known / rate)))
    return float(near) if abs(near / rate - 1) < within else round(rate, 3)


def _resampled(seconds: Float64[np.ndarray, " stored"], fps: float) -> Int64[np.ndarray, " frames"]:
    """The stored frame on show at each tick of a clock that starts with the first frame."""
    last = seconds[-1] + (float(np.median(np.diff(seconds))) if len(seconds) > 1 else 0.0)
    ticks = np.arange(max(round(last * fps), 1)) / fps
    return np.searchsorted(seconds, ticks + 1e-6, "right") - 1


def _turns(frame: Any) -> int:
    """Quarter turns counter-clockwise that the file asks for."""
    return round(float(frame.rotation) / 90) % 4


def _picture(frame: Any, width: int, height: int) -> Picture:
    turns = _turns(frame)
    if turns % 2:
        width, height = height, width
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24", width=width, height=height), turns))
