"""Names that come from data and files are shown as text, wherever that is."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvae
import pvae.cli
from pvae import bounds, diagnostics, plots
from pvae.errors import ArgumentError, PvaeError, PvaeWarning, escaped, shown, warn

NASTY = "<img src=x onerror=alert(1)>\x1b[2J\u202eevil\x07 $a$ & \udcff"
ACTED_ON = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def pair() -> tuple[Any, Any]:
    def program(x: Tensor, *, observe: bool) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample(NASTY, dist.Normal(torch.zeros(2), 1.0).to_event(1))
            if observe:
                pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    def model(x: Tensor) -> None:
        program(x, observe=True)

    def guide(x: Tensor) -> None:
        program(x, observe=False)

    return model, guide


def assert_is_text(text: str) -> None:
    assert not ACTED_ON.search(text)
    text.encode()


def test_text_is_left_as_it_is_where_nothing_acts_on_it() -> None:
    for text in ("z ~ N(0, \u03c3\u00b2)", "two\nlines", "na\u00efve", "\u65e5\u672c"):
        assert shown(text) == text
    assert shown("\r\x1b[31m\u200b") == "\\r\\x1b[31m\\u200b"
    assert escaped("<a b='c'>\x00") == "&lt;a b=&#x27;c&#x27;&gt;\\x00"


def test_results_and_estimates() -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    found: list[Any] = [
        diagnostics.surgery(pair(), x, progress=False),
        diagnostics.importance(pair(), x, num_particles=200, progress=False),
        diagnostics.sbc(pair(), x, num_simulations=100, num_particles=19, progress=False),
        bounds.elbo(pair(), x, 2),
    ]
    for result in found:
        assert_is_text(str(result))
        html = result._repr_html_()
        assert_is_text(html)
        assert "<img" not in html


def test_messages_and_warnings() -> None:
    error = ArgumentError(NASTY, NASTY, NASTY, [NASTY])
    assert_is_text(str(error))
    assert_is_text(error.one_line())
    with pytest.warns(PvaeWarning) as caught:
        warn(NASTY)
    assert_is_text(str(caught[0].message))
    with pytest.raises(PvaeError) as raised:
        diagnostics.active_units(pair(), torch.zeros(5, 3), site="\x1b[2J")
    assert_is_text(str(raised.value))


def test_figures_show_names_as_they_are() -> None:
    """No maths between dollar signs, which would also fail where it is none."""
    names = [f"$\\frac{{$ {NASTY[:20]}", "$b$"]
    figures = [
        plots.grid({name: np.zeros((2, 4, 4)) for name in names}),
        plots.latent_map(np.random.default_rng(0).random((8, 2)), np.array(names * 4)),
    ]
    for figure in figures:
        figure.canvas.draw()
        found = [t for axis in figure.axes for t in (axis.yaxis.label, *axis.get_yticklabels())]
        texts = [t.get_text() for t in found if "b" in t.get_text()]
        assert r"\$b\$" in texts


def test_the_folder_of_a_run_has_a_plain_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "my <b> \x1b[2J $data$.npy"
    np.save(tmp_path / name, np.random.default_rng(0).random((40, 3)))
    command = [
        "pvae",
        "train",
        "--data",
        name,
        "--hidden",
        "4",
        "--epochs",
        "1",
        "--engine",
        "eager",
    ]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        pvae.cli.main()
    assert stop.value.code == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["my_b_2J_data_-vae"]
    assert_is_text(capsys.readouterr().out)
