// Backward for short sequences, in one launch (7 products of size seq^2 head_dim; the formulas are in backward.cuh): a
// block of threads has a whole head, or one after the other those of a group that shares keys. A warp has 32 keys, as
// rows of S^T, and keeps A^T of all queries in registers, where dS^T later takes its place:
//
//     A^T     = exp(scale K Q^T - lse)                          in registers from here on
//     dU      = 2 dO - A^T dO,  delta                           to shared memory, for all warps
//     dV      = A^T dU
//     dS^T    = A^T * (V dU^T - U dO^T - delta)                 in registers, instead of A^T
//     dK      = scale dS^T Q
//     dQ      = scale dS K                                      dS^T goes through shared memory, a warp's at a time
//
// 99 KB hold three tiles of 256 rows at head_dim 64. So of K, V and U, of which a warp needs its own rows as left
// operands, fragments come straight from global memory; K as a right operand takes dU's place, and dS^T that of dO.
#pragma once
#include "backward.cuh"
#include "short.cuh"

namespace twicing {

struct ShortBackwardParams : BackwardParams {
  float* workspace;  // short_workspace_bytes
};

// Device memory that a launch works with: if heads share keys, sums of dK and dV, (batch, key_heads, 2, seq, DIM).
template <int DIM>
int64_t short_workspace_bytes(const Problem& problem) {
  if (problem.heads == problem.key_heads) return 0;
  return sizeof(float) * problem.batch * problem.key_heads * 2 * problem.seq * DIM;
}

// A^T of a warp's keys and all queries; 0 where the query does not see the key.
template <class T, int DIM, int ROWS>
DEVICE void short_weights(ShortWeights<ROWS>& weights, const uint32_t (&key)[WARP_TILES][DIM / 16][4],
                          ptx::Address query_tile, ptx::Address lse, ptx::Address spans, int warp_row, Span seen,
                          float scale_log2) {
#pragma unroll
  for (int block = 0; block < ROWS / 16; block++) {
    const int first_query = block * 16;
    if (overlap(seen, first_query, 16)) {
      float scores[WARP_TILES][2][4];
#pragma unroll
      for (int t = 0; t < WARP_TILES; t++) set_zero(scores[t]);
      multiply_fragments<T, DIM>(scores, key, query_tile, first_query);
#pragma unroll
      for (int t = 0; t < WARP_TILES; t++) {
        weights_from_scores(scores[t], scale_log2, lse + first_query * 4, first_query, spans, warp_row + t * 16);
        pack_a<T>(weights[t][block], scores[t][0], scores[t][1]);
      }
    } else {
#pragma unroll
      for (int t = 0; t < WARP_TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) weights[t][block][i] = 0;
    }
  }
}

// A^T becomes dS^T.
template <class T, int DIM, int ROWS>
DEVICE void short_grad_scores(ShortWeights<ROWS>& weights, const uint32_t (&value)[WARP_TILES][DIM / 16][4],
                              const uint32_t (&negative_u)[WARP_TILES][DIM / 16][4], ptx::Address grad_u_tile,
                              ptx::Address grad_output_tile, ptx::Address delta, Span seen) {
#pragma unroll
  for (int block = 0; block < ROWS / 16; block++) {
    if (!overlap(seen, block * 16, 16)) continue;
    float grad_weights[WARP_TILES][2][4];
#pragma unroll
    for (int t = 0; t < WARP_TILES; t++) set_zero(grad_weights[t]);
    multiply_fragments<T, DIM>(grad_weights, value, grad_u_tile, block * 16);
    multiply_fragments<T, DIM>(grad_weights, negative_u, grad_output_tile, block * 16);
#pragma unroll
    for (int n = 0; n < 2; n++) {
      float delta_of[2];
      load_pair(delta_of, delta, block * 16 + n * 8);
#pragma unroll
      for (int t = 0; t < WARP_TILES; t++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          uint32_t& pair = weights[t][block][2 * n + half];
          pair = ptx::pack(T{}, ptx::low(T{}, pair) * (grad_weights[t][n][2 * half] - delta_of[0]),
                           ptx::high(T{}, pair) * (grad_weights[t][n][2 * half + 1] - delta_of[1]));
        }
    }
  }
}

// c[32 queries][DIM] += dS K, over the 32 keys of which `tile` holds dS^T.
template <class T, int DIM, int ROWS>
DEVICE void multiply_grad_scores(float (&c)[WARP_TILES][DIM / 8][4], ptx::Address tile, int first_query,
                                 ptx::Address key_tile, int first_key) {
#pragma unroll
  for (int k = 0; k < WARP_ROWS; k += 16) {
    uint32_t a[WARP_TILES][4];
#pragma unroll
    for (int t = 0; t < WARP_TILES; t++) load_a_from_columns<ROWS>(a[t], tile, first_query + t * 16, k);
#pragma unroll
    for (int n = 0; n < DIM / 8; n += 2) {
      uint32_t b[4];
      load_b<DIM>(b, key_tile, first_key + k, n * 8);
#pragma unroll
      for (int t = 0; t < WARP_TILES; t++) multiply_pair<T>(c[t][n], c[t][n + 1], a[t], b);
    }
  }
}

// What a block works on: of a group's query heads the i-th. Each phase finds it again: no register is free to keep it.
struct ShortWork {
  int batch, key_head, head;
};
DEVICE ShortWork short_work(const Problem& problem, int i) {
  const int block = ptx::recompute(ptx::block_index()), key_head = block % problem.key_heads;
  return {block / problem.key_heads, key_head, key_head * (problem.heads / problem.key_heads) + i};
}

// From a warp's A^T dO to its rows of dU, in shared memory.
template <class T, int DIM>
DEVICE void store_grad_u(const float (&sum)[WARP_TILES][DIM / 8][4], const ShortBackwardParams& p, ShortWork work,
                         ptx::Address grad_u_tile, int first) {
  const int lane = lane_index();
#pragma unroll
  for (int t = 0; t < WARP_TILES; t++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = ptx::recompute(first) + t * 16 + half * 8 + lane / 4;
      const uint16_t* grad_output = p.grad_output.rows(work.batch, work.head) + row * p.grad_output.row_stride;
#pragma unroll
      for (int n = 0; n < DIM / 8; n++) {
        const uint32_t pair = ptx::load_global(grad_output + n * 8 + lane % 4 * 2, row < p.problem.seq);
        const float low = 2.f * ptx::low(T{}, pair) - sum[t][n][2 * half];
        const float high = 2.f * ptx::high(T{}, pair) - sum[t][n][2 * half + 1];
        ptx::store_shared(grad_u_tile + Swizzle<DIM>::offset(row, n) + lane % 4 * 4, ptx::pack(T{}, low, high));
      }
    }
}

// delta of one row, of dU as rounded: it is to cancel what the products make of those elements.
template <class T, int DIM>
DEVICE void store_delta(const ShortBackwardParams& p, ShortWork work, ptx::Address deltas, ptx::Address grad_u_tile,
                        ptx::Address grad_output_tile, int row) {
  const uint16_t* u = p.u.rows(work.batch, work.head) + row * p.u.row_stride;
  const uint16_t* output = p.output.rows(work.batch, work.head) + row * p.output.row_stride;
  float delta = 0.f;
#pragma unroll 2
  for (int chunk = 0; chunk < DIM / 8; chunk++) {
    const ptx::Words4 du = ptx::load_shared_16(grad_u_tile + Swizzle<DIM>::offset(row, chunk));
    const ptx::Words4 g = ptx::load_shared_16(grad_output_tile + Swizzle<DIM>::offset(row, chunk));
    const ptx::Words4 uu = ptx::load_global_16(u + chunk * 8, row < p.problem.seq);
    const ptx::Words4 o = ptx::load_global_16(output + chunk * 8, row < p.problem.seq);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float u_low = ptx::low(T{}, uu.word[i]), u_high = ptx::high(T{}, uu.word[i]);
      delta += ptx::low(T{}, du.word[i]) * u_low + ptx::high(T{}, du.word[i]) * u_high;
      delta -= ptx::low(T{}, g.word[i]) * (2.f * u_low - ptx::low(T{}, o.word[i]));
      delta -= ptx::high(T{}, g.word[i]) * (2.f * u_high - ptx::high(T{}, o.word[i]));
    }
  }
  ptx::store_shared(deltas + row * 4, delta);
}

// dK (`which` 0) or dV (1) of a group are sums over its query heads: in float32, each head adding its part to what the
// heads before it left in memory, and the last one writing the result.
template <class T, int DIM>
DEVICE void store_key_sum(float (&c)[WARP_TILES][DIM / 8][4], const ShortBackwardParams& p, const Tensor& result,
                          int which, int i, int first) {
  const Problem& problem = p.problem;
  const ShortWork work = short_work(problem, i);
  const bool last = i == problem.heads / problem.key_heads - 1;
  first = ptx::recompute(first);
  if (i > 0 || !last) {
    float* sum = p.workspace +
                 ((int64_t(work.batch) * problem.key_heads + work.key_head) * 2 + which) * problem.seq * DIM;
#pragma unroll
    for (int t = 0; t < WARP_TILES; t++)
#pragma unroll
      for (int n = 0; n < DIM / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int row = first + t * 16 + j / 2 * 8 + lane_index() / 4;
          float* element = sum + row * DIM + n * 8 + lane_index() % 4 * 2 + j % 2;
          c[t][n][j] += ptx::load_global(element, i > 0 && row < problem.seq);
          ptx::store_global(element, c[t][n][j], !last && row < problem.seq);
        }
  }
  if (last) store_fragments<T, DIM>(c, result, work.batch, work.key_head, first, problem.seq);
}

template <class T, int DIM, int ROWS>
__global__ void __launch_bounds__(ROWS, 1) short_backward(const ShortBackwardParams p) {
  using Tiling = ShortTiling<DIM, ROWS>;
  const Problem& problem = p.problem;
  const int seq = problem.seq, groups = problem.heads / problem.key_heads;
  const int lane = lane_index(), warp_row = short_warp_row(problem);

  // Shared memory: the span of queries that see each key; lse, then delta; queries; dU, then keys; dO, then two stages
  // of dS^T.
  const ptx::Address spans = ptx::shared_memory(), statistics = spans + Tiling::SPAN_BYTES;
  const ptx::Address query_tile = statistics + Tiling::STATISTICS_BYTES, grad_u_tile = query_tile + Tiling::TILE_BYTES;
  const ptx::Address key_tile = grad_u_tile, grad_output_tile = grad_u_tile + Tiling::TILE_BYTES;
  auto grad_scores_tile = [&](int parity) { return grad_output_tile + parity * Tiling::GRAD_SCORES_BYTES; };
  auto seen = [&] { return seen_by_warp(spans, warp_row, seq); };

#pragma unroll 1
  for (int i = 0; i < groups; i++) {
    ShortWeights<ROWS> weights;
    float sum[WARP_TILES][DIM / 8][4];
    auto set_sum_zero = [&] {
#pragma unroll
      for (int t = 0; t < WARP_TILES; t++) set_zero(sum[t]);
    };
    auto scale_sum = [&] {
      const float factor[2] = {problem.scale, problem.scale};
#pragma unroll
      for (int t = 0; t < WARP_TILES; t++) scale_rows(sum[t], factor);
    };
    auto multiply = [&](ptx::Address tile) {
      set_sum_zero();
      multiply_weights<T, DIM, ROWS>(sum, weights, tile, seen());
    };
    {  // A^T
      const ShortWork work = short_work(problem, i);
      load_head<DIM>(query_tile, p.query, work.batch, work.head, problem);
      load_statistics<ROWS>(statistics, p.lse + problem.first_statistic(work.batch, work.head), 0, seq);
      ptx::cp_async_commit();
      load_head<DIM>(grad_output_tile, p.grad_output, work.batch, work.head, problem);
      ptx::cp_async_commit();
      store_span(spans, ptx::thread_index(), queries_of(problem, work.batch, ptx::thread_index()));
      uint32_t key[WARP_TILES][DIM / 16][4];
      load_fragments<DIM>(key, p.key, work.batch, work.key_head, warp_row, seq);
      ptx::cp_async_wait<1>();
      ptx::sync_block();  // queries, lse and spans are there
      short_weights<T, DIM, ROWS>(weights, key, query_tile, statistics, spans, warp_row, seen(),
                                  problem.scale * LOG2_E);
      ptx::cp_async_wait<0>();
      ptx::sync_block();  // dO is there, and nobody reads lse any more
    }
    multiply(grad_output_tile);
    store_grad_u<T, DIM>(sum, p, short_work(problem, i), grad_u_tile, warp_row);
    ptx::sync_warp();
    store_delta<T, DIM>(p, short_work(problem, i), statistics, grad_u_tile, grad_output_tile, warp_row + lane);
    ptx::sync_block();  // dU and delta are complete

    multiply(grad_u_tile);
    store_key_sum<T, DIM>(sum, p, p.grad_value, 1, i, warp_row);

    {  // dS^T
      const ShortWork work = short_work(problem, i);
      uint32_t value[WARP_TILES][DIM / 16][4], negative_u[WARP_TILES][DIM / 16][4];
      load_fragments<DIM>(value, p.value, work.batch, work.key_head, warp_row, seq);
      load_fragments<DIM, true>(negative_u, p.u, work.batch, work.head, warp_row, seq);
      short_grad_scores<T, DIM, ROWS>(weights, value, negative_u, grad_u_tile, grad_output_tile, statistics, seen());
      ptx::sync_block();  // nobody reads dU and dO any more
      load_head<DIM>(key_tile, p.key, work.batch, work.key_head, problem);
      ptx::cp_async_commit();
    }
    multiply(query_tile);
    scale_sum();
    store_key_sum<T, DIM>(sum, p, p.grad_key, 0, i, warp_row);
    ptx::cp_async_wait<0>();

    {  // dQ: a warp has 32 queries here, and each step the warp with the next 32 keys gives its dS^T to all.
      const ShortWork work = short_work(problem, i);
      const int last_row = smaller(warp_row + WARP_ROWS, seq) - 1;
      const Span keys = {keys_of(problem, work.batch, warp_row).begin, keys_of(problem, work.batch, last_row).end};
      set_sum_zero();
#pragma unroll 1
      for (int first_key = 0, parity = 0; first_key <= padded_rows(problem); first_key += WARP_ROWS, parity ^= 1) {
        ptx::sync_block();  // keys and the last step's dS^T are there, and nobody reads that of the step before
        if (first_key == warp_row) {
#pragma unroll
          for (int t = 0; t < WARP_TILES; t++) store_operands<ROWS>(grad_scores_tile(parity), t * 16, 0, weights[t]);
        }
        const int last_key = first_key - WARP_ROWS;
        if (overlap(keys, last_key, WARP_ROWS))
          multiply_grad_scores<T, DIM, ROWS>(sum, grad_scores_tile(parity ^ 1), warp_row, key_tile, last_key);
      }
      scale_sum();
      store_fragments<T, DIM>(sum, p.grad_query, work.batch, work.head, warp_row, seq);
      ptx::sync_block();  // nobody reads dS^T any more
    }
  }
}

template <class T, int DIM>
ptx::Status run_short_backward(const ShortBackwardParams& p, ptx::Stream stream) {
  static_assert(short_fits<DIM>(1), "A and the accumulators take more registers than there are");
  auto launch = [&](auto kernel, int shared_bytes) {
    return launch_short(kernel, p.problem.key_heads, shared_bytes, stream, p);
  };
  if (p.problem.seq <= 128) return launch(short_backward<T, DIM, 128>, ShortTiling<DIM, 128>::BACKWARD_SHARED_BYTES);
  return launch(short_backward<T, DIM, 256>, ShortTiling<DIM, 256>::BACKWARD_SHARED_BYTES);
}

}  // namespace twicing
