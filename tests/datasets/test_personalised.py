"""Users and the public never share an image; styles are fixed; epochs of two kinds; writers from MNIST's own files."""

import struct

import numpy as np
import polars as pl
import pytest
import torch
from moezoo.datasets.personalised import PersonalisedData, UserBatches
from moezoo.datasets.personalised_users import TEST_WRITERS, VALID_WRITERS, open_mnist_writers, styled
from moezoo.errors import UserError
from moezoo.settings import real_data_dir


@pytest.fixture(scope="module")
def fashion():
    data = PersonalisedData(generic_epochs=1, repeats=2)
    data.setup("fit")
    return data


def test_nobody_shares_an_image(fashion):
    opened = fashion.opened
    users = (*opened.valid, *opened.test)
    assert len(users) == 20 and all(len(user.learn) == len(user.held) == 60 for user in users)
    parts = [*opened.generic.values(), *(user.learn for user in users), *(user.held for user in users)]
    whole = torch.cat(parts)
    assert len(whole) == len(whole.unique()) == 10_000
    # What is reported comes from the official test split alone, what is learned from the train split.
    assert opened.generic["test"].min() >= 8000 and min(int(user.held.min()) for user in opened.test) >= 8000
    assert max(int(user.learn.max()) for user in users) < 8000 and opened.generic["train"].max() < 8000


def test_a_style_is_one_users_and_always_the_same(fashion):
    image = fashion.opened.image[fashion.opened.generic["train"][:16]]
    assert torch.equal(styled(image, 3), styled(image, 3))
    assert not torch.equal(styled(image, 3), styled(image, 4))
    torch.testing.assert_close(styled(image, 3)[:5], styled(image[:5], 3))  # of the user, not of the batch
    assert (styled(image, 3, strength=0.0).int() - image.int()).abs().max() <= 1


def test_evaluation_serves_each_image_once_and_users_in_turn(fashion):
    batches = list(fashion.test_dataloader())
    place, user, own = (torch.cat([getattr(b, name) for b in batches]) for name in ("place", "user", "own"))
    assert len(place) == len(place.unique()) == 600 + 1400
    assert own.sum() == 600 and user.unique().tolist() == list(range(10, 20))
    for k, one in enumerate(fashion.opened.test):
        assert torch.equal(place[own & (user == 10 + k)], one.held)
    assert user[~own].bincount()[10:].tolist() == [140] * 10
    assert torch.equal(place[~own].sort().values, fashion.opened.generic["test"])


def test_the_public_trains_first_then_users_with_the_public_between(fashion):
    generic = list(fashion.train_dataloader())
    assert all(batch.user is None and not batch.own.any() for batch in generic)
    learned = torch.cat([batch.place for batch in generic])
    assert len(learned) == len(learned.unique()) and torch.isin(learned, fashion.opened.generic["train"]).all()
    users = (*fashion.opened.valid, *fashion.opened.test)
    seen = []
    for epoch in (1, 2):
        data = UserBatches(fashion, epoch)
        assert len(data) == 2 * 20 * 60
        batch = data[list(range(0, len(data), 2))]
        assert batch.own.float().mean() == 0.5 and batch.user.unique().tolist() == list(range(20))
        for place, user in zip(batch.place[batch.own][:50].tolist(), batch.user[batch.own][:50].tolist(), strict=True):
            assert place in users[user].learn
        public = batch.place[~batch.own]
        assert torch.isin(public, fashion.opened.generic["train"]).all() and len(public.unique()) > 0.8 * len(public)
        seen.append(public)
    assert not torch.equal(*seen)
    again = UserBatches(fashion, 2)[list(range(0, len(data), 2))]
    assert torch.equal(again.place, batch.place) and torch.equal(again.user, batch.user)


def test_rehearsal_is_the_share_that_is_asked_for(fashion):
    for share in (0.0, 0.25, 0.8):
        data = PersonalisedData(rehearsal=share)
        data.opened = fashion.opened  # read once
        data.setup("fit")
        own = UserBatches(data, 9)[list(range(100))].own
        assert own.sum() == 100 and own.float().mean().item() == pytest.approx(1 - share, abs=0.01)


def write_mnist(folder, writers=40, students=(2128, 2157, 2200), digits=12):
    """IDX files and the writers' table: employees 0 ... and a few students, digits shuffled over both splits."""
    rows = [(0, writer, k) for writer in range(writers) for k in range(digits)]
    rows += [(4, writer, k) for writer in students for k in range(digits)]
    rng = np.random.default_rng(0)
    rows = [rows[i] for i in rng.permutation(len(rows))]
    cut = len(rows) * 2 // 3
    label = rng.integers(0, 10, len(rows)).astype(np.uint8)
    image = rng.integers(0, 256, (len(rows), 28, 28)).astype(np.uint8)
    for split, part in (("train", slice(0, cut)), ("t10k", slice(cut, None))):
        for kind, values in (("images-idx3", image[part]), ("labels-idx1", label[part])):
            head = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
            (folder / f"mnist-{split}-{kind}-ubyte").write_bytes(head + values.tobytes())
    table = pl.DataFrame(rows, schema=["hsf", "writer", "writer_digit_index"], orient="row").with_columns(
        split=pl.Series(["train"] * cut + ["test"] * (len(rows) - cut)),
        index=pl.Series([*range(cut), *range(len(rows) - cut)]),
        label=pl.Series(label),
    )
    table.sample(fraction=1.0, shuffle=True, seed=1).write_parquet(folder / "mnist_writer_ids.parquet")
    return image, label, rows


def test_writers_have_their_own_digits_in_the_order_of_the_form(tmp_path):
    image, label, rows = write_mnist(tmp_path)
    files = {"path": str(tmp_path), "generic_writers": 5, "valid": [2128], "test": [2157, 2200]}
    data = PersonalisedData("mnist_writers", files)
    opened = data.opened
    assert np.array_equal(opened.image[:, 0].numpy(), image) and np.array_equal(opened.label.numpy(), label)
    assert {name: len(part) for name, part in opened.generic.items()} == {"train": 60, "valid": 360, "test": 60}
    for name, first, last in (("train", 0, 5), ("valid", 5, 35), ("test", 35, 40)):
        assert {rows[i][1] for i in opened.generic[name].tolist()} == set(range(first, last))
    for user, number in zip((*opened.valid, *opened.test), (2128, 2157, 2200), strict=True):
        assert user.name == f"writer {number}"
        assert [rows[i] for i in user.learn.tolist()] == [(4, number, k) for k in range(6)]
        assert [rows[i] for i in user.held.tolist()] == [(4, number, k) for k in range(6, 12)]
    assert data.schema["users"] == ["writer 2128", "writer 2157", "writer 2200"]
    data.setup("fit")
    assert next(iter(data.test_dataloader())).user.min() == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"valid": [2157], "test": [2157]}, "writer 2157 both tunes and tests"),
        ({"test": [9]}, "data.files.test: writer 9 has 0 digits of hsf4"),
        ({"generic_writers": 10}, "data.files.generic_writers=10: there are 40 employees"),
        ({"writers": "/no/such.parquet"}, "/no/such.parquet: no such file"),
        ({"writer": "x"}, "data.files.writer: source 'mnist_writers' has no such argument; it takes path, writers"),
        ({"path": "/no"}, "/no/train-images-idx3-ubyte.gz: no such file; expected MNIST's own names"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, change, said):
    write_mnist(tmp_path)
    files = {"path": str(tmp_path), "generic_writers": 5, "valid": [2128], "test": [2157]}
    with pytest.raises(UserError, match=said) as error:
        PersonalisedData("mnist_writers", files | change).schema  # noqa: B018
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rehearsal": 1.0}, "data.rehearsal=1.0: expected a share"),
        ({"repeats": 0}, "data.repeats=0: expected at least 1"),
        ({"source": "mnist_writers"}, "data.files.path: source 'mnist_writers' needs it"),
        ({"files": {"users": 30}}, "30 users with 60 images take 1800 of 2000 test images"),
        ({"files": {"strength": 3.0}}, "strength=3.0: expected 1, 1 and 0 to 2"),
    ],
)
def test_mistakes_are_one_line(arguments, said):
    with pytest.raises(UserError, match=said):
        PersonalisedData(**arguments).schema  # noqa: B018


@pytest.mark.real
def test_real_writers_are_counted_as_the_sheet_counts_them():
    folder = real_data_dir()
    if folder is None or not (folder / "advmoe" / "mnist_writer_ids.parquet").exists():
        pytest.skip("MOEZOO_REAL_DATA has no advmoe/mnist_writer_ids.parquet")
    users = open_mnist_writers(str(folder / "advmoe"))
    assert len(users.label) == 70_000 and users.label[:5].tolist() == [5, 0, 4, 1, 9]
    assert len(users.generic["train"]) == 25_563  # 240 employees
    assert sum(len(user.learn) + len(user.held) for user in users.test) == 1079
    assert [user.name for user in users.test] == [f"writer {number}" for number in TEST_WRITERS]
    assert not set(TEST_WRITERS) & set(VALID_WRITERS)
