// What the backward pass reads and writes: the tensors, and packed operands made of them.
#pragma once

#include "sequence.h"

namespace twicing {

template <typename T>
struct BackwardInputs {
  Rows<const T> grad_output, query, key, value, output, u;
  const float* log_sum_exp;  // (length,)
};

template <typename T, typename G>
struct BackwardOutputs {
  Rows<T> grad_query;
  Rows<G> grad_key, grad_value;
};

template <typename E>
struct BackwardScratch {
  // Of a whole problem.
  Scratch<E> queries, queries_T, gradients, gradients_T, keys_T, values;
  Scratch<float> log_sum, delta, grad_query;
  // Of one block.
  Scratch<E> rows, key, p, ds_packed;
  Scratch<float> scores, sums, grad_key;

  static BackwardScratch& of_this_thread() {
    static thread_local BackwardScratch scratch;
    return scratch;
  }
};

template <typename T, typename E, typename G>
class BackwardData {
 public:
  BackwardData(const Problem& problem, const BackwardInputs<T>& inputs, const BackwardOutputs<T, G>& outputs)
      : tiling(problem, works_alone(), block_alone<E>(problem.length)),
        teams(works_alone() ? 1 : std::min<int64_t>(at::get_num_threads(), tiling.blocks)),
        problem_(problem), in_(inputs), out_(outputs) {
    auto& scratch = BackwardScratch<E>::of_this_thread();
    const int64_t by_row = tiling.padded_length * tiling.depth;
    const int64_t by_chunk = tiling.chunks * tiling.chunk * tiling.depth;
    queries_ = scratch.queries.get(by_row);
    queries_T_ = scratch.queries_T.get(by_chunk);
    gradients_ = scratch.gradients.get(2 * by_row);
    gradients_T_ = scratch.gradients_T.get(2 * by_chunk);
    keys_T_ = scratch.keys_T.get(by_row);
    values_ = scratch.values.get(2 * by_row);
    log_sum = scratch.log_sum.get(tiling.padded_length);
    delta = scratch.delta.get(tiling.padded_length);
    grad_query_ = scratch.grad_query.get(teams * by_chunk);
    if (tiling.blocks > 1) std::fill_n(grad_query_, teams * by_chunk, 0.0f);
  }

  // Left operands: K by row, [V | -U] by row, and K^T block by block.
  Left<E> key(int64_t start, int64_t rows, E* copy) const {
    return left_operand(rows_of(in_.key, problem_, start, rows), copy);
  }
  const E* values_at(int64_t start) const { return values_ + start * tiling.width; }
  const E* keys_T_at(int64_t start) const { return keys_T_ + start * tiling.depth; }

  // Right operands: Q and [dO | dU] by row, and the transposes of Q and [dU | dO], chunk by chunk.
  const E* queries_at(int64_t start) const { return queries_ + packed_offset<E>(start, 0, tiling.depth); }
  E* gradients_at(int64_t start) const { return gradients_ + packed_offset<E>(start, 0, tiling.width); }
  E* grad_u_at(int64_t start) const { return gradients_ + packed_offset<E>(start, tiling.depth, tiling.width); }
  E* queries_T_at(int64_t first, int64_t start) const {
    return queries_T_ + first * tiling.depth + packed_offset<E>(0, start - first, tiling.chunk);
  }
  E* gradients_T_at(int64_t first, int64_t start, int64_t element = 0) const {
    return gradients_T_ + first * tiling.width + packed_offset<E>(element, start - first, tiling.chunk);
  }

  // (dQ)^T as one team sums it, chunk by chunk: (chunks, depth, chunk).
  float* grad_query_of(int64_t team) const { return grad_query_ + team * tiling.chunks * tiling.chunk * tiling.depth; }

  // Packs what is known before A is.
  void start_block(int64_t start) {
    const int64_t first = tiling.chunk_of(start), block = tiling.block, width = tiling.width;
    const Padded<T> query = rows_of(in_.query, problem_, start, block);
    pack_rows(query, queries_ + packed_offset<E>(start, 0, tiling.depth), tiling.depth);
    pack_transposed(query, queries_T_at(first, start), tiling.chunk);

    const Padded<T> grad_output = rows_of(in_.grad_output, problem_, start, block);
    pack_rows(grad_output, gradients_at(start), width);
    pack_transposed(grad_output, gradients_T_at(first, start, tiling.depth), tiling.chunk);

    E* scratch = BackwardScratch<E>::of_this_thread().rows.get(block * tiling.depth);
    transpose(rows_of(in_.key, problem_, start, block), keys_T_ + start * tiling.depth, block, scratch);

    E* values = values_ + start * width;
    copy_rows(rows_of(in_.value, problem_, start, block), values, width);
    copy_rows(rows_of(in_.u, problem_, start, block), values + tiling.depth, width);
    for (int64_t row = 0; row < block; ++row)
      for (int64_t i = tiling.depth; i < width; i += kLanes) negate(values + row * width + i);
    for (int64_t row = start; row < start + block; ++row) {
      log_sum[row] = row < tiling.length ? in_.log_sum_exp[row] / kLn2 : 0.0f;
      delta[row] = 0.0f;
    }
  }

  // From A^T dO: dU and delta of a block, packed for the products to come.
  void finish_grad_u(int64_t start, int64_t count, const float* sums, int64_t stride) {
    const int64_t depth = tiling.depth, first = tiling.chunk_of(start);
    E* rows = BackwardScratch<E>::of_this_thread().rows.get(tiling.block * depth);
    for (int64_t row = 0; row < count; ++row) {
      const T *grad_output = in_.grad_output[start + row], *output = in_.output[start + row];
      const T* u = in_.u[start + row];
      Floats sum = splat(0.0f);
      for_vectors(problem_.head_dim, [&](int64_t i, int64_t some) {
        const Floats g = load_first(grad_output + i, some), u_i = load_first(u + i, some);
        const Floats grad_u = 2.0f * g - load(sums + row * stride + i);  // of padding: zero
        sum += grad_u * u_i - g * (2.0f * u_i - load_first(output + i, some));
        store(rows + row * depth + i, grad_u);
      });
      delta[start + row] = horizontal_sum(sum);
    }
    const Padded<E> grad_u{{rows, depth}, count, tiling.block, problem_.head_dim, depth};
    pack_rows(grad_u, grad_u_at(start), tiling.width);
    pack_transposed(grad_u, gradients_T_at(first, start), tiling.chunk);
  }

  void write_key_and_value(int64_t start, int64_t count, const float* grad_key, const float* grad_value,
                           int64_t grad_value_stride) {
    for (int64_t row = 0; row < count; ++row) {
      store_row(out_.grad_key[start + row], grad_key + row * tiling.depth, problem_.head_dim, problem_.scale);
      store_row(out_.grad_value[start + row], grad_value + row * grad_value_stride, problem_.head_dim, 1.0f);
    }
  }

  // Adds up the teams' shares of (dQ)^T of one chunk, and turns it.
  void write_grad_query(int64_t first) {
    const int64_t chunk = tiling.chunk, depth = tiling.depth;
    float* total = grad_query_of(0) + first * depth;
    for (int64_t team = 1; team < teams; ++team) {
      const float* share = grad_query_of(team) + first * depth;
      for (int64_t i = 0; i < depth * chunk; ++i) total[i] += share[i];
    }
    const int64_t count = std::min(chunk, tiling.length - first);
    for (int64_t column = 0; column < count; column += kLanes) {
      const int64_t rows = std::min<int64_t>(kLanes, count - column);
      for (int64_t word = 0; word < problem_.head_dim; word += kLanes) {
        float turned[kLanes * kLanes];
        transpose_words(total + word * chunk + column, chunk, turned, kLanes, kLanes);
        const int64_t dims = std::min<int64_t>(kLanes, problem_.head_dim - word);
        for (int64_t row = 0; row < rows; ++row)
          store_row(out_.grad_query[first + column + row] + word, turned + row * kLanes, dims, problem_.scale);
      }
    }
  }

  const Tiling tiling;
  const int64_t teams;    // how many share the blocks, each with its own (dQ)^T
  float *log_sum, *delta;  // (padded_length,); log_sum to base 2

 private:
  Problem problem_;
  BackwardInputs<T> in_;
  BackwardOutputs<T, G> out_;
  E *queries_, *queries_T_, *gradients_, *gradients_T_, *keys_T_, *values_;
  float* grad_query_;
};

}  // namespace twicing
