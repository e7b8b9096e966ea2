"""Gates on the compiled code; verify.py has all architectures, types and head dimensions."""

from __future__ import annotations

from pathlib import Path

import compiled
import costs
import pytest
import sass
import torch
from cases import HEAD_DIMS
from emulated import kernels


@pytest.mark.skipif(compiled.nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize(("head_dim", "architecture", "count"), [(64, 80, 15), (128, 90, 11), (32, 120, 15)])
@pytest.mark.long
def test_budgets(head_dim: int, architecture: int, count: int) -> None:
    found = compiled.compile_kernels("bf16", head_dim, architecture)
    assert len(found) == count  # of two launches: two forward, five backward; wavefront and short: two of each
    for kernel in found:
        compiled.check(kernel)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_shared_memory_fits_the_smallest_device(head_dim: int) -> None:
    sizes = kernels(torch.bfloat16, head_dim).shared_bytes()
    assert sizes and max(sizes.values()) <= compiled.SHARED_BYTES


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN7twicing14forward_kernelIN3ptx4Bf16ELi64ELNS_4PassE1EEEvNS_13ForwardParamsE", "forward_kernel<1>"),
        ("_ZN7twicing13backward_keysIN3ptx4Fp16ELi128ELb0EEEvNS_14BackwardParamsE", "backward_keys<0>"),
        ("_ZN7twicing10backward_uIN3ptx4Bf16ELi32EEEvNS_14BackwardParamsE", "backward_u"),
    ],
)
def test_names(symbol: str, name: str) -> None:
    assert compiled.name_of(symbol) == name


@pytest.mark.parametrize(
    ("architecture", "registers", "shared_bytes", "blocks"),
    # 65536 registers, by quarters; 164, 228 and 100 KB, of which a block takes one KB more than it asks for
    [(80, 255, 0, 2), (80, 168, 0, 3), (80, 128, 0, 4), (80, 32, 80 * 1024, 2), (90, 32, 75 * 1024, 3)]
    + [(86, 32, 50 * 1024, 1), (86, 32, 49 * 1024, 2), (120, 16, 0, 12), (90, 16, 0, 16)],
)
def test_blocks_in_flight(architecture: int, registers: int, shared_bytes: int, blocks: int) -> None:
    """Blocks of 128 threads, after the CUDA occupancy calculator's rules."""
    assert costs.blocks_in_flight(architecture, 128, registers, shared_bytes) == blocks


def test_main_loop_is_found_in_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The innermost loop with all products, the loops in it, and nothing of what surrounds it."""
    code = """
.text.kernel:
        /*0000*/                   MUFU.RCP R1, R2 ;
.L_x_1:
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
.L_x_2:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/               @P1 BRA `(.L_x_3) ;
        /*0060*/               @P0 BRA `(.L_x_4) ;
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_4:
        /*0080*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0090*/              @!P0 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
.L_x_5:
        /*00b0*/                   BRA `(.L_x_5);
.text.other:
        /*0000*/                   EXIT ;
"""
    monkeypatch.setattr(sass, "disassemble", lambda cubin: code)
    loops = sass.main_loops(Path("kernels.cubin"))
    assert loops["other"] is None
    loop = loops["kernel"]
    assert loop is not None
    assert loop.opcodes == {"LDSM": 1, "LDGSTS": 1, "HMMA": 2, "BAR": 1, "BRA": 4}
    assert [inner.opcodes.total() for inner in loop.inner] == [2, 2]
    assert loop.run({"HMMA": 2, "LDGSTS": 4}) == 9 + 2 + 3 * 2
