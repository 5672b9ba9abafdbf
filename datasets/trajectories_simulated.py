"""The default data: worlds of the weaving section, each simulated once and kept under MOEZOO_CACHE."""

import importlib.util
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl

from .. import settings
from ..errors import UserError
from . import trajectories_numpy, trajectories_sumo, trajectories_weave
from .cache import content_hash
from .trajectories_table import Source, TrackTable

_LOG = logging.getLogger(__name__)
_TRAIN, _VALID, _TEST = list(range(8)), [8, 9], [10, 11, 12]


def open_sumo_weave(
    train: Sequence[int] = tuple(_TRAIN),
    valid: Sequence[int] = tuple(_VALID),
    test: Sequence[int] = tuple(_TEST),
    seconds: float = 300.0,
) -> Source:
    """Driven by SUMO; by NumPy, and named so, where libsumo is not installed.

    Args:
        train, valid, test: seeds, one world each.
        seconds: of each world.
    """
    if importlib.util.find_spec("libsumo") is None:
        _LOG.warning("libsumo is not installed (pip install 'moezoo[trajectories]'): numpy_weave takes its place")
        return open_numpy_weave(train, valid, test, seconds)
    return _weave(
        "sumo_weave", trajectories_sumo.simulate, Path(trajectories_sumo.__file__), train, valid, test, seconds
    )


def open_numpy_weave(
    train: Sequence[int] = tuple(_TRAIN),
    valid: Sequence[int] = tuple(_VALID),
    test: Sequence[int] = tuple(_TEST),
    seconds: float = 300.0,
) -> Source:
    """Driven by IDM and MOBIL; arguments as for SUMO."""
    module = Path(trajectories_numpy.__file__)
    return _weave("numpy_weave", trajectories_numpy.simulate, module, train, valid, test, seconds)


def _weave(
    name: str, simulate: Callable[[Sequence[int], float], dict[int, pl.DataFrame]], module: Path,
    train: Sequence[int], valid: Sequence[int], test: Sequence[int], seconds: float,
) -> Source:  # fmt: skip
    splits = {"train": list(train), "valid": list(valid), "test": list(test)}
    seeds = [seed for some in splits.values() for seed in some]
    if any(not some for some in splits.values()) or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(
            f"data.files: seeds {splits}; expected at least one for each split, each seed once and none below 0"
        )
    if seconds < 10:
        raise UserError(f"data.files.seconds={seconds:g}: expected at least 10")
    makers = (Path(trajectories_weave.__file__), module)

    def read() -> TrackTable:
        return trajectories_weave.joined(_worlds(name, simulate, makers, seeds, seconds), splits)

    return Source(name, makers, trajectories_weave.FRAME_RATE, read, trajectories_weave.LANE_WIDTH)


def _worlds(
    name: str, simulate: Callable[[Sequence[int], float], dict[int, pl.DataFrame]], makers: Sequence[Path],
    seeds: Sequence[int], seconds: float,
) -> dict[int, pl.DataFrame]:  # fmt: skip
    """Each seed's world, from the cache where it lies there."""
    folder = settings.cache_dir() / "datasets" / "trajectories" / f"{name}-{content_hash(makers, [name, seconds])[:16]}"
    files = {seed: folder / f"seed{seed}.parquet" for seed in seeds}
    worlds = {seed: world for seed, file in files.items() if (world := _load(file)) is not None}
    missing = [seed for seed in seeds if seed not in worlds]
    if missing:
        for seed, world in simulate(missing, seconds).items():
            worlds[seed] = world
            _save(world, files[seed])
    return {seed: worlds[seed] for seed in seeds}


def _load(file: Path) -> pl.DataFrame | None:
    try:
        return pl.read_parquet(file)
    except (OSError, pl.exceptions.PolarsError):
        return None


def _save(world: pl.DataFrame, file: Path) -> None:
    """The file appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}-{uuid.uuid4().hex}.partial")
    try:
        world.write_parquet(partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
