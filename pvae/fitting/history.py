"""The history of a training: one record an epoch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from pvae.checkpoint import write_atomically

__all__ = ["History", "Record"]

Record = dict[str, Any]
"""What one epoch has come to, by name."""


class History(Sequence[Record]):
    """Records of epochs; ``history["elbo"]`` is the column of that name, as a list.

    All numbers are nats per datum unless their name says otherwise.

    Example:
        >>> history = History([{"epoch": 0, "elbo": -3.0}, {"epoch": 1, "elbo": -2.0}])
        >>> history["elbo"], history[-1]["epoch"]
        ([-3.0, -2.0], 1)
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.records = list(records)

    @overload
    def __getitem__(self, key: int) -> Record: ...
    @overload
    def __getitem__(self, key: slice) -> list[Record]: ...
    @overload
    def __getitem__(self, key: str) -> list[Any]: ...
    def __getitem__(self, key: int | slice | str) -> Any:
        if isinstance(key, str):
            return [record.get(key) for record in self.records]
        return self.records[key]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __repr__(self) -> str:
        if not self.records:
            return "History: no epoch yet"
        last = ", ".join(
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in self.records[-1].items()
            if v is not None
        )
        return f"History of {len(self)} epoch(s); the last: {last}"

    def append(self, record: Record) -> None:
        """Adds a record."""
        self.records.append(record)

    def write(self, path: Path) -> None:
        """Writes all records as JSON lines, atomically."""
        write_atomically(path, "".join(_line(r) for r in self.records).encode())

    def write_last(self, path: Path) -> None:
        """Appends the last record to a file of JSON lines."""
        with path.open("a") as file:
            file.write(_line(self.records[-1]))

    @classmethod
    def read(cls, path: Path) -> History:
        """Reads JSON lines; a last line cut short by a kill is left out."""
        records = []
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return cls(records)


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"
