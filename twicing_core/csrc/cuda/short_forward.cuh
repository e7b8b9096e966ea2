// Forward for short sequences, in one launch (3 products of size seq^2 head_dim):
//
//     P = exp(scale Q K^T - maximum)      U = P V / sum      O = 2 U - P U / sum
//
// P stays in registers for both of its products (short.cuh), so scores are computed once. A warp has those of 16 rows
// and all keys at once: the softmax is the plain one, and nothing is ever rescaled.
#pragma once
#include "forward.cuh"
#include "short.cuh"

namespace twicing {

// Of 16 rows: P, where some of the warp's rows see keys; the logarithm to base 2 of the sums of exp(scale score); and
// 1 / sum of each row of P, 0 for rows past the end.
template <class T, int DIM, int ROWS>
DEVICE void short_softmax(uint32_t (&weights)[ROWS / 16][4], float (&lse_log2)[2], float (&inverse_sum)[2],
                          ptx::Address query_tile, int tile_row, ptx::Address key_tile, ptx::Address spans, Span seen,
                          float scale_log2) {
  constexpr int CHUNK = 32;  // scores are computed, and hidden ones left out, this many keys at a time
  uint32_t query[1][DIM / 16][4];
#pragma unroll
  for (int k = 0; k < DIM / 16; k++) load_a<DIM>(query[0][k], query_tile, tile_row, k * 16);

  float scores[ROWS / CHUNK][1][CHUNK / 8][4], maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
#pragma unroll
  for (int chunk = 0; chunk < ROWS / CHUNK; chunk++) {
    const int first_key = chunk * CHUNK;
    if (!overlap(seen, first_key, CHUNK)) continue;
    set_zero(scores[chunk][0]);
    multiply_fragments<T, DIM>(scores[chunk], query, key_tile, first_key);
    hide_keys(scores[chunk][0], first_key, spans, tile_row);
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) maximum[i / 2] = fmaxf(maximum[i / 2], scores[chunk][0][n][i]);
  }

  float shift[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float highest = max_over_row(maximum[half]);
    shift[half] = highest == -INFINITY ? 0.f : highest * scale_log2;  // a row past the end: -inf less -inf is NaN
  }
#pragma unroll
  for (int chunk = 0; chunk < ROWS / CHUNK; chunk++) {
    if (!overlap(seen, chunk * CHUNK, CHUNK)) continue;
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float& score = scores[chunk][0][n][i];
        score = ptx::exp2(score * scale_log2 - shift[i / 2]);
        sum[i / 2] += score;
      }
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n += 2)
      pack_a<T>(weights[chunk * CHUNK / 16 + n / 2], scores[chunk][0][n], scores[chunk][0][n + 1]);
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float total = sum_over_row(sum[half]);
    lse_log2[half] = shift[half] + ptx::log2(total);
    inverse_sum[half] = total > 0.f ? ptx::reciprocal(total) : 0.f;
  }
}

template <class T, int DIM, int ROWS>
__global__ void __launch_bounds__(ROWS, 1) short_forward(const ForwardParams p) {
  using Tiling = ShortTiling<DIM, ROWS>;
  const Problem& problem = p.problem;
  const int batch = ptx::block_index() / problem.heads, head = ptx::block_index() % problem.heads;
  const int lane = lane_index(), warp_row = short_warp_row(problem);

  // Shared memory: the span of keys that each query sees; queries, then U; keys, then O; values.
  const ptx::Address spans = ptx::shared_memory(), query_tile = spans + Tiling::SPAN_BYTES;
  const ptx::Address key_tile = query_tile + Tiling::TILE_BYTES, value_tile = key_tile + Tiling::TILE_BYTES;

  load_head<DIM>(query_tile, p.query, batch, head, problem);
  load_head<DIM>(key_tile, p.key, batch, problem.key_head(head), problem);
  ptx::cp_async_commit();
  load_head<DIM>(value_tile, p.value, batch, problem.key_head(head), problem);
  ptx::cp_async_commit();
  store_span(spans, ptx::thread_index(), keys_of(problem, batch, ptx::thread_index()));
  ptx::cp_async_wait<1>();
  ptx::sync_block();  // queries, keys and spans are there

  auto seen = [&] { return seen_by_warp(spans, warp_row, problem.seq); };
  ShortWeights<ROWS> weights;
  float inverse_sum[WARP_TILES][2];
#pragma unroll
  for (int t = 0; t < WARP_TILES; t++) {
    float lse_log2[2];
    short_softmax<T, DIM, ROWS>(weights[t], lse_log2, inverse_sum[t], query_tile, warp_row + t * 16, key_tile, spans,
                                seen(), problem.scale * LOG2_E);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = warp_row + t * 16 + half * 8 + lane / 4;
      ptx::store_global(p.lse + problem.first_statistic(batch, head) + row, LN_2 * lse_log2[half],
                        lane % 4 == 0 && row < problem.seq);
    }
  }
  ptx::cp_async_wait<0>();
  ptx::sync_block();  // values are there

  float output[WARP_TILES][DIM / 8][4];
#pragma unroll
  for (int t = 0; t < WARP_TILES; t++) set_zero(output[t]);
  multiply_weights<T, DIM, ROWS>(output, weights, value_tile, seen());
#pragma unroll
  for (int t = 0; t < WARP_TILES; t++) {
    float u[DIM / 8][4];
#pragma unroll
    for (int n = 0; n < DIM / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) u[n][i] = output[t][n][i] * inverse_sum[t][i / 2];
    const int row = warp_row + t * 16;
    store_rows<T, DIM>(u, query_tile, row, p.u.rows(batch, head), p.u.row_stride, row, problem.seq);
  }
  ptx::sync_block();  // U is complete, and nobody reads keys any more

  const float minus_2[2] = {-2.f, -2.f};
#pragma unroll
  for (int t = 0; t < WARP_TILES; t++) scale_rows(output[t], minus_2);  // U as it was before its rounding
  multiply_weights<T, DIM, ROWS>(output, weights, query_tile, seen());
#pragma unroll
  for (int t = 0; t < WARP_TILES; t++) {
    const float factor[2] = {-inverse_sum[t][0], -inverse_sum[t][1]};
    scale_rows(output[t], factor);
    const int row = warp_row + t * 16;
    store_rows<T, DIM>(output[t], key_tile, row, p.output.rows(batch, head), p.output.row_stride, row, problem.seq);
  }
}

template <class T, int DIM>
ptx::Status run_short_forward(const ForwardParams& p, ptx::Stream stream) {
  static_assert(short_fits<DIM>(1), "A and the accumulators take more registers than there are");
  auto launch = [&](auto kernel, int shared_bytes) {
    return launch_short(kernel, p.problem.heads, shared_bytes, stream, p);
  };
  if (p.problem.seq <= 128) return launch(short_forward<T, DIM, 128>, ShortTiling<DIM, 128>::FORWARD_SHARED_BYTES);
  return launch(short_forward<T, DIM, 256>, ShortTiling<DIM, 256>::FORWARD_SHARED_BYTES);
}

}  // namespace twicing
