// Causal backward in one launch (7 products of size seq^2 head_dim): dU, delta and all that needs them come from one A.
//
// dS of row i needs dU_i = 2 dO_i - sum over k >= i of A_ki dO_k, all but the last part of which lies behind a block of
// keys. So a block of OWN keys walks over the queries that see them once, from the end; dU and delta of a tile of queries
// behind the block are final when it comes to them. Its own are on the diagonal, where it completes dU, hands the tile on
// (wavefront.cuh), and goes on with A, which is still at hand.
//
// Scores are transposed, [key][query], as in backward.cuh. P^T and dS^T go through shared memory, from where each warp takes
// 16 keys of them to multiply with its share of dO's, dU's and Q's columns: at head_dim 128 three sums of all columns would
// not fit the registers.
//
// Query heads that share keys follow each other in one block, which sums their dV and dK. dQ is summed in float32 in any
// order; or, to be deterministic, by backward_query in a launch of its own (6 + 4 products).
#pragma once
#include "backward.cuh"
#include "wavefront.cuh"

namespace twicing {

struct WavefrontBackwardParams : BackwardParams {  // of a causal problem
  int* workspace;  // wavefront_workspace_bytes, for this call alone
};

template <int DIM>
struct WavefrontBackwardTiling {
  static constexpr int OWN = 64, OTHER = DIM == 16 ? 64 : 32;  // keys of the block; queries at a time
  static constexpr int ROW_GROUPS = OWN / 16, COLUMN_GROUPS = DIM <= 64 ? 1 : 2;
  static constexpr int WARPS = ROW_GROUPS * COLUMN_GROUPS, THREADS = 32 * WARPS;
  static constexpr int COLUMNS = DIM / COLUMN_GROUPS, QUERIES = OTHER / COLUMN_GROUPS;  // of a warp
  static constexpr int OWN_BYTES = OWN * DIM * 2, OTHER_BYTES = OTHER * DIM * 2, STATISTICS_BYTES = OTHER * 4;
  static constexpr int STAGE_BYTES = 2 * OTHER_BYTES + STATISTICS_BYTES;
  static constexpr int WEIGHTS_BYTES = OWN * OTHER * 2, PARTS_BYTES = COLUMN_GROUPS * OTHER * 16;
  static constexpr int SHARED_BYTES = 3 * OWN_BYTES + 2 * STAGE_BYTES + OTHER_BYTES + STATISTICS_BYTES +
                                      2 * WEIGHTS_BYTES + PARTS_BYTES + OWN * 8 + NOTE_BYTES;
};

// c[16][COLUMNS] += A B, with A in rows a_row.. of a tile of INNER columns, and columns b_column.. of B.
template <class T, int DIM, int INNER, int COLUMNS>
DEVICE void multiply_tiles(float (&c)[COLUMNS / 8][4], ptx::Address a_tile, int a_row, ptx::Address b_tile,
                           int b_column) {
#pragma unroll
  for (int k = 0; k < INNER; k += 16) {
    uint32_t a[4];
    load_a<INNER>(a, a_tile, a_row, k);
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n += 2) {
      uint32_t b[4];
      load_b<DIM>(b, b_tile, k, b_column + n * 8);
      multiply_pair<T>(c[n], c[n + 1], a, b);
    }
  }
}

template <class T, int DIM, bool ADD_QUERY>
__global__ void __launch_bounds__(WavefrontBackwardTiling<DIM>::THREADS, 1)
    wavefront_backward(const WavefrontBackwardParams p) {
  using Tiling = WavefrontBackwardTiling<DIM>;
  constexpr int OWN = Tiling::OWN, OTHER = Tiling::OTHER, THREADS = Tiling::THREADS;
  constexpr int COLUMNS = Tiling::COLUMNS, QUERIES = Tiling::QUERIES;
  const Problem& problem = p.problem;

  // Shared memory: the block's keys, values and U; two stages of queries, dO and lse; dU and delta; P^T; dS^T; parts of
  // delta; spans of queries; a note.
  const ptx::Address key_tile = ptx::shared_memory(), value_tile = key_tile + Tiling::OWN_BYTES;
  const ptx::Address u_tile = value_tile + Tiling::OWN_BYTES, stages = u_tile + Tiling::OWN_BYTES;
  const ptx::Address grad_u_tile = stages + 2 * Tiling::STAGE_BYTES, delta = grad_u_tile + Tiling::OTHER_BYTES;
  const ptx::Address weights_tile = delta + Tiling::STATISTICS_BYTES;
  const ptx::Address grad_scores_tile = weights_tile + Tiling::WEIGHTS_BYTES;
  const ptx::Address parts = grad_scores_tile + Tiling::WEIGHTS_BYTES, spans = parts + Tiling::PARTS_BYTES;
  const ptx::Address note = spans + OWN * 8;
  auto query_tile_of = [&](int tile) { return stages + tile % 2 * Tiling::STAGE_BYTES; };

  Work work = work_of(take_ticket(p.workspace, note), problem.key_heads, problem.batch);
  work.block = (problem.seq - 1) / OWN - work.block;  // from the end
  const int lane = lane_index(), row_group = warp_index() % Tiling::ROW_GROUPS;
  const int column_group = Tiling::COLUMN_GROUPS == 1 ? 0 : warp_index() / Tiling::ROW_GROUPS;
  const int warp_key = row_group * 16, warp_query = column_group * QUERIES, warp_column = column_group * COLUMNS;
  const int first_key = work.block * OWN, last_key = smaller(first_key + OWN, problem.seq) - 1;
  const float scale_log2 = problem.scale * LOG2_E;

  // Tiles of queries: from `first` the block's own, from `others` to `last` those behind it.
  const int end = queries_of(problem, work.batch, last_key).end;
  const int first = first_key / OTHER, others = first + OWN / OTHER, last = (end - 1) / OTHER;
  auto start_copies = [&](int tile, int head) {
    const ptx::Address query_tile = query_tile_of(tile), grad_output_tile = query_tile + Tiling::OTHER_BYTES;
    load_tile<DIM, OTHER, THREADS>(query_tile, p.query.rows(work.batch, head), p.query.row_stride, tile * OTHER, end);
    load_tile<DIM, OTHER, THREADS>(grad_output_tile, p.grad_output.rows(work.batch, head), p.grad_output.row_stride,
                                   tile * OTHER, end);
    load_statistics<OTHER>(grad_output_tile + Tiling::OTHER_BYTES, p.lse + problem.first_statistic(work.batch, head),
                           tile * OTHER, end);
  };
  auto start_copy_of_grad_u = [&](int tile, int head) {
    load_tile<DIM, OTHER, THREADS>(grad_u_tile, p.grad_u.rows(work.batch, head), p.grad_u.row_stride, tile * OTHER, end);
    load_statistics<OTHER>(delta, p.delta + problem.first_statistic(work.batch, head), tile * OTHER, end);
  };
  auto flag_of = [&](int tile, int head) {  // in the order in which tiles become final
    const int tiles = (problem.seq + OTHER - 1) / OTHER;
    return p.workspace + 1 + int64_t(work.batch * problem.heads + head) * tiles + tiles - 1 - tile;
  };
  load_tile<DIM, OWN, THREADS>(key_tile, p.key.rows(work.batch, work.head), p.key.row_stride, first_key, problem.seq);
  load_tile<DIM, OWN, THREADS>(value_tile, p.value.rows(work.batch, work.head), p.value.row_stride, first_key,
                               problem.seq);
  store_spans<OWN, THREADS>(spans, [&](int row) { return queries_of(problem, work.batch, first_key + row); });

  float grad_value[COLUMNS / 8][4], grad_key[COLUMNS / 8][4];
  set_zero(grad_value);
  set_zero(grad_key);
  const int groups = problem.heads / problem.key_heads;
#pragma unroll 1
  for (int head = work.head * groups; head < (work.head + 1) * groups; head++) {
    float sum[COLUMNS / 8][4];  // A^T dO
    set_zero(sum);
    load_tile<DIM, OWN, THREADS>(u_tile, p.u.rows(work.batch, head), p.u.row_stride, first_key, problem.seq);
    start_copies(last, head);
    ptx::cp_async_commit();

    int final_from = last + 1;  // dU and delta of this tile and those behind it are known to be final
#pragma unroll 1
    for (int tile = last; tile >= first; tile--) {
      const bool early = tile >= larger(final_from, others);
      ptx::cp_async_wait<0>();
      ptx::sync_block();  // queries and dO have arrived, and nobody reads the other stage, dU, P^T or dS^T any more
      if (early) start_copy_of_grad_u(tile, head);
      ptx::cp_async_commit();
      if (tile > first) start_copies(tile - 1, head);
      ptx::cp_async_commit();

      const ptx::Address query_tile = query_tile_of(tile), grad_output_tile = query_tile + Tiling::OTHER_BYTES;
      const ptx::Address lse = grad_output_tile + Tiling::OTHER_BYTES;
      float weights[QUERIES / 8][4];
      uint32_t a[QUERIES / 16][4];
      set_zero(weights);
      multiply_rows<T, DIM, QUERIES / 8>(weights, key_tile, warp_key, query_tile, warp_query);
      weights_from_scores(weights, scale_log2, lse + warp_query * 4, tile * OTHER + warp_query, spans, warp_key);
      pack_all<T>(a, weights);
      store_operands<OTHER>(weights_tile, warp_key, warp_query, a);
      ptx::sync_block();  // P^T is complete
      multiply_tiles<T, DIM, OTHER, COLUMNS>(sum, weights_tile, warp_key, grad_output_tile, warp_column);

      if (tile < others) {
        const int tile_row = ptx::recompute(first_key + warp_key - tile * OTHER);
        if (tile_row >= 0 && tile_row < OTHER) {
          // These rows of dU are final: to shared memory for this block, to memory for the others.
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int row = tile_row + half * 8 + lane / 4;
            const float part =
                grad_u_and_delta<T, COLUMNS>(sum, half, p, work.batch, head, tile * OTHER + row, warp_column);
            ptx::store_shared(parts + ((column_group * OTHER + row) * 4 + lane % 4) * 4, part);
          }
          store_rows<T, DIM, COLUMNS>(sum, grad_u_tile, tile_row, p.grad_u.rows(work.batch, head), p.grad_u.row_stride,
                                      tile * OTHER + tile_row, problem.seq, warp_column);
        }
        ptx::sync_block();  // all parts of delta are there
        if (ptx::thread_index() < OTHER) {
          const int row = ptx::thread_index();
          float total = 0.f, pair[2];
#pragma unroll
          for (int i = 0; i < 2 * Tiling::COLUMN_GROUPS; i++) {
            ptx::load_shared(parts + (i / 2 * OTHER + row) * 16 + i % 2 * 8, pair);
            total += pair[0] + pair[1];
          }
          ptx::store_shared(delta + row * 4, total);
          float* of_row = p.delta + problem.first_statistic(work.batch, head) + tile * OTHER + row;
          ptx::store_global(of_row, total, tile * OTHER + row < problem.seq);
        }
        publish_tile(flag_of(tile, head));
      } else if (!early) {
        final_from = tile + 1 - await_tiles(flag_of(tile, head), tile - others + 1, note);
        start_copy_of_grad_u(tile, head);
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
      } else {
        ptx::cp_async_wait<1>();
      }
      ptx::sync_block();  // dU and delta have arrived

      multiply_tiles<T, DIM, OTHER, COLUMNS>(grad_value, weights_tile, warp_key, grad_u_tile, warp_column);
      float grad_scores[QUERIES / 8][4];
      set_zero(grad_scores);
      multiply_rows<T, DIM, QUERIES / 8>(grad_scores, value_tile, warp_key, grad_u_tile, warp_query);
      multiply_rows<T, DIM, QUERIES / 8, true>(grad_scores, u_tile, warp_key, grad_output_tile, warp_query);
      grad_scores_from_weights(grad_scores, weights, delta + warp_query * 4);
      pack_all<T>(a, grad_scores);
      store_operands<OTHER>(grad_scores_tile, warp_key, warp_query, a);
      ptx::sync_block();  // dS^T is complete
      multiply_tiles<T, DIM, OTHER, COLUMNS>(grad_key, grad_scores_tile, warp_key, query_tile, warp_column);
      if (ADD_QUERY) add_grad_query<T, DIM, Tiling>(p, work.batch, head, grad_scores_tile, key_tile, tile * OTHER, end);
    }
    ptx::sync_block();  // nobody reads keys, U or a stage any more
  }

#pragma unroll
  for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) grad_key[n][i] *= problem.scale;
  store_rows<T, DIM, COLUMNS>(grad_key, key_tile, warp_key, p.grad_key.rows(work.batch, work.head),
                              p.grad_key.row_stride, first_key + warp_key, problem.seq, warp_column);
  store_rows<T, DIM, COLUMNS>(grad_value, value_tile, warp_key, p.grad_value.rows(work.batch, work.head),
                              p.grad_value.row_stride, first_key + warp_key, problem.seq, warp_column);
}

template <class T, int DIM>
ptx::Status run_wavefront_backward(const WavefrontBackwardParams& p, ptx::Stream stream) {
  using Tiling = WavefrontBackwardTiling<DIM>;
  const Problem& problem = p.problem;
  const int64_t blocks = (problem.seq + Tiling::OWN - 1) / Tiling::OWN * int64_t(problem.batch) * problem.key_heads;
  const ptx::Status status = ptx::fill_zero(p.workspace, wavefront_workspace_bytes(problem), stream);
  if (status != ptx::SUCCESS) return status;
  return run_with_grad_query<T, DIM>(p, stream, [&](auto add_query) {
    return ptx::launch(wavefront_backward<T, DIM, add_query.value>, blocks, Tiling::THREADS, Tiling::SHARED_BYTES,
                       stream, p);
  });
}

}  // namespace twicing
