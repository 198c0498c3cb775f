"""The guide's draws beside those of Markov chains on the same model, entry by entry."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import init_to_value
from torch import Tensor
from tqdm import tqdm

from pvae.bounds.weights import require_whole
from pvae.data import first_batch
from pvae.devices import double
from pvae.diagnostics.importance import richer_guide
from pvae.diagnostics.result import Finding, Result
from pvae.diagnostics.thresholds import CORRELATION, OFFSET, RHAT, SD_RATIO, Threshold
from pvae.errors import UndefinedError, check_int, oxford
from pvae.limits import is_discrete
from pvae.modes import evaluating, in_mode
from pvae.options import Options, progress_bar, tool
from pvae.pair import Batch, PairLike, Structure
from pvae.pair.messages import is_penalty
from pvae.pair.running import run_pair
from pvae.terms import Evaluation, draw_guide, prepared
from pvae.terms.passes import can_vectorize

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["AgainstNUTS", "against_nuts"]


@dataclass(frozen=True, repr=False)
class AgainstNUTS(Result):
    r"""Draws of a guide, and of NUTS on its model, entry by entry of the latents.

    Attributes:
        guide: The guide's draws, ``(S, D)``.
        nuts: Those of the chains, ``(C, T, D)``.
        sites: The latent that each entry is of, D of them.
        names: What entries are called: ``w[0]``.
        rhat: R-hat of each entry's chains, rank-normalised and split, ``(D,)``.
        ess: Effective number of draws of the chains, for means, ``(D,)``.
        divergences: How many transitions after warm-up have diverged.
        richer: What to put in the guide's place.
    """

    guide: Tensor
    nuts: Tensor
    sites: tuple[str, ...]
    names: tuple[str, ...]
    rhat: Tensor
    ess: Tensor
    divergences: int
    richer: str

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Of the guide and of NUTS, each ``(D,)``."""
        return self.guide.mean(0), self._chain.mean(0)

    @property
    def sds(self) -> tuple[Tensor, Tensor]:
        """Standard deviations of the guide and of NUTS, each ``(D,)``."""
        return self.guide.std(0), self._chain.std(0)

    @property
    def errors(self) -> tuple[Tensor, Tensor]:
        """Monte Carlo standard errors of both means, each ``(D,)``."""
        ours, theirs = self.sds
        return ours / len(self.guide) ** 0.5, theirs / self.ess.sqrt()

    @property
    def sd_ratio(self) -> Tensor:
        """The guide's standard deviation over that of NUTS, ``(D,)``."""
        ours, theirs = self.sds
        return ours / theirs

    @property
    def z(self) -> Tensor:
        """Difference of the means over its Monte Carlo standard error, ``(D,)``."""
        (a, b), (error, other) = self.means, self.errors
        return (a - b) / (error.square() + other.square()).sqrt()

    @property
    def correlations(self) -> tuple[Tensor, Tensor]:
        """Of the guide and of NUTS, each ``(D, D)``; 0 for an entry without spread."""
        return _correlation(self.guide), _correlation(self._chain)

    def summary(self) -> DataFrame:
        """A pandas table with a row for each entry: means, their errors, deviations, R-hat, ESS."""
        from pandas import DataFrame

        (a, b), (error, other), (sd, its) = self.means, self.errors, self.sds
        columns = {"vi_mean": a, "nuts_mean": b, "vi_se": error, "nuts_se": other, "z": self.z}
        columns |= {"vi_sd": sd, "nuts_sd": its, "sd_ratio": self.sd_ratio}
        columns |= {"rhat": self.rhat, "ess": self.ess}
        known = {name: column.cpu().numpy() for name, column in columns.items()}
        return DataFrame({"site": self.sites, "entry": self.names, **known})

    @property
    def _chain(self) -> Tensor:
        return self.nuts.flatten(0, 1)

    @property
    def _draws(self) -> Tensor:
        """Independent draws that a difference rests on: of the guide and the chains, ``(D,)``."""
        return 1 / (1 / self.ess + 1 / len(self.guide))

    @property
    def title(self) -> str:
        """How many draws of each there are."""
        chains, draws, _ = self.nuts.shape
        return f"Against NUTS: {len(self.guide)} draws of q, {chains} chains of {draws}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What else there is."""
        told = f"{self.divergences} divergent transitions: NUTS may have missed a part, too"
        return (".summary() has each entry's numbers", *[told] * (self.divergences > 0))

    def findings(self) -> list[Finding]:
        """Have chains mixed, and if so: widths, locations, dependence, the worst entry of each."""
        rhat = float(self.rhat.nan_to_num(nan=math.inf).max())
        least, verdict = int(self.ess.nan_to_num(0.0).min()), RHAT.verdict(rhat)
        meaning = f"the largest of {len(self.names)} entries; effective draws, at least {least}"
        more = "diagnostics.against_nuts(pair, x, num_samples=2000, num_warmup=1000)"
        advice = "" if verdict == "good" else more
        judged = verdict != "bad"
        lines = [Finding("R-hat of NUTS", rhat, None, "", verdict, meaning, advice)]
        lines += [self._of_widths(judged), self._of_means(judged)]
        return lines + [self._of_correlations(judged)] * (1 < len(self.names) <= _MOST)

    def _line(
        self, name: str, value: float, error: float, meaning: str, off: float, by: Threshold | None
    ) -> Finding:
        verdict = "none" if by is None else by.verdict(off)
        advice = self.richer if verdict in ("look", "bad") else ""
        return Finding(name, value, error, "", verdict, meaning, advice)

    def _of_widths(self, judged: bool) -> Finding:  # noqa: FBT001
        ratio = self.sd_ratio
        error = ratio / (2 * self._draws).sqrt()
        off = (ratio.clamp(min=1e-12).log().abs() - 3 / (2 * self._draws).sqrt()).clamp(min=0).exp()
        at = int(off.argmax())
        value = float(ratio[at])
        words = f"q({self.names[at]}) is too {'narrow' if value < 1 else 'wide'}, if anything"
        by = SD_RATIO if judged else None
        return self._line("sd of q / NUTS", value, float(error[at]), words, float(off[at]), by)

    def _of_means(self, judged: bool) -> Finding:  # noqa: FBT001
        (a, b), (_, sd) = self.means, self.sds
        away, errors = (a - b) / sd, (1 / self._draws).sqrt()
        off = away.abs() - 3 * errors
        at = int(off.argmax())
        words = f"of {self.names[at]}, in NUTS' standard deviations"
        by = OFFSET if judged else None
        return self._line(
            "mean of q - NUTS", float(away[at]), float(errors[at]), words, float(off[at]), by
        )

    def _of_correlations(self, judged: bool) -> Finding:  # noqa: FBT001
        ours, theirs = self.correlations
        fewest = torch.minimum(self._draws[:, None], self._draws)
        errors = (1 - theirs.square()).clamp(min=0) / fewest.sqrt()
        off = (ours - theirs).abs() - 4 * errors
        at, to = divmod(int(off.fill_diagonal_(-1.0).argmax()), len(off))
        pair = f"of {self.names[at]} and {self.names[to]}: {float(theirs[at, to]):.2f} by NUTS"
        by = CORRELATION if judged else None
        value, error = float(ours[at, to] - theirs[at, to]), float(errors[at, to])
        return self._line("correlation of q - NUTS", value, error, pair, float(off[at, to]), by)


_MOST = 1000  # entries whose correlations are looked at
_FULL = 100  # entries up to which chains adapt to correlations, too


def _correlation(draws: Tensor) -> Tensor:
    off = draws - draws.mean(0)
    return torch.nan_to_num((white := off / off.norm(dim=0)).T @ white)


@tool
def against_nuts(
    pair: PairLike,
    data: object,
    *,
    num_samples: int = 500,
    num_warmup: int = 200,
    num_chains: int = 2,
    num_particles: int = 4000,
    **options: Unpack[Options],
) -> AgainstNUTS:
    """What a guide gets wrong: its draws beside those of the No-U-Turn sampler on its model.

    NUTS draws all latents, those that data share and those of each datum, in unconstrained
    coordinates, with the model's parameters as they are. It is the slower and, where its chains
    mix (R-hat near 1), the exact one; but as chains start at draws of the guide, a mode that these
    are far from may be missed by both. Differences are judged by what is left of them after their
    Monte Carlo errors.

    References:
        The No-U-Turn Sampler (Hoffman & Gelman, 2014), https://jmlr.org/papers/v15/hoffman14a.html
        Rank-Normalization, Folding, and Localization: An Improved R-hat (Vehtari et al., 2021),
        https://arxiv.org/abs/1903.08008

    Arguments:
        pair: A model and its guide.
        data: All data that the guide was fitted to: an array, tensor, tuple of them, or data set.
        num_samples: T, draws of a chain.
        num_warmup: Transitions before these, in which step size and scales are adapted.
        num_chains: C, run one after another, each from another draw of the guide.
        num_particles: S, draws of the guide.
        options: As in `pvae.options.Options`.

    Raises:
        UndefinedError: If a latent is discrete and not enumerated, if ``poutine.scale`` changes the
            density, if the pair subsamples its data, or there are only some of the data.

    Example:
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("mean", dist.Normal(0.0, 5**-0.5))
        >>> found = against_nuts((model, guide), torch.zeros(4), num_samples=50, num_warmup=50)
        >>> found.names, found.nuts.shape
        (('mean',), torch.Size([2, 50, 1]))
    """
    sizes = {"num_samples": num_samples, "num_warmup": num_warmup, "num_particles": num_particles}
    for name, size in sizes.items():
        check_int(name, size, minimum=4)
    check_int("num_chains", num_chains)
    with prepared(pair, data, options, "against_nuts") as evaluation:
        evaluation = evaluation.in_memory()
        structure = evaluation.structure
        batch = first_batch(evaluation.source, evaluation.num_rows)
        latents = _checked(structure, batch, evaluation.num_rows)
        draws = _of_guide(evaluation, batch, num_particles)
        starts = [{name: draws[name][c] for name in latents} for c in range(num_chains)]
        total, shown = num_chains * (num_warmup + num_samples), evaluation.progress
        with progress_bar(total=total, title="NUTS", unit="step", shown=shown) as bar:
            how = (num_samples, num_warmup)
            runs = [_chain(structure, batch, start, how, bar) for start in starts]
    columns = {name: _entries(name, draws[name].shape[1:]) for name in latents}
    chains = torch.stack([_side_by_side(found, latents) for found, _ in runs])
    return AgainstNUTS(
        _side_by_side(draws, latents),
        chains,
        tuple(name for name, entries in columns.items() for _ in entries),
        tuple(itertools.chain(*columns.values())),
        *_convergence(chains),
        sum(divergent for _, divergent in runs),
        richer_guide(structure),
    )


def _checked(structure: Structure, batch: Batch, num_rows: int) -> tuple[str, ...]:
    """The latents, of a pair whose model NUTS can run on."""
    what, latents = "NUTS", (*structure.global_latents, *structure.latents)
    require_whole(what, structure, num_rows)
    if structure.subsample_size is not None:
        raise UndefinedError(what, "a pair that takes all its data", "one that subsamples them")
    if structure.removed_scales:
        actual = f"poutine.scale at site {oxford(structure.removed_scales)}"
        raise UndefinedError(what, "a model whose density is p(x, z)", actual, ["scales of 1"])
    if not latents:
        raise UndefinedError(what, "a latent that has a guide", "none")
    with evaluating(structure.modules):
        sites = run_pair(structure.model, structure.guide, batch)[1].nodes
    if discrete := [name for name in latents if is_discrete(sites[name]["fn"])]:
        expected = "latents with gradients, or enumerated ones"
        fixes = ["infer={'enumerate': 'parallel'} in the model, and no guide for it"]
        raise UndefinedError(what, expected, f"{oxford(discrete)}, which is discrete", fixes)
    return latents


def _of_guide(evaluation: Evaluation, batch: Batch, count: int) -> dict[str, Tensor]:
    """The guide's draws for the whole data set by site, ``(S, ...)``."""
    structure, parts = evaluation.structure, list[Mapping[str, Tensor]]()
    with evaluating(structure.modules):
        at_once = max(1, evaluation.max_rows // evaluation.num_rows)
        at_once = at_once if can_vectorize(structure, batch) else 1
        for done in range(0, count, at_once):
            k = min(at_once, count - done)
            sites = draw_guide(structure, batch, num_particles=k)
            parts.append({n: s.draws for n, s in sites.items() if s.draws is not None})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class _Sampler(NUTS):
    """NUTS that starts with the curvature of the density for its masses, if dimensions are few."""

    def setup(self, warmup_steps: int, *args: object, **kwargs: object) -> None:
        super().setup(warmup_steps, *args, **kwargs)
        start = dict(sorted(self.initial_params.items()))  # as the masses have them
        sizes = {name: value.numel() for name, value in start.items()}
        if sum(sizes.values()) > _FULL:
            return

        def potential(flat: Tensor) -> Tensor:
            parts = zip(start.items(), flat.split([*sizes.values()]), strict=True)
            return self.potential_fn({n: part.reshape(v.shape) for (n, v), part in parts})

        flat = torch.cat([value.detach().flatten() for value in start.values()])
        values, vectors = torch.linalg.eigh(_curvature(potential, flat))
        if bool(values.isfinite().all()):
            least = torch.finfo(values.dtype).eps * values.abs().max()  # others are rounding
            variances = 1 / values.abs().clamp(min=float(least.clamp(min=1e-10)))
            masses = {tuple(start): vectors * variances @ vectors.T}
            self.mass_matrix_adapter.inverse_mass_matrix = masses


def _curvature(potential: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    found = torch.autograd.functional.hessian(potential, at)
    assert isinstance(found, Tensor)  # noqa: S101
    return found.nan_to_num(0.0, 0.0, 0.0)


def _chain(
    structure: Structure,
    batch: Batch,
    start: Mapping[str, Tensor],
    sizes: tuple[int, int],
    bar: tqdm,
) -> tuple[dict[str, Tensor], int]:
    """Draws by site, ``(T, ...)``, and how many transitions diverged."""
    density = poutine.block(structure.model, hide_fn=is_penalty)
    kernel = _Sampler(
        density,
        max_plate_nesting=structure.nesting,
        full_mass=sum(value.numel() for value in start.values()) <= _FULL,
        init_strategy=init_to_value(values=dict(start)),
    )
    num_samples, num_warmup = sizes
    quiet = {"hook_fn": lambda *_: bar.update(), "disable_progbar": True}
    mcmc = MCMC(kernel, num_samples, num_warmup, **quiet)
    validation = pyro.validation_enabled(is_validate=False)
    with in_mode(structure.modules, training=False), torch.enable_grad(), validation:
        mcmc.run(*batch)
    divergent = mcmc.diagnostics()["divergences"]
    return mcmc.get_samples(), sum(len(steps) for steps in divergent.values())


def _entries(name: str, shape: Sequence[int]) -> list[str]:
    """What the entries of a site are called: ``w[0]``."""
    places = itertools.product(*map(range, shape))
    return [f"{name}[{','.join(map(str, i))}]" if i else name for i in places]


def _side_by_side(values: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor:
    """Draws of several sites, ``(S, D)``."""
    flat = [values[name].detach().reshape(len(values[name]), -1) for name in names]
    return double(torch.cat(flat, 1))


def _convergence(chains: Tensor) -> tuple[Tensor, Tensor]:
    """R-hat and the effective sample size of each entry of ``(C, T, D)``."""
    from arviz_stats.base import array_stats  # imports for seconds

    each = [chain.numpy() for chain in chains.cpu().unbind(-1)]
    found = [(float(array_stats.rhat(c)), float(array_stats.ess(c, method="mean"))) for c in each]
    rhat, ess = torch.tensor(found, dtype=torch.float64, device=chains.device).unbind(1)
    return rhat, ess
