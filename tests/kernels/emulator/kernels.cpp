// The kernels of one element type and head dimension (-DELEMENT=Bf16 -DHEAD_DIM=64), for Python's ctypes.
#include <algorithm>

#include "backward.cuh"

using ptx::ELEMENT;

extern "C" {

int run_forward(const twicing::ForwardParams* p) { return twicing::run_forward<ELEMENT, HEAD_DIM>(*p, nullptr); }

int forward_shared_bytes() { return twicing::ForwardTiling<HEAD_DIM>::SHARED_BYTES; }

#if HEAD_DIM <= 128
int run_backward(const twicing::BackwardParams* p) { return twicing::run_backward<ELEMENT, HEAD_DIM>(*p, nullptr); }

int backward_shared_bytes() {  // of the kernel that takes most
  using Tiling = twicing::BackwardTiling<HEAD_DIM>;
  return std::max({Tiling::U_SHARED_BYTES, Tiling::KEYS_SHARED_BYTES, Tiling::QUERY_SHARED_BYTES});
}
#else
int backward_shared_bytes() { return 0; }
#endif

}
