// Matrix products in cache: ATen's brgemm (oneDNN: AMX, AVX-512, AVX2; elsewhere a plain GEMM).
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

// Sizes that come from a length are padded to a multiple of this. AMX works on two tiles of 16 at a time: with an odd
// number of them oneDNN's kernels take up to a third longer. Vector instructions have nothing to gain from padding.
template <typename E>
inline constexpr int64_t kStep = kPair<E> == 2 ? 32 : 8;

// AMX does 32 rows at a time. Asked for more at once, oneDNN's kernels lose up to half of their speed.
inline constexpr int64_t kTileRows = 32;

// Where element (k, n) of a packed operand begins; k even.
template <typename E>
inline int64_t packed_offset(int64_t k, int64_t n, int64_t stride) {
  return k * stride + n * kPair<E>;
}

// c[m][n] = (accumulate ? c[m][n] : 0) + sum over k of a[m][k] * b[k][n], b packed.
template <typename E>
inline void multiply(int64_t m, int64_t n, int64_t k, const E* a, int64_t a_stride, const E* b, int64_t b_stride,
                     float* c, int64_t c_stride, bool accumulate) {
  const int64_t rows = kPair<E> == 2 ? std::min(kTileRows, m) : m;
  for (int64_t row = 0; row < m; row += rows)
    at::native::cpublas::brgemm(std::min(rows, m - row), n, k, a_stride, b_stride, c_stride, accumulate,
                                a + row * a_stride, b, c + row * c_stride, kPair<E> == 2);
}

// A thread must give the tile registers back before other code may configure them.
template <typename E>
inline void release_tiles() {
  at::native::cpublas::brgemm_release(kPair<E> == 2);
}

}  // namespace twicing
