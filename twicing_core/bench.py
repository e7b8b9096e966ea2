"""Times twicing attention on this machine against other ways to compute it, and against plain attention.

Ratios come first: every round runs each candidate once, one after the other, so that what else the machine does falls
on all alike. Do measure an idle machine all the same; the load is printed. `python -m twicing_core.bench --help`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from twicing_core import fused
from twicing_core.candidates import (
    CANDIDATES,
    CUDA_CANDIDATES,
    CUDA_SHAPES,
    LONGEST_MATERIALISED,
    MATERIALISED,
    SHAPES,
    Attention,
    Shape,
)

CUDA_REPEATS = 10  # steps a sample: launches are asynchronous, and waiting after each would be measured too


class Timing(NamedTuple):
    """Of one candidate at one shape, in seconds and bytes. The spread is (third - first quartile) / median."""

    median: float
    spread: float
    peak_bytes: int | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", nargs="+", metavar="NAME", help=f"CPU: {', '.join(SHAPES)}; CUDA: {', '.join(CUDA_SHAPES)}"
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="default: bfloat16 where the device multiplies it as it is, else float32",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--candidates", nargs="+", metavar="NAME", help=f"of {', '.join(CUDA_CANDIDATES)}; default: all"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=11, help="of each candidate (default: %(default)s)")
    parser.add_argument(
        "--no-memory", action="store_true", help="skip the peak memory, which takes a process a candidate"
    )
    parser.add_argument(
        "--save-preferences",
        action="store_true",
        help="time the CUDA kernels, and let auto take the fastest from now on",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the ratios; needs matplotlib")


def run(arguments: argparse.Namespace) -> int:
    if arguments.save_preferences:
        from twicing_core import measure_preferences

        return measure_preferences.run(arguments)
    shapes = SHAPES if arguments.device == "cpu" else CUDA_SHAPES
    if unknown := set(arguments.shapes or ()) - set(shapes):
        sys.exit(f"--shapes {' '.join(unknown)}: on {arguments.device} there are {', '.join(shapes)}")
    candidates = CANDIDATES if arguments.device == "cpu" else CUDA_CANDIDATES
    if unknown := set(arguments.candidates or ()) - set(candidates):
        sys.exit(f"--candidates {' '.join(unknown)}: on {arguments.device} there are {', '.join(candidates)}")
    candidates = {name: candidates[name] for name in arguments.candidates or candidates}
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else multiplied_in(torch.bfloat16, arguments.device)
    multiplied = multiplied_in(dtype, arguments.device)
    load = os.getloadavg()[0]
    peak = gemm_peak(multiplied, arguments.device)
    print(
        f"{_device_name(arguments.device)}, {arguments.threads} threads, torch {torch.__version__}, {fused.name_of(dtype)}"
    )
    print(f"GEMM peak {peak / 1e12:.2f} TFLOP/s in {fused.name_of(multiplied)}; load average {load:.1f}", end="")
    print(f"{' - NOT IDLE' if load > 0.5 else ''}\n")
    results = []
    for name in arguments.shapes or shapes:
        shape = shapes[name]
        for backward in (False, True):
            memory = not arguments.no_memory
            timings = measure(shape, candidates, dtype, arguments.device, backward, arguments.rounds, memory)
            print_table(shape, backward, timings, peak)
            results += [
                {"shape": name, **shape._asdict(), "backward": backward, "candidate": candidate, **timing._asdict()}
                for candidate, timing in timings.items()
            ]
    if arguments.json:
        machine = {"device": _device_name(arguments.device), "threads": arguments.threads, "load": load}
        machine |= {"torch": torch.__version__, "dtype": fused.name_of(dtype), "gemm_peak_flops": peak}
        arguments.json.write_text(json.dumps(machine | {"results": results}, indent=2) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)
    return 0


def measure(
    shape: Shape,
    candidates: dict[str, Attention],
    dtype: torch.dtype,
    device: str,
    backward: bool,
    rounds: int,
    memory: bool,
) -> dict[str, Timing]:
    """Times the candidates that can do the shape, in interleaved rounds; says which cannot."""
    steps = {
        name: _step(attention, shape, dtype, device, backward)
        for name, attention in candidates.items()
        if shape.seq <= LONGEST_MATERIALISED or name not in MATERIALISED
    }
    for name, step in list(steps.items()):
        try:
            step()
            step()
        except (RuntimeError, ValueError) as error:
            print(f"{shape}: {name} cannot: {str(error).partition(chr(10))[0]}")
            del steps[name]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    peaks = {name: peak_memory(name, shape, dtype, device, backward) if memory else None for name in steps}
    return {name: Timing(*_median_and_spread(samples), peaks[name]) for name, samples in times.items()}


def seconds(step: Callable[[], object], device: str) -> float:
    """How long a step takes."""
    repeats = 1 if device == "cpu" else CUDA_REPEATS
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    _synchronise(device)
    return (time.perf_counter() - start) / repeats


def _step(attention: Attention, shape: Shape, dtype: torch.dtype, device: str, backward: bool) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    sizes = (shape.batch, shape.heads, shape.seq, shape.head_dim)
    query, key, value, grad_output = (torch.randn(sizes, generator=generator).to(device, dtype) for _ in range(4))
    leaves = [tensor.requires_grad_(backward) for tensor in (query, key, value)]

    def step() -> None:
        output = attention(*leaves, is_causal=shape.is_causal)
        if backward:
            torch.autograd.grad(output, leaves, grad_output)

    return step


def _median_and_spread(samples: list[float]) -> tuple[float, float]:
    median = statistics.median(samples)
    if len(samples) < 2:
        return median, 0.0
    first, _, third = statistics.quantiles(samples, n=4)
    return median, (third - first) / median


def peak_memory(name: str, shape: Shape, dtype: torch.dtype, device: str, backward: bool) -> int | None:
    """Bytes that one step adds to the peak; on the CPU, of the resident set of a process of its own (Linux)."""
    if device == "cuda":
        step = _step(CUDA_CANDIDATES[name], shape, dtype, device, backward)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_resident_growth, (name, shape, dtype, backward, torch.get_num_threads()))


def _resident_growth(name: str, shape: Shape, dtype: torch.dtype, backward: bool, threads: int) -> int | None:
    torch.set_num_threads(threads)
    small = shape._replace(batch=1, heads=2, seq=64)
    _step(CANDIDATES[name], small, dtype, "cpu", backward)()  # what any first call allocates is not counted
    step = _step(CANDIDATES[name], shape, dtype, "cpu", backward)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    except OSError:
        return None
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def minimal_flops(shape: Shape, backward: bool) -> float:
    """Of twicing at its least: 3 products of seq x seq x head_dim forward and 6 backward; causal counts half."""
    products = 9 if backward else 3
    flops = 2.0 * products * shape.batch * shape.heads * shape.seq**2 * shape.head_dim
    return flops / 2 if shape.is_causal else flops


def multiplied_in(dtype: torch.dtype, device: str) -> torch.dtype:
    """What the fused kernels multiply a dtype in: CPUs take float32 for the halves, but for bfloat16 where they have AMX."""
    as_it_is = device == "cuda" or (dtype == torch.bfloat16 and fused.multiplies_bfloat16())
    return dtype if as_it_is else torch.float32


def gemm_peak(dtype: torch.dtype, device: str) -> float:
    """FLOP/s that torch reaches with a large product in this dtype."""
    left, right = (torch.randn(2048, 2048).to(device, dtype) for _ in range(2))
    times = []
    for _ in range(6):
        _synchronise(device)
        start = time.perf_counter()
        left @ right
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def print_table(shape: Shape, backward: bool, timings: dict[str, Timing], peak: float) -> None:
    """One line a candidate: its time over that of the first, then milliseconds, spread, memory, speed."""
    print(f"{shape}, {'forward + backward' if backward else 'forward'}")
    flops, first = minimal_flops(shape, backward), next(iter(timings.values())).median
    for name, timing in timings.items():
        memory = "" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**20:8.1f} MiB"
        rate = flops / timing.median
        share = "" if name.startswith("one ") else f"{rate / 1e12:7.2f} TFLOP/s, {rate / peak:6.1%} of peak"
        milliseconds = f"{timing.median * 1e3:9.2f} ms ±{timing.spread:4.0%}"
        print(f"  {timing.median / first:6.2f}x  {name:10s}{milliseconds}  {memory}  {share}")
    print(flush=True)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of time relative to the first candidate, one panel for forward and one for forward + backward."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 1, figsize=(10, 7), sharex=True)
    shapes = list(dict.fromkeys(result["shape"] for result in results))
    first, *names = dict.fromkeys(result["candidate"] for result in results)
    width = 0.8 / (len(names) or 1)
    for panel, backward in zip(panels, (False, True), strict=True):
        median = {(r["shape"], r["candidate"]): r["median"] for r in results if r["backward"] == backward}
        for index, name in enumerate(names):
            there = [i for i, shape in enumerate(shapes) if {(shape, name), (shape, first)} <= median.keys()]
            ratios = [median[shapes[i], name] / median[shapes[i], first] for i in there]
            panel.bar([i + (index - len(names) / 2 + 0.5) * width for i in there], ratios, width=width, label=name)
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set_title("forward + backward" if backward else "forward")
        panel.set_ylabel(f"time / time of {first}")
        panel.set_xticks(range(len(shapes)), shapes)
    panels[0].legend(ncols=len(names) or 1, fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}{' and AMX' if fused.multiplies_bfloat16() else ''}"


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="python -m twicing_core.bench", description=__doc__)
    add_arguments(_parser)
    sys.exit(run(_parser.parse_args()))
