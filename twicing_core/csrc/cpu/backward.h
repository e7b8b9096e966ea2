// Gradients of one problem, from dO and what forward saved: Q, K, V, U, O and the log-sum-exp.
//
//   dU = 2 dO - A^T dO      dV = A^T dU      dA = dU V^T - dO U^T      delta_i = dU_i U_i - dO_i (2U - O)_i
//   dS = A * (dA - delta)   dQ = scale dS K  dK = scale dS^T Q
//
// A block is some keys j, and meets the queries i chunk by chunk. All scores are transposed, [j][i], so that every
// product has its left operand at hand: A^T and dS^T as they are, and (dQ)^T = K^T dS^T. Which products are needed:
//   causal or short, one thread:  S, A^T [dO | dU], dA, dK, dQ       blocks backwards: dU of a block needs later ones only
//   otherwise:                    S, A^T dO;  S, A^T dU, dA, dK, dQ  the second pass makes A again
#pragma once

#include "gradients.h"

namespace twicing {

// T is the element of the tensors, E that of the products, G that of the gradients of key and value.
template <typename T, typename E, typename G>
class Backward {
 public:
  Backward(const Problem& problem, const BackwardInputs<T>& inputs, const BackwardOutputs<T, G>& outputs)
      : data_(problem, inputs, outputs), problem_(problem), tiling_(data_.tiling) {}

  void run() {
    for_each<E>(tiling_.blocks, [&](int64_t i) { data_.start_block(i * tiling_.block); });
    if (tiling_.one_pass) {
      for (int64_t i = tiling_.blocks - 1; i >= 0; --i) sweep(i * tiling_.block);
    } else {
      for_each<E>(tiling_.blocks, [&](int64_t i) { smooth(i * tiling_.block); });
      // Each team sums its own share of dQ, always of the same blocks: the result depends on their number only.
      for_each<E>(data_.teams, [&](int64_t team) {
        for (int64_t i = team; i < tiling_.blocks; i += data_.teams)
          gradients(i * tiling_.block, data_.grad_query_of(team));
      });
    }
    for_each<E>(tiling_.chunks, [&](int64_t i) { data_.write_grad_query(i * tiling_.chunk); });
  }

 private:
  // A block of keys, and the scratch of the thread that works on it.
  struct Block {
    int64_t start, count, rows;  // count is how many exist, rows is padded
    E *key, *p, *ds_packed;  // dS takes the place of A^T
    float *scores, *sums, *grad_key;
  };

  Block make_block(int64_t start) const {
    auto& scratch = BackwardScratch<E>::of_this_thread();
    const int64_t size = tiling_.block * tiling_.chunk, count = tiling_.block_rows(start);
    return {start,
            count,
            round_up(count, kStep<E>),
            scratch.key.get(kStrip * tiling_.depth),
            scratch.p.get(size),
            kPair<E> == 2 ? scratch.ds_packed.get(size) : nullptr,
            scratch.scores.get(kStrip * tiling_.chunk),
            scratch.sums.get(tiling_.block * tiling_.width),
            scratch.grad_key.get(tiling_.block * tiling_.depth)};
  }

  // The queries [start, start + count) of the chunk at `first`.
  struct Columns {
    int64_t first, start, count;  // count is padded
  };

  // Those from `start` on to the end of the chunk.
  Columns columns_from(int64_t first, int64_t start) const {
    return {first, start, round_up(std::min(first + tiling_.chunk, tiling_.length) - start, kStep<E>)};
  }

  int64_t first_query(int64_t start) const { return problem_.is_causal ? start : 0; }

  // Causal or short: everything of one block, when dU of all later blocks is known.
  void sweep(int64_t start) {
    const int64_t depth = tiling_.depth, width = tiling_.width, chunk = tiling_.chunk;
    const Block block = make_block(start);
    float* sums = block.sums;  // [A^T dO | A^T dU]
    bool accumulate = false;

    for (int64_t first = tiling_.chunk_of(start) + chunk; first < tiling_.length; first += chunk) {
      const Columns columns = columns_from(first, first);
      make_probabilities(block, columns);
      multiply(block.rows, width, columns.count, block.p, chunk, data_.gradients_at(first), width, sums, width,
               accumulate);
      scores_gradient(block, columns, data_.grad_query_of(0), accumulate);
      accumulate = true;
    }

    const Columns columns = columns_from(tiling_.chunk_of(start), start);
    make_probabilities(block, columns);
    const int64_t own = std::min(tiling_.block, columns.count);  // the queries of this very block come first
    if (columns.count > own) {
      multiply(block.rows, width, columns.count - own, block.p + own, chunk, data_.gradients_at(start + own), width,
               sums, width, accumulate);
    }
    const bool has_later = accumulate || columns.count > own;
    multiply(block.rows, depth, own, block.p, chunk, data_.gradients_at(start), width, sums, width, has_later);
    data_.finish_grad_u(start, block.count, sums, width);
    multiply(block.rows, depth, own, block.p, chunk, data_.grad_u_at(start), width, sums + depth, width, has_later);
    scores_gradient(block, columns, data_.grad_query_of(0), accumulate);
    data_.write_key_and_value(start, block.count, block.grad_key, sums + depth, width);
  }

  // The first of two passes: dU and delta of one block.
  void smooth(int64_t start) {
    const int64_t depth = tiling_.depth, chunk = tiling_.chunk;
    const Block block = make_block(start);
    bool accumulate = false;
    for (int64_t first = tiling_.chunk_of(first_query(start)); first < tiling_.length; first += chunk) {
      const Columns columns = columns_from(first, std::max(first, first_query(start)));
      make_probabilities(block, columns);
      multiply(block.rows, depth, columns.count, block.p, chunk, data_.gradients_at(columns.start), tiling_.width,
               block.sums, depth, accumulate);
      accumulate = true;
    }
    data_.finish_grad_u(start, block.count, block.sums, depth);
  }

  // The second: dV, dK and the block's part of dQ.
  void gradients(int64_t start, float* grad_query) {
    const int64_t depth = tiling_.depth, chunk = tiling_.chunk;
    const Block block = make_block(start);
    bool accumulate = false;
    for (int64_t first = tiling_.chunk_of(first_query(start)); first < tiling_.length; first += chunk) {
      const Columns columns = columns_from(first, std::max(first, first_query(start)));
      make_probabilities(block, columns);
      multiply(block.rows, depth, columns.count, block.p, chunk, data_.grad_u_at(columns.start), tiling_.width,
               block.sums, depth, accumulate);
      scores_gradient(block, columns, grad_query, accumulate);
      accumulate = true;
    }
    data_.write_key_and_value(start, block.count, block.grad_key, block.sums, depth);
  }

  // A^T of a block and some queries: p[j][i] = 2^(factor * s[j][i] - log_sum[i]), zero where i < j.
  // Columns that pad the length need no zeros: dO, dU and Q are zero there. Rows that pad it do.
  void make_probabilities(const Block& block, const Columns& columns) const {
    const int64_t depth = tiling_.depth, chunk = tiling_.chunk;
    const float factor = problem_.scale_log2();
    const float* log_sum = data_.log_sum + columns.start;
    for (int64_t strip = 0; strip < block.rows; strip += kStrip) {
      const int64_t rows = std::min(kStrip, block.rows - strip);
      const Left<E> key = data_.key(block.start + strip, rows, block.key);
      multiply(rows, columns.count, depth, key.data, key.stride, data_.queries_T_at(columns.first, columns.start), chunk,
               block.scores, chunk, false);
      for (int64_t row = strip; row < strip + rows; ++row) {
        const float* s = block.scores + (row - strip) * chunk;
        E* p = block.p + row * chunk;
        const int64_t hidden = problem_.is_causal ? std::max<int64_t>(block.start + row - columns.start, 0) : 0;
        const int64_t zeros = row < block.count ? std::min(hidden, columns.count) : columns.count;
        for (int64_t i = zeros / kLanes * kLanes; i < columns.count; i += kLanes)
          store(p + i, exp2<E>(load(s + i) * factor - load(log_sum + i)));
        std::fill_n(p, zeros, E(0));
      }
    }
  }

  // dS^T in place of A^T, and from it dK and dQ.
  void scores_gradient(const Block& block, const Columns& columns, float* grad_query, bool accumulate) const {
    const int64_t depth = tiling_.depth, chunk = tiling_.chunk;
    for (int64_t strip = 0; strip < block.rows; strip += kStrip) {
      const int64_t rows = std::min(kStrip, block.rows - strip);
      multiply(rows, columns.count, tiling_.width, data_.values_at(block.start + strip), tiling_.width,
               data_.gradients_T_at(columns.first, columns.start), chunk, block.scores, chunk, false);
      for (int64_t row = strip; row < strip + rows; row += 2)
        differentiate_softmax(block.scores + (row - strip) * chunk, block, row, columns);
    }
    if (block.start == 0 && columns.start == 0 && (problem_.is_causal || tiling_.length == 1)) {
      // The first query sees one key, so its dA equals delta: but not to the last bit.
      block.p[0] = E(0);
      if constexpr (kPair<E> == 2) block.ds_packed[0] = E(0);
    }
    multiply(block.rows, depth, columns.count, block.p, chunk, data_.queries_at(columns.start), depth, block.grad_key,
             depth, accumulate);
    multiply(depth, columns.count, block.rows, data_.keys_T_at(block.start), tiling_.block,
             kPair<E> == 2 ? block.ds_packed : block.p, chunk,
             grad_query + columns.first * depth + columns.start - columns.first, chunk, tiling_.blocks > 1);
  }

  // Two rows of dS^T from A^T and dA^T, as a left operand and packed as a right one.
  void differentiate_softmax(const float* da, const Block& block, int64_t row, const Columns& columns) const {
    const int64_t chunk = tiling_.chunk;
    const float* delta = data_.delta + columns.start;
    E *p = block.p + row * chunk, *next_p = p + chunk;
    for (int64_t i = 0; i < columns.count; i += kLanes) {
      const Floats d = load(delta + i);
      const Floats even = load(p + i) * (load(da + i) - d), odd = load(next_p + i) * (load(da + chunk + i) - d);
      store(p + i, even);
      store(next_p + i, odd);
      if constexpr (kPair<E> == 2)
        store_pairs(block.ds_packed + row * chunk + 2 * i, round_to_bfloat16(even), round_to_bfloat16(odd));
    }
  }

  BackwardData<T, E, G> data_;
  Problem problem_;
  Tiling tiling_;
};

}  // namespace twicing
