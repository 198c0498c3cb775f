"""What an export has: the variables of each group, or why there are none."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from pvae.data import Source
from pvae.errors import ArgumentError, UndefinedError, oxford
from pvae.export.variables import Layout, Pick, Variable
from pvae.pair import Structure
from pvae.simulate import Origin, Simulation, check_generative, draws
from pvae.terms import Evaluation, Terms
from pvae.types import Program

__all__ = ["GROUPS", "Plan", "require_whole"]

GROUPS = (
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "sample_stats",
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
)


@dataclass
class Plan:
    """The variables of an export, found by one draw for the first rows."""

    evaluation: Evaluation
    layout: Layout
    mean: bool = field(kw_only=True)  # whether predictive groups have means in place of draws
    variables: list[Variable] = field(default_factory=list)  # what is filled from draws
    constants: dict[str, np.ndarray] = field(default_factory=dict)  # what no site observes
    left_out: dict[str, str] = field(default_factory=dict)  # why a group or variable isn't there
    examples: dict[Origin, Simulation] = field(default_factory=dict)  # one draw for first rows

    @property
    def structure(self) -> Structure:
        """What the pair is made of."""
        return self.layout.structure

    @property
    def num_of_guide(self) -> int:
        """Draws from the guide that differ: of point masses alone, one."""
        every = {*self.structure.latents, *self.structure.global_latents}
        return 1 if every <= self.structure.points else self.layout.num_draws

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites whose dimensions can be named."""
        s = self.structure
        return (*s.latents, *s.global_latents, *s.enumerated, *s.observed)

    def add(self, group: str, *, is_asked: bool) -> None:
        """Adds a group's variables; the reason why it has none, unless it was asked for."""
        makers: dict[str, Callable[[], None]] = {
            "posterior": lambda: self._latents(group, "posterior", self.num_of_guide),
            "posterior_predictive": lambda: self._predictive(group, "posterior"),
            "log_likelihood": self._log_likelihood,
            "sample_stats": self._sample_stats,
            "prior": lambda: self._latents(group, "prior", self.layout.num_draws),
            "prior_predictive": lambda: self._predictive(group, "prior"),
            "observed_data": self._observed_data,
            "constant_data": self._constant_data,
        }
        try:
            makers[group]()
        except UndefinedError as error:
            if is_asked:
                raise
            self.left_out[group] = error.one_line()

    def runs(self) -> Iterator[tuple[Origin, list[Variable], int]]:
        """What is to be run: where latents come from, what is filled, and how many draws."""
        origins: tuple[Origin, ...] = ("posterior", "prior")
        for origin in origins:
            is_prior = origin == "prior"
            variables = [v for v in self.variables if v.group.startswith("prior") == is_prior]
            if variables:
                with_draws = any(v.num_draws for v in variables)
                yield origin, variables, self.layout.num_draws if with_draws else 1

    def check_size(self, max_bytes: float) -> None:
        """Refuses what would be larger than that."""
        sizes = {"constant_data": sum(array.nbytes for array in self.constants.values())}
        for v in self.variables:
            sizes[v.group] = sizes.get(v.group, 0) + v.num_bytes
        total = sum(sizes.values())
        if total > max_bytes:
            largest = sorted(sizes, key=lambda group: -sizes[group])[:3]
            shown = ", ".join(f"{group} {_mib(sizes[group])}" for group in largest)
            limit, actual = f"at most max_bytes = {_mib(max_bytes)}", f"{_mib(total)}: {shown}"
            fixes = ["fewer data", "num_particles=50", "groups=[...] without the largest"]
            raise ArgumentError("export", limit, actual, [*fixes, "max_bytes="])

    def _example(self, origin: Origin) -> Simulation:
        if origin not in self.examples:
            few = replace(self.evaluation, max_rows=1024)
            *_, self.examples[origin] = next(draws(few, 1, origin, mean=self.mean, score=True))
        return self.examples[origin]

    def _values(self, group: str, names: Sequence[str], origin: Origin, num_draws: int) -> None:
        run, site = self._example(origin), self.layout.site
        self.variables += [site(group, n, run, _value(n), num_draws=num_draws) for n in names]

    def _latents(self, group: str, origin: Origin, num_draws: int) -> None:
        s = self.structure
        names = (*s.latents, *s.global_latents)
        if origin == "prior":
            check_generative(group, self.evaluation, origin, latents_alone=True)
            names = (*names, *s.enumerated)
        self._values(group, names, origin, num_draws)

    def _predictive(self, group: str, origin: Origin) -> None:
        check_generative(group, self.evaluation, origin)
        self._values(group, self.structure.observed, origin, self.layout.num_draws)

    def _log_likelihood(self) -> None:
        terms = _terms(self._example("posterior"))
        terms.require_split()
        for name, site in terms.sites.items():
            if site.kind in ("observed", "enumerated"):
                parts = [n for n in name.split("+") if n not in self.structure.enumerated]
                rows = self.layout.num_rows if site.is_local else None
                what = ("log_likelihood", "+".join(parts), _log_density(name))
                self.variables.append(Variable(*what, self.num_of_guide, rows))

    def _sample_stats(self) -> None:
        structure = self.structure
        is_sum = bool(structure.global_sites)
        if is_sum:
            require_whole("sample_stats", structure, self.evaluation.source)
        if structure.points:
            self.left_out["log_q"] = f"a point mass has no density: {oxford(structure.points)}"
        if structure.quantity != "elbo":
            self.left_out["log_weight"] = f"log p - log q is no weight but {structure.quantity}"
        rows = None if is_sum else self.layout.num_rows
        for name, (local, outside) in _STATS.items():
            if name not in self.left_out:
                stat = Variable("sample_stats", name, _of_terms(local), self.num_of_guide, rows)
                once = _of_terms(outside) if is_sum else None
                self.variables.append(replace(stat, outside=once))

    def _observed_data(self) -> None:
        run, site = self._example("posterior"), self.layout.site
        self.variables += [
            site("observed_data", name, run, _data(name), num_draws=None)
            for name in self.structure.observed
        ]

    def _constant_data(self) -> None:
        """Whatever the pair is called with that no site observes."""
        run = self._example("posterior")
        observed = {place for site in run.observed.values() for place in site.places}
        names = dict(zip(range(len(run.batch)), _names(self.structure.model), strict=False))
        for place in set(names) - observed:
            parts = [batch[place].cpu() for _, batch in self.evaluation.source.all()]
            self.constants[names[place]] = torch.cat(parts).numpy()


def require_whole(what: str, structure: Structure, source: Source) -> None:
    """Refuses some of the data where all that global latents are conditioned on are needed."""
    if structure.is_scaled and structure.full_size != source.num_rows:
        expected = f"all {structure.full_size} data, on which global latents are conditioned"
        raise UndefinedError(what, expected, f"{source.num_rows} of them", ["the whole data set"])


def _terms(run: Simulation) -> Terms:
    assert run.terms is not None  # noqa: S101
    return run.terms


_OfTerms = Callable[[Terms], Tensor]

_STATS: dict[str, tuple[_OfTerms, _OfTerms]] = {  # of each datum, and of what all data share
    "log_p": (lambda terms: terms.log_joint, lambda terms: terms.global_log_p),
    "log_q": (lambda terms: terms.log_q, lambda terms: terms.global_log_q),
    "log_weight": (
        lambda terms: terms.log_weight,
        lambda terms: terms.global_log_p - terms.global_log_q,
    ),
}


def _of_terms(pick: _OfTerms) -> Pick:
    return lambda run: pick(_terms(run))


def _value(name: str) -> Pick:
    return lambda run: run.value(name)


def _data(name: str) -> Pick:
    return lambda run: run.data(name).unsqueeze(0)


def _log_density(name: str) -> Pick:
    def pick(run: Simulation) -> Tensor:
        value = _terms(run).sites[name].log_p
        assert value is not None  # noqa: S101
        return value

    return pick


def _names(model: Program) -> Iterator[str]:
    """What the model calls its arguments, as far as it names them."""
    call = model.forward if isinstance(model, nn.Module) else model
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p.name for p in inspect.signature(call).parameters.values() if p.kind in places]
    yield from named
    yield from (f"input_{i}" for i in itertools.count(len(named)))


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"
