"""Synthetic preferences with a known gold reward: the default data of the domain.

Five tasks and their 27 capability points are DMoERM's (Quan 2024). Words of the prompt give the task away, words of a
response show how much it has of each capability, and the gold reward is the task's weighted sum of them. Capabilities
that several tasks share count with opposite signs (`conflict`), which is what disturbs one reward model for all tasks.
People judge the sum with logistic noise; a judge model is asked for one capability at a time, in both orders, and its
answers are kept where they agree.
"""

from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Int

from ..errors import UserError
from .rewards_lexicon import CAPABILITIES, CONFLICTING, FILLERS, REQUESTS, TASKS
from .rewards_table import PAIRS, POOLS, Preferences

NAME = "gold_rm"
STRENGTHS = (1.5, 1.0, 0.5, -0.5, -1.0, -1.5)  # of a lexicon's words, two words each
_SAYS = 3  # most words a response says of a capability
_SPREAD = 0.8  # how strongly the hidden level of a capability moves the choice of its words
_REQUEST_WORDS = 8  # of a prompt
_JUDGE_NOISE, _JUDGE_BIAS = 0.6, 0.6  # logistic scale of the judge's error, its lean to the first place; in levels


class _Responses(NamedTuple):
    """Texts, and their level of each capability of the task."""

    text: list[str]
    level: Float[np.ndarray, "rows capabilities"]


def generate(
    seed: int = 0,
    conflict: bool = True,
    pairs_per_task: int = 5000,
    capability_pairs: int = 600,
    eval_pairs: int = 400,
    pools_per_task: int = 12,
    candidates: int = 64,
    noise: float = 0.3,
    conflict_weight: float = 1.0,
) -> Preferences:
    """Draws pairs and pools; the same arguments give the same data anywhere.

    Args:
        seed: of everything drawn.
        conflict: capabilities shared by tasks count with opposite signs; otherwise all count for good.
        pairs_per_task: human pairs to train on.
        capability_pairs: pairs the judge is asked about, for each of the 27 capabilities; a tenth as many validate.
        eval_pairs: human pairs of a task to validate on, and gold pairs to test on.
        pools_per_task: prompts of the test with many responses.
        candidates: responses of such a prompt.
        noise: share of human labels that contradict the gold reward.
        conflict_weight: weight of the shared capabilities; the others have 1.

    Raises:
        UserError: a count below 1, or noise outside (0, 0.5).
    """
    counts = {"pairs_per_task": pairs_per_task, "capability_pairs": capability_pairs, "eval_pairs": eval_pairs}
    for name, value in (counts | {"pools_per_task": pools_per_task, "candidates": candidates}).items():
        if value < 1:
            raise UserError(f"data.files.{name}={value}: expected at least 1")
    if not 0.0 < noise < 0.5:
        raise UserError(f"data.files.noise={noise}: expected a share above 0 and below 0.5, e.g. 0.3")
    rng = np.random.default_rng(seed)
    writer = _Writer(rng)
    human = {"train": pairs_per_task, "valid": eval_pairs, "test": eval_pairs}
    judged = {"train": capability_pairs, "valid": max(capability_pairs // 10, 1)}
    tables, pools, asked, kept = [], [], 0, 0
    for task, names in TASKS.items():
        weights = task_weights(task, conflict, conflict_weight)
        for split, count in human.items():
            prompts, one, two = (
                writer.prompts(task, count),
                writer.responses(task, count),
                writer.responses(task, count),
            )
            gain = (one.level - two.level) @ weights
            wins = gain > 0 if split == "test" else noisy(gain, noise, rng)
            agree = (wins == (gain > 0)).astype(float)
            tables.append(_pairs(task, split, None, prompts, one.text, two.text, wins, gain != 0, agree))
        for k, name in enumerate(names):
            for split, count in judged.items():
                prompts = writer.prompts(task, count)
                one, two = writer.responses(task, count), writer.responses(task, count)
                wins, steady = judge(one.level[:, k] - two.level[:, k], rng)
                asked, kept = asked + count, kept + int(steady.sum())
                tables.append(_pairs(task, split, name, prompts, one.text, two.text, wins, steady, None))
        pools.append(_pools(writer, task, pools_per_task, candidates, weights))
    pairs = pl.concat(tables).with_columns(id=pl.int_range(pl.len()).cast(pl.String))
    return Preferences(
        name=NAME if conflict else f"{NAME}_calm",
        tasks=[{"name": task, "capabilities": list(names)} for task, names in TASKS.items()],
        pairs=pairs.with_columns(group_id=pl.col("id")).select(*PAIRS),
        pools=pl.concat(pools),
        tokenizer="lexicon",
        notes=[f"judge asked about {asked:,} pairs in both orders, {kept / asked:.1%} kept"],
    )


def task_weights(task: str, conflict: bool = True, conflict_weight: float = 1.0) -> Float[np.ndarray, " capabilities"]:
    """What each capability of a task counts in its gold reward."""
    signs = CONFLICTING[task]
    weights = [signs.get(name, 0.0) * conflict_weight or 1.0 for name in TASKS[task]]
    return np.array(weights) if conflict else np.abs(weights)


def noisy(gain: Float[np.ndarray, " pairs"], noise: float, rng: np.random.Generator) -> Bool[np.ndarray, " pairs"]:
    """Verdicts of people: Bradley-Terry with the scale at which a share `noise` of them contradicts the gain's sign."""
    low, high = 1e-3, 1e3
    for _ in range(60):
        scale = (low * high) ** 0.5
        wrong = (1 / (1 + np.exp(np.clip(np.abs(gain) / scale, None, 60)))).mean()
        low, high = (scale, high) if wrong < noise else (low, scale)
    verdicts: Bool[np.ndarray, " pairs"] = gain / scale + rng.logistic(size=len(gain)) > 0
    return verdicts


def judge(
    gain: Float[np.ndarray, " pairs"], rng: np.random.Generator
) -> tuple[Bool[np.ndarray, " pairs"], Bool[np.ndarray, " pairs"]]:
    """A judge model's verdicts on one capability, and which of them stay when the responses change places.

    Each answer errs on its own, and leans to the response that stands first.
    """
    here, there = (gain + side * _JUDGE_BIAS + rng.logistic(0.0, _JUDGE_NOISE, len(gain)) > 0 for side in (1, -1))
    return here, here == there


class _Writer:
    """Draws texts: words by their index, whole columns at a time."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.requests = np.array([REQUESTS[task].split() for task in TASKS])
        self.fillers = np.array(FILLERS.split())
        order = {name: _lexicon(name) for name in CAPABILITIES}
        self.lexicon = {task: np.array([order[name] for name in names]) for task, names in TASKS.items()}

    def prompts(self, task: str, count: int) -> list[str]:
        """Some words of the task, now and then one of another task, and fillers."""
        own, shape = list(TASKS).index(task), (count, _REQUEST_WORDS)
        of = np.where(self.rng.random(shape) < 0.1, self.rng.integers(0, len(TASKS), shape), own)
        words = self.requests[of, self.rng.integers(0, self.requests.shape[1], shape)]
        fillers = self.fillers[self.rng.integers(0, len(self.fillers), shape)]
        kind = self.rng.random(shape)
        kind[:, 0] = 0.0  # no prompt without a word of a task
        return [" ".join(row) for row in np.where(kind < 0.5, words, fillers).tolist()]

    def responses(self, task: str, count: int) -> _Responses:
        """Of each capability one to three words, leaning to its hidden level, shuffled with up to eight fillers."""
        lexicon = self.lexicon[task]
        shape = (count, len(lexicon), _SAYS)
        strengths = np.repeat(STRENGTHS, 2)
        hidden = self.rng.normal(size=shape[:2])[..., None, None]
        lean = _SPREAD * hidden * strengths + self.rng.gumbel(size=(*shape, len(strengths)))
        pick = lean.argmax(-1)
        said = np.arange(_SAYS) < self.rng.integers(1, _SAYS + 1, shape[:2])[..., None]
        level = (strengths[pick] * said).sum(-1)
        words = lexicon[np.arange(len(lexicon))[None, :, None], pick]
        words = np.where(said, words, "").reshape(count, -1)
        extra = self.fillers[self.rng.integers(0, len(self.fillers), (count, 8))]
        extra[np.arange(8) >= self.rng.integers(0, 9, count)[:, None]] = ""
        words = np.concatenate([words, extra], 1)
        words = np.take_along_axis(words, self.rng.random(words.shape).argsort(1), 1)
        return _Responses([" ".join(word for word in row if word) for row in words.tolist()], level)


def _lexicon(name: str) -> list[str]:
    """Words of a capability from the most of it to the least, as `STRENGTHS` has them."""
    much, little = CAPABILITIES[name]
    return [*much.split(), *reversed(little.split())]


def _pairs(
    task: str,
    split: str,
    capability: str | None,
    prompts: list[str],
    one: list[str],
    two: list[str],
    wins: Bool[np.ndarray, " pairs"],
    keep: Bool[np.ndarray, " pairs"],
    agree: Float[np.ndarray, " pairs"] | None,
) -> pl.DataFrame:
    table = pl.DataFrame({"prompt": prompts, "one": one, "two": two, "wins": wins, "keep": keep})
    first = pl.when("wins")
    return (
        table.with_columns(
            source=pl.lit(NAME),
            task=pl.lit(task),
            subset=pl.lit(task if capability is None else f"{task}/{capability}"),
            split=pl.lit(split),
            chosen=first.then("one").otherwise("two"),
            rejected=first.then("two").otherwise("one"),
            capability=pl.lit(capability, pl.String),
            margin=pl.lit(None, pl.Float64),
            agree=pl.lit(None, pl.Float64) if agree is None else pl.Series(agree),
        )
        .filter("keep")
        .drop("one", "two", "wins", "keep")
    )


def _pools(
    writer: _Writer, task: str, count: int, candidates: int, weights: Float[np.ndarray, " capabilities"]
) -> pl.DataFrame:
    """Each prompt with its candidates; gold is the task's reward in units of its spread over responses."""
    responses = writer.responses(task, count * candidates)
    gold = responses.level @ weights
    owner: Int[np.ndarray, " rows"] = np.repeat(np.arange(count), candidates)
    prompts = writer.prompts(task, count)
    spread = _reference_spread(weights)
    table = pl.DataFrame(
        {
            "pool": [f"{task}-{i}" for i in owner],
            "prompt": [prompts[i] for i in owner],
            "response": responses.text,
            "gold": gold / spread,
        }
    )
    return table.with_columns(source=pl.lit(NAME), task=pl.lit(task)).select(*POOLS)


def _reference_spread(weights: Float[np.ndarray, " capabilities"]) -> float:
    """A unit for gold rewards that is the same for all draws."""
    return float(np.sqrt((weights**2).sum()))
