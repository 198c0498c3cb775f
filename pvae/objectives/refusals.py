"""What objectives refuse of a pair before it is trained, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pvae.errors import ArgumentError, PairError, oxford
from pvae.pair import Structure

__all__ = ["NEEDS", "Need", "check_needs", "check_of_pyro"]

Need = Literal["density", "gradient", "local", "own draws", "unscaled", "split", "own parameters"]


def check_needs(name: str, structure: Structure, *needs: Need) -> None:
    """Refuses a pair that hasn't what an objective needs."""
    for need in needs:
        NEEDS[need][1](name, structure)


def _density(name: str, structure: Structure) -> None:
    structure.require_density(name)
    structure.require_proper(name)


def _gradient(name: str, structure: Structure) -> None:
    if sites := structure.not_reparametrised:
        got = f"{oxford(sites)}, whose draws have no gradient"
        fixes = ["objectives.VIMCO, RWS or TVO", "objectives.ELBO, with score-function gradients"]
        raise PairError(name, "guide sites that can be reparametrised", got, fixes)


def _local(name: str, structure: Structure) -> None:
    if sites := structure.shared_sites:
        fixes = ["objectives.ELBO or IWAE, which know what they share"]
        expected = "sites inside the data plate alone"
        raise PairError(name, expected, f"global site(s) {oxford(sites)}", fixes)


def _own_draws(name: str, structure: Structure) -> None:
    joint = [site for site in structure.auxiliary if site in structure.global_sites]
    if structure.fed and joint and not set(structure.auxiliary) - set(joint):
        raise PairError(
            f"{name}, which weighs several draws of each datum",
            "a guide that draws the latents of data in the data plate",
            f"{oxford(structure.fed)} drawn together with all others at site {oxford(joint)}",
            ["AutoNormal, or a guide of your own", "objectives.ELBO"],
        )


def _unscaled(name: str, structure: Structure) -> None:
    for site, scale in structure.removed_scales.items():
        got = f"a scale of {scale:g} at site '{site}'"
        fixes = ["beta and other weights in the objective", "objectives.ELBO, which has the scale"]
        expected = "no poutine.scale: a weight under a logarithm can't be scaled"
        raise PairError(name, expected, got, fixes)


def _split(name: str, structure: Structure) -> None:
    if sites := structure.enumerated:
        fixes = ["objectives.ELBO()", "a guide for them"]
        expected = "no latents that the model sums out"
        raise PairError(f"{name}, which weighs the rate", expected, oxford(sites), fixes)


def _own_parameters(name: str, structure: Structure) -> None:
    if structure.shared:
        raise PairError(
            f"{name}, which has one loss for the model and another for the guide",
            "parameters that belong to one of them",
            f"{oxford(structure.shared[:4])} in both",
            ["shared='model' or shared='guide', to say whose loss moves them"],
        )


NEEDS: dict[Need, tuple[str, Callable[[str, Structure], None]]] = {
    "density": ("a density of q", _density),
    "gradient": ("reparametrised draws", _gradient),
    "local": ("local sites alone", _local),
    "own draws": ("no joint draw of all data", _own_draws),
    "unscaled": ("no poutine.scale", _unscaled),
    "split": ("nothing summed out", _split),
    "own parameters": ("no shared parameters", _own_parameters),
}
"""Each need in the words of `pvae.objectives.table`, and what refuses a pair without it."""


def check_of_pyro(objective: object, structure: Structure) -> None:
    """Refuses one of Pyro's objectives where its loss has missing values that no guide draws."""
    if structure.imputed:
        name, expected = type(objective).__name__, "one of pvae's, which leave missing values out"
        actual = f"{name}, in whose loss the density of {oxford(structure.imputed)} counts"
        fixes = ["objectives.ELBO()", f"pyro.sample('{structure.imputed[0]}', ...) in the guide"]
        raise ArgumentError("objective", expected, actual, fixes)
