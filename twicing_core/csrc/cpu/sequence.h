// What forward and backward share: one head of one document as a list of rows, block sizes, scratch memory.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "pack.h"

namespace twicing {

// One attention problem: a document (or a whole row of the batch) of one head.
struct Problem {
  int64_t length;
  int64_t head_dim;
  bool is_causal;
  float scale;

  float scale_log2() const { return scale * 1.44269504f; }  // exponentials are powers of two here
};

inline constexpr float kLn2 = 0.69314718f;

// Whether this thread has a problem to itself, and so may choose the order in which its blocks are done.
inline bool works_alone() { return at::in_parallel_region() || at::get_num_threads() == 1; }

// A is worked on in blocks of rows x chunks of columns, for one product each. Its scores are made strip by strip, since
// 32 x 256 of them stay in the L1 cache.
inline constexpr int64_t kStrip = kTileRows;
inline constexpr int64_t kChunk = 256;
inline constexpr int64_t kSharedBlock = 64;  // when threads share a problem: enough blocks for all of them
// AMX takes a third of a microsecond to set up for a product of another shape, and as long to wake up after a pause.
// Larger blocks need it less often; of causal attention they waste more, along the diagonal.
// So in float they pay only where dQ, over all of which each block of keys passes, is too large for the caches.
template <typename E>
inline int64_t block_alone(int64_t length) { return kPair<E> == 2 || length >= 4096 ? 128 : 64; }
// Up to this length full attention is one block, so that A is made once: 512 KiB in BFloat16, part of a core's L2 cache.
inline constexpr int64_t kWhole = 512;

// The sizes that follow from a problem. `alone`: a thread has it to itself, with blocks of `block_alone` rows.
struct Tiling {
  Tiling(const Problem& problem, bool alone, int64_t block_alone)
      : length(problem.length),
        one_pass(alone && (problem.is_causal || length <= kWhole)),
        block(std::min(!alone                              ? kSharedBlock
                       : one_pass && !problem.is_causal    ? kWhole
                                                           : block_alone,
                       round_up(length, 32))),
        padded_length(round_up(length, block)),
        depth(round_up(problem.head_dim, 16)),
        width(2 * depth),
        chunk(block > kChunk ? kWhole : kChunk),
        blocks(padded_length / block),
        chunks((length + chunk - 1) / chunk) {}

  int64_t block_rows(int64_t start) const { return std::min(block, length - start); }
  int64_t chunk_of(int64_t position) const { return position / chunk * chunk; }

  int64_t length;
  bool one_pass;
  int64_t block, padded_length;
  int64_t depth, width;  // of one matrix, of two side by side such as [V | U]
  int64_t chunk, blocks, chunks;
};

// The rows [start, start + padded_count) of a problem, of which the last may not exist.
template <typename T>
Padded<T> rows_of(const Rows<const T>& x, const Problem& problem, int64_t start, int64_t padded_count) {
  return {{x[start], x.stride},
          std::min(padded_count, problem.length - start),
          padded_count,
          problem.head_dim,
          round_up(problem.head_dim, 16)};
}

// Memory of one thread that is kept between calls, since fresh pages cost more than a short attention does.
template <typename X>
class Scratch {
 public:
  X* get(int64_t count) {
    if (count > size_) {
      memory_.reset();  // before asking for more
      memory_.reset(static_cast<X*>(::operator new(count * sizeof(X), std::align_val_t(64))));
      size_ = count;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(X* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };
  std::unique_ptr<X, Free> memory_;
  int64_t size_ = 0;
};

// Runs f(i) for i in [0, count): on all threads, or one after the other when already called on one of several.
template <typename E, typename F>
void for_each(int64_t count, const F& f) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
    release_tiles<E>();
  });
}

// `from` is padded; `to` may end after `count`.
template <typename T>
inline void store_row(T* to, const float* from, int64_t count, float factor) {
  for_vectors(count, [&](int64_t i, int64_t some) { store_first(to + i, load(from + i) * factor, some); });
}

}  // namespace twicing
