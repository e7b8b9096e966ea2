"""Everything that can be said of the CUDA kernels without a GPU: every case, every mutant, every architecture.

    python tests/kernels/verify.py [--part forward,backward,short,wavefront,ptx,mutants,compiled] [--processes N]

Ends with one line, and with status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import compiled
import interpreted
import mutants
import torch
from cases import DTYPES, HEAD_DIMS, Case, every_case, fits_short, pairwise_cases
from emulated import Kernels, ShortKernels, WavefrontKernels
from emulated import short as short_kernels
from emulated import wavefront as wavefront_kernels
from verification import FORWARD_FACTOR, GRADIENT_FACTOR, check_backward, check_forward

PARTS = ("forward", "backward", "short", "wavefront", "ptx", "mutants", "compiled")
LONG = 257  # longer cases are many times slower: pairwise only


def forward(case: Case) -> tuple[float, str]:
    return _attempt(case, lambda: check_forward(case))


def backward(case: Case) -> tuple[float, str]:
    return _attempt(case, lambda: max(check_backward(case, deterministic=mode) for mode in (False, True)))


def short(case: Case) -> tuple[float, str]:
    """On a schedule of the case's own. The number is the share of the allowed error."""

    def check() -> float:
        library = short_kernels(DTYPES[case.dtype], case.head_dim)
        forward_share = check_forward(case, library, seed=case.seq) / FORWARD_FACTOR
        return max(forward_share, check_backward(case, library, seed=case.seq) / GRADIENT_FACTOR)

    return _attempt(case, check)


def wavefront(case: Case) -> tuple[float, str]:
    """On a schedule of the case's own, both lags. The number is the share of the allowed error."""

    def check() -> float:
        shares, schedule = [], {"seed": case.seq + case.head_dim, "resident": 1 + case.seq % 7}
        for lag in (0, 1):
            library = wavefront_kernels(DTYPES[case.dtype], case.head_dim, lag)
            shares.append(check_forward(case, library, **schedule) / FORWARD_FACTOR)
        for mode in (False, True):
            shares.append(check_backward(case, library, deterministic=mode, **schedule) / GRADIENT_FACTOR)
        return max(shares)

    return _attempt(case, check)


def ptx(case: Case) -> tuple[float, str]:
    """As nvcc compiled them. The number is the share of the allowed error."""

    def check() -> float:
        library = interpreted.kernels(DTYPES[case.dtype], case.head_dim)
        shares = [check_forward(case, library) / FORWARD_FACTOR]
        if case.head_dim <= 128:
            for mode in (False, True):
                shares.append(check_backward(case, library, deterministic=mode) / GRADIENT_FACTOR)
        if fits_short(case):
            library = interpreted.short(DTYPES[case.dtype], case.head_dim)
            shares.append(check_forward(case, library) / FORWARD_FACTOR)
            shares.append(check_backward(case, library) / GRADIENT_FACTOR)
        if case.head_dim <= 128 and case.causal:
            for lag in (0, 1):
                library = interpreted.wavefront(DTYPES[case.dtype], case.head_dim, lag)
                shares.append(check_forward(case, library) / FORWARD_FACTOR)
            shares.append(check_backward(case, library) / GRADIENT_FACTOR)
        return max(shares)

    return _attempt(case, check)


def mutant(planted: mutants.Mutant) -> tuple[float, str]:
    seen = mutants.verdict(planted)
    print(f"  {planted.name}: {seen or 'NOT NOTICED'}", flush=True)
    return 0.0, "" if seen else f"mutant not noticed: {planted.name}"


def compile_one(arguments: tuple[str, int, int]) -> tuple[float, str]:
    """The number of compiled code is the bytes that its worst kernel spills."""
    spilled = 0
    try:
        for kernel in compiled.compile_kernels(*arguments):
            spilled = max(spilled, kernel.spilled_bytes)
            compiled.check(kernel)
    except AssertionError as failure:
        return spilled, str(failure)
    return spilled, ""


def _attempt(case: Case, check: Callable[[], float]) -> tuple[float, str]:
    torch.set_num_threads(1)
    try:
        return check(), ""
    except AssertionError as failure:
        return 0.0, f"{case}: {failure}"


def run(name: str, results: Iterable[tuple[float, str]]) -> tuple[int, float, int]:
    """Prints what failed, as it comes; returns how many results there were, the largest number, and the failures."""
    start, count, largest, failures = time.monotonic(), 0, 0.0, 0
    for number, failure in results:
        count, largest = count + 1, max(largest, number)
        if failure:
            failures += 1
            print(f"FAILED {failure}", flush=True)
    print(f"{name}: {count} in {time.monotonic() - start:.0f} s, {failures} failed", flush=True)
    return count, largest, failures


def cases(longest_head_dim: int, long: int = LONG, causal: bool = False) -> list[Case]:
    """All up to `long`, and pairwise above; `causal`: those only."""
    possible = [case for case in every_case() if case.head_dim <= longest_head_dim and case.causal >= causal]
    return [case for case in possible if case.seq <= long] + pairwise_cases(
        [case for case in possible if case.seq > long]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=",".join(PARTS), help="which parts, comma-separated")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    chosen = arguments.part.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--part {','.join(unknown)}: the parts are {', '.join(PARTS)}")

    def build(library: tuple[str, int]) -> tuple[float, str]:
        Kernels(DTYPES[library[0]], library[1])
        if library[1] <= 64:
            ShortKernels(DTYPES[library[0]], library[1])
        if library[1] <= 128:
            WavefrontKernels(DTYPES[library[0]], library[1], lag=0)
        return 0.0, ""

    if {"forward", "backward", "short", "wavefront", "ptx"} & set(chosen):
        with ThreadPoolExecutor(arguments.processes) as threads:
            list(threads.map(build, product(DTYPES, HEAD_DIMS)))
    compilations = list(product(DTYPES, HEAD_DIMS, compiled.ARCHITECTURES)) if compiled.nvcc() else []
    interpretations = pairwise_cases([case for case in every_case() if case.seq <= LONG]) if compiled.nvcc() else []
    planted_bugs = [bug for bug in mutants.every_mutant() if compiled.nvcc() or not bug.by_interpreter]
    if "compiled" in chosen and compilations:
        for head_dim in HEAD_DIMS:  # which runs the host's part, one at a time
            compiled.shared_bytes(head_dim)
    done = {}
    with (
        multiprocessing.get_context("fork").Pool(arguments.processes) as processes,
        ThreadPoolExecutor(arguments.processes) as threads,  # of work that other processes do
    ):
        parts = {
            "forward": lambda: processes.imap_unordered(forward, cases(256)),
            "backward": lambda: processes.imap_unordered(backward, cases(128)),
            "short": lambda: processes.imap_unordered(short, [case for case in every_case() if fits_short(case)]),
            "wavefront": lambda: processes.imap_unordered(wavefront, cases(128, long=130, causal=True)),
            "ptx": lambda: processes.imap_unordered(ptx, interpretations),
            "mutants": lambda: threads.map(mutant, planted_bugs),
            "compiled": lambda: threads.map(compile_one, compilations),
        }
        for name in PARTS:
            if name in chosen:
                done[name] = run(name, parts[name]())

    def result(name: str, index: int) -> float:
        return done[name][index] if name in done else 0

    attention_cases = result("forward", 0) + result("backward", 0)
    others = "; ".join(
        f"{result(name, 0)} {name}, worst {result(name, 1):.2f} of what is allowed" for name in ("short", "wavefront")
    )
    planted, missed = result("mutants", 0), result("mutants", 2)
    as_compiled = (
        f"{result('ptx', 0)} more as PTX, worst {result('ptx', 1):.2f} of what is allowed; "
        f"spills: at most {result('compiled', 1):.0f} bytes in {result('compiled', 0):.0f} compilations"
    )
    print(
        f"verified: {attention_cases} cases, worst error ratio {result('forward', 1):.2f} of 2 forward and "
        f"{result('backward', 1):.2f} of 3 backward; {others}; {planted - missed} of {planted} mutants caught; "
        + (as_compiled if compiled.nvcc() else "not compiled, as there is no nvcc")
    )
    failures = sum(part[2] for part in done.values())
    if failures:
        print(f"{failures} FAILED")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
