"""Distributions taken apart and made again: the same draws and densities, to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pvae.conditional import as_conditional
from pvae.distributions import (
    arguments_of,
    base_of,
    is_improper,
    is_point,
    log_density_of_delta,
    masks_of,
    take_apart,
)
from pvae.errors import ArgumentError
from pvae.types import Dist

t = dist.transforms
P = torch.tensor([0.2, 0.7, 0.4], dtype=torch.float64)
L = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)
M = 2 * torch.eye(3, dtype=torch.float64)
HALF = torch.tensor(0.5, dtype=torch.float64)


def used_affine() -> torch.distributions.Transform:
    """A transform that has been inverted once, and so holds its inverse."""
    transform = t.AffineTransform(HALF.clone(), HALF.clone())
    _ = transform.inv
    return transform


def used_transform() -> Dist:
    transform = t.AffineTransform(L.clone(), P.clone())
    fn = dist.TransformedDistribution(dist.Normal(L, P), [transform, t.SigmoidTransform()])
    fn.log_prob(fn.sample())
    _ = transform.inv, transform.inv.inv
    return fn


TABLE: dict[str, Callable[[], Dist]] = {
    "normal": lambda: dist.Normal(L, 1.0).to_event(1),
    "bernoulli": lambda: dist.Bernoulli(probs=P),
    "bernoulli of logits": lambda: dist.Bernoulli(logits=L),
    "binomial": lambda: dist.Binomial(5, logits=L),
    "one-hot": lambda: dist.OneHotCategorical(logits=L),
    "multinomial": lambda: dist.Multinomial(4, logits=L),
    "relaxed": lambda: dist.RelaxedBernoulli(HALF, probs=P),
    "relaxed one-hot": lambda: dist.RelaxedOneHotCategorical(HALF, logits=L),
    "zero-inflated": lambda: dist.ZeroInflatedNegativeBinomial(3.0, probs=P, gate_logits=L),
    "beta": lambda: dist.Beta(P, P + 1),
    "half-normal": lambda: dist.HalfNormal(P),
    "log-normal": lambda: dist.LogNormal(L, P),
    "logistic-normal": lambda: dist.LogisticNormal(L, P),
    "gumbel": lambda: dist.Gumbel(L, P),
    "weibull": lambda: dist.Weibull(P, P),
    "multivariate": lambda: dist.MultivariateNormal(L, covariance_matrix=M),
    "precision": lambda: dist.MultivariateNormal(L, precision_matrix=M),
    "low rank": lambda: dist.LowRankMultivariateNormal(L, M, P),
    "cholesky": lambda: dist.LKJCholesky(3, torch.tensor(2.0)),
    "point": lambda: dist.Delta(L, log_density=1.0, event_dim=1),
    "empirical": lambda: dist.Empirical(torch.arange(12.0).reshape(4, 3), torch.zeros(4)),
    "stable": lambda: dist.Stable(P + 1, P, P, L, coords="S"),
    "mask": lambda: dist.Normal(L, P).mask(P > 0.3).to_event(1),
    "expanded": lambda: dist.ExpandedDistribution(dist.Normal(0.0, 1.0), [3]),
    "mixture": lambda: dist.MixtureSameFamily(dist.Categorical(logits=L), dist.Normal(L, P)),
    "used transforms": used_transform,
    "inverse": lambda: dist.TransformedDistribution(
        dist.Uniform(0.0, torch.ones(3)), [t.SigmoidTransform().inv, t.AffineTransform(L, P).inv]
    ),
    "nested transforms": lambda: dist.TransformedDistribution(
        dist.Normal(L, P),
        [t.IndependentTransform(t.ComposeTransform([t.SigmoidTransform(), used_affine()]), 1)],
    ),
    "matrix": lambda: dist.TransformedDistribution(
        dist.Normal(L, P).to_event(1),
        [t.LowerCholeskyAffine(L, M), t.Permute(torch.tensor([2, 0, 1]))],
    ),
    "stack": lambda: dist.TransformedDistribution(
        dist.Normal(L[:2], 1.0), [t.StackTransform([t.ExpTransform(), used_affine()])]
    ),
    "unvalidated": lambda: dist.Normal(L, P, validate_args=False),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_made_again_it_is_the_same(name: str) -> None:
    fn = TABLE[name]()
    template, tensors = take_apart(fn, "prior")
    again = template.build(tensors)
    assert type(again) is type(fn)
    assert (again.batch_shape, again.event_shape) == (fn.batch_shape, fn.event_shape)
    state = torch.get_rng_state()
    expected = fn.sample()
    torch.set_rng_state(state)
    drawn = again.sample()
    normalised = name in ("one-hot", "relaxed one-hot", "multinomial")  # once more, by constructors
    rounding = 4 * torch.finfo(L.dtype).eps if normalised else 0.0
    torch.testing.assert_close(drawn, expected, rtol=rounding, atol=rounding)
    expected = fn.log_prob(drawn)
    torch.testing.assert_close(again.log_prob(drawn), expected, rtol=rounding, atol=rounding)
    single = template.build({k: v.float() if v.is_floating_point() else v
                             for k, v in tensors.items()})  # fmt: skip
    if fn.support.is_discrete is False:
        assert single.sample().dtype == torch.float32


def test_of_arguments_that_say_the_same_the_given_one_is_kept() -> None:
    fn = dist.Bernoulli(logits=L)
    _ = fn.probs, fn.entropy()
    assert list(arguments_of(fn)) == ["logits"]
    fn = dist.Bernoulli(probs=P)
    _ = fn.logits
    assert list(arguments_of(fn)) == ["probs"]
    assert list(arguments_of(dist.RelaxedBernoulli(HALF, probs=P))) == ["temperature", "probs"]
    fn = dist.MultivariateNormal(L, precision_matrix=M)
    assert list(arguments_of(fn)) == ["loc", "scale_tril"]


def test_values_outside_the_support_are_refused_as_before() -> None:
    for validate_args in (True, False):
        fn = dist.Normal(L, P, validate_args=validate_args)
        template, tensors = take_apart(fn, "prior")
        again = template.build(tensors)
        if validate_args:
            with pytest.raises(ValueError, match="support"):
                again.log_prob(torch.full((3,), torch.nan))
        else:
            assert again.log_prob(torch.full((3,), torch.nan)).isnan().all()


class Forgetful(dist.Normal):
    """Doesn't keep its argument."""

    def __init__(self, precision: Tensor) -> None:
        super().__init__(torch.zeros_like(precision), precision.rsqrt())


class Renaming(dist.Normal):
    """Keeps another thing by its argument's name."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__(torch.zeros_like(scale), 2 * scale)


class Open(dist.Normal):
    """Takes anything."""

    def __init__(self, *arguments: Tensor) -> None:
        super().__init__(*arguments)


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (Forgetful(HALF), "Forgetful, which doesn't keep its argument precision"),
        (Renaming(HALF), "Renaming, whose attributes make another distribution"),
        (Open(L, P), r"Open, which doesn't keep its argument \*arguments"),
        (Forgetful(P).to_event(1), "Forgetful, which doesn't keep"),
        (dist.Normal(L.clone().requires_grad_(), P), "without trainable tensors.*Tensor at loc"),
        (
            dist.TransformedDistribution(dist.Normal(L, P).to_event(1), [t.Planar(3)]),
            "without trainable tensors.*Planar at transforms_0",
        ),
    ],
)
def test_what_cant_be_made_again_is_refused(fn: Dist, words: str) -> None:
    with pytest.raises(ArgumentError, match=f"^prior: .*{words}"):
        take_apart(fn, "prior")


def test_the_advice_works() -> None:
    """A function that builds it is taken where the instance is refused."""
    with pytest.raises(ArgumentError, match=r"pass a function that builds it: lambda: "):
        as_conditional(Forgetful(HALF))
    part = as_conditional(lambda: Forgetful(HALF))
    assert torch.equal(part().log_prob(L[0]), Forgetful(HALF).log_prob(L[0]))


def test_what_a_distribution_wraps() -> None:
    mask = P > 0.3
    inner = dist.Normal(L, P)
    fn = inner.mask(mask).to_event(1).mask(mask=False)
    assert base_of(fn) is inner
    assert base_of(inner) is inner
    found = masks_of(fn)
    assert [events for _, events in found] == [1, 0]
    assert found[0][0] is False
    assert found[1][0] is mask
    assert masks_of(inner) == []
    point = dist.Delta(L, log_density=torch.tensor([1.0, 2.0, 3.0]))
    masked = point.mask(mask).to_event(1)
    density = log_density_of_delta(masked)
    assert density is not None
    assert float(density) == float((point.log_density * mask).sum())
    assert log_density_of_delta(inner) is None
    assert is_point(masked)
    assert is_point(dist.TransformedDistribution(point, [t.ExpTransform()]))
    assert not is_point(fn)
    assert is_improper(dist.ImproperUniform(constraints.real, (3,), ()).mask(mask).to_event(1))
    assert not is_improper(fn)
