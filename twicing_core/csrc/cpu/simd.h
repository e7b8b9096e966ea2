// One vector of floats, in the vector extensions of GCC and Clang, so that the same lines become AVX-512, AVX2 or NEON.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace twicing {

// kLanes divides 16, and all buffers are padded to multiples of 16: only the valid part of a row needs care.
#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#else
inline constexpr int kLanes = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));

inline Floats splat(float x) { return Floats{} + x; }

template <typename Vector>
inline Vector load_as(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

inline Floats load(const float* from) { return load_as<Floats>(from); }

inline Floats load(const c10::BFloat16* from) {
  return (Floats)(__builtin_convertvector(load_as<Shorts>(from), Ints) << 16);
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof(x)); }

// The upper halves of floats, rounded to the nearest even bfloat16.
inline Shorts round_to_bfloat16(Floats x) {
#if defined(__AVX512BF16__)
  return (Shorts)_mm512_cvtneps_pbh((__m512)x);
#else
  Ints bits = (Ints)x;
  Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : rounded * 0 + 0x7fc0, Shorts);
#endif
}

inline void store(c10::BFloat16* to, Floats x) {
  Shorts rounded = round_to_bfloat16(x);
  std::memcpy(to, &rounded, sizeof(rounded));
}

// Rows of two: to[2i] = even[i], to[2i + 1] = odd[i].
inline void store_pairs(c10::BFloat16* to, Floats even, Floats odd) {
  typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
  Words pairs = __builtin_convertvector(round_to_bfloat16(even), Words) |
                (__builtin_convertvector(round_to_bfloat16(odd), Words) << 16);
  std::memcpy(to, &pairs, sizeof(pairs));
}

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

inline float horizontal_max(Floats x) {
  float result = x[0];
  for (int lane = 1; lane < kLanes; ++lane) result = x[lane] > result ? x[lane] : result;
  return result;
}

inline float horizontal_sum(Floats x) {
  float half[kLanes];
  store(half, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) half[lane] += half[lane + width];
  return half[0];
}

// x in the first `count` lanes, `other` in the rest.
inline Floats keep_first(Floats x, int64_t count, float other) {
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < (int32_t)count ? x : splat(other);
}

// 2^x for x <= 127; what would be denormal is 2^-126. NaN stays NaN.
// Relative error of the polynomial: 7e-5 where BFloat16 keeps 8 bits of it, else 2e-9.
template <typename E>
inline Floats exp2(Floats x) {
  x = x < -126.0f ? splat(-126.0f) : x;
  Floats shifted = x + 12582912.0f;  // 1.5 * 2^23: the nearest integer is now in the low bits
  Floats f = x - (shifted - 12582912.0f);
  Floats p;
  if constexpr (std::is_same_v<E, c10::BFloat16>) {
    p = f * 0.05517162f + 0.24261112f;
    p = p * f + 0.69326099f;
    p = p * f + 0.99992807f;
  } else {
    p = f * 1.53533603e-4f + 1.33988749e-3f;
    p = p * f + 9.61843737e-3f;
    p = p * f + 5.55033247e-2f;
    p = p * f + 2.40226479e-1f;
    p = p * f + 6.93147203e-1f;
    p = p * f + 1.0f;
  }
  return (Floats)((Ints)p + ((Ints)shifted << 23));
}

}  // namespace twicing
