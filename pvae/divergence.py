"""The Kullback-Leibler divergence of two distributions."""

from __future__ import annotations

import torch
from torch import Tensor

from pvae import randomness
from pvae.annotations import strict
from pvae.distributions import is_point
from pvae.errors import UndefinedError, check_int
from pvae.estimate import Estimate
from pvae.types import Dist

__all__ = ["kl"]


@torch.no_grad()
@strict
def kl(q: Dist, p: Dist, num_particles: int = 10_000, *, seed: int = 0) -> Estimate:
    r"""How far q is from p, seen from q: 0 if they are equal, else above 0, without a bound.

    .. math:: KL(q \| p) = E_q[\log q(z) - \log p(z)]

    It isn't symmetric. It is in closed form where torch has one, and otherwise a mean over draws
    from q, which can come out below 0 by chance. Where q puts mass outside p's support it is
    infinite.

    References:
        On Information and Sufficiency (Kullback & Leibler, 1951),
        https://doi.org/10.1214/aoms/1177729694

    Arguments:
        q: A distribution.
        p: Another, of the same event shape; batch shapes broadcast.
        num_particles: Number of draws from q, where there is no closed form.
        seed: Seed of the draws; the caller's generators are left as they are.

    Returns:
        An estimate whose values have the batch shape of q and p together; where it is in closed
        form its ``num_particles`` is None, and its error over draws 0.

    Raises:
        UndefinedError: If q or p is a point mass, one is discrete and the other continuous, or
            their event shapes differ; if the divergence is NaN, as of parameters that are.

    Example:
        >>> kl(dist.Normal(1.0, 1.0), dist.Normal(0.0, 1.0))
        KL(q || p): 0.5 nats, exact
    """
    check_int("num_particles", num_particles, minimum=2)
    for name, fn in (("q", q), ("p", p)):
        if is_point(fn):
            expected = "a distribution with a density"
            raise UndefinedError(f"kl, {name}", expected, "a point mass (Delta)")
    if (ours := tuple(q.event_shape)) != (theirs := tuple(p.event_shape)):
        expected = f"two distributions of event_shape {ours}"
        raise UndefinedError("kl", expected, f"event_shape {theirs}", [".to_event(k)"])
    if q.support.is_discrete != p.support.is_discrete:
        expected = "two discrete distributions, or two continuous ones"
        raise UndefinedError("kl", expected, f"{type(q).__name__} and {type(p).__name__}")
    try:
        exact = torch.distributions.kl_divergence(q, p)
    except NotImplementedError:
        pass
    else:
        if not exact.isnan().any():
            return _estimate(exact)
    with randomness.forked(seed):
        z = q.sample(torch.Size([num_particles]))
        batch = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
        z = z.reshape(z.shape[:1] + (1,) * (len(batch) - len(q.batch_shape)) + z.shape[1:])
        inside = p.support.check(z)
        event = (1,) * len(p.event_shape)
        safe = torch.where(inside.reshape(inside.shape + event), z, p.sample())
    log_p = torch.where(inside, p.log_prob(safe), -torch.inf)
    draws = q.log_prob(z) - log_p
    values = draws.mean(0)
    if values.isnan().any():
        actual = "a divergence that is no number: are its parameters, and are they within bounds?"
        raise UndefinedError("kl", "two distributions whose densities are numbers", actual)
    variances = torch.where(values.isfinite(), draws.var(0), torch.inf) / num_particles
    return _estimate(values, variances, num_particles)


def _estimate(
    values: Tensor, variances: Tensor | None = None, num_particles: int | None = None
) -> Estimate:
    infinite = bool(values.isinf().any())
    return Estimate(
        "KL(q || p)",
        values,
        variances,
        by="distribution",
        num_particles=num_particles,
        remarks=("infinite where q has mass and p has none",) if infinite else (),
    )
