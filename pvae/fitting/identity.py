"""What two trainings must have in common for one to go on where the other stopped."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from pyro.infer import ELBO as PyroELBO

from pvae.data import Batches, Mixed, Source
from pvae.fitting.fingerprint import fingerprint
from pvae.fitting.settings import Settings
from pvae.pair import Account, Entry, Pair

__all__ = [
    "Difference",
    "PairRecord",
    "Values",
    "account_of",
    "differences",
    "identity_of",
    "listed",
    "of_data",
    "without",
]

Values = dict[str, Entry | int | float | None]
"""Settings by name, as JSON has them."""

_SHOWN = 5  # differences in one message
_LONGEST = 90  # characters of one value in a message
_NOTHING = "nothing"


def account_of(pair: Pair) -> Account:
    """What a pair is in words, the same wherever it is built again."""
    own = {"plate": pair.plate, "densities": pair.densities}
    return Account.of({"model": pair.model, "guide": pair.guide, **own})


class PairRecord:
    """What a pair is as its training starts, less what then changes by itself.

    Networks and programs may keep counters, caches and running means: whatever is another after
    the look at the pair, or after training steps, is no setting and isn't compared.

    Attributes:
        first: What the pair was.
        changing: Places that have changed.
    """

    def __init__(self, pair: Pair) -> None:
        self.pair, self.changing = pair, set[str]()
        self.renew()

    def renew(self) -> None:
        """Takes the pair as it is now, whatever was changed by hand."""
        self.first = account_of(self.pair)

    def as_json(self, *, is_trained: bool) -> dict[str, object]:
        """What a checkpoint has of it; without steps no buffer is known to be a constant."""
        first, now = self.first.entries, account_of(self.pair).entries
        self.changing |= {n for n in {**first, **now} if first.get(n) != now.get(n)}
        left_out = self.changing if is_trained else self.changing | self.first.restored
        return {"entries": without(first, left_out), "changing": sorted(left_out)}


def without(entries: Mapping[str, Entry], places: Collection[str]) -> dict[str, Entry]:
    """Entries but for those of some places, and of what belongs to these."""
    left_out = {*places}
    return {
        name: entry
        for name, entry in entries.items()
        if name not in left_out and left_out.isdisjoint(_places_above(name))
    }


class Difference(NamedTuple):
    """A place or a setting, and what is there in words: in the one before, and in this one."""

    what: str
    saved: str
    now: str

    def __str__(self) -> str:
        return f"{self.what}: saved {self.saved}, now {self.now}"


def differences(
    saved: Mapping[str, object], now: Mapping[str, object], *, in_both: bool = False
) -> list[Difference]:
    """What differs, by name; of things of another kind not what belongs to them.

    Arguments:
        saved: Values by name, from JSON.
        now: The same of now.
        in_both: Whether only names that are in both count, as between versions of a library.
    """
    found: dict[str, Difference] = {}
    for name in {**now, **saved}:  # which are in the order of the programs now
        was, is_now = saved.get(name, _NOTHING), now.get(name, _NOTHING)
        if _is_same(was, is_now) or (in_both and not _is_comparable(was, is_now)):
            continue
        if not any(place in found for place in _places_above(name)):
            found[name] = Difference(name, *_in_words(was, is_now))
    return [*found.values()]


def listed(found: list[Difference]) -> str:
    """Differences for a message."""
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(map(str, found[:_SHOWN])) + more


def _is_same(was: object, now: object) -> bool:
    """Whether two values are equal; code is the same by what it does, or by its text."""
    if isinstance(was, dict) and isinstance(now, dict):
        source = was.get("source")
        return was == now or was["code"] == now["code"] or None is not source == now["source"]
    return was == now


def _is_comparable(was: object, now: object) -> bool:
    """Whether values of different versions can be told apart: they are there, and code has text."""
    has_text = all(v["source"] is not None for v in (was, now) if isinstance(v, dict))
    return has_text and _NOTHING not in (was, now)


def _places_above(name: str) -> Iterator[str]:
    """The names of what a place belongs to: of ``a.b, c`` these are ``a.b`` and ``a``."""
    for i, letter in enumerate(name):
        if letter in ".,[":
            yield name[:i]


def _in_words(was: object, now: object) -> tuple[str, str]:
    """Two values for a message; of code the first lines that differ."""
    texts = []
    for one, other in ((was, now), (now, was)):
        lines, others = _lines(one), _lines(other)
        text = next((line.strip() for line in lines if line not in others), lines[0].strip())
        texts.append(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")
    return texts[0], texts[1]


def _lines(value: object) -> list[str]:
    if isinstance(value, dict):
        return (value["source"] or f"code with digest {value['code']}").splitlines()
    return [str(value)]


# Settings


def identity_of(
    settings: Settings,
    objective: PyroELBO,
    optimizer: torch.optim.Optimizer,
    batches: Batches | Mixed,
) -> Values:
    """What trainings must have in common beside pair and data, by name."""
    named = {"objective": objective, "lr_schedule": settings.schedule}
    return {
        "seed": settings.seed,
        "lr": settings.lr,
        "clip_norm": settings.clip_norm,
        "precision": settings.precision,
        "patience": settings.patience,
        **_of_optimizer(optimizer),
        **_of_batches(batches),
        **Account.of(named).entries,
    }


def _of_optimizer(optimizer: torch.optim.Optimizer) -> Values:
    """Its class, and its settings of each group of parameters, of which there mostly is one."""
    hidden = {"params", "fused", "foreach", "capturable", "differentiable"}
    groups = optimizer.param_groups
    hidden |= {"lr"} if len(groups) == 1 else set()  # the training's own
    values: Values = {"optimizer": type(optimizer).__name__}
    for number, group in enumerate(groups):
        place = f"optimizer.groups[{number}]" if number else "optimizer"
        values |= {f"{place}.{k}": repr(v) for k, v in group.items() if k not in hidden}
    return values


def _of_batches(batches: Batches | Mixed) -> Values:
    if isinstance(batches, Mixed):
        mix = None if batches.mix is None else repr(dict(batches.mix))
        parts = {name: _of_batches(part) for name, part in batches.parts.items()}
        named = {f"{k} of {name}": v for name, part in parts.items() for k, v in part.items()}
        return {"mix": mix, **named}
    return {"batch_size": batches.batch_size, "num_rows": batches.num_rows}


def of_data(batches: Batches | Mixed, valid: Source | None) -> Values:
    """Fingerprints of training and validation data."""
    parts = batches.parts if isinstance(batches, Mixed) else {"": batches}
    names = {name: f"data of {name}" if name else "data" for name in parts}
    named = {names[name]: fingerprint(part.source) for name, part in parts.items()}
    return {**named, "valid": None if valid is None else fingerprint(valid)}
