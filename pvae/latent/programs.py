"""Models with another prior, and samples from any model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pvae import randomness
from pvae.conditional import as_conditional
from pvae.data import as_source
from pvae.errors import PairError, UndefinedError, check_int, oxford
from pvae.internals import mask_of
from pvae.latent.checks import mean_of, only_site
from pvae.pair import Pair, is_penalty, probing
from pvae.pair.messages import is_factor, sample_sites
from pvae.sites import LATENT, announce_parameters

__all__ = ["is_simulated", "sample", "simulated", "with_prior"]


def with_prior(model: Callable[..., Any], density: Any, site: str = LATENT) -> nn.Module:
    r"""The same model with another prior: :math:`p(x | z)\, r(z)` in place of p(x | z) p(z).

    It is a Pyro program like the model, for any tool and for Pyro itself. Plates, masks and scales
    around the site stay as they are.

    References:
        From Variational to Deterministic Autoencoders (Ghosh et al., 2020),
        https://arxiv.org/abs/1903.12436

    Arguments:
        model: A Pyro program.
        density: r: what `fit_density` returns, or whatever else
            `pvae.conditional.as_conditional` takes.
        site: The latent.

    Returns:
        A module that is called like the model; it holds the density, and the model if that is a
        module, so that their parameters are found.

    Raises:
        PairError: When it runs, if the model has no such latent, or one of another event shape.

    Example:
        >>> autoencoder = pvae.recipes.ae(64, 2)
        >>> model = with_prior(autoencoder.model, dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> sample(model, torch.zeros(5, 64)).shape
        torch.Size([5, 64])
    """
    return _WithPrior(model, density, site)


class _WithPrior(nn.Module):
    def __init__(self, model: Callable[..., Any], density: Any, site: str) -> None:
        super().__init__()
        self.model = model
        self.density = as_conditional(density, "density")
        self.site = site

    def forward(self, *batch: Any, **options: Any) -> Any:
        announce_parameters(self.density, f"model.density.{self.site}")
        with _Swap(self.site, self.density()) as swap:
            result = self.model(*batch, **options)
        if self.site not in swap.latents:
            raise PairError(
                "with_prior",
                f"a latent '{self.site}' in the model",
                f"latents: {oxford(swap.latents) if swap.latents else 'none'}",
                [f"site='{name}'" for name in swap.latents[:2]],
            )
        return result


class _Swap(Messenger):
    """Replaces the distribution of one latent, expanded as the plates inside have expanded it.

    Particles and enumerated latents are to the left of these plates, and come from handlers
    outside.
    """

    def __init__(self, site: str, fn: Any) -> None:
        super().__init__()
        self.site, self.fn = site, fn
        self.latents: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        self.latents.append(msg["name"])
        if msg["name"] != self.site:
            return
        old = msg["fn"]
        if old.event_shape != self.fn.event_shape:
            raise PairError(
                f"density for site '{self.site}'",
                f"event_shape {tuple(old.event_shape)}, as the model has it",
                f"event_shape {tuple(self.fn.event_shape)}",
            )
        depths = [-f.dim for f in msg["cond_indep_stack"] if f.vectorized]
        new = self.fn.expand(old.batch_shape[-max(depths, default=len(old.batch_shape)) :])
        msg["fn"] = new.mask(mask_of(old)) if isinstance(old, MaskedDistribution) else new


def sample(
    model: Callable[..., Any],
    data: Any,
    num_samples: int | None = None,
    *,
    site: str | None = None,
    mean: bool = False,
    seed: int = 0,
) -> Tensor:
    r"""The sampling algorithm for any model: runs it with its observed sites drawn.

    Of the data only the number of rows matters, and whatever the model doesn't observe, such as
    labels, which are what is sampled for. The same seed gives the same run, so that latents and
    data that belong together come from two calls.

    Arguments:
        model: A Pyro program.
        data: What the model is called with: an array, tensor, tuple of them, data set or source.
        num_samples: N, how many; rows repeat, or are left out. None for one a row.
        site: What is returned, observed or latent; None if the model observes one site.
        mean: Observed sites have their distribution's mean instead of a draw.
        seed: Of the draws; the caller's generators are left as they are.

    Returns:
        Shape ``(N, *event_shape)``, on the model's device; from a model that draws a subsample of
        its rows, as many as that has.

    Raises:
        UndefinedError: If there is no one site to return, it has no mean, the prior is improper,
            or the model has factors, which no draw follows.

    Example:
        >>> sample(pvae.recipes.vae(64, 2).model, torch.zeros(1, 64), 3).shape
        torch.Size([3, 64])
    """
    like = Pair(model, model).home(data)
    with probing((model,)), randomness.forked(seed):
        source = as_source(data, like.device, like.dtype)
        size = source.num_rows if num_samples is None else check_int("num_samples", num_samples)
        batch = source.rows(torch.arange(size, device=source.device) % source.num_rows)
        sites = simulated("sample", model, batch, mean=mean)
    observed = [n for n, s in sites.items() if is_simulated(s)]
    what, names = ("observed site", observed) if site is None else ("site", [*sites])
    return sites[only_site("sample", what, names, site)]["value"]


def simulated(
    where: str, model: Callable[..., Any], batch: tuple[Any, ...], *, mean: bool = False
) -> dict[str, Any]:
    """The sites of one run of a model with its observed sites drawn, or at their means.

    Raises:
        UndefinedError: If the model has factors, or there is no mean.
    """
    with poutine.trace() as run, _AtMeans() if mean else contextlib.nullcontext():
        poutine.uncondition(model)(*batch)
    sites = {s["name"]: s for s in sample_sites(run.trace)}
    factors = [name for name, s in sites.items() if is_factor(s) and not is_penalty(s)]
    if factors:
        raise UndefinedError(
            where,
            "a model without factors, which no draw follows",
            f"factor {oxford(factors)}",
            ["pyro.infer.NUTS on the model"],
        )
    return sites


def is_simulated(site: Any) -> bool:
    """Whether a site has data, in the run of a model that has drawn them."""
    return bool(site["infer"].get("was_observed")) and not is_factor(site)


class _AtMeans(Messenger):
    """Sets observed sites, which `poutine.uncondition` has opened, to their means."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("was_observed") or is_factor(msg):
            return
        msg["value"], msg["done"] = mean_of(msg["fn"]), True
        if msg["value"] is None:
            raise UndefinedError(
                f"site '{msg['name']}'",
                "a distribution whose mean is known",
                type(msg["fn"]).__name__,
                ["mean=False"],
            )
