// The operators twicing::forward and twicing::backward (defined in twicing_core/operator.py) for CUDA tensors.
//
// It speaks to torch by the stable ABI of libtorch only: one build serves all versions of torch from TORCH_TARGET_VERSION
// on, with CUDA or without, and is loaded on machines that have no GPU. What it needs of memory it gets from torch, what
// it launches goes to torch's current stream, and nothing here waits for the device: CUDA graphs can capture it.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <climits>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "registry.cuh"

#ifndef TWICING_DISPATCH_KEY  // tests/kernels compiles this file for CPU tensors too, with kernels run by the emulator
#define TWICING_DISPATCH_KEY CUDA
#endif

namespace twicing {
namespace {

namespace stable = torch::stable;
using torch::headeronly::ScalarType;

// While it lives, the tensor's device is the current one.
struct OnDeviceOf {
  std::optional<stable::accelerator::DeviceGuard> guard;
  ptx::Stream stream = nullptr;

  explicit OnDeviceOf(const stable::Tensor& tensor) {
    if (!tensor.is_cuda()) return;
    const int32_t device = tensor.get_device_index();
    guard.emplace(device);
    stream = static_cast<ptx::Stream>(stable::accelerator::getCurrentStream(device).nativeHandle());
  }
};

// (batch, heads, seq, head_dim) laid out as (batch, seq, heads, head_dim), as the projection that follows wants it.
stable::Tensor empty_by_position(const stable::Tensor& like) {
  return stable::transpose(stable::new_empty(like, {like.size(0), like.size(2), like.size(1), like.size(3)}), 1, 2);
}

stable::Tensor empty_floats(const stable::Tensor& like, int64_t columns) {  // for each row of `like`
  return stable::new_empty(like, {like.size(0), like.size(1), like.size(2), columns}, ScalarType::Float);
}

// The tensor, or a copy of it where rows aren't what kernels read: 16 bytes at a time, at multiples of 16 bytes.
stable::Tensor with_readable_rows(const stable::Tensor& tensor) {
  bool readable = tensor.stride(3) == 1 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int dimension = 0; dimension < 3; dimension++)
    readable &= tensor.size(dimension) == 1 || tensor.stride(dimension) % 8 == 0;
  if (readable) return tensor;
  stable::Tensor copy = empty_by_position(tensor);
  return stable::copy_(copy, tensor);
}

std::optional<stable::Tensor> contiguous(const std::optional<stable::Tensor>& tensor) {
  return tensor ? std::optional(stable::contiguous(*tensor)) : std::nullopt;
}

Tensor view(const stable::Tensor& tensor) {
  uint16_t* data = static_cast<uint16_t*>(const_cast<void*>(tensor.const_data_ptr()));
  return {data, tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

bool same_shape(const stable::Tensor& a, const stable::Tensor& b) { return a.sizes() == b.sizes(); }

Element element_of(const stable::Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "the CUDA kernels take bfloat16 and float16, got ", torch::headeronly::toString(type));
  return type == ScalarType::BFloat16 ? Element::BF16 : Element::FP16;
}

// twicing_attention has checked what users give; this keeps kernels inside of memory if the operator is called directly.
Problem problem_of(const stable::Tensor& query, const stable::Tensor& key, const stable::Tensor& value,
                   const std::optional<stable::Tensor>& cu_seqlens, bool is_causal, double scale) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && same_shape(key, value) && query.numel() > 0,
                  "query, key and value must be (batch, heads, seq, head_dim), and key and value of one shape");
  const int64_t batch = query.size(0), heads = query.size(1), seq = query.size(2), key_heads = key.size(1);
  STD_TORCH_CHECK(key.size(0) == batch && key.size(2) == seq && key.size(3) == query.size(3) && heads % key_heads == 0,
                  "query and key must have the same batch, seq and head_dim, and heads be a multiple of the key's");
  for (const stable::Tensor* other : {&key, &value})
    STD_TORCH_CHECK(other->scalar_type() == query.scalar_type() && other->get_device_index() == query.get_device_index(),
                    "query, key and value must have the same dtype and device");
  STD_TORCH_CHECK(scale > 0, "the CUDA kernels take a positive scale, got ", scale);
  STD_TORCH_CHECK(batch * heads <= INT_MAX && seq <= INT_MAX && batch * heads * ((seq + 15) / 16) <= INT_MAX,
                  "more blocks of rows than a launch can have: batch ", batch, ", heads ", heads, ", seq ", seq);
  Problem problem{static_cast<int>(batch), static_cast<int>(heads), static_cast<int>(key_heads), static_cast<int>(seq),
                  0, nullptr, static_cast<float>(scale), is_causal};
  if (cu_seqlens) {
    STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->numel() > 1 &&
                        cu_seqlens->get_device_index() == query.get_device_index(),
                    "cu_seqlens must be 1-D int32, at least two numbers, on the query's device");
    problem.documents = static_cast<int>(cu_seqlens->numel() - 1);
    problem.cu_seqlens = static_cast<const int*>(cu_seqlens->const_data_ptr());
  }
  return problem;
}

template <class Params>
void run(const std::string& name, const Params& params, const stable::Tensor& query, ptx::Stream stream) {
  const Kernel<Params>* kernel = find<Params>(name, element_of(query), query.size(3));
  STD_TORCH_CHECK(kernel != nullptr, "no kernel '", name, "' was built for ",
                  torch::headeronly::toString(query.scalar_type()), " and head_dim ", query.size(3));
  STD_TORCH_CHECK(kernel->takes(params.problem), "the kernel '", name, "' does not take this problem");
  const int64_t bytes = kernel->workspace_bytes(params.problem);
  const stable::Tensor workspace = stable::new_empty(query, {bytes}, ScalarType::Byte);
  const ptx::Status status = kernel->run(params, workspace.mutable_data_ptr(), stream);
  STD_TORCH_CHECK(status == ptx::SUCCESS, "the kernel '", name, "' could not be launched: ", ptx::describe(status));
}

std::tuple<stable::Tensor, stable::Tensor, stable::Tensor> forward(
    const stable::Tensor& query_, const stable::Tensor& key_, const stable::Tensor& value_,
    const std::optional<stable::Tensor>& cu_seqlens, bool is_causal, double scale, const std::string& kernel) {
  const std::optional<stable::Tensor> offsets = contiguous(cu_seqlens);
  const Problem problem = problem_of(query_, key_, value_, offsets, is_causal, scale);
  const OnDeviceOf device(query_);
  const stable::Tensor query = with_readable_rows(query_), key = with_readable_rows(key_);
  const stable::Tensor value = with_readable_rows(value_);
  const stable::Tensor output = empty_by_position(query), u = empty_by_position(query);
  const stable::Tensor lse = stable::new_empty(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
  const ForwardParams params{problem, view(query), view(key), view(value), view(u), view(output),
                             lse.mutable_data_ptr<float>()};
  run(kernel, params, query, device.stream);
  return {output, u, lse};
}

std::tuple<stable::Tensor, stable::Tensor, stable::Tensor> backward(
    const stable::Tensor& grad_output_, const stable::Tensor& query_, const stable::Tensor& key_,
    const stable::Tensor& value_, const stable::Tensor& output_, const stable::Tensor& u_, const stable::Tensor& lse_,
    const std::optional<stable::Tensor>& cu_seqlens, bool is_causal, double scale, const std::string& kernel,
    bool deterministic) {
  const std::optional<stable::Tensor> offsets = contiguous(cu_seqlens);
  const Problem problem = problem_of(query_, key_, value_, offsets, is_causal, scale);
  for (const stable::Tensor* other : {&grad_output_, &output_, &u_})
    STD_TORCH_CHECK(same_shape(*other, query_) && other->scalar_type() == query_.scalar_type(),
                    "grad_output, output and u must have the query's shape and dtype");
  STD_TORCH_CHECK(lse_.numel() * query_.size(3) == query_.numel() && lse_.scalar_type() == ScalarType::Float,
                  "lse must be (batch, heads, seq) float32");
  const OnDeviceOf device(query_);
  const stable::Tensor query = with_readable_rows(query_), key = with_readable_rows(key_);
  const stable::Tensor value = with_readable_rows(value_), grad_output = with_readable_rows(grad_output_);
  const stable::Tensor output = with_readable_rows(output_), u = with_readable_rows(u_);
  const stable::Tensor lse = stable::contiguous(lse_);

  const stable::Tensor grad_query = empty_by_position(query), grad_key = empty_by_position(key);
  const stable::Tensor grad_value = empty_by_position(value);
  const stable::Tensor grad_u = empty_by_position(query), delta = empty_floats(query, 1);
  std::optional<stable::Tensor> grad_query_sum;
  if (!deterministic) grad_query_sum = empty_floats(query, query.size(3));
  BackwardParams params{};
  params.problem = problem;
  params.query = view(query), params.key = view(key), params.value = view(value);
  params.output = view(output), params.u = view(u), params.grad_output = view(grad_output);
  params.grad_u = view(grad_u);
  params.grad_query = view(grad_query), params.grad_key = view(grad_key), params.grad_value = view(grad_value);
  params.lse = lse.const_data_ptr<float>();
  params.delta = delta.mutable_data_ptr<float>();
  params.grad_query_sum = grad_query_sum ? grad_query_sum->mutable_data_ptr<float>() : nullptr;
  run(kernel, params, query, device.stream);
  return {grad_query, grad_key, grad_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(twicing, TWICING_DISPATCH_KEY, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}

}  // namespace twicing
