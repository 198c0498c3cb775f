"""Time of a training step: pvae beside hand-written torch, Pyro, pythae and NumPyro.

    python benchmarks/throughput.py [mlp iwae conv flow] [--batch 32 128 512] [--rounds 9]

mlp     784-400-20, ReLU; Bernoulli pixels
iwae    784-200-200-50, tanh; K = 1, 5 and 50 draws, batches of 20
conv    two strided convolutions, 16 and 32 channels, and the way back; latent of 20
flow    the guide is zuko's NICE given the pixels, latent of 20; decoder 400, ReLU

Each side has a process of its own on the same core and one thread, holds the same binary images,
and trains by Adam at 1e-3 on batches of a new permutation each epoch. One runs at a time: a round
is a few epochs of each in turn, from another one on each time, and the first rounds, in which
things are compiled, don't count. pythae and NumPyro are in an environment of their own, which
``make peers`` makes; without it they are left out. Pyro and pythae have ``mlp`` alone.
``benchmarks/peers`` has the sides; what sets each apart is said there.

Writes ``benchmarks/results/throughput.json`` and ``benchmarks/results/throughput.md``.

ms          of a step: median of rounds, and their least and greatest
against     hand-written torch with fused Adam: its median / this one's, so above 1 is faster
CPU ms      the processor's time for a step, median, which other programs disturb less
loss        nats a datum, mean of the last round; all have made the same number of steps, and how
            a scale comes of a layer matters in the first of them
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from peers.common import Case
from provenance import made_with

HERE = Path(__file__).parent
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"
FUSED, PYRO, PYTHAE, NUMPYRO = "hand-written, fused Adam", "Pyro SVI", "pythae", "NumPyro"
EAGER, COMPILED, CUDAGRAPH = "pvae eager", "pvae compiled", "pvae cudagraph"
CAPTURED = "hand-written, fused Adam, captured"
PRODUCTS = "matrix products alone"

ALL = ("mlp", "iwae", "conv", "flow")
SIDES: dict[str, tuple[str, str, tuple[str, ...]]] = {  # file, option, models
    EAGER: ("ours", "eager", ALL),
    COMPILED: ("ours", "compiled", ALL),
    CUDAGRAPH: ("ours", "cudagraph", ALL),
    "hand-written, Adam": ("hand", "default", ("mlp",)),
    FUSED: ("hand", "fused", ALL),
    "hand-written, fused Adam, compiled": ("hand", "compiled", ALL),
    CAPTURED: ("hand", "captured", ALL),
    PYRO: ("pyro_svi", "same", ("mlp",)),
    "Pyro SVI, its example's layers": ("pyro_svi", "example", ("mlp",)),
    PYTHAE: ("pythae_vae", "memory", ("mlp",)),
    "pythae, its own loader": ("pythae_vae", "loader", ("mlp",)),
    NUMPYRO: ("numpyro_svi", "", ("mlp", "iwae")),
    PRODUCTS: ("floor", "", ("mlp",)),
}
OF_CUDA = ("cudagraph", "captured")
IN_PEERS = ("pythae_vae", "numpyro_svi")
NOT_WRITTEN = {
    ("conv", NUMPYRO): "not written",
    ("flow", NUMPYRO): "not written: its flows aren't zuko's",
}
SPLIT = (EAGER, COMPILED, FUSED)

BARS: list[tuple[str, int, str, float]] = [  # whose, batch, than whom, times as fast
    ("pvae, best", 32, FUSED, 1.05),
    ("pvae, best", 128, FUSED, 1.05),
    ("pvae, best", 32, PYRO, 2.5),
    ("pvae, best", 128, PYRO, 1.8),
    ("pvae, best", 32, PYTHAE, 1.7),
    ("pvae, best", 128, PYTHAE, 1.7),
    ("pvae, best", 128, NUMPYRO, 0.9),
    (EAGER, 128, FUSED, 0.85),
    (EAGER, 128, PYRO, 1.4),
]
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}


def cases(models: list[str], batches: list[int] | None, device: str) -> Iterator[Case]:
    sizes = {"mlp": [32, 128, 512], "iwae": [20], "conv": [64], "flow": [128]}
    rows = {"mlp": 4096, "iwae": 2000, "conv": 1024, "flow": 4096}
    for model in models:
        for batch in batches or sizes[model]:
            whole = max(1, rows[model] // batch) * batch
            for draws in (1, 5, 50) if model == "iwae" else (1,):
                epochs = 1 if draws == 50 else 2
                yield Case(model, batch, draws, whole, epochs, device=device)


WHERE = """CPU ms of a step in one more round, under torch's profiler: in matrix products and
convolutions, in torch's other kernels, in the optimiser; what is left is Python, torch's dispatch
and the profiler itself. A compiled graph's own kernels, and calls of them, count as elementwise.
Step / products alone: without the profiler; products are timed in turn, on warm caches."""


class LeftOutError(Exception):
    """Why a side isn't measured."""


@dataclass
class Measured:
    """What a round took, step by step."""

    ms: float
    cpu_ms: float
    loss: float


class Worker:
    """A side in a process of its own."""

    def __init__(self, name: str, case: Case, core: int | None) -> None:
        module, option, _ = SIDES[name]
        is_peer = module in IN_PEERS
        if is_peer and not PEERS.exists():
            raise LeftOutError("no .venv-peers: make peers")
        if is_peer and case.device != "cpu":
            raise LeftOutError(f"its environment has no {case.device}")
        self.case = case
        self.errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        spec = {"module": module, "option": option, "case": asdict(case), "core": core}
        self.process = subprocess.Popen(
            [PEERS if is_peer else sys.executable, "-m", "peers.worker", json.dumps(spec)],
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | ONE_THREAD,
        )
        self.about = self._reply()

    def run(self) -> Measured:
        """Runs a round."""
        found = self._ask("steps")
        per_step = 1e3 / self.case.steps
        return Measured(found["seconds"] * per_step, found["cpu seconds"] * per_step, found["loss"])

    def split(self) -> dict[str, float]:
        """Runs a round under torch's profiler: where the time of a step goes, in ms."""
        return self._ask("split")

    def _ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            print(json.dumps({what: self.case.steps}), file=self.process.stdin, flush=True)
        except BrokenPipeError as error:
            raise LeftOutError(self._last_words()) from error
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        content: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in content:
            self.close()
            raise LeftOutError(content["error"])
        return content

    def _last_words(self) -> str:
        self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return lines[-1] if lines else f"ended with {self.process.returncode}"

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self.process.wait()
        self.errors.close()


def sides_of(case: Case) -> Iterator[str]:
    for name, (_, option, models) in SIDES.items():
        if case.model in models and (option not in OF_CUDA or case.device == "cuda"):
            yield name


def measure(
    case: Case, rounds: int, warmup: int, core: int | None, names: Collection[str] = ()
) -> dict[str, Any]:
    """Alternating rounds of a case's sides: those of these names, or all."""
    left_out = {side: why for (model, side), why in NOT_WRITTEN.items() if model == case.model}
    about: dict[str, dict[str, Any]] = {}
    times: dict[str, list[Measured]] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in sides_of(case):
            if names and name not in names:
                continue
            try:
                workers[name] = worker = Worker(name, case, core)
            except LeftOutError as error:
                left_out[name] = str(error)
                continue
            stack.callback(worker.close)
            about[name], times[name] = worker.about, []
        for number in range(warmup + rounds):
            names = list(workers)
            start = number % max(1, len(names))
            for name in names[start:] + names[:start]:
                try:
                    times[name].append(workers[name].run())
                except LeftOutError as error:
                    left_out[name] = str(error)
                    del workers[name], times[name]
            print(f"  round {number + 1} of {warmup + rounds}", file=sys.stderr, flush=True)
        splits = {name: workers[name].split() for name in SPLIT if name in workers}
    sizes = {a["parameters"] for name, a in about.items() if name in times and name != PRODUCTS}
    assert len(sizes) <= 1, f"the sides don't train the same: {sizes} parameters"
    return {
        **asdict(case),
        "steps": case.steps,
        "sides": {name: summary(found[warmup:]) for name, found in times.items()},
        "split": splits if case.device == "cpu" else {},
        "left out": left_out,
        "versions": {k: v for a in about.values() for k, v in a["versions"].items()},
    }


def summary(found: list[Measured]) -> dict[str, Any]:
    each = [m.ms for m in found]
    return {
        "ms": statistics.median(each),
        "min": min(each),
        "max": max(each),
        "cpu ms": statistics.median(m.cpu_ms for m in found),
        "loss": found[-1].loss,
        "rounds": each,
    }


def mlp_times(results: list[dict[str, Any]], batch: int, kind: str = "ms") -> dict[str, float]:
    for result in results:
        if (result["model"], result["batch"]) == ("mlp", batch):
            return {name: side[kind] for name, side in result["sides"].items()}
    return {}


def ratio_of(times: dict[str, float], whose: str, other: str) -> float | None:
    """The other's time / that of the side, or of the fastest of pvae's."""
    names = (EAGER,) if whose == EAGER else (EAGER, COMPILED, CUDAGRAPH)
    ours = [times[name] for name in names if name in times]
    return times[other] / min(ours) if ours and other in times else None


def bars(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for whose, batch, other, bar in BARS:
        ratio = ratio_of(mlp_times(results, batch), whose, other)
        found.append(
            {
                "side": whose,
                "batch": batch,
                "other": other,
                "bar": bar,
                "ratio": ratio,
                "CPU ratio": ratio_of(mlp_times(results, batch, "cpu ms"), whose, other),
                "met": None if ratio is None else ratio >= bar,
            }
        )
    return found


def where_time_goes(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for case in results:
        sides = case["sides"]
        floor = sides.get(PRODUCTS, {}).get("cpu ms")
        for name, parts in case["split"].items():
            step = sides[name]["cpu ms"]
            ratio = step / floor if floor else None
            found.append({"case": title_of(case), "side": name, **parts, "over products": ratio})
    return found


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines] + [""]


def title_of(case: dict[str, Any]) -> str:
    draws = f", K = {case['draws']}" if case["model"] == "iwae" else ""
    return f"{case['model']}, batch {case['batch']}{draws}"


def table_of(case: dict[str, Any]) -> list[str]:
    fused = case["sides"].get(FUSED, {}).get("ms")
    rows = []
    for name, side in case["sides"].items():
        if name == PRODUCTS:
            continue
        against = f"{fused / side['ms']:.2f}" if fused else ""
        span = f"{side['min']:.2f}..{side['max']:.2f}"
        numbers = [f"{side['ms']:.2f}", span, against, f"{side['cpu ms']:.2f}"]
        rows.append([name, *numbers, f"{side['loss']:.1f}"])
    heads = ["side", "ms", "min..max", "against", "CPU ms", "loss"]
    lines = [f"## {title_of(case)}", "", f"{case['steps']} steps a round.", "", *table(heads, rows)]
    missing = [f"- {name}: left out: {why}" for name, why in case["left out"].items()]
    return lines + ([*missing, ""] if missing else [])


def write(result: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "throughput.json").write_text(json.dumps(result, indent=1) + "\n")
    made = result["made with"]
    versions = {k: v for case in result["cases"] for k, v in case["versions"].items()}
    packages = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    lines = [
        "# Time of a training step",
        "",
        f"Made by `python benchmarks/throughput.py` at commit {made['commit']} in "
        f"{made['minutes']} minutes, {result['rounds']} rounds, on one core of "
        f"{result['processor']}, device {result['device']}: Python {made['python']}, {packages}.",
        "",
        (__doc__ or "").split("\n\n")[-1].strip().replace("\n", "  \n"),
        "",
    ]
    for case in result["cases"]:
        lines += table_of(case)
    words = {None: "not measured", True: "met", False: "**NOT met**"}
    rows = [
        [
            b["side"],
            str(b["batch"]),
            b["other"],
            f"{b['bar']:.2f}",
            *("" if b[k] is None else f"{b[k]:.2f}" for k in ("ratio", "CPU ratio")),
            words[b["met"]],
        ]
        for b in result["bars"]
    ]
    lines += ["## Bars", "", "mlp; the ratio is the other's median / ours, and the verdict's; the"]
    lines += ["aim beside NumPyro is 1.00.", ""]
    lines += table(["side", "batch", "other", "bar", "ratio", "CPU ratio", "verdict"], rows)
    parts = ("profiled", "products", "elementwise", "optimiser", "Python")
    rows = [
        [
            w["case"],
            w["side"],
            *(f"{w[k]:.2f}" for k in parts),
            "" if w["over products"] is None else f"{w['over products']:.2f}",
        ]
        for w in result["where the time goes"]
    ]
    if rows:
        lines += ["## Where the time goes", "", *WHERE.splitlines(), ""]
        lines += table(["case", "side", *parts, "step / products alone"], rows)
    (out / "throughput.md").write_text("\n".join(lines).rstrip() + "\n")


def processor() -> str:
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "an unknown processor"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="model", help=", ".join(ALL) + "; all")
    parser.add_argument("--batch", type=int, nargs="+", help="instead of each model's own")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2, help="rounds that don't count")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--core", type=int, help="the last one that is allowed")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    if unknown := set(arguments.models) - set(ALL):
        parser.error(f"no model {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    core = arguments.core
    if core is None and hasattr(os, "sched_getaffinity"):
        core = max(os.sched_getaffinity(0))
    torch.set_num_threads(1)  # so that it is noted
    started = time.perf_counter()
    results: list[dict[str, Any]] = []
    for case in cases(arguments.models or list(ALL), arguments.batch, arguments.device):
        print(case, file=sys.stderr, flush=True)
        results.append(measure(case, arguments.rounds, arguments.warmup, core))
        write(
            {
                "rounds": arguments.rounds,
                "device": arguments.device,
                "processor": processor(),
                "cases": results,
                "bars": bars(results),
                "where the time goes": where_time_goes(results),
                "made with": made_with(time.perf_counter() - started),
            },
            arguments.out,
        )
        print("\n".join(table_of(results[-1])), flush=True)


if __name__ == "__main__":
    main()
