"""The base of every zoo model: JSON-able arguments, strict safetensors weights, the Hub's folder layout."""

import importlib
import inspect
import json
import math
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError
from .model_card import model_card

CONFIG, WEIGHTS, CARD, MANIFEST = "config.json", "model.safetensors", "README.md", "manifest.json"
FORMAT = 1
REQUIRED_KEYS = frozenset({"format", "class_path", "init_args"})
OPTIONAL_KEYS = frozenset(
    {"recipe", "version", "metrics", "metric_info", "dataset", "split", "seed", "parameters"}
    | {"recipe_hash", "dataset_fingerprint", "git_commit", "versions", "created"}
)

_ZOO_CLASS = re.compile(r"(moezoo\.zoo(?:\.[A-Za-z]\w*)+)\.([A-Za-z]\w*)")
_CONFIG_LIMIT = 4 << 20  # bytes; a config is a few kilobytes, a larger one is not ours

T = TypeVar("T", bound="ZooModel")


class ZooModel(nn.Module, PyTorchModelHubMixin, library_name="moezoo", license="apache-2.0", tags=["moezoo"]):
    """A module that can be rebuilt from JSON: it takes scalars, lists, mappings and builds its parts.

    `init_args` holds the arguments the model was built with, defaults included. A constructor argument that
    JSON cannot hold raises `UserError`. The Hub mixin drops such arguments silently, loads non-strict and
    falls back to a pickle; here each of these is an error.
    """

    init_args: dict[str, Any]

    def __new__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        model: T = object.__new__(cls)
        arguments = _bind(cls, model, args, kwargs)
        if arguments is not None:
            # nn.Module's own __setattr__ is not ready before nn.Module.__init__.
            object.__setattr__(model, "init_args", arguments)
        return model

    @classmethod
    def class_path(cls) -> str:
        """Where the class lives, e.g. `moezoo.zoo.awmoe.AWMoE`."""
        return f"{cls.__module__}.{cls.__qualname__}"

    def save_pretrained(  # type: ignore[override]
        self, folder: str | Path, card: str | None = None, **extra: Any
    ) -> None:
        """Write `model.safetensors`, `config.json` and `README.md` into `folder`, all or nothing.

        `card` is the text of the model card, built from the config when None. `extra` are further keys of
        config.json, see `OPTIONAL_KEYS`; a number that is not finite becomes null. Names that share one tensor
        (tied weights) are stored once, under the first of them; `from_pretrained` gives it to all. Views of a
        larger storage are stored as copies. An existing weights folder is replaced; `UserError` if the folder
        holds anything else, if a key of `extra` is unknown, or if the model's state is not all tensors.
        """
        if unknown := sorted(set(extra) - OPTIONAL_KEYS):
            raise UserError(f"config.json takes no key {unknown[0]!r}; known keys: {', '.join(sorted(OPTIONAL_KEYS))}")
        config = {"format": FORMAT, "class_path": self.class_path(), "init_args": self.init_args}
        config |= {key: _as_json(value, key, nan_is_null=True) for key, value in extra.items() if value is not None}
        tensors = _tensors_to_store(self)
        with atomic_folder(Path(folder)) as new:
            save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
            (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (new / CARD).write_text(model_card(config) if card is None else card, encoding="utf-8")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[T],
        folder_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> T:
        """The model of a weights folder or of a Hub repository (`org/name`), on the CPU, in eval mode.

        Strict: `UserError` names every missing, unexpected or mis-shaped key, an unknown key of config.json,
        a class that is neither this one nor a subclass in `moezoo.zoo`. Reads safetensors only. Torch's
        random state stays as it was.
        """
        folder = Path(folder_or_hub_id).expanduser()
        if not folder.is_dir():
            folder = _download_from_hub(
                str(folder_or_hub_id),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        config = read_config(folder)
        model = _build(_model_class(cls, config["class_path"], folder / CONFIG), config["init_args"], folder / CONFIG)
        _load_weights(model, folder / WEIGHTS)
        return model.eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: str | None = None,
        commit_message: str = "Upload weights",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        **extra: Any,
    ) -> str:
        """Upload what `save_pretrained(folder, card, **extra)` writes to the Hub; the commit's URL."""
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "weights"
            self.save_pretrained(folder, card, **extra)
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(
                api.upload_folder(repo_id=repo, folder_path=folder, commit_message=commit_message, revision=branch)
            )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a weights folder; `UserError` when it is missing, malformed or has an unknown key."""
    path = folder / CONFIG
    config = read_json(path)
    if missing := sorted(REQUIRED_KEYS - set(config)):
        raise UserError(f"{path}: key {missing[0]!r} is missing; is this folder written by save_pretrained?")
    if unknown := sorted(set(config) - REQUIRED_KEYS - OPTIONAL_KEYS):
        raise UserError(f"{path}: unknown key {unknown[0]!r}; a newer moezoo may know it, this one refuses it")
    if config["format"] != FORMAT:
        raise UserError(f"{path}: format {config['format']!r}, this moezoo reads format {FORMAT}; upgrade moezoo")
    if not isinstance(config["class_path"], str) or not isinstance(config["init_args"], dict):
        raise UserError(f"{path}: class_path must be a string and init_args a mapping")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file; `UserError` when the file is missing, too large or no object."""
    try:
        size = path.stat().st_size
        if size > _CONFIG_LIMIT:
            raise UserError(f"{path}: {size} bytes, expected less than {_CONFIG_LIMIT}")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a weights folder holds {WEIGHTS}, {CONFIG} and {CARD}") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def zoo_class(class_path: str, where: Path | str) -> type[ZooModel]:
    """The `ZooModel` subclass at `class_path`, looked for in `moezoo.zoo` alone; else `UserError`."""
    match = _ZOO_CLASS.fullmatch(class_path)
    if match is None:
        raise UserError(f"{where}: class_path {class_path!r} refused, expected moezoo.zoo.<module>.<Class>")
    module_name, class_name = match.groups()
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # the module is there and lacks a library of its own
        found = None
    if found is None:
        raise UserError(f"{where}: this moezoo has no {class_path}; upgrade moezoo or check the spelling")
    if not (isinstance(found, type) and issubclass(found, ZooModel)):
        raise UserError(f"{where}: class_path {class_path!r} refused, it is not a ZooModel")
    return found


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A new empty folder that becomes `folder` when the block ends well and vanishes when it fails.

    An existing weights folder is replaced; `UserError` if it holds files of another kind.
    """
    folder = folder.expanduser().absolute()
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    new, old = (folder.with_name(f".{folder.name}.{kind}-{mark}") for kind in ("new", "old"))
    new.mkdir()
    try:
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a folder for the weights")
    if foreign := sorted({entry.name for entry in folder.iterdir()} - {CONFIG, WEIGHTS, CARD, MANIFEST}):
        raise UserError(f"{folder} holds {foreign[0]!r}, which is no part of a weights folder; give another folder")


def _bind(cls: type[ZooModel], model: ZooModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    # None when the call does not fit: __init__ says so itself, and copy calls __new__ with no arguments.
    signature = inspect.signature(cls.__init__)
    try:
        bound = signature.bind(model, *args, **kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    given: dict[str, Any] = {}
    for name, parameter in list(signature.parameters.items())[1:]:
        value = bound.arguments[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= value
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            given[name] = value
        elif value:
            raise UserError(f"{cls.__name__} takes named arguments only, got {value[0]!r} without a name")
    return {name: _as_json(value, f"{cls.__name__}: argument {name!r}") for name, value in given.items()}


def _as_json(value: Any, what: str, nan_is_null: bool = False) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            if nan_is_null:
                return None
            raise UserError(f"{what} is {value}, which JSON cannot hold; use null")
        return float(value)
    if isinstance(value, list | tuple):
        return [_as_json(item, f"{what}[{index}]", nan_is_null) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise UserError(f"{what} has the key {key!r}, expected a string")
        return {key: _as_json(item, f"{what}[{key!r}]", nan_is_null) for key, item in value.items()}
    raise UserError(
        f"{what} is a {type(value).__name__}, expected a JSON value (null, bool, int, float, str, list,"
        " mapping): zoo models build their own parts from such arguments"
    )


def _model_class(cls: type[T], class_path: str, where: Path) -> type[T]:
    # The class's own path needs no import, so a user's own subclass may load what it saved.
    found: Any = cls if class_path == cls.class_path() else zoo_class(class_path, where)
    if not issubclass(found, cls):
        raise UserError(f"{where}: the weights are of {class_path}, not of {cls.class_path()}")
    return found  # type: ignore[no-any-return]


def _build(cls: type[T], init_args: dict[str, Any], where: Path) -> T:
    try:
        inspect.signature(cls.__init__).bind(None, **init_args)
    except TypeError as error:
        raise UserError(f"{where}: init_args do not fit {cls.class_path()}: {error}") from error
    # The first values are overwritten: drawing them must not shift the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        return cls(**init_args)


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name → first name of the same tensor (same memory, shape, stride and type), for every name."""
    first: dict[tuple[Any, ...], str] = {}
    owner = {}
    for name, value in state.items():
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        owner[name] = first.setdefault(key, name) if value.numel() and not value.is_meta else name
    return owner


def _tensors_to_store(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{type(model).__name__}: {name!r} in the state is a {type(value).__name__}, not a tensor")
    stored, storages = {}, set()
    for name, owner in _aliases(state).items():
        if name != owner:
            continue
        value = state[name].detach().to("cpu").contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != value.nbytes:
            value = value.clone()  # safetensors refuses tensors that overlap
        storages.add(value.untyped_storage().data_ptr())
        stored[name] = value
    return stored


def _load_weights(model: ZooModel, path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file; only safetensors are read, never a pickle")
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    state = model.state_dict()
    owner = _aliases(state)
    held = {owner[name]: value for name, value in stored.items() if name in owner}
    full = stored | {name: held[first] for name, first in owner.items() if first in held}
    try:
        model.load_state_dict(full, strict=True)
        wrong = [
            f"{name!r}: {full[name].dtype} in the file, {value.dtype} in the model"
            for name, value in state.items()
            if full[name].is_floating_point() != value.is_floating_point()
        ]
    except RuntimeError as error:
        wrong = _differences(full, state) or [" ".join(str(error).split())]
    if wrong:
        raise UserError(f"{path} does not fit {model.class_path()}: {'; '.join(wrong)}")


def _differences(stored: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    missing = [f"missing key {name!r} {tuple(state[name].shape)}" for name in state if name not in stored]
    unexpected = [f"unexpected key {name!r} {tuple(stored[name].shape)}" for name in stored if name not in state]
    shapes = [
        f"{name!r} is {tuple(stored[name].shape)} in the file, {tuple(state[name].shape)} in the model"
        for name in state
        if name in stored and stored[name].shape != state[name].shape
    ]
    return missing + unexpected + shapes


def _download_from_hub(repo_id: str, **options: Any) -> Path:
    try:
        files = [hf_hub_download(repo_id, name, **options) for name in (CONFIG, WEIGHTS)]
    except HFValidationError:
        raise UserError(f"{repo_id}: no such folder, and no Hub repository name (org/name)") from None
    except LocalEntryNotFoundError as error:
        raise UserError(f"{repo_id}: no such folder, and the Hub cannot be reached") from error
    except HfHubHTTPError as error:
        raise UserError(f"{repo_id}: no such folder; the Hub says: {' '.join(str(error).split())}") from error
    return Path(files[0]).parent
