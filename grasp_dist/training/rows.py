"""The rows of a data set as `datasets` reads them: local files, a folder of them, or a hub id."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grasp_dist.config import DataConfig
from grasp_dist.errors import InputError

__all__ = ["read_rows"]

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".text": "text"}


def read_rows(config: DataConfig) -> tuple[list[dict[str, Any]], set[str]]:
    """(the first `limit` rows, column names). Local files leave nothing in any cache; a hub id uses that of `datasets`.

    Raises `InputError` for a path that does not exist, a kind of file that is not known, malformed content, and a data
    set without rows.
    """
    path = Path(config.path).expanduser()
    if path.exists():
        rows, columns = _read_files(config, _files(path))
    elif path.suffix in _BUILDERS or config.path.startswith((".", "/", "~")) or config.path.count("/") > 1:
        raise InputError(f"data.path {config.path} does not exist; give a JSONL, JSON, parquet, CSV or text file")
    else:
        rows, columns = _load(config, config.path, name=config.subset, split=config.split, revision=config.revision)
    if not rows:
        raise InputError(f"{config.path} has no rows (split {config.split!r}); give a file with at least one example")
    return rows, columns


def _read_files(config: DataConfig, files: Sequence[Path]) -> tuple[list[dict[str, Any]], set[str]]:
    if all(file.stat().st_size == 0 for file in files):
        raise InputError(f"{config.path} is empty; give a file with at least one example")
    with tempfile.TemporaryDirectory(prefix="grasp-dist-") as cache:
        return _load(
            config,
            _BUILDERS[_suffix(files[0])],
            data_files={config.split: [str(file) for file in files]},
            split=config.split,
            cache_dir=cache,
            keep_in_memory=True,
        )


def _load(config: DataConfig, builder: str, **arguments: Any) -> tuple[list[dict[str, Any]], set[str]]:
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(builder, **arguments)
    except Exception as error:
        # Parsers, the hub client and the file system share no base class; the cause says more than the wrapper.
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0]
        raise InputError(f"{config.path} cannot be read: {reason}; correct the data") from None
    finally:
        if not bars:
            datasets.enable_progress_bars()
    if config.limit is not None:
        table = table.select(range(min(config.limit, len(table))))
    rows = [row for row in table.to_list() if builder != "text" or row["text"].strip()]
    return rows, set(table.column_names)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if _suffix(path) not in _BUILDERS:
            raise InputError(f"{path} is of no known kind; name it {', '.join(_BUILDERS)} (.gz may follow)")
        return [path]
    files = sorted(file for file in path.iterdir() if _suffix(file) in _BUILDERS)
    kinds = sorted({_BUILDERS[_suffix(file)] for file in files})
    if len(kinds) != 1:
        held = f"files of {' and '.join(kinds)}" if kinds else "no data files"
        raise InputError(f"the folder {path} has {held}; give one with files of one kind, or name a single file")
    return files


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
