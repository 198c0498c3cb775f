"""The history of a training: one record an epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, SupportsIndex, overload

from pvae.files import telling, write_atomically

__all__ = ["History", "Record"]

Record = dict[str, Any]
"""What one epoch has come to, by name."""


class History(list[Record]):
    """Records of epochs; ``history["elbo"]`` is the column of that name, as a list.

    All numbers are nats per datum unless their name says otherwise.

    Example:
        >>> history = History([{"epoch": 0, "elbo": -3.0}, {"epoch": 1, "elbo": -2.0}])
        >>> history["elbo"], history[-1]["epoch"]
        ([-3.0, -2.0], 1)
    """

    @overload
    def __getitem__(self, key: SupportsIndex) -> Record: ...
    @overload
    def __getitem__(self, key: slice) -> list[Record]: ...
    @overload
    def __getitem__(self, key: str) -> list[Any]: ...
    def __getitem__(self, key: SupportsIndex | slice | str) -> Any:
        if isinstance(key, str):
            return [record.get(key) for record in self]
        return super().__getitem__(key)

    def __repr__(self) -> str:
        if not self:
            return "History: no epoch yet"
        last = {k: v for k, v in self[-1].items() if v is not None}
        texts = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in last.items())
        return f"History of {len(self)} epoch(s); the last: {', '.join(texts)}"

    def write(self, path: Path) -> None:
        """Writes all records as JSON lines, atomically."""
        write_atomically(path, "".join(map(_line, self)).encode())

    def write_last(self, path: Path) -> None:
        """Appends the last record to a file of JSON lines."""
        with telling(path, "a file that can be written"), path.open("a") as file:
            file.write(_line(self[-1]))


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"
