"""The one place that reads the environment. Every variable is optional and begins with MOEZOO_."""

import os
from pathlib import Path


def weights_url() -> str | None:
    """Where published weights live: any fsspec URL (https, s3, gs, hf, file). `MOEZOO_WEIGHTS`."""
    return os.environ.get("MOEZOO_WEIGHTS") or None


def cache_dir() -> Path:
    """Where downloaded weights and prepared data are kept. `MOEZOO_CACHE`, else `~/.cache/moezoo`."""
    return Path(os.environ.get("MOEZOO_CACHE") or Path.home() / ".cache" / "moezoo").expanduser()


def judge_key() -> str | None:
    """Bearer token of the endpoint that `moezoo rewards label` asks. `MOEZOO_JUDGE_KEY`."""
    return os.environ.get("MOEZOO_JUDGE_KEY") or None


def real_data_dir() -> Path | None:
    """Folder of real data for `pytest -m real`. `MOEZOO_REAL_DATA`."""
    value = os.environ.get("MOEZOO_REAL_DATA")
    return Path(value).expanduser() if value else None
