"""Where the time of a side's steps goes, by torch's profiler."""

from __future__ import annotations

import time

from peers.common import Side

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mkldnn_convolution", "convolution_backward")
OPTIMISER = ("_fused_adam_", "Optimizer.step#Adam.step")


def split(side: Side, steps: int) -> dict[str, float]:
    """Milliseconds of a step in matrix products, in the optimiser, and in torch's other kernels.

    A compiled graph's own code, of elementwise kernels and the Python that calls them, counts
    among the last. What a step takes beyond these is Python, torch's dispatch, and the profiler.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        started = time.process_time()
        side.run(steps)
        step = (time.process_time() - started) / steps * 1e3
    parts = dict.fromkeys(("products", "optimiser", "elementwise"), 0.0)
    for event in found.key_averages():
        name = event.key.removeprefix("aten::")
        if name in PRODUCTS:
            part = "products"
        elif name in OPTIMISER:
            part = "optimiser"
        elif event.key.startswith(("aten::", "## Call CompiledFxGraph")):
            part = "elementwise"
        else:
            continue
        parts[part] += event.self_cpu_time_total / steps / 1e3
    return parts | {"Python": step - sum(parts.values()), "profiled": step}
