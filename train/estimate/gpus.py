"""GPUs that can be planned for. Every number is the vendor's, from the data sheet named beside it; none was measured here.

`bf16_flops` are those of the tensor cores without sparsity, which data sheets often print doubled. Link bandwidths are
one way; NVIDIA prints NVLink's as the sum of both. Memory is given in GB by the vendor and comes in GiB.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    title: str
    capability: tuple[int, int]  # which instructions it has
    bf16_flops: float  # a second
    memory: int  # bytes
    link: float  # bytes/s to the other GPUs of its node, one way
    network: float  # bytes/s to other nodes, one way, a GPU's share
    source: str

    @property
    def fits(self) -> int:
        """Bytes that tensors may take: the CUDA context, NCCL and the allocator's gaps need the rest."""
        return int(self.memory * 0.92)


GIB = 2**30
GBIT = 1e9 / 8
GPUS = {
    "a100-40": Gpu(
        "A100 SXM 40 GB", (8, 0), 312e12, 40 * GIB, 300e9, 200 * GBIT, "NVIDIA A100 data sheet; DGX A100 data sheet"
    ),
    "a100-80": Gpu(
        "A100 SXM 80 GB", (8, 0), 312e12, 80 * GIB, 300e9, 200 * GBIT, "NVIDIA A100 data sheet; DGX A100 data sheet"
    ),
    "h100": Gpu(
        "H100 SXM 80 GB", (9, 0), 989e12, 80 * GIB, 450e9, 400 * GBIT, "NVIDIA H100 data sheet; DGX H100 data sheet"
    ),
    "h200": Gpu(
        "H200 SXM 141 GB", (9, 0), 989e12, 140 * GIB, 450e9, 400 * GBIT, "NVIDIA H200 data sheet; DGX H200 data sheet"
    ),
    "b200": Gpu("B200 SXM 180 GB", (10, 0), 2250e12, 179 * GIB, 900e9, 400 * GBIT, "NVIDIA DGX B200 data sheet"),
    # These have no NVLink: PCIe 4.0 with 16 lanes. Nor is there a reference system with a network: 25 Gb/s a GPU assumed.
    "l4": Gpu("L4 24 GB", (8, 9), 121e12, 24 * GIB, 32e9, 25 * GBIT, "NVIDIA L4 data sheet; network assumed"),
    "l40s": Gpu("L40S 48 GB", (8, 9), 362e12, 48 * GIB, 32e9, 25 * GBIT, "NVIDIA L40S data sheet; network assumed"),
    "4090": Gpu(
        "GeForce RTX 4090 24 GB",
        (8, 9),
        165e12,
        24 * GIB,
        32e9,
        25 * GBIT,
        "NVIDIA Ada GPU architecture white paper, appendix A; network assumed",
    ),
}
