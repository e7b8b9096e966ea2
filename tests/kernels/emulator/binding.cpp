// The kernels of one element type and head dimension (-DELEMENT=Bf16 -DHEAD_DIM=64), entered as the CUDA library's objects
// enter theirs, for the operators of library.cpp to find; but run under the emulator's checks, on the memory of exactly
// the tensors that they are given.
#include "kernels.cu"

namespace twicing {
namespace {

constexpr int RESIDENT_BLOCKS = 8;

enum Use { READ, WRITE };

struct Memory {
  const Problem& problem;

  void rows(const char* name, const Tensor& t, int heads, Use use) const {
    const int64_t end = (problem.batch - 1) * t.batch_stride + (heads - 1) * t.head_stride +
                        (problem.seq - 1) * t.row_stride + HEAD_DIM;
    simt::emulator_buffer(name, t.data, end * 2, use == WRITE, false);
  }
  void floats(const char* name, const float* data, int64_t columns, Use use) const {
    if (data == nullptr) return;
    const int64_t bytes = columns * 4 * problem.batch * problem.heads * problem.seq;
    simt::emulator_buffer(name, const_cast<float*>(data), bytes, use == WRITE, false);
  }
  void offsets() const {
    if (problem.cu_seqlens == nullptr) return;
    simt::emulator_buffer("cu_seqlens", const_cast<int*>(problem.cu_seqlens), (problem.documents + 1) * 4, false, false);
  }
};

void expose(const ForwardParams& p) {
  const Memory memory{p.problem};
  memory.offsets();
  memory.rows("query", p.query, p.problem.heads, READ);
  memory.rows("key", p.key, p.problem.key_heads, READ);
  memory.rows("value", p.value, p.problem.key_heads, READ);
  memory.rows("u", p.u, p.problem.heads, WRITE);
  memory.rows("output", p.output, p.problem.heads, WRITE);
  memory.floats("lse", p.lse, 1, WRITE);
}

void expose(const BackwardParams& p) {
  const Memory memory{p.problem};
  memory.offsets();
  for (const Tensor* t : {&p.query, &p.output, &p.u, &p.grad_output}) memory.rows("input", *t, p.problem.heads, READ);
  for (const Tensor* t : {&p.key, &p.value}) memory.rows("key or value", *t, p.problem.key_heads, READ);
  for (const Tensor* t : {&p.grad_u, &p.grad_query}) memory.rows("gradient", *t, p.problem.heads, WRITE);
  for (const Tensor* t : {&p.grad_key, &p.grad_value}) memory.rows("key's gradient", *t, p.problem.key_heads, WRITE);
  memory.floats("lse", p.lse, 1, READ);
  memory.floats("delta", p.delta, 1, WRITE);
  memory.floats("grad_query_sum", p.grad_query_sum, HEAD_DIM, WRITE);
}

template <class Params>
struct Check {
  Check() {
    for (Kernel<Params>& kernel : kernels<Params>()) {
      if (kernel.element != ELEMENT_TYPE || kernel.head_dim != HEAD_DIM) continue;
      kernel.run = [run = kernel.run, workspace_bytes = kernel.workspace_bytes](const Params& p, void* workspace,
                                                                                ptx::Stream stream) -> ptx::Status {
        simt::emulator_reset(0, false, RESIDENT_BLOCKS);
        expose(p);
        simt::emulator_buffer("workspace", workspace, workspace_bytes(p.problem), true, false);
        const ptx::Status status = run(p, workspace, stream);
        return simt::machine.log.empty() ? status : 1;
      };
    }
  }
};
const Check<ForwardParams> forward_kernels;
const Check<BackwardParams> backward_kernels;

}  // namespace
}  // namespace twicing
