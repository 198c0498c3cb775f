"""How often the screen blames exact guides, and whether it finds guides that are off.

    python benchmarks/alarms.py [--seed 0] [--repeats 5]

`pvae.diagnose` with all defaults on 30 toys whose guides are the exact posteriors: linear-Gaussian
ones of 1 to 10 latents, some of them idle, small and large data sets, discrete, hierarchical,
masked and labelled ones. Data are drawn from the models, so that nothing is wrong with these,
either. Then the same with the guides of 15 toys off: shifted by 0.3 of their standard deviations,
or scaled by 0.8. Writes ``benchmarks/results/alarms.md``.

false verdicts   lines that are bad, or worth a look, although the guide is exact
wrong next       last lines other than the all-clear; idle dimensions may be named
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from provenance import made_with
from scipy.stats import binom
from torch import Tensor

import pvae
from pvae.data import LinearGaussian
from pvae.diagnostics import NOTHING, Diagnosis

torch.set_default_dtype(torch.float64)
RESULTS = Path(__file__).parent / "results"
Make = Callable[[Tensor, Tensor], Any]
"""From a posterior's means and covariance to what the guide draws from."""


def exact(mean: Tensor, covariance: Tensor) -> Any:
    return dist.MultivariateNormal(mean, covariance)


def shifted(mean: Tensor, covariance: Tensor) -> Any:
    return dist.MultivariateNormal(mean + 0.3 * covariance.diagonal(0, -2, -1).sqrt(), covariance)


def scaled(mean: Tensor, covariance: Tensor) -> Any:
    return dist.MultivariateNormal(mean, covariance * 0.8**2)


@dataclass(frozen=True)
class Toy:
    """A pair whose guide is made from the exact posterior, and data from its model."""

    name: str
    pair: Callable[[Make], tuple[Any, Any]]
    data: Callable[[int], Any]


def linear(num_features: int, num_latents: int, n: int, idle: int = 0) -> Toy:
    """x = W z + b + noise."""
    toy = LinearGaussian.random(num_features, num_latents, seed=num_latents)
    weight = torch.cat([toy.weight, torch.zeros(num_features, idle)], 1)
    toy = LinearGaussian(weight, toy.bias, toy.sigma)

    def pair(make: Make) -> tuple[Any, Any]:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(num_latents + idle), 1.0).to_event(1))
                loc = z @ toy.weight.T + toy.bias
                pyro.sample("x", dist.Normal(loc, toy.sigma).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", make(*toy.posterior(x)))

        return model, guide

    beside = f" and {idle} idle" if idle else ""
    name = f"linear-Gaussian, {num_latents}{beside} of {num_features}, N = {n}"
    return Toy(name, pair, lambda seed: toy.sample(n, seed=seed))


def hierarchical(n: int) -> Toy:
    """z2 -> z1 -> x in one dimension each: the guide draws z1 and then z2 given z1."""

    def pair(make: Make) -> tuple[Any, Any]:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z2 = pyro.sample("z2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                z1 = pyro.sample("z1", dist.Normal(z2, 0.5).to_event(1))
                pyro.sample("x", dist.Normal(z1, 0.7).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            prior, noise = 1.25, 0.49
            of_z1, of_z2 = prior * noise / (prior + noise), 0.25 / 1.25
            with pyro.plate("data", len(x)):
                mean = x * prior / (prior + noise)
                z1 = pyro.sample("z1", make(mean, torch.tensor([[of_z1]])))
                pyro.sample("z2", make(z1 / 1.25, torch.tensor([[of_z2]])))

        return model, guide

    def data(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(n, 1, generator=generator) * (1.25 + 0.49) ** 0.5

    return Toy(f"hierarchical, N = {n}", pair, data)


def masked(n: int) -> Toy:
    """Three readings of one latent, each missing in a third of the data."""

    def pair(make: Make) -> tuple[Any, Any]:
        def model(x: Tensor, seen: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                fn = dist.Normal(z.expand(*z.shape[:-1], 3), 0.8).mask(seen).to_event(1)
                pyro.sample("x", fn, obs=x)

        def guide(x: Tensor, seen: Tensor) -> None:
            precision = 1 + seen.sum(1, keepdim=True) / 0.64
            mean = (x * seen).sum(1, keepdim=True) / 0.64 / precision
            with pyro.plate("data", len(x)):
                pyro.sample("z", make(mean, 1 / precision[..., None]))

        return model, guide

    def data(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(n, 1, generator=generator)
        x = z + 0.8 * torch.randn(n, 3, generator=generator)
        return x, torch.rand(n, 3, generator=generator) < 2 / 3

    return Toy(f"masked, N = {n}", pair, data)


def labelled(n: int) -> Toy:
    """The latent's prior depends on a class that both programs are given."""
    centres = torch.tensor([-1.5, 0.0, 2.0])

    def pair(make: Make) -> tuple[Any, Any]:
        def model(x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(centres[y][:, None], 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 0.6).to_event(1), obs=x)

        def guide(x: Tensor, y: Tensor) -> None:
            variance = 0.36 / 1.36
            mean = variance * (x / 0.36 + centres[y][:, None])
            with pyro.plate("data", len(x)):
                pyro.sample("z", make(mean, torch.tensor([[variance]])))

        return model, guide

    def data(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(3, (n,), generator=generator)
        noise = torch.randn(n, 2, generator=generator) * torch.tensor([1.0, 0.6])
        return centres[y][:, None] + noise.sum(1, keepdim=True), y

    return Toy(f"labelled, N = {n}", pair, data)


def discrete(n: int) -> Toy:
    """A latent of two states and Poisson counts; guides are off by their log odds."""
    rates = torch.tensor([2.0, 5.0])

    def pair(make: Make) -> tuple[Any, Any]:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)))
                pyro.sample("x", dist.Poisson(rates[z.long()]), obs=x)

        def guide(x: Tensor) -> None:
            logits = math.log(0.4 / 0.6) + x * (rates[1] / rates[0]).log() - (rates[1] - rates[0])
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=logits))

        return model, guide

    def data(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        z = (torch.rand(n, generator=generator) < 0.4).long()
        return torch.poisson(rates[z], generator=generator)

    return Toy(f"discrete, N = {n}", pair, data)


CONTINUOUS = [
    *(linear(q + 2, q, n) for q, n in ((1, 20), (1, 500), (2, 100), (3, 300), (5, 500), (8, 200))),
    *(linear(q, q, 300) for q in (2, 10)),
    *(linear(4, 2, 300, idle) for idle in (2, 8)),
    *(hierarchical(n) for n in (100, 500)),
    *(masked(n) for n in (100, 400)),
    labelled(300),
]
"""The 15 whose guides are also tried off."""

EXACT = [
    *CONTINUOUS,
    *(linear(q + 3, q, n) for q, n in ((1, 50), (2, 1000), (4, 40), (6, 500), (7, 80), (9, 300))),
    *(discrete(n) for n in (50, 200, 500)),
    *(hierarchical(n) for n in (40, 250)),
    *(masked(n) for n in (50, 1000)),
    *(labelled(n) for n in (60, 600)),
]


def diagnose(toy: Toy, make: Make, seed: int) -> Diagnosis:
    return pvae.diagnose(toy.pair(make), toy.data(seed + 1), progress=False, seed=seed)


def named(found: Diagnosis, verdict: str) -> list[str]:
    """Names of the lines that have a verdict."""
    return [line.name for line in found.findings() if line.verdict == verdict]


def of_exact(seed: int, repeats: int) -> tuple[list[str], dict[str, int]]:
    rows, counts = [], {"bad": 0, "look": 0, "next": 0}
    for toy in EXACT:
        said, wrong = [], []
        for repeat in range(repeats):
            found = diagnose(toy, exact, seed + 1000 * repeat)
            bad, look = named(found, "bad"), named(found, "look")
            look = [name for name in look if name not in of_the_model(toy)]
            is_right = found.advice == NOTHING or found.advice.endswith("(collapsed units)")
            counts["bad"] += bool(bad)
            counts["look"] += bool(look)
            counts["next"] += not is_right
            said += [f"{name} (bad)" for name in bad] + look
            wrong += [] if is_right else [found.advice]
        rows.append(f"| {toy.name} | {', '.join(said) or '-'} | {'; '.join(wrong) or '-'} |")
    return rows, counts


def toy_has_idle(toy: Toy) -> bool:
    return "idle" in toy.name


def of_the_model(toy: Toy) -> tuple[str, ...]:
    """Lines that say what is so: idle dimensions are collapsed."""
    return ("collapsed units",) if toy_has_idle(toy) else ()


def of_wrong(make: Make, seed: int) -> tuple[list[str], int]:
    rows, count = [], 0
    for toy in CONTINUOUS:
        found = diagnose(toy, make, seed)
        bad = named(found, "bad")
        look = [name for name in named(found, "look") if name not in of_the_model(toy)]
        count += bool(bad or look)
        rows.append(f"| {toy.name} | {', '.join(bad) or '-'} | {', '.join(look) or '-'} |")
    return rows, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    seed, repeats = arguments.seed, arguments.repeats
    warnings.simplefilter("ignore", pvae.errors.PvaeWarning)
    started = time.process_time()
    rows, counts = of_exact(seed, repeats)
    wrong = {"shifted by 0.3 sd": shifted, "scaled by 0.8": scaled}
    found = {name: of_wrong(make, seed) for name, make in wrong.items()}
    made = made_with(time.process_time() - started)
    screens = repeats * len(EXACT)
    limit = int(binom.isf(0.01, screens, 0.05))
    text = [
        "# False alarms, and guides that are off",
        "",
        f"`python benchmarks/alarms.py --seed {seed} --repeats {repeats}`: {made['minutes']} "
        f"minutes of one core; commit {made['commit']}, pvae {made['pvae']}, "
        f"torch {made['torch']}.",
        "",
        f"Of {len(EXACT)} exact guides, each with {repeats} data sets, {counts['bad']} screens "
        f"have a line that is bad, {counts['look']} one that is worth a look, {counts['next']} a "
        "last line that sends one the wrong way. (Verdicts are worth a look by chance on one "
        f"screen in twenty at most: more than {limit} of {screens} happen once in a hundred.)",
        "",
        *(
            f"Guides {name}: {count} of {len(CONTINUOUS)} are found, on the default screen."
            for name, (_, count) in found.items()
        ),
        "",
        "| exact guide | false verdicts | wrong next |",
        "|---|---|---|",
        *rows,
    ]
    for name, (lines, _) in found.items():
        text += ["", f"| {name} | bad | worth a look |", "|---|---|---|", *lines]
    print("\n".join(text))
    (RESULTS / "alarms.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
