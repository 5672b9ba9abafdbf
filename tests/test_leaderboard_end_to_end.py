"""`moezoo leaderboard run` with real fits: killed half-way and started again, then the page."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

RECIPES = ["ranking/popularity", "ranking/repeat", "ranking/repeat_popularity"]


@pytest.mark.slow
def test_a_killed_leaderboard_run_finishes_its_table_without_repeating_a_cell(tmp_path):
    command = [sys.executable, "-m", "moezoo.cli", "leaderboard"]
    run = [*command, "run", *RECIPES, "--seeds", "0", "--results", str(tmp_path / "results"), "--runs", str(tmp_path)]
    first = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "results").rglob("*.json")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*.json")}
    assert 0 < len(before) < 3
    subprocess.run(run, check=True, capture_output=True, timeout=240)
    after = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*.json")}
    assert len(after) == 3
    assert all(after[path] == content for path, content in before.items()), "a finished cell was run again"
    values = {json.loads(text)["recipe"]: json.loads(text)["metrics"]["session_auc"] for text in after.values()}
    assert values == pytest.approx(dict(zip(RECIPES, (0.6160, 0.7511, 0.7703), strict=True)), abs=5.1e-5)
    report = [*command, "report", "--results", str(tmp_path / "results"), "--output", str(tmp_path / "site")]
    subprocess.run(report, check=True, capture_output=True, timeout=60)
    assert "0.7703" in (tmp_path / "site" / "index.html").read_text()
    assert "0.7703" in (tmp_path / "site" / "LEADERBOARD.md").read_text()
