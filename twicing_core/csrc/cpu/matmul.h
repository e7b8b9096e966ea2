// Matrix products in cache: ATen's brgemm (oneDNN: AMX, AVX-512, AVX2), and the layouts it wants.
//
// E is the element the products are computed in: BFloat16, or float. The left operand is row-major, the result
// row-major float. The right operand is *packed*: of BFloat16, rows (the summed index k) are interleaved in pairs,
// [k / 2][n][2], which is what the tile instructions read; of float, it is plain row-major.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>

#include "simd.h"

namespace twicing {

template <typename E>
inline constexpr int64_t kPair = std::is_same_v<E, float> ? 1 : 2;

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Where element (k, n) of a packed operand begins; k even.
template <typename E>
inline int64_t packed_offset(int64_t k, int64_t n, int64_t stride) {
  return k * stride + n * kPair<E>;
}

// c[m][n] = (accumulate ? c[m][n] : 0) + sum over k of a[m][k] * b[k][n], b packed.
template <typename E>
inline void multiply(int64_t m, int64_t n, int64_t k, const E* a, int64_t a_stride, const E* b, int64_t b_stride,
                     float* c, int64_t c_stride, bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, a_stride, b_stride, c_stride, accumulate, a, b, c, kPair<E> == 2);
}

// A thread must give the tile registers back before other code may configure them.
template <typename E>
inline void release_tiles() {
  at::native::cpublas::brgemm_release(kPair<E> == 2);
}

// Packs row-major x[k][n] (k even, n a multiple of 16) as a right operand.
inline void pack_rows(const float* x, int64_t x_stride, int64_t k, int64_t n, float* to, int64_t to_stride) {
  for (int64_t row = 0; row < k; ++row) std::memcpy(to + row * to_stride, x + row * x_stride, n * sizeof(float));
}

inline void pack_rows(const c10::BFloat16* x, int64_t x_stride, int64_t k, int64_t n, c10::BFloat16* to,
                      int64_t to_stride) {
  for (int64_t row = 0; row < k; row += 2) {
    const auto* even = reinterpret_cast<const uint16_t*>(x + row * x_stride);
    const auto* odd = reinterpret_cast<const uint16_t*>(x + (row + 1) * x_stride);
    auto* pairs = reinterpret_cast<uint16_t*>(to + row * to_stride);
    for (int64_t column = 0; column < n; ++column) {
      pairs[2 * column] = even[column];
      pairs[2 * column + 1] = odd[column];
    }
  }
}

// Transposes a square of kLanes x kLanes words by swapping ever smaller blocks.
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
    x[row] = __builtin_shuffle(a, b, low);
    x[row + kWidth] = __builtin_shuffle(a, b, high);
  }
}

// Stores the first `words` rows of the transpose only.
inline void transpose_words(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t words) {
  Ints x[kLanes];
  for (int row = 0; row < kLanes; ++row) x[row] = load_as<Ints>((const int32_t*)from + row * from_stride);
  if constexpr (kLanes == 16) swap_blocks<kLanes / 2>(x);
  swap_blocks<4>(x);
  swap_blocks<2>(x);
  swap_blocks<1>(x);
  for (int64_t row = 0; row < words; ++row) std::memcpy((int32_t*)to + row * to_stride, &x[row], sizeof(Ints));
}

// Packs the transpose of row-major x[n][k] (n and k multiples of 16) as a right operand.
// A word holds one float or a pair of consecutive k, so both are a transpose of words. Reads up to 32 bytes after x.
template <typename E>
inline void pack_transposed(const E* x, int64_t x_stride, int64_t n, int64_t k, E* to, int64_t to_stride) {
  const int64_t words = k / kPair<E>;
  for (int64_t row = 0; row < n; row += kLanes)
    for (int64_t word = 0; word < words; word += kLanes)
      transpose_words(x + row * x_stride + word * kPair<E>, x_stride / kPair<E>,
                      to + (word * to_stride + row) * kPair<E>, to_stride, std::min<int64_t>(kLanes, words - word));
}

// to[k][n] = x[n][k], row-major both; n and k multiples of 32 and 16, `scratch` as large as x.
// Interleaved pairs of rows are words that hold two neighbours of a row of the transpose.
template <typename E>
inline void transpose(const E* x, int64_t x_stride, int64_t n, int64_t k, E* to, int64_t to_stride, E* scratch) {
  if constexpr (kPair<E> == 2) {
    pack_rows(x, x_stride, n, k, scratch, k);
    for (int64_t word = 0; word < n / 2; word += kLanes)
      for (int64_t column = 0; column < k; column += kLanes)
        transpose_words(scratch + 2 * (word * k + column), k, to + column * to_stride + 2 * word, to_stride / 2, kLanes);
  } else {
    pack_transposed(x, x_stride, n, k, to, to_stride);
  }
}

}  // namespace twicing
