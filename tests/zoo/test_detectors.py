"""torchvision's detectors with weights from a file, a folder or a URL."""

import hashlib

import numpy as np
import pytest
import torch
from moezoo.errors import UserError
from moezoo.zoo import detectors
from moezoo.zoo.detectors import Detector, find_weights
from safetensors.torch import save_file
from torchvision.models import get_model

NAME = "ssdlite320_mobilenet_v3_large"


@pytest.fixture(scope="module")
def state():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_model(NAME, weights=None, weights_backbone=None).state_dict()


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(state, path)
    return path


def test_a_picture_gives_boxes_in_its_pixels_as_torchvision_does(file, state):
    picture = np.random.default_rng(0).integers(0, 255, (120, 200, 3), dtype=np.uint8)
    found = Detector(NAME, str(file))(picture)
    model = get_model(NAME, weights=None, weights_backbone=None)
    model.load_state_dict(state)
    with torch.inference_mode():
        expected = model.eval()([torch.from_numpy(picture).permute(2, 0, 1) / 255])[0]
    assert len(found.category) > 0
    np.testing.assert_allclose(found.boxes, expected["boxes"].numpy(), atol=1e-4)
    np.testing.assert_allclose(found.score, expected["scores"].numpy(), atol=1e-6)
    assert (np.diff(found.score) <= 0).all()
    assert ((found.boxes >= 0) & (found.boxes <= [200, 120, 200, 120])).all()


def test_a_folder_or_a_file_url_will_do_and_the_random_state_stays(file):
    before = torch.get_rng_state()
    assert Detector(NAME, str(file.parent)).file == file
    cached = Detector(NAME, file.as_uri()).file
    assert cached != file
    assert cached.read_bytes() == file.read_bytes()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pth_is_opened_only_if_it_is_torchvisions(state, tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    torch.save(state, path)
    with pytest.raises(UserError, match="torchvision's file a79551df; weights of another origin are read as safeten"):
        Detector(NAME, str(path))
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(detectors, "_checksum", lambda url: digits)
    assert Detector(NAME, str(path)).file == path


def test_a_download_with_a_wrong_sum_leaves_nothing(tmp_path, monkeypatch):
    source = tmp_path / "store" / "model-a79551df.pth"
    source.parent.mkdir()
    source.write_bytes(b"not it")
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="it was not kept"):
        find_weights(NAME, source.as_uri(), source.as_uri())
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"] == []


def test_the_store_of_weights_is_asked_first(state, tmp_path, monkeypatch):
    url = "https://download.pytorch.org/models/ssd-12345678.pth"
    held = tmp_path / "detectors" / "ssd-12345678.pth"
    held.parent.mkdir()
    held.write_bytes(b"x")
    monkeypatch.setattr(detectors, "_checksum", lambda url: hashlib.sha256(b"x").hexdigest()[:8])
    monkeypatch.setenv("MOEZOO_WEIGHTS", str(tmp_path))
    assert find_weights(NAME, url).read_bytes() == b"x"
    monkeypatch.setenv("MOEZOO_WEIGHTS", "file:///none/such")
    held.unlink()
    assert find_weights(NAME, url).read_bytes() == b"x"  # from the cache


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("none.pth", "no such file or folder"),
        (".", "no ssdlite320.*pth or .*in it"),
        ("none://bucket/model.pth", "no detector weights from none://bucket/model.pth .*Protocol not known"),
        ("file:///none/such/model.safetensors", "no detector weights from file:///none/such"),
        ("broken.safetensors", "not readable as safetensors"),
        ("other.safetensors", "weights of another model"),
    ],
)
def test_one_line_for_weights_that_will_not_do(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=message) as error:
        Detector(NAME, given)
    assert "\n" not in str(error.value)


def test_an_unknown_detector_is_told():
    with pytest.raises(UserError, match="expected one of ssdlite320"):
        Detector("yolo")
