"""Objectives with terms of the aggregated posterior q(z), which the batch stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from itertools import pairwise
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Independent
from torch.nn import functional as F

from pvae import randomness
from pvae.errors import ArgumentError, PairError, UndefinedError
from pvae.mmd import Kernel, mmd
from pvae.modes import is_capturing_graph
from pvae.objectives.base import Objective
from pvae.objectives.settings import AtLeastZero, Positive
from pvae.objectives.state import ObjectiveState, Training
from pvae.pair import Structure
from pvae.terms import SiteTerms, Terms

__all__ = ["DIPVAE", "TCVAE", "FactorVAE", "InfoVAE"]


@dataclass(frozen=True)
class _Aggregate(Objective):
    """The abstract objective on the codes of a batch: one draw a datum, one latent site."""

    needs = ("density", "gradient", "local", "unscaled", "split")
    bound = "none"
    couples_data = True
    estimator = "pathwise, the batch as the sample"

    num_particles: int = field(default=1, init=False)
    _: KW_ONLY
    site: str | None = None

    def check(self, structure: Structure) -> None:
        """Also refuses pairs with several latents, unless one is named."""
        super().check(structure)
        self._site_of(structure)

    def _site_of(self, structure: Structure) -> str:
        sites = [name for name in structure.latents if self.site in (None, name)]
        if len(sites) != 1:
            fixes = [f"site='{name}'" for name in structure.latents[:2]]
            raise PairError(
                type(self).__name__, "one latent site", ", ".join(structure.latents), fixes
            )
        return sites[0]

    def _codes(self, terms: Terms) -> tuple[SiteTerms, Tensor]:
        """The site, and its draws, ``(N, D)``."""
        site = terms.sites[self._site_of(terms.structure)]
        has_mask = isinstance(terms.guide_trace.nodes[site.name]["mask"], Tensor)
        if has_mask or site.value is None or len(site.value[0]) < 2:
            where = f"{type(self).__name__} at site '{site.name}'"
            got = "a mask" if has_mask else "one row"
            raise PairError(where, "batches of at least two data, without a mask", got)
        return site, site.value[0].reshape(terms.num_rows, -1)

    def _require_independent(self, site: SiteTerms, words: str, *, is_known: bool = True) -> None:
        fn = site.guide
        is_independent = not len(fn.event_shape) or isinstance(fn, Independent)
        if not (is_independent and is_known):
            where = f"{type(self).__name__} at site '{site.name}'"
            expected = f"a guide with independent dimensions{words}"
            fixes = ["guides.MeanField", "objectives.InfoVAE, which needs draws alone"]
            raise UndefinedError(where, expected, type(fn).__name__, fixes)


@dataclass(frozen=True)
class TCVAE(_Aggregate):
    r"""The evidence lower bound with weights on the three parts of its rate (beta-TC-VAE).

    .. math::
        L = E[\log p(x | z)] - \alpha\, I_q(z; x)
            - \beta\, KL\Big(q(z) \| \prod_d q(z_d)\Big) - \gamma \sum_d KL(q(z_d) \| p(z_d))

    With all weights 1 it is the evidence lower bound. The aggregated posterior
    :math:`q(z) = \frac1N \sum_n q(z | x_n)` is estimated from the batch of B data:

    - ``"stratified"``: the datum that z came from counts 1/N, the others (N - 1) / (N (B - 1))
      each, which is unbiased for q(z). (Chen et al. give one of the others another weight; this is
      the mean over which one.)
    - ``"weighted"``: each counts 1 / (N B), biased.

    The logarithm of either is biased down as the batch is small.

    References:
        Isolating Sources of Disentanglement in VAEs (Chen et al., 2018),
        https://arxiv.org/abs/1802.04942

    Arguments:
        beta: Weight of the total correlation.
        alpha: Weight of the index-code mutual information.
        gamma: Weight of the dimension-wise divergence.
        weights: ``"stratified"`` or ``"weighted"``.
        num_data: N; None to have it from `fit`.
        options: As in `Objective`, and ``site``, the latent where there are several.
    """

    _: KW_ONLY
    beta: AtLeastZero = 6.0
    alpha: AtLeastZero = 1.0
    gamma: AtLeastZero = 1.0
    weights: Literal["stratified", "weighted"] = "stratified"
    num_data: Annotated[int | None, {"minimum": 1}] = None

    def surrogate(self, terms: Terms, state: ObjectiveState) -> Tensor:
        """The plate-scaled loss in nats, a scalar to differentiate."""
        site, z = self._codes(terms)
        assert site.log_q is not None  # noqa: S101
        assert site.log_p is not None  # noqa: S101
        self._require_independent(site, ", made with .to_event(k)")
        fn = site.guide.base_dist if len(site.guide.event_shape) else site.guide
        each = fn.log_prob(z.reshape(len(z), 1, *site.guide.event_shape))
        matrix = each.reshape(len(z), len(z), -1)  # log q(z_i | x_j) by dimension, (N, N, D)
        weight = self._log_weights(terms, state)
        log_qz = (matrix.sum(2) + weight).logsumexp(1)
        log_product = (matrix + weight[..., None]).logsumexp(1).sum(1)
        information = (site.log_q[0] - log_qz).mean()
        correlation = (log_qz - log_product).mean()
        by_dimension = (log_product - site.log_p[0]).mean()
        rate = self.alpha * information + self.beta * correlation + self.gamma * by_dimension
        rest = (terms.log_q - terms.log_prior - (site.log_q - site.log_p)).mean()
        return -self.total(terms, state, terms.log_likelihood.mean() - rate - rest)

    def _log_weights(self, terms: Terms, state: ObjectiveState) -> Tensor:
        """Row i: what each datum of the batch counts for the draw of datum i."""
        rows = terms.num_rows
        size = self.num_data or state.num_data
        if size is None and terms.data_scale != 1:
            size = round(rows * terms.data_scale)
        if size is None:
            expected, got = "the size of the data set", "None, outside fit"
            raise ArgumentError("num_data", expected, got, ["num_data=len(x)"])
        if size < rows:
            raise ArgumentError("num_data", f"at least the batch's {rows}", f"{size}")
        if self.weights == "weighted":
            return terms.like.new_full((rows, rows), -math.log(size * rows))
        others = math.log((size - 1) / (size * (rows - 1)))
        return terms.like.new_full((rows, rows), others).fill_diagonal_(-math.log(size))


@dataclass(frozen=True)
class InfoVAE(_Aggregate):
    r"""The evidence lower bound, with part of the rate's weight on the aggregated posterior.

    .. math::
        L = E[\log p(x | z)] - (1 - \alpha)\, R
            - (\alpha + \lambda - 1)\, \mathrm{MMD}^2(q(z), p(z))

    :math:`\alpha = 1` is the MMD-VAE: nothing pulls single posteriors to the prior. The batch's
    draws are the sample of q(z), as many from the prior that of p(z).

    References:
        InfoVAE (Zhao et al., 2019), https://arxiv.org/abs/1706.02262
        A Kernel Two-Sample Test (Gretton et al., 2012), https://jmlr.org/papers/v13/gretton12a.html

    Arguments:
        alpha: :math:`\alpha`, at most 1.
        scale: :math:`\lambda`, in nats a datum.
        kernel: See `pvae.mmd.mmd`.
        options: As in `Objective`, and ``site``, the latent where there are several.
    """

    _: KW_ONLY
    alpha: Annotated[float, {"maximum": 1}] = 1.0
    scale: float = 100.0
    kernel: Literal["imq", "rbf"] | Kernel = "imq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha + self.scale < 1:
            got = f"{self.alpha + self.scale:g}"
            raise ArgumentError("alpha, scale", "alpha + scale at least 1", got)

    def surrogate(self, terms: Terms, state: ObjectiveState) -> Tensor:
        """The plate-scaled loss in nats, a scalar to differentiate."""
        site, z = self._codes(terms)
        prior = site.model
        draws = prior() if len(prior.batch_shape) else prior(torch.Size([len(z)]))
        gap = mmd(z, draws.reshape(z.shape), self.kernel)
        rate = (terms.log_q - terms.log_prior).mean()
        weighted = (1 - self.alpha) * rate + (self.alpha + self.scale - 1) * gap
        return -self.total(terms, state, terms.log_likelihood.mean() - weighted)


@dataclass(frozen=True)
class DIPVAE(_Aggregate):
    r"""The evidence lower bound, with the covariance of codes drawn to the identity.

    .. math::
        L = \mathrm{ELBO} - \lambda_o \sum_{i \ne j} C_{ij}^2 - \lambda_d \sum_i (C_{ii} - 1)^2

    In kind 1, C is the covariance of the guide's means; in kind 2 that of its draws,
    :math:`\mathrm{Cov}(\mu) + E[\Sigma]`.

    References:
        Variational Inference of Disentangled Latent Concepts (Kumar et al., 2018),
        https://arxiv.org/abs/1711.00848

    Arguments:
        kind: 1 or 2.
        off_diagonal: :math:`\lambda_o`.
        diagonal: :math:`\lambda_d`; None for 10 times as much in kind 1, and as much in kind 2.
        options: As in `Objective`, and ``site``, the latent where there are several.
    """

    _: KW_ONLY
    kind: Literal[1, 2] = 2
    off_diagonal: AtLeastZero = 10.0
    diagonal: Annotated[float | None, {"minimum": 0}] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.diagonal is None:
            default = self.off_diagonal * (10 if self.kind == 1 else 1)
            object.__setattr__(self, "diagonal", default)

    def surrogate(self, terms: Terms, state: ObjectiveState) -> Tensor:
        """The plate-scaled loss in nats, a scalar to differentiate."""
        site, z = self._codes(terms)
        try:
            moments = [v.reshape(z.shape) for v in (site.guide.mean, site.guide.variance)]
        except (NotImplementedError, AttributeError):
            moments = []
        words = " whose mean and variance are known"
        self._require_independent(site, words, is_known=bool(moments))
        mean, variance = moments
        centred = mean - mean.mean(0)
        covariance = centred.T @ centred / len(z)
        if self.kind == 2:
            covariance = covariance + variance.mean(0).diag()
        diagonal = covariance.diagonal()
        off = covariance.square().sum() - diagonal.square().sum()
        penalty = self.off_diagonal * off + self.diagonal * (diagonal - 1).square().sum()
        return -self.total(terms, state, terms.log_weight.mean() - penalty)


class _Discriminator(ObjectiveState):
    """A classifier that tells codes of one datum from those with each entry of another one."""

    def __init__(self, training: Training, size: int, objective: FactorVAE) -> None:
        super().__init__(training)
        layers: list[nn.Module] = []
        with randomness.forked(objective.seed):
            for before, after in pairwise([size, *objective.hidden, 1]):
                layers += [nn.Linear(before, after), nn.LeakyReLU(0.2)]
        self.network = nn.Sequential(*layers[:-1]).to(self.like)
        self.network.requires_grad_(requires_grad=False)
        parameters = self.network.parameters()
        fused = self.like.device.type != "cpu" or None  # which counts steps on the device
        self.optimizer = torch.optim.Adam(parameters, objective.lr, (0.5, 0.9), fused=fused)

    def learn(self) -> None:
        """Trains the classifier on the codes that the step has seen."""
        self.optimizer.param_groups[0]["capturable"] = is_capturing_graph()
        if self.measured is not None:
            z, self.measured = self.measured, None
            both = torch.cat([z, z.gather(0, torch.rand_like(z).argsort(0))])
            target = both.new_zeros(len(both), 1)
            target[: len(z)] = 1.0
            parameters = list(self.network.parameters())
            with torch.enable_grad():
                for p in parameters:
                    p.requires_grad_()
                loss = F.binary_cross_entropy_with_logits(self.network(both), target)
                gradients = torch.autograd.grad(loss, parameters)
            for p, gradient in zip(parameters, gradients, strict=True):
                p.requires_grad_(False)  # noqa: FBT003
                p.grad = torch.where(loss.detach().isfinite(), gradient, 0.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Also the optimiser's."""
        kept = super().tensors()
        for i, p in enumerate(self.network.parameters()):
            kept |= {f"optimizer.{i}.{k}": v for k, v in self.optimizer.state[p].items()}
        return kept

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Also the optimiser's."""
        for i, p in enumerate(self.network.parameters()):
            start = f"optimizer.{i}."
            own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            self.optimizer.state[p] = {
                k: v.to(p.device, v.dtype if k == "step" else p.dtype, copy=True)
                for k, v in own.items()
            }
        super().restore(tensors, step)


@dataclass(frozen=True)
class FactorVAE(_Aggregate):
    r"""The evidence lower bound less the total correlation, by a classifier's density ratio.

    .. math::
        L = \mathrm{ELBO} - \gamma\, E_{q(z)}\Big[\log \frac{D(z)}{1 - D(z)}\Big]

    D learns to tell codes z ~ q(z) from those whose entries are of different data, permuted within
    the batch; it learns after each training step, and is the objective's state.

    References:
        Disentangling by Factorising (Kim & Mnih, 2018), https://arxiv.org/abs/1802.05983

    Arguments:
        gamma: Weight of the total correlation.
        hidden: Widths of the classifier's hidden layers.
        lr: Its learning rate (of Adam).
        seed: Seed of its initial weights.
        options: As in `Objective`, and ``site``, the latent where there are several.
    """

    estimator = "pathwise, a classifier's density ratio"

    _: KW_ONLY
    gamma: AtLeastZero = 10.0
    hidden: tuple[int, ...] = (256, 256, 256)
    lr: Positive = 1e-4
    seed: Annotated[int, {"minimum": 0}] = 0

    def new_state(self, training: Training) -> ObjectiveState:
        """One with the classifier."""
        shapes, site = training.structure.shapes, self._site_of(training.structure)
        return _Discriminator(training, math.prod(shapes[site]), self)

    def surrogate(self, terms: Terms, state: ObjectiveState) -> Tensor:
        """The plate-scaled loss in nats, a scalar to differentiate."""
        assert isinstance(state, _Discriminator)  # noqa: S101
        _, z = self._codes(terms)
        if torch.is_grad_enabled():
            state.measured = z.detach()
        frozen = {n: p.clone() for n, p in state.network.named_parameters()}  # it learns meanwhile
        ratio = torch.func.functional_call(state.network, frozen, z)
        mean = terms.log_weight.mean() - self.gamma * ratio.mean()
        return -self.total(terms, state, mean)
