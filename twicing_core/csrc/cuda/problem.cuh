// What a call is about, as the host hands it to a kernel, and who sees whom.
#pragma once
#include "ptx.cuh"

namespace twicing {

// (batch, heads, seq, head_dim) two-byte elements; head_dim has stride 1, and every row starts on a multiple of 16 bytes.
struct Tensor {
  uint16_t* data;
  int64_t batch_stride, head_stride, row_stride;  // in elements

  DEVICE uint16_t* rows(int batch, int head) const { return data + batch * batch_stride + head * head_stride; }
};

struct Problem {
  int batch, heads, key_heads, seq;  // heads of queries, U and O; heads of keys and values divide them
  int documents;                     // entries of cu_seqlens less one
  const int* cu_seqlens;             // where documents start in the flattened batch * seq positions; null: one a row
  float scale;                       // positive; softmax(scale * query . key)
  bool causal;

  DEVICE int key_head(int head) const { return head / (heads / key_heads); }
  DEVICE int64_t first_statistic(int batch, int head) const { return (int64_t(batch) * heads + head) * seq; }
};

struct Span {  // the positions begin <= i < end of a row
  int begin, end;
};

constexpr float LOG2_E = 1.4426950408889634f;  // the hardware's exponential and logarithm have base 2
constexpr float LN_2 = 0.6931471805599453f;

DEVICE Span document_of(const Problem& problem, int batch, int position) {
  if (problem.cu_seqlens == nullptr) return {0, problem.seq};
  const int row_start = batch * problem.seq, target = row_start + position;
  int low = 0, high = problem.documents;  // cu_seqlens[low] <= target < cu_seqlens[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (ptx::load_global(problem.cu_seqlens + middle) <= target ? low : high) = middle;
  }
  return {ptx::load_global(problem.cu_seqlens + low) - row_start,
          ptx::load_global(problem.cu_seqlens + high) - row_start};
}

// Causality, documents and the end of the row are one rule: each query sees a span of keys, each key one of queries.
DEVICE Span keys_of(const Problem& problem, int batch, int query) {
  if (query >= problem.seq) return {0, 0};
  const Span document = document_of(problem, batch, query);
  return {document.begin, problem.causal ? query + 1 : document.end};
}
DEVICE Span queries_of(const Problem& problem, int batch, int key) {
  if (key >= problem.seq) return {0, 0};
  const Span document = document_of(problem, batch, key);
  return {problem.causal ? key : document.begin, document.end};
}

DEVICE int smaller(int a, int b) { return a < b ? a : b; }
DEVICE int larger(int a, int b) { return a > b ? a : b; }

// Blocks of a launch: heads change fastest, so that the first to start, over all heads, are those of the first blocks.
struct Work {
  int block, head, batch;
};
DEVICE Work work_of(int index, int heads, int batch) {
  return {index / (heads * batch), index % heads, index / heads % batch};
}

}  // namespace twicing
