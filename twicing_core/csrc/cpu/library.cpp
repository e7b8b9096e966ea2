// The operators twicing::forward and twicing::backward (defined in twicing_core/operator.py) for CPU tensors.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "backward.h"
#include "forward.h"

namespace twicing {
namespace {

using at::Tensor;

// One head of a document of a row of the batch.
struct Place {
  int64_t batch, head, start, length;
};

std::vector<Place> places(const Tensor& query, const std::optional<Tensor>& cu_seqlens) {
  const int64_t batch = query.size(0), heads = query.size(1), seq = query.size(2);
  std::vector<Place> result;
  auto add_document = [&](int64_t row, int64_t start, int64_t length) {
    for (int64_t head = 0; head < heads && length > 0; ++head) result.push_back({row, head, start, length});
  };
  if (!cu_seqlens) {
    for (int64_t row = 0; row < batch; ++row) add_document(row, 0, seq);
    return result;
  }
  const Tensor offsets = cu_seqlens->contiguous();
  const int32_t* offset = offsets.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(offsets.numel() > 0 && offset[0] == 0 && offset[offsets.numel() - 1] == batch * seq,
                    "cu_seqlens must start at 0 and end at batch * seq = ", batch * seq);
  for (int64_t i = 1; i < offsets.numel(); ++i) {
    if (offset[i] == offset[i - 1]) continue;
    const int64_t row = offset[i - 1] / seq;
    TORCH_CHECK_VALUE(offset[i - 1] < offset[i] && offset[i] <= (row + 1) * seq,
                      "cu_seqlens must ascend and contain every row's start, got ", offset[i - 1], ", ", offset[i]);
    add_document(row, offset[i - 1] - row * seq, offset[i] - offset[i - 1]);
  }
  return result;
}

// With fewer problems than threads, the threads share each problem; else each takes the next one when it is free.
template <typename E, typename F>
void for_each_place(const std::vector<Place>& places, const F& run) {
  const int64_t count = static_cast<int64_t>(places.size()), threads = at::get_num_threads();
  if (count < threads) {
    for (const Place& place : places) run(place);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = next++; i < count; i = next++) run(places[i]);
  });
}

template <typename T>
Rows<T> rows(const Tensor& tensor, const Place& place, int64_t head) {
  using Value = std::remove_const_t<T>;
  Value* data = static_cast<Value*>(const_cast<void*>(tensor.const_data_ptr()));
  return {data + place.batch * tensor.stride(0) + head * tensor.stride(1) + place.start * tensor.stride(2),
          tensor.stride(2)};
}

// Kernels read rows of unit stride.
Tensor with_unit_stride(const Tensor& tensor) { return tensor.stride(3) == 1 ? tensor : tensor.contiguous(); }

// Laid out (batch, seq, heads, head_dim), as the projection that follows wants it.
Tensor empty_by_position(const Tensor& like, int64_t heads, at::ScalarType dtype) {
  return at::empty({like.size(0), like.size(2), heads, like.size(3)}, like.options().dtype(dtype)).transpose(1, 2);
}

// Only with tile instructions (AMX) are products in bfloat16 faster than in float. The same would hold for float16, on
// processors that have it in tiles: none was at hand to try that on.
bool multiplies_bfloat16() { return at::native::cpublas::could_pack(at::kBFloat16); }

// Calls f(T, E): the element of the tensors and that of the products.
template <typename F>
void dispatch(at::ScalarType dtype, const F& f) {
  if (dtype == at::kFloat) return f(float(), float());
  if (dtype == at::kHalf) return f(at::Half(), float());
  TORCH_CHECK_VALUE(dtype == at::kBFloat16, "the fused kernels take float32, bfloat16 and float16, got ", dtype);
  if (multiplies_bfloat16()) return f(at::BFloat16(), at::BFloat16());
  return f(at::BFloat16(), float());
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& query_, const Tensor& key_, const Tensor& value_,
                                           const std::optional<Tensor>& cu_seqlens, bool is_causal, double scale,
                                           std::string_view /*kernel: there is one*/) {
  const Tensor query = with_unit_stride(query_), key = with_unit_stride(key_), value = with_unit_stride(value_);
  const int64_t heads = query.size(1), seq = query.size(2), group = heads / key.size(1);
  Tensor output = empty_by_position(query, heads, query.scalar_type());
  Tensor u = empty_by_position(query, heads, query.scalar_type());
  Tensor lse = at::empty({query.size(0), heads, seq}, query.options().dtype(at::kFloat));

  dispatch(query.scalar_type(), [&](auto tensor_element, auto product_element) {
    using T = decltype(tensor_element);
    using E = decltype(product_element);
    for_each_place<E>(places(query, cu_seqlens), [&](const Place& place) {
      const int64_t key_head = place.head / group;
      const Problem problem{place.length, query.size(3), is_causal, static_cast<float>(scale)};
      Forward<T, E>(problem, rows<const T>(query, place, place.head), rows<const T>(key, place, key_head),
                    rows<const T>(value, place, key_head), rows<T>(output, place, place.head),
                    rows<T>(u, place, place.head),
                    lse.mutable_data_ptr<float>() + (place.batch * heads + place.head) * seq + place.start)
          .run();
    });
  });
  return {output, u, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output_, const Tensor& query_, const Tensor& key_,
                                            const Tensor& value_, const Tensor& output_, const Tensor& u_,
                                            const Tensor& lse_, const std::optional<Tensor>& cu_seqlens,
                                            bool is_causal, double scale, std::string_view /*kernel: there is one*/,
                                            bool /*deterministic: always*/) {
  const Tensor query = with_unit_stride(query_), key = with_unit_stride(key_), value = with_unit_stride(value_);
  const Tensor grad_output = with_unit_stride(grad_output_), output = with_unit_stride(output_);
  const Tensor u = with_unit_stride(u_), lse = lse_.contiguous();
  const int64_t heads = query.size(1), seq = query.size(2), key_heads = key.size(1), group = heads / key_heads;
  const at::ScalarType dtype = query.scalar_type();
  // Query heads that share a key head are summed afterwards, in float32.
  const at::ScalarType key_dtype = group > 1 ? at::kFloat : dtype;
  Tensor grad_query = empty_by_position(query, heads, dtype);
  Tensor grad_key = empty_by_position(query, heads, key_dtype), grad_value = empty_by_position(query, heads, key_dtype);

  dispatch(dtype, [&](auto tensor_element, auto product_element) {
    using T = decltype(tensor_element);
    using E = decltype(product_element);
    const auto run_as = [&](auto grad_element) {
      using G = decltype(grad_element);
      for_each_place<E>(places(query, cu_seqlens), [&](const Place& place) {
        const int64_t head = place.head, key_head = head / group;
        const Problem problem{place.length, query.size(3), is_causal, static_cast<float>(scale)};
        Backward<T, E, G>(
            problem,
            {rows<const T>(grad_output, place, head), rows<const T>(query, place, head),
             rows<const T>(key, place, key_head), rows<const T>(value, place, key_head),
             rows<const T>(output, place, head), rows<const T>(u, place, head),
             lse.const_data_ptr<float>() + (place.batch * heads + head) * seq + place.start},
            {rows<T>(grad_query, place, head), rows<G>(grad_key, place, head), rows<G>(grad_value, place, head)})
            .run();
      });
    };
    if (group > 1)
      run_as(float());
    else
      run_as(T());
  });
  if (group > 1) {
    const auto sum_groups = [&](const Tensor& grad) {
      return grad.transpose(1, 2).unflatten(2, {key_heads, group}).sum(3).to(dtype).transpose(1, 2);
    };
    return {grad_query, sum_groups(grad_key), sum_groups(grad_value)};
  }
  return {grad_query, grad_key, grad_value};
}

}  // namespace

TORCH_LIBRARY_IMPL(twicing, CPU, m) {
  m.impl("forward", forward);
  m.impl("backward", backward);
}

TORCH_LIBRARY_IMPL(twicing, CompositeImplicitAutograd, m) { m.impl("multiplies_bfloat16", multiplies_bfloat16); }

}  // namespace twicing
