"""Published numbers: the files in `reported/`, whose first one says the format."""

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from .results import Goal
from .strict import decode

REPORTED = Path(__file__).parent / "reported"


@dataclass(frozen=True)
class PublishedMetric:
    """A metric under its source's name."""

    label: str
    goal: Goal


@dataclass(frozen=True)
class PublishedRow:
    """One model's numbers; None where the source could not be read."""

    model: str
    values: dict[str, float | None]
    note: str = ""
    url: str | None = None


@dataclass(frozen=True)
class PublishedTable:
    """Numbers of one source under one protocol.

    Raises:
        UserError: a row whose metrics are not those of the table, or a link that is not http(s).
    """

    title: str
    dataset: str
    citation: str
    source: str
    url: str | None
    protocol: str
    caveats: list[str]
    metrics: dict[str, PublishedMetric]
    rows: list[PublishedRow]
    empty: str

    def __post_init__(self) -> None:
        for row in self.rows:
            if wrong := sorted(set(row.values) ^ set(self.metrics)):
                raise UserError(
                    f"{self.title}: row {row.model!r}: {wrong[0]!r} is in only one of 'values' and 'metrics'"
                )
        for url in (self.url, *(row.url for row in self.rows)):
            if url is not None and not url.startswith(("https://", "http://")):
                raise UserError(f"{self.title}: url {url!r} does not begin with http:// or https://")


@dataclass(frozen=True)
class PublishedFile:
    """Everything published that is kept for one domain."""

    domain: str
    tables: list[PublishedTable]


def read_published(path: Path) -> PublishedFile:
    """Read one file, strictly.

    Raises:
        UserError: naming the file and the key that is unknown, missing, repeated or of the wrong type.
    """
    try:
        # A safe loader all the same: it differs from yaml.SafeLoader in refusing repeated keys.
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
        return decode(PublishedFile, document)
    except (UserError, OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None


def load_published(folder: Path = REPORTED) -> dict[str, list[PublishedTable]]:
    """The tables of every file in a folder, by domain."""
    tables: dict[str, list[PublishedTable]] = {}
    for path in sorted(folder.glob("*.yaml")):
        published = read_published(path)
        tables.setdefault(published.domain, []).extend(published.tables)
    return tables


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping = super().construct_mapping(node, deep=True)
        if len(mapping) != len(node.value):
            raise UserError(f"a key is given twice in the mapping at line {node.start_mark.line + 1}")
        return mapping
