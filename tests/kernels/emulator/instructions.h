// The functions of ptx.cuh for the CPU: what the PTX ISA says of each instruction, carried out and checked by simt.h.
#pragma once
#include <immintrin.h>

#include <bit>
#include <cmath>
#include <cstring>

#include "elsewhere.h"
#include "simt.h"

#define DEVICE inline __attribute__((always_inline))
#define __global__
#define __launch_bounds__(...)

namespace ptx {

struct Bf16 {};
struct Fp16 {};

using Address = uint32_t;
using Stream = void*;

struct Words4 {
  uint32_t word[4];
};

inline int recompute(int x) { return x; }

inline int thread_index() { return simt::block().thread; }
inline int block_index() { return simt::block().index; }
inline Address shared_memory() { return 0; }

inline void sync_block(SIMT_HERE) { simt::sync_block(where); }
inline void sync_warp(SIMT_HERE) {
  int nothing = 0;
  simt::collective("bar.warp.sync", where, nothing, [](int* const*, int) {
    simt::warp().epoch++;
    simt::share_in_warp();
  });
}

// ---- elements ----

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline uint16_t round_to(Bf16, float value) {
  const uint32_t bits = to_bits(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}
inline uint16_t round_to(Fp16, float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
inline float widen(Bf16, uint16_t bits) { return from_bits(uint32_t(bits) << 16); }
inline float widen(Fp16, uint16_t bits) { return _cvtsh_ss(bits); }

template <class T>
uint32_t pack(T type, float low, float high) {
  return round_to(type, low) | uint32_t(round_to(type, high)) << 16;
}
template <class T>
float low(T type, uint32_t word) {
  return widen(type, word & 0xffff);
}
template <class T>
float high(T type, uint32_t word) {
  return widen(type, word >> 16);
}

inline float exp2(float x) {
  simt::counters().exp2_lanes++;
  return std::exp2(x);
}
inline float log2(float x) { return std::log2(x); }
inline float reciprocal(float x) { return 1.f / x; }

// ---- instructions of a warp ----

template <class T>
void mma_m16n8k16(T type, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_HERE) {
  struct Arguments {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } arguments{d, a, {b0, b1}};
  simt::collective("mma", where, arguments, [type](Arguments* const* lanes, int) {
    simt::counters().mma++;
    float A[16][16], B[16][8], D[16][8];
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; i++) {
        const int row = g + (i % 2) * 8, column = t * 2 + (i / 2) * 8;
        A[row][column] = low(type, lanes[lane]->a[i]);
        A[row][column + 1] = high(type, lanes[lane]->a[i]);
        D[g + (i / 2) * 8][t * 2 + i % 2] = lanes[lane]->d[i];
      }
      for (int i = 0; i < 2; i++) {
        B[t * 2 + i * 8][g] = low(type, lanes[lane]->b[i]);
        B[t * 2 + i * 8 + 1][g] = high(type, lanes[lane]->b[i]);
      }
    }
    for (int row = 0; row < 16; row++) {
      if (simt::machine.options.truncate) {
        for (int column = 0; column < 8; column++) {
          double sum = D[row][column];
          for (int k = 0; k < 16; k++) sum += double(A[row][k]) * B[k][column];
          float rounded = static_cast<float>(sum);
          if (std::fabs(rounded) > std::fabs(sum)) rounded = std::nextafter(rounded, 0.f);
          D[row][column] = rounded;
        }
      } else {
        float sum[8] = {};
        for (int k = 0; k < 16; k++)
          for (int column = 0; column < 8; column++) sum[column] += A[row][k] * B[k][column];
        for (int column = 0; column < 8; column++) D[row][column] += sum[column];
      }
    }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) lanes[lane]->d[i] = D[lane / 4 + (i / 2) * 8][lane % 4 * 2 + i % 2];
  });
}

inline void ldmatrix(uint32_t (&r)[4], Address row, bool transposed, simt::Where where) {
  struct Arguments {
    uint32_t* r;
    Address row;
  } arguments{r, row};
  simt::collective(transposed ? "ldmatrix.trans" : "ldmatrix", where, arguments,
                   [transposed, where](Arguments* const* lanes, int first) {
    uint32_t rows[32];
    bool inside = true;
    for (int lane = 0; lane < 32; lane++) {
      rows[lane] = lanes[lane]->row;
      simt::read_shared(rows[lane], 16, first + lane, where);
      inside &= rows[lane] + 16 <= simt::block().shared.size();
    }
    simt::counters().ldmatrix++;
    simt::counters().ldmatrix_passes += simt::passes(rows, 16);
    if (!inside) return;
    for (int matrix = 0; matrix < 4; matrix++)
      for (int lane = 0; lane < 32; lane++) {
        uint16_t pair[2];
        for (int i = 0; i < 2; i++) {
          const int r = transposed ? lane % 4 * 2 + i : lane / 4, c = transposed ? lane / 4 : lane % 4 * 2 + i;
          std::memcpy(&pair[i], &simt::block().shared[rows[matrix * 8 + r] + c * 2], 2);
        }
        lanes[lane]->r[matrix] = pair[0] | uint32_t(pair[1]) << 16;
      }
  });
}
inline void ldmatrix_x4(uint32_t (&r)[4], Address row, SIMT_HERE) { ldmatrix(r, row, false, where); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], Address row, SIMT_HERE) { ldmatrix(r, row, true, where); }

inline float shuffle_xor(float value, int mask, SIMT_HERE) {
  struct Arguments {
    float in, out;
    int mask;
  } arguments{value, 0, mask};
  simt::collective("shfl", where, arguments, [](Arguments* const* lanes, int) {
    for (int lane = 0; lane < 32; lane++) lanes[lane]->out = lanes[lane ^ lanes[lane]->mask]->in;
  });
  return arguments.out;
}

inline int trailing_ones(uint32_t bits) { return std::countr_one(bits); }
inline uint32_t ballot(bool predicate, SIMT_HERE) {
  struct Arguments {
    bool in;
    uint32_t out;
  } arguments{predicate, 0};
  simt::collective("vote.ballot", where, arguments, [](Arguments* const* lanes, int) {
    uint32_t set = 0;
    for (int lane = 0; lane < 32; lane++) set |= uint32_t(lanes[lane]->in) << lane;
    for (int lane = 0; lane < 32; lane++) lanes[lane]->out = set;
  });
  return arguments.out;
}

// ---- shared memory ----
// A warp's loads and stores are taken together, to count bank conflicts: so all its lanes must take part.

inline void cp_async(Address destination, const void* source, int bytes, bool valid, simt::Where where) {
  if (valid) valid = simt::access_global(source, bytes, simt::Kind::READ, where);
  simt::write_shared(destination, bytes, thread_index(), where, true);
  simt::Copy copy{destination, source, bytes, simt::thread().groups, valid, false, where};
  if (simt::machine.options.seed && simt::machine.random() % 2) simt::land(copy);
  simt::thread().copies.push_back(copy);
}
inline void cp_async_16(Address destination, const void* source, bool valid, SIMT_HERE) {
  cp_async(destination, source, 16, valid, where);
}
inline void cp_async_4(Address destination, const void* source, bool valid, SIMT_HERE) {
  cp_async(destination, source, 4, valid, where);
}
inline void cp_async_commit() { simt::thread().groups++; }
template <int PENDING>
void cp_async_wait() {
  std::vector<simt::Copy>& copies = simt::thread().copies;
  std::vector<simt::Copy> pending;
  for (simt::Copy& copy : copies) {
    if (copy.group >= simt::thread().groups - PENDING) {
      pending.push_back(copy);
    } else {
      simt::land(copy);
      simt::finish(copy, thread_index());
    }
  }
  copies.swap(pending);
}

inline void store_shared(Address address, uint32_t word, SIMT_HERE) {
  struct Arguments {
    Address address;
    uint32_t word;
  } arguments{address, word};
  simt::collective("st.shared", where, arguments, [where](Arguments* const* lanes, int first) {
    uint32_t addresses[32];
    for (int lane = 0; lane < 32; lane++) {
      addresses[lane] = lanes[lane]->address;
      simt::write_shared(addresses[lane], 4, first + lane, where);
      if (addresses[lane] + 4 <= simt::block().shared.size())
        std::memcpy(&simt::block().shared[addresses[lane]], &lanes[lane]->word, 4);
    }
    simt::counters().shared_stores++;
    simt::counters().shared_store_passes += simt::passes(addresses, 4);
  });
}

inline void store_shared(Address address, float value, SIMT_HERE) { store_shared(address, to_bits(value), where); }

template <int BYTES>
void load_shared_bytes(Address address, void* destination, simt::Where where) {
  struct Arguments {
    Address address;
    void* destination;
  } arguments{address, destination};
  simt::collective("ld.shared", where, arguments, [where](Arguments* const* lanes, int first) {
    uint32_t addresses[32];
    for (int lane = 0; lane < 32; lane++) {
      addresses[lane] = lanes[lane]->address;
      simt::read_shared(addresses[lane], BYTES, first + lane, where);
      if (addresses[lane] + BYTES <= simt::block().shared.size())
        std::memcpy(lanes[lane]->destination, &simt::block().shared[addresses[lane]], BYTES);
    }
    simt::counters().shared_loads++;
    simt::counters().shared_load_passes += simt::passes(addresses, BYTES);
  });
}
inline void load_shared(Address address, uint32_t (&pair)[2], SIMT_HERE) { load_shared_bytes<8>(address, pair, where); }
inline void load_shared(Address address, float (&pair)[2], SIMT_HERE) { load_shared_bytes<8>(address, pair, where); }
inline Words4 load_shared_16(Address address, SIMT_HERE) {
  Words4 words;
  load_shared_bytes<16>(address, &words, where);
  return words;
}

// ---- global memory ----

template <class Value>
Value read(const void* address, simt::Where where) {
  Value value{};
  if (simt::access_global(address, sizeof value, simt::Kind::READ, where)) simt::read_global(&value, address, sizeof value);
  return value;
}
template <class Value>
void write(void* address, Value value, simt::Where where) {
  if (simt::access_global(address, sizeof value, simt::Kind::WRITE, where)) simt::write_global(address, &value, sizeof value);
}
inline uint32_t load_global(const void* address, bool valid, SIMT_HERE) {
  return valid ? read<uint32_t>(address, where) : 0;
}
inline float load_global(const float* address, bool valid, SIMT_HERE) { return valid ? read<float>(address, where) : 0.f; }
inline int load_global(const int* address, SIMT_HERE) { return read<int>(address, where); }
inline Words4 load_global_16(const void* address, bool valid, SIMT_HERE) {
  return valid ? read<Words4>(address, where) : Words4{};
}
inline void store_global(float* address, float value, bool valid, SIMT_HERE) {
  if (valid) write(address, value, where);
}
inline void store_global(void* address, uint32_t word, bool valid, SIMT_HERE) {
  if (valid) write(address, word, where);
}
inline void store_global_16(void* address, Words4 words, bool valid, SIMT_HERE) {
  if (valid) write(address, words, where);
}
inline void reduce_add_global(float* address, float value, bool valid, SIMT_HERE) {
  if (valid && simt::access_global(address, 4, simt::Kind::ATOMIC_UPDATE, where)) *address += value;
}

inline int fetch_add(int* address, int value, SIMT_HERE) { return simt::fetch_add(address, value, where); }
inline int load_relaxed(const int* address, SIMT_HERE) { return simt::load_relaxed(address, where); }
inline void fence() { simt::fence(); }
inline void store_release(int* address, int value, SIMT_HERE) { simt::store_release(address, value, where); }

// ---- host side ----

using Status = int;
constexpr Status SUCCESS = 0;
inline const char* describe(Status) { return simt::machine.log.c_str(); }

template <class Kernel, class Parameters>
Status launch(Kernel kernel, int64_t blocks, int threads, int shared_bytes, Stream, const Parameters& p) {
  if (simt::elsewhere.launch) {
    const char* symbol = simt::symbol_of(reinterpret_cast<const void*>(kernel));
    simt::elsewhere.launch(symbol, blocks, threads, shared_bytes, &p, sizeof p);
  } else {
    simt::launch([&] { kernel(p); }, blocks, threads, shared_bytes);
  }
  return SUCCESS;
}
inline Status fill_zero(void* address, size_t bytes, Stream) {
  std::memset(address, 0, bytes);
  if (simt::elsewhere.fill_zero) simt::elsewhere.fill_zero(address, bytes);
  for (simt::Buffer& buffer : simt::machine.buffers)
    if (buffer.begin == address)
      for (simt::Word& word : buffer.words) word.written = true;
  return SUCCESS;
}

}  // namespace ptx
