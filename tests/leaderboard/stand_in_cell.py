"""Stands in for `moezoo fit` in test_run.py: keeps a journal, sleeps, leaves a result. Run as a script."""

import argparse
import os
import sys
import time
from pathlib import Path

import polars as pl
from moezoo.leaderboard.results import Hardware, MetricInfo, Parameters, Result
from moezoo.recipes import name_of, recipe_hash


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("journal", type=Path)
    parser.add_argument("sleep", type=float)
    parser.add_argument("--config")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--run_dir", type=Path)
    parser.add_argument("--resume", action="store_true")
    arguments, overrides = parser.parse_known_args()
    name = name_of(arguments.config)
    cell = f"{name}:{arguments.seed}"

    def write(event: str) -> None:
        with arguments.journal.open("a") as journal:  # short appends are atomic
            journal.write(f"{event} {cell} {os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\n")

    write("begin")
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    visits = arguments.run_dir / "visits"
    with visits.open("a") as file:
        file.write("x")
    time.sleep(arguments.sleep)
    if name.endswith("broken"):
        print("doing something\nValueError: the loss is nan")
        sys.exit(3)
    result = Result(
        recipe=name,
        dataset="made_up",
        split="test",
        seed=arguments.seed,
        metrics={"session_auc": 0.5 + arguments.seed / 100},
        metric_info={"session_auc": MetricInfo("max", "", 3)},
        dataset_fingerprint="f",
        parameters=Parameters(2, 1),
        flops_per_sample=None,
        train_seconds=arguments.sleep,
        hardware=Hardware("cpu", 1, None),
        versions={},
        git_commit=None,
        recipe_hash=recipe_hash(arguments.config, overrides),
        created="2026-01-01T00:00:00+00:00",
    )
    result.save(arguments.run_dir, pl.DataFrame({"unit": [1, 2, 3], "session_auc": [0.1, 0.2, None]}))
    write("end")


if __name__ == "__main__":
    main()
