// What forward and backward share: one head of one document as a list of rows, block sizes, scratch memory.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "matmul.h"

namespace twicing {

// Rows of head_dim elements with unit stride inside a row: a slice of a (batch, heads, seq, head_dim) tensor.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;

  T* operator[](int64_t row) const { return data + row * stride; }
};

// One attention problem: a document (or a whole row of the batch) of one head.
struct Problem {
  int64_t length;
  int64_t head_dim;
  bool is_causal;
  float scale;

  float scale_log2() const { return scale * 1.44269504f; }  // exponentials are powers of two here
};

inline constexpr float kLn2 = 0.69314718f;

// A of one head is kept whole up to this length, 512 KiB in BFloat16: it must fit the L2 cache of a core.
inline constexpr int64_t kResidentLength = 512;

// Scores are worked on in blocks of rows x chunks of columns. Larger blocks make better products, up to what stays in
// the caches; of causal attention they waste more, along the diagonal.
inline constexpr int64_t kMaxBlock = 64;
inline constexpr int64_t kChunk = 256;

// The sizes that follow from a problem, all padded to multiples of 16.
struct Tiling {
  explicit Tiling(const Problem& problem)
      : length(problem.length),
        block(std::min(kMaxBlock, round_up(problem.length, 32))),
        padded_length(round_up(problem.length, block)),
        depth(round_up(problem.head_dim, 16)),
        width(2 * depth),
        resident(problem.length <= kResidentLength),
        chunk(resident && problem.length > kChunk ? kResidentLength : kChunk),
        blocks(padded_length / block),
        chunks((length + chunk - 1) / chunk) {}

  int64_t block_rows(int64_t start) const { return std::min(block, length - start); }
  int64_t chunk_of(int64_t position) const { return position / chunk * chunk; }

  int64_t length, block, padded_length;
  int64_t depth, width;  // of one matrix, of two side by side such as [V | U]
  bool resident;
  int64_t chunk, blocks, chunks;
};

// Memory of one thread that is kept between calls, since fresh pages cost more than a short attention does.
template <typename X>
class Scratch {
 public:
  X* get(int64_t count) {
    if (count > size_) {
      memory_.reset();  // before asking for more
      memory_.reset(static_cast<X*>(::operator new(count * sizeof(X) + kSlack, std::align_val_t(64))));
      size_ = count;
    }
    return memory_.get();
  }

 private:
  static constexpr int64_t kSlack = 64;  // transposes read past the end of a row
  struct Free {
    void operator()(X* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };
  std::unique_ptr<X, Free> memory_;
  int64_t size_ = 0;
};

// Whether this thread has a problem to itself, and so may choose the order in which its blocks are done.
inline bool works_alone() { return at::in_parallel_region() || at::get_num_threads() == 1; }

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
  for (int64_t i = 0; i < count; i += kLanes) store_first(to + i, load(from + i) * factor, count - i);
}

// Copies rows [start, start + count) of x to a row-major block of `rows` rows of `depth` elements, padded with zeros.
template <typename T, typename E>
inline void copy_rows(const Rows<const T>& x, int64_t start, int64_t count, int64_t head_dim, E* to, int64_t to_stride,
                      int64_t rows, int64_t depth) {
  for (int64_t row = 0; row < rows; ++row) {
    E* out = to + row * to_stride;
    for (int64_t i = 0; i < depth; i += kLanes)
      store(out + i, row < count && i < head_dim ? load_first(x[start + row] + i, head_dim - i) : splat(0.0f));
  }
}

}  // namespace twicing
