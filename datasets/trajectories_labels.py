"""What a driver is about to do, from the lanes that follow; and decimation by frame number."""

import polars as pl

KEEP, LEFT, RIGHT, UNKNOWN = 0, 1, 2, -1


def decimated(frame: pl.LazyFrame, every: int) -> pl.LazyFrame:
    """The rows whose frame number is a multiple of `every`, renumbered by it: a gap stays a gap."""
    if every == 1:
        return frame
    return frame.filter(pl.col("frame") % every == 0).with_columns(pl.col("frame") // every)


def crossings(frame: pl.LazyFrame, debounce: int) -> pl.LazyFrame:
    """Lane crossings that last: track, frame (the first in the new lane), side (LEFT or RIGHT).

    A crossing is dropped with the one that undoes it where the vehicle is back in its lane within `debounce` frames;
    of a vehicle that flickers at the line, what is left is its last crossing or none. Rows without a lane are skipped.

    Args:
        frame: track, frame, lane, in order.
        debounce: frames; 0 keeps every crossing.
    """
    before = pl.col("lane").shift(1).over("track")
    events = (
        frame.select("track", "frame", "lane")
        .drop_nulls("lane")
        .with_columns(before=before)
        .filter(pl.col("lane") != pl.col("before"))
        .with_columns(side=pl.when(pl.col("lane") < pl.col("before")).then(LEFT).otherwise(RIGHT).cast(pl.Int8))
    )
    soon = pl.col("frame").shift(-1).over("track") - pl.col("frame") <= debounce
    back = pl.col("lane").shift(-1).over("track") == pl.col("before")
    # Undone crossings come in chains that alternate; they cancel in pairs from the first on.
    undone = (soon & back).fill_null(False)
    chain = (~undone).cast(pl.Int32).cum_sum().over("track") - (~undone).cast(pl.Int32)
    length = pl.col("undone").cast(pl.Int32).sum().over("track", "chain")
    return (
        events.with_columns(undone=undone)
        .with_columns(chain=chain)
        .filter(~pl.col("undone") & (length % 2 == 0))
        .select("track", "frame", "side")
    )


def crossing_labels(frame: pl.LazyFrame, horizon: int, debounce: int) -> pl.LazyFrame:
    """Adds `intention` and `crossing`: the side of the first crossing in (t, t + horizon], and frames until it.

    UNKNOWN where no lane is known at t, or the track ends before the horizon without a crossing. Also adds `since`:
    frames since the last crossing, for bands around it.
    """
    events = crossings(frame, debounce).with_columns(at=pl.col("frame")).sort("track", "frame")
    ends = pl.col("frame").max().over("track")
    out = frame.sort("track", "frame").join_asof(
        events.rename({"side": "next"}), on="frame", by="track", strategy="forward", allow_exact_matches=False,
        tolerance=horizon, check_sortedness=False,
    )  # fmt: skip
    out = out.join_asof(
        events.select("track", "frame", last="frame"), on="frame", by="track", strategy="backward",
        check_sortedness=False,
    )  # fmt: skip
    known = pl.col("lane").is_not_null() & ((ends - pl.col("frame") >= horizon) | pl.col("next").is_not_null())
    return out.with_columns(
        intention=pl.when(known).then(pl.col("next").fill_null(KEEP)).otherwise(UNKNOWN).cast(pl.Int8),
        crossing=pl.when(known).then(pl.col("at") - pl.col("frame")).cast(pl.Float64),
        since=pl.col("frame") - pl.col("last"),
    ).drop("next", "at", "last")


def cslstm_labels(frame: pl.LazyFrame, reach: int, debounce: int) -> pl.LazyFrame:
    """The rule of CS-LSTM: the lane `reach` frames ahead against now, or now against `reach` frames ago.

    Both are cut at the ends of the track. `crossing` is frames to the next crossing within reach, else (negative) to
    the last one: this label recognises changes that are over. Source: nachiket92/conv-social-pooling, preprocess_data.
    """
    lane = pl.col("lane")
    ahead = lane.shift(-reach).over("track").fill_null(lane.last().over("track"))
    ago = lane.shift(reach).over("track").fill_null(lane.first().over("track"))
    right, left = (ahead > lane) | (lane > ago), (ahead < lane) | (lane < ago)
    side = pl.when(lane.is_null()).then(UNKNOWN).when(right).then(RIGHT).when(left).then(LEFT).otherwise(KEEP)
    out = crossing_labels(frame, reach, debounce)
    past = pl.when(pl.col("since") <= reach).then(-pl.col("since"))
    return out.sort("track", "frame").with_columns(
        intention=side.cast(pl.Int8),
        crossing=pl.when(side.is_in([LEFT, RIGHT])).then(pl.col("crossing").fill_null(past)),
    )
