// What the kernels for short sequences share (short_forward.cuh, short_backward.cuh): a block of threads has a whole
// head, and each of its warps 32 of the head's rows, with their attention weights of all columns in registers. Packed,
// they are left operands of every product they take part in; at 256 columns they are 128 of a thread's 255 registers,
// which leave enough for the accumulators up to head_dim 64.
//
// Compiled for heads of up to 128 and up to 256 rows. There are as many warps as the rows need, and so as many threads
// as rows, up to the next multiple of 32.
#pragma once
#include "tile.cuh"

namespace twicing {

// Whether the short kernels take heads of `seq` rows.
template <int DIM>
constexpr bool short_fits(int seq) {
  return DIM <= 64 && seq <= 256;
}

template <int DIM, int ROWS>
struct ShortTiling {
  static constexpr int TILE_BYTES = ROWS * DIM * 2, SPAN_BYTES = ROWS * 8, STATISTICS_BYTES = ROWS * 4;
  // dO is followed by two stages of dS^T of a warp.
  static constexpr int GRAD_SCORES_BYTES = 32 * ROWS * 2;
  static constexpr int FORWARD_SHARED_BYTES = SPAN_BYTES + 3 * TILE_BYTES;
  static constexpr int BACKWARD_SHARED_BYTES = SPAN_BYTES + STATISTICS_BYTES + 2 * TILE_BYTES + 2 * GRAD_SCORES_BYTES;
};

constexpr int WARP_ROWS = 32, WARP_TILES = WARP_ROWS / 16;

// Weights of a warp's rows, 16 columns a block, as left operands.
template <int ROWS>
using ShortWeights = uint32_t[WARP_TILES][ROWS / 16][4];

DEVICE int padded_rows(const Problem& problem) { return (problem.seq + WARP_ROWS - 1) / WARP_ROWS * WARP_ROWS; }

// The 32 rows of a warp. Under causality the later have more to do, or the earlier: warps w and w + 4, which share a
// quarter of the SM, get rows from both ends.
DEVICE int short_warp_row(const Problem& problem) {
  const int warp = warp_index(), warps = padded_rows(problem) / WARP_ROWS;
  return (warp < 4 ? warp : warps + 3 - warp) * WARP_ROWS;
}

// All rows of one head.
template <int DIM>
DEVICE void load_head(ptx::Address tile, const Tensor& tensor, int batch, int head, const Problem& problem) {
  const int rows = padded_rows(problem);
  load_tile<DIM>(tile, tensor.rows(batch, head), tensor.row_stride, 0, problem.seq, rows, rows);
}

// What any row of a warp sees.
DEVICE Span seen_by_warp(ptx::Address spans, int warp_row, int seq) {
  return {load_span(spans, warp_row).begin, load_span(spans, smaller(warp_row + WARP_ROWS, seq) - 1).end};
}
DEVICE bool overlap(Span span, int first, int count) { return first < span.end && first + count > span.begin; }

// c[16 * TILES][8 * COLUMNS] += A B^T, with fragments of A in registers and B in rows b_row.. of a tile.
template <class T, int DIM, int TILES, int COLUMNS>
DEVICE void multiply_fragments(float (&c)[TILES][COLUMNS][4], const uint32_t (&a)[TILES][DIM / 16][4],
                               ptx::Address b_tile, int b_row) {
#pragma unroll
  for (int k = 0; k < DIM / 16; k++)
#pragma unroll
    for (int n = 0; n < COLUMNS; n += 2) {
      uint32_t b[4];
      load_b_from_rows<DIM>(b, b_tile, b_row + n * 8, k * 16);
#pragma unroll
      for (int t = 0; t < TILES; t++) multiply_pair<T>(c[t][n], c[t][n + 1], a[t][k], b);
    }
}

// c[32][DIM] += weights B, with all rows of B in a tile. Blocks of columns outside of `seen` are left out.
template <class T, int DIM, int ROWS>
DEVICE void multiply_weights(float (&c)[WARP_TILES][DIM / 8][4], const ShortWeights<ROWS>& weights, ptx::Address tile,
                             Span seen) {
#pragma unroll
  for (int k = 0; k < ROWS / 16; k++) {
    if (!overlap(seen, k * 16, 16)) continue;
#pragma unroll
    for (int n = 0; n < DIM / 8; n += 2) {
      uint32_t b[4];
      load_b<DIM>(b, tile, k * 16, n * 8);
#pragma unroll
      for (int t = 0; t < WARP_TILES; t++) multiply_pair<T>(c[t][n], c[t][n + 1], weights[t][k], b);
    }
  }
}

// Fragments of 32 rows of a matrix, as left operands.
template <int DIM, bool NEGATED = false>
DEVICE void load_fragments(uint32_t (&a)[WARP_TILES][DIM / 16][4], const Tensor& tensor, int batch, int head,
                           int first, int end) {
  const uint16_t* matrix = tensor.rows(batch, head);
  first = ptx::recompute(first);
#pragma unroll
  for (int t = 0; t < WARP_TILES; t++)
#pragma unroll
    for (int k = 0; k < DIM / 16; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = first + t * 16 + i % 2 * 8 + lane_index() / 4;
        const int column = k * 16 + i / 2 * 8 + lane_index() % 4 * 2;
        a[t][k][i] = ptx::load_global(matrix + row * tensor.row_stride + column, row < end);
        if (NEGATED) a[t][k][i] ^= 0x80008000u;  // both signs
      }
}

// Rounds 32 rows of results and writes them straight from the fragments: no tile is free to collect 16-byte pieces in.
template <class T, int DIM>
DEVICE void store_fragments(const float (&c)[WARP_TILES][DIM / 8][4], const Tensor& tensor, int batch, int head,
                            int first, int end) {
  uint16_t* matrix = tensor.rows(batch, head);
#pragma unroll
  for (int t = 0; t < WARP_TILES; t++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = ptx::recompute(first) + t * 16 + half * 8 + lane_index() / 4;
      uint16_t* target = matrix + row * tensor.row_stride + lane_index() % 4 * 2;
#pragma unroll
      for (int n = 0; n < DIM / 8; n++)
        ptx::store_global(target + n * 8, ptx::pack(T{}, c[t][n][2 * half], c[t][n][2 * half + 1]), row < end);
    }
}

template <class Kernel, class Params>
ptx::Status launch_short(Kernel kernel, int heads, int shared_bytes, ptx::Stream stream, const Params& p) {
  const int threads = (p.problem.seq + WARP_ROWS - 1) / WARP_ROWS * 32;
  return ptx::launch(kernel, int64_t(p.problem.batch) * heads, threads, shared_bytes, stream, p);
}

}  // namespace twicing
