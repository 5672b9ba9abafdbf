import json
import os
import subprocess
import sys

import pytest
import torch
from moezoo.errors import UserError
from moezoo.zoo import weights_commands
from moezoo.zoo.base import ZooModel
from moezoo.zoo.transfer import sha256_of
from moezoo.zoo.weights import Pin, Places, load, publish, verify


@pytest.fixture
def places(tmp_path):
    return Places(tmp_path / "shipped", tmp_path / "cache", None)


@pytest.fixture
def ranker(tmp_path):
    """A real model of the zoo with its weights folder."""
    from moezoo.zoo.awmoe import AWMoE

    schema = {
        "fields": ["item", "brand"],
        "history_fields": ["item"],
        "query": ["query"],
        "dense": ["price"],
        "vocabulary": {"item": 50, "brand": 7, "query": 5},
    }
    model = AWMoE(schema, embedding_dim=4, num_experts=3)
    model.save_pretrained(tmp_path / "trained", recipe="ranking/small", version="1.0", metrics={"session_auc": 0.6})
    return model


def test_publish_then_load_by_name(ranker, places, tmp_path):
    url = (tmp_path / "published").as_uri()
    pin = publish(tmp_path / "trained", url)
    assert pin == publish(tmp_path / "trained", url)  # the same again is no change
    assert pin.bytes == (tmp_path / "trained" / "model.safetensors").stat().st_size
    store = Places(places.shipped, places.cache, url)
    expected = {"sha256": pin.sha256, "bytes": pin.bytes, "version": pin.version}
    assert pin == Pin.read(expected, "here")
    for loaded in (load("ranking/small", places=store), load("ranking/small", expected=expected, places=store)):
        assert type(loaded) is type(ranker)
        assert not loaded.training
        assert loaded.init_args == ranker.init_args
        for name, value in ranker.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
    assert verify("ranking/small", places=store) == places.cache / "ranking/small/1.0"


def test_a_published_version_never_changes_and_latest_never_goes_back(ranker, places, tmp_path):
    url, root = (tmp_path / "published").as_uri(), tmp_path / "published" / "ranking" / "small"
    publish(tmp_path / "trained", url)
    publish(tmp_path / "trained", url, version="0.9")
    assert json.loads((root / "latest.json").read_text())["version"] == "1.0"
    publish(tmp_path / "trained", url, version="1.10")
    assert json.loads((root / "latest.json").read_text())["version"] == "1.10"
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    ranker.save_pretrained(tmp_path / "trained", recipe="ranking/small", version="1.0", metrics={"session_auc": 0.7})
    with pytest.raises(UserError, match="published already with other files; choose a new version"):
        publish(tmp_path / "trained", url)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


class Stranger(ZooModel):
    """A model outside moezoo.zoo: nobody else could load it."""


def test_what_does_not_load_is_not_published(ranker, tmp_path):
    Stranger().save_pretrained(tmp_path / "stranger", recipe="ranking/stranger", version="1")
    with pytest.raises(UserError, match=r"class_path .* refused"):
        publish(tmp_path / "stranger", (tmp_path / "published").as_uri())
    ranker.save_pretrained(tmp_path / "trained")
    with pytest.raises(UserError, match="recipe and version are needed"):
        publish(tmp_path / "trained", (tmp_path / "published").as_uri())
    assert not (tmp_path / "published").exists()
    with pytest.raises(UserError, match="cannot be written to"):
        publish(tmp_path / "trained", "http://127.0.0.1:9/", name="ranking/small", version="1")


def test_commands(ranker, places, tmp_path, monkeypatch, capsys):
    url = (tmp_path / "published").as_uri()
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "home"))
    monkeypatch.setenv("MOEZOO_WEIGHTS", url)
    folder = tmp_path / "home" / "weights" / "ranking" / "small" / "1.0"

    def run(*argv):
        code = weights_commands.main(argv)
        return code, capsys.readouterr()

    code, printed = run("publish", str(tmp_path / "trained"), url)
    assert code == 0
    assert sha256_of(tmp_path / "trained" / "model.safetensors") in printed.out
    assert run("verify", "ranking/small")[0] == 2  # nothing local yet
    code, printed = run("download", "ranking/small", "--version", "1.0")
    assert (code, printed.out.strip()) == (0, str(folder))
    assert run("path", "ranking/small")[1].out.strip() == str(folder)
    listed = run("list")[1].out
    assert "ranking/small" in listed
    assert "cached" in listed
    assert "0.6" in run("show", "ranking/small")[1].out
    assert run("verify", "ranking/small")[0] == 0
    (folder / "README.md").write_text("changed")
    code, printed = run("verify")
    assert code == 2
    assert "README.md" in printed.out
    assert printed.err.count("\n") == 1
    assert "ranking/small" in run("path", "ranking/smal")[1].err
    with pytest.raises(SystemExit) as caught:
        weights_commands.main(["frobnicate"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_needs_no_torch():
    code = "import sys; from moezoo.zoo import weights_commands as w\ntry: w.main(['--help'])\nexcept SystemExit: pass"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nassert 'torch' not in sys.modules"],
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr
    assert "publish" in done.stdout
