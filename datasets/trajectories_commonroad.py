"""CommonRoad scenarios (XML): boxes in metres, lanes from the lanelets they are on."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import polars as pl

from ..errors import UserError
from .trajectories_formats import files_at, stacked
from .trajectories_table import Source, TrackTable


def open_commonroad(path: str) -> Source:
    """Dynamic obstacles of scenarios of one road along x; vehicle ids mean the same in all files of a location.

    Args:
        path: an XML file, or a folder of them.
    """
    files = files_at(path, (".xml",))
    steps = {float(_root(file).get("timeStepSize", "nan")) for file in files}
    step = steps.pop()
    if steps or not step > 0:
        raise UserError(f"{path}: timeStepSize {step:g} and others; expected one positive step in all files")
    rate = 1 / step

    def read() -> TrackTable:
        return TrackTable(stacked([_read(file) for file in files]), rate)

    return Source(Path(path).stem, tuple(files), rate, read, split="vehicle")


def _root(file: Path) -> ElementTree.Element:
    """The document's root; declarations of types and entities are refused, since they can blow up memory."""
    data = file.read_bytes()
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data or data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{file}: has a DTD or is no UTF-8; expected plain XML of CommonRoad; remove the declaration")
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise UserError(f"{file}: no XML ({error}); expected a CommonRoad scenario") from error
    if root.tag != "commonRoad":
        raise UserError(f"{file}: root is <{root.tag}>; expected <commonRoad>")
    return root


def _number(node: ElementTree.Element | None, what: str, file: Path, car: str) -> float:
    """The exact value, or the middle of an interval."""
    if node is None:
        raise UserError(f"{file}: dynamicObstacle {car}: no {what}; expected one in every state")
    texts = [part.text for part in node.iter() if part.tag in ("exact", "intervalStart", "intervalEnd")]
    texts = texts or [node.text]
    try:
        return float(np.mean([float(text or "") for text in texts]))
    except ValueError:
        raise UserError(f"{file}: dynamicObstacle {car}: {what} is {texts[0]!r}; expected a number") from None


def _read(file: Path) -> pl.DataFrame:
    root = _root(file)
    place = root.get("benchmarkID", file.stem).split("-")[0]
    rows = []
    for obstacle in [*root.iter("dynamicObstacle"), *root.iter("obstacle")]:
        car = obstacle.get("id", "?")
        box = obstacle.find("shape/rectangle")
        sizes = [None if box is None else _number(box.find(name), name, file, car) for name in ("length", "width")]
        for state in [*obstacle.findall("initialState"), *obstacle.findall("trajectory/state")]:
            values = [
                _number(state.find(path), path, file, car)
                for path in ("time", "position/point/x", "position/point/y", "orientation", "velocity")
            ]
            rows.append((car, *values, *sizes))
    if not rows:
        raise UserError(f"{file}: no dynamicObstacle with states; expected moving vehicles")
    columns = ("vehicle", "frame", "x", "y", "turn", "speed", "length", "width")
    frame = pl.DataFrame(rows, schema=dict(zip(columns, [pl.String] + [pl.Float64] * 7, strict=True)), orient="row")
    lane, lateral = _lanes(root, frame["x"].to_numpy(), frame["y"].to_numpy(), file)
    return frame.select(
        "vehicle", "x", "y", "length", "width",
        recording=pl.lit(place), scene=pl.lit(file.stem), frame=pl.col("frame").round().cast(pl.Int64),
        vx=pl.col("speed") * pl.col("turn").cos(), vy=pl.col("speed") * pl.col("turn").sin(),
        lane=pl.Series(lane, dtype=pl.Int32).set(pl.Series(lane == 0), None),
        lateral=pl.Series(lateral).fill_nan(None),
    ).with_row_index("row", 1).with_columns(file=pl.lit(str(file)))  # fmt: skip


def _lanes(root: ElementTree.Element, x: np.ndarray, y: np.ndarray, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Lane of each place, from 1 on the left, 0 outside; and the offset from its middle."""
    lane, lateral = np.zeros(len(x), np.int64), np.full(len(x), np.nan)
    lanelets = {item.get("id"): item for item in root.iter("lanelet")}
    for item in lanelets.values():
        bounds = []
        for side in ("leftBound", "rightBound"):
            points = [(float(p.findtext("x", "nan")), float(p.findtext("y", "nan"))) for p in item.iter("point")
                      if p in list(item.find(side) or [])]  # fmt: skip
            if len(points) < 2 or not np.isfinite(points).all():
                raise UserError(f"{file}: lanelet {item.get('id')}: {side} has no line of finite points")
            bounds.append(np.array(points))
        number, other, seen = 1, item, {item.get("id")}
        while (next_one := other.find("adjacentLeft")) is not None and next_one.get("drivingDir", "same") == "same":
            if next_one.get("ref") not in lanelets or next_one.get("ref") in seen:
                break
            other, number = lanelets[next_one.get("ref")], number + 1
            seen.add(other.get("id"))
        left, right = (np.interp(x, *line[np.argsort(line[:, 0])].T) for line in bounds)
        first, last = max(line[:, 0].min() for line in bounds), min(line[:, 0].max() for line in bounds)
        inside = (x >= first) & (x <= last) & (y <= left) & (y > right)
        lane[inside] = number
        lateral[inside] = (y - 0.5 * (left + right))[inside]
    return lane, lateral
