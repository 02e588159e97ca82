"""Answers and verdicts on disk as they come: one JSON object a line, appended, never written over.

Whatever ends the process, what was added is kept, and asking again goes on behind it. A line that was cut off in the
middle was never added: the batch that it belongs to is done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grasp_dist.errors import InputError

__all__ = ["Ledger"]

Key = tuple[Any, ...]


class Ledger:
    """Records by key, in a file that begins with what they were made from. One process writes."""

    def __init__(self, path: str | os.PathLike[str], *, made_from: Mapping[str, Any], key: Sequence[str]) -> None:
        """Open the file, or begin it with the first `add`.

        made_from: JSON values. Records of a file that was made from something else are never mixed in: `InputError`,
        which names the first difference; so too for a damaged line, or two records of one key.
        """
        self.path, self._key = Path(path), tuple(key)
        self._made_from = json.loads(json.dumps(dict(made_from)))
        self._records: dict[Key, dict[str, Any]] = {}
        self._end = 0
        """Where the whole lines end, in bytes."""
        self._read()

    def __contains__(self, key: Key) -> bool:
        return tuple(key) in self._records

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records, in the order in which they were added."""
        return iter(self._records.values())

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self._records[tuple(key)]

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append records, and return when the disk has them. Raises `ValueError` for a key that is there already, and
        `InputError` where nothing can be written."""
        fresh: dict[Key, dict[str, Any]] = {}
        for record in records:
            own = self._of(record)
            if own in self._records or own in fresh:
                raise ValueError(f"{self.path} has a record of {own} already")
            fresh[own] = dict(record)
        if not fresh:
            return
        # ASCII: whatever a model answers, lone surrogates among it, is written and read back as it is.
        lines = [json.dumps(record) + "\n" for record in fresh.values()]
        if not self._end:
            lines.insert(0, json.dumps({"made_from": self._made_from}) + "\n")
        content = "".join(lines).encode("ascii")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("r+b" if self.path.exists() else "wb") as file:
                file.truncate(self._end)
                file.seek(self._end)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"cannot write {self.path}: {error.strerror}; {len(self)} records are kept, and the same command goes "
                "on behind them"
            ) from None
        self._end += len(content)
        self._records |= fresh

    def _read(self) -> None:
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from None
        self._end = content.rfind(b"\n") + 1
        lines = content[: self._end].splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                own = (dict(record["made_from"]),) if number == 1 else self._of(record)
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{self.path}, line {number} is damaged; move the file away to begin again, or take the line out"
                ) from None
            if number == 1:
                self._check(*own)
            elif own in self._records:
                raise InputError(f"{self.path}, line {number} repeats {own}; take one of the two out")
            else:
                self._records[own] = record

    def _check(self, found: Mapping[str, Any]) -> None:
        if found == self._made_from:
            return
        names = [name for name in {**found, **self._made_from} if found.get(name) != self._made_from.get(name)]
        raise InputError(
            f"{self.path} was made with another {names[0]} ({_short(found.get(names[0]))}, now "
            f"{_short(self._made_from.get(names[0]))}); give another folder, or move the file away"
        )

    def _of(self, record: Mapping[str, Any]) -> Key:
        return tuple(record[name] for name in self._key)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
