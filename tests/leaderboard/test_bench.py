"""The bench of the core: what it times, checks, keeps and refuses."""

import time
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import torch
from moezoo.cli import main
from moezoo.errors import UserError
from moezoo.leaderboard.bench import cases, measure, peers, run
from moezoo.leaderboard.bench.cases import Case, grid, parse_case, select_cases
from moezoo.leaderboard.bench.measure import Settings, peak_memory
from moezoo.leaderboard.bench.ours import floors, leaf, ours, reference
from moezoo.leaderboard.bench.problem import Built, Contender, Problem, Unavailable, make_problem
from moezoo.leaderboard.bench.ratios import ratio
from moezoo.leaderboard.bench.results import Measured, Results, paths

TINY = Case(24, 16, 32, 4, 2)
SHORT = Settings(rounds=1, sample_seconds=1e-4)


def named(*names: str) -> list[Contender]:
    return [one for one in [*floors(), *ours(), *peers.peers()] if one.name in names]


def timed(case: Case, *contenders: Contender, settings: Settings = SHORT) -> dict[str, Measured]:
    everyone = [*named("floor", "ours"), *contenders]
    return {one.contender: one for one in measure.measure(case, everyone, "cpu", settings)}


class TestCases:
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_every_name_stands_for_one_case(self, device: cases.Device) -> None:
        every = grid(device)
        assert [parse_case(case.name) for case in every] == every
        assert max(Counter(case.name for case in every).values()) == 1

    def test_every_goal_belongs_to_a_case_of_the_grid(self) -> None:
        names = {case.name for device in ("cpu", "cuda") for case in grid(device)}
        assert {case for case, _ in cases.GOALS} <= names

    def test_patterns_choose_from_the_grid_and_names_reach_beyond_it(self) -> None:
        assert {case.shape for case in select_cases(["*-4096,64,128,8,2"], "cpu")} == {"4096,64,128,8,2"}
        assert select_cases(["layer-swiglu-bf16-3,8,8,5,4-infer"], "cpu")[0].experts == 5

    @pytest.mark.parametrize("name", ["ffn", "ffn-gelu-fp32-4,8,8,2,3", "ffn-relu-fp32-4,8,8,2,1", "ffn-gelu-fp32-4,8"])
    def test_a_name_that_is_none_is_refused(self, name: str) -> None:
        with pytest.raises(UserError, match="--list"):
            select_cases([name], "cpu")

    @pytest.mark.parametrize(("experts", "skew"), [(8, 3.2), (64, 6.6)])
    def test_skew_is_the_largest_over_the_mean_load(self, experts: int, skew: float) -> None:
        indices = make_problem(Case(4096, 8, 8, experts, 2, skew=skew), "cpu").indices
        load = indices.flatten().bincount(minlength=experts).float()
        assert float(load.max() / load.mean()) == pytest.approx(skew, rel=0.02)
        assert bool((indices[:, 0] != indices[:, 1]).all())


class TestRatio:
    def test_known_numbers(self) -> None:
        # Two rounds: a resample holds only the slower first time with probability 1/4, only the faster with 1/4.
        found = ratio({0: 2.0, 1: 3.0}, {0: 1.0, 1: 1.0})
        assert found is not None
        assert (found.value, found.low, found.high) == (2.0, 2.0, 3.0)

    def test_what_slows_both_sides_of_a_round_cancels(self) -> None:
        seconds = dict(enumerate(torch.rand(30).add(1).tolist()))
        found = ratio({r: 1.5 * s for r, s in seconds.items()}, seconds)
        assert found is not None
        assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))

    def test_only_common_rounds_count(self) -> None:
        found = ratio({0: 4.0, 6: 4.0}, {0: 2.0, 1: 0.1, 6: 2.0})
        assert found is not None
        assert found.value == 2.0
        assert ratio({0: 1.0}, {1: 1.0}) is None


class TestMeasure:
    @pytest.mark.parametrize("part", ["ffn", "layer"])
    @pytest.mark.parametrize("act", ["gelu", "swiglu"])
    def test_ours_equals_the_plain_loop_by_every_backend(self, part: str, act: str) -> None:
        case = Case(24, 16, 32, 4, 2, part, act)  # type: ignore[arg-type]
        found = timed(case, *named("ours/dense", "ours/grouped", "ours/segment", "ours/padded"))
        assert {name: one.check or one.unavailable for name, one in found.items() if name != "floor"} == dict.fromkeys(
            ["ours", "ours/dense", "ours/grouped", "ours/segment", "ours/padded"], "equal"
        )
        assert all(len(one.samples) == 1 for one in found.values())

    def test_the_floor_multiplies_as_much_as_the_loop(self) -> None:
        problem = make_problem(TINY, "cpu")
        weights = torch.ones_like(problem.weights)
        same = Problem(
            TINY, problem.x, problem.grad, weights, problem.indices, problem.gate,
            problem.w1[:1].expand_as(problem.w1), problem.w2[:1].expand_as(problem.w2),
        )  # fmt: skip
        dense = floors()[0].build(same).forward(same.x)[0].view(2, 24, 16).sum(0)
        torch.testing.assert_close(dense, reference(same, same.x))

    def test_another_function_is_not_timed(self) -> None:
        def build(problem: Problem) -> Built:
            weight = leaf(problem.w1[0, : TINY.dim])
            return Built(lambda x: [x @ weight], [weight])

        found = timed(TINY, Contender("cheat", "peer", build))["cheat"]
        assert not found.samples
        assert "its output in torch.float32 is off by" in found.unavailable

    def test_a_wrong_gradient_is_not_timed(self) -> None:
        def build(problem: Problem) -> Built:
            return Built(lambda x: [reference(problem, x) + 0 * x.detach()], [])

        def build_wrong(problem: Problem) -> Built:
            return Built(lambda x: [reference(problem, x) + x - x.detach()], [])

        found = timed(TINY, Contender("right", "peer", build), Contender("wrong", "peer", build_wrong))
        assert found["right"].check == "equal"
        assert "its gradient in torch.float32 is off by" in found["wrong"].unavailable

    def test_what_is_wrong_in_bf16_alone_is_not_timed(self) -> None:
        def build(problem: Problem) -> Built:
            slip = 0.1 if problem.x.dtype == torch.bfloat16 else 0.0
            return Built(lambda x: [reference(problem, x) + slip * x], [])

        found = timed(Case(24, 16, 32, 4, 2, dtype="bf16"), Contender("slip", "peer", build))
        assert found["ours"].check == "equal"
        assert "its output in torch.bfloat16 is off by" in found["slip"].unavailable

    def test_who_cannot_run_is_listed_with_the_reason(self) -> None:
        def unavailable(problem: Problem) -> Built:
            raise Unavailable("no such card")

        def broken(problem: Problem) -> Built:
            raise RuntimeError("first line\nsecond line")

        found = timed(TINY, Contender("a", "peer", unavailable), Contender("b", "peer", broken))
        assert (found["a"].unavailable, found["b"].unavailable) == ("no such card", "RuntimeError: first line")
        assert len(found["ours"].samples) == 1

    def test_the_slow_are_timed_in_every_sixth_round(self) -> None:
        def build(problem: Problem) -> Built:
            def forward(x: torch.Tensor) -> list[torch.Tensor]:
                end = time.process_time() + 0.03
                while time.process_time() < end:
                    pass
                return [reference(problem, x)]

            return Built(forward, [])

        found = timed(TINY, Contender("slow", "peer", build), settings=Settings(rounds=7, sample_seconds=1e-4))
        assert sorted(found["slow"].samples) == [0, 6]
        assert sorted(found["ours"].samples) == list(range(7))
        assert min(found["slow"].samples.values()) > 0.03

    def test_peak_memory_is_the_most_held_at_once(self) -> None:
        def step() -> None:
            first = torch.empty(2**20, dtype=torch.uint8)
            del first
            second = torch.empty(2**19, dtype=torch.uint8)
            third = torch.empty(2**20, dtype=torch.uint8)
            del second, third

        assert peak_memory(step, "cpu") == 2**19 + 2**20

    def test_one_token_without_gradients(self) -> None:
        found = timed(Case(1, 16, 16, 4, 2, mode="infer"), *named("ours/gather"))
        assert {found[name].check for name in ("ours", "ours/gather")} == {"equal"}

    def test_transformers_blocks_equal_the_plain_loop(self) -> None:
        pytest.importorskip("transformers")
        names = [f"transformers/{kind}" for kind in ("eager", "grouped_mm", "batched_mm")]
        for case in (TINY, Case(24, 16, 32, 4, 2, act="swiglu"), Case(24, 16, 32, 4, 2, "layer", "swiglu")):
            found = timed(case, *named(*names))
            assert [found[name].check or found[name].unavailable for name in names] == ["equal"] * 3


class TestRun:
    def test_an_interrupted_run_keeps_finished_cases(self, tmp_path: Path) -> None:
        other = Case(32, 16, 32, 4, 2)

        def interrupt(problem: Problem) -> Built:
            if problem.case == other:
                raise KeyboardInterrupt
            raise Unavailable("elsewhere")

        rivals = [*named("floor", "ours"), Contender("user", "peer", interrupt)]
        with pytest.raises(KeyboardInterrupt):
            run.run([TINY, other], rivals, "cpu", SHORT, folder=tmp_path)
        kept = Results.load(tmp_path, "cpu", partial=True)
        assert list(kept.cases) == [TINY.name]

        def unavailable(problem: Problem) -> Built:
            raise Unavailable("elsewhere")

        rivals[-1] = Contender("user", "peer", unavailable)
        results = run.run([TINY, other], rivals, "cpu", SHORT, folder=tmp_path, resume=True)
        assert results.cases[TINY.name] == kept.cases[TINY.name]
        assert list(Results.load(tmp_path, "cpu").cases) == [TINY.name, other.name]
        assert not paths(tmp_path, "cpu", partial=True)[0].exists()

    def test_another_run_is_not_gone_on_with(self, tmp_path: Path) -> None:
        Results(run.run([TINY], named("floor", "ours"), "cpu", SHORT).run, {}).save(tmp_path, "cpu", partial=True)
        with pytest.raises(UserError, match="another rounds"):
            run.run([TINY], named("floor", "ours"), "cpu", Settings(rounds=3), folder=tmp_path, resume=True)


class TestCommand:
    def test_end_to_end(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        names = ["ffn-gelu-fp32-24,16,32,4,2", "layer-swiglu-fp32-24,16,32,4,2"]
        words = [
            "bench",
            "core",
            "--cases",
            *names,
            "--contenders",
            "ours/segment",
            "transformers/grouped_mm",
            "fastmoe",
        ]
        assert main([*words, "--quick", "--rounds", "1", "--output", str(tmp_path)]) == 0
        frame = pl.read_parquet(tmp_path / "results" / "core-cpu.parquet")
        own = frame.filter(pl.col("contender") == "ours")
        assert own.group_by("case").len().sort("case").rows() == [(name, 1) for name in sorted(names)]
        assert own["tokens"].to_list() == [24] * 2
        assert frame["seconds"].min() > 0
        page, picture = (tmp_path / name for name in ("core.md", "core.png"))
        text, drawn = page.read_text(), picture.read_bytes()
        assert "| fastmoe | cannot be imported: No module named 'fmoe' |" in text
        assert "importing the core takes 0." in text
        assert drawn.startswith(b"\x89PNG")
        capsys.readouterr()
        page.unlink()
        assert main(["bench", "core", "--report", "--output", str(tmp_path)]) == 0
        assert capsys.readouterr().out.split() == [str(page), str(picture)]
        assert page.read_text() == text
        assert picture.read_bytes() == drawn

    def test_single_cases_are_shown_and_not_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        words = ["bench", "core", "--cases", TINY.name, "--contenders", "floor_bmm", "scattermoe", "--rounds", "1"]
        assert main(words) == 0
        out = capsys.readouterr().out
        assert "floor_bmm" in out
        assert "scattermoe: Triton kernels: GPU only" in out
        assert not list(tmp_path.iterdir())

    def test_list_names_cases_and_contenders(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["bench", "core", "--list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "layer-gelu-fp32-256,64,128,8,2" in lines
        assert "ours: backend chosen by shape" in lines

    @pytest.mark.parametrize(
        ("words", "hint"),
        [
            (["--cases", "nonsense"], "--list"),
            (["--contenders", "nobody"], "there are floor"),
            (["--rounds", "0"], "at least 1"),
            (["--quick", "--resume"], "--output"),
            (["--report", "--output", "nowhere"], "measures them"),
            (["--device", "tpu"], "--help"),
        ],
    )
    def test_a_mistake_is_one_line(self, words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
        try:
            code: object = main(["bench", "core", *words])
        except SystemExit as exit:  # argparse's own
            code = exit.code
        assert code == 2
        error = capsys.readouterr().err
        assert hint in error
        assert error.count("\n") == 1

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
    def test_a_missing_gpu_is_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["bench", "core", "--device", "cuda"]) == 2
        assert "no GPU here" in capsys.readouterr().err
