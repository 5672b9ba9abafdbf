"""`moezoo weights`: list, show, download, verify and publish pretrained weights."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str]) -> int:
    """Run one verb; 0 when it went well, 2 (and one line on stderr) for a mistake of the user."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.verb(arguments)
    except UserError as error:
        print(f"moezoo weights: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="moezoo weights", description="Pretrained weights: shipped, cached, published.")
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=_Parser)

    def add(name: str, verb: object, text: str) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(verb=verb)
        return command

    add("list", _list, "Weights on this machine and the ones recipes pin.")
    for name, verb, text in (
        ("show", _show, "Config, files and metrics of local weights."),
        ("path", _path, "Print the folder of the weights, downloading them if need be."),
        ("download", _download, "Bring weights from MOEZOO_WEIGHTS into the cache."),
    ):
        command = add(name, verb, text)
        command.add_argument("name", metavar="NAME", help="a recipe, e.g. ranking/awmoe")
        command.add_argument("--version", help="default: the pinned one, else the newest")
    command = add("verify", _verify, "Check sizes and sums of local weights and build the model.")
    command.add_argument("name", metavar="NAME", nargs="?", help="default: all local weights")
    command.add_argument("--version")
    command = add("publish", _publish, "Copy a weights folder into a store.")
    command.add_argument("folder", metavar="FOLDER")
    command.add_argument("url", metavar="URL", help="fsspec URL: s3://, gs://, hf://, file://")
    command.add_argument("--name", help="default: recipe in config.json")
    command.add_argument("--version", help="default: version in config.json")
    return parser


def _list(_: argparse.Namespace) -> None:
    from .base import WEIGHTS, read_config
    from .weights import Places, known_names, recipe_pin, versions_in_cache

    places = Places.from_settings()
    rows = []
    for name in known_names(places):
        shipped = places.shipped / name
        folders = [("shipped", shipped)] if (shipped / WEIGHTS).is_file() else []
        folders += [("cached", places.cache / name / version) for version in versions_in_cache(name, places)]
        for where, folder in folders:
            try:
                config = read_config(folder)
                size = f"{(folder / WEIGHTS).stat().st_size / 1e6:.2f} MB"
            except (UserError, OSError):
                config, size = {"class_path": "damaged: see moezoo weights verify"}, ""
            version = folder.name if where == "cached" else str(config.get("version") or "")
            rows.append((name, where, version, size, config["class_path"]))
        if not folders and (pin := recipe_pin(name)):
            rows.append((name, "remote", pin.version, f"{pin.bytes / 1e6:.2f} MB", ""))
    _table(("name", "where", "version", "size", "class"), rows)


def _show(arguments: argparse.Namespace) -> None:
    import json

    from .base import CARD, CONFIG, WEIGHTS, read_config
    from .transfer import sha256_of
    from .weights import find

    folder = find(arguments.name, arguments.version)
    config = read_config(folder)
    rows = [("folder", str(folder))]
    rows += [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in config.items()]
    for file in (CONFIG, CARD, WEIGHTS):
        path = folder / file
        if path.is_file():
            rows.append((file, f"{path.stat().st_size} bytes, sha256 {sha256_of(path)}"))
    _table(("key", "value"), rows)


def _path(arguments: argparse.Namespace) -> None:
    from .weights import find

    print(find(arguments.name, arguments.version))


def _download(arguments: argparse.Namespace) -> None:
    from .weights import download

    print(download(arguments.name, arguments.version))


def _verify(arguments: argparse.Namespace) -> None:
    from .weights import Places, known_names, verify, versions_in_cache

    if arguments.name:
        print(f"ok {verify(arguments.name, arguments.version)}")
        return
    places = Places.from_settings()
    faults = []
    for name in known_names(places):
        versions: list[str | None] = [*versions_in_cache(name, places)]
        if (places.shipped / name).is_dir():
            versions.append(None)
        for version in versions:
            try:
                print(f"ok {verify(name, version, places=places)}")
            except UserError as error:
                faults.append(str(error))
                print(f"bad {error}")
    if faults:
        raise UserError(f"{len(faults)} of the local weights are damaged, see above")


def _publish(arguments: argparse.Namespace) -> None:
    from .weights import publish

    pin = publish(arguments.folder, arguments.url, name=arguments.name, version=arguments.version)
    print("published; pin it in the recipe:\n\nrecipe:\n  weights:")
    print(f'    sha256: {pin.sha256}\n    bytes: {pin.bytes}\n    version: "{pin.version}"')


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in head:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(markup=False).print(table)
