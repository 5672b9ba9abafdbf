"""What a model sees of a frame: the vehicle itself and the six neighbours around it, at that frame alone."""

import polars as pl

FEATURES = (
    "x", "y", "vx", "vy", "ax", "lateral", "left_lane", "right_lane",
    "lead_gap", "lead_speed", "follow_gap", "follow_speed",
    "left_lead_gap", "left_lead_speed", "left_follow_gap", "left_follow_speed",
    "right_lead_gap", "right_lead_speed", "right_follow_gap", "right_follow_speed",
)  # fmt: skip
SIGHT = 100.0  # m, centre to centre; nobody is seen beyond
_CAR = 4.6  # m, where a length is not known


def with_motion(frame: pl.LazyFrame, rate: float) -> pl.LazyFrame:
    """Fills velocities and acceleration by backward differences where the source has none: no later frame is used.

    The first frame of a track stands still sideways and does not accelerate; where its vx is unknown it is left out.
    """

    def change(of: str) -> pl.Expr:
        return pl.col(of).diff().over("track") * rate

    return (
        frame.with_columns(vx=pl.coalesce("vx", change("x")), vy=pl.coalesce("vy", change("y")).fill_null(0.0))
        .filter(pl.col("vx").is_not_null())
        .with_columns(ax=pl.coalesce("ax", change("vx")).fill_null(0.0))
    )


def with_road(frame: pl.LazyFrame, centres: pl.LazyFrame) -> pl.LazyFrame:
    """Fills the offset in the lane and what lies beside it where the source has none.

    Args:
        centres: recording, lane, centre (y, m), outermost (the highest lane): learned from train vehicles alone.
    """
    return (
        frame.join(centres, on=["recording", "lane"], how="left", maintain_order="left")
        .with_columns(
            lateral=pl.coalesce("lateral", pl.col("y") - pl.col("centre")),
            left_lane=pl.coalesce("left_lane", pl.col("lane") > 1),
            right_lane=pl.coalesce("right_lane", pl.col("lane") < pl.col("outermost")),
        )
        .drop("centre", "outermost")
    )


def lane_centres(train: pl.LazyFrame) -> pl.LazyFrame:
    """Median y of each lane of each recording, and the recording's outermost lane; lanes unseen here have none."""
    return (
        train.drop_nulls("lane")
        .group_by("recording", "lane")
        .agg(centre=pl.col("y").median())
        .with_columns(outermost=pl.col("lane").max().over("recording"))
    )


def with_neighbours(frame: pl.LazyFrame) -> pl.LazyFrame:
    """Adds gap (m, bumper to bumper) and relative speed (m/s, theirs less ours) of leader and follower in three lanes.

    `SIGHT` and 0 where nobody is near or the lane is unknown. Neighbours share scene and frame.
    """
    span = pl.col("x").max() - pl.col("x").min() + 2 * SIGHT
    frame = frame.with_columns(
        row=pl.int_range(pl.len()),
        size=pl.col("length").fill_null(_CAR),
        slot=(pl.col("scene").rank("dense").cast(pl.Int64) * (pl.col("frame").max() + 2) + pl.col("frame")) * 64,
        at=pl.col("x") - pl.col("x").min(),
        span=span,
    )
    others = (
        frame.drop_nulls("lane")
        .select(
            place=(pl.col("slot") + pl.col("lane")) * pl.col("span") + pl.col("at"),
            other_x="x",
            other_vx="vx",
            other_size="size",
        )
        .sort("place")
    )
    found = [frame.select("row")]
    for side, step in (("", 0), ("left_", -1), ("right_", 1)):
        asked = (
            frame.drop_nulls("lane")
            .select(
                "row", "x", "vx", "size",
                place=(pl.col("slot") + pl.col("lane") + step) * pl.col("span") + pl.col("at"),
            )
            .sort("place")
        )  # fmt: skip
        for who in ("lead", "follow"):
            # Somebody exactly beside us in another lane is our leader there.
            exact = step != 0 and who == "lead"
            near = asked.join_asof(
                others,
                on="place",
                strategy="forward" if who == "lead" else "backward",
                tolerance=SIGHT,
                allow_exact_matches=exact,
            ).with_columns(gap=(pl.col("other_x") - pl.col("x")).abs() - 0.5 * (pl.col("size") + pl.col("other_size")))
            found.append(
                near.select(
                    "row",
                    pl.col("gap").clip(0.0, SIGHT).fill_null(SIGHT).alias(f"{side}{who}_gap"),
                    (pl.col("other_vx") - pl.col("vx")).fill_null(0.0).alias(f"{side}{who}_speed"),
                )
            )
    out = frame.drop("size", "slot", "at", "span")
    for more in found[1:]:
        out = out.join(more, on="row", how="left", maintain_order="left")
    gaps = [name for name in FEATURES if name.endswith("_gap")]
    speeds = [name for name in FEATURES if name.endswith("_speed")]
    return out.with_columns(pl.col(gaps).fill_null(SIGHT), pl.col(speeds).fill_null(0.0)).drop("row")
