"""Pairs with another prior, and samples from any model."""

from __future__ import annotations

import contextlib

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pvae import randomness
from pvae.conditional import as_conditional
from pvae.data import Source, as_source
from pvae.errors import PairError, PvaeError, check_int, oxford
from pvae.internals import mask_of
from pvae.options import tool
from pvae.pair import Pair, PairLike, Structure, as_pair, is_inside, probing, rows_to
from pvae.pair.messages import is_factor, sample_sites
from pvae.simulate import RunOptions, require_mean, run_model, simulate_batch
from pvae.sites import LATENT, announce_parameters
from pvae.terms import look_at, only_site
from pvae.types import Dist, Message, Program

__all__ = ["sample", "with_prior"]


@tool
def with_prior(pair: PairLike, density: object, site: str = LATENT) -> Pair:
    r"""The pair with another prior: :math:`p(x | z)\, r(z)` in place of p(x | z) p(z).

    Its model is a Pyro program like the pair's, for any tool and for Pyro itself. Plates, masks and
    scales around the site stay as they are, and so does the guide.

    References:
        From Variational to Deterministic Autoencoders (Ghosh et al., 2020),
        https://arxiv.org/abs/1903.12436

    Arguments:
        pair: A model and its guide.
        density: r: what `fit_density` returns, or whatever else
            `pvae.conditional.as_conditional` takes.
        site: The latent.

    Returns:
        A pair whose model is a module; it holds the density, and the pair's model if that is a
        module, so that their parameters are found.

    Raises:
        PairError: When it runs, if the model has no such latent, or one of another event shape.

    Example:
        >>> autoencoder = pvae.recipes.ae(64, 2)
        >>> pair = with_prior(autoencoder, dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> sample(pair, torch.zeros(5, 64)).shape
        torch.Size([5, 64])
    """
    pair = as_pair(pair, "with_prior")
    return Pair(
        _WithPrior(pair.model, density, site),
        pair.guide,
        plate=pair.plate,
        densities=pair.densities,
    )


class _WithPrior(nn.Module):
    def __init__(self, model: Program, density: object, site: str) -> None:
        super().__init__()
        self.model = model
        self.density = as_conditional(density, "density")
        self.site = site

    def forward(self, *batch: object, **options: object) -> object:
        announce_parameters(self.density, f"model.density.{self.site}")
        with _Swap(self.site, self.density()) as swap:
            result = self.model(*batch, **options)
        if self.site not in swap.latents:
            actual = f"latents: {oxford(swap.latents) if swap.latents else 'none'}"
            fixes = [f"site='{name}'" for name in swap.latents[:2]]
            raise PairError("with_prior", f"a latent '{self.site}' in the model", actual, fixes)
        return result


class _Swap(Messenger):
    """Replaces the distribution of one latent, expanded as the plates inside have expanded it.

    Particles and enumerated latents, to the left of these, come from handlers outside.
    """

    def __init__(self, site: str, fn: Dist) -> None:
        super().__init__()
        self.site, self.fn = site, fn
        self.latents: list[str] = []

    def _pyro_sample(self, msg: Message) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        self.latents.append(msg["name"])
        if msg["name"] != self.site:
            return
        old = msg["fn"]
        ours, theirs = tuple(self.fn.event_shape), tuple(old.event_shape)
        if ours != theirs:
            where, expected = f"density for site '{self.site}'", f"event_shape {theirs}"
            raise PairError(where, f"{expected}, as the model has it", f"event_shape {ours}")
        depths = [-f.dim for f in msg["cond_indep_stack"] if f.vectorized]
        new = self.fn.expand(old.batch_shape[-max(depths, default=len(old.batch_shape)) :])
        msg["fn"] = new.mask(mask_of(old)) if isinstance(old, MaskedDistribution) else new


@tool
def sample(
    pair: PairLike,
    data: object,
    num_samples: int | None = None,
    *,
    site: str | None = None,
    mean: bool = False,
    seed: int = 0,
) -> Tensor:
    r"""Draws from p(x) by ancestral sampling: latents from the prior, then data given these.

    The guide isn't used; of the data only the number of rows matters, and what the model doesn't
    observe, such as labels. Where it reads at one site what it observes at another, or earlier
    entries of the same, these are drawn in turn. The same seed gives the same run of the model, so
    that latents and data that belong together come from two calls.

    Arguments:
        pair: A model and its guide.
        data: What the model is called with: an array, tensor, tuple of them, data set or source.
        num_samples: N, how many data are made (not K draws for each datum); rows repeat, or are
            left out. None for one a row. Where no plate counts the data, one data set is made.
        site: What is returned, observed or latent; None if the model observes one site.
        mean: Observed sites have their distribution's mean instead of a draw, given the latents;
            given the means of other sites where a model reads these, or of its own earlier entries.
        seed: Seed of the draws; the caller's generators are left as they are.

    Returns:
        Shape ``(N, *event_shape)``, on the model's device; from a model that draws a subsample of
        its rows, as many as that has.

    Raises:
        UndefinedError: If there is no one site to return, it has no mean, the prior is improper,
            the model has factors, which no draw follows, a site reads its own later data, or, with
            ``mean``, a site reads one whose mean isn't among its values, as that of a label.

    Example:
        >>> sample(pvae.recipes.vae(64, 2), torch.zeros(1, 64), 3).shape
        torch.Size([3, 64])
    """
    pair = as_pair(pair, "sample")
    like = pair.home(data)
    with probing((pair.model,)), randomness.forked(seed):
        structure, source = _rows_of(pair, data, like)
        size = source.num_rows if num_samples is None else check_int("num_samples", num_samples)
        batch = source.rows(torch.arange(size, device=source.device) % source.num_rows)
        options: RunOptions = {"where": "sample", "mean": mean, "keep_masked": False}
        if structure is None:
            trace = run_model(pair.model, batch, **options)
        else:
            trace = simulate_batch(structure, batch, **options).drawn()
    sites = {s["name"]: s for s in sample_sites(trace)}
    observed = [n for n, s in sites.items() if s["is_observed"] and not is_factor(s)]
    what, names = ("observed site", observed) if site is None else ("site", [*sites])
    chosen = sites[only_site("sample", what, names, site)]
    if mean and chosen["is_observed"]:
        require_mean("sample", chosen)
    value: Tensor = chosen["value"]
    if structure is None or not (structure.has_plate and is_inside(structure, chosen)):
        return value
    return rows_to(0, structure.axis_in(value.dim() - len(chosen["fn"].event_shape)), value)


def _rows_of(pair: Pair, data: object, like: Tensor) -> tuple[Structure | None, Source]:
    """The data along the axes that the pair counts; their first ones, where it can't be looked at.

    The guide may not run yet, and missing values of what is drawn anew are no matter.
    """
    with contextlib.suppress(PvaeError):
        return look_at(pair, data, like.device, like.dtype)
    return None, as_source(data, like.device, like.dtype)
