"""The Fashion-MNIST cut that ships: 8,000 train and 2,000 test images of 28x28 grey pixels, ten kinds of clothing.

    apt-get install dataset-fashion-mnist
    python -m moezoo.datasets.robustness_fashion [SOURCE_DIR [OUT_FILE]]     rebuilds the shipped file

Xiao et al., "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", arXiv 1708.07747.
MIT licence; see data/robustness/DATA_CARD.md.
"""

import gzip
import io
import struct
import sys
import uuid
import zlib
from math import prod
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ..errors import UserError
from .robustness_formats import open_parquet
from .robustness_images import ImageSource

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_SHIPPED = Path(__file__).parent / "data" / "robustness" / "fashion_mnist_cut.parquet"
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_PER_CLASS = {"train": 800, "test": 200}
_FINGERPRINT = "ea20d29d09335a63fe78e6e99414b7ad675e22faa2a9526c24a288173711f932"


def open_fashion_mnist_cut() -> ImageSource:
    """The shipped cut.

    Raises:
        UserError: the file is not the one that was frozen.
    """
    source = open_parquet(str(_SHIPPED), classes=list(CLASSES), name="fashion_mnist_cut")
    if (found := source.fingerprint()) != _FINGERPRINT:
        raise UserError(
            f"{_SHIPPED} has changed: fingerprint {found[:12]}, expected {_FINGERPRINT[:12]}; reinstall moezoo"
        )
    return source


def build(folder: Path = _DEBIAN) -> pl.DataFrame:
    """The first images of each class in the official order, as PNG; `index` is their place in the official split.

    Raises:
        UserError: a file is missing or is no IDX file.
    """
    parts = []
    for split, stem in {"train": "train", "test": "t10k"}.items():
        images = read_idx(folder / f"{stem}-images-idx3-ubyte.gz", 3)
        labels = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", 1)
        chosen = [np.flatnonzero(labels == k)[: _PER_CLASS[split]] for k in range(len(CLASSES))]
        index = np.sort(np.concatenate(chosen))
        columns = {
            "index": pl.Series(index, dtype=pl.Int32),
            "label": pl.Series(labels[index], dtype=pl.UInt8),
            "image": [_png(images[i]) for i in index],
        }
        parts.append(pl.DataFrame(columns).with_columns(split=pl.lit(split)))
    return pl.concat(parts)


def read_idx(file: Path, dimensions: int) -> NDArray[np.uint8]:
    """An array of bytes in the IDX format of MNIST, gzipped or not.

    Raises:
        UserError: missing, damaged, or of other dimensions.
    """
    try:
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; expected MNIST's own names, e.g. train-images-idx3-ubyte.gz") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: not readable ({error}); get it again") from None
    start = 4 + 4 * dimensions
    if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) < start:
        raise UserError(f"{file}: not an IDX file of bytes with {dimensions} dimensions; expected MNIST's own format")
    shape = struct.unpack(f">{dimensions}I", raw[4:start])
    if len(raw) - start != prod(shape):
        raise UserError(f"{file}: {len(raw) - start} bytes for {shape} values; the file is cut short, get it again")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    return out.getvalue()


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else _DEBIAN
    file = Path(sys.argv[2]) if len(sys.argv) > 2 else _SHIPPED
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{uuid.uuid4().hex}.partial")
    try:
        build(source).write_parquet(partial, compression="zstd", compression_level=19)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    made = open_parquet(str(file), classes=list(CLASSES))
    print(f"{file}: {file.stat().st_size:,} bytes, fingerprint {made.fingerprint()}")


if __name__ == "__main__":
    main()
