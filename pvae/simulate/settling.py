"""Data that are fed to other data: drawn in turn, each given what was drawn before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pvae import randomness
from pvae.distributions import base_of, mean_of
from pvae.errors import UndefinedError
from pvae.limits import is_discrete
from pvae.pair import Batch, run_pair
from pvae.pair.messages import is_factor, sample_sites, score
from pvae.pair.observed import DATA, observed_sites
from pvae.terms.passes import no_guide
from pvae.types import Site

if TYPE_CHECKING:
    from pvae.simulate.ancestral import Simulation

__all__ = ["Settled", "settle"]

EARLIER = "reads_earlier"
"""Key in the notes of a structure whose one site of data reads its own: whether earlier alone."""


@dataclass(frozen=True)
class Settled:
    """A draw of data: the batch with it, the model's trace, and whether data fed other data."""

    batch: Batch
    trace: Trace
    is_fed: bool


def settle(run: Simulation, places: Mapping[str, int] | None = None) -> Settled:
    """One draw of data, in the batch that the model has read when it drew them.

    A model may read at one site what it observes at another, from the batch: a label in its
    decoder, the number before in a sequence. What it draws there follows the batch's data, and not
    those drawn. So it is run again, from the same state of the generators, on the batch with what
    was drawn, until the same is drawn; with each run one more site of a chain is right, or one more
    entry of a site that reads its own earlier ones.

    Raises:
        UndefinedError: If that doesn't end, or an entry reads itself or later ones, as under
            teacher forcing; or a site reads another's mean, which is none of its values.
    """
    return _Settling(run, places).settled()


class _Settling:
    """Runs a simulation's model on what it has drawn before."""

    def __init__(self, run: Simulation, places: Mapping[str, int] | None) -> None:
        self.run, self.places, self.structure = run, places, run.structure
        self.is_mean, self.state = run.options.get("mean", False), randomness.get_state()

    def settled(self) -> Settled:
        """The draw; see `settle`."""
        trace = self.run.once(self.run.guides[0])
        names = [*observed_sites(self.structure, trace, self.run.batch)]
        if self.is_mean:
            self.check_means(trace, names)
        filled = self.run.filled(trace, self.places)
        odd = self.fed(trace, filled)
        if odd is None:
            return Settled(filled, trace, is_fed=False)
        most = len(names) if len(names) > 1 else self.entries(trace, names[0])[0].shape[1]
        for _ in range(most + 1):
            again = self.again(trace, filled)
            pairs = [(trace.nodes[name]["value"], again.nodes[name]["value"]) for name in names]
            trace, filled = again, self.run.filled(again, self.places)
            is_same = all(torch.equal(before, now) for before, now in pairs)
            if is_same and self.fed(trace, filled) is None:
                if len(names) == 1 and not self.reads_earlier(trace, names[0]):
                    break
                return Settled(filled, trace, is_fed=True)
        raise UndefinedError(
            f"{self.run.where}: site '{odd}'",
            "a distribution that depends on latents, covariates, other sites and, of its own "
            "data, earlier entries alone",
            "a model that reads x besides observing it, as under teacher forcing, or changes it "
            "first",
            [
                "obs=x, unchanged",
                "x itself in no other distribution of the model",
                f"a site for each part, pyro.sample(f'{names[0]}_{{t}}', ..., obs=x[:, t]), that "
                "reads those before, also where draws are by rejection, as of Gamma",
            ],
        )

    def again(self, trace: Trace, filled: Batch) -> Trace:
        """A run from the same state of the generators on other data, those of a run before."""
        with randomness.forked():
            randomness.set_state(self.state)
            again = self.run.once(self.run.guides[0], filled)
        for name, site in again.nodes.items():
            if site["type"] == "sample" and DATA in (site["infer"] or {}):
                site["infer"][DATA] = trace.nodes[name]["infer"][DATA]
        return again

    def fed(self, trace: Trace, filled: Batch) -> str | None:
        """The first site that has another density with the drawn data in the batch; None if none.

        What the model drew must have the same density if the drawn data are in the batch from the
        start, and not only where they are observed. Of means of data the means have to be the same.
        """
        again = run_pair(poutine.replay(self.run.program, trace=trace), no_guide, filled)[1]
        guide = self.run.guides[0]
        of_guide = {} if guide is None else guide.nodes
        for site in sample_sites(trace):
            name = str(site["name"])
            if is_factor(site) or name in of_guide or name in self.run.given:
                continue
            number = _mean if site["is_observed"] and self.is_mean else score
            ours, other = number(site), number(again.nodes[name])
            both = (ours == other) | (ours.isnan() & other.isnan())  # classes have no mean
            off = torch.where(both, 0.0, ours - other).abs().max()
            size = ours.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=1.0)
            if not bool(off <= 1e-4 * size):
                return name
        return None

    def check_means(self, trace: Trace, names: list[str]) -> None:
        """Refuses a mean that is no value of its site, where a site reads that one's data."""
        discrete = [name for name in names if is_discrete(trace.nodes[name]["fn"])]
        if not discrete:
            return
        drawn = replace(self.run, options={**self.run.options, "mean": False})
        values = drawn.once(self.run.guides[0])
        for name in discrete:
            if self.fed(trace, self.run.filled(values, self.places, name)) is not None:
                kind = type(base_of(trace.nodes[name]["fn"])).__name__
                raise UndefinedError(
                    f"{self.run.where}: mean of site '{name}', whose data are read",
                    "a mean that is one of the site's values",
                    f"that of {kind}, whose values are whole numbers",
                    ["mean=False"],
                )

    def reads_earlier(self, trace: Trace, name: str) -> bool:
        """Whether each entry of the one site of data is drawn by those before it; found out once.

        A row has another value at one entry, the next row at the next one: what is drawn at that
        entry, and before it, may not change.
        """
        notes = self.structure.notes
        if EARLIER not in notes:
            drawn, data = self.entries(trace, name)
            other = data
            for shift in range(1, min(len(data), 9)):  # discrete ones are often the same
                other = torch.where(other == drawn, data.roll(shift, 0), other)
            (rows, count), device = drawn.shape, drawn.device
            entry, found = torch.arange(count, device=device), True
            for start in range(0, count, rows):
                changed = (torch.arange(rows, device=device) + start)[:, None]
                filled = self.filled_with(torch.where(entry == changed, other, drawn), trace, name)
                now, _ = self.entries(self.again(trace, filled), name)
                off = torch.where(entry <= changed, now - drawn, 0.0).abs().max()
                found &= bool(off <= 1e-5 * drawn.abs().max().clamp(min=1.0))
            notes[EARLIER] = found
        return bool(notes[EARLIER])

    def entries(self, trace: Trace, name: str) -> tuple[Tensor, Tensor]:
        """Values that were drawn and data, a row a datum, their entries side by side."""
        site, axis = trace.nodes[name], self.axis(trace, name)
        values = [site["value"], torch.as_tensor(site["infer"][DATA]).to(site["value"].dtype)]
        rows = [v.unsqueeze(0) if axis is None else v.movedim(axis, 0) for v in values]
        return rows[0].flatten(1), rows[1].flatten(1)

    def filled_with(self, entries: Tensor, trace: Trace, name: str) -> Batch:
        """The batch with these entries in place of what was drawn."""
        axis, value = self.axis(trace, name), trace.nodes[name]["value"]
        first = value if axis is None else value.movedim(axis, 0)
        shown = entries.reshape(first.shape)
        other = trace.copy()
        shown = shown if axis is None else shown.movedim(0, axis)
        other.nodes[name] = {**trace.nodes[name], "value": shown}
        return self.run.filled(other, self.places)

    def axis(self, trace: Trace, name: str) -> int | None:
        """The axis of the data in a site's value."""
        return observed_sites(self.structure, trace, self.run.batch)[name].axis


def _mean(site: Site) -> Tensor:
    mean = mean_of(site["fn"])
    assert mean is not None  # noqa: S101
    return mean
