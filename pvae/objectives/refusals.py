"""What objectives refuse of a pair before it is trained, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pvae.errors import PairError, oxford
from pvae.pair import Structure

__all__ = ["NEEDS", "REFUSALS", "Need", "refuse_shared"]

Need = Literal["density", "gradient", "local", "own draws", "unscaled", "split"]


def _density(name: str, structure: Structure) -> None:
    structure.require_density(name)
    structure.require_proper(name)


def _gradient(name: str, structure: Structure) -> None:
    if structure.not_reparametrised:
        raise PairError(
            name,
            "guide sites that can be reparametrised",
            f"{oxford(structure.not_reparametrised)}, whose draws have no gradient",
            ["objectives.VIMCO, RWS or TVO", "objectives.ELBO, with score-function gradients"],
        )


def _local(name: str, structure: Structure) -> None:
    if structure.global_sites:
        raise PairError(
            name,
            "sites inside the data plate alone",
            f"global site(s) {oxford(structure.global_sites)}",
            ["objectives.ELBO or IWAE, which know what they share"],
        )


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
    if structure.removed_scales:
        site, scale = next(iter(structure.removed_scales.items()))
        raise PairError(
            name,
            "no poutine.scale: a weight under a logarithm can't be scaled",
            f"a scale of {scale:g} at site '{site}'",
            ["beta and other weights in the objective", "objectives.ELBO, which has the scale"],
        )


def refuse_shared(name: str, structure: Structure) -> None:
    """Refuses parameters that model and guide share."""
    if structure.shared:
        raise PairError(
            f"{name}, which has one loss for the model and another for the guide",
            "parameters that belong to one of them",
            f"{oxford(structure.shared[:4])} in both",
            ["shared='model' or shared='guide', to say whose loss moves them"],
        )


def _split(name: str, structure: Structure) -> None:
    if structure.enumerated:
        raise PairError(
            f"{name}, which weighs the rate",
            "no latents that the model sums out",
            oxford(structure.enumerated),
            ["objectives.ELBO()", "a guide for them"],
        )


REFUSALS: dict[Need, Callable[[str, Structure], None]] = {
    "density": _density,
    "gradient": _gradient,
    "local": _local,
    "own draws": _own_draws,
    "unscaled": _unscaled,
    "split": _split,
}

NEEDS: dict[Need, str] = {
    "density": "a density of q",
    "gradient": "reparametrised draws",
    "local": "local sites alone",
    "own draws": "no joint draw of all data",
    "unscaled": "no poutine.scale",
    "split": "nothing summed out",
}
"""Each need in the words of the table of objectives."""
