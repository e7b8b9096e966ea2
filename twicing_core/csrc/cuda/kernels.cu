// One object for each element type and head dimension: compiled with, for instance, -DELEMENT=Bf16 -DHEAD_DIM=64.
#include "registry.cuh"
#include "wavefront_backward.cuh"
#include "wavefront_forward.cuh"

namespace twicing {
namespace {

using T = ptx::ELEMENT;
constexpr Element ELEMENT_TYPE = element_of(T{});

const Enter<ForwardParams> long_forward{{
    "long", ELEMENT_TYPE, HEAD_DIM,
    [](const ForwardParams& p, void*, ptx::Stream stream) { return run_forward<T, HEAD_DIM>(p, stream); },
}};

#if HEAD_DIM <= 128  // the accumulators of dK and dV take all registers at 128
const Enter<BackwardParams> long_backward{{
    "long", ELEMENT_TYPE, HEAD_DIM,
    [](const BackwardParams& p, void*, ptx::Stream stream) { return run_backward<T, HEAD_DIM>(p, stream); },
}};
#endif

}  // namespace

#if HEAD_DIM <= 128  // the accumulators of U and A U, or of dK and dV, take all registers at 128
template ptx::Status run_wavefront_forward<ptx::ELEMENT, HEAD_DIM, 0>(const WavefrontForwardParams&, ptx::Stream);
template ptx::Status run_wavefront_forward<ptx::ELEMENT, HEAD_DIM, 1>(const WavefrontForwardParams&, ptx::Stream);
template ptx::Status run_wavefront_backward<ptx::ELEMENT, HEAD_DIM>(const WavefrontBackwardParams&, ptx::Stream);
#endif

}  // namespace twicing
