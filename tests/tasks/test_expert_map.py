"""Labels for routing tokens out of any batch, and the picture of who answers to them."""

from typing import NamedTuple

import pytest
import torch
from moezoo.errors import UserError
from moezoo.tasks.expert_map import MAX_LABELS, as_labels, draw_answers, field_of


class Batch(NamedTuple):
    user: torch.Tensor
    items: torch.Tensor
    price: torch.Tensor
    note: str = ""


class Output(NamedTuple):
    action: torch.Tensor


BATCH = Batch(torch.tensor([7, 9]), torch.arange(12).view(2, 3, 2), torch.arange(6.0).view(2, 3))


def test_a_field_gives_every_token_its_value():
    assert field_of(BATCH, "user", 6).tolist() == [7, 7, 7, 9, 9, 9]
    assert field_of(BATCH, "price", 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert field_of(BATCH, "items:1", 6).tolist() == [1, 3, 5, 7, 9, 11]


@pytest.mark.parametrize(
    "by, message",
    [
        ("cost", "the batches have user, items, price$"),
        ("items:2", "a column is below its last size"),
        ("items", "do not fit 6 routing tokens; name a column, such as items:0"),
        ("user:0", "a column is below"),
    ],
)
def test_what_is_no_field_of_the_tokens_is_named(by, message):
    with pytest.raises(UserError, match=message):
        field_of(BATCH, by, 6)


def test_whole_numbers_are_labels_and_rare_ones_none():
    labels = as_labels(torch.tensor([5, 5, 2, 9]))
    assert labels.names == ["2", "5", "9"] and labels.values.tolist() == [1, 1, 0, 2]
    many = as_labels(torch.cat([torch.arange(40), torch.arange(MAX_LABELS)]))
    assert many.names == [str(i) for i in range(MAX_LABELS)] and many.values[:40].tolist() == [*range(16), *[-1] * 24]


def test_real_numbers_fall_in_fifths_and_what_is_unknown_in_none():
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    values[7] = torch.nan
    labels = as_labels(values)
    assert torch.bincount(labels.values + 1).tolist()[0] == 1 and labels.values[7] == -1 and len(labels.names) == 5
    assert torch.bincount(labels.values[labels.values >= 0]).tolist() == pytest.approx([200] * 5, abs=1)


def test_real_numbers_that_are_whole_are_labels():
    labels = as_labels(torch.tensor([1.0, 0.0, torch.nan, 1.0]))
    assert labels.names == ["0", "1"] and labels.values.tolist() == [1, 0, -1, 1]
    assert as_labels(torch.ones(7)).values.tolist() == [0] * 7
    assert as_labels(torch.full((3,), torch.nan)).values.tolist() == [-1] * 3


def test_whole_numbers_have_names_where_they_are_known_and_the_output_has_fields_too():
    found = as_labels(torch.tensor([0, 2, 2, 5]), ["disk", "star", "ring"])
    assert found.names == ["disk", "ring", "5"] and found.values.tolist() == [0, 1, 1, 2]
    output = Output(torch.arange(6.0)[:, None])
    assert field_of(BATCH, "action:0", 6, output).tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="the output action"):
        field_of(BATCH, "colour", 6, output)


def test_the_picture_is_drawn(tmp_path):
    draw_answers(torch.rand(3, 5), ["a", "b", "c"], "title", tmp_path / "deep" / "map.png")
    assert (tmp_path / "deep" / "map.png").stat().st_size > 5000
