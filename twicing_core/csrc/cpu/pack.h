// From rows of tensors to the operands of products: padded with zeros, interleaved, transposed.
#pragma once

#include "matmul.h"

namespace twicing {

// Rows of head_dim elements with unit stride inside a row: a slice of a (batch, heads, seq, head_dim) tensor.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;

  T* operator[](int64_t row) const { return data + row * stride; }
};

inline constexpr int64_t kMaxDepth = 256;

// `count` rows of `dim` elements that become `padded_count` rows of `depth`, the rest zeros; depth a multiple of 16.
template <typename T>
struct Padded {
  Rows<const T> rows;
  int64_t count, padded_count, dim, depth;

  Floats load(int64_t row, int64_t i) const {
    return row < count && i < dim ? load_first(rows[row] + i, dim - i) : splat(0.0f);
  }

  // Whether the rows [start, end) need no padding.
  bool are_whole(int64_t start, int64_t end) const { return end <= count && start < end && dim == depth; }
};

// A left operand: row-major.
template <typename E>
struct Left {
  const E* data;
  int64_t stride;
};

template <typename T, typename E>
inline void copy_rows(const Padded<T>& x, E* to, int64_t to_stride) {
  for (int64_t row = 0; row < x.padded_count; ++row) {
    E* out = to + row * to_stride;
    if (std::is_same_v<T, E> && x.are_whole(row, row + 1))
      std::memcpy(static_cast<void*>(out), x.rows[row], x.depth * sizeof(E));
    else
      for (int64_t i = 0; i < x.depth; i += kLanes) store(out + i, x.load(row, i));
  }
}

// The rows where they are, if nothing has to be converted or padded; else a copy.
template <typename T, typename E>
inline Left<E> left_operand(const Padded<T>& x, E* copy) {
  if constexpr (std::is_same_v<T, E>)
    if (x.are_whole(0, x.padded_count)) return {x.rows.data, x.rows.stride};
  copy_rows(x, copy, x.depth);
  return {copy, x.depth};
}

// Packs x as a right operand, (padded_count, depth).
template <typename T, typename E>
inline void pack_rows(const Padded<T>& x, E* to, int64_t to_stride) {
  if constexpr (kPair<E> == 1) {
    copy_rows(x, to, to_stride);
  } else {
    for (int64_t row = 0; row < x.padded_count; row += 2) {
      const T *even = x.rows[row], *odd = x.rows[row + 1];
      E* out = to + row * to_stride;
      if (x.are_whole(row, row + 2))
        for (int64_t i = 0; i < x.depth; i += kLanes)
          store_pairs(out + 2 * i, load_bfloat16(even + i), load_bfloat16(odd + i));
      else
        for (int64_t i = 0; i < x.depth; i += kLanes)
          store_pairs(out + 2 * i, round_to_bfloat16(x.load(row, i)), round_to_bfloat16(x.load(row + 1, i)));
    }
  }
}

// One step of transposing a square of kLanes x kLanes words, which swaps ever smaller blocks.
template <int kWidth>
inline void swap_blocks(Ints (&x)[kLanes]) {
  Ints low, high;  // lanes picked from a pair of rows, those of the second counted from kLanes
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = lane & kWidth ? kLanes + lane - kWidth : lane;
    high[lane] = lane & kWidth ? kLanes + lane : lane + kWidth;
  }
  for (int row = 0; row < kLanes; ++row) {
    if (row & kWidth) continue;
    Ints a = x[row], b = x[row + kWidth];
    x[row] = shuffle(a, b, low);
    x[row + kWidth] = shuffle(a, b, high);
  }
}

// Transposes a square of words. `from_stride` counts elements, `to_stride` words; only the first `words` rows are stored.
template <typename E>
inline void transpose_words(const E* from, int64_t from_stride, E* to, int64_t to_stride, int64_t words) {
  Ints x[kLanes];
  for (int row = 0; row < kLanes; ++row) x[row] = load_as<Ints>(from + row * from_stride);
  if constexpr (kLanes == 16) swap_blocks<kLanes / 2>(x);
  swap_blocks<4>(x);
  swap_blocks<2>(x);
  swap_blocks<1>(x);
  for (int64_t row = 0; row < words; ++row) std::memcpy(to + row * to_stride * kPair<E>, &x[row], sizeof(Ints));
}

// Packs the transpose of x as a right operand, (depth, padded_count); padded_count a multiple of 16.
// A word holds one float or a pair of consecutive elements, so both are a transpose of words.
template <typename T, typename E>
inline void pack_transposed(const Padded<T>& x, E* to, int64_t to_stride) {
  constexpr int64_t kLine = kLanes * kPair<E>;  // elements of one row of a square of words
  alignas(64) E copy[kLanes * (kMaxDepth + kLine)];
  const int64_t copy_stride = round_up(x.depth, kLine);
  for (int64_t row = 0; row < x.padded_count; row += kLanes) {
    const int64_t count = std::clamp<int64_t>(x.count - row, 0, kLanes);
    const Padded<T> some{{x.rows[row], x.rows.stride}, count, kLanes, x.dim, x.depth};
    Left<E> from{copy, copy_stride};
    if (x.depth % kLine == 0)
      from = left_operand(some, copy);
    else
      copy_rows(some, copy, copy_stride);  // a square may read past the depth
    for (int64_t i = 0; i < x.depth; i += kLine)
      transpose_words(from.data + i, from.stride, to + i * to_stride + row * kPair<E>, to_stride,
                      std::min<int64_t>(kLanes, (x.depth - i) / kPair<E>));
  }
}

// The transpose of x as a left operand, (depth, padded_count), the latter a multiple of 32. `scratch` as large as that.
// Interleaved pairs of rows are words that hold two neighbours of a row of the transpose.
template <typename T, typename E>
inline void transpose(const Padded<T>& x, E* to, int64_t to_stride, E* scratch) {
  if constexpr (kPair<E> == 2) {
    pack_rows(x, scratch, x.depth);
    for (int64_t word = 0; word < x.padded_count / 2; word += kLanes)
      for (int64_t i = 0; i < x.depth; i += kLanes)
        transpose_words(scratch + 2 * (word * x.depth + i), 2 * x.depth, to + i * to_stride + 2 * word, to_stride / 2,
                        kLanes);
  } else {
    pack_transposed(x, to, to_stride);
  }
}

}  // namespace twicing
