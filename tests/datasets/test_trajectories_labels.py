"""Labels equal a naive reading of the rule, whatever the lanes do."""

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.datasets.trajectories_labels import crossing_labels, crossings, cslstm_labels, decimated

LANES = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=12)


def frames_of(tracks):
    rows = [
        {"track": t, "frame": i, "lane": lane}
        for t, runs in enumerate(tracks)
        for i, lane in enumerate([lane for lane, count in runs for _ in range(count)])
    ]
    return pl.DataFrame(rows, schema={"track": pl.Int64, "frame": pl.Int64, "lane": pl.Int32})


def naive_crossings(lanes, debounce):
    """Read from the left: a crossing that the very next one undoes in time is dropped with it."""
    events = [(i, lanes[i - 1], lanes[i]) for i in range(1, len(lanes)) if lanes[i] != lanes[i - 1]]
    kept, k = [], 0
    while k < len(events):
        at, before, after = events[k]
        if k + 1 < len(events) and events[k + 1][2] == before and events[k + 1][0] - at <= debounce:
            k += 2
            continue
        kept.append((at, 1 if after < before else 2))
        k += 1
    return kept


@settings(max_examples=150, deadline=None)
@given(tracks=st.lists(LANES, min_size=1, max_size=3), debounce=st.integers(0, 6), horizon=st.integers(1, 8))
def test_labels_equal_a_naive_reference(tracks, debounce, horizon):
    frame = frames_of(tracks)
    found = crossings(frame.lazy(), debounce).collect()
    labels = crossing_labels(frame.lazy(), horizon, debounce).collect()
    for (t,), own in frame.group_by("track", maintain_order=True):
        lanes = own["lane"].to_list()
        kept = naive_crossings(lanes, debounce)
        assert found.filter(pl.col("track") == t).select("frame", "side").rows() == kept
        got = labels.filter(pl.col("track") == t)
        for i, (side, ahead, since) in enumerate(got.select("intention", "crossing", "since").iter_rows()):
            coming = [(at, way) for at, way in kept if i < at <= i + horizon]
            short = len(lanes) - 1 - i < horizon
            assert side == (coming[0][1] if coming else -1 if short else 0)
            assert ahead == (coming[0][0] - i if coming else None)
            past = [at for at, _ in kept if at <= i]
            assert since == (i - past[-1] if past else None)


@settings(max_examples=60, deadline=None)
@given(tracks=st.lists(LANES, min_size=1, max_size=3), reach=st.integers(1, 8))
def test_cslstm_labels_equal_their_rule(tracks, reach):
    frame = frames_of(tracks)
    labels = cslstm_labels(frame.lazy(), reach, 0).collect()
    for (t,), own in frame.group_by("track", maintain_order=True):
        lanes = own["lane"].to_list()
        for i, side in enumerate(labels.filter(pl.col("track") == t)["intention"]):
            ahead, ago = lanes[min(i + reach, len(lanes) - 1)], lanes[max(i - reach, 0)]
            right, left = ahead > lanes[i] or lanes[i] > ago, ahead < lanes[i] or lanes[i] < ago
            assert side == (2 if right else 1 if left else 0)


def test_a_row_without_a_lane_is_no_crossing():
    frame = pl.DataFrame({"track": [0] * 5, "frame": range(5), "lane": pl.Series([2, None, 2, 2, 1], dtype=pl.Int32)})
    assert crossings(frame.lazy(), 0).collect().rows() == [(0, 4, 1)]


def test_decimation_goes_by_frame_number():
    frame = pl.DataFrame({"frame": [3, 4, 5, 6, 9, 10]})
    assert decimated(frame.lazy(), 3).collect()["frame"].to_list() == [1, 2, 3]
