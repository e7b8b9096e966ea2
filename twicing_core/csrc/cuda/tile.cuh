// Tiles of shared memory, the fragments that mma.m16n8k16 takes from them, and products of whole tiles.
//
// A tile holds rows of WIDTH two-byte elements. ldmatrix reads 16-byte chunks of eight rows at once, which must lie in
// different banks; so chunk c of a row is kept at c xor a number that changes with the row (a "swizzle").
//
// Fragments, for lane 4g + t of a warp (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   a[0..3]  rows g, g+8, g, g+8;    columns 2t, 2t+1 of the first half, then of the second half of k
//   b[0..1]  column g;               rows 2t, 2t+1 of the first, then of the second half of k
//   c[0..3]  rows g, g, g+8, g+8;    columns 2t, 2t+1, 2t, 2t+1
// So two neighbouring c fragments, packed, are an a fragment: a product's result is the next product's left operand.
//
// Kernels are declared with __launch_bounds__(threads, 1): without the 1, ptxas spills to fit one more block on an SM.
#pragma once
#include "problem.cuh"

namespace twicing {

DEVICE int lane_index() { return static_cast<uint32_t>(ptx::thread_index()) % 32; }
DEVICE int warp_index() { return static_cast<uint32_t>(ptx::thread_index()) / 32; }

// Eight rows of one chunk fall into different banks if each 128 bytes hold it at another place than the 128 before.
template <int WIDTH>
struct Swizzle {
  static constexpr int CHUNKS = WIDTH / 8;
  static constexpr int PERIOD = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : 2;  // chunks that change places
  static constexpr int ROWS_IN_128_BYTES = 8 / PERIOD;
  static_assert(CHUNKS % 4 == 0 || CHUNKS == 2, "no conflict-free order is known for this width");

  static DEVICE uint32_t offset(uint32_t row, uint32_t chunk) {
    return (row * CHUNKS + (chunk ^ (row / ROWS_IN_128_BYTES % PERIOD))) * 16;
  }
  // From an even chunk's address, or its right neighbour's, that of the chunk `chunks` (even) further right. Cheaper than
  // `offset`: tiles start on 128 bytes, so it is one xor, and less to keep in registers.
  static DEVICE ptx::Address right(ptx::Address address, int chunks) {
    return (address ^ (chunks % PERIOD * 16)) + chunks / PERIOD * PERIOD * 16;
  }
};

// Starts the copy of rows first .. first + rows - 1 of a matrix; rows from `end` on become zeros.
template <int WIDTH>
DEVICE void load_tile(ptx::Address tile, const uint16_t* matrix, int64_t row_stride, int first, int end, int rows,
                      int threads) {
  constexpr int CHUNKS = WIDTH / 8;
#pragma unroll 1
  for (int i = ptx::thread_index(); i < rows * CHUNKS; i += threads) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    const uint16_t* source = matrix + (first + row) * row_stride + chunk * 8;
    ptx::cp_async_16(tile + Swizzle<WIDTH>::offset(row, chunk), source, first + row < end);
  }
}
template <int WIDTH, int ROWS, int THREADS>
DEVICE void load_tile(ptx::Address tile, const uint16_t* matrix, int64_t row_stride, int first, int end) {
  load_tile<WIDTH>(tile, matrix, row_stride, first, end, ROWS, THREADS);
}

// The left operand a[m][k] from a tile whose rows are m, or whose rows are k.
template <int WIDTH>
DEVICE void load_a(uint32_t (&a)[4], ptx::Address tile, int m, int k) {
  const int lane = lane_index();
  const ptx::Address first = tile + Swizzle<WIDTH>::offset(m + lane % 16, lane / 16);
  ptx::ldmatrix_x4(a, Swizzle<WIDTH>::right(first, k / 8));
}
template <int WIDTH>
DEVICE void load_a_from_columns(uint32_t (&a)[4], ptx::Address tile, int m, int k) {
  const int lane = lane_index();
  const ptx::Address first = tile + Swizzle<WIDTH>::offset(k + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  ptx::ldmatrix_x4_trans(a, Swizzle<WIDTH>::right(first, m / 8));
}

// The right operands b[k][n] of two products, for columns n .. n+7 (b[0], b[1]) and n+8 .. n+15 (b[2], b[3]),
// from a tile whose rows are n, or whose rows are k.
template <int WIDTH>
DEVICE void load_b_from_rows(uint32_t (&b)[4], ptx::Address tile, int n, int k) {
  const int lane = lane_index();
  const ptx::Address first = tile + Swizzle<WIDTH>::offset(n + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  ptx::ldmatrix_x4(b, Swizzle<WIDTH>::right(first, k / 8));
}
template <int WIDTH>
DEVICE void load_b(uint32_t (&b)[4], ptx::Address tile, int k, int n) {
  const int lane = lane_index();
  const ptx::Address first = tile + Swizzle<WIDTH>::offset(k + lane % 16, lane / 16);
  ptx::ldmatrix_x4_trans(b, Swizzle<WIDTH>::right(first, n / 8));
}

template <class T>
DEVICE void multiply_pair(float (&left)[4], float (&right)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  ptx::mma_m16n8k16(T{}, left, a, b[0], b[1]);
  ptx::mma_m16n8k16(T{}, right, a, b[2], b[3]);
}

template <int N, int M>
DEVICE void set_zero(float (&c)[N][M]) {
#pragma unroll
  for (int i = 0; i < N; i++)
#pragma unroll
    for (int j = 0; j < M; j++) c[i][j] = 0.f;
}

// c[16][8 * COLUMNS] += A B^T, with A in rows a_row.. and B in rows b_row.. of tiles of DIM columns.
template <class T, int DIM, int COLUMNS, bool NEGATED = false>
DEVICE void multiply_rows(float (&c)[COLUMNS][4], ptx::Address a_tile, int a_row, ptx::Address b_tile, int b_row) {
#pragma unroll(DIM <= 96 ? DIM / 16 : 4)  // all of 128 take more registers than there are
  for (int k = 0; k < DIM; k += 16) {
    uint32_t a[4];
    load_a<DIM>(a, a_tile, a_row, k);
    if (NEGATED) {
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] ^= 0x80008000u;  // both signs
    }
#pragma unroll
    for (int n = 0; n < COLUMNS; n += 2) {
      uint32_t b[4];
      load_b_from_rows<DIM>(b, b_tile, b_row + n * 8, k);
      multiply_pair<T>(c[n], c[n + 1], a, b);
    }
  }
}

// Two neighbouring results, 16 columns, rounded to elements: the left operand of the next product.
template <class T>
DEVICE void pack_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = ptx::pack(T{}, left[0], left[1]);
  a[1] = ptx::pack(T{}, left[2], left[3]);
  a[2] = ptx::pack(T{}, right[0], right[1]);
  a[3] = ptx::pack(T{}, right[2], right[3]);
}

// c[16][DIM] += A B, with A[16][16 * BLOCKS] in registers and B in the first 16 * BLOCKS rows of a tile.
template <class T, int DIM, int BLOCKS>
DEVICE void multiply_registers(float (&c)[DIM / 8][4], const uint32_t (&a)[BLOCKS][4], ptx::Address tile) {
#pragma unroll
  for (int k = 0; k < BLOCKS; k++)
#pragma unroll
    for (int n = 0; n < DIM / 8; n += 2) {
      uint32_t b[4];
      load_b<DIM>(b, tile, k * 16, n * 8);
      multiply_pair<T>(c[n], c[n + 1], a[k], b);
    }
}

// Writes a warp's 16 rows of results to rows first .. of a matrix, in 16-byte pieces, by way of rows `tile_row` .. of a
// tile, of which no other warp uses these columns. Rows from `end` on are not written. `c` becomes what the rounding left
// out.
template <class T, int DIM, int COLUMNS = DIM>
DEVICE void store_rows(float (&c)[COLUMNS / 8][4], ptx::Address tile, int tile_row, uint16_t* matrix,
                       int64_t row_stride, int first, int end, int first_column = 0) {
  constexpr int CHUNKS = COLUMNS / 8;
  const int lane = ptx::recompute(lane_index());  // in a loop, the addresses of all stores would wait in registers
  const int first_chunk = first_column / 8;
  ptx::sync_warp();  // the lanes may still be reading those rows
#pragma unroll
  for (int n = 0; n < CHUNKS; n++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t word = ptx::pack(T{}, c[n][2 * half], c[n][2 * half + 1]);
      const uint32_t chunk = Swizzle<DIM>::offset(tile_row + lane / 4 + 8 * half, first_chunk + n);
      ptx::store_shared(tile + chunk + lane % 4 * 4, word);
      c[n][2 * half] -= ptx::low(T{}, word);
      c[n][2 * half + 1] -= ptx::high(T{}, word);
    }
  ptx::sync_warp();
#pragma unroll 2  // more would want registers that are not there
  for (int i = lane; i < 16 * CHUNKS; i += 32) {
    const int row = i / CHUNKS, chunk = first_chunk + i % CHUNKS;
    const ptx::Words4 words = ptx::load_shared_16(tile + Swizzle<DIM>::offset(tile_row + row, chunk));
    ptx::store_global_16(matrix + (first + row) * row_stride + chunk * 8, words, first + row < end);
  }
}

// The spans of a block's rows wait in shared memory, where they cost no registers.
DEVICE void store_span(ptx::Address spans, int row, Span span) {
  ptx::store_shared(spans + row * 8, static_cast<uint32_t>(span.begin));
  ptx::store_shared(spans + row * 8 + 4, static_cast<uint32_t>(span.end));
}
template <int ROWS, int THREADS, class SpanOf>
DEVICE void store_spans(ptx::Address spans, SpanOf span_of) {
  for (int row = ptx::thread_index(); row < ROWS; row += THREADS) store_span(spans, row, span_of(row));
}
DEVICE Span load_span(ptx::Address spans, int row) {
  uint32_t pair[2];
  ptx::load_shared(spans + row * 8, pair);
  return {static_cast<int>(pair[0]), static_cast<int>(pair[1])};
}

// Sum over the four lanes that hold one row of a result.
DEVICE float sum_over_row(float value) {
  value += ptx::shuffle_xor(value, 1);
  return value + ptx::shuffle_xor(value, 2);
}
DEVICE float max_over_row(float value) {
  value = fmaxf(value, ptx::shuffle_xor(value, 1));
  return fmaxf(value, ptx::shuffle_xor(value, 2));
}

}  // namespace twicing
