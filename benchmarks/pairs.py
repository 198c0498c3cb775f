"""The table of pairs: which kinds run, and what each number of theirs was compared with.

    python benchmarks/pairs.py                       writes the table into docs/pairs.md
    python benchmarks/pairs.py LDA Markov --again    makes some rows of it anew

Every cell is a number with what it was compared with, or the reason why there is none.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import field_autoencoders  # noqa: F401
import field_bayesian  # noqa: F401
import field_discrete  # noqa: F401
import pyro
import torch
from field import ROWS, Row
from provenance import made_with
from pyro.infer import Trace_ELBO

import pvae
from pvae import bounds, diagnose, export, fit, objectives
from pvae.errors import PvaeError

RESULTS = Path(__file__).parent / "results" / "pairs.json"
PAGE = Path(__file__).parents[1] / "docs" / "pairs.md"
START, END = "<!-- table of pairs: benchmarks/pairs.py -->", "<!-- end of the table -->"
COLUMNS = ("fit", "equals SVI", "evidence", "diagnose", "export", "compiled")
STEPS = 10
FAULT = "FAULT"


def made(kind: str) -> Row:
    """A row's pair, new, in an empty store."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return ROWS[kind]()


def data_of(found: Row) -> Any:
    """What tools take: the batch, or its one array."""
    return found.batch if len(found.batch) != 1 else found.batch[0]


def parts_of(found: Row) -> tuple[Any, Any]:
    pair = found.pair
    return (pair.model, pair.guide) if hasattr(pair, "model") else pair


def fitting(kind: str, found: Row) -> str:
    """Trains the row's pair, which the other cells look at."""
    options = {"epochs": 60, "batch_size": None, "lr": 0.02, "progress": False, "seed": 0}
    objective = None if found.objective is None else found.objective()
    run = fit(found.pair, data_of(found), objective, **options | found.options)
    losses = run.history["loss"]
    assert losses[-1] < losses[0], "training made it worse"
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f}"


def parameters(pair: tuple[Any, Any]) -> dict[str, torch.Tensor]:
    """Everything trainable, wherever it is."""
    found = {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}
    for side, program in zip(("model", "guide"), pair, strict=True):
        if isinstance(program, torch.nn.Module):
            found |= {f"{side}.{n}": p.detach().clone() for n, p in program.named_parameters()}
    return found


def trained(
    kind: str, make: Callable[..., Any], steps: int, loss: Any = None, **options: Any
) -> dict[str, Any]:
    """Losses and parameters of some steps of an SVI class."""
    found = made(kind)
    model, guide = parts_of(found)
    if isinstance(guide, pyro.infer.autoguide.AutoGuide | pyro.contrib.easyguide.EasyGuide):
        with torch.no_grad():
            guide(*found.batch)  # sets up its parameters, by the same draws for both
    if make is pvae.SVI and isinstance(found.pair, pvae.Pair):
        options["plate"] = found.pair.plate
    loss = loss or (found.objective or Trace_ELBO)()
    pyro.set_rng_seed(1)
    svi = make(model, guide, pyro.optim.Adam({"lr": 0.01}), loss, **options)
    losses = [svi.step(*found.batch) for _ in range(steps)]
    return {"loss": torch.tensor(losses), **parameters((model, guide))}


def furthest(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return max(float((ours[n] - theirs[n]).abs().max() / (1 + theirs[n].abs().max())) for n in ours)


def equals_svi(kind: str, _: Row) -> str:
    theirs = trained(kind, pyro.infer.SVI, STEPS)
    off = furthest(trained(kind, pvae.SVI, STEPS), theirs)
    assert off < 1e-6, f"differs from Pyro by {off:.1e}"
    return "0" if off == 0 else f"{off:.0e}"


def total_error(estimate: pvae.Estimate) -> float:
    """The error over draws of the total over data."""
    return estimate.se_draws * (abs(estimate.total / estimate.mean) if estimate.mean else 1.0)


def with_error(estimate: pvae.Estimate) -> str:
    error = total_error(estimate)
    return f"{estimate.total:.2f} +- {f'{error:.2g}' if error > 1e-6 else '0'}"


def evidence(kind: str, found: Row) -> str:
    options = {"progress": False, "seed": 0} | found.evidence
    estimate = bounds.evidence(found.pair, data_of(found), **options)
    if estimate.kind == "none":
        return f"no bound: {estimate.name} {estimate.total:.2f}"
    if found.exact is not None:
        with torch.no_grad():
            exact = found.exact()
        above = estimate.total - exact  # an estimate of a lower bound
        assert above < 6 * total_error(estimate) + 1e-6 * abs(exact), f"{above} nats too high"
        return f"{with_error(estimate)}; {exact:.2f} by {found.oracle}"
    bound = bounds.elbo(found.pair, data_of(found), 100, seed=0, progress=False)
    return f"{with_error(estimate)}; ELBO {bound.total:.2f}"


def diagnosis(kind: str, found: Row) -> str:
    screen = diagnose(found.pair, data_of(found), progress=False, seed=0)
    lines = screen.findings()
    count = Counter(line.verdict for line in lines)
    bad = [line.name for line in lines if line.verdict == "bad"]
    told = f", {len(screen.missing)} not defined, with reasons" if screen.missing else ""
    return f"{len(lines)} lines, {count['good']} good, bad: {', '.join(bad) or 'none'}{told}"


def exported(kind: str, found: Row) -> str:
    """The mean log weight is the ELBO: compared with it, in standard errors."""
    seed = zlib.crc32(kind.encode()) % 10_000  # else rows of one shape would have the same noise
    options: dict[str, Any] = {"num_particles": 400, "progress": False}
    tree = export.to_arviz(found.pair, data_of(found), seed=seed, **options)
    groups = f"{len(tree.children)} groups"
    if "sample_stats" not in tree or "log_weight" not in tree["sample_stats"]:
        reasons = str(tree.attrs["left_out"]).split("; ")
        return f"{groups}; {next(r for r in reasons if r.startswith('log_'))}"
    weights: Any = tree["sample_stats"]["log_weight"]
    draws = weights.sum([d for d in weights.dims if d not in ("chain", "draw")]).to_numpy()[0]
    bound = bounds.elbo(found.pair, data_of(found), seed=seed + 1, **options).total
    error = draws.std() * (2 / len(draws)) ** 0.5 + 1e-6 * abs(bound)
    off = (draws.mean() - bound) / error
    assert abs(off) < 6, f"mean log weight {draws.mean():.2f}, ELBO {bound:.2f}"
    return f"{groups}; ELBO off by {off:+.1f} se"


def compiled(kind: str, _: Row) -> str:
    """By our ELBO, which has the numbers of ``TraceEnum_ELBO``, too."""
    theirs = trained(kind, pvae.SVI, 3, objectives.ELBO())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = trained(kind, pvae.SVI, 3, objectives.ELBO(), engine="compiled")
    texts = [str(w.message) for w in caught if issubclass(w.category, pvae.PvaeWarning)]
    for text in texts:
        if "run as Python" in text:
            return f"runs as Python: {first_sentence(text.split(': ', 1)[1])}"
    off = furthest(ours, theirs)
    assert off < 1e-5, f"differs from eager by {off:.1e}"
    return "0" if off == 0 else f"{off:.0e}"


def first_sentence(text: str) -> str:
    line = " ".join(text.split(" Try: ")[0].split())
    return re.split(r"(?<=[.;])\s", line)[0].rstrip(".;")


MEASURES: dict[str, Callable[[str, Row], str]] = dict(
    zip(COLUMNS, (fitting, equals_svi, evidence, diagnosis, exported, compiled), strict=True)
)


def cell(column: str, kind: str, found: Row) -> str:
    """A number, or the reason why there is none; a fault is told as what it is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return MEASURES[column](kind, found)
    except PvaeError as error:
        return f"refused: {first_sentence(str(error))}"
    except Exception as error:
        first, *_ = (str(error).strip() or "no message").splitlines()
        return f"{FAULT} {type(error).__name__}: {first}"


def measured(kind: str, columns: Iterable[str]) -> dict[str, str]:
    """A row of the table. Cells that train pairs of their own come last: they clear the store."""
    own = [c for c in columns if c in ("equals SVI", "compiled")]
    found, cells = made(kind), {}
    for column in [*[c for c in columns if c not in own], *own]:
        start = time.perf_counter()
        cells[column] = cell(column, kind, found)
        print(f"{column:>12} {time.perf_counter() - start:6.1f} s  {cells[column]}", flush=True)
    return cells


def as_table(rows: dict[str, dict[str, str]]) -> str:
    lines = [" | ".join(("kind of pair", *COLUMNS)), " | ".join(["---"] * (1 + len(COLUMNS)))]
    for kind, cells in rows.items():
        shown = [cells[c].replace("|", "/") for c in COLUMNS]
        lines.append(" | ".join([kind, *shown]))
    return "\n".join(f"| {line} |" for line in lines)


def write(rows: dict[str, dict[str, str]], facts: dict[str, Any]) -> None:
    """Keeps the rows as JSON, and puts the table between its marks in docs/pairs.md."""
    RESULTS.write_text(json.dumps({"made with": facts, "rows": rows}, indent=1) + "\n")
    if all(column in rows.get(kind, {}) for kind in ROWS for column in COLUMNS):
        said = ", ".join(f"{name} {value}" for name, value in facts.items())
        text = PAGE.read_text()
        before, after = text.split(START)[0], text.split(END)[1]
        table = f"{START}\n\n{as_table(rows)}\n\nMade with {said}.\n\n{END}"
        PAGE.write_text(f"{before}{table}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="rows whose names have one of these words")
    parser.add_argument("--columns", default=",".join(COLUMNS))
    parser.add_argument("--again", action="store_true", help="keep the other cells")
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    logging.getLogger("pyro").setLevel(logging.WARNING)
    columns, start = arguments.columns.split(","), time.perf_counter()
    facts = made_with(0.0) | {"pyro": pyro.__version__}
    rows = json.loads(RESULTS.read_text())["rows"] if arguments.again else {}
    for kind in ROWS:
        if any(word.lower() in kind.lower() for word in arguments.words or [""]):
            print(f"== {kind}", flush=True)
            rows[kind] = rows.get(kind, {}) | measured(kind, columns)
            facts["minutes"] = round((time.perf_counter() - start) / 60, 1)
            write({name: rows[name] for name in ROWS if name in rows}, facts)
    faults = [
        f"{k}, {c}: {text}" for k, r in rows.items() for c, text in r.items() if FAULT in text
    ]
    print("\n".join(["-- faults", *faults]) if faults else "no faults")


if __name__ == "__main__":
    main()
