"""What a run says: goals met or missed, peers ahead or behind, who could not run and why."""

from collections.abc import Iterator
from dataclasses import dataclass

from .cases import GOALS, NEAR, Case, Goal
from .ratios import Ratio, ratio
from .results import Measured, Results


@dataclass(frozen=True)
class Verdict:
    """A goal against what was measured; the interval is None for a time, which has no partner to pair with."""

    case: str
    contender: str
    goal: Goal
    value: float
    interval: Ratio | None = None

    @property
    def met(self) -> bool:
        return self.value <= self.goal.limit

    @property
    def by(self) -> float:
        """How far beyond the goal, as a share of it; negative when below."""
        return self.value / self.goal.limit - 1


@dataclass(frozen=True)
class Duel:
    """Ours against one comparable peer on one case."""

    case: str
    peer: str
    ours: Ratio

    @property
    def ahead(self) -> bool:
        return self.ours.value < 1

    @property
    def behind(self) -> bool:
        """Slower beyond noise."""
        return self.ours.low > NEAR


def verdicts(results: Results) -> list[Verdict]:
    """The goals of the cases that were measured."""
    found = []
    for (case, contender), goal in GOALS.items():
        measured = by_name(results, case)
        if not (contender in measured and measured[contender].samples and "floor" in measured):
            continue
        own = measured[contender]
        if goal.unit == "us":
            found.append(Verdict(case, contender, goal, own.seconds * 1e6))
        elif (to_floor := ratio(own.samples, measured["floor"].samples)) is not None:
            found.append(Verdict(case, contender, goal, to_floor.value, to_floor))
    return found


def duels(results: Results) -> list[Duel]:
    """Ours, as it comes, against every peer that ran and does the same kind of work."""
    return list(_duels(results))


def _duels(results: Results) -> Iterator[Duel]:
    rivals = [n for n, one in results.run["contenders"].items() if one["role"] == "peer" and one["comparable"]]
    for case in results.cases:
        measured = by_name(results, case)
        for peer in rivals:
            if "ours" in measured and peer in measured:
                against = ratio(measured["ours"].samples, measured[peer].samples)
                if against is not None:
                    yield Duel(case, peer, against)


def share_ahead(of: list[Duel]) -> tuple[int, int]:
    """Cases on which ours is ahead of every peer, of the cases with a peer."""
    cases = {duel.case for duel in of}
    return len(cases - {duel.case for duel in of if not duel.ahead}), len(cases)


def absent(results: Results) -> dict[str, dict[str, int]]:
    """Reasons of each peer that ran nowhere, with the number of cases; what no case asked of it is left out."""
    reasons: dict[str, dict[str, int]] = {}
    for name, contender in results.run["contenders"].items():
        all_cases = [by_name(results, case).get(name) for case in results.cases]
        here = [one for one in all_cases if one is not None]
        if contender["role"] == "peer" and here and not any(one.samples for one in here):
            stated = [one.unavailable for one in here if not one.unsuited] or [one.unavailable for one in here]
            reasons[name] = {reason: stated.count(reason) for reason in dict.fromkeys(stated)}
    return reasons


def gaps(results: Results) -> dict[str, dict[str, int]]:
    """Of the contenders that ran on some cases: why not on others, with the number of cases."""
    missing: dict[str, dict[str, int]] = {}
    gone = absent(results)
    for measured in results.cases.values():
        for one in measured:
            if one.unavailable and one.contender not in gone:
                counts = missing.setdefault(one.contender, {})
                counts[one.unavailable] = counts.get(one.unavailable, 0) + 1
    return {name: missing[name] for name in results.run["contenders"] if name in missing}


def groups(results: Results) -> dict[str, list[Case]]:
    """The cases that belong in one table: same part, activation, dtype and mode."""
    found: dict[str, list[Case]] = {}
    for case in results.case_list():
        part = "Routed FFN, routing given" if case.part == "ffn" else "Layer with router and balance loss"
        act = "GELU" if case.act == "gelu" else "SwiGLU"
        mode = "forward and backward" if case.mode == "train" else "few tokens, forward under no_grad"
        found.setdefault(f"{part}: {act}, {case.dtype}, {mode}", []).append(case)
    return found


def by_name(results: Results, case: str) -> dict[str, Measured]:
    return {one.contender: one for one in results.cases.get(case, [])}
