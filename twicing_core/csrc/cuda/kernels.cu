// One object for each element type and head dimension: compiled with, for instance, -DELEMENT=Bf16 -DHEAD_DIM=64.
#include "registry.cuh"
#include "short_backward.cuh"
#include "short_forward.cuh"
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

#if HEAD_DIM <= 64
constexpr auto takes_short = [](const Problem& problem) { return short_fits<HEAD_DIM>(problem.seq); };

const Enter<ForwardParams> enter_short_forward{{
    "short", ELEMENT_TYPE, HEAD_DIM,
    [](const ForwardParams& p, void*, ptx::Stream stream) { return run_short_forward<T, HEAD_DIM>(p, stream); },
    takes_short,
}};

const Enter<BackwardParams> enter_short_backward{{
    "short", ELEMENT_TYPE, HEAD_DIM,
    [](const BackwardParams& p, void* workspace, ptx::Stream stream) {
      return run_short_backward<T, HEAD_DIM>({p, static_cast<float*>(workspace)}, stream);
    },
    takes_short, short_workspace_bytes<HEAD_DIM>,
}};
#endif

}  // namespace

#if HEAD_DIM <= 128  // the accumulators of U and A U, or of dK and dV, take all registers at 128
template ptx::Status run_wavefront_forward<ptx::ELEMENT, HEAD_DIM, 0>(const WavefrontForwardParams&, ptx::Stream);
template ptx::Status run_wavefront_forward<ptx::ELEMENT, HEAD_DIM, 1>(const WavefrontForwardParams&, ptx::Stream);
template ptx::Status run_wavefront_backward<ptx::ELEMENT, HEAD_DIM>(const WavefrontBackwardParams&, ptx::Stream);
#endif

}  // namespace twicing
