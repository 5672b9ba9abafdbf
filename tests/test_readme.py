"""The README's snippets work as printed, and its links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from moezoo import create_model, list_recipes
from moezoo.cli import main
from moezoo.zoo.weights import publish

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
SHORT = ["--trainer.max_epochs=1", "--data.epoch_sessions=64", "--data.batch_size=32"]


def blocks(language: str) -> list[str]:
    """The README's fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def commands() -> Iterator[list[str]]:
    """Words of each `moezoo` command in the README's shell blocks, without the word `moezoo`."""
    for line in "\n".join(blocks("bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if words and words[0] == "moezoo":
            yield words[1:]


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n")[0])
def test_python_snippets_run(code: str, tmp_path: Path) -> None:
    environment = {**os.environ, "MOEZOO_CACHE": str(tmp_path / "cache")}
    if "moezoo.load" in code and not (ROOT / "zoo/pretrained/ranking/awmoe").exists():
        create_model("ranking/awmoe").save_pretrained(tmp_path / "weights", recipe="ranking/awmoe", version="1")
        publish(tmp_path / "weights", (tmp_path / "store").as_uri())
        environment["MOEZOO_WEIGHTS"] = (tmp_path / "store").as_uri()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.Size(")


def test_own_data_snippets_train_and_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `fit` of own files in the README, on small files and for a few steps; then its `test` and `predict`."""
    monkeypatch.chdir(tmp_path)
    _write_own_files()
    fits = [words for words in commands() if words[0] == "fit" and "--data.source" in words]
    assert {words[words.index("--data.source") + 1] for words in fits} == {"long", "recbole", "fuxictr"}
    for words in fits:
        assert main([*words, *SHORT, "--overwrite"]) == 0, words
    uses = [words for words in commands() if words[0] in {"test", "predict"}]
    assert {words[0] for words in uses} == {"test", "predict"}
    for words in uses:
        assert main(words) == 0, words
    assert pl.read_csv("predictions.csv").columns[-3:] == ["rank", "score", "probability"]


def _write_own_files() -> None:
    """400 purchases in the three forms that the README names."""
    rows = range(400)
    user, item, time = (
        [(7 * i) % 20 for i in rows],
        [(i * i) % 30 for i in rows],
        [1_600_000_000 + 3600 * i for i in rows],
    )
    catalogue = {
        "item_id": range(30),
        "category": [f"c{i % 3}" for i in range(30)],
        "brand": [f"b{i % 4}" for i in range(30)],
    }
    events = pl.DataFrame({"user_id": user, "item_id": item, "timestamp": time})
    events.write_parquet("purchases.parquet")
    pl.DataFrame(catalogue).write_csv("items.csv")
    Path("ml-100k").mkdir()
    header = {"user_id": "user_id:token", "item_id": "item_id:token", "timestamp": "timestamp:float"}
    events.rename(header).write_csv("ml-100k/ml-100k.inter", separator="\t")
    histories = [[(i + j) % 30 for j in range(1 + i % 5)] for i in rows]
    rows_of_fuxictr = pl.DataFrame(
        {
            "label": [i % 2 for i in rows],
            "user_id": [i // 2 for i in rows],
            "item_id": item,
            "cate_id": [i % 3 for i in item],
            "item_history": ["^".join(map(str, h)) for h in histories],
            "cate_history": ["^".join(str(i % 3) for i in h) for h in histories],
        }
    )
    rows_of_fuxictr.head(300).write_csv("train.csv")
    rows_of_fuxictr.tail(100).write_csv("test.csv")


@pytest.mark.parametrize("page", PAGES)
def test_recipes_named_exist(page: str) -> None:
    named = re.findall(r"(?<![\w/])ranking/\w+(?![\w./])", (ROOT / page).read_text())
    assert set(named) <= {*list_recipes(), "ranking/foo"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / page).read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []
