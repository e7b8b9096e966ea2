// One vector of floats, in the vector extensions of GCC and Clang, so that the same lines become AVX-512, AVX2 or NEON.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
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
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
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

inline Floats load(const c10::Half* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(load_as<__m256i>(from));
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(load_as<__m128i>(from));
#else
  Floats x;
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = static_cast<float>(from[lane]);
  return x;
#endif
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

inline void store(c10::Half* to, Floats x) {
#if defined(__AVX512F__)
  __m256i rounded = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(to, &rounded, sizeof(rounded));
#elif defined(__F16C__)
  __m128i rounded = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &rounded, sizeof(rounded));
#else
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = c10::Half(x[lane]);
#endif
}

// The first `count` elements only, of memory that may end there; the other lanes are zero, or are not stored.
template <typename X>
inline Floats load_first(const X* from, int64_t count) {
  if (count >= kLanes) return load(from);
  X some[kLanes] = {};
  std::memcpy(static_cast<void*>(some), from, count * sizeof(X));
  return load(some);
}

template <typename X>
inline void store_first(X* to, Floats x, int64_t count) {
  if (count >= kLanes) return store(to, x);
  X some[kLanes];
  store(some, x);
  std::memcpy(static_cast<void*>(to), some, count * sizeof(X));
}

inline void negate(float* x) { store(x, -load(x)); }

inline void negate(c10::BFloat16* x) {
  const Shorts bits = load_as<Shorts>(x) ^ 0x8000;
  std::memcpy(static_cast<void*>(x), &bits, sizeof(bits));
}

// Calls f(i, some) for each vector of `count` elements; `some` is kLanes, a constant once inlined, except of the last.
template <typename F>
inline __attribute__((always_inline)) void for_vectors(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, int64_t{kLanes});
  if (i < count) f(i, count - i);
}

template <typename X>
inline Shorts load_bfloat16(const X* from) {
  return round_to_bfloat16(load(from));
}

inline Shorts load_bfloat16(const c10::BFloat16* from) { return load_as<Shorts>(from); }

// Rows of two: to[2i] = even[i], to[2i + 1] = odd[i].
inline void store_pairs(c10::BFloat16* to, Shorts even, Shorts odd) {
  Words pairs = __builtin_convertvector(even, Words) | (__builtin_convertvector(odd, Words) << 16);
  std::memcpy(to, &pairs, sizeof(pairs));
}

// a > b ? a : b, which is what the instruction does, also with NaN; compilers do not see it in vectors.
inline Floats max(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Lane i of the result is lane index[i] of x; from kLanes on, of y. The indices must be constants.
inline Ints shuffle(Ints x, Ints y, Ints index) {
#if defined(__clang__)
  Ints result;  // its optimizer sees the shuffle
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = index[lane] < kLanes ? x[index[lane]] : y[index[lane] - kLanes];
  return result;
#else
  return __builtin_shuffle(x, y, index);
#endif
}

// Lane i of the result is lane i ^ kDistance of x.
template <int kDistance>
inline Floats swap_lanes(Floats x) {
  Ints other;
  for (int lane = 0; lane < kLanes; ++lane) other[lane] = lane ^ kDistance;
  return (Floats)shuffle((Ints)x, (Ints)x, other);
}

inline float horizontal_max(Floats x) {
  if constexpr (kLanes == 16) x = max(x, swap_lanes<kLanes / 2>(x));
  x = max(x, swap_lanes<4>(x));
  x = max(x, swap_lanes<2>(x));
  return max(x, swap_lanes<1>(x))[0];
}

inline float horizontal_sum(Floats x) {
  if constexpr (kLanes == 16) x += swap_lanes<kLanes / 2>(x);
  x += swap_lanes<4>(x);
  x += swap_lanes<2>(x);
  return (x + swap_lanes<1>(x))[0];
}

// x in the first `count` lanes, `other` in the rest.
inline Floats keep_first(Floats x, int64_t count, float other) {
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < (int32_t)count ? x : splat(other);
}

// 2^x for x <= 127; what would be denormal is 2^-126. NaN stays NaN. Larger x, as of hidden scores, give any value at all.
// Relative error of the polynomial: 7e-5 where BFloat16 keeps 8 bits of it, else 2e-9.
template <typename E>
inline Floats exp2(Floats x) {
  x = max(splat(-126.0f), x);  // in this order NaN passes
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
  return (Floats)((Words)p + ((Words)shifted << 23));  // unsigned, since it may wrap around
}

}  // namespace twicing
