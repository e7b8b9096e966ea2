// Forward for sequences of any length, in two launches of nearly one kernel (4 products of size seq^2 head_dim):
//   FIRST   U = A V by the online softmax (Milakov & Gimelshein 2018), and the log-sum-exp of each row
//   SECOND  O = 2 U - A U, where A = exp(scale Q K^T - lse) needs neither maximum nor sum any more
// 2 U is most of O, so U is passed on to twice its precision: what rounding it left out waits where O will be. SECOND
// starts its accumulators with -2 U, when registers are still free, and changes their sign at the end.
//
// A block of threads has ROWS queries and walks over their keys, KEYS at a time. While it computes with one tile of keys
// (and of values: V, then U) the copy of the next is under way. A warp has TILES * 16 of the rows: each fragment of keys
// and values that it reads from shared memory then serves TILES products, without which shared memory would set the pace.
#pragma once
#include "tile.cuh"

namespace twicing {

struct ForwardParams {
  Problem problem;
  Tensor query, key, value, u, output;
  float* lse;  // (batch, heads, seq), natural logarithm
};

template <int DIM>
struct ForwardTiling {
  static constexpr int WARPS = 4, THREADS = 32 * WARPS;
  static constexpr int TILES = DIM <= 128 ? 2 : 1;  // at 256, more accumulators than registers
  static constexpr int ROWS = WARPS * TILES * 16;
  static constexpr int KEYS = DIM <= 64 ? 64 : 32;
  static constexpr int QUERY_BYTES = ROWS * DIM * 2, TILE_BYTES = KEYS * DIM * 2;
  static constexpr int SHARED_BYTES = QUERY_BYTES + 2 * 2 * TILE_BYTES + ROWS * 8;  // two stages of keys and values
  static constexpr bool QUERY_IN_REGISTERS = DIM <= 64;
};

enum Pass { FIRST, SECOND };

// scores = Q K^T of the warp's rows and one tile of keys. `query` is used only if the tiling keeps it in registers.
template <class T, int DIM, class Tiling>
DEVICE void multiply_query_key(float (&scores)[Tiling::TILES][Tiling::KEYS / 8][4],
                               const uint32_t (&query)[Tiling::TILES][DIM / 16][4], ptx::Address query_tile,
                               int warp_row, ptx::Address key_tile) {
#pragma unroll
  for (int t = 0; t < Tiling::TILES; t++) set_zero(scores[t]);
#pragma unroll(Tiling::QUERY_IN_REGISTERS ? DIM / 16 : 4)
  for (int k = 0; k < DIM / 16; k++) {
    uint32_t a[Tiling::TILES][4];
#pragma unroll
    for (int t = 0; t < Tiling::TILES; t++) {
      if (Tiling::QUERY_IN_REGISTERS) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[t][i] = query[t][k][i];
      } else {
        load_a<DIM>(a[t], query_tile, warp_row + t * 16, k * 16);
      }
    }
#pragma unroll
    for (int n = 0; n < Tiling::KEYS / 8; n += 2) {
      uint32_t b[4];
      load_b_from_rows<DIM>(b, key_tile, n * 8, k * 16);
#pragma unroll
      for (int t = 0; t < Tiling::TILES; t++) multiply_pair<T>(scores[t][n], scores[t][n + 1], a[t], b);
    }
  }
}

// Scores of keys that a row does not see become -inf.
template <int COLUMNS>
DEVICE void hide_keys(float (&scores)[COLUMNS][4], int first_key, ptx::Address spans, int tile_row) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const Span keys = load_span(spans, tile_row + half * 8 + lane_index() / 4);
    if (first_key >= keys.begin && first_key + COLUMNS * 8 <= keys.end) continue;
#pragma unroll
    for (int n = 0; n < COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int key = first_key + n * 8 + lane_index() % 4 * 2 + i;
        if (key < keys.begin || key >= keys.end) scores[n][2 * half + i] = -INFINITY;
      }
  }
}

// output += weights * a tile of values; each fragment of values serves all the warp's rows.
template <class T, int DIM, int TILES, int BLOCKS>
DEVICE void multiply_values(float (&output)[TILES][DIM / 8][4], const uint32_t (&weights)[TILES][BLOCKS][4],
                            ptx::Address value_tile) {
#pragma unroll
  for (int k = 0; k < BLOCKS; k++)
#pragma unroll
    for (int n = 0; n < DIM / 8; n += 2) {
      uint32_t b[4];
      load_b<DIM>(b, value_tile, k * 16, n * 8);
#pragma unroll
      for (int t = 0; t < TILES; t++) multiply_pair<T>(output[t][n], output[t][n + 1], weights[t][k], b);
    }
}

// Scores become exp(scale (score - maximum)) under the new running maximum; what has been summed so far is to be
// multiplied by `rescale`.
template <int COLUMNS>
DEVICE void online_softmax(float (&scores)[COLUMNS][4], float (&maximum)[2], float (&sum)[2], float (&rescale)[2],
                           float scale_log2) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float highest = maximum[half];
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) highest = fmaxf(highest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    highest = max_over_row(highest);
    const float shift = highest == -INFINITY ? 0.f : highest * scale_log2;  // no key seen yet: -inf less -inf is NaN
    rescale[half] = ptx::exp2(maximum[half] * scale_log2 - shift);
    maximum[half] = highest;
    sum[half] *= rescale[half];
#pragma unroll
    for (int n = 0; n < COLUMNS; n++)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; i++) {
        scores[n][i] = ptx::exp2(scores[n][i] * scale_log2 - shift);
        sum[half] += scores[n][i];
      }
  }
}
template <int COLUMNS>
DEVICE void scale_rows(float (&c)[COLUMNS][4], const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < COLUMNS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) c[n][i] *= factor[i / 2];
}

template <class T, int DIM, Pass PASS>
__global__ void __launch_bounds__(ForwardTiling<DIM>::THREADS, 1) forward_kernel(const ForwardParams p) {
  using Tiling = ForwardTiling<DIM>;
  constexpr int TILES = Tiling::TILES, KEYS = Tiling::KEYS, STAGE_BYTES = 2 * Tiling::TILE_BYTES;
  const Problem& problem = p.problem;
  Work work = work_of(ptx::block_index(), problem.heads, problem.batch);
  if (problem.causal) work.block = (problem.seq - 1) / Tiling::ROWS - work.block;  // the longest first
  const int lane = lane_index(), warp_row = warp_index() * TILES * 16;
  const int first_row = work.block * Tiling::ROWS, last_row = smaller(first_row + Tiling::ROWS, problem.seq) - 1;
  const float scale_log2 = problem.scale * LOG2_E;

  // Shared memory: the block's queries; two stages of keys and values; the span of keys that each query sees.
  const ptx::Address query_tile = ptx::shared_memory(), spans = query_tile + Tiling::QUERY_BYTES + 2 * STAGE_BYTES;
  auto stage = [&](int parity) { return query_tile + Tiling::QUERY_BYTES + parity * STAGE_BYTES; };

  // The keys that any row of the block sees.
  const int begin = keys_of(problem, work.batch, first_row).begin, end = keys_of(problem, work.batch, last_row).end;
  auto start_copies = [&](int parity, int first_key) {
    const Tensor& values = PASS == FIRST ? p.value : p.u;
    const int head = ptx::recompute(work.head), key_head = problem.key_head(head);
    const uint16_t* key = p.key.rows(work.batch, key_head);
    const uint16_t* value = values.rows(work.batch, PASS == FIRST ? key_head : head);
    load_tile<DIM, KEYS, Tiling::THREADS>(stage(parity), key, p.key.row_stride, first_key, end);
    load_tile<DIM, KEYS, Tiling::THREADS>(stage(parity) + Tiling::TILE_BYTES, value, values.row_stride, first_key, end);
    ptx::cp_async_commit();
  };
  load_tile<DIM, Tiling::ROWS, Tiling::THREADS>(query_tile, p.query.rows(work.batch, work.head), p.query.row_stride,
                                                first_row, problem.seq);
  start_copies(0, begin);

  store_spans<Tiling::ROWS, Tiling::THREADS>(
      spans, [&](int row) { return keys_of(problem, work.batch, first_row + row); });

  auto row_of = [&](int t, int half) { return first_row + warp_row + t * 16 + half * 8 + lane / 4; };  // this thread's
  auto lse_of = [&](int row) { return p.lse + problem.first_statistic(work.batch, work.head) + row; };
  float output[TILES][DIM / 8][4], maximum[TILES][2], sum[TILES][2], lse_log2[TILES][2];
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    set_zero(output[t]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = row_of(t, half);
      const bool exists = row < problem.seq;
      if (PASS == FIRST) {
        maximum[t][half] = -INFINITY;
        sum[t][half] = 0.f;
      } else {
        const uint16_t* u = p.u.rows(work.batch, work.head) + row * p.u.row_stride;
        const uint16_t* o = p.output.rows(work.batch, work.head) + row * p.output.row_stride;
        lse_log2[t][half] = LOG2_E * ptx::load_global(lse_of(row), exists);
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
          const int column = n * 8 + lane % 4 * 2;
          const uint32_t rounded = ptx::load_global(u + column, exists);
          const uint32_t rest = ptx::load_global(o + column, exists);
          output[t][n][2 * half] = -2.f * (ptx::low(T{}, rounded) + ptx::low(T{}, rest));
          output[t][n][2 * half + 1] = -2.f * (ptx::high(T{}, rounded) + ptx::high(T{}, rest));
        }
      }
    }
  }

  uint32_t query[TILES][DIM / 16][4];
#pragma unroll 1
  for (int first_key = begin, parity = 0; first_key < end; first_key += KEYS, parity ^= 1) {
    const ptx::Address key_tile = stage(parity), value_tile = key_tile + Tiling::TILE_BYTES;
    ptx::cp_async_wait<0>();
    ptx::sync_block();  // this step's tiles have arrived, and nobody reads the other stage any more
    if (first_key + KEYS < end) start_copies(parity ^ 1, first_key + KEYS);

    if (Tiling::QUERY_IN_REGISTERS && first_key == begin) {
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int k = 0; k < DIM / 16; k++) load_a<DIM>(query[t][k], query_tile, warp_row + t * 16, k * 16);
    }
    float scores[TILES][KEYS / 8][4];
    multiply_query_key<T, DIM, Tiling>(scores, query, query_tile, warp_row, key_tile);

    uint32_t weights[TILES][KEYS / 16][4];
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      hide_keys(scores[t], first_key, spans, warp_row + t * 16);
      if (PASS == FIRST) {
        float rescale[2];
        online_softmax(scores[t], maximum[t], sum[t], rescale, scale_log2);
        scale_rows(output[t], rescale);
      } else {
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) scores[t][n][i] = ptx::exp2(scores[t][n][i] * scale_log2 - lse_log2[t][i / 2]);
      }
#pragma unroll
      for (int k = 0; k < KEYS / 16; k++) pack_a<T>(weights[t][k], scores[t][2 * k], scores[t][2 * k + 1]);
    }
    multiply_values<T, DIM>(output, weights, value_tile);
  }

  // Found again rather than kept: at 128 there is no register for it.
  work = work_of(ptx::recompute(ptx::block_index()), problem.heads, problem.batch);
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    float factor[2] = {-1.f, -1.f};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (PASS == FIRST) {
        const float total = sum_over_row(sum[t][half]);
        const float lse = LN_2 * (maximum[t][half] * scale_log2 + ptx::log2(total));
        ptx::store_global(lse_of(row_of(t, half)), lse, lane % 4 == 0 && row_of(t, half) < problem.seq);
        factor[half] = ptx::reciprocal(total);
      }
    }
    scale_rows(output[t], factor);
    auto store = [&](const Tensor& tensor) {
      const int tile_row = warp_row + t * 16;
      store_rows<T, DIM>(output[t], query_tile, tile_row, tensor.rows(work.batch, work.head), tensor.row_stride,
                         first_row + tile_row, problem.seq);
    };
    if (PASS == FIRST) store(p.u);
    store(p.output);
  }
}

template <class T, int DIM>
ptx::Status run_forward(const ForwardParams& p, ptx::Stream stream) {
  using Tiling = ForwardTiling<DIM>;
  const Problem& problem = p.problem;
  const int64_t row_blocks = (problem.seq + Tiling::ROWS - 1) / Tiling::ROWS;
  const int64_t blocks = row_blocks * problem.heads * problem.batch;
  const ptx::Status status =
      ptx::launch(forward_kernel<T, DIM, FIRST>, blocks, Tiling::THREADS, Tiling::SHARED_BYTES, stream, p);
  if (status != ptx::SUCCESS) return status;
  return ptx::launch(forward_kernel<T, DIM, SECOND>, blocks, Tiling::THREADS, Tiling::SHARED_BYTES, stream, p);
}

}  // namespace twicing
