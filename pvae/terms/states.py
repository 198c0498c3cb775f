"""States of discrete latents in a pass, by Pyro's variable elimination."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Literal

import torch
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree, contract_to_tensor
from pyro.poutine import Trace
from torch import Tensor

from pvae.errors import PairError, oxford
from pvae.internals import DIM_TO_SYMBOL, ENUMERATE_SYMBOL
from pvae.pair import Structure
from pvae.pair.messages import sample_sites, score
from pvae.types import Site

__all__ = ["Factor", "GuideStates", "States"]

GuideStates = Literal["drawn", "averaged", "summed"]
"""What becomes of states that the guide marks to be enumerated: one is drawn; every log density is
its mean over them; or all are summed out of the importance weight."""

Factor = tuple[Site, Tensor]
"""A site and its log density, masked and not scaled, over states and plates."""


_DATA = "a"  # the symbol of the first plate, which Pyro would give to one of two names alone


class States:
    """The dimensions of a pass along which states are, by symbols.

    Along `pyro.markov` a dimension is used again and again; its uses have symbols of their own.

    Arguments:
        structure: The pair.
        guide: The guide's trace.
        model: The model's, replayed against it.
        rank: Number of dimensions that plates take, that of particles included.
        of_guide: What becomes of the guide's states.
    """

    def __init__(
        self, structure: Structure, guide: Trace, model: Trace, rank: int, of_guide: GuideStates
    ) -> None:
        self.rank, self.of_guide = rank, of_guide
        self.plates = dict.fromkeys(structure.plates, _DATA)
        self.dims: dict[str, int] = {}
        for trace in (guide, model):
            trace.symbolize_dims(self.plates)
            self.dims |= trace.symbol_to_dim
        self._drawn_from = [s for s in sample_sites(guide) if ENUMERATE_SYMBOL in s["infer"]]
        names = {s["infer"][ENUMERATE_SYMBOL] for s in self._drawn_from}
        self.averaged = names if of_guide == "averaged" else set[str]()

    def of(self, site: Site, tensor: Tensor) -> set[str]:
        """The states that a site's log density depends on."""
        names, shape = site["infer"][DIM_TO_SYMBOL], tensor.shape
        plates = set(self.plates.values())
        return {names[d] for d in range(-len(shape), 0) if shape[d] > 1 and d in names} - plates

    def are_averaged(self, site: Site, tensor: Tensor) -> bool:
        """Whether a log density depends on no other states than those that are averaged over."""
        return self.of_guide == "averaged" and self.of(site, tensor) <= self.averaged

    def sum_out(self, factors: Iterable[Factor]) -> list[tuple[list[Site], Tensor]]:
        """Sums states out, but for those that the guide averages over.

        Returns:
            The sites that are linked by states, and what is left of them, over plates.

        Raises:
            PairError: If plates aren't nested as trees, or states depend on others inside a plate.
        """
        return [self._eliminated(*linked) for linked in self._linked(factors)]

    def _linked(self, factors: Iterable[Factor]) -> list[tuple[set[str], list[Factor]]]:
        """Factors that share states, directly or by others, with these states."""
        groups: list[tuple[set[str], list[Factor]]] = []
        for site, tensor in factors:
            states = self.of(site, tensor) - self.averaged
            met = [group for group in groups if group[0] & states]
            groups = [group for group in groups if not group[0] & states]
            known = [factor for _, some in met for factor in some]
            groups.append((states.union(*(own for own, _ in met)), [*known, (site, tensor)]))
        return groups

    def _eliminated(self, states: set[str], factors: list[Factor]) -> tuple[list[Site], Tensor]:
        sites = list({site["name"]: site for site, _ in factors}.values())
        tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for site, tensor in factors:
            tree.setdefault(self._ordinal(site), []).append(_packed(site, tensor))
        kept = set[str]().union(*(self.of(*factor) for factor in factors)) & self.averaged
        ordinals = [*tree]
        try:
            ((term,),) = contract_tensor_tree(tree, states).values()
        except (NotImplementedError, ValueError) as error:
            raise _entangled(sites, str(error).splitlines()[0]) from error
        left = packed.unpack(term, self.dims)
        return sites, self._average(frozenset.intersection(*ordinals), left, kept)

    def _ordinal(self, site: Site) -> frozenset[str]:
        frames = (frame for frame in site["cond_indep_stack"] if frame.vectorized)
        return frozenset(self.plates[frame.name] for frame in frames)

    def mean(self, site: Site, tensor: Tensor) -> Tensor:
        """The mean of a site's log density over the guide's states."""
        return self._average(self._ordinal(site), tensor, self.of(site, tensor))

    def _average(self, ordinal: frozenset[str], tensor: Tensor, states: set[str]) -> Tensor:
        """The mean of what is inside some plates over the guide's states that it depends on."""
        if not states:
            return self._over_plates(tensor)
        needed, factors = set(states), list[Tensor]()
        for site in reversed(self._drawn_from):  # the ones that others depend on come first
            if site["infer"][ENUMERATE_SYMBOL] in needed:
                if not self._ordinal(site) <= ordinal:
                    raise _entangled([site], "a log density outside of its plates depends on it")
                log_q = score(site, tensor.device)
                needed |= self.of(site, log_q)
                factors.append(_packed(site, log_q))
        tree = OrderedDict({frozenset[str](): factors})
        log_prob = contract_to_tensor(tree, needed, target_dims=set(states))
        prob = packed.unpack(log_prob, self.dims).exp()
        each = prob * torch.where(prob == 0, 0.0, tensor)  # where a log density may be infinite
        return self._over_plates(each.sum([self.dims[state] for state in states], keepdim=True))

    def _over_plates(self, tensor: Tensor) -> Tensor:
        """Without the dimensions of states, which are of size 1."""
        return tensor.reshape(tensor.shape[max(0, tensor.dim() - self.rank) :])


def _packed(site: Site, tensor: Tensor) -> Tensor:
    try:
        return packed.pack(tensor, site["infer"][DIM_TO_SYMBOL])
    except ValueError as error:
        expected = "a log density over its plates and the states before it"
        fixes = [".to_event(k) on the site's distribution", "a plate around the site"]
        actual = f"shape {tuple(tensor.shape)}"
        raise PairError(f"site '{site['name']}'", expected, actual, fixes) from error


def _entangled(sites: list[Site], why: str) -> PairError:
    names = oxford(site["name"] for site in sites)
    expected = "states in nested plates, on which nothing outside a plate depends"
    fixes = ["a loop, for i in pyro.plate(...), in place of one of the plates", "a guide for it"]
    return PairError(f"states at {names}", expected, why, fixes)
