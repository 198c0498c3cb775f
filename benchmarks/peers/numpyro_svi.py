"""NumPyro's SVI: an epoch is one compiled ``lax.scan`` over its batches, the data on the device.

``numpyro.module`` of stax networks, ``numpyro.optim.Adam``, ``Trace_ELBO``, or
``RenyiELBO(alpha=0)`` for IWAE. The loss is a sum over the batch, which Adam doesn't see. The scale
is an exponential, and the rate is drawn. Weights start as stax has them, not as torch does.
"""

from __future__ import annotations

from typing import Any

import jax  # type: ignore[import-not-found]
import jax.numpy as jnp  # type: ignore[import-not-found]
import numpyro  # type: ignore[import-not-found]
import numpyro.distributions as dist  # type: ignore[import-not-found]
from jax.example_libraries import stax  # type: ignore[import-not-found]
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO  # type: ignore[import-not-found]

from peers.common import HIDDEN, LATENT, LR, PIXELS, Case, Side, images


def layers(widths: tuple[int, ...], activation: Any) -> Any:
    *inner, last = widths
    found: list[Any] = []
    for width in inner:
        found += [stax.Dense(width), activation]
    return stax.serial(*found, stax.Dense(last))


def make(case: Case, _: str) -> Side:
    latent, hidden = LATENT[case.model], HIDDEN[case.model]
    activation = stax.Tanh if case.model == "iwae" else stax.Relu

    def model(x: Any) -> None:
        decode = numpyro.module("decoder", layers((*hidden[::-1], PIXELS), activation), (1, latent))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([latent]).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x: Any) -> None:
        encode = numpyro.module("encoder", layers((*hidden, 2 * latent), activation), (1, PIXELS))
        with numpyro.plate("data", len(x)):
            loc, log_var = jnp.split(encode(x), 2, axis=-1)
            numpyro.sample("z", dist.Normal(loc, jnp.exp(0.5 * log_var)).to_event(1))

    loss = RenyiELBO(alpha=0, num_particles=case.draws) if case.model == "iwae" else Trace_ELBO()
    svi = SVI(model, guide, numpyro.optim.Adam(LR), loss)
    x = jnp.asarray(images(case))

    @jax.jit
    def epoch(state: Any, key: Any) -> tuple[Any, Any]:
        order = jax.random.permutation(key, case.rows).reshape(-1, case.batch)
        return jax.lax.scan(lambda state, index: svi.update(state, x[index]), state, order)

    key, start = jax.random.split(jax.random.PRNGKey(case.seed))
    state = svi.init(start, x[: case.batch])

    def run(steps: int) -> float:
        nonlocal state, key
        found = []
        for _ in range(steps // case.steps_per_epoch):
            key, order = jax.random.split(key)
            state, losses = epoch(state, order)
            found.append(losses)
        return float(jnp.concatenate(found).mean()) / case.batch

    parameters = sum(p.size for p in jax.tree_util.tree_leaves(svi.get_params(state)))
    return Side(run, parameters, ("numpyro", "jax", "jaxlib"))
