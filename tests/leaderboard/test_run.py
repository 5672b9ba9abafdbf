"""The runner: no cell lost, none done twice, whatever is killed."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from moezoo.errors import UserError
from moezoo.leaderboard.results import load_results
from moezoo.leaderboard.run import plan, run
from moezoo.recipes import join_values

CELL = str(Path(__file__).with_name("stand_in_cell.py"))


@pytest.fixture
def recipes(tmp_path):
    """Paths of two recipes and a rule, in a folder `ranking`."""
    folder = tmp_path / "own" / "ranking"
    folder.mkdir(parents=True)
    for name, kind in (("a", "moe"), ("b", "dense"), ("broken", "moe"), ("rule", "rule")):
        recipe = {"model": {"class_path": name}, "recipe": {"title": name, "kind": kind}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return {name: str(folder / f"{name}.yaml") for name in ("a", "b", "broken", "rule")}


def cell(journal, sleep=0.0):
    return [sys.executable, CELL, str(journal), str(sleep)]


def finished(journal):
    """How often each cell came to its end."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    return Counter(line.split()[1] for line in lines if line.startswith("end"))


def start(recipes, seeds, journal, tmp_path, jobs=1, sleep=0.4):
    """`run` in a process of its own, so that it can be killed."""
    code = (
        # Where the tests run in the background, a shell has Ctrl-C ignored, and that is inherited.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import sys; from pathlib import Path; from moezoo.leaderboard.run import run; "
        f"sys.exit(len(run({recipes!r}, {seeds!r}, {jobs}, Path({str(tmp_path / 'store')!r}), "
        f"Path({str(tmp_path / 'runs')!r}), command={cell(journal, sleep)!r})))"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.02)


def test_the_table_is_filled_once_and_then_left_alone(recipes, tmp_path):
    journal = tmp_path / "journal"
    arguments = ([recipes["a"], recipes["rule"]], [0, 1], 2, tmp_path / "store", tmp_path / "runs")
    assert run(*arguments, command=cell(journal)) == []
    expected = {"ranking/a:0": 1, "ranking/a:1": 1, "ranking/rule:0": 1}  # a rule runs with the first seed only
    assert finished(journal) == expected
    assert len(load_results(tmp_path / "store")) == 3
    assert run(*arguments, command=cell(journal)) == []
    assert finished(journal) == expected


def test_a_changed_recipe_is_stale_and_runs_again(recipes, tmp_path):
    journal = tmp_path / "journal"
    arguments = ([recipes["a"]], [0], 1, tmp_path / "store", tmp_path / "runs")
    run(*arguments, command=cell(journal))
    path = Path(recipes["a"])
    path.write_text(path.read_text().replace("class_path: a", "class_path: c"))
    run(*arguments, command=cell(journal))
    assert finished(journal) == {"ranking/a:0": 2}
    assert len(load_results(tmp_path / "store")) == 1
    assert [p.name for p in (tmp_path / "runs" / "ranking" / "a").glob("*.old*")], "the old run was lost"


def test_killed_half_way_it_goes_on_and_repeats_nothing(recipes, tmp_path):
    journal = tmp_path / "journal"
    first = start([recipes["a"], recipes["b"]], [0, 1, 2], journal, tmp_path)
    wait_for(lambda: sum(finished(journal).values()) >= 2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert sum(finished(journal).values()) < 6
    second = start([recipes["a"], recipes["b"]], [0, 1, 2], journal, tmp_path)
    assert second.wait(60) == 0, second.stderr.read()
    assert finished(journal) == {f"ranking/{name}:{seed}": 1 for name in "ab" for seed in range(3)}
    assert len(load_results(tmp_path / "store")) == 6


def test_two_runs_at_once_share_the_work(recipes, tmp_path):
    journal = tmp_path / "journal"
    both = [start([recipes["a"], recipes["b"]], [0, 1, 2], journal, tmp_path, sleep=0.2) for _ in range(2)]
    for process in both:
        assert process.wait(60) == 0, process.stderr.read()
    assert finished(journal) == {f"ranking/{name}:{seed}": 1 for name in "ab" for seed in range(3)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_cell_running(recipes, tmp_path, number):
    journal = tmp_path / "journal"
    process = start([recipes["a"]], [0], journal, tmp_path, sleep=60)
    wait_for(lambda: journal.exists() and "begin" in journal.read_text())
    pid = int(journal.read_text().split()[2])
    process.send_signal(number)
    process.wait(20)
    wait_for(lambda: not alive(pid))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_failing_cell_is_told_and_stops_no_other(recipes, tmp_path):
    journal = tmp_path / "journal"
    failures = run(
        [recipes["broken"], recipes["a"]], [0], 1, tmp_path / "store", tmp_path / "runs", command=cell(journal)
    )
    assert (
        len(failures) == 1 and "the loss is nan" in str(failures[0]) and str(failures[0].cell.log) in str(failures[0])
    )
    assert [r.recipe for r in load_results(tmp_path / "store")] == ["ranking/a"]


def test_cells_side_by_side_get_one_thread_each(recipes, tmp_path):
    journal = tmp_path / "journal"
    run([recipes["a"]], [0, 1], 2, tmp_path / "store", tmp_path / "runs", command=cell(journal))
    assert {line.split()[3] for line in journal.read_text().splitlines()} == {"1"}


def test_changes_may_not_replace_the_recipes_own_results(recipes, tmp_path):
    journal = tmp_path / "journal"
    store, runs = tmp_path / "store", tmp_path / "runs"
    run([recipes["a"]], [0], 1, store, runs, command=cell(journal))
    with pytest.raises(UserError, match="--results"):
        run([recipes["a"]], [0], 1, store, runs, ["--model.model.k=3"], command=cell(journal))
    assert run([recipes["a"]], [0], 1, tmp_path / "other", runs, ["--model.model.k", "3"], command=cell(journal)) == []


def test_mistakes_are_told_before_anything_runs(recipes, tmp_path):
    with pytest.raises(UserError, match="--jobs"):
        run([recipes["a"]], [0], 0, tmp_path, tmp_path)
    with pytest.raises(UserError, match="--seeds"):
        plan([recipes["a"]], [], tmp_path)
    with pytest.raises(UserError, match="did you mean"):
        plan(["ranking/awmo"], [0], tmp_path)
    with pytest.raises(UserError, match="--key"):
        join_values(["loose"])
    assert join_values(["--a", "1", "--b=2"]) == ["--a=1", "--b=2"]


def test_killed_with_its_cell_it_repeats_that_cell_only(recipes, tmp_path):
    journal, arguments = tmp_path / "journal", ([recipes["a"]], [0, 1, 2])
    process = start(*arguments, journal, tmp_path)
    wait_for(lambda: sum(finished(journal).values()) >= 1)
    process.kill()
    process.wait()
    running = [line.split() for line in journal.read_text().splitlines() if line.startswith("begin")][-1]
    os.kill(int(running[2]), signal.SIGKILL)
    # What a kill in the middle of a write leaves behind.
    leftover = tmp_path / "store" / "ranking" / "a" / f".made_up-test-s{running[1][-1]}.json.xyz.tmp"
    leftover.parent.mkdir(parents=True, exist_ok=True)
    leftover.write_text('{"recipe": "rank')
    again = start(*arguments, journal, tmp_path)
    assert again.wait(60) == 0, again.stderr.read()
    assert finished(journal) == {f"ranking/a:{seed}": 1 for seed in range(3)}
    assert [result.seed for result in load_results(tmp_path / "store")] == [0, 1, 2]


def test_a_result_that_was_not_yet_stored_is_collected_without_a_run(recipes, tmp_path):
    journal, store = tmp_path / "journal", tmp_path / "store"
    arguments = ([recipes["a"]], [0], 1, store, tmp_path / "runs")
    run(*arguments, command=cell(journal))
    (stored,) = store.rglob("*.json")
    before = stored.read_text()
    stored.unlink()  # as if killed between the two files of the result
    assert run(*arguments, command=cell(journal)) == []
    assert stored.read_text() == before and finished(journal) == {"ranking/a:0": 1}


def test_a_cell_that_outlives_its_runner_is_waited_for(recipes, tmp_path):
    """Two processes in one run folder would spoil it: the lock must live as long as the cell."""
    journal = tmp_path / "journal"
    process = start([recipes["a"]], [0], journal, tmp_path, sleep=3)
    wait_for(lambda: journal.exists() and "begin" in journal.read_text())
    process.kill()
    process.wait()
    assert run([recipes["a"]], [0], 1, tmp_path / "store", tmp_path / "runs", command=cell(journal)) == []
    assert [line.split()[0] for line in journal.read_text().splitlines()] == ["begin", "end"]
    assert len(load_results(tmp_path / "store")) == 1
