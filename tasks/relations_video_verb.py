"""The words of `moezoo relations video`; nothing heavy is imported before it runs."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError

_DETECTORS = (
    "ssdlite320_mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn_v2",
)
_EPILOG = """examples:
  moezoo relations video clip.mp4
  moezoo relations video clip.mp4 --tracks tracks.txt --output clip-relations
  moezoo relations video clip.mp4 --tracks tracks.json --weights runs/relations/moevrd_geom/s0/weights"""


def add_video(verbs: Any) -> None:
    """Register the verb among argparse's subparsers."""
    text = "Who does what to whom in a clip of your own: relations as JSON, Parquet and CSV, an overlay and a page."
    command = verbs.add_parser(
        "video",
        help=text,
        description=text,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(verb=_video)
    command.add_argument("clip", type=Path, metavar="CLIP", help="any file that FFmpeg plays, e.g. mp4")
    command.add_argument("--output", type=Path, metavar="DIR", help="folder to make (default: <clip>-relations)")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    command.add_argument("--fps", type=float, metavar="N", help="make this constant rate of a variable one")
    tracks = command.add_argument_group("objects")
    tracks.add_argument("--tracks", type=Path, metavar="FILE", help="MOTChallenge text (all ids -1: detections, which "
                        "are tracked) or VidVRD JSON, instead of a detector")  # fmt: skip
    tracks.add_argument("--category", default="person", help="of MOTChallenge rows without a class (default: person)")
    tracks.add_argument("--detector", choices=_DETECTORS, default=_DETECTORS[1], metavar="NAME",
                        help=f"of torchvision: {', '.join(_DETECTORS)} (default: {_DETECTORS[1]})")  # fmt: skip
    tracks.add_argument("--detector-weights", metavar="FILE|DIR|URL", help="torchvision's .pth, or safetensors "
                        "(default: cache, else $MOEZOO_WEIGHTS/detectors/, else torchvision's address)")  # fmt: skip
    tracks.add_argument("--every", type=int, default=3, metavar="N", help="the detector looks at every N-th frame "
                        "(default: 3)")  # fmt: skip
    tracks.add_argument("--threshold", type=float, default=0.5, metavar="P", help="score from which a detection begins "
                        "a track (default: 0.5)")  # fmt: skip
    relations = command.add_argument_group("relations")
    relations.add_argument("--weights", metavar="NAME|DIR|none", help="relation model; geometry rules answer where it "
                           "does not know the classes, and with none (default: a shipped one that fits)")  # fmt: skip


def _video(arguments: argparse.Namespace) -> None:
    from .relations_video import Request, run

    values = {key: value for key, value in vars(arguments).items() if key != "verb"}
    values["clip"] = arguments.clip.expanduser()
    if not values["clip"].is_file():
        raise UserError(f"{values['clip']}: no such file; expected a video")
    values["output"] = (arguments.output or Path(f"{arguments.clip.stem}-relations")).expanduser()
    outcome = run(Request(**values))
    clip, answer = outcome.clip, outcome.answer
    print(answer.note, file=sys.stderr)
    print(
        f"{clip.frames} frames, {len(clip.tracks)} objects, {len(answer.instances)} relations: "
        f"{outcome.output / 'report.html'}"
    )
