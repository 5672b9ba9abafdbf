"""The command line end to end on a small file: what a run leaves, what resumes, and what a mistake costs."""

import json
import os
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
import pytorch_lightning as lightning
import torch
from moezoo import cli, recipes, runs
from moezoo.errors import UserError


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """A small long table: users with a taste for one kind of item."""
    import numpy as np

    rng = np.random.default_rng(0)
    rows = []
    for user in range(40):
        for basket in range(25):
            kind = int(rng.choice([user % 4, rng.integers(0, 4)]))
            items = np.unique(kind * 10 + rng.integers(0, 10, 3))
            rows += [(user, int(item), basket * 86_400 * 2 + user) for item in items]
    path = tmp_path_factory.mktemp("own") / "events.csv"
    pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").write_csv(path)
    return path


def arguments(events, *more):
    return [
        "fit", "--config", "ranking/awmoe", "--data.source=long", f"--data.files.events={events}",
        "--data.batch_size=64",
        "--model.model.hidden=8", "--trainer.max_epochs=2", "--trainer.accelerator=cpu", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(events, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "s3"
    assert cli.main([*arguments(events, "--run_dir", str(folder), "--seed", "3")]) == 0
    return folder


def test_a_run_leaves_weights_metrics_and_pictures(finished):
    left = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    assert {
        "config.yaml", "metrics.csv", "result.json", "units.parquet", "checkpoints/best.ckpt", "checkpoints/last.ckpt",
        "weights/model.safetensors", "weights/config.json", "weights/README.md", "pictures/auc_by_history.png",
        "pictures/routing_gate.png",
    } <= left  # fmt: skip
    result = json.loads((finished / "result.json").read_text())
    assert result["recipe"] == "ranking/awmoe" and result["seed"] == 3 and result["train_seconds"] > 0
    units = pl.read_parquet(finished / "units.parquet")
    assert units["session_auc"].mean() == pytest.approx(result["metrics"]["session_auc"])
    assert result["flops_per_sample"] > 0 and result["parameters"]["total"] > 0


def test_the_checkpoint_is_the_best_on_validation(finished):
    import torch

    history = pl.read_csv(finished / "metrics.csv")["val/session_auc"].drop_nulls()
    best = torch.load(finished / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == history.arg_max()


def test_testing_the_weights_again_gives_the_same_number(finished, capsys):
    silent = "--trainer.enable_progress_bar=false"
    assert cli.main(["test", "--config", str(finished / "config.yaml"), silent]) == 0
    auc = json.loads((finished / "result.json").read_text())["metrics"]["session_auc"]
    written = capsys.readouterr()
    assert f"{auc:.4f}" in written.out and "it/s" not in written.err + written.out


def test_predictions_are_a_table_with_the_users_own_ids(finished, events, tmp_path, capsys):
    for name in ("p.csv", "p.parquet"):
        out = tmp_path / name
        assert cli.main(["predict", "--config", str(finished / "config.yaml"), "--output", str(out)]) == 0
    table = pl.read_parquet(tmp_path / "p.parquet")
    assert table.height == pl.read_csv(tmp_path / "p.csv").height > 0
    assert set(table["item_id"]) <= set(pl.read_csv(events)["item_id"])
    best = table.group_by("session_id").agg(pl.col("score").sort_by("rank"))
    assert best.select(pl.col("score").list.eval(pl.element().diff().fill_null(0) <= 0).list.all())["score"].all()
    assert "rows written" in capsys.readouterr().out


def test_weights_of_other_data_are_refused(finished, capsys):
    assert cli.main(["test", "--config", "ranking/awmoe", "--weights", str(finished / "weights")]) == 2
    assert "trained on" in one_line(capsys)


def one_line(capsys):
    error = capsys.readouterr().err.strip().splitlines()
    told = [line for line in error if line.startswith("moezoo")]
    assert len(told) == 1 and "Traceback" not in "\n".join(error)
    return told[0]


def test_a_folder_with_a_run_is_not_touched_unasked(finished, events, capsys):
    before = (finished / "result.json").read_bytes()
    assert cli.main(arguments(events, "--run_dir", str(finished))) == 2
    assert "--resume, --overwrite or another --run_dir" in one_line(capsys)
    again = arguments(events, "--run_dir", str(finished), "--seed", "3", "--resume")
    assert cli.main([*again, "--model.model.num_experts=8"]) == 2
    assert "started with another 'model'" in one_line(capsys)
    assert cli.main(again) == 0  # finished: nothing to do
    assert (finished / "result.json").read_bytes() == before


def test_overwrite_spares_a_folder_that_is_no_run(events, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert cli.main(arguments(events, "--run_dir", str(tmp_path), "--overwrite")) == 2
    assert "not a run folder" in one_line(capsys)
    assert (tmp_path / "thesis.txt").exists()


MISTAKES = {
    "misspelt recipe": (["fit", "--config", "ranking/awmo"], "did you mean 'ranking/awmoe'"),
    "missing recipe": (["fit", "--config", "nowhere.yaml"], "no such file"),
    "no recipe": (["fit"], "--config"),
    "misspelt command": (["fti"], "did you mean 'fit'"),
    "misspelt trainer flag": (["fit", "--config", "ranking/awmoe", "--trainer.max_epoch=1"], "max_epoch"),
    "unknown model argument": (
        ["fit", "--config", "ranking/awmoe", "--model.model.experts=4"],
        "'model.model.experts' is",
    ),
    "wrong type": (
        ["fit", "--config", "ranking/awmoe", "--data.batch_size=many"],
        ": data.batch_size: expected int, got many",
    ),
    "wrong choice": (
        ["fit", "--config", "rewards/dmoerm", "--model.model.route=x"],
        "route: expected one of 'predicted'",
    ),
    "no batch": (["fit", "--config", "ranking/awmoe", "--data.batch_size=0"], "data.batch_size=0: expected at least 1"),
    "wrong type for a source": (
        ["fit", "--config", "rewards/dmoerm", "--data.files.conflict=maybe"],
        "data.files.conflict: expected bool, got maybe",
    ),
    "missing file": (
        ["fit", "--config", "ranking/awmoe", "--data.source=long", "--data.files.events=no.csv"],
        "no.csv",
    ),
    "gate without query": (
        ["fit", "--config", "ranking/linear", "--data.cross_features=false"],
        "set data.cross_features to true",
    ),
    "missing weights": (["test", "--config", "ranking/din", "--weights", "/nowhere/at/all"], "/nowhere/at/all"),
    "wrong output": (["predict", "--config", "ranking/awmoe", "--output", "x.txt"], ".parquet or .csv"),
    "unknown recipe to show": (["show", "ranking/diin"], "did you mean 'ranking/din'"),
    "nothing listed": (["list", "chess/*"], "no recipe matches"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_exit_code_2_and_leaves_nothing(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, message = MISTAKES[case]
    assert cli.main(words) == 2
    assert message in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user_id,item_id\n1,2\n", "timestamp"),
        ("", "empty"),
        ("user_id,item_id,timestamp\n1,2,soon\n", "timestamp"),
    ],
)
def test_a_bad_file_leaves_no_folder(content, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "events.csv").write_text(content)
    assert cli.main(arguments("events.csv")) == 2
    told = one_line(capsys)
    assert "events.csv" in told and message in told
    assert [p.name for p in tmp_path.iterdir()] == ["events.csv"]


def test_a_killed_run_resumes_where_it_stopped(events, tmp_path):
    """kill -9 after the first epoch: the second start does the remaining epochs and keeps the history."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "moezoo.cli", *arguments(events, "--run_dir", str(folder), "--resume")]
    command += ["--trainer.max_epochs=6"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not (folder / "checkpoints" / "last.ckpt").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (folder / "result.json").exists()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    epochs = pl.read_csv(folder / "metrics.csv").filter(pl.col("val/session_auc").is_not_null())["epoch"].to_list()
    assert sorted(epochs) == list(range(6)), "an epoch was lost or done twice"


class Worsening(lightning.LightningModule):
    """Its first epoch is its best."""

    monitor, mode = "val/loss", "min"

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.model(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", float(self.current_epoch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_the_last_epoch_is_kept_beside_the_best(tmp_path):
    task, loader = Worsening(), torch.utils.data.DataLoader(torch.ones(4, 1))
    lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=runs._checkpoints(tmp_path, task), default_root_dir=tmp_path,
    ).fit(task, loader, loader)  # fmt: skip
    epochs = {
        name: torch.load(tmp_path / "checkpoints" / f"{name}.ckpt", weights_only=True)["epoch"]
        for name in ("best", "last")
    }
    assert epochs == {"best": 0, "last": 2} and len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_ctrl_c_is_one_line_and_exit_code_130(events, tmp_path):
    command = [sys.executable, "-m", "moezoo.cli", *arguments(events, "--run_dir", str(tmp_path / "run"))]
    process = subprocess.Popen(
        [*command, "--trainer.max_epochs=1000"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "moezoo: interrupted" in error and "Traceback" not in error


def test_help_and_version_answer(capsys):
    assert cli.main([]) == 0 and cli.main(["--version"]) == 0
    assert "moezoo fit --config ranking/awmoe" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        cli.main(["fit", "--help"])
    assert done.value.code == 0


def test_recipes_are_read_strictly(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("trainer: {}\nmodle: {}\n")
    with pytest.raises(UserError, match="unknown key 'modle'"):
        recipes.read(path)
    path.write_text("trainer: [\n")
    with pytest.raises(UserError, match=r"line 2.*not valid YAML"):
        recipes.read(path)


def test_the_hash_knows_what_changes_a_result_from_what_does_not(tmp_path):
    text = recipes.resolve("ranking/awmoe").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("seed_everything: 0", "seed_everything: 7").replace("devices: 1", "devices: 2"))
    same = recipes.recipe_hash("ranking/awmoe")
    assert recipes.recipe_hash(path) == same
    assert recipes.recipe_hash(path, ["--trainer.accelerator=cpu"]) == same
    assert recipes.recipe_hash(path, ["--model.model.num_experts=8"]) != same
    path.write_text(text.replace("num_experts: 4", "num_experts: 5"))
    assert recipes.recipe_hash(path) != same


def test_a_users_recipe_and_file_may_bear_any_name(tmp_path):
    from moezoo import recipes

    own = tmp_path / "My Project" / "len (v2).yaml"
    own.parent.mkdir()
    own.write_text(recipes.resolve("rewards/length_rule").read_text())
    assert recipes.name_of(own) == "my_project/len_v2_"
    rows = [{"prompt": f"p{i}", "chosen": "a good answer", "rejected": "bad"} for i in range(60)]
    pl.DataFrame(rows).write_ndjson(tmp_path / "my pairs (v2).jsonl")
    pl.DataFrame(rows[::-1]).write_csv(tmp_path / "later.csv")
    run = tmp_path / "run"
    mine = ["--data.source=files", f"--data.files.path={tmp_path / 'my pairs (v2).jsonl'}"]
    assert cli.main(["fit", "--config", str(own), "--run_dir", str(run), *mine]) == 0
    assert json.loads((run / "result.json").read_text())["dataset"] == "my_pairs_v2_"


def test_weights_of_texts_judge_other_files_of_the_same_tasks(tmp_path, capsys):
    rows = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad", "task": "ab"[i % 2]} for i in range(60)]
    pl.DataFrame(rows).write_ndjson(tmp_path / "train.jsonl")
    pl.DataFrame(rows[::-1]).write_csv(tmp_path / "later.csv")
    pl.DataFrame([row | {"task": "c"} for row in rows]).write_csv(tmp_path / "others.csv")
    run = tmp_path / "run"
    begin = ["--config", "rewards/bow_linear", "--data.source=files"]
    assert cli.main(["fit", *begin, "--run_dir", str(run), f"--data.files.path={tmp_path / 'train.jsonl'}"]) == 0
    test = ["test", *begin, "--weights", str(run / "weights"), "--data.tasks=[a, b]"]
    assert cli.main([*test, f"--data.files.path={tmp_path / 'later.csv'}"]) == 0
    capsys.readouterr()
    assert cli.main([*test[:-1], f"--data.files.path={tmp_path / 'others.csv'}"]) == 2
    assert "trained on train, but the data is others" in one_line(capsys)
