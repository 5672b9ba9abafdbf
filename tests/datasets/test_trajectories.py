"""Windows, splits and simulated worlds: the spec's counts, no leak from later frames, the same seed the same bytes."""

import importlib.util

import numpy as np
import polars as pl
import pytest
import torch
from moezoo.datasets import trajectories_numpy, trajectories_sumo
from moezoo.datasets.trajectories import TrajectoriesData
from moezoo.errors import UserError
from moezoo.settings import real_data_dir
from moezoo.zoo.baselines.trajectories import ConstantVelocity

RATE = 10.0


def tracks(vehicles=20, frames=90, seed=0):
    """Cars on three lanes, some of which change lanes half-way."""
    rng = np.random.default_rng(seed)
    parts = []
    for car in range(vehicles):
        start, t = 12 * car, np.arange(frames)
        speed = 20 + rng.standard_normal() + np.sin(t / 15)
        x = np.cumsum(speed) / RATE
        lane = np.full(frames, 2)
        lane[frames // 2 :] += [0, -1, 1][car % 3]
        y = -3.5 * np.convolve(np.pad(lane, 10, mode="edge"), np.ones(21) / 21, "valid") + 0.05 * rng.standard_normal()
        parts.append(pl.DataFrame({"vehicle": car, "frame": start + t, "x": x, "y": y, "speed": speed, "lane": lane}))
    return pl.concat(parts)


def data_of(tmp_path, frame, name="tracks.csv", **arguments):
    file = tmp_path / name
    frame.write_parquet(file) if name.endswith("parquet") else frame.write_csv(file)
    return TrajectoriesData("table", {"path": str(file), "frame_rate": RATE}, **({"split": "vehicle"} | arguments))


def all_windows(data, split):
    data.setup("fit")
    return data.tracks.batch(data.rows[split], data.schema["history"], data.schema["horizon"])


def test_windows_equal_a_plain_loop(tmp_path):
    frame = tracks()
    data = data_of(tmp_path, frame, debounce=0.0)
    batch = all_windows(data, "train")
    raw = batch.history * data.tracks.scale + data.tracks.mean
    seen = 0
    for car in sorted(range(14), key=str):  # 70 % of 20; tracks go by the id's text
        own = frame.filter(pl.col("vehicle") == car)
        x, y, lane, speed = (own[name].to_numpy() for name in ("x", "y", "lane", "speed"))
        for t in range(30, len(own) - 30, 5):
            b = seen
            seen += 1
            past, ahead = slice(t - 30, t + 1), slice(t + 1, t + 31)
            assert batch.frame[b] == own["frame"][t] and (batch.track[b] == batch.track[seen - 1])
            np.testing.assert_allclose(raw[b, :, 0], x[past] - x[t], atol=2e-3)
            np.testing.assert_allclose(raw[b, :, 1], y[past] - y[t], atol=2e-3)
            np.testing.assert_allclose(raw[b, :, 2], speed[past], atol=2e-3)
            np.testing.assert_allclose(batch.future[b, :, 0], x[ahead] - x[t], atol=2e-3)
            np.testing.assert_allclose(batch.future[b, :, 1], y[ahead] - y[t], atol=2e-3)
            assert batch.velocity[b, 0].item() == pytest.approx(speed[t], rel=1e-5)
            assert batch.velocity[b, 1].item() == pytest.approx((y[t] - y[t - 1]) * RATE, abs=1e-4)
            later = np.flatnonzero(lane[ahead] != lane[t])
            if len(later):
                assert batch.intention[b] == (1 if lane[ahead][later[0]] < lane[t] else 2)
                assert batch.crossing[b].item() == pytest.approx((later[0] + 1) / RATE)
            else:
                assert batch.intention[b] == 0 and batch.crossing[b].isnan()
    assert seen == len(batch.frame)
    assert torch.allclose(batch.history.mean((0, 1)), torch.zeros(20), atol=1e-3)


def test_neighbours_equal_a_plain_loop(tmp_path):
    frame = tracks()
    data = data_of(tmp_path, frame)
    batch = all_windows(data, "train")
    now = (batch.history * data.tracks.scale + data.tracks.mean)[:, -1]
    names = data.schema["features"]
    met = 0
    for b in range(0, len(now), 3):
        t, car = batch.frame[b].item(), batch.track[b].item()
        rows = frame.filter(pl.col("frame") == t)
        own = frame.filter((pl.col("frame") == t) & (pl.col("vehicle") == sorted(range(20), key=str)[car]))
        for side, step in (("", 0), ("left_", -1), ("right_", 1)):
            lane = rows.filter(pl.col("lane") == own["lane"][0] + step)
            ahead = lane.filter(pl.col("x") > own["x"][0]).sort("x").head(1)
            gap, speed = 100.0, 0.0
            if len(ahead) and ahead["x"][0] - own["x"][0] <= 100:
                gap = max(ahead["x"][0] - own["x"][0] - 4.6, 0)
                speed, met = ahead["speed"][0] - own["speed"][0], met + 1
            assert now[b, names.index(f"{side}lead_gap")].item() == pytest.approx(gap, abs=0.01)
            assert now[b, names.index(f"{side}lead_speed")].item() == pytest.approx(speed, abs=0.01)
    assert met > 10


def test_later_frames_leave_the_history_bit_equal(tmp_path):
    """What comes after t changes nothing of what a model sees at t."""
    frame = tracks()
    cut = 150
    rng = np.random.default_rng(1)
    noise = pl.Series(rng.standard_normal(len(frame)))
    late = pl.col("frame") > cut
    other = frame.with_columns(
        x=pl.when(late).then(pl.col("x") + 0.3 * noise).otherwise("x"),
        y=pl.when(late).then(pl.col("y") + noise).otherwise("y"),
        speed=pl.when(late).then(pl.col("speed") + noise).otherwise("speed"),
        lane=pl.when(late).then(pl.lit(2)).otherwise("lane"),
    )
    lateral = pl.col("y") + 3.5 * pl.col("lane")  # else learned from train rows, before and after
    one, two = (data_of(tmp_path, f.with_columns(lateral=lateral, left_lane=1, right_lane=1), f"{i}.parquet")
                for i, f in enumerate((frame, other)))  # fmt: skip
    a, b = all_windows(one, "train"), all_windows(two, "train")
    before = a.frame <= cut
    assert 20 < before.sum() < len(before)
    ours = [(d.tracks._history(d.rows["train"], 31)[before]).numpy().tobytes() for d in (one, two)]
    assert ours[0] == ours[1]
    assert torch.equal(a.velocity[before], b.velocity[before]) and torch.equal(a.lateral[before], b.lateral[before])
    assert not torch.equal(a.history[~before], b.history[~before])
    assert not torch.equal(a.future[before], b.future[before])


def test_normalisation_knows_train_alone(tmp_path):
    frame = tracks()
    test_only = frame.with_columns(speed=pl.when(pl.col("vehicle") >= 16).then(pl.col("speed") + 1).otherwise("speed"))
    one, two = data_of(tmp_path, frame, "a.csv"), data_of(tmp_path, test_only, "b.csv")
    a, b = all_windows(one, "test"), all_windows(two, "test")
    assert torch.equal(one.tracks.mean[2], two.tracks.mean[2]) and torch.equal(one.tracks.scale[2], two.tracks.scale[2])
    assert not torch.equal(a.history, b.history)


@pytest.mark.parametrize("split", ["vehicle", "time", "fold"])
def test_no_vehicle_is_on_two_sides(tmp_path, split):
    frame = tracks(60)
    data = data_of(tmp_path, frame, split=split, history=2.0, horizon=2.0)
    data.setup("fit")
    vehicles = {name: set(data.tracks.track[rows].tolist()) for name, rows in data.rows.items()}
    assert all(vehicles.values())
    assert not vehicles["train"] & vehicles["test"] and not vehicles["train"] & vehicles["valid"]
    assert not vehicles["valid"] & vehicles["test"]
    if split == "time":
        frames = {name: data.tracks.frame[rows] for name, rows in data.rows.items()}
        assert frames["train"].max() + 20 < frames["valid"].min() - 20
        assert frames["valid"].max() + 20 < frames["test"].min() - 20


def test_seeds_are_folds(tmp_path):
    def vehicles(seed, fold=None):
        torch.manual_seed(seed)
        data = data_of(tmp_path, tracks(), split="fold", fold=fold)
        return set(data.tracks.track[data.rows["test"]].tolist())

    folds = [vehicles(seed) for seed in range(5)]
    assert len(set.union(*folds)) == 20 and sum(map(len, folds)) == 20  # each vehicle is tested on once
    assert vehicles(7) == folds[2] == vehicles(1, fold=2)


def test_short_futures_are_nan_and_unknown_unless_a_crossing_shows(tmp_path):
    data = data_of(tmp_path, tracks(), partial_future=True)
    batch = all_windows(data, "test")
    gone = batch.future.isnan().all(-1)
    assert gone.any() and not gone[:, 0].any()
    cut = gone[:, -1] & batch.crossing.isnan()
    assert (batch.intention[cut] == -1).all() and (batch.intention[~gone[:, -1]] >= 0).all()


def test_frames_are_taken_by_number(tmp_path):
    """Every second frame of a 20 Hz file is the 10 Hz file."""
    fine = tracks(frames=180).with_columns(speed=pl.col("speed") * 1.0, x=pl.col("x") / 2)
    fine.write_csv(tmp_path / "fine.csv")
    data = TrajectoriesData("table", {"path": str(tmp_path / "fine.csv"), "frame_rate": 20.0}, split="vehicle")
    assert data.rate == 10 and data.every == 2
    batch = all_windows(data, "train")
    own = fine.filter((pl.col("vehicle") == 0) & (pl.col("frame") % 2 == 0))
    x = own["x"].to_numpy()
    np.testing.assert_allclose(batch.future[0, :, 0], x[31:61] - x[30], atol=1e-3)
    with pytest.raises(UserError, match="divided by a whole number"):
        TrajectoriesData("table", {"path": str(tmp_path / "fine.csv"), "frame_rate": 20.0}, frame_rate=8.0).schema  # noqa: B018


ABSENT = importlib.util.find_spec("libsumo") is None
SIMULATORS = [
    pytest.param(trajectories_numpy.simulate, id="numpy"),
    pytest.param(trajectories_sumo.simulate, id="sumo", marks=pytest.mark.skipif(ABSENT, reason="no libsumo")),
]


@pytest.mark.parametrize("simulate", SIMULATORS)
def test_the_same_seed_gives_the_same_bytes(simulate):
    """Spec 7.3, check 3: 60 s of seed 7 twice, beside another world too; seed 8 differs."""
    once, beside = simulate([7], 60.0)[7], simulate([8, 7], 60.0)
    assert once.equals(beside[7], null_equal=True) and not once.equals(beside[8])
    assert once.write_csv() == beside[7].write_csv()


@pytest.mark.parametrize("simulate", SIMULATORS)
def test_300_seconds_hold_enough_lane_changes(simulate):
    """Spec 7.3, check 3."""
    world = simulate([7], 300.0)[7]
    change = world.with_columns(step=pl.col("lane").diff().over("vehicle"))["step"]
    assert world["vehicle"].n_unique() >= 300
    assert (change < 0).sum() >= 100 and (change > 0).sum() >= 100 and (change != 0).sum() >= 300
    assert 0.08 < world.filter(pl.col("vy").abs() < 0.2)["lateral"].std() < 0.4
    assert world.select((pl.col("y").diff().over("vehicle").abs() < 0.3).all()).item()


def test_simulated_worlds_are_kept_and_split_by_seed(monkeypatch):
    files = {"train": [0], "valid": [1], "test": [2], "seconds": 40.0}
    first = TrajectoriesData("numpy_weave", files)
    one = all_windows(first, "test")
    monkeypatch.setattr(trajectories_numpy, "_Worlds", None)  # a second simulation would fail
    second = TrajectoriesData("numpy_weave", files, cache=False)
    two = all_windows(second, "test")
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, two, strict=True))
    tracks_of = {name: set(second.tracks.track[rows].tolist()) for name, rows in second.rows.items()}
    assert not tracks_of["train"] & tracks_of["test"]
    with pytest.raises(UserError, match="each seed once"):
        TrajectoriesData("numpy_weave", files | {"test": [0]}).schema  # noqa: B018


def test_finished_windows_are_kept_and_broken_ones_built_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))
    frame = tracks()
    first = data_of(tmp_path, frame)
    one = all_windows(first, "test")
    (stored,) = (tmp_path / "cache").rglob("*.safetensors")
    monkeypatch.setattr("moezoo.datasets.trajectories.build", None)  # a second build would fail
    for _ in range(2):
        again = data_of(tmp_path, frame)
        assert again.built.places.equals(first.built.places) and again.class_balance == first.class_balance
        two = all_windows(again, "test")
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, two, strict=True))
        monkeypatch.undo()
        monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))
        stored.write_bytes(b"not windows")
    assert len(data_of(tmp_path, frame, train_stride=0.2).rows["train"]) > len(first.rows["train"])  # another cut


def us101(**arguments):
    folder = real_data_dir()
    if folder is None or not (folder / "tmmoe" / "ngsim_us101_commonroad.parquet").exists():
        pytest.skip("MOEZOO_REAL_DATA has no tmmoe/ngsim_us101_commonroad.parquet")
    path = folder / "tmmoe" / "ngsim_us101_commonroad.parquet"
    return TrajectoriesData(
        "table", {"path": str(path), "frame_rate": 10.0}, **({"split": "vehicle", "gaps": "split"} | arguments)
    )


@pytest.mark.real
def test_us101_is_read_as_the_spec_counts_it():
    """Spec 7.3, checks 1 and 2."""
    data = us101(debounce=0.0)
    frame = data.opened.read().frame
    assert len(frame) == 49_388 and frame["vehicle"].n_unique() == 366 and frame["scene"].n_unique() == 13
    data.setup("fit")
    assert data.tracks.track.unique().numel() == 671  # vehicles leave a segment and come back: data.gaps=split
    balance = data.class_balance
    assert {name: sum(some[name] for some in balance.values()) for name in ("keep", "left", "right", "unknown")} == {
        "keep": 3419, "left": 82, "right": 39, "unknown": 0,
    }  # fmt: skip
    assert [sum(some.values()) for some in balance.values()] == [2552, 200, 788]
    vehicles = {name: set(data.built.places.filter(pl.col("track").is_in(data.tracks.track[rows].tolist()))["vehicle"])
                for name, rows in data.rows.items()}  # fmt: skip
    assert not vehicles["train"] & vehicles["test"] and not vehicles["train"] & vehicles["valid"]
    assert not vehicles["valid"] & vehicles["test"]


@pytest.mark.real
def test_us101_constant_velocity_is_the_specs():
    """Spec 7.2, vehicles whose hashed id is >= 0.75: on along the road at its velocity, across it where one is."""
    data = us101(debounce=0.0)
    data.setup("fit")
    rows = torch.cat(list(data.rows.values()))
    batch = data.tracks.batch(rows, 31, 30)
    vehicle = dict(data.built.places.select("track", pl.col("vehicle").cast(pl.Int64)).unique().iter_rows())
    hashed = torch.tensor([vehicle[t] * 2654435761 % 2**32 / 2**32 for t in batch.track.tolist()])
    test = hashed >= 0.75
    assert test.sum() == 807
    rule = ConstantVelocity(data.schema, lateral=False)
    error = rule(batch.velocity[test], batch.lateral[test]).position - batch.future[test]
    along, across = error[:, [9, 19, 29]].square().mean(0).sqrt().T
    assert along.tolist() == pytest.approx([0.608, 1.530, 2.690], rel=0.01)
    assert across.tolist() == pytest.approx([0.229, 0.385, 0.528], rel=0.01)
    distance = error.norm(dim=-1)
    assert float(distance.mean()) == pytest.approx(0.960, rel=0.01)  # ADE
    assert float(distance[:, -1].mean()) == pytest.approx(2.224, rel=0.01)  # FDE
    assert float((distance[:, -1] > 2).float().mean()) == pytest.approx(0.487, rel=0.01)  # miss rate
