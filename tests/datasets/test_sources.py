"""Arguments of a source are checked by name and type against what its reader declares."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from moezoo.datasets.sources import check_arguments
from moezoo.errors import UserError, plain_type_error


def read(path: str | list[str], features: int, kind: Literal["a", "b"] = "a", share: float = 0.5, flip: bool = False):
    raise AssertionError("checking must not read")


@dataclass
class Options:
    frames: int = 3
    folder: Path | None = None


@pytest.mark.parametrize(
    "files",
    [
        {"path": "a.csv"},
        {"path": ["a.csv", "b.csv"], "kind": "b", "share": 1, "flip": True},
    ],
)
def test_what_a_reader_declares_passes(files):
    assert check_arguments("mine", {"mine": read}, files, hidden=["features"]) == files


def test_null_paths_and_numbers_for_texts_become_what_is_meant():
    def named(path: str, name: str | None = None, most: int | None = 5, shares: tuple[float, ...] = ()):
        raise AssertionError("checking must not read")

    shares = [1, 0]
    given = check_arguments(
        "mine", {"mine": named}, {"path": Path("a"), "name": 2021, "most": "None", "shares": shares}
    )
    assert given == {"path": "a", "name": "2021", "most": None, "shares": [1, 0]}
    assert [type(share) for share in shares] == [int, int]  # the caller's list is left as it was
    assert check_arguments("mine", {"mine": named}, {"path": "a", "name": "None", "most": 3})["name"] is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"path": "a", "flip": "maybe"}, r"^data\.files\.flip: expected bool, got maybe$"),
        ({"path": "a", "share": "half"}, r"^data\.files\.share: expected float, got half$"),
        ({"path": "a", "kind": "c"}, r"^data\.files\.kind: expected one of 'a', 'b', got c$"),
        ({"path": True}, r"^data\.files\.path: expected str or list\[str\], got True$"),
        ({"path": "a", "pth": "b"}, r"^data\.files\.pth: source 'mine' has no such argument; it takes path, kind, sh"),
        ({"path": "a", "features": 3}, r"^data\.files\.features: source 'mine' has no such argument"),
        ({}, r"^data\.files\.path: source 'mine' needs it, e\.g\. --data\.files\.path PATH$"),
    ],
)
def test_what_it_does_not_is_said(files, message):
    with pytest.raises(UserError, match=message):
        check_arguments("mine", {"mine": read}, files, hidden=["features"])


def test_options_may_be_a_class_and_readers_may_take_nothing():
    check_arguments("shapes", {"shapes": Options}, {"frames": 4, "folder": "here"})
    with pytest.raises(UserError, match=r"data\.files\.frames: expected int, got few"):
        check_arguments("shapes", {"shapes": Options}, {"frames": "few"})
    with pytest.raises(UserError, match=r"it takes none: it ships with moezoo"):
        check_arguments("shipped", {"shipped": lambda: None}, {"path": "a"}, none="none: it ships with moezoo")


def test_an_argument_of_other_sources_names_them():
    def table(path: str, frame_rate: float):
        raise AssertionError("checking must not read")

    readers = {"drawn": Options, "mine": read, "table": table}
    with pytest.raises(UserError, match=r"it takes frames, folder; it goes with --data\.source mine or table$"):
        check_arguments("drawn", readers, {"path": "a.csv"})
    with pytest.raises(UserError, match=r"it takes frames, folder$"):
        check_arguments("drawn", readers, {"features": 3}, hidden=["features"])
    with pytest.raises(UserError, match=r"e\.g\. --data\.files\.frame_rate NUMBER$"):
        check_arguments("table", readers, {"path": "a.csv"})


def test_other_messages_stay_in_one_line():
    assert plain_type_error("Problem:\n  - one\n  - two") == "Problem: one two"
