// Causal forward in one launch (3 products of size seq^2 head_dim): U = A V and A U come from the same A.
//
// O_i = 2 U_i - sum over j <= i of A_ij U_j needs U only of rows that i sees, and all but the block's own are final when
// it comes to them. So a block of ROWS queries walks over its keys once, from the left; for each tile of keys it adds P V
// and P U under one running maximum. The rest of U, on the diagonal, is its own: there it finishes rows of U, hands them
// on (wavefront.cuh), and goes on to multiply P, which is still at hand, by them.
//
// With LAG 1 the product with U comes one tile late: the block hands on its U before it asks for that of the tile above.
// Blocks of a head then follow each other at half the distance, which matters if there are few heads.
#pragma once
#include "forward.cuh"
#include "wavefront.cuh"

namespace twicing {

struct WavefrontForwardParams : ForwardParams {  // of a causal problem
  int* workspace;  // wavefront_workspace_bytes, for this call alone
};

template <int DIM, int LAG>
struct WavefrontForwardTiling {
  static constexpr int ROWS = LAG == 0 ? 128 : 64;
  static constexpr int TILES = LAG == 0 && DIM <= 64 ? 2 : 1;  // above, U and A U take the registers
  static constexpr int WARPS = ROWS / (TILES * 16), THREADS = 32 * WARPS;
  static constexpr int KEYS = DIM * TILES <= 64 ? 64 : 32;
  static constexpr bool QUERY_IN_REGISTERS = false;
  static constexpr int QUERY_BYTES = ROWS * DIM * 2, TILE_BYTES = KEYS * DIM * 2;
  static constexpr int U_TILES = 1 + LAG;
  static constexpr int SHARED_BYTES = QUERY_BYTES + (2 * 2 + U_TILES) * TILE_BYTES + ROWS * 8 + NOTE_BYTES;
};

template <class T, int DIM, int LAG>
__global__ void __launch_bounds__(WavefrontForwardTiling<DIM, LAG>::THREADS, 1)
    wavefront_forward(const WavefrontForwardParams p) {
  using Tiling = WavefrontForwardTiling<DIM, LAG>;
  constexpr int TILES = Tiling::TILES, ROWS = Tiling::ROWS, KEYS = Tiling::KEYS, THREADS = Tiling::THREADS;
  constexpr int TILE_BYTES = Tiling::TILE_BYTES;
  const Problem& problem = p.problem;

  // Shared memory: the block's queries; two stages of keys and values; U; spans of keys; a note.
  const ptx::Address query_tile = ptx::shared_memory(), stages = query_tile + Tiling::QUERY_BYTES;
  const ptx::Address u_tiles = stages + 2 * 2 * TILE_BYTES, spans = u_tiles + Tiling::U_TILES * TILE_BYTES;
  const ptx::Address note = spans + ROWS * 8;
  auto key_tile_of = [&](int tile) { return stages + tile % 2 * 2 * TILE_BYTES; };
  auto u_tile_of = [&](int tile) { return u_tiles + tile % Tiling::U_TILES * TILE_BYTES; };

  const Work work = work_of(take_ticket(p.workspace, note), problem.heads, problem.batch);
  const int lane = lane_index(), warp_row = warp_index() * TILES * 16;
  const int first_row = work.block * ROWS, end_row = smaller(first_row + ROWS, problem.seq);
  const float scale_log2 = problem.scale * LOG2_E;

  // Tiles of keys: from `begin` other blocks', from `own` the block's, before `end`.
  const int begin = keys_of(problem, work.batch, first_row).begin / KEYS, own = first_row / KEYS;
  const int end = (end_row + KEYS - 1) / KEYS, warp_own = (first_row + warp_row) / KEYS;
  auto start_copies = [&](int tile) {
    const int key_head = problem.key_head(ptx::recompute(work.head));
    const ptx::Address key_tile = key_tile_of(tile);
    load_tile<DIM, KEYS, THREADS>(key_tile, p.key.rows(work.batch, key_head), p.key.row_stride, tile * KEYS, end_row);
    load_tile<DIM, KEYS, THREADS>(key_tile + TILE_BYTES, p.value.rows(work.batch, key_head), p.value.row_stride,
                                  tile * KEYS, end_row);
  };
  auto start_copy_of_u = [&](int tile) {
    load_tile<DIM, KEYS, THREADS>(u_tile_of(tile), p.u.rows(work.batch, ptx::recompute(work.head)), p.u.row_stride,
                                  tile * KEYS, end_row);
  };
  auto flag_of = [&](int tile) {
    const int tiles = (problem.seq + KEYS - 1) / KEYS;
    return p.workspace + 1 + int64_t(work.batch * problem.heads + ptx::recompute(work.head)) * tiles + tile;
  };
  load_tile<DIM, ROWS, THREADS>(query_tile, p.query.rows(work.batch, work.head), p.query.row_stride, first_row,
                                problem.seq);
  start_copies(begin);
  ptx::cp_async_commit();
  store_spans<ROWS, THREADS>(spans, [&](int row) { return keys_of(problem, work.batch, first_row + row); });

  // Sums over the keys so far: of P V and P U, and of P, of which 1 / sum is kept once it is complete.
  float u[TILES][DIM / 8][4], a_u[TILES][DIM / 8][4], maximum[TILES][2], sum[TILES][2], rescale[TILES][2];
  uint32_t weights[1 + LAG][TILES][KEYS / 16][4];  // of this tile, and of the one before
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    set_zero(u[t]);
    set_zero(a_u[t]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      maximum[t][half] = -INFINITY;
      sum[t][half] = 0.f;
    }
  }

  int ready = begin;  // tiles of U before this one are known to be final
#pragma unroll 1
  for (int tile = begin; tile < end + LAG; tile++) {
    const int u_tile = tile - LAG;  // whose U is added in this step
    const bool of_others = u_tile >= begin && u_tile < own, early = of_others && u_tile < ready;
    const bool sees = tile <= smaller(warp_own, end - 1);  // else none of the warp's rows does
    ptx::cp_async_wait<0>();
    ptx::sync_block();  // keys and values have arrived, and nobody reads the other stage, or what was in U's place
    if (early) start_copy_of_u(u_tile);
    ptx::cp_async_commit();
    if (tile + 1 < end) start_copies(tile + 1);
    ptx::cp_async_commit();

    if (sees) {
      const ptx::Address key_tile = key_tile_of(tile);
      float scores[TILES][KEYS / 8][4];
      const uint32_t in_shared_memory[TILES][DIM / 16][4] = {};
      multiply_query_key<T, DIM, Tiling>(scores, in_shared_memory, query_tile, warp_row, key_tile);
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        hide_keys(scores[t], tile * KEYS, spans, warp_row + t * 16);
        online_softmax(scores[t], maximum[t], sum[t], rescale[t], scale_log2);
        scale_rows(u[t], rescale[t]);
        if (LAG == 0) scale_rows(a_u[t], rescale[t]);
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) pack_a<T>(weights[0][t][k], scores[t][2 * k], scores[t][2 * k + 1]);
      }
      multiply_values<T, DIM>(u, weights[0], key_tile + TILE_BYTES);
    }

    if (tile >= own && tile < end) {
      if (tile == warp_own) {
        // These rows of U are final: to shared memory for this block, to memory for the others.
#pragma unroll
        for (int t = 0; t < TILES; t++) {
          const int tile_row = warp_row + t * 16;
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int row = first_row + tile_row + half * 8 + lane / 4;
            const bool exists = row < problem.seq;
            const float total = sum_over_row(sum[t][half]);
            const float lse = LN_2 * (maximum[t][half] * scale_log2 + ptx::log2(total));
            float* lse_of_row = p.lse + problem.first_statistic(work.batch, work.head) + row;
            ptx::store_global(lse_of_row, lse, lane % 4 == 0 && exists);
            sum[t][half] = exists ? ptx::reciprocal(total) : 0.f;
          }
          scale_rows(u[t], sum[t]);
          float copy[DIM / 8][4];
#pragma unroll
          for (int n = 0; n < DIM / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) copy[n][i] = u[t][n][i];
          store_rows<T, DIM>(copy, u_tile_of(tile), tile_row % KEYS, p.u.rows(work.batch, work.head), p.u.row_stride,
                             first_row + tile_row, problem.seq);
        }
      }
      publish_tile(flag_of(tile));
    }

    if (of_others && !early) {
      ready = u_tile + await_tiles(flag_of(u_tile), own - u_tile, note);
      start_copy_of_u(u_tile);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
    } else {
      ptx::cp_async_wait<1>();
    }
    ptx::sync_block();  // U has arrived
    if (u_tile >= begin && u_tile <= warp_own) multiply_values<T, DIM>(a_u, weights[LAG], u_tile_of(u_tile));
    if (LAG == 1 && sees) {
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        scale_rows(a_u[t], rescale[t]);
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++)
#pragma unroll
          for (int i = 0; i < 4; i++) weights[LAG][t][k][i] = weights[0][t][k][i];
      }
    }
  }

#pragma unroll
  for (int t = 0; t < TILES; t++) {
    const int tile_row = warp_row + t * 16;
#pragma unroll
    for (int n = 0; n < DIM / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) a_u[t][n][i] = 2.f * u[t][n][i] - sum[t][i / 2] * a_u[t][n][i];
    store_rows<T, DIM>(a_u[t], query_tile, tile_row, p.output.rows(work.batch, work.head), p.output.row_stride,
                       first_row + tile_row, problem.seq);
  }
}

template <class T, int DIM, int LAG>
ptx::Status run_wavefront_forward(const WavefrontForwardParams& p, ptx::Stream stream) {
  using Tiling = WavefrontForwardTiling<DIM, LAG>;
  const Problem& problem = p.problem;
  const ptx::Status status = ptx::fill_zero(p.workspace, wavefront_workspace_bytes(problem), stream);
  if (status != ptx::SUCCESS) return status;
  const int64_t row_blocks = (problem.seq + Tiling::ROWS - 1) / Tiling::ROWS;
  return ptx::launch(wavefront_forward<T, DIM, LAG>, row_blocks * problem.heads * problem.batch, Tiling::THREADS,
                     Tiling::SHARED_BYTES, stream, p);
}

}  // namespace twicing
