// O = 2U - AU and U = AV of one problem, with A = softmax(scale * Q K^T).
//
// A block of query rows meets the keys chunk by chunk under a running maximum. Which products are needed per chunk:
//   causal or short, one thread:  S, P [V | U]      blocks in order: a block needs U of itself and of earlier blocks only
//   otherwise:                    S, P V;  S, P U   the second pass makes P again, from the maximum
#pragma once

#include "sequence.h"

namespace twicing {

// The running softmax of one row of scores.
struct RunningSoftmax {
  float max = -INFINITY;
  float sum = 0.0f;

  // Takes in the first `valid` scores times `factor`. Returns what all that was made under the maximum before, the sum
  // apart, must be multiplied by.
  float raise_max(const float* s, int64_t valid, float factor) {
    const int64_t whole = valid / kLanes * kLanes;
    Floats largest = splat(-INFINITY);
    for (int64_t j = 0; j < whole; j += kLanes) largest = twicing::max(load(s + j) * factor, largest);
    if (whole < valid) largest = twicing::max(keep_first(load(s + whole) * factor, valid - whole, -INFINITY), largest);
    const float new_max = std::max(horizontal_max(largest), max);
    const float keep = max == new_max ? 1.0f : max == -INFINITY ? 0.0f : std::exp2(max - new_max);
    max = new_max;
    sum *= keep;
    return keep;
  }

  // p = 2^(factor * s - max) of the first `valid` scores, zeros up to `padded`.
  template <typename E>
  void add(const float* s, int64_t valid, int64_t padded, float factor, E* p) {
    const int64_t whole = valid / kLanes * kLanes;
    Floats total = splat(0.0f);
    for (int64_t j = 0; j < whole; j += kLanes) {
      const Floats x = exp2<E>(load(s + j) * factor - max);
      total += x;
      store(p + j, x);
    }
    if (whole < valid) {
      const Floats x = keep_first(exp2<E>(load(s + whole) * factor - max), valid - whole, 0.0f);
      total += x;
      store(p + whole, x);
    }
    for (int64_t j = round_up(valid, kLanes); j < padded; j += kLanes) store(p + j, splat(0.0f));
    sum += horizontal_sum(total);
  }

  float normalizer() const { return 1.0f / sum; }
  float log_sum_exp() const { return (max + std::log2(sum)) * kLn2; }
};

template <typename E>
struct ForwardScratch {
  // Of a whole problem.
  Scratch<E> keys, values;
  Scratch<RunningSoftmax> softmax;
  Scratch<float> u;
  // Of one block.
  Scratch<E> query, p;
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
      : problem_(problem), tiling_(problem, works_alone(), block_alone<E>(problem.length)), query_(query), key_(key),
        value_(value), output_(output), u_(u), log_sum_exp_(log_sum_exp) {
    auto& scratch = ForwardScratch<E>::of_this_thread();
    keys_ = scratch.keys.get(tiling_.chunks * tiling_.chunk * tiling_.depth);
    values_ = scratch.values.get(tiling_.padded_length * tiling_.width);
    softmax_ = scratch.softmax.get(tiling_.padded_length);
  }

  void run() {
    for_each<E>(tiling_.blocks, [&](int64_t i) { start_block(i * tiling_.block); });
    if (tiling_.one_pass) {
      for (int64_t i = 0; i < tiling_.blocks; ++i) sweep(i * tiling_.block);
      return;
    }
    exact_u_ = ForwardScratch<E>::of_this_thread().u.get(tiling_.padded_length * tiling_.depth);
    for_each<E>(tiling_.blocks, [&](int64_t i) { smooth(i * tiling_.block); });
    for_each<E>(tiling_.blocks, [&](int64_t i) { smooth_again(i * tiling_.block); });
  }

 private:
  int64_t end_of_keys(int64_t start) const {
    return problem_.is_causal ? std::min(start + tiling_.block, tiling_.length) : tiling_.length;
  }

  int64_t valid_columns(int64_t row, int64_t first, int64_t columns) const {
    return std::min((problem_.is_causal ? row + 1 : tiling_.length) - first, columns);
  }

  // Packs keys and values.
  void start_block(int64_t start) {
    const int64_t first = tiling_.chunk_of(start);
    pack_transposed(rows_of(key_, problem_, start, tiling_.block),
                    keys_ + first * tiling_.depth + packed_offset<E>(0, start - first, tiling_.chunk), tiling_.chunk);
    pack_rows(rows_of(value_, problem_, start, tiling_.block), values_at(start), tiling_.width);
    std::fill_n(softmax_ + start, tiling_.block, RunningSoftmax{});
  }

  // V and U of the positions from `start` on, as a right operand of `width` columns.
  E* values_at(int64_t start) const { return values_ + packed_offset<E>(start, 0, tiling_.width); }
  E* u_at(int64_t start) const { return values_ + packed_offset<E>(start, tiling_.depth, tiling_.width); }

  // Calls f(row, rows, s) for strips of the queries [start, start + count), with their scores against a chunk of keys.
  template <typename F>
  void for_scores(int64_t start, int64_t count, int64_t first, int64_t columns, const F& f) {
    auto& scratch = ForwardScratch<E>::of_this_thread();
    const int64_t depth = tiling_.depth, chunk = tiling_.chunk;
    float* scores = scratch.scores.get(kStrip * chunk);
    E* copy = scratch.query.get(kStrip * depth);
    for (int64_t strip = start; strip < start + count; strip += kStrip) {
      const int64_t rows = std::min(kStrip, start + count - strip), padded = round_up(rows, kStep<E>);
      const Left<E> query = left_operand(rows_of(query_, problem_, strip, padded), copy);
      multiply(padded, columns, depth, query.data, query.stride, keys_ + first * depth, chunk, scores, chunk, false);
      f(strip, rows, scores);
    }
  }

  // P of a block and one chunk. What was summed under a smaller maximum is rescaled.
  void add_chunk(int64_t start, int64_t count, int64_t first, int64_t columns, E* p, float* sums, int64_t width) {
    const float factor = problem_.scale_log2();
    const int64_t chunk = tiling_.chunk;
    for_scores(start, count, first, columns, [&](int64_t strip, int64_t rows, const float* s) {
      // Two loops, since the maximum of one row need not be waited for while the others' are at work.
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t valid = valid_columns(strip + row, first, columns);
        const float keep = softmax_[strip + row].raise_max(s + row * chunk, valid, factor);
        if (first > 0 && keep != 1.0f)
          for (int64_t i = 0; i < width; ++i) sums[(strip - start + row) * width + i] *= keep;
      }
      for (int64_t row = 0; row < rows; ++row)
        softmax_[strip + row].add(s + row * chunk, valid_columns(strip + row, first, columns), columns, factor,
                                  p + (strip - start + row) * chunk);
    });
  }

  // Causal or short: U and O of one block, when U of all blocks before it is known.
  void sweep(int64_t start) {
    auto& scratch = ForwardScratch<E>::of_this_thread();
    const int64_t depth = tiling_.depth, width = tiling_.width, chunk = tiling_.chunk;
    const int64_t count = tiling_.block_rows(start), rows = round_up(count, kStep<E>), end = end_of_keys(start);
    E* p = scratch.p.get(tiling_.block * chunk);
    float* sums = scratch.sums.get(tiling_.block * width);  // [P V | P U]

    for (int64_t first = 0; first < end; first += chunk) {
      const int64_t columns = round_up(std::min(chunk, end - first), kStep<E>);
      const int64_t before = std::min(chunk, start - first);  // columns whose U is known
      add_chunk(start, count, first, columns, p, sums, width);
      if (before > 0)
        multiply(rows, width, before, p, chunk, values_at(first), width, sums, width, first > 0);
      if (before < columns) {
        const int64_t own = columns - before;
        multiply(rows, depth, own, p + before, chunk, values_at(start), width, sums, width, start > 0);
        finish_u(start, count, sums, width);
        multiply(rows, depth, own, p + before, chunk, u_at(start), width, sums + depth, width, start > 0);
      }
    }
    for (int64_t row = 0; row < count; ++row) write_output(start + row, sums + row * width, sums + row * width + depth);
  }

  // The first of two passes: U and the log-sum-exp of one block.
  void smooth(int64_t start) {
    const int64_t depth = tiling_.depth, chunk = tiling_.chunk;
    const int64_t count = tiling_.block_rows(start), rows = round_up(count, kStep<E>), end = end_of_keys(start);
    E* p = ForwardScratch<E>::of_this_thread().p.get(tiling_.block * chunk);
    float* sums = exact_u_ + start * depth;

    for (int64_t first = 0; first < end; first += chunk) {
      const int64_t columns = round_up(std::min(chunk, end - first), kStep<E>);
      add_chunk(start, count, first, columns, p, sums, depth);
      multiply(rows, depth, columns, p, chunk, values_at(first), tiling_.width, sums, depth, first > 0);
    }
    finish_u(start, count, sums, depth);
  }

  // The second: A U, hence O, of one block.
  void smooth_again(int64_t start) {
    auto& scratch = ForwardScratch<E>::of_this_thread();
    const int64_t depth = tiling_.depth, chunk = tiling_.chunk;
    const int64_t count = tiling_.block_rows(start), rows = round_up(count, kStep<E>), end = end_of_keys(start);
    E* p = scratch.p.get(tiling_.block * chunk);
    float* sums = scratch.sums.get(tiling_.block * depth);

    for (int64_t first = 0; first < end; first += chunk) {
      const int64_t columns = round_up(std::min(chunk, end - first), kStep<E>);
      for_scores(start, count, first, columns, [&](int64_t strip, int64_t rows, const float* s) {
        for (int64_t row = 0; row < rows; ++row)
          exponentials(s + row * chunk, valid_columns(strip + row, first, columns), columns, softmax_[strip + row].max,
                       p + (strip - start + row) * chunk);
      });
      multiply(rows, depth, columns, p, chunk, u_at(first), tiling_.width, sums, depth, first > 0);
    }
    for (int64_t row = 0; row < count; ++row)
      write_output(start + row, exact_u_ + (start + row) * depth, sums + row * depth);
  }

  // P of one row of a chunk, as the first pass had it at its end. From the log-sum-exp it would lose accuracy: where
  // scores are large, so is the rounding of that, while the maximum is exact.
  void exponentials(const float* s, int64_t valid, int64_t columns, float max, E* p) const {
    const float factor = problem_.scale_log2();
    for (int64_t j = 0; j < valid; j += kLanes) store(p + j, exp2<E>(load(s + j) * factor - max));
    std::fill(p + valid, p + columns, E(0));
  }

  // Normalizes U of one block where it was summed, stores it and the log-sum-exp, and packs it for the second product.
  void finish_u(int64_t start, int64_t count, float* sums, int64_t stride) {
    const int64_t depth = tiling_.depth;
    for (int64_t row = 0; row < count; ++row) {
      const RunningSoftmax& softmax = softmax_[start + row];
      store_row(sums + row * stride, sums + row * stride, depth, softmax.normalizer());
      store_row(u_[start + row], sums + row * stride, problem_.head_dim, 1.0f);
      log_sum_exp_[start + row] = softmax.log_sum_exp();
    }
    if constexpr (std::is_same_v<T, E>)
      pack_rows(rows_of(Rows<const T>{u_.data, u_.stride}, problem_, start, tiling_.block), u_at(start), tiling_.width);
    else
      pack_rows(Padded<float>{{sums, stride}, count, tiling_.block, depth, depth}, u_at(start), tiling_.width);
  }

  // O = 2U - AU from U, exactly since rounding it would be most of the error of O, and from P U.
  void write_output(int64_t row, const float* u, const float* pu) {
    T* output = output_[row];
    const float normalizer = softmax_[row].normalizer();
    for_vectors(problem_.head_dim, [&](int64_t i, int64_t some) {
      store_first(output + i, load(u + i) * 2.0f - load(pu + i) * normalizer, some);
    });
  }

  Problem problem_;
  Tiling tiling_;
  Rows<const T> query_, key_, value_;
  Rows<T> output_, u_;
  float* log_sum_exp_;  // (length,), natural logarithm
  E* keys_;             // K^T packed, chunk by chunk: (chunks, depth, chunk)
  E* values_;           // [V | U] packed: (padded_length, 2 depth)
  RunningSoftmax* softmax_;    // (padded_length,)
  float* exact_u_ = nullptr;   // of two passes: (padded_length, depth)
};

}  // namespace twicing
