"""Where the users of a personalised classifier come from: writers of MNIST, or a documented stand-in of styles."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from ..errors import UserError
from .robustness import split_by_class
from .robustness_fashion import open_fashion_mnist_cut, read_idx
from .robustness_images import ImageSource

# Students (hsf4) whose digits a LeNet-5 that knows 240 employees reads worst; the sheet's ten test, the next ten tune.
TEST_WRITERS = (2157, 2128, 2114, 2169, 2297, 2307, 2254, 2153, 2230, 2283)
VALID_WRITERS = (2126, 2249, 2162, 2206, 2304, 2306, 2292, 2305, 2247, 2145)
_GENERIC_VALID_WRITERS = 30
_STYLED_USERS = 10  # of validation, and as many of test
_STYLED_IMAGES = 60  # that a styled user has to learn from, and as many held back


@dataclass(frozen=True)
class User:
    """One user's images, as places in the source's: some to learn from, the others held back."""

    name: str
    learn: Tensor
    held: Tensor


@dataclass(frozen=True)
class Users:
    """Images of a large public and of a few users whose images look different.

    Attributes:
        image: uint8 [n, channels, size, size]; label: int64 [n].
        generic: places of the public's images that `train`, `valid` and `test`.
        valid, test: users to tune on, and users to report.
    """

    name: str
    classes: tuple[str, ...]
    image: Tensor
    label: Tensor
    generic: dict[str, Tensor]
    valid: tuple[User, ...]
    test: tuple[User, ...]
    made_of: str

    def fingerprint(self) -> str:
        """sha256 (hex) of what the images are made of, and of who has which."""
        digest = hashlib.sha256(self.made_of.encode())
        for part in (self.label, *self.generic.values()):
            digest.update(part.contiguous().numpy().data)
        for user in (*self.valid, *self.test):
            digest.update(user.name.encode())
            digest.update(user.learn.contiguous().numpy().data)
            digest.update(user.held.contiguous().numpy().data)
        return digest.hexdigest()


def open_fashion_styles(users: int = _STYLED_USERS, images: int = _STYLED_IMAGES, strength: float = 1.0) -> Users:
    """The Fashion-MNIST cut, and users who see all clothes in a way of their own: turned, sheared, scaled, and with
    another brightness curve, fixed for each user. A stand-in for handwriting: no image is a real user's.

    Args:
        users: that tune, and as many that test.
        images: that a user learns from, and as many held back.
        strength: of the styles; 0 leaves all images as they are.
    """
    if users < 1 or images < 1 or not 0 <= strength <= 2:
        raise UserError(f"data.files: users={users}, images={images}, strength={strength}: expected 1, 1 and 0 to 2")
    cut = open_fashion_mnist_cut()
    need, apart = 3 * users * images, users * images
    if need > len(cut.train) // 2 or apart > len(cut.test) // 2:
        raise UserError(
            f"data.files: {users} users with {images} images take {apart} of {len(cut.test)} test images; "
            "expected at most half of them"
        )
    kept, aside = split_by_class(cut.train.label, len(cut.classes), 0.1)
    offset = len(cut.train)
    order = torch.randperm(len(cut.test), generator=torch.Generator().manual_seed(0)) + offset
    image, label = _joined(cut)
    pools = (kept[:need].view(3, users, images), order[:apart].view(users, images))
    image = image.clone()
    valid: list[User] = []
    test: list[User] = []
    for k in range(users):
        for number, (learn, held), group in (
            (k, (pools[0][0][k], pools[0][1][k]), valid),
            (users + k, (pools[0][2][k], pools[1][k]), test),
        ):
            places = torch.cat([learn, held])
            image[places] = styled(image[places], number, strength)
            group.append(User(f"style {number}", learn, held))
    generic = {"train": kept[need:], "valid": aside, "test": order[apart:].sort().values}
    made_of = f"{cut.fingerprint()} users={users} images={images} strength={strength:g}"
    return Users("fashion_styles", cut.classes, image, label, generic, tuple(valid), tuple(test), made_of)


def styled(
    image: UInt8[Tensor, "images channels height width"], user: int, strength: float = 1.0
) -> UInt8[Tensor, "images channels height width"]:
    """Images as one user sees them: all turned, sheared, scaled and brightened alike, by what `user` says alone."""
    generator = torch.Generator().manual_seed(1811 * 56 + user)  # the paper's number on arXiv
    draw = torch.rand(5, generator=generator, dtype=torch.float64) * 2 - 1
    sign = torch.where(draw[0] < 0, -1.0, 1.0)
    angle = strength * sign * (15 + 25 * draw[0].abs()) * torch.pi / 180  # 15 to 40 degrees, either way
    shear, scale = strength * 0.3 * draw[1], 1 + strength * 0.2 * draw[2]
    gamma = torch.exp(strength * 0.7 * draw[3])
    zero = draw.new_zeros(())
    turn = torch.stack([angle.cos(), shear - angle.sin(), zero, angle.sin(), angle.cos(), zero])
    theta = (turn.view(2, 3) / scale).float().expand(len(image), -1, -1)
    pixels = (image.float() / 255) ** gamma.float()
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    return (F.grid_sample(pixels, grid, align_corners=False) * 255).round().to(torch.uint8)


def _joined(cut: ImageSource) -> tuple[Tensor, Tensor]:
    return torch.cat([cut.train.image, cut.test.image]), torch.cat([cut.train.label, cut.test.label])


def open_mnist_writers(
    path: str,
    writers: str | None = None,
    generic_writers: int = 240,
    valid: Sequence[int] = VALID_WRITERS,
    test: Sequence[int] = TEST_WRITERS,
) -> Users:
    """MNIST by who wrote each digit: the public are employees of the census bureau (hsf0), users are students (hsf4).

    Each user's digits in the order of the form: the first half to learn from, the rest held back.

    Args:
        path: folder with MNIST's four IDX files, gzipped or not, `mnist-` before their names or not.
        writers: table of split, index, hsf, writer, writer_digit_index (from QMNIST), Parquet; default:
            `mnist_writer_ids.parquet` in `path`.
        generic_writers: employees, by number, that the generic expert learns from; the next 30 validate, the
            others test.
        valid, test: numbers of the students who tune and who test.
    """
    folder = Path(path)
    image = np.concatenate([read_idx(_idx(folder, f"{split}-images-idx3-ubyte"), 3) for split in ("train", "t10k")])
    label = np.concatenate([read_idx(_idx(folder, f"{split}-labels-idx1-ubyte"), 1) for split in ("train", "t10k")])
    table = _writer_table(Path(writers) if writers else folder / "mnist_writer_ids.parquet", len(label))
    who, form = table["writer"].to_numpy(), table["hsf"].to_numpy()
    employees = np.unique(who[form == 0])
    if not 1 <= generic_writers <= len(employees) - _GENERIC_VALID_WRITERS - 1:
        raise UserError(
            f"data.files.generic_writers={generic_writers}: there are {len(employees)} employees, "
            f"{_GENERIC_VALID_WRITERS} of whom validate; expected some left to test"
        )
    bounds = np.split(employees, [generic_writers, generic_writers + _GENERIC_VALID_WRITERS])
    generic = {
        name: torch.from_numpy(np.flatnonzero((form == 0) & np.isin(who, some)))
        for name, some in zip(("train", "valid", "test"), bounds, strict=True)
    }
    groups = []
    for name, numbers in (("valid", valid), ("test", test)):
        if both := sorted(set(valid) & set(test)):
            raise UserError(f"data.files.{name}: writer {both[0]} both tunes and tests; name each once")
        groups.append(tuple(_writer(table, int(number), name) for number in numbers))
    pixels, digits = torch.from_numpy(image.copy()).unsqueeze(1), torch.from_numpy(label.astype(np.int64))
    made_of = hashlib.sha256(image.tobytes()).hexdigest()
    classes = tuple(str(digit) for digit in range(10))
    return Users("mnist_writers", classes, pixels, digits, generic, groups[0], groups[1], made_of)


def _idx(folder: Path, stem: str) -> Path:
    names = [f"{prefix}{stem}{ending}" for prefix in ("", "mnist-") for ending in (".gz", "")]
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def _writer_table(file: Path, count: int) -> pl.DataFrame:
    """Rows in the order of MNIST: train, then test."""
    try:
        table = pl.read_parquet(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give the writers' table with data.files.writers") from None
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{file}: not a readable Parquet file ({' '.join(str(error).split())[:120]})") from None
    for column in ("split", "index", "hsf", "writer", "writer_digit_index"):
        if column not in table.columns:
            raise UserError(f"{file}: column '{column}' is missing; it has {', '.join(table.columns)}")
    table = table.sort(pl.col("split") != "train", "index")
    if len(table) != count:
        raise UserError(f"{file}: {len(table)} rows for {count} images; expected one each")
    return table


def _writer(table: pl.DataFrame, number: int, group: str) -> User:
    own = (
        table.with_row_index("place")
        .filter((pl.col("writer") == number) & (pl.col("hsf") != 0))
        .sort("writer_digit_index")
    )
    if len(own) < 2:
        raise UserError(f"data.files.{group}: writer {number} has {len(own)} digits of hsf4; expected at least two")
    places = torch.from_numpy(own["place"].to_numpy().astype(np.int64))
    half = len(places) // 2
    return User(f"writer {number}", places[:half], places[half:])
