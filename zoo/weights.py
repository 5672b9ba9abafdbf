"""Pretrained weights by name: shipped, cached or downloaded; checked before use, never unpickled.

A weights folder holds model.safetensors, config.json and README.md. A store (`MOEZOO_WEIGHTS`, any fsspec URL)
keeps one at `<url>/<domain>/<recipe>/<version>/` beside a manifest.json with the size and sha256 of each file,
and names the newest version in `<url>/<domain>/<recipe>/latest.json`.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from .. import settings
from ..errors import UserError
from .base import CARD, CONFIG, MANIFEST, WEIGHTS, ZooModel, read_config, read_json
from .model_card import model_card
from .transfer import Remote, sha256_of

__all__ = [
    "Pin", "Places", "download", "find", "known_names", "load", "load_folder", "model_card", "publish",
    "recipe_pin", "verify", "versions_in_cache",
]  # fmt: skip

_PACKAGE = Path(__file__).parents[1]
_FILES = (CONFIG, CARD, WEIGHTS)
_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # begins with a letter or digit: no "..", no hidden file, no absolute path
_LATEST = "latest.json"


@dataclass(frozen=True)
class Places:
    """Where weights are looked for, in this order: `shipped`, `cache` (<name>/<version>), the store at `url`."""

    shipped: Path
    cache: Path
    url: str | None

    @classmethod
    def from_settings(cls) -> "Places":
        """The wheel's zoo/pretrained, `MOEZOO_CACHE` and `MOEZOO_WEIGHTS`."""
        return cls(_PACKAGE / "zoo" / "pretrained", settings.cache_dir() / "weights", settings.weights_url())


@dataclass(frozen=True)
class Pin:
    """What model.safetensors of a recipe must be: hexadecimal sha256, size in bytes, version."""

    sha256: str
    bytes: int
    version: str

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str) -> "Pin":
        """A pin from a mapping with the keys sha256, bytes, version; `UserError` otherwise."""
        if set(values) != {"sha256", "bytes", "version"}:
            raise UserError(f"{where}: expected the keys sha256, bytes, version, got {', '.join(map(str, values))}")
        sha256, size = _checksum(values, where)
        return cls(sha256, size, _check_version(str(values["version"]), where))


def load(
    name_or_folder: str | Path,
    version: str | None = None,
    *,
    expected: Mapping[str, Any] | None = None,
    known: Iterable[str] = (),
    places: Places | None = None,
) -> ZooModel:
    """The pretrained model of a recipe ("ranking/awmoe") or of a weights folder, on the CPU, in eval mode.

    See `find` for the arguments. `UserError` when there are none, when they are damaged, or do not fit.
    """
    if _is_folder(name_or_folder):
        return load_folder(name_or_folder)
    return load_folder(find(str(name_or_folder), version, expected=expected, known=known, places=places))


def load_folder(folder: str | Path) -> ZooModel:
    """The model of a weights folder, of whichever class its config.json names in `moezoo.zoo`, in eval mode."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; expected one with {', '.join(_FILES)}")
    return ZooModel.from_pretrained(path)


def find(
    name: str,
    version: str | None = None,
    *,
    expected: Mapping[str, Any] | None = None,
    known: Iterable[str] = (),
    places: Places | None = None,
) -> Path:
    """The checked weights folder of a recipe: the shipped one, else the cached one, else a fresh download.

    `expected` (sha256, bytes, version) pins model.safetensors; None takes `recipe.weights` of the packaged
    recipe, and without that the store's manifest decides. `version` None is the pinned one, else the newest.
    `known` are further names to suggest when `name` is misspelt.
    """
    places = places or Places.from_settings()
    pin = _pin(name, version, expected)
    shipped = _shipped(name, version, pin, places)
    if shipped is not None:
        return shipped
    cached = _cached(name, _wanted(version, pin), places)
    fault = _fault(cached, pin) if cached else None
    if cached and fault is None:
        return cached
    if fault and places.url is None:
        raise UserError(f"{fault}; set MOEZOO_WEIGHTS to fetch it again, or delete {cached}")
    return download(name, version, expected=expected, known=known, places=places)


def download(
    name: str,
    version: str | None = None,
    *,
    expected: Mapping[str, Any] | None = None,
    known: Iterable[str] = (),
    places: Places | None = None,
) -> Path:
    """The checked folder of a recipe in the cache, brought there from the store unless it is there already.

    Processes that ask for the same weights wait for the first. A broken download goes on where it stopped.
    """
    places = places or Places.from_settings()
    pin = _pin(name, version, expected)
    if places.url is None:
        raise UserError(_nowhere(name, version, pin, known, places))
    remote = Remote(places.url)
    version = _wanted(version, pin) or _latest(remote, name)
    if version is None:
        raise UserError(f"{remote.shown(name)} has no weights{_suggestion(name, known, places)}")
    target = places.cache / name / version
    with _locked(places.cache / name, version):
        if target.is_dir():
            if _fault(target, pin) is None:
                return target
            shutil.rmtree(target)
        _fetch_folder(remote, name, version, pin, target, known, places)
    return target


def verify(
    name: str,
    version: str | None = None,
    *,
    expected: Mapping[str, Any] | None = None,
    places: Places | None = None,
) -> Path:
    """Check the local weights of a recipe against pin and manifest and build the model; their folder.

    Never downloads. `UserError` says what is missing or wrong.
    """
    places = places or Places.from_settings()
    pin = _pin(name, version, expected)
    folder = _shipped(name, version, pin, places) or _cached(name, _wanted(version, pin), places)
    if folder is None:
        raise UserError(f"{name}: no local weights to verify{_suggestion(name, (), places)}; download them first")
    if fault := _fault(folder, pin, manifest_needed=not folder.is_relative_to(places.shipped)):
        raise UserError(fault)
    load_folder(folder)
    return folder


def publish(folder: str | Path, url: str, *, name: str | None = None, version: str | None = None) -> Pin:
    """Copy a weights folder into the store at `url`; the pin to write under `recipe.weights`.

    `name` and `version` default to config.json's recipe and version. The model is built first, so that what is
    published loads. The manifest goes last but for latest.json: a broken upload is never taken for a whole one.
    A version is published once: `UserError` if the store holds it with other files.
    """
    folder = Path(folder).expanduser()
    load_folder(folder)
    config = read_config(folder)
    name, version = name or config.get("recipe"), version or config.get("version")
    if not name or not version:
        raise UserError(f"{folder / CONFIG}: recipe and version are needed to publish; give name and version")
    check_name(str(name))
    version = _check_version(str(version), str(folder / CONFIG))
    if not (folder / CARD).is_file():
        raise UserError(f"{folder / CARD}: no such file; published weights carry a model card")
    files = {file: {"sha256": sha256_of(folder / file), "bytes": (folder / file).stat().st_size} for file in _FILES}
    manifest = {"format": 1, "recipe": name, "version": version, "files": files}
    remote = Remote(url)
    remote.check_writable()
    base = f"{name}/{version}"
    there = remote.read_json(f"{base}/{MANIFEST}")
    if there is not None and there != manifest:
        raise UserError(f"{remote.shown(base)} is published already with other files; choose a new version")
    if there is None:
        texts = {f"{base}/{MANIFEST}": json.dumps(manifest, indent=2) + "\n"}
        remote.upload({f"{base}/{file}": folder / file for file in _FILES}, texts)
    newest = _latest(remote, name)
    if newest is None or _order(newest) < _order(version):
        latest = json.dumps({"format": 1, "version": version}) + "\n"
        remote.upload({}, {f"{name}/{_LATEST}": latest})
    return Pin(str(files[WEIGHTS]["sha256"]), int(str(files[WEIGHTS]["bytes"])), version)


def recipe_pin(name: str) -> Pin | None:
    """`recipe.weights` of a packaged recipe, None where there is no such recipe or it pins nothing."""
    path = _PACKAGE / "configs" / f"{check_name(name)}.yaml"
    if not path.is_file():
        return None
    recipe = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("recipe") or {}
    weights = recipe.get("weights")
    return Pin.read(weights, f"{path}: recipe.weights") if weights else None


def known_names(places: Places | None = None) -> list[str]:
    """Every name that weights may exist for: packaged recipes, shipped and cached folders."""
    places = places or Places.from_settings()
    recipes = {f"{path.parent.name}/{path.stem}" for path in (_PACKAGE / "configs").glob("*/*.yaml")}
    folders = {
        f"{path.parent.name}/{path.name}"
        for root in (places.shipped, places.cache)
        for path in root.glob("[!.]*/[!.]*/")
        if path.is_dir()
    }
    return sorted(recipes | folders)


def versions_in_cache(name: str, places: Places | None = None) -> list[str]:
    """Versions of a recipe's weights in the cache, oldest first."""
    folder = (places or Places.from_settings()).cache / check_name(name)
    if not folder.is_dir():
        return []
    return sorted((path.name for path in folder.iterdir() if re.fullmatch(_SEGMENT, path.name)), key=_order)


def check_name(name: str) -> str:
    """`name` if it reads <domain>/<recipe>, else `UserError`: a name becomes a path and must not climb."""
    if not re.fullmatch(f"{_SEGMENT}/{_SEGMENT}", name):
        raise UserError(f"{name!r} is neither a weights folder nor a name such as 'ranking/awmoe'")
    return name


def _is_folder(given: str | Path) -> bool:
    text = str(given)
    return isinstance(given, Path) or text.startswith(("/", ".", "~")) or (Path(text) / CONFIG).is_file()


def _pin(name: str, version: str | None, expected: Mapping[str, Any] | None) -> Pin | None:
    check_name(name)
    if version is not None:
        _check_version(version, name)
    if expected is None:
        pin = recipe_pin(name)
        return pin if pin is not None and version in (None, pin.version) else None
    pin = Pin.read(expected, f"{name}: expected weights")
    if version not in (None, pin.version):
        raise UserError(f"{name}: version {version} asked for, but the expected weights are version {pin.version}")
    return pin


def _wanted(version: str | None, pin: Pin | None) -> str | None:
    return version or (pin.version if pin else None)


def _check_version(version: str, where: str) -> str:
    if not re.fullmatch(_SEGMENT, version):
        raise UserError(f"{where}: version {version!r}, expected letters, digits, dots and dashes, e.g. '1.0'")
    return version


def _shipped(name: str, version: str | None, pin: Pin | None, places: Places) -> Path | None:
    folder = places.shipped / name
    if not (folder / CONFIG).is_file():
        return None
    held = read_config(folder).get("version")
    # Shipped weights that state no version answer to the pin alone.
    wanted = version if held is None else _wanted(version, pin)
    if wanted is not None and wanted != str(held):
        return None
    if fault := _fault(folder, pin, manifest_needed=False):
        raise UserError(f"{fault}; the installation is damaged, reinstall moezoo")
    return folder


def _cached(name: str, version: str | None, places: Places) -> Path | None:
    versions = versions_in_cache(name, places)
    chosen = version if version is not None else next(reversed(versions), None)
    return places.cache / name / chosen if chosen in versions else None


def _fault(folder: Path, pin: Pin | None, manifest_needed: bool = True) -> str | None:
    """What is wrong with a local weights folder, None when pin and manifest agree with its files."""
    wanted: dict[str, tuple[str, int]] = {}
    if manifest_needed or (folder / MANIFEST).is_file():
        try:
            wanted = _read_manifest(read_json(folder / MANIFEST), str(folder / MANIFEST))
        except UserError as error:
            return str(error)
    if pin:
        pinned = (pin.sha256, pin.bytes)
        if wanted.setdefault(WEIGHTS, pinned) != pinned:
            return f"{folder / MANIFEST}: {WEIGHTS} has sha256 {wanted[WEIGHTS][0]}, expected {pin.sha256}"
    for file, (sha256, size) in wanted.items():
        path = folder / file
        if not path.is_file():
            return f"{path}: no such file"
        if path.stat().st_size != size:
            return f"{path}: {path.stat().st_size} bytes, expected {size}"
        if (got := sha256_of(path)) != sha256:
            return f"{path}: sha256 is {got}, expected {sha256}"
    return None


def _read_manifest(manifest: Mapping[str, Any], where: str) -> dict[str, tuple[str, int]]:
    """File → (sha256, bytes). Only the three files of a weights folder are accepted, whatever a store lists."""
    files = manifest.get("files")
    if manifest.get("format") != 1 or not isinstance(files, dict):
        raise UserError(f"{where}: expected format 1 with files, got format {manifest.get('format')!r}")
    if set(files) != set(_FILES):
        odd = sorted(set(files) ^ set(_FILES))[0]
        raise UserError(f"{where}: {odd!r} is missing or foreign; expected exactly {', '.join(_FILES)}")
    return {file: _checksum(entry, f"{where}: {file}") for file, entry in files.items()}


def _checksum(entry: Any, where: str) -> tuple[str, int]:
    sha256, size = (entry.get("sha256"), entry.get("bytes")) if isinstance(entry, Mapping) else (None, None)
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise UserError(f"{where}: sha256 {sha256!r}, expected 64 hexadecimal digits")
    if type(size) is not int or size < 0:
        raise UserError(f"{where}: bytes {size!r}, expected a number of bytes")
    return sha256, size


def _latest(remote: Remote, name: str) -> str | None:
    latest = remote.read_json(f"{name}/{_LATEST}")
    return _check_version(str(latest.get("version")), remote.shown(f"{name}/{_LATEST}")) if latest else None


def _order(version: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", version) if part]


def _fetch_folder(
    remote: Remote,
    name: str,
    version: str,
    pin: Pin | None,
    target: Path,
    known: Iterable[str],
    places: Places,
) -> None:
    where = f"{name}/{version}/{MANIFEST}"
    manifest = remote.read_json(where)
    if manifest is None:
        raise UserError(f"{remote.shown(where)}: no such file{_suggestion(name, known, places)}")
    if (manifest.get("recipe"), manifest.get("version")) != (name, version):
        raise UserError(
            f"{remote.shown(where)} is of {manifest.get('recipe')} {manifest.get('version')}, not {name} {version}"
        )
    files = _read_manifest(manifest, remote.shown(where))
    if pin and files[WEIGHTS] != (pin.sha256, pin.bytes):
        raise UserError(
            f"{remote.shown(f'{name}/{version}/{WEIGHTS}')}: sha256 {files[WEIGHTS][0]} ({files[WEIGHTS][1]} bytes),"
            f" the recipe expects {pin.sha256} ({pin.bytes} bytes)"
        )
    partial = target.with_name(f".{version}.partial")  # kept when broken: the next run goes on from it
    partial.mkdir(exist_ok=True)
    for file, (sha256, size) in files.items():
        done = partial / file
        if not (done.is_file() and done.stat().st_size == size and sha256_of(done) == sha256):
            done.unlink(missing_ok=True)
            remote.fetch(f"{name}/{version}/{file}", done, size=size, sha256=sha256)
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    read_config(partial)
    partial.rename(target)


@contextmanager
def _locked(folder: Path, version: str) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f".{version}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process that downloads to {folder / version}", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        raise UserError(f"{folder}: not writable ({error}); set MOEZOO_CACHE to a folder of yours") from error
    try:
        yield
    finally:
        lock.release()


def _nowhere(name: str, version: str | None, pin: Pin | None, known: Iterable[str], places: Places) -> str:
    what = f"{name} {_wanted(version, pin) or ''}".strip()
    held = versions_in_cache(name, places)
    have = f" (cached versions: {', '.join(held)})" if held else ""
    return (
        f"no weights for {what}: none shipped, none in {places.cache}{have}{_suggestion(name, known, places)};"
        " set MOEZOO_WEIGHTS to the URL of a store (https, s3, gs, hf, file) or train with `moezoo fit`"
    )


def _suggestion(name: str, known: Iterable[str], places: Places) -> str:
    names = sorted({*known_names(places), *known})
    if name in names:
        return ""
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
