"""Recipes: the YAML files in `configs/` that name a model, a dataset and a trainer.

A recipe is the registry entry. Reading, listing and hashing one needs YAML alone, no torch; `runs.py` builds
what it describes.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import UserError

if TYPE_CHECKING:
    from .zoo.base import ZooModel

CONFIGS = Path(__file__).parent / "configs"
KEYS = ("seed_everything", "trainer", "model", "data", "recipe")
# What may differ between two runs of the same recipe: seeds, machines and places.
_NOT_HASHED_TRAINER = {
    "accelerator", "devices", "num_nodes", "default_root_dir", "logger", "enable_progress_bar", "profiler",
}  # fmt: skip


@dataclass(frozen=True)
class RecipeInfo:
    """The `recipe:` block of a recipe: what a list, a card or a leaderboard says of it.

    Args:
        title: name on pages, e.g. "AW-MoE".
        kind: a mixture of experts, its dense counterpart, a rule without training, or another model of the field.
        twin_of: recipe whose dense twin this is, e.g. "ranking/awmoe".
        paper: citation of the source.
        cost: what the default run costs, e.g. "2 CPU-minutes".
        weights: sha256, bytes and version of the published weights, if any.
        own_files: which of `data.files` the user has to give, as data that may not ship; "" for none.
    """

    title: str
    kind: Literal["moe", "dense", "rule", "rival"]
    twin_of: str | None = None
    paper: str = ""
    cost: str = ""
    weights: dict[str, Any] | None = None
    own_files: str = ""


def list_recipes(pattern: str = "*") -> list[str]:
    """Names of the packaged recipes that match a shell pattern, e.g. `ranking/*`."""
    names = (path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.glob("*/*.yaml"))
    return sorted(name for name in names if fnmatch(name, pattern))


def resolve(name_or_path: str | Path) -> Path:
    """Path of a recipe, given its bare name (`ranking/awmoe`) or a path to a YAML file.

    Raises:
        UserError: nothing of that name; the message offers the nearest one.
    """
    text = str(name_or_path)
    packaged = CONFIGS / f"{text}.yaml"
    if text in list_recipes():
        return packaged
    path = Path(text)
    if path.is_file():
        return path
    if path.suffix in {".yaml", ".yml"}:
        raise UserError(f"--config {text}: no such file; `moezoo list` shows the packaged recipes")
    names = list_recipes()
    near = get_close_matches(text, names, n=1, cutoff=0.5) or [n for n in names if n.split("/")[-1] == text]
    hint = f"did you mean '{near[0]}'?" if near else "`moezoo list` shows what there is"
    raise UserError(f"--config {text}: no recipe of that name; {hint}")


def name_of(name_or_path: str | Path) -> str:
    """`<domain>/<recipe>` of a packaged recipe or of a user's file (its folder and stem), as results name it: other
    signs than letters, digits, `_`, `.` and `-` become `_`."""
    path = resolve(name_or_path).resolve()
    if path.name == "config.yaml":  # the copy in a run folder: runs/<domain>/<recipe>/s<seed>/config.yaml
        path = path.parent.parent
    domain = re.sub(r"[^a-z0-9_]+", "_", path.parent.name.lower()) or "own"
    return f"{domain}/{re.sub(r'[^A-Za-z0-9_.-]+', '_', path.stem)}"


def read(name_or_path: str | Path) -> dict[str, Any]:
    """The recipe's YAML as a dictionary.

    Raises:
        UserError: not YAML, not a mapping, or a top-level key that a recipe does not have.
    """
    import yaml

    path = resolve(name_or_path)
    try:
        content = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise UserError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping with the keys {', '.join(KEYS)}")
    for key in content:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key '{key}'; a recipe has {', '.join(KEYS)}")
    return content


def metadata(name_or_path: str | Path) -> RecipeInfo:
    """The recipe's `recipe:` block, checked."""
    block = read(name_or_path).get("recipe") or {}
    try:
        return RecipeInfo(**block)
    except TypeError as error:
        raise UserError(f"{resolve(name_or_path)}: recipe: {str(error).split('__init__() ')[-1]}") from None


def recipe_hash(name_or_path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Fingerprint of what a recipe computes: its config less seed, devices, paths and metadata.

    `overrides` are the command line's changes (`--model.lambda_cl=0`) in order. Sixteen hex digits.
    """
    config = read(name_or_path)
    kept = {key: config.get(key) for key in ("trainer", "model", "data")}
    kept["trainer"] = {k: v for k, v in (kept["trainer"] or {}).items() if k not in _NOT_HASHED_TRAINER}
    skipped = tuple(f"--trainer.{key}" for key in _NOT_HASHED_TRAINER)
    if (config.get("recipe") or {}).get("own_files"):
        skipped += ("--data.files.",)  # where the user keeps them; a result has the data's own fingerprint
    kept["overrides"] = [o for o in overrides if not o.startswith(skipped)]
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def join_values(words: Sequence[str]) -> list[str]:
    """Write `--key value` as `--key=value`, the one form in which changes enter the recipe hash.

    Raises:
        UserError: a word that belongs to no key.
    """
    joined: list[str] = []
    for word in words:
        if word.startswith("--"):
            joined.append(word)
        elif joined and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            raise UserError(f"{word!r}: expected changes as --key value or --key=value, e.g. --trainer.max_epochs 3")
    return joined


def import_class(class_path: str) -> Any:
    """The class behind a dotted path of this package, e.g. `moezoo.zoo.awmoe.AWMoE`."""
    module, _, name = class_path.rpartition(".")
    if not module.startswith("moezoo."):
        raise UserError(f"class_path {class_path}: expected a class of moezoo, e.g. moezoo.zoo.awmoe.AWMoE")
    return getattr(import_module(module), name)


def create_model(
    name: str, *, pretrained: bool = False, schema: Mapping[str, Any] | None = None, **changes: Any
) -> "ZooModel":
    """The recipe's model as a plain `nn.Module`, with random or (`pretrained=True`) published weights.

    Args:
        name: recipe, e.g. `ranking/awmoe`.
        schema: sizes of the data (`datamodule.schema`); default: those of the recipe's own data.
        changes: constructor arguments to change, e.g. `num_experts=8`.
    """
    if pretrained:
        from .zoo.weights import load

        if changes or schema is not None:
            raise UserError("create_model(pretrained=True) takes the published sizes: drop the other arguments")
        return load(name)
    recipe = read(name)
    model, data = recipe["model"]["init_args"]["model"], recipe["data"]
    build, arguments = import_class(model["class_path"]), {**model.get("init_args", {}), **changes}
    if "schema" in signature(build).parameters:
        if schema is None:
            schema = import_class(data["class_path"])(**data.get("init_args", {})).schema
        arguments["schema"] = dict(schema)
    return build(**arguments)  # type: ignore[no-any-return]
