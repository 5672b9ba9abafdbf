"""torchvision's object detectors with COCO's classes: weights from the user's file, folder or URL, checked first.

Two forms of weights are read: `.safetensors`, and the `.pth` files that torchvision publishes. A `.pth` is a pickle:
it is accepted only if its SHA-256 is the one in torchvision's file name, and read with `weights_only=True`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float64, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .. import settings
from ..errors import UserError
from .transfer import byte_bar, sha256_of

DETECTORS = (
    "ssdlite320_mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn_v2",
)


class Detected(NamedTuple):
    """Boxes of a picture (pixels, by falling score), their scores from 0 to 1 and classes by name."""

    boxes: Float64[np.ndarray, "boxes 4"]
    score: Float64[np.ndarray, " boxes"]
    category: list[str]


class Detector:
    """A torchvision detector in eval mode: `detector(picture)` gives what is seen in an RGB picture.

    Args:
        name: one of `DETECTORS`.
        weights: a file or folder, a URL (any of fsspec's), or None: the cache, else `MOEZOO_WEIGHTS/detectors/`,
            else torchvision's own address.
        device: where it runs.

    Raises:
        UserError: unknown name; weights that are missing, not torchvision's, or of another model.
    """

    def __init__(self, name: str, weights: str | None = None, device: torch.device | None = None) -> None:
        from torchvision.models import get_model, get_model_weights

        if name not in DETECTORS:
            raise UserError(f"--detector {name}: expected one of {', '.join(DETECTORS)}")
        published = get_model_weights(name)["DEFAULT"]
        self.name, self.categories = name, list(published.meta["categories"])
        self.file = find_weights(name, str(published.url), weights)
        state = _state(self.file, _checksum(str(published.url)))
        with torch.random.fork_rng(devices=[]):  # the first values are overwritten
            model: nn.Module = get_model(name, weights=None, weights_backbone=None, num_classes=len(self.categories))
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            what = str(error).split("\n", 2)[1].strip()[:160]
            raise UserError(f"{self.file}: weights of another model than {name} ({what})") from error
        self.device = device or torch.device("cpu")
        self._model = model.to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, picture: UInt8[np.ndarray, "height width 3"]) -> Detected:
        pixels = torch.from_numpy(picture).to(self.device).permute(2, 0, 1).float() / 255
        found = {key: value.cpu().numpy() for key, value in self._model([pixels])[0].items()}
        names = [self.categories[label] for label in found["labels"].tolist()]
        return Detected(found["boxes"].astype(np.float64), found["scores"].astype(np.float64), names)


def find_weights(name: str, url: str, given: str | None = None) -> Path:
    """The local file of a detector's weights, brought to the cache if need be; see `Detector`.

    Args:
        url: torchvision's address of the weights, whose file name ends in the first digits of their SHA-256.
    """
    file = url.rpartition("/")[2]
    if given is not None and "://" not in given:
        path = Path(given).expanduser()
        if path.is_file():
            return path
        names = [file, f"{name}.safetensors", "model.safetensors"]
        for candidate in names:
            if (path / candidate).is_file():
                return path / candidate
        what = f"no {' or '.join(names)} in it" if path.is_dir() else "no such file or folder"
        raise UserError(f"--detector-weights {path}: {what}; expected the file that {url} gives, or a safetensors file")
    if given is not None:
        return _cached([given], url)
    store = settings.weights_url()
    local = [] if store is None else [store if "://" in store else Path(store).expanduser().absolute().as_uri()]
    return _cached([*(f"{base.rstrip('/')}/detectors/{file}" for base in local), url], url)


def _cached(sources: Sequence[str], url: str) -> Path:
    """The file in the cache, else from the first source that has it."""
    target = settings.cache_dir() / "detectors" / sources[0].rpartition("/")[2]
    problems = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target.parent}: not writable ({error}); set MOEZOO_CACHE to a folder of yours") from error
    with FileLock(target.with_name(f".{target.name}.lock")):
        for source in () if target.is_file() else sources:
            try:
                _download(source, target, _checksum(url) if target.suffix == ".pth" else "")
                break
            except UserError:
                raise
            except Exception as error:  # every filesystem has its own errors
                problems.append(f"{source} ({' '.join(f'{type(error).__name__}: {error}'.split())[:160]})")
    if not target.is_file():
        raise UserError(
            f"no detector weights from {'; '.join(problems)}; bring {target.name} here and give --detector-weights "
            f"FILE, or give --tracks FILE, which needs no detector"
        )
    return target


def _download(source: str, target: Path, checksum: str) -> None:
    """The file appears when it is whole and its SHA-256 begins as it should."""
    part = target.with_name(f"{target.name}.part")
    try:
        with fsspec.open(source, "rb") as remote, part.open("wb") as local:
            size = getattr(remote, "size", None)
            with byte_bar(source.rpartition("/")[2], size or 0) as show:
                while chunk := remote.read(1 << 20):
                    local.write(chunk)
                    show(local.tell())
        got = sha256_of(part)
        if not got.startswith(checksum):
            raise UserError(f"{source}: sha256 begins {got[:8]}, expected {checksum}; it was not kept, try again")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _checksum(url: str) -> str:
    """The first digits of the SHA-256, from torchvision's file name `<model>-<digits>.pth`."""
    return url.rpartition("-")[2].partition(".")[0]


def _state(path: Path, checksum: str) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not readable as safetensors ({error})") from error
    got = sha256_of(path)
    if not got.startswith(checksum):
        raise UserError(
            f"{path}: sha256 begins {got[: len(checksum)]}, torchvision's file {checksum}; weights of another origin "
            f"are read as safetensors alone, since a .pth can hold code"
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
