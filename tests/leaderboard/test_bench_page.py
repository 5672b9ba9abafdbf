"""The page of the bench, from made-up measurements."""

from pathlib import Path
from typing import Any

import pytest
from moezoo.errors import UserError
from moezoo.leaderboard.bench.page import write_page
from moezoo.leaderboard.bench.results import Measured, Results
from moezoo.leaderboard.bench.summary import duels, share_ahead, verdicts

GOAL = "ffn-gelu-fp32-256,64,128,8,2"  # at most 1.6 times the floor
ONE_TOKEN = "ffn-gelu-fp32-1,256,256,16,4-infer"  # at most 180 µs
OTHER = "layer-swiglu-fp32-256,64,128,8,2"


def constant(name: str, seconds: float, **details: Any) -> Measured:
    return Measured(name, dict.fromkeys(range(30), seconds), inner=1, check="equal", **details)


@pytest.fixture
def results() -> Results:
    roles = {"floor": "floor", "ours": "ours", "quick": "peer", "slow": "peer", "odd": "peer", "gone": "peer"}
    described = {
        name: {"role": role, "note": "", "comparable": name != "odd", "install": ""} for name, role in roles.items()
    }
    run = {
        "hardware": {"cpu": "a CPU", "cores": 2, "gpu": None}, "versions": {"torch": "2.14"}, "git_commit": "abc",
        "created": "2026-11-24", "peers": {}, "device": "cpu", "threads": 1, "rounds": 30, "sample_seconds": 0.005,
        "contenders": described, "import_seconds": [0.3, 0.1],
    }  # fmt: skip
    gone = Measured("gone", unavailable="no such card | here")
    return Results(
        run,
        {
            GOAL: [
                constant("floor", 1e-3),
                constant("ours", 2e-3),
                constant("slow", 3e-3),
                constant("odd", 1e-4),
                gone,
            ],
            ONE_TOKEN: [constant("floor", 4e-5), constant("ours", 1.5e-4), gone],
            OTHER: [constant("floor", 1e-3), constant("ours", 2e-3), constant("quick", 1e-3), constant("slow", 4e-3)],
        },
    )


def test_goals_say_by_how_much(results: Results) -> None:
    by_case = {verdict.case: verdict for verdict in verdicts(results)}
    assert (by_case[GOAL].met, by_case[GOAL].by) == (False, pytest.approx(0.25))
    assert (by_case[ONE_TOKEN].met, by_case[ONE_TOKEN].value) == (True, pytest.approx(150))


def test_ahead_and_behind(results: Results) -> None:
    found = {(duel.case, duel.peer): duel for duel in duels(results)}
    assert found.keys() == {(GOAL, "slow"), (OTHER, "quick"), (OTHER, "slow")}  # another operation does not count
    assert [key for key, duel in found.items() if duel.behind] == [(OTHER, "quick")]
    assert found[OTHER, "quick"].ours.value == 2.0
    assert share_ahead(list(found.values())) == (1, 2)


def test_noise_is_not_behind(results: Results) -> None:
    results.cases[OTHER][2].samples = {r: 2e-3 / (1.2 if r % 2 else 0.9) for r in range(30)}
    results.cases[OTHER][1].samples = {r: 2e-3 * (1.0 if r else 0.8) for r in range(30)}
    (duel,) = [duel for duel in duels(results) if duel.peer == "quick"]
    assert duel.ours.low < 1.05 < duel.ours.high
    assert not duel.behind


def test_the_page_says_what_was_found_and_why(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path / "results", "cpu")
    notes = tmp_path / "notes.yaml"
    notes.write_text(f"{GOAL}: one matmul per expert\n")
    page, picture = write_page(tmp_path, "cpu", notes)
    text = page.read_text()
    assert (
        f"| `{GOAL}` | 2.00 [2.00, 2.00] × floor | ≤ 1.6 × floor | **missed by 25%** | one matmul per expert |" in text
    )
    assert f"| `{ONE_TOKEN}` | 150 µs | ≤ 180 µs | met |  |" in text
    assert "Goals: 1 of 2 met; importing the core takes 0.100 s beyond torch" in text
    assert "Ahead of every comparable peer that runs on 1 of 2 cases (50 %); ahead in 2 of 3 pairs" in text
    assert f"| `{OTHER}` | quick | 2.00 [2.00, 2.00] |" in text
    assert "| gone | no such card \\| here |" in text
    assert picture.stat().st_size > 10_000


def test_a_page_without_peers_is_a_page(results: Results, tmp_path: Path) -> None:
    del results.cases[GOAL], results.cases[OTHER]
    results.save(tmp_path / "results", "cpu")
    assert "No peer ran" in write_page(tmp_path, "cpu")[0].read_text()


def test_results_come_back_as_they_were_saved(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path, "cpu")
    assert Results.load(tmp_path, "cpu") == results


def test_broken_files_are_told_in_a_line(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path, "cpu")
    (tmp_path / "core-cpu.json").write_text("{")
    with pytest.raises(UserError, match="not the results of a bench"):
        Results.load(tmp_path, "cpu")
    notes = tmp_path / "notes.yaml"
    notes.write_text("- a list")
    results.save(tmp_path / "results", "cpu")
    with pytest.raises(UserError, match="mapping"):
        write_page(tmp_path, "cpu", notes)
