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

#if HEAD_DIM <= 128  // the accumulators of U and A U, or of dK and dV, take all registers at 128
bool is_causal(const Problem& problem) { return problem.causal; }

template <int LAG>
ptx::Status wavefront_forward_of(const ForwardParams& p, void* workspace, ptx::Stream stream) {
  return run_wavefront_forward<T, HEAD_DIM, LAG>({p, static_cast<int*>(workspace)}, stream);
}
ptx::Status wavefront_backward_of(const BackwardParams& p, void* workspace, ptx::Stream stream) {
  return run_wavefront_backward<T, HEAD_DIM>({p, static_cast<int*>(workspace)}, stream);
}
const Enter<ForwardParams> wavefront{{
    "wavefront", ELEMENT_TYPE, HEAD_DIM, wavefront_forward_of<0>, is_causal, wavefront_workspace_bytes,
}};
const Enter<ForwardParams> wavefront_lag1{{
    "wavefront_lag1", ELEMENT_TYPE, HEAD_DIM, wavefront_forward_of<1>, is_causal, wavefront_workspace_bytes,
}};
const Enter<BackwardParams> wavefront_of_gradients{{
    "wavefront", ELEMENT_TYPE, HEAD_DIM, wavefront_backward_of, is_causal, wavefront_workspace_bytes,
}};
#endif

}  // namespace
}  // namespace twicing
