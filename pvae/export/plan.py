"""What an export has: the variables of each group, how draws fill them, or why there are none."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from pvae.bounds.weights import require_whole
from pvae.devices import beside, double
from pvae.errors import ArgumentError, UndefinedError, oxford
from pvae.pair import Structure, is_inside
from pvae.simulate import Origin, Simulation, check_generative, draws
from pvae.terms import Evaluation, Terms
from pvae.types import Program, Site

__all__ = ["GROUPS", "Plan", "Variable", "fill"]

GROUPS = (
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "log_prior",
    "sample_stats",
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
)


Pick = Callable[[Simulation], Tensor]


@dataclass(frozen=True)
class Variable:
    """One variable of an export.

    With ``outside`` it is the sum over the data set of what is picked, shape ``(K, N)``, and of
    what ``outside`` picks, shape ``(K,)``, once.
    """

    group: str
    name: str
    pick: Pick  # from the draws for a chunk of rows to values, (K, N, ...) or (K, ...)
    num_draws: int | None  # S; None where it is the same for all draws
    num_rows: int | None  # N; None where it isn't of single data
    dims: tuple[str, ...] = ()  # names of its other dimensions
    sizes: tuple[int, ...] = ()  # their sizes
    dtype: torch.dtype = torch.float64
    outside: Pick | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its array, ``([S], [N], ...)``."""
        return (*(n for n in (self.num_draws, self.num_rows) if n is not None), *self.sizes)

    @property
    def num_bytes(self) -> int:
        """What its array takes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Plan:
    """The variables of an export, found by one draw for the first rows."""

    evaluation: Evaluation
    num_draws: int  # S
    dims: Mapping[str, Sequence[str]]  # the user's names of event dimensions, by site
    mean: bool = field(kw_only=True)  # whether predictive groups have means in place of draws
    variables: list[Variable] = field(default_factory=list)  # what is filled from draws
    constants: dict[str, np.ndarray] = field(default_factory=dict)  # what no site observes
    shared: set[str] = field(default_factory=set)  # of these, what isn't of single data
    left_out: dict[str, str] = field(default_factory=dict)  # why a group or variable isn't there
    examples: dict[Origin, Simulation] = field(default_factory=dict)  # one draw for first rows

    @property
    def structure(self) -> Structure:
        """What the pair is made of."""
        return self.evaluation.structure

    @property
    def num_of_guide(self) -> int:
        """Draws from the guide that differ: of point masses alone, one."""
        every = {*self.structure.latents, *self.structure.global_latents}
        return 1 if every <= self.structure.points else self.num_draws

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
            "log_prior": self._log_prior,
            "sample_stats": self._sample_stats,
            "prior": lambda: self._latents(group, "prior", self.num_draws),
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
                yield origin, variables, self.num_draws if with_draws else 1

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

    def _add_site(
        self, group: str, name: str, origin: Origin, pick: Pick, num_draws: int | None
    ) -> None:
        """Adds a site's values, of which there are so many draws; None for one without."""
        run = self._example(origin)
        example, node = pick(run), run.site(name)
        is_local = is_inside(self.structure, node)
        sizes = tuple(example.shape[2 if is_local else 1 :])
        rows = self.evaluation.num_rows if is_local else None
        dims = self._dims_of(node, len(sizes), is_local=is_local)
        variable = Variable(group, name, pick, num_draws, rows, dims, sizes, example.dtype)
        self.variables.append(variable)

    def _dims_of(self, node: Site, rank: int, *, is_local: bool) -> tuple[str, ...]:
        """Names of what follows draws and rows: of other plates, then of the event."""
        name = node["name"]
        event_dim = len(node["fn"].event_shape)
        has_rows = is_local and self.structure.has_plate
        depth = rank - event_dim + has_rows
        places = [d for d in range(-depth, 0) if not (has_rows and d == self.structure.dim)]
        plates = {f.dim: f.name for f in node["cond_indep_stack"] if f.vectorized}
        own = [plates.get(d, f"{name}_plate_{-d}") for d in places]
        event = self.dims.get(name, [f"{name}_dim_{i}" for i in range(event_dim)])
        if len(event) != event_dim:
            expected = f"{event_dim} names, for event_shape {tuple(node['fn'].event_shape)}"
            raise ArgumentError(f"dims[{name!r}]", expected, f"{list(event)}")
        return (*own, *event)

    def _latents(self, group: str, origin: Origin, num_draws: int) -> None:
        s = self.structure
        names = (*s.latents, *s.global_latents)
        if origin == "prior":
            check_generative(group, self.evaluation, origin, latents_alone=True)
            names = (*names, *s.enumerated)
        for name in names:
            self._add_site(group, name, origin, _value(name), num_draws)

    def _predictive(self, group: str, origin: Origin) -> None:
        check_generative(group, self.evaluation, origin)
        for name in self.structure.observed:
            self._add_site(group, name, origin, _value(name), self.num_draws)

    def _log_likelihood(self) -> None:
        terms = _terms(self._example("posterior"))
        terms.require_split()
        for name, site in terms.sites.items():
            if site.kind in ("observed", "enumerated"):
                parts = [n for n in name.split("+") if n not in self.structure.enumerated]
                rows = self.evaluation.num_rows if site.is_local else None
                what = ("log_likelihood", "+".join(parts), _log_density(name))
                self.variables.append(Variable(*what, self.num_of_guide, rows))

    def _log_prior(self) -> None:
        self.structure.require_proper("log_prior")
        terms = _terms(self._example("posterior"))
        terms.require_split()
        for name, site in terms.sites.items():
            if site.kind == "latent" and site.log_p is not None:
                rows = self.evaluation.num_rows if site.is_local else None
                what = ("log_prior", name, _log_density(name))
                self.variables.append(Variable(*what, self.num_of_guide, rows))

    def _sample_stats(self) -> None:
        structure = self.structure
        is_sum = bool(structure.global_sites)
        if is_sum:
            require_whole("sample_stats", structure, self.evaluation.num_rows)
        if structure.points:
            self.left_out["log_q"] = f"a point mass has no density: {oxford(structure.points)}"
        if structure.quantity != "elbo":
            self.left_out["log_weight"] = f"log p - log q is no weight but {structure.quantity}"
        rows = None if is_sum else self.evaluation.num_rows
        for name, (local, outside) in _STATS.items():
            if name not in self.left_out:
                stat = Variable("sample_stats", name, _of_terms(local), self.num_of_guide, rows)
                once = _of_terms(outside) if is_sum else None
                self.variables.append(replace(stat, outside=once))

    def _observed_data(self) -> None:
        run = self._example("posterior")
        made = [name for name, site in run.observed.items() if not site.places]  # of no entry
        if made:
            *_, again = next(draws(replace(self.evaluation, max_rows=1024), 1, "posterior"))
        for name in self.structure.observed:
            if name in made and not torch.equal(run.data(name), again.data(name)):
                expected, actual = "data that no latent changes", "data that depend on the draws"
                raise UndefinedError(f"observed data of site '{name}'", expected, actual)
            self._add_site("observed_data", name, "posterior", _data(name), None)

    def _constant_data(self) -> None:
        """Whatever the pair is called with that no site observes."""
        run = self._example("posterior")
        observed = {place for site in run.observed.values() for place in site.places}
        names = dict(zip(range(len(run.batch)), _names(self.structure.model), strict=False))
        for place in set(names) - observed:
            axis, name = self.structure.axes[place], names[place]
            parts = [batch[place].cpu() for _, batch in self.evaluation.source.all()]
            whole = parts[0] if axis is None else torch.cat(parts, axis).movedim(axis, 0)
            self.constants[name] = whole.numpy()
            self.shared |= {name} if axis is None else set()


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
    """What a site observes, NaN where it is masked out."""

    def pick(run: Simulation) -> Tensor:
        data, mask = run.data(name), run.mask(name)
        if mask is not None:
            data = torch.where(mask, data if data.is_floating_point() else double(data), math.nan)
        return data.unsqueeze(0)

    return pick


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


def fill(
    variables: Iterable[Variable], passes: Iterable[tuple[slice, slice, Simulation]]
) -> dict[tuple[str, str], np.ndarray]:
    """Arrays of all variables, by group and name, from one run over the draws."""
    arrays = {v: torch.zeros(v.shape, dtype=v.dtype) for v in variables}
    for chosen, rows, run in passes:
        for v, array in arrays.items():
            if v.num_draws is not None or chosen.start == 0:
                _fill(v, array, chosen, rows, run)
    return {(v.group, v.name): array.numpy() for v, array in arrays.items()}


def _fill(v: Variable, array: Tensor, chosen: slice, rows: slice, run: Simulation) -> None:
    """Fills in what some draws for a chunk of rows have."""
    place = () if v.num_rows is None else (rows,)
    here = array[place] if v.num_draws is None else array[(chosen, *place)]
    value = v.pick(run)
    if v.outside is not None:
        value = double(value).sum(1)
        value = value + beside(v.outside(run), value) if rows.start == 0 else value
    value = value.to("cpu", v.dtype)
    value = value[0] if v.num_draws is None else value[: len(here)]  # a point mass has one draw
    here.copy_(value if v.outside is None else here + value)
