// One object for each element type and head dimension: compiled with, for instance, -DELEMENT=Bf16 -DHEAD_DIM=64.
#include "backward.cuh"

namespace twicing {

template ptx::Status run_forward<ptx::ELEMENT, HEAD_DIM>(const ForwardParams&, ptx::Stream);
#if HEAD_DIM <= 128  // the accumulators of dK and dV take all registers at 128
template ptx::Status run_backward<ptx::ELEMENT, HEAD_DIM>(const BackwardParams&, ptx::Stream);
#endif

}  // namespace twicing
