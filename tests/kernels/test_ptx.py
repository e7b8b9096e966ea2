"""The PTX interpreter itself, on instructions and mistakes written by hand; then the kernels, as nvcc compiles them."""

from __future__ import annotations

import emulated
import interpreted
import numpy as np
import ptx
import pytest
from cases import DTYPES, Case, every_case, pairwise_cases
from interpreted import Argument, run_on_arrays
from verification import check_backward, check_forward

LANE = np.arange(32)


def kernel(body: str, parameters: str = ".param .u64 data", shared: str = "") -> ptx.Kernel:
    """An entry with some registers; %address is what `data` points to for this thread, 4 bytes each."""
    return ptx.parse(
        f"""
        .version 9.0
        .target sm_80
        .address_size 64
        .extern .shared .align 128 .b8 tile[];
        {shared}
        .visible .entry test({parameters})
        .maxntid 64, 1, 1
        {{
            .reg .pred %p<9>;
            .reg .b16 %rs<9>;
            .reg .b32 %r<19>;
            .reg .f32 %f<9>;
            .reg .b64 %rd<9>;
            .reg .b64 %address, %data;
            .reg .b32 %thread;
            ld.param.u64 %data, [data];
            mov.u32 %thread, %tid.x;
            mul.wide.u32 %rd0, %thread, 4;
            add.s64 %address, %data, %rd0;
            {body}
            ret;
        }}"""
    )["test"]


def f32(value: float) -> str:
    return f"0f{np.float32(value).view(np.uint32):08X}"


ARITHMETIC = [
    # type of the result, instruction without its destination, expected bits
    ("b32", "add.s32 {d}, 2147483647, 1", 0x80000000),
    ("b32", "sub.s32 {d}, 1, 3", 0xFFFFFFFE),
    ("b32", "mul.lo.s32 {d}, 65537, 65537", 0x20001),
    ("b32", "mul.hi.s32 {d}, -7, 1073741824", 0xFFFFFFFE),
    ("b32", "mul.hi.u32 {d}, 0xFFFFFFFF, 0xFFFFFFFF", 0xFFFFFFFE),
    ("b64", "mul.hi.s64 {d}, -7, 4611686018427387904", 0xFFFFFFFFFFFFFFFE),
    ("b64", "mul.wide.s32 {d}, -3, 5", 0xFFFFFFFFFFFFFFF1),
    ("b32", "mad.lo.s32 {d}, 3, 4, -5", 7),
    ("b64", "mad.wide.s32 {d}, -3, 4, 5", 0xFFFFFFFFFFFFFFF9),
    ("b32", "div.s32 {d}, -7, 2", 0xFFFFFFFD),
    ("b32", "rem.s32 {d}, -7, 2", 0xFFFFFFFF),
    ("b32", "div.u32 {d}, -7, 2", 0x7FFFFFFC),
    ("b32", "shr.s32 {d}, -8, 1", 0xFFFFFFFC),
    ("b32", "shr.u32 {d}, -8, 1", 0x7FFFFFFC),
    ("b32", "shl.b32 {d}, 1, 32", 0),
    ("b32", "shr.s32 {d}, -8, 40", 0xFFFFFFFF),
    ("b32", "min.s32 {d}, -1, 1", 0xFFFFFFFF),
    ("b32", "min.u32 {d}, -1, 1", 1),
    ("b32", "xor.b32 {d}, 0xF0, 0xFF", 0x0F),
    ("b32", "not.b32 {d}, 0", 0xFFFFFFFF),
    ("b32", "bfi.b32 {d}, 0xFF, 0, 8, 4", 0xF00),
    ("b32", "clz.b32 {d}, 0x00FFFFFF", 8),
    ("b32", "clz.b32 {d}, 0", 32),
    ("b32", "brev.b32 {d}, 0x3", 0xC0000000),
    ("b64", "cvt.s64.s32 {d}, -2", 0xFFFFFFFFFFFFFFFE),
    ("b64", "cvt.u64.u32 {d}, -2", 0xFFFFFFFE),
    ("b32", "cvt.u32.u64 {d}, 0x100000002", 2),
    ("f32", "cvt.rn.f32.s32 {d}, -2", 0xC0000000),
    ("b32", f"cvt.rn.bf16x2.f32 {{d}}, {f32(1)}, {f32(-2)}", 0x3F80C000),  # the first is the upper half
    ("b32", f"cvt.rn.f16x2.f32 {{d}}, {f32(1)}, {f32(-2)}", 0x3C00C000),
    ("f32", f"fma.rn.f32 {{d}}, {f32(1 + 2**-23)}, {f32(1 - 2**-23)}, {f32(-1)}", 0xA8800000),  # -2^-46
    ("f32", f"sub.f32 {{d}}, {f32(1)}, {f32(2)}", 0xBF800000),
    ("f32", f"neg.f32 {{d}}, {f32(0)}", 0x80000000),
    ("f32", f"max.f32 {{d}}, {f32(np.nan)}, {f32(2)}", 0x40000000),
    ("f32", f"ex2.approx.ftz.f32 {{d}}, {f32(-np.inf)}", 0),
    ("f32", f"ex2.approx.ftz.f32 {{d}}, {f32(-127)}", 0),  # too small to be normal
    ("f32", f"rcp.approx.ftz.f32 {{d}}, {f32(4)}", 0x3E800000),
    ("f32", f"lg2.approx.ftz.f32 {{d}}, {f32(0)}", 0xFF800000),
    ("b32", "setp.lt.s32 %p1, -1, 1; selp.b32 {d}, 5, 6, %p1", 5),
    ("b32", "setp.lt.u32 %p1, -1, 1; selp.b32 {d}, 5, 6, %p1", 6),
    ("b32", f"setp.ne.f32 %p1, {f32(np.nan)}, {f32(1)}; selp.b32 {{d}}, 5, 6, %p1", 6),
    ("b32", f"setp.neu.f32 %p1, {f32(np.nan)}, {f32(1)}; selp.b32 {{d}}, 5, 6, %p1", 5),
    ("b32", f"setp.leu.f32 %p1, {f32(np.nan)}, {f32(1)}; selp.b32 {{d}}, 5, 6, %p1", 5),
    ("b64", "mov.b64 {d}, {{%thread, %thread}}", None),
    ("b32", "{{ .reg .b16 lo, hi; mov.b32 {{lo, hi}}, 0x20001; mov.b32 {d}, {{hi, lo}}; }} mov.u32 %r2, 0", 0x10002),
    ("b32", "mov.u32 {d}, 1; setp.eq.s32 %p1, %thread, 3; @!%p1 mov.u32 {d}, 2", None),
]


@pytest.mark.parametrize(("kind", "instruction", "expected"), ARITHMETIC, ids=lambda value: str(value)[:40])
def test_arithmetic(kind: str, instruction: str, expected: int | None) -> None:
    register = {"b32": "%r1", "f32": "%f1", "b64": "%rd1"}[kind]
    result = np.zeros(32, np.uint64 if kind == "b64" else np.uint32)
    place = "mul.wide.u32 %rd2, %thread, 8; add.s64 %rd2, %data, %rd2;" if kind == "b64" else "mov.b64 %rd2, %address;"
    run_on_arrays(kernel(f"{instruction.format(d=register)}; {place} st.global.{kind} [%rd2], {register};"), result)
    if expected is not None:
        assert (result == expected).all(), hex(result[0])
    elif kind == "b64":
        np.testing.assert_array_equal(result, LANE.astype(np.uint64) * (2**32 + 1))
    else:
        np.testing.assert_array_equal(result, np.where(LANE == 3, 1, 2))


def test_threads_that_part_meet_again() -> None:
    """A loop that each lane leaves at another time, before an instruction that needs all of them."""
    data = np.zeros(64, np.uint32)
    body = """
        mov.u32 %r1, 0;
        and.b32 %r3, %thread, 31;
        $loop:
        setp.ge.u32 %p1, %r1, %r3;
        @%p1 bra $end;
        add.u32 %r1, %r1, 1;
        bra.uni $loop;
        $end:
        shfl.sync.bfly.b32 %r2|%p2, %r1, 1, 31, -1;
        st.global.u32 [%address], %r2;"""
    for seed in range(3):
        run_on_arrays(kernel(body), data, threads=64, seed=seed)
        np.testing.assert_array_equal(data, np.arange(64) % 32 ^ 1)


@pytest.mark.parametrize(
    ("mode", "by", "bound", "expected"),
    [("up", 3, 0, np.maximum(LANE - 3, LANE * (LANE < 3))), ("down", 3, 31, np.where(LANE < 29, LANE + 3, LANE))]
    + [("idx", 5, 31, np.full(32, 5)), ("bfly", 16, 31, LANE ^ 16), ("idx", 5, 0x1F | 24 << 8, LANE // 8 * 8 + 5)],
)
def test_shuffles(mode: str, by: int, bound: int, expected: np.ndarray) -> None:
    data = np.zeros(32, np.uint32)
    run_on_arrays(kernel(f"shfl.sync.{mode}.b32 %r1, %thread, {by}, {bound}, -1; st.global.u32 [%address], %r1;"), data)
    np.testing.assert_array_equal(data, expected)


def test_atomics_and_ballot() -> None:
    data = np.zeros(32, np.uint32)
    run_on_arrays(kernel("atom.global.add.u32 %r1, [%data], 2;"), data)
    assert data[0] == 64
    run_on_arrays(kernel("atom.relaxed.gpu.global.cas.b32 %r1, [%data], 64, 1; red.global.max.u32 [%data], 9;"), data)
    assert data[0] == 9
    body = "setp.gt.u32 %p1, %thread, 29; vote.sync.ballot.b32 %r1, %p1, -1; st.global.u32 [%address], %r1;"
    run_on_arrays(kernel(body), data)
    assert (data == 0xC0000000).all()


CHAIN = """
    setp.ne.u32 %p1, %thread, 0;
    @%p1 bra $wait;
    atom.global.add.u32 %r1, [%data], 1;
    st.shared.u32 [ticket], %r1;
    $wait:
    bar.sync 0;
    ld.shared.u32 %r1, [ticket];
    mul.wide.u32 %rd1, %r1, 4;
    add.s64 %rd1, %data, %rd1;
    @%p1 bra $go;
    $poll:
    ld.acquire.gpu.global.u32 %r2, [%rd1+4];
    setp.eq.u32 %p2, %r2, 0;
    @%p2 bra $poll;
    $go:
    bar.sync 0;
    @%p1 bra $end;
    add.u32 %r3, %r1, 2;
    fence.acq_rel.gpu;
    st.release.gpu.global.u32 [%rd1+8], %r3;
    $end:"""


@pytest.mark.parametrize("resident", [1, 2, 7])
@pytest.mark.parametrize("seed", [0, 1])
def test_blocks_that_wait_for_each_other(resident: int, seed: int) -> None:
    """In the order of tickets: each waits for the flag of the one before."""
    data = np.zeros(9, np.uint32)
    data[1] = 1
    program = kernel(CHAIN, shared=".shared .align 4 .u32 ticket;")
    run_on_arrays(program, data, blocks=7, threads=64, resident=resident, seed=seed)
    assert data.tolist() == [7, 1, 2, 3, 4, 5, 6, 7, 8]
    data[:] = 0
    with pytest.raises(ptx.PtxError, match=r"ld\.acquire.*waits for a flag for ever"):
        run_on_arrays(program, data, blocks=7, threads=64, resident=resident, seed=seed)


COPY = (
    "mov.u32 %r1, tile; shl.b32 %r2, %thread, 2; add.u32 %r1, %r1, %r2; cp.async.ca.shared.global [%r1], [%address], 4;"
)
MISTAKES = {
    "unknown": ("tex.1d.v4.f32 {%f1, %f2, %f3, %f4}, [%data];", r"PTX line 21: tex.*not known"),
    "unknown_register": ("mov.u32 %r1, %clock;", "operand %clock is not known"),
    "unknown_copy": ("cp.async.wait_all;", "this form is not known"),
    "unknown_form": ("add.sat.s32 %r1, %r2, %r3;", "this form is not known"),
    "unwritten": ("ld.shared.u32 %r1, [tile];", "reads what nobody wrote"),
    "outside": ("st.shared.u32 [tile+1024], %r1;", "outside of the 1024 bytes"),
    "misaligned": ("st.shared.v2.u32 [tile+4], {%r1, %r2};", "8-byte access misaligned"),
    "global_outside": ("ld.global.u32 %r1, [%address+4];", "thread 31: outside of all buffers"),
    "global_read_only": ("st.global.u32 [%address], 0;", "only read"),
    "global_unwritten": ("ld.global.u32 %r1, [%address];", "reads what nobody wrote"),
    "copy_in_flight": (COPY + "cp.async.commit_group; ld.shared.u32 %r3, [%r1];", "a copy in flight"),
    "copy_not_committed": (COPY + "cp.async.wait_group 0; ld.shared.u32 %r3, [%r1];", "a copy in flight"),
    "copy_left": (COPY, "ends with copies in flight"),
    "copy_size": ("cp.async.cg.shared.global [%r1], [%address], 8;", "cp.async.cg of 8 bytes does not exist"),
    "copy_takes_more": (
        COPY.replace("[%address], 4;", "[%address], 4, 8;"),
        "takes 8 of 4",
    ),
    "lanes_missing": ("setp.lt.u32 %p1, %thread, 9; @%p1 bra $end; bar.warp.sync -1; $end:", "waits for its warp"),
    "warps_missing": ("setp.lt.u32 %p1, %thread, 32; @%p1 bra $end; bar.sync 0; $end:", "waits for its block"),
    "mask": ("shfl.sync.bfly.b32 %r1, %thread, 1, 31, 0xFFFF;", "thread 16: a lane that its mask does not name"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_reported(mistake: str) -> None:
    body, message = MISTAKES[mistake]
    array = np.zeros(64 if "warps" in mistake else 32, np.uint32)
    argument = Argument(array, "read_only" not in mistake, written="unwritten" not in mistake)
    with pytest.raises(ptx.PtxError, match=message):
        run_on_arrays(kernel(body), argument, threads=len(array), shared_bytes=1024)


@pytest.mark.parametrize("seed", range(1, 6))
def test_a_seed_shows_a_missing_barrier(seed: int) -> None:
    """Each warp reads what the other wrote: in step, without a seed, nothing is amiss."""
    body = """
        mov.u32 %r1, tile;
        shl.b32 %r2, %thread, 2;
        xor.b32 %r3, %r2, 128;
        add.u32 %r2, %r1, %r2;
        add.u32 %r3, %r1, %r3;
        st.shared.u32 [%r2], %thread;
        {barrier}
        ld.shared.u32 %r4, [%r3];"""
    data = np.zeros(1, np.uint32)
    run_on_arrays(kernel(body.format(barrier="")), data, threads=64, shared_bytes=256)
    run_on_arrays(kernel(body.format(barrier="bar.sync 0;")), data, threads=64, shared_bytes=256, seed=seed)
    with pytest.raises(ptx.PtxError, match="nobody wrote"):
        run_on_arrays(kernel(body.format(barrier="")), data, threads=64, shared_bytes=256, seed=seed)


# ---- the kernels ----

needs_nvcc = pytest.mark.skipif(interpreted.nvcc() is None, reason="no nvcc")
COMPILED = [("bf16", 32), ("fp16", 64), ("bf16", 128)]
FEW = pairwise_cases([case for case in every_case() if case.seq <= 130 and (case.dtype, case.head_dim) in COMPILED])


@needs_nvcc
@pytest.mark.parametrize("case", FEW, ids=str)
def test_accuracy_and_no_errors(case: Case) -> None:
    library = interpreted.kernels(DTYPES[case.dtype], case.head_dim)
    check_forward(case, library)
    for deterministic in (False, True):
        check_backward(case, library, deterministic=deterministic)


@needs_nvcc
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_emulator(dtype: str) -> None:
    """What nvcc made of the source and what g++ did differ by roundings only, and by no product of tensor cores."""
    case = Case(dtype, 64, 150, causal=True, grouped=True)
    runs = []
    for library in (interpreted.kernels(DTYPES[dtype], 64), emulated.kernels(DTYPES[dtype], 64)):
        forward = library.forward(*case.inputs, **case.arguments())
        backward = library.backward(forward, case.grad_output, *case.inputs, **case.arguments(), deterministic=True)
        runs.append((forward, backward))
    for ours, emulators, names in (
        (*(run[0] for run in runs), ("output", "u", "lse")),
        (*(run[1] for run in runs), ("grad_query", "grad_key", "grad_value")),
    ):
        assert [launch.mma for launch in ours.launches] == [launch.mma for launch in emulators.launches]
        for name in names:
            rounding = emulators[name].abs().max() * 2.0 ** (-7 if dtype == "bf16" else -10)
            assert (ours[name] - emulators[name]).abs().max() <= rounding


@needs_nvcc
def test_bit_equal_over_orders_of_warps() -> None:
    case = Case("bf16", 64, 130, causal=True)
    library = interpreted.kernels(DTYPES["bf16"], 64)
    runs = [library.forward(*case.inputs, is_causal=True, seed=seed) for seed in range(3)]
    for run in runs:
        assert run.log == ""
        for name in ("output", "u", "lse"):
            assert run[name].equal(runs[0][name])


@needs_nvcc
@pytest.mark.parametrize("case", [case for case in FEW if case.causal and case.head_dim <= 64], ids=str)
def test_causal_in_one_launch(case: Case) -> None:
    """Blocks wait for flags that others of the same launch set."""
    for lag in (0, 1):
        library = interpreted.wavefront(DTYPES[case.dtype], case.head_dim, lag)
        check_forward(case, library)
    check_backward(case, library)
