// The kernels of one element type and head dimension (-DELEMENT=Bf16 -DHEAD_DIM=64), for Python's ctypes.
#include "backward.cuh"

using ptx::ELEMENT;

extern "C" {

int run_forward(const twicing::ForwardParams* p) { return twicing::run_forward<ELEMENT, HEAD_DIM>(*p, nullptr); }

#if HEAD_DIM <= 128
int run_backward(const twicing::BackwardParams* p) { return twicing::run_backward<ELEMENT, HEAD_DIM>(*p, nullptr); }
#endif

}
