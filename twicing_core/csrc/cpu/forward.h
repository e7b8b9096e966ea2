// O = 2U - AU and U = AV of one problem, with A = softmax(scale * Q K^T).
//
// A block of query rows meets the keys chunk by chunk under a running maximum. Which products are needed per chunk:
//   causal, one thread:  S, P [V | U]         blocks in order: a block needs U of itself and of earlier blocks only
//   short:               S, P V;  P U         P of all blocks stays in cache between the two passes
//   otherwise:           S, P V;  S, P U      the second pass makes P again, from the maximum
#pragma once

#include "sequence.h"

namespace twicing {

// The running softmax of one row of scores.
struct RunningSoftmax {
  float max = -INFINITY;
  float sum = 0.0f;

  // p = 2^(factor * s - max) of the first `valid` scores, zeros up to `padded`. Returns what earlier sums, and
  // whatever was made of earlier p, must be multiplied by.
  template <typename E>
  float add(const float* s, int64_t valid, int64_t padded, float factor, E* p) {
    const int64_t whole = valid / kLanes * kLanes;
    Floats largest = splat(-INFINITY);
    for (int64_t j = 0; j < whole; j += kLanes) largest = twicing::max(load(s + j) * factor, largest);
    if (whole < valid) largest = twicing::max(keep_first(load(s + whole) * factor, valid - whole, -INFINITY), largest);
    const float new_max = std::max(horizontal_max(largest), max);

    Floats total = splat(0.0f);
    for (int64_t j = 0; j < whole; j += kLanes) {
      Floats x = exp2<E>(load(s + j) * factor - new_max);
      total += x;
      store(p + j, x);
    }
    if (whole < valid) {
      Floats x = keep_first(exp2<E>(load(s + whole) * factor - new_max), valid - whole, 0.0f);
      total += x;
      store(p + whole, x);
    }
    std::fill(p + round_up(valid, kLanes), p + padded, E(0));
    const float keep = max == new_max ? 1.0f : max == -INFINITY ? 0.0f : std::exp2(max - new_max);
    sum = sum * keep + horizontal_sum(total);
    max = new_max;
    return keep;
  }

  float log_sum_exp() const { return (max + std::log2(sum)) * kLn2; }
};

template <typename E>
struct ForwardScratch {
  // Of a whole problem.
  Scratch<E> keys, values, probabilities;
  Scratch<float> u, max, normalizer;
  // Of one block.
  Scratch<E> query, p, block_u;
  Scratch<float> scores, sums;

  static ForwardScratch& of_this_thread() {
    static thread_local ForwardScratch scratch;
    return scratch;
  }
};

// T is the element of the tensors, E that of the products.
template <typename T, typename E>
class Forward {
 public:
  Forward(const Problem& problem, Rows<const T> query, Rows<const T> key, Rows<const T> value, Rows<T> output,
          Rows<T> u, float* log_sum_exp)
      : problem_(problem), tiling_(problem), query_(query), key_(key), value_(value), output_(output), u_(u),
        log_sum_exp_(log_sum_exp) {
    auto& scratch = ForwardScratch<E>::of_this_thread();
    keys_ = scratch.keys.get(tiling_.chunks * tiling_.chunk * tiling_.depth);
    values_ = scratch.values.get(tiling_.padded_length * tiling_.width);
    exact_u_ = scratch.u.get(tiling_.padded_length * tiling_.depth);
    max_ = scratch.max.get(tiling_.padded_length);
    normalizer_ = scratch.normalizer.get(tiling_.padded_length);
  }

  void run() {
    for_each<E>(tiling_.blocks, [&](int64_t i) { pack_keys_and_values(i * tiling_.block); });
    if (problem_.is_causal && works_alone()) {
      for (int64_t i = 0; i < tiling_.blocks; ++i) sweep(i * tiling_.block);
      return;
    }
    if (tiling_.resident)
      probabilities_ =
          ForwardScratch<E>::of_this_thread().probabilities.get(tiling_.padded_length * tiling_.chunk);
    for_each<E>(tiling_.blocks, [&](int64_t i) { smooth(i * tiling_.block); });
    for_each<E>(tiling_.blocks, [&](int64_t i) { smooth_again(i * tiling_.block); });
  }

 private:
  int64_t end_of_keys(int64_t start) const {
    return problem_.is_causal ? std::min(start + tiling_.block, tiling_.length) : tiling_.length;
  }

  void pack_keys_and_values(int64_t start) {
    const int64_t depth = tiling_.depth, count = tiling_.block_rows(start), first = tiling_.chunk_of(start);
    E* rows = ForwardScratch<E>::of_this_thread().query.get(tiling_.block * depth);
    copy_rows(key_, start, count, problem_.head_dim, rows, depth, tiling_.block, depth);
    pack_transposed(rows, depth, tiling_.block, depth,
                    keys_ + first * depth + packed_offset<E>(0, start - first, tiling_.chunk), tiling_.chunk);
    copy_rows(value_, start, count, problem_.head_dim, rows, depth, tiling_.block, depth);
    pack_rows(rows, depth, tiling_.block, depth, values_ + packed_offset<E>(start, 0, tiling_.width), tiling_.width);
  }

  // The scores of a block of queries against the keys [first, first + columns) of one chunk.
  float* scores(int64_t rows, const E* query, int64_t first, int64_t columns) {
    float* s = ForwardScratch<E>::of_this_thread().scores.get(tiling_.block * tiling_.chunk);
    multiply(rows, columns, tiling_.depth, query, tiling_.depth, keys_ + first * tiling_.depth, tiling_.chunk, s,
             tiling_.chunk, false);
    return s;
  }

  const E* load_query(int64_t start, int64_t count, int64_t rows) {
    E* query = ForwardScratch<E>::of_this_thread().query.get(tiling_.block * tiling_.depth);
    copy_rows(query_, start, count, problem_.head_dim, query, tiling_.depth, rows, tiling_.depth);
    return query;
  }

  // Causal: U and O of one block, when U of all blocks before it is known.
  void sweep(int64_t start) {
    auto& scratch = ForwardScratch<E>::of_this_thread();
    const int64_t depth = tiling_.depth, width = tiling_.width, chunk = tiling_.chunk;
    const int64_t count = tiling_.block_rows(start), rows = round_up(count, 16), end = end_of_keys(start);
    const E* query = load_query(start, count, rows);
    E* p = scratch.p.get(tiling_.block * chunk);
    float* sums = scratch.sums.get(tiling_.block * width);  // [P V | P U]
    RunningSoftmax softmax[kMaxBlock];

    for (int64_t first = 0; first < end; first += chunk) {
      const int64_t columns = round_up(std::min(chunk, end - first), 16);
      const int64_t before = std::min(chunk, start - first);  // columns whose U is known
      add_chunk(start, count, first, columns, scores(rows, query, first, columns), softmax, p, sums, width);
      if (before > 0)
        multiply(rows, width, before, p, chunk, values_ + packed_offset<E>(first, 0, width), width, sums, width,
                 first > 0);
      else if (first == 0)
        std::fill(sums, sums + rows * width, 0.0f);  // the first block of all
      if (before < columns) {
        multiply(rows, depth, columns - before, p + before, chunk, values_ + packed_offset<E>(start, 0, width), width,
                 sums, width, true);
        finish_u(start, count, softmax, sums, width);
        multiply(rows, depth, columns - before, p + before, chunk,
                 values_ + packed_offset<E>(start, depth, width), width, sums + depth, width, true);
      }
    }
    for (int64_t row = 0; row < count; ++row) {
      const float* pv = sums + row * width;
      write_output(start + row, pv, 1.0f / softmax[row].sum, pv + depth, 1.0f / softmax[row].sum);
    }
  }

  // The first of two passes: U and the log-sum-exp of one block.
  void smooth(int64_t start) {
    auto& scratch = ForwardScratch<E>::of_this_thread();
    const int64_t depth = tiling_.depth, width = tiling_.width, chunk = tiling_.chunk;
    const int64_t count = tiling_.block_rows(start), rows = round_up(count, 16), end = end_of_keys(start);
    const E* query = load_query(start, count, rows);
    E* p = tiling_.resident ? probabilities_ + start * chunk : scratch.p.get(tiling_.block * chunk);
    float* sums = scratch.sums.get(tiling_.block * width);
    RunningSoftmax softmax[kMaxBlock];

    for (int64_t first = 0; first < end; first += chunk) {
      const int64_t columns = round_up(std::min(chunk, end - first), 16);
      add_chunk(start, count, first, columns, scores(rows, query, first, columns), softmax, p, sums, depth);
      multiply(rows, depth, columns, p, chunk, values_ + packed_offset<E>(first, 0, width), width, sums, depth,
               first > 0);
    }
    finish_u(start, count, softmax, sums, depth);
    for (int64_t row = 0; row < count; ++row) {
      normalizer_[start + row] = 1.0f / softmax[row].sum;
      for (int64_t i = 0; i < depth; ++i)
        exact_u_[(start + row) * depth + i] = sums[row * depth + i] * normalizer_[start + row];
    }
  }

  // The second: A U, hence O, of one block.
  void smooth_again(int64_t start) {
    auto& scratch = ForwardScratch<E>::of_this_thread();
    const int64_t depth = tiling_.depth, width = tiling_.width, chunk = tiling_.chunk;
    const int64_t count = tiling_.block_rows(start), rows = round_up(count, 16), end = end_of_keys(start);
    const E* query = tiling_.resident ? nullptr : load_query(start, count, rows);
    float* sums = scratch.sums.get(tiling_.block * width);

    for (int64_t first = 0; first < end; first += chunk) {
      const int64_t columns = round_up(std::min(chunk, end - first), 16);
      E* p = tiling_.resident ? probabilities_ + start * chunk : scratch.p.get(tiling_.block * chunk);
      if (!tiling_.resident) {
        const float* s = scores(rows, query, first, columns);
        for (int64_t row = 0; row < count; ++row)
          exponentials(s + row * chunk, valid_columns(start + row, first, columns), columns, max_[start + row],
                       p + row * chunk);
      }
      multiply(rows, depth, columns, p, chunk, values_ + packed_offset<E>(first, depth, width), width, sums, depth,
               first > 0);
    }
    for (int64_t row = start; row < start + count; ++row)
      write_output(row, exact_u_ + row * depth, 1.0f, sums + (row - start) * depth, normalizer_[row]);
  }

  int64_t valid_columns(int64_t row, int64_t first, int64_t columns) const {
    return std::min((problem_.is_causal ? row + 1 : tiling_.length) - first, columns);
  }

  // P of one chunk; what was summed under a smaller maximum is rescaled.
  void add_chunk(int64_t start, int64_t count, int64_t first, int64_t columns, const float* s, RunningSoftmax* softmax,
                 E* p, float* sums, int64_t width) {
    for (int64_t row = 0; row < count; ++row) {
      const float keep = softmax[row].add(s + row * tiling_.chunk, valid_columns(start + row, first, columns), columns,
                                          problem_.scale_log2(), p + row * tiling_.chunk);
      if (first > 0 && keep != 1.0f)
        for (int64_t i = 0; i < width; ++i) sums[row * width + i] *= keep;
    }
  }

  // P of one row of a chunk, as the first pass had it at its end. From the log-sum-exp it would lose accuracy: where
  // scores are large, so is the rounding of that, while the maximum is exact.
  void exponentials(const float* s, int64_t valid, int64_t columns, float max, E* p) const {
    const float factor = problem_.scale_log2();
    for (int64_t j = 0; j < valid; j += kLanes) store(p + j, exp2<E>(load(s + j) * factor - max));
    std::fill(p + valid, p + columns, E(0));
  }

  // Stores U of one block, packs it for the second product, and stores the log-sum-exp.
  void finish_u(int64_t start, int64_t count, const RunningSoftmax* softmax, const float* sums, int64_t width) {
    const int64_t depth = tiling_.depth;
    E* block = ForwardScratch<E>::of_this_thread().block_u.get(tiling_.block * depth);
    for (int64_t row = 0; row < count; ++row) {
      const float normalizer = 1.0f / softmax[row].sum;
      store_row(block + row * depth, sums + row * width, depth, normalizer);
      store_row(u_[start + row], sums + row * width, problem_.head_dim, normalizer);
      max_[start + row] = softmax[row].max;
      log_sum_exp_[start + row] = softmax[row].log_sum_exp();
    }
    std::fill(block + count * depth, block + tiling_.block * depth, E(0));
    pack_rows(block, depth, tiling_.block, depth, values_ + packed_offset<E>(start, depth, tiling_.width), tiling_.width);
  }

  void write_output(int64_t row, const float* u, float u_factor, const float* w, float w_factor) {
    T* output = output_[row];
    for (int64_t i = 0; i < problem_.head_dim; i += kLanes)
      store_first(output + i, load(u + i) * (2.0f * u_factor) - load(w + i) * w_factor, problem_.head_dim - i);
  }

  Problem problem_;
  Tiling tiling_;
  Rows<const T> query_, key_, value_;
  Rows<T> output_, u_;
  float* log_sum_exp_;  // (length,), natural logarithm
  E* keys_;             // K^T packed, chunk by chunk: (chunks, depth, chunk)
  E* values_;           // [V | U] packed: (padded_length, 2 depth)
  E* probabilities_ = nullptr;  // P if it stays: (padded_length, chunk)
  float* exact_u_;              // (padded_length, depth): rounding 2U would be most of the error of O
  float *max_, *normalizer_;     // of each row: the largest score, and 1 / (sum of P)
};

}  // namespace twicing
