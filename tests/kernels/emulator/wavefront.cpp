// The wavefront kernels of one element type and head dimension (-DELEMENT=Bf16 -DHEAD_DIM=64), for Python's ctypes.
#include <algorithm>

#include "wavefront_backward.cuh"
#include "wavefront_forward.cuh"

using ptx::ELEMENT;
using namespace twicing;

extern "C" {

int run_forward_lag0(const WavefrontForwardParams* p) { return run_wavefront_forward<ELEMENT, HEAD_DIM, 0>(*p, nullptr); }
int run_forward_lag1(const WavefrontForwardParams* p) { return run_wavefront_forward<ELEMENT, HEAD_DIM, 1>(*p, nullptr); }

int run_backward(const WavefrontBackwardParams* p) { return run_wavefront_backward<ELEMENT, HEAD_DIM>(*p, nullptr); }

int64_t workspace_bytes(const Problem* problem) { return wavefront_workspace_bytes(*problem); }

int forward_shared_bytes() {
  return std::max(WavefrontForwardTiling<HEAD_DIM, 0>::SHARED_BYTES, WavefrontForwardTiling<HEAD_DIM, 1>::SHARED_BYTES);
}
int backward_shared_bytes() { return WavefrontBackwardTiling<HEAD_DIM>::SHARED_BYTES; }

}
