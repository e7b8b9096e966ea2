// The short kernels of one element type and head dimension (-DELEMENT=Bf16 -DHEAD_DIM=64), for Python's ctypes.
#include "short_backward.cuh"
#include "short_forward.cuh"

using ptx::ELEMENT;
using namespace twicing;

extern "C" {

int run_forward(const ForwardParams* p) { return run_short_forward<ELEMENT, HEAD_DIM>(*p, nullptr); }
int run_backward(const ShortBackwardParams* p) { return run_short_backward<ELEMENT, HEAD_DIM>(*p, nullptr); }

int64_t workspace_bytes(const Problem* problem) { return short_workspace_bytes<HEAD_DIM>(*problem); }

int forward_shared_bytes() { return ShortTiling<HEAD_DIM, 256>::FORWARD_SHARED_BYTES; }
int backward_shared_bytes() { return ShortTiling<HEAD_DIM, 256>::BACKWARD_SHARED_BYTES; }

}
