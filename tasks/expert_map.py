"""What each expert of a trained model answers to: the share of weight by label, for any field of the task's batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import UserError

MAX_LABELS = 16
BINS = 5  # of a field that is not of whole numbers: fifths of the data


class Labels(NamedTuple):
    """A label for every token, and what the labels are called."""

    values: Int[Tensor, " tokens"]
    names: Sequence[str]


def field_of(batch: Any, by: str, tokens: int, output: Any = None) -> Float[Tensor, " tokens"] | Int[Tensor, " tokens"]:
    """The field `by` of a batch, or else of the model's output, or its column `by:3`, as one number per routing token.

    A field of fewer units than tokens, such as sessions of candidates, holds for all tokens of its unit.

    Raises:
        UserError: there is no such field, or it does not fit the tokens.
    """
    name, _, column = by.partition(":")
    home = batch if name in _tensors(batch) else output
    if name not in _tensors(home):
        raise UserError(
            f"--by {name}: the batches have {', '.join(_tensors(batch))}"
            + (f"; the output {', '.join(_tensors(output))}" if _tensors(output) else "")
        )
    values: Tensor = getattr(home, name)
    if column:
        if not column.isdigit() or values.ndim < 2 or int(column) >= values.shape[-1]:
            raise UserError(f"--by {by}: {name} has the shape {list(values.shape)}; a column is below its last size")
        values = values[..., int(column)]
    flat = values.flatten()
    if len(flat) == 0 or tokens % len(flat):
        raise UserError(
            f"--by {by}: {len(flat)} values of shape {list(values.shape)} do not fit {tokens} routing tokens"
            + (f"; name a column, such as {name}:0" if not column and values.ndim > 1 else "")
        )
    return flat.repeat_interleave(tokens // len(flat))


def _tensors(fields: Any) -> list[str]:
    return [f for f in getattr(fields, "_fields", ()) if isinstance(getattr(fields, f), Tensor)]


def as_labels(values: Tensor, names: Sequence[str] | None = None) -> Labels:
    """Whole numbers by themselves, the commonest `MAX_LABELS` of them; others in fifths. -1 for what has no label.

    Args:
        names: what whole numbers from 0 are called.
    """
    known = values.isfinite()
    if not bool((values[known] == values[known].round()).all()):
        return _fifths(values.double(), known)
    found, place, counts = values[known].long().unique(return_inverse=True, return_counts=True)
    common = counts.argsort(descending=True, stable=True)[:MAX_LABELS].sort().values
    rank = torch.full((len(found),), -1).scatter(0, common, torch.arange(len(common)))
    labels = torch.full(values.shape, -1).masked_scatter(known, rank[place])
    called = {} if names is None else dict(enumerate(names))
    return Labels(labels, [called.get(v, str(v)) for v in found[common].tolist()])


def _fifths(values: Tensor, known: Tensor) -> Labels:
    some = values[known]
    edges = some.sort().values[torch.linspace(0, len(some) - 1, BINS + 1).round().long()].unique()
    bins = torch.bucketize(values.nan_to_num(), edges[1:-1], right=True).masked_fill(~known, -1)
    between = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    return Labels(bins, [f"{low:.3g} to {high:.3g}" for low, high in between])


def draw_answers(
    share: Float[Tensor, "labels experts"], names: Sequence[str], title: str, path: Path, by: str = ""
) -> None:
    """A heat map, labels down and experts across, of each label's share against the mean over labels."""
    from matplotlib.figure import Figure

    lift = share - share.mean(0)
    bound = max(float(lift.abs().max()), 1e-9)
    words = 0.085 * max(map(len, names), default=0)
    size = (min(max(2.0 + words + 0.4 * share.shape[1], 5.0), 14.0), min(max(1.6 + 0.3 * len(names), 3.0), 10.0))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(lift.numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(0, share.shape[1], 1 + share.shape[1] // 24))
    axes.set(xlabel="expert", ylabel=by, title=title)
    figure.colorbar(image, ax=axes, label="share of weight, less mean")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
