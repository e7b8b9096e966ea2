// Gradients of one problem, from dO and what forward saved: Q, K, V, U, O and the log-sum-exp.
//
//   dU = 2 dO - A^T dO      dV = A^T dU      dA = dU V^T - dO U^T      delta_i = dU_i U_i - dO_i (2U - O)_i
//   dS = A * (dA - delta)   dQ = scale dS K  dK = scale dS^T Q
//
// A block is some keys j, and meets the queries i chunk by chunk. All scores are transposed, [j][i], so that every
// product has its left operand at hand: A^T and dS^T as they are, and (dQ)^T = K^T dS^T. Which products are needed:
//   causal, one thread:  S, A^T [dO | dU], dA, dK, dQ     blocks backwards: dU of a block needs later blocks only
//   short:               S, A^T dO;     A^T dU, dA, dK, dQ   A of all blocks stays in cache between the two passes
//   otherwise:           S, A^T dO;  S, A^T dU, dA, dK, dQ   the second pass makes A again
#pragma once

#include "sequence.h"

namespace twicing {

template <typename E>
struct BackwardScratch {
  // Of a whole problem.
  Scratch<E> queries, queries_T, gradients, gradients_T, keys, keys_T, values, probabilities;
  Scratch<float> log_sum, delta, grad_query;
  // Of one block.
  Scratch<E> rows, p, ds, ds_packed;
  Scratch<float> scores, sums, grad_key;

  static BackwardScratch& of_this_thread() {
    static thread_local BackwardScratch scratch;
    return scratch;
  }
};

// T is the element of the tensors, E that of the products, G that of the gradients of key and value.
template <typename T, typename E, typename G>
class Backward {
 public:
  struct Inputs {
    Rows<const T> grad_output, query, key, value, output, u;
    const float* log_sum_exp;  // (length,)
  };
  struct Outputs {
    Rows<T> grad_query;
    Rows<G> grad_key, grad_value;
  };

  Backward(const Problem& problem, const Inputs& inputs, const Outputs& outputs)
      : problem_(problem), tiling_(problem), in_(inputs), out_(outputs),
        teams_(works_alone() ? 1 : std::min<int64_t>(at::get_num_threads(), tiling_.blocks)) {
    auto& scratch = BackwardScratch<E>::of_this_thread();
    const int64_t by_row = tiling_.padded_length * tiling_.depth;
    const int64_t by_chunk = tiling_.chunks * tiling_.chunk * tiling_.depth;
    queries_ = scratch.queries.get(by_chunk);
    queries_T_ = scratch.queries_T.get(by_chunk);
    gradients_ = scratch.gradients.get(2 * by_chunk);
    gradients_T_ = scratch.gradients_T.get(2 * by_chunk);
    keys_ = scratch.keys.get(by_row);
    keys_T_ = scratch.keys_T.get(by_row);
    values_ = scratch.values.get(2 * by_row);
    log_sum_ = scratch.log_sum.get(tiling_.chunks * tiling_.chunk);
    delta_ = scratch.delta.get(tiling_.chunks * tiling_.chunk);
    grad_query_ = scratch.grad_query.get(teams_ * by_chunk);
  }

  void run() {
    for_each<E>(tiling_.blocks, [&](int64_t i) { pack(i * tiling_.block); });
    std::fill(grad_query_, grad_query_ + teams_ * grad_query_size(), 0.0f);
    if (problem_.is_causal && works_alone()) {
      for (int64_t i = tiling_.blocks - 1; i >= 0; --i) sweep(i * tiling_.block);
    } else {
      if (tiling_.resident)
        probabilities_ =
            BackwardScratch<E>::of_this_thread().probabilities.get(tiling_.padded_length * tiling_.chunk);
      for_each<E>(tiling_.blocks, [&](int64_t i) { smooth(i * tiling_.block); });
      // Each team sums its own share of dQ, always of the same blocks: the result depends on their number only.
      for_each<E>(teams_, [&](int64_t team) {
        for (int64_t i = team; i < tiling_.blocks; i += teams_)
          gradients(i * tiling_.block, grad_query_ + team * grad_query_size());
      });
    }
    for_each<E>(tiling_.chunks, [&](int64_t i) { write_grad_query(i * tiling_.chunk); });
  }

 private:
  int64_t grad_query_size() const { return tiling_.chunks * tiling_.chunk * tiling_.depth; }
  int64_t first_query(int64_t start) const { return problem_.is_causal ? start : 0; }

  void pack(int64_t start) {
    const int64_t depth = tiling_.depth, chunk = tiling_.chunk, count = tiling_.block_rows(start);
    const int64_t first = tiling_.chunk_of(start), column = packed_offset<E>(0, start - first, chunk);
    const int64_t dim = problem_.head_dim;
    E* rows = BackwardScratch<E>::of_this_thread().rows.get(tiling_.block * tiling_.width);

    copy_rows(in_.query, start, count, dim, rows, depth, tiling_.block, depth);
    pack_rows(rows, depth, tiling_.block, depth, queries_ + packed_offset<E>(start, 0, depth), depth);
    pack_transposed(rows, depth, tiling_.block, depth, queries_T_ + first * depth + column, chunk);

    copy_rows(in_.grad_output, start, count, dim, rows, depth, tiling_.block, depth);
    pack_rows(rows, depth, tiling_.block, depth, gradients_ + packed_offset<E>(start, 0, tiling_.width), tiling_.width);
    pack_transposed(rows, depth, tiling_.block, depth,
                    gradients_T_ + first * tiling_.width + packed_offset<E>(depth, 0, chunk) + column, chunk);

    copy_rows(in_.key, start, count, dim, keys_ + start * depth, depth, tiling_.block, depth);
    transpose(keys_ + start * depth, depth, tiling_.block, depth, keys_T_ + start * depth, tiling_.block, rows);

    E* values = values_ + start * tiling_.width;
    copy_rows(in_.value, start, count, dim, values, tiling_.width, tiling_.block, depth);
    copy_rows(in_.u, start, count, dim, values + depth, tiling_.width, tiling_.block, depth);
    for (int64_t row = 0; row < tiling_.block; ++row) {
      E* negated = values + row * tiling_.width + depth;
      for (int64_t i = 0; i < depth; i += kLanes) store(negated + i, -load(negated + i));
    }
    for (int64_t row = 0; row < tiling_.block; ++row) {
      log_sum_[start + row] = row < count ? in_.log_sum_exp[start + row] / kLn2 : 0.0f;
      delta_[start + row] = 0.0f;
    }
  }

  // Causal: everything of one block, when dU of all later blocks is known.
  void sweep(int64_t start) {
    const int64_t depth = tiling_.depth, chunk = tiling_.chunk;
    const Block block = make_block(start);
    float* sums = block.sums;  // [A^T dO | A^T dU]
    std::fill(sums, sums + block.rows * tiling_.width, 0.0f);
    std::fill(block.grad_key, block.grad_key + block.rows * depth, 0.0f);

    for (int64_t first = tiling_.chunk_of(start) + chunk; first < tiling_.length; first += chunk) {
      const Columns columns = columns_of(first, first);
      make_probabilities(block, columns, block.p);
      multiply(block.rows, tiling_.width, columns.count, block.p, chunk, gradients_ + packed_offset<E>(first, 0, tiling_.width),
               tiling_.width, sums, tiling_.width, true);
      scores_gradient(block, columns, block.p, grad_query_);
    }

    const Columns columns = columns_of(tiling_.chunk_of(start), start);
    make_probabilities(block, columns, block.p);
    const int64_t own = std::min(tiling_.block, columns.count);  // the queries of this very block come first
    if (columns.count > own)
      multiply(block.rows, tiling_.width, columns.count - own, block.p + own, chunk,
               gradients_ + packed_offset<E>(start + own, 0, tiling_.width), tiling_.width, sums, tiling_.width, true);
    multiply(block.rows, depth, own, block.p, chunk, gradients_ + packed_offset<E>(start, 0, tiling_.width), tiling_.width, sums,
             tiling_.width, true);
    finish_grad_u(block, sums, tiling_.width);
    multiply(block.rows, depth, own, block.p, chunk, gradients_ + packed_offset<E>(start, depth, tiling_.width), tiling_.width,
             sums + depth, tiling_.width, true);
    scores_gradient(block, columns, block.p, grad_query_);
    write_key_and_value(block, sums + depth, tiling_.width);
  }

  // The first of two passes: dU and delta of one block.
  void smooth(int64_t start) {
    const int64_t depth = tiling_.depth, chunk = tiling_.chunk;
    const Block block = make_block(start);
    bool accumulate = false;
    for (int64_t first = tiling_.chunk_of(first_query(start)); first < tiling_.length; first += chunk) {
      const Columns columns = columns_of(first, std::max(first, first_query(start)));
      E* p = tiling_.resident ? probabilities_ + start * chunk : block.p;
      make_probabilities(block, columns, p);
      multiply(block.rows, depth, columns.count, p, chunk, gradients_ + packed_offset<E>(columns.start, 0, tiling_.width),
               tiling_.width, block.sums, depth, accumulate);
      accumulate = true;
    }
    finish_grad_u(block, block.sums, depth);
  }

  // The second: dV, dK and the block's part of dQ.
  void gradients(int64_t start, float* grad_query) {
    const int64_t depth = tiling_.depth, chunk = tiling_.chunk;
    const Block block = make_block(start);
    std::fill(block.grad_key, block.grad_key + block.rows * depth, 0.0f);
    bool accumulate = false;
    for (int64_t first = tiling_.chunk_of(first_query(start)); first < tiling_.length; first += chunk) {
      const Columns columns = columns_of(first, std::max(first, first_query(start)));
      const E* p = tiling_.resident ? probabilities_ + start * chunk : block.p;
      if (!tiling_.resident) make_probabilities(block, columns, block.p);
      multiply(block.rows, depth, columns.count, p, chunk,
               gradients_ + packed_offset<E>(columns.start, depth, tiling_.width), tiling_.width, block.sums, depth, accumulate);
      scores_gradient(block, columns, p, grad_query);
      accumulate = true;
    }
    write_key_and_value(block, block.sums, depth);
  }

  // A block of keys and the scratch of the thread that works on it.
  struct Block {
    int64_t start, count, rows;  // count is how many exist, rows is padded
    E *p, *ds, *ds_packed;
    float *scores, *sums, *grad_key;
  };

  Block make_block(int64_t start) const {
    auto& scratch = BackwardScratch<E>::of_this_thread();
    const int64_t size = tiling_.block * tiling_.chunk, count = tiling_.block_rows(start);
    return {start,
            count,
            round_up(count, 16),
            scratch.p.get(size),
            scratch.ds.get(size),
            kPair<E> == 2 ? scratch.ds_packed.get(size) : nullptr,
            scratch.scores.get(size),
            scratch.sums.get(tiling_.block * tiling_.width),
            scratch.grad_key.get(tiling_.block * tiling_.depth)};
  }

  // The queries [start, start + count) of the chunk at `first`.
  struct Columns {
    int64_t first, start, count;  // count is padded

    template <typename X>
    X* of(X* chunk_operand, int64_t stride) const {
      return chunk_operand + packed_offset<std::remove_const_t<X>>(0, start - first, stride);
    }
  };

  Columns columns_of(int64_t first, int64_t start) const {
    const int64_t end = std::min(first + tiling_.chunk, tiling_.length);
    return {first, start, round_up(end - start, 16)};
  }

  // A^T of a block and some queries: p[j][i] = 2^(factor * s[j][i] - log_sum[i]), zero where i < j.
  // Columns that pad the length need no zeros: dO, dU and Q are zero there. Rows that pad it do.
  void make_probabilities(const Block& block, const Columns& columns, E* p) const {
    const int64_t depth = tiling_.depth, chunk = tiling_.chunk;
    multiply(block.rows, columns.count, depth, keys_ + block.start * depth, depth,
             columns.of(queries_T_ + columns.first * depth, chunk), chunk, block.scores, chunk, false);
    const float factor = problem_.scale_log2();
    const float* log_sum = log_sum_ + columns.start;
    for (int64_t row = 0; row < block.count; ++row) {
      const float* s = block.scores + row * chunk;
      for (int64_t i = 0; i < columns.count; i += kLanes)
        store(p + row * chunk + i, exp2<E>(load(s + i) * factor - load(log_sum + i)));
      if (problem_.is_causal && block.start + row > columns.start)
        std::fill_n(p + row * chunk, block.start + row - columns.start, E(0));
    }
    for (int64_t row = block.count; row < block.rows; ++row) std::fill_n(p + row * chunk, columns.count, E(0));
  }

  // dS^T, and from it dK and dQ.
  void scores_gradient(const Block& block, const Columns& columns, const E* p, float* grad_query) const {
    const int64_t depth = tiling_.depth, chunk = tiling_.chunk;
    multiply(block.rows, columns.count, tiling_.width, values_ + block.start * tiling_.width, tiling_.width,
             columns.of(gradients_T_ + columns.first * tiling_.width, chunk), chunk, block.scores, chunk, false);
    const float* delta = delta_ + columns.start;
    for (int64_t row = 0; row < block.rows; row += 2) {
      const float* da = block.scores + row * chunk;
      for (int64_t i = 0; i < columns.count; i += kLanes) {
        const Floats d = load(delta + i);
        const Floats even = load(p + row * chunk + i) * (load(da + i) - d);
        const Floats odd = load(p + (row + 1) * chunk + i) * (load(da + chunk + i) - d);
        store(block.ds + row * chunk + i, even);
        store(block.ds + (row + 1) * chunk + i, odd);
        if constexpr (kPair<E> == 2) store_pairs(block.ds_packed + row * chunk + 2 * i, even, odd);
      }
    }
    if (block.start == 0 && columns.start == 0 && (problem_.is_causal || tiling_.length == 1)) {
      // The first query sees one key, so its dA equals delta: but not to the last bit.
      block.ds[0] = E(0);
      if constexpr (kPair<E> == 2) block.ds_packed[0] = E(0);
    }
    multiply(block.rows, depth, columns.count, block.ds, chunk, queries_ + packed_offset<E>(columns.start, 0, depth),
             depth, block.grad_key, depth, true);
    multiply(depth, columns.count, block.rows, keys_T_ + block.start * depth, tiling_.block,
             kPair<E> == 2 ? block.ds_packed : block.ds, chunk,
             grad_query + columns.first * depth + columns.start - columns.first, chunk, true);
  }

  // From A^T dO: dU and delta of a block, packed for the products to come.
  void finish_grad_u(const Block& block, const float* sums, int64_t stride) {
    const int64_t depth = tiling_.depth, chunk = tiling_.chunk, start = block.start;
    E* rows = BackwardScratch<E>::of_this_thread().rows.get(tiling_.block * tiling_.width);
    std::fill(rows + block.count * depth, rows + tiling_.block * depth, E(0));
    for (int64_t row = 0; row < block.count; ++row) {
      const T *grad_output = in_.grad_output[start + row], *output = in_.output[start + row];
      const T* u = in_.u[start + row];
      Floats delta = splat(0.0f);
      for (int64_t i = 0; i < problem_.head_dim; i += kLanes) {
        const int64_t some = problem_.head_dim - i;
        const Floats g = load_first(grad_output + i, some), u_i = load_first(u + i, some);
        const Floats grad_u = 2.0f * g - load(sums + row * stride + i);  // of padding: zero
        delta += grad_u * u_i - g * (2.0f * u_i - load_first(output + i, some));
        store(rows + row * depth + i, grad_u);
      }
      delta_[start + row] = horizontal_sum(delta);
    }
    const int64_t first = tiling_.chunk_of(start);
    pack_rows(rows, depth, tiling_.block, depth, gradients_ + packed_offset<E>(start, depth, tiling_.width), tiling_.width);
    pack_transposed(rows, depth, tiling_.block, depth,
                    gradients_T_ + first * tiling_.width + packed_offset<E>(0, start - first, chunk), chunk);
  }

  void write_key_and_value(const Block& block, const float* grad_value, int64_t stride) {
    for (int64_t row = 0; row < block.count; ++row) {
      const int64_t dim = problem_.head_dim, j = block.start + row;
      store_row(out_.grad_key[j], block.grad_key + row * tiling_.depth, dim, problem_.scale);
      store_row(out_.grad_value[j], grad_value + row * stride, dim, 1.0f);
    }
  }

  // Adds up the teams' shares of (dQ)^T of one chunk, and turns it.
  void write_grad_query(int64_t first) {
    const int64_t chunk = tiling_.chunk, depth = tiling_.depth;
    float* total = grad_query_ + first * depth;  // (depth, chunk)
    for (int64_t team = 1; team < teams_; ++team)
      for (int64_t i = 0; i < depth * chunk; ++i) total[i] += total[team * grad_query_size() + i];
    const int64_t count = std::min(chunk, tiling_.length - first);
    for (int64_t column = 0; column < count; column += kLanes) {
      const int64_t rows = std::min<int64_t>(kLanes, count - column);
      for (int64_t word = 0; word < depth; word += kLanes) {
        float turned[kLanes * kLanes];
        transpose_words(total + word * chunk + column, chunk, turned, kLanes, kLanes);
        const int64_t dims = std::min<int64_t>(kLanes, problem_.head_dim - word);
        if (dims > 0)
          for (int64_t row = 0; row < rows; ++row)
            store_row(out_.grad_query[first + column + row] + word, turned + row * kLanes, dims, problem_.scale);
      }
    }
  }

  Problem problem_;
  Tiling tiling_;
  Inputs in_;
  Outputs out_;
  int64_t teams_;
  // Right operands: Q and [dO | dU] by row, and their transposes chunk by chunk, there with dU first.
  E *queries_, *queries_T_, *gradients_, *gradients_T_;
  // Left operands: K and [V | -U] by row, and K^T block by block.
  E *keys_, *keys_T_, *values_;
  E* probabilities_ = nullptr;  // A^T if it stays: (padded_length, chunk)
  float *log_sum_, *delta_;     // (length,); log_sum to base 2
  float* grad_query_;           // (teams, chunks, depth, chunk)
};

}  // namespace twicing
