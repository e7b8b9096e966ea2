// The wavefront kernels of one element type and head dimension (-DELEMENT=Bf16 -DHEAD_DIM=64), for Python's ctypes.
#include <algorithm>

#include "wavefront_forward.cuh"

using ptx::ELEMENT;
using namespace twicing;

extern "C" {

int run_forward_lag0(const WavefrontForwardParams* p) { return run_wavefront_forward<ELEMENT, HEAD_DIM, 0>(*p, nullptr); }
int run_forward_lag1(const WavefrontForwardParams* p) { return run_wavefront_forward<ELEMENT, HEAD_DIM, 1>(*p, nullptr); }

int64_t workspace_bytes(const Problem* problem) { return wavefront_workspace_bytes(*problem); }

int forward_shared_bytes() {
  return std::max(WavefrontForwardTiling<HEAD_DIM, 0>::SHARED_BYTES, WavefrontForwardTiling<HEAD_DIM, 1>::SHARED_BYTES);
}
}
