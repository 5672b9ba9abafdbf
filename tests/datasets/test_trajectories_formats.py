"""The same drive written in every format reads back the same; each mistake of the user is one clear line."""

import numpy as np
import polars as pl
import pytest
from moezoo.datasets.trajectories import TrajectoriesData, open_source
from moezoo.errors import UserError

FOOT = 0.3048


def drive(frames=80, cars=6):
    """Cars at steady speeds; every third drifts to the lane on its left. Columns of our own table."""
    parts = []
    for car in range(cars):
        t = np.arange(frames)
        speed = np.full(frames, 20.0 + car)
        y = -5.4 + 3.6 * np.clip((t - 30) / 30, 0, 1) * (car % 3 == 0)
        lane = np.where(y > -3.6, 1, 2)
        columns = {"vehicle": car + 1, "frame": 5 * car + t + 1, "x": 10.0 + 15 * car + speed * t / 10, "y": y}
        parts.append(pl.DataFrame(columns | {"speed": speed, "lane": lane, "length": 4.5, "width": 1.8}))
    return pl.concat(parts)


def read(source, **files):
    return open_source(source, files).read().frame.sort("scene", "vehicle", "frame")


def same(got, drive, lane=True, atol=1e-6):
    expected = drive.with_columns(pl.col("vehicle").cast(pl.String)).sort("vehicle", "frame")
    got = got.with_columns(x=pl.col("x") - pl.col("x").min(), y=pl.col("y") - pl.col("y").min())
    expected = expected.with_columns(x=pl.col("x") - pl.col("x").min(), y=pl.col("y") - pl.col("y").min())
    assert got["vehicle"].to_list() == expected["vehicle"].to_list()
    assert got["frame"].to_list() == expected["frame"].to_list()
    for ours, theirs in {"x": "x", "y": "y", "vx": "speed"}.items():
        np.testing.assert_allclose(got[ours], expected[theirs], atol=atol)
    if lane:
        assert got["lane"].to_list() == expected["lane"].to_list()


def ngsim(frame):
    number = {"Total_Frames": 80, "Global_X": 0.0, "Global_Y": 0.0, "v_Class": 2, "Preceding": 0, "Following": 0,
              "Space_Headway": 0.0, "Time_Headway": 0.0}  # fmt: skip
    out = frame.select(
        Vehicle_ID="vehicle", Frame_ID="frame", Global_Time=1_118_846_980_200 + 100 * pl.col("frame"),
        Local_X=-pl.col("y") / FOOT, Local_Y=(pl.col("x") + 0.5 * pl.col("length")) / FOOT,
        v_Length=pl.col("length") / FOOT, v_Width=pl.col("width") / FOOT, v_Vel=pl.col("speed") / FOOT, v_Acc=0.0,
        Lane_ID="lane",
    ).with_columns(**{name: pl.lit(value) for name, value in number.items()})  # fmt: skip
    first = ["Vehicle_ID", "Frame_ID", "Total_Frames", "Global_Time", "Local_X", "Local_Y", "Global_X", "Global_Y"]
    then = ["v_Length", "v_Width", "v_Class", "v_Vel", "v_Acc", "Lane_ID", "Preceding", "Following"]
    return out.select(*first, *then, "Space_Headway", "Time_Headway")


def test_ngsim_text_and_csv(tmp_path):
    frame = drive()
    rows = ngsim(frame)
    text = tmp_path / "trajectories.txt"
    text.write_text("".join("  ".join(str(value) for value in row) + " \n" for row in rows.iter_rows()))
    same(read("ngsim", path=str(text)), frame)
    quoted = rows.with_columns(
        Local_Y=pl.col("Local_Y").map_elements(lambda v: f"{v:,.6f}", return_dtype=pl.String), Location=pl.lit("us-101")
    )
    quoted.rename({"Space_Headway": "Space_Hdwy"}).write_csv(tmp_path / "ngsim.csv")
    got = read("ngsim", path=str(tmp_path / "ngsim.csv"))
    same(got, frame, atol=1e-5)
    assert got["recording"].n_unique() == 1 and "us-101" in got["recording"][0]


def test_highd_directions_become_one(tmp_path):
    frame = drive()
    one = frame.select(
        "frame", id="vehicle", x=pl.col("x") - 2.25, y=-pl.col("y") - 0.9, width="length", height="width",
        xVelocity="speed", yVelocity=0.0, xAcceleration=0.0, yAcceleration=0.0, laneId=pl.col("lane") + 5,
    )  # fmt: skip
    turned = frame.select(
        "frame", id=pl.col("vehicle") + 100, x=1000 - pl.col("x") - 2.25, y=pl.col("y") - 0.9, width="length",
        height="width", xVelocity=-pl.col("speed"), yVelocity=0.0, xAcceleration=0.0, yAcceleration=0.0,
        laneId=4 - pl.col("lane"),
    )  # fmt: skip
    pl.concat([one, turned]).write_csv(tmp_path / "01_tracks.csv")
    ids = [*range(1, 7), *range(101, 107)]
    meta = pl.DataFrame({"id": ids, "drivingDirection": [2] * 6 + [1] * 6})
    meta.write_csv(tmp_path / "01_tracksMeta.csv")
    source = open_source("highd", {"path": str(tmp_path)})
    assert source.frame_rate == 25 and TrajectoriesData("highd", {"path": str(tmp_path)}).rate == pytest.approx(25 / 3)
    got = source.read().frame.sort("scene", "vehicle", "frame")
    same(got.filter(pl.col("scene") == "01/2"), frame)
    other = got.filter(pl.col("scene") == "01/1").with_columns((pl.col("vehicle").cast(int) - 100).cast(pl.String))
    same(other, frame)


def test_citysim_in_feet_and_miles(tmp_path):
    frame = drive()
    frame.select(
        frameNum="frame", carId="vehicle", carCenterXft=pl.col("x") / FOOT, carCenterYft=-pl.col("y") / FOOT,
        speed=pl.col("speed") / 0.44704, laneId="lane",
    ).write_csv(tmp_path / "FreewayC-01.csv")  # fmt: skip
    same(read("citysim", path=str(tmp_path)), frame)


def test_sumo_fcd_counts_lanes_from_the_right(tmp_path):
    frame = drive()
    frame.select(
        timestep_time=pl.col("frame") / 10, vehicle_id="vehicle", vehicle_x=pl.col("x") + 2.5, vehicle_y="y",
        vehicle_speed="speed", vehicle_lane=pl.format("road_{}", 2 - pl.col("lane")),
    ).write_parquet(tmp_path / "fcd.parquet")  # fmt: skip
    same(read("sumo_fcd", path=str(tmp_path / "fcd.parquet")), frame)


def test_argoverse_turns_each_track_into_its_heading(tmp_path):
    frame, turn = drive(), 0.7
    frame.select(
        track_id=pl.col("vehicle").cast(pl.String), timestep="frame", heading=pl.lit(turn),
        object_type=pl.lit("vehicle"),
        position_x=pl.col("x") * np.cos(turn) - pl.col("y") * np.sin(turn),
        position_y=pl.col("x") * np.sin(turn) + pl.col("y") * np.cos(turn),
        velocity_x=pl.col("speed") * np.cos(turn), velocity_y=pl.col("speed") * np.sin(turn),
    ).write_parquet(tmp_path / "scenario_1.parquet")  # fmt: skip
    got = read("argoverse", path=str(tmp_path))
    same(got, frame, lane=False)
    assert got["lane"].is_null().all()


def commonroad(frame):
    def exact(name, value):
        return f"<{name}><exact>{value}</exact></{name}>"

    def state(tag, row):
        point = f"<position><point><x>{row['x']}</x><y>{row['y']}</y></point></position>"
        rest = exact("orientation", 0.0) + exact("velocity", row["speed"]) + exact("time", row["frame"])
        return f"<{tag}>{point}{rest}</{tag}>"

    def bound(side, y):
        points = "".join(f"<point><x>{x}</x><y>{y}</y></point>" for x in (0, 500))
        return f"<{side}Bound>{points}</{side}Bound>"

    lanelets = (
        f'<lanelet id="1">{bound("left", 0)}{bound("right", -3.6)}<adjacentRight ref="2" drivingDir="same"/></lanelet>'
        f'<lanelet id="2">{bound("left", -3.6)}{bound("right", -7.2)}'
        f'<adjacentLeft ref="1" drivingDir="same"/></lanelet>'
    )
    cars = []
    for (car,), own in frame.group_by("vehicle", maintain_order=True):
        states = [state("initialState" if i == 0 else "state", row) for i, row in enumerate(own.iter_rows(named=True))]
        shape = "<shape><rectangle><length>4.5</length><width>1.8</width></rectangle></shape>"
        path = f"{states[0]}<trajectory>{''.join(states[1:])}</trajectory>"
        cars.append(f'<dynamicObstacle id="{car}">{shape}{path}</dynamicObstacle>')
    return f'<commonRoad timeStepSize="0.1" benchmarkID="USA_X-1">{lanelets}{"".join(cars)}</commonRoad>'


def test_commonroad_with_lanelets_and_without_entities(tmp_path):
    frame, file = drive(), tmp_path / "USA_X-1.xml"
    file.write_text(commonroad(frame))
    got = read("commonroad", path=str(file))
    same(got, frame)
    np.testing.assert_allclose(got["lateral"], got["y"] - (0.5 - got["lane"]) * 3.6, atol=1e-9)
    file.write_text('<!DOCTYPE a [<!ENTITY b "c">]>' + commonroad(frame))
    with pytest.raises(UserError, match="has a DTD"):
        read("commonroad", path=str(file))


MISTAKES = {
    "missing column": (lambda f: f.drop("y"), "column 'y' is missing"),
    "other name": (lambda f: f.rename({"x": "pos"}), r"it has vehicle, .* --data.files.columns '\{x: YOURS\}'"),
    "not a number": (lambda f: f.with_columns(x=pl.lit("far")), "column 'x', row 1: 'far'; expected a number"),
    "NaN": (lambda f: f.with_columns(y=pl.when(pl.int_range(pl.len()) == 6).then(np.nan).otherwise("y")),
            "row 7, column 'y': nan; expected a finite number"),
    "unsorted": (lambda f: f.reverse(), "row 2, column 'frame': vehicle 6 goes back to frame 104"),
    "duplicated": (lambda f: pl.concat([f[:5], f[4:]]), "row 6, column 'frame': vehicle 1 has frame 5 twice"),
    "twice": (lambda f: pl.concat([f, f]), "vehicle 1 has frame 1 twice; .* is the recording column missing"),
    "gap": (lambda f: pl.concat([f[:20], f[23:]]), "row 21, column 'frame': vehicle 1 jumps from frame 20 to 24"),
    "feet": (lambda f: f.with_columns(x=pl.col("x") / FOOT, y=pl.col("y") / FOOT), "vehicle 6 moves at 82 m/s"),
    "km/h": (lambda f: f.with_columns(speed=pl.col("speed") * 3.6), "column 'speed'.* expected"),
    "long cars": (lambda f: f.with_columns(length=pl.col("length") / FOOT), "are the lengths in feet"),
    "one vehicle": (lambda f: f.filter(pl.col("vehicle") == 3), "one vehicle alone"),
    "short": (lambda f: f.filter(pl.col("frame") < 30), "the longest track has 29 frames .* at least 61"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, name):
    change, message = MISTAKES[name]
    file = tmp_path / "mine.csv"
    change(drive()).write_csv(file)
    data = TrajectoriesData("table", {"path": str(file), "frame_rate": 10.0}, split="vehicle")
    with pytest.raises(UserError, match=message) as caught:
        data.setup("fit")
    assert "\n" not in str(caught.value) and "mine" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.csv"]


def test_ways_out_that_messages_name(tmp_path):
    frame = drive(160)
    holes = frame.filter(~((pl.col("vehicle") == 1) & (pl.col("frame") == 70))).reverse()
    holes.write_csv(tmp_path / "mine.csv")
    files = {"path": str(tmp_path / "mine.csv"), "frame_rate": 10.0}
    data = TrajectoriesData("table", files, split="vehicle", gaps="split", unsorted="sort")
    data.setup("fit")
    assert data.tracks.track.unique().numel() == 7
    with pytest.raises(UserError, match="no such file"):
        TrajectoriesData("ngsim", {"path": str(tmp_path / "absent.txt")}).schema  # noqa: B018
    with pytest.raises(UserError, match=r"data\.files\.path: source 'ngsim' needs it"):
        TrajectoriesData("ngsim").schema  # noqa: B018
