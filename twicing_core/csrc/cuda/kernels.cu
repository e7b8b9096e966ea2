// One object for each element type and head dimension: compiled with, for instance, -DELEMENT=Bf16 -DHEAD_DIM=64.
#include "wavefront_backward.cuh"
#include "wavefront_forward.cuh"

namespace twicing {

template ptx::Status run_forward<ptx::ELEMENT, HEAD_DIM>(const ForwardParams&, ptx::Stream);
#if HEAD_DIM <= 128  // the accumulators of dK and dV, or of U and A U, take all registers at 128
template ptx::Status run_backward<ptx::ELEMENT, HEAD_DIM>(const BackwardParams&, ptx::Stream);
template ptx::Status run_wavefront_forward<ptx::ELEMENT, HEAD_DIM, 0>(const WavefrontForwardParams&, ptx::Stream);
template ptx::Status run_wavefront_forward<ptx::ELEMENT, HEAD_DIM, 1>(const WavefrontForwardParams&, ptx::Stream);
template ptx::Status run_wavefront_backward<ptx::ELEMENT, HEAD_DIM>(const WavefrontBackwardParams&, ptx::Stream);
#endif

}  // namespace twicing
