"""What an export has: the variables of each group, or why there are none."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from pvae import terms as t
from pvae.data import Source, first_batch
from pvae.errors import ArgumentError, UndefinedError, oxford
from pvae.export.variables import Layout, Pick, Variable
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
    """The variables of an export, found by one draw for the first rows.

    Attributes:
        variables: What is filled from terms.
        constants: What else the pair is called with, by name.
        left_out: Why a group or variable isn't there, by its name.
    """

    evaluation: t.Evaluation
    layout: Layout
    mean: bool = field(kw_only=True)
    variables: list[Variable] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    examples: dict[t.Kind, t.Terms] = field(default_factory=dict)

    @property
    def structure(self) -> t.Structure:
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

    def runs(self) -> list[tuple[t.Kind, list[Variable], int]]:
        """What is to be run: where latents come from, what is filled, and how many draws."""
        split: dict[t.Kind, list[Variable]] = {"posterior": [], "prior": []}
        for v in self.variables:
            split["prior" if v.group.startswith("prior") else "posterior"].append(v)
        return [
            (kind, variables, self.layout.num_draws if any(v.has_draws for v in variables) else 1)
            for kind, variables in split.items()
            if variables
        ]

    def check_size(self, max_bytes: float) -> None:
        """Refuses what would be larger than that."""
        sizes = {"constant_data": sum(array.nbytes for array in self.constants.values())}
        for v in self.variables:
            sizes[v.group] = sizes.get(v.group, 0) + v.num_bytes
        total = sum(sizes.values())
        if total > max_bytes:
            largest = sorted(sizes, key=lambda group: -sizes[group])[:3]
            shown = ", ".join(f"{group} {_mib(sizes[group])}" for group in largest)
            raise ArgumentError(
                "export",
                f"at most max_bytes = {_mib(max_bytes)}",
                f"{_mib(total)}: {shown}",
                ["fewer data", "num_samples=50", "groups=[...] without the largest", "max_bytes="],
            )

    def _example(self, kind: t.Kind) -> t.Terms:
        if kind not in self.examples:
            few = replace(self.evaluation, max_rows=1024)
            *_, terms = next(t.draws(few, 1, kind))
            self.examples[kind] = terms
        return self.examples[kind]

    def _latents(self, group: str, kind: t.Kind, num_draws: int) -> None:
        if kind == "prior":
            t.check_generative(group, self.evaluation, kind, latents_alone=True)
        terms = self._example(kind)
        for name, site in terms.sites.items():
            if site.kind == "latent" and site.draws is not None:
                pick = _values(name)
                self.variables.append(
                    self.layout.site(group, name, terms, pick, num_draws=num_draws)
                )

    def _predictive(self, group: str, kind: t.Kind) -> None:
        t.check_generative(group, self.evaluation, kind)
        terms = self._example(kind)
        for name in self.structure.observed:
            pick = _replicates(name, mean=self.mean)
            count = self.layout.num_draws
            self.variables.append(self.layout.site(group, name, terms, pick, num_draws=count))

    def _log_likelihood(self) -> None:
        terms = self._example("posterior")
        terms.require_split()
        for name, site in terms.sites.items():
            if site.kind not in ("observed", "enumerated"):
                continue
            parts = [n for n in name.split("+") if n not in self.structure.enumerated]
            self.variables.append(
                self.layout.density(
                    "log_likelihood",
                    "+".join(parts),
                    _log_density(name),
                    num_draws=self.num_of_guide,
                    has_rows=site.is_local,
                )
            )

    def _sample_stats(self) -> None:
        structure = self.structure
        if structure.global_sites:
            require_whole("sample_stats", structure, self.evaluation.source)
        stats: dict[str, tuple[Pick, Pick]] = {
            "log_p": (lambda s: s.log_joint, lambda s: s.global_log_p)
        }
        if structure.points:
            self.left_out["log_q"] = f"a point mass has no density: {oxford(structure.points)}"
        else:
            stats["log_q"] = (lambda s: s.log_q, lambda s: s.global_log_q)
        if structure.quantity == "elbo":
            stats["log_weight"] = (
                lambda s: s.log_weight,
                lambda s: s.global_log_p - s.global_log_q,
            )
        else:
            self.left_out["log_weight"] = f"log p - log q is no weight but {structure.quantity}"
        for name, (pick, outside) in stats.items():
            self.variables.append(
                self.layout.density(
                    "sample_stats",
                    name,
                    pick,
                    num_draws=self.num_of_guide,
                    has_rows=not structure.global_sites,
                    outside=outside if structure.global_sites else None,
                )
            )

    def _observed_data(self) -> None:
        terms = self._example("posterior")
        for name in self.structure.observed:
            pick = _data(name)
            self.variables.append(
                self.layout.site("observed_data", name, terms, pick, num_draws=None)
            )

    def _constant_data(self) -> None:
        terms = self._example("posterior")
        observed = [t.observed(terms, name) for name in self.structure.observed]
        values = [value for value in observed if value.dim()]
        first = first_batch(self.evaluation.source, max(map(len, values), default=1))
        chosen = {
            name: i
            for i, (name, column) in enumerate(
                zip(_names(self.structure.model), first, strict=False)
            )
            if not any(_begins(column, value) for value in values)
        }
        parts = [
            [batch[i].cpu() for i in chosen.values()] for _, batch in self.evaluation.source.all()
        ]
        for name, column in zip(chosen, zip(*parts, strict=True), strict=True):
            self.constants[name] = torch.cat(column).numpy()


def require_whole(what: str, structure: t.Structure, source: Source) -> None:
    """Refuses some of the data where all that global latents are conditioned on are needed."""
    if structure.is_scaled and structure.full_size != source.num_rows:
        raise UndefinedError(
            what,
            f"all {structure.full_size} data, on which global latents are conditioned",
            f"{source.num_rows} of them",
            ["the whole data set"],
        )


def _values(name: str) -> Pick:
    def pick(terms: t.Terms) -> Tensor:
        value = terms.sites[name].value
        assert value is not None  # noqa: S101
        return value

    return pick


def _data(name: str) -> Pick:
    return lambda terms: t.observed(terms, name).unsqueeze(0)


def _replicates(name: str, *, mean: bool) -> Pick:
    return lambda terms: t.replicate(terms, name, mean=mean)


def _log_density(name: str) -> Pick:
    def pick(terms: t.Terms) -> Tensor:
        value = terms.sites[name].log_p
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


def _begins(column: Tensor, value: Tensor) -> bool:
    """Whether an observed value is the first rows of a column."""
    first = column[: len(value)]
    return first.shape == value.shape and bool((first == value).all())


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"
