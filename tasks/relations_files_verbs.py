"""`moezoo relations associate` and `shapes`: predictions as the field reads them, and generated annotations."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    import polars as pl

    from ..datasets.relations_table import Relation


def add_files(verbs: Any) -> None:
    """Add both verbs to the parser of `moezoo relations`."""
    text = "Turn a table of `moezoo predict` into prediction JSON, which the field's evaluators read."
    command = verbs.add_parser("associate", help=text, description=text, allow_abbrev=False)
    command.set_defaults(verb=_associate)
    command.add_argument("table", metavar="TABLE", type=Path, help="Parquet written by `moezoo predict`")
    command.add_argument("output", metavar="JSON", type=Path, help="file to write, VERSION 1.0")
    command.add_argument("--link", type=float, default=0.5, help="overlap that links windows (default: 0.5)")
    command.add_argument("--score", choices=("sum", "mean"), default="sum", help="over windows (default: sum)")
    command.add_argument("--most", type=int, default=200, help="relations of a video (default: 200)")
    text = "Write the annotations of generated clips in VidVRD's form, and the vocabularies."
    command = verbs.add_parser("shapes", help=text, description=text, allow_abbrev=False)
    command.set_defaults(verb=_shapes)
    command.add_argument("folder", metavar="FOLDER", type=Path, help="gets train/, valid/, test/ and two vocabularies")
    for name, default in (("train", 300), ("valid", 40), ("test", 60), ("frames", 90), ("world", 0)):
        command.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")


def associate_table(table: "pl.DataFrame", link: float, score: Any, most: int) -> "dict[str, list[Relation]]":
    """Relations of each video from a table of its windows' triplets, as `RelationsTask.predict_step` gives it.

    Raises:
        UserError: a column is missing, or boxes do not come in fours.
    """
    import numpy as np

    from .relations_association import Tracklet, WindowRelation, associate

    sides = ("subject", "object")
    needed = [
        "video",
        "begin",
        "predicate",
        "score",
        *(f"{s}{part}" for s in sides for part in ("", "_begin", "_boxes")),
    ]
    if missing := [name for name in needed if name not in table.columns]:
        raise UserError(f"no column '{missing[0]}'; expected a table written by `moezoo predict`")
    videos = {}
    for (video,), rows in table.group_by("video", maintain_order=True):
        tracklets: dict[tuple[Any, ...], Tracklet] = {}
        windows: dict[int, list[WindowRelation]] = {}
        for row in rows.iter_rows(named=True):
            ends = []
            for side in sides:
                boxes = row[f"{side}_boxes"]
                if not boxes or len(boxes) % 4:
                    raise UserError(
                        f"video {video}: {side}_boxes has {len(boxes or [])} numbers, expected four a frame"
                    )
                key = (row[f"{side}_begin"], tuple(boxes))
                if key not in tracklets:  # shared, so that overlaps are computed once
                    tracklets[key] = Tracklet(key[0], np.array(boxes, dtype=np.float64).reshape(-1, 4))
                ends.append(tracklets[key])
            triplet = (row["subject"], row["predicate"], row["object"])
            windows.setdefault(row["begin"], []).append(WindowRelation(triplet, row["score"], ends[0], ends[1]))
        videos[str(video)] = associate([windows[begin] for begin in sorted(windows)], link, score, most=most)
    return videos


def _associate(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.link < 1 or arguments.most < 1:
        raise UserError(f"--link {arguments.link}, --most {arguments.most}: expected 0 <= link < 1 and at least 1")
    output = arguments.output.expanduser()
    if not output.parent.is_dir():
        raise UserError(f"{output}: no folder {output.parent}; make it first")
    import polars as pl

    from ..datasets.relations_formats import write_predictions

    path = arguments.table.expanduser()
    try:
        table = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path}: not readable as Parquet ({' '.join(str(error).split())[:200]})") from error
    try:
        videos = associate_table(table, arguments.link, arguments.score, arguments.most)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    write_predictions(output, videos)
    print(f"{sum(map(len, videos.values())):,} relations of {len(videos)} videos written to {output}")


def _shapes(arguments: argparse.Namespace) -> None:
    folder = arguments.folder.expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: there is something already; give a new folder")
    from ..datasets.relations_formats import write_clips
    from ..datasets.relations_sources import SPLITS, open_moving_shapes

    options = {name: getattr(arguments, name) for name in (*SPLITS, "frames", "world")}
    source = open_moving_shapes("visual", **options)
    for split in SPLITS:
        write_clips(folder / split, [scene.clip for scene in source.read(split)])
    for name, words in (("objects", source.objects), ("predicates", source.predicates)):
        (folder / f"{name}.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    print(f"{sum(options[split] for split in SPLITS)} clips written to {folder}")
