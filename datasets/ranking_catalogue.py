"""The items of a ranking dataset as integer codes."""

import numpy as np
import polars as pl
import torch

from .ranking_features import Ints, encode
from .ranking_tables import RankingTables


class Catalogue:
    """Item fields as integer codes; vocabularies from the items of train rows only."""

    def __init__(self, tables: RankingTables) -> None:
        self.columns = _fields(tables.items)
        trained = np.unique(tables.events.filter("is_train")["item"].to_numpy())
        self.known = {name: values[trained] for name, values in self.columns.items()}
        self.codes: dict[str, Ints] = {}
        self.sizes: dict[str, int] = {}
        for name, values in self.columns.items():
            self.codes[name], self.sizes[name] = encode(values, self.known[name])
        table = np.stack(list(self.codes.values()), 1)
        self.fields = torch.from_numpy(np.vstack([table, np.zeros_like(table[:1])]))  # row -1 pads
        asked = [self.codes[name] for name in tables.query]
        self.query_fields = torch.from_numpy(np.stack(asked, 1) if asked else np.zeros((len(table), 0), np.int64))
        self.query_code = np.zeros(len(table), np.int64)
        if asked:
            joint = np.ravel_multi_index(asked, [self.sizes[name] for name in tables.query])
            self.query_code = np.unique(joint, return_inverse=True)[1].astype(np.int64)

    def telling_attributes(self) -> list[str]:
        """Attributes that differ from the usual value of their query for at least one item in twenty."""
        telling = []
        for name, code in self.codes.items():
            counts = pl.DataFrame({"query": self.query_code, "code": code}).group_by("query", "code").len()
            usual = counts.group_by("query").agg(pl.col("len").max())["len"].sum()
            if name != "item" and usual <= 0.95 * len(code):
                telling.append(name)
        return telling


def _fields(items: pl.DataFrame) -> dict[str, pl.Series]:
    """Columns of items that are categories: `item`, then the attributes. Of a list its last, finest value counts."""
    fields = {"item": items["item_id"]}
    for column in items.drop("item_id"):
        if column.dtype == pl.List:
            column = column.list.last()
        if column.dtype == pl.String or column.dtype.is_integer() or column.dtype == pl.Boolean:
            fields[column.name] = column
    return fields
