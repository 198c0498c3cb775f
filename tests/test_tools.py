"""Every public tool takes a pair first, and says so to those who write two programs, as in Pyro."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pvae
from pvae import bounds, diagnostics, export, latent, objectives, recipes, testing
from pvae.errors import ArgumentError

D, Q = 4, 2
OTHERS: dict[str, Any] = {"objectives": {"ELBO": objectives.ELBO()}, "path": "folder"}
TOOLS: dict[str, Callable[..., Any]] = {
    f"{module.__name__}.{name}": function
    for module in (pvae, bounds, diagnostics, export, latent, testing)
    for name in module.__all__
    if inspect.isfunction(function := getattr(module, name))
    and next(iter(inspect.signature(function).parameters), "") == "pair"
}


def test_there_are_tools_to_look_at() -> None:
    assert {"pvae.fit", "pvae.bounds.evidence", "pvae.testing.check_pair"} < TOOLS.keys()
    assert len(TOOLS) >= 20


@pytest.mark.parametrize("name", TOOLS)
def test_two_programs_are_refused_with_the_line_that_works(name: str) -> None:
    tool, vae = TOOLS[name], recipes.vae(D, Q, hidden=(3,))
    with pytest.raises(ArgumentError) as error:
        tool(vae.model, vae.guide, torch.ones(2, D))
    short = name.rsplit(".", 1)[-1]
    assert str(error.value).startswith(f"{short}: expected a pair as the first argument")
    assert f"{short}((model, guide), ...)" in error.value.fixes


@pytest.mark.parametrize("name", TOOLS)
def test_one_program_is_refused_likewise(name: str) -> None:
    tool, vae = TOOLS[name], recipes.vae(D, Q, hidden=(3,))
    parameters = inspect.signature(tool).parameters.values()
    needed = [p for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    others = [OTHERS.get(p.name, torch.ones(2, D)) for p in needed[1:]]
    with pytest.raises(ArgumentError) as error:
        tool(vae.model, *others)
    short = name.rsplit(".", 1)[-1]
    assert error.value.where.startswith(f"{short}, its first argument")
    assert f"{short}((model, guide), ...)" in error.value.fixes


def test_the_line_that_works_works() -> None:
    x = torch.ones(6, D)
    vae = recipes.vae(D, Q, hidden=(3,))
    run = pvae.fit((vae.model, vae.guide), x, epochs=1, progress=False)
    assert len(run.history) == 1
    assert bounds.elbo((vae.model, vae.guide), x).mean < 0
