import copy
import io
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.errors import UserError
from moezoo.zoo.base import ZooModel
from safetensors.torch import load_file, save_file
from torch import nn


class Tiny(ZooModel):
    """Every kind of state: tied weights, overlapping views, a transposed and an integer buffer, an empty one."""

    def __init__(self, dim, widths=(3, 2), options=None, name="tiny"):
        super().__init__()
        self.first = nn.Linear(dim, widths[0])
        self.tied = nn.Linear(dim, widths[0], bias=False)
        self.tied.weight = self.first.weight
        self.norm = nn.BatchNorm1d(widths[0])
        storage = torch.randn(10)
        self.register_buffer("view", storage[2:6])
        self.register_buffer("overlapping", storage[4:9])
        self.register_buffer("transposed", torch.randn(dim, 5).T)
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("count", torch.randint(0, 99, (4,)))


class Wider(Tiny):
    pass


class Stateful(ZooModel):
    def __init__(self, size=1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def get_extra_state(self):
        return {"not": "a tensor"}

    def set_extra_state(self, state):
        pass


def _edit(folder: Path, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def _edit_weights(folder: Path, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path):
    Tiny(4).save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


def test_init_args_hold_defaults_and_what_was_given():
    model = Tiny(4, options={"rates": (0.1, 1), "deep": {"on": True}})
    expected = {"rates": [0.1, 1], "deep": {"on": True}}
    assert model.init_args == {"dim": 4, "widths": [3, 2], "options": expected, "name": "tiny"}
    assert json.loads(json.dumps(model.init_args)) == model.init_args


def test_init_args_are_a_copy():
    options = {"a": [1]}
    model = Tiny(4, options=options)
    options["a"].append(2)
    assert model.init_args["options"] == {"a": [1]}


@pytest.mark.parametrize(
    "value", [nn.ReLU(), torch.ones(2), Path("x"), float("nan"), [float("inf")], {1: 2}, {"a": [{2}]}, print]
)
def test_arguments_json_cannot_hold_are_refused_by_name(value):
    with pytest.raises(UserError, match=r"Tiny: argument 'options'"):
        Tiny(4, options=value)


def test_a_wrong_call_stays_a_type_error():
    with pytest.raises(TypeError, match="dimension"):
        Tiny(dimension=4)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_init_args(clone):
    model = Tiny(4, name="other")
    twin = clone(model)
    assert twin.init_args == model.init_args
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@settings(max_examples=15, deadline=None)
@given(dim=st.integers(1, 9), width=st.integers(1, 5), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_round_trip_is_exact(tmp_path_factory, dim, width, dtype):
    folder = tmp_path_factory.mktemp("round") / "weights"
    model = Tiny(dim, widths=[width, 1]).to(dtype)
    model.save_pretrained(folder)
    loaded = Tiny.from_pretrained(folder)
    assert loaded.init_args == model.init_args
    assert not loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].to(value.dtype), value), name


def test_tied_weights_are_stored_once_and_stay_tied(folder):
    assert "tied.weight" not in load_file(folder / "model.safetensors")
    model = Tiny.from_pretrained(folder)
    assert model.tied.weight is model.first.weight


def test_tied_weights_under_their_other_name_load_too(folder):
    before = Tiny.from_pretrained(folder).first.weight
    _edit_weights(folder, lambda t: t.update({"tied.weight": t.pop("first.weight")}))
    assert torch.equal(Tiny.from_pretrained(folder).first.weight, before)


def test_a_view_is_stored_without_the_rest_of_its_storage(folder):
    assert load_file(folder / "model.safetensors")["view"].untyped_storage().nbytes() == 4 * 4


def test_loading_leaves_the_random_state(folder):
    state = torch.get_rng_state()
    Tiny.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("first.bias"), r"missing key 'first.bias' \(3,\)"),
        (lambda t: t.update(extra=torch.ones(2, 5)), r"unexpected key 'extra' \(2, 5\)"),
        (
            lambda t: t.update({"first.bias": torch.ones(7)}),
            r"'first.bias' is \(7,\) in the file, \(3,\) in the model",
        ),
        (lambda t: t.update(count=torch.ones(4)), "'count': torch.float32 in the file, torch.int64 in the model"),
        (lambda t: t.pop("first.weight"), r"missing key 'first.weight' \(3, 4\).*missing key 'tied.weight'"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, edit, message):
    _edit_weights(folder, edit)
    with pytest.raises(UserError, match=message) as caught:
        Tiny.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trust_remote_code": True}, "unknown key 'trust_remote_code'"),
        ({"format": 2}, "format 2"),
        ({"init_args": ...}, "key 'init_args' is missing"),
        ({"init_args": [4]}, "init_args a mapping"),
        ({"init_args": {"dim": 4, "depth": 2}}, "depth"),
        ({"init_args": {}}, "dim"),
        ({"class_path": 3}, "class_path must be a string"),
    ],
)
def test_a_wrong_config_is_refused(folder, changes, message):
    _edit(folder, **changes)
    with pytest.raises(UserError, match=message):
        Tiny.from_pretrained(folder)


@pytest.mark.parametrize(
    "class_path",
    [
        "os.system",
        "evil_module.Evil",
        "moezoo.settings.cache_dir",
        "moezoo.zoo.base.nn",
        "moezoo.zoo.base.read_config",
        "moezoo.zoo.base.HfApi",
        "moezoo.zoo.base.ZooModel.from_pretrained",
        "moezoo.zoo.nowhere.Model",
        "moezoo.zoo..base.ZooModel",
        "moezoo.zoo.base.__builtins__",
        "moezoo.zooevil.base.ZooModel",
        "",
    ],
)
@pytest.mark.parametrize("cls", [ZooModel, Tiny])
def test_class_path_outside_the_zoo_is_refused(folder, tmp_path, class_path, cls):
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    _edit(folder, class_path=class_path, init_args={})
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(UserError, match=r" refused|this moezoo has no"):
            cls.from_pretrained(folder)
    finally:
        sys.path.remove(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_class_are_refused(folder):
    with pytest.raises(UserError, match="class_path"):
        Wider.from_pretrained(folder)
    _edit(folder, class_path="moezoo.zoo.base.ZooModel", init_args={})
    with pytest.raises(UserError, match=r"the weights are of moezoo\.zoo\.base\.ZooModel, not of .*Tiny"):
        Tiny.from_pretrained(folder)


class _Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_never_opened(folder, tmp_path, name):
    marker = str(tmp_path / "marker")
    (folder / "model.safetensors").unlink()
    torch.save(_Bomb(marker), folder / name)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        Tiny.from_pretrained(folder)
    assert not Path(marker).exists()
    torch.load(io.BytesIO((folder / name).read_bytes()), weights_only=False)  # the bomb is real
    assert Path(marker).exists()


def test_saving_replaces_weights_but_nothing_else(folder, tmp_path):
    model = Tiny(4, name="second")
    model.save_pretrained(folder)
    assert Tiny.from_pretrained(folder).init_args["name"] == "second"
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"holds 'thesis\.tex'"):
        model.save_pretrained(folder)
    assert (folder / "thesis.tex").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_a_failed_save_leaves_the_old_weights_and_no_litter(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="_extra_state"):
        Stateful().save_pretrained(folder)
    with pytest.raises(UserError, match="takes no key 'optimizer'"):
        Tiny(5).save_pretrained(folder, optimizer="adam")
    with pytest.raises(UnicodeEncodeError):
        Tiny(5).save_pretrained(folder, card="\ud800")  # fails after the weights are written
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_the_card_carries_the_metrics_as_model_index(tmp_path):
    metrics = {"session_auc": 0.71, "ndcg": 0.4}
    Tiny(4).save_pretrained(tmp_path / "w", recipe="ranking/tiny", dataset="journey", split="test", metrics=metrics)
    card = ModelCard.load(tmp_path / "w" / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "moezoo")
    assert {"moezoo", "ranking"} <= set(card.data.tags)
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == metrics
    assert {(r.dataset_name, r.dataset_split) for r in card.data.eval_results} == {("journey", "test")}
    assert 'moezoo.load("ranking/tiny")' in card.text


def test_an_undefined_metric_does_not_cost_the_weights(tmp_path):
    Tiny(4).save_pretrained(tmp_path / "w", metrics={"auc": 0.5, "tail": float("nan")})
    assert json.loads((tmp_path / "w" / "config.json").read_text())["metrics"] == {"auc": 0.5, "tail": None}
    results = ModelCard.load(tmp_path / "w" / "README.md").data.eval_results
    assert [result.metric_type for result in results] == ["auc"]


def test_from_pretrained_reads_the_hub_cache_offline(folder, tmp_path):
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / ("a" * 40)
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    model = Tiny.from_pretrained("org/tiny", cache_dir=tmp_path / "hub", local_files_only=True)
    assert torch.equal(model.count, load_file(snapshot / "model.safetensors")["count"])
    with pytest.raises(UserError, match="org/other: no such folder, and the Hub cannot be reached"):
        Tiny.from_pretrained("org/other", cache_dir=tmp_path / "hub", local_files_only=True)


def test_a_missing_folder_is_said_so(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Tiny.from_pretrained(tmp_path / "nothing")
