// Backward for sequences of any length. A is computed again from the log-sum-exp; with dO given and U = A V,
//
//     dU = 2 dO - A^T dO      delta_i = dU_i . U_i - dO_i . (2 U_i - O_i)
//     dS = A * (dU V^T - dO U^T - delta)
//     dV = A^T dU             dK = scale dS^T Q             dQ = scale dS K
//
// dS needs dU of all rows, so there are two launches: backward_u (2 products of size seq^2 head_dim) and backward_keys
// (6). In both a block of threads has 64 keys and walks over the queries that see them; a warp has 16 of the keys, as
// rows of S^T = K Q^T, so that P^T and dS^T leave the tensor cores as left operands of the products with dO, dU and Q.
//
// dQ sums over blocks. Either backward_keys adds its parts in float32 in whatever order blocks come, and round_query
// makes elements of the sums; or, to be the same bits in each run, backward_query computes dQ on its own, a block of
// queries at a time, at the price of computing S and dS twice (2 + 5 + 4 products).
#pragma once
#include <type_traits>

#include "forward.cuh"

namespace twicing {

struct BackwardParams {
  Problem problem;
  Tensor query, key, value, output, u, grad_output;  // given
  Tensor grad_u;                                     // scratch, of the queries' shape
  Tensor grad_query, grad_key, grad_value;
  const float* lse;       // (batch, heads, seq), as the forward left it
  float* delta;           // scratch, as lse
  float* grad_query_sum;  // scratch, (batch, heads, seq, head_dim) without gaps; null: dQ is to be deterministic
};

// Of all three kernels: OWN rows stay, the others come OTHER at a time.
template <int DIM>
struct BackwardTiling {
  static constexpr int WARPS = 4, THREADS = 32 * WARPS;
  static constexpr int OWN = WARPS * 16, OTHER = DIM == 16 ? 64 : 32;
  static constexpr int OWN_BYTES = OWN * DIM * 2, OTHER_BYTES = OTHER * DIM * 2;
  static constexpr int STATISTICS_BYTES = OTHER * 4, SPAN_BYTES = OWN * 8;

  // Stages of what comes: two, so that one is copied while the other is used, if 99 KB hold them.
  static constexpr int STAGES = DIM <= 96 ? 2 : 1;  // of backward_keys

  static constexpr int U_STAGE_BYTES = 2 * OTHER_BYTES + STATISTICS_BYTES;
  static constexpr int U_SHARED_BYTES = OWN_BYTES + 2 * U_STAGE_BYTES + SPAN_BYTES;
  static constexpr int KEYS_STAGE_BYTES = 3 * OTHER_BYTES + 2 * STATISTICS_BYTES;
  static constexpr int KEYS_SHARED_BYTES = 3 * OWN_BYTES + STAGES * KEYS_STAGE_BYTES + OWN * OTHER * 2 + SPAN_BYTES;
  static constexpr int QUERY_STAGE_BYTES = 3 * OTHER_BYTES;
  static constexpr int QUERY_SHARED_BYTES = 3 * OWN_BYTES + 2 * QUERY_STAGE_BYTES + SPAN_BYTES;
};

// Starts the copy of one number a query.
template <int COUNT>
DEVICE void load_statistics(ptx::Address tile, const float* of_row, int first, int end) {
  const int i = ptx::thread_index();
  if (i < COUNT) ptx::cp_async_4(tile + i * 4, of_row + first + i, first + i < end);
}

// The numbers of the two columns that the thread has of an 8-column fragment.
DEVICE void load_pair(float (&pair)[2], ptx::Address statistics, int column) {
  ptx::load_shared(statistics + (column + lane_index() % 4 * 2) * 4, pair);
}

// Transposed scores, [key][query], become attention weights, 0 where the query does not see the key.
template <int COLUMNS>
DEVICE void weights_from_scores(float (&scores)[COLUMNS][4], float scale_log2, ptx::Address lse, int first_query,
                                ptx::Address spans, int tile_row) {
  Span queries[2];
#pragma unroll
  for (int half = 0; half < 2; half++) queries[half] = load_span(spans, tile_row + half * 8 + lane_index() / 4);
#pragma unroll
  for (int n = 0; n < COLUMNS; n++) {
    float lse_of[2];
    load_pair(lse_of, lse, n * 8);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int query = first_query + n * 8 + lane_index() % 4 * 2 + i % 2;
      const bool visible = query >= queries[i / 2].begin && query < queries[i / 2].end;
      const float weight = ptx::exp2(scores[n][i] * scale_log2 - LOG2_E * lse_of[i % 2]);
      scores[n][i] = visible ? weight : 0.f;
    }
  }
}

// Transposed, [key][query]: dA becomes dS = A * (dA - delta).
template <int COLUMNS>
DEVICE void grad_scores_from_weights(float (&grad)[COLUMNS][4], const float (&weights)[COLUMNS][4],
                                     ptx::Address delta) {
#pragma unroll
  for (int n = 0; n < COLUMNS; n++) {
    float delta_of[2];
    load_pair(delta_of, delta, n * 8);
#pragma unroll
    for (int i = 0; i < 4; i++) grad[n][i] = weights[n][i] * (grad[n][i] - delta_of[i % 2]);
  }
}

template <class T, int COLUMNS>
DEVICE void pack_all(uint32_t (&a)[COLUMNS / 2][4], const float (&c)[COLUMNS][4]) {
#pragma unroll
  for (int k = 0; k < COLUMNS / 2; k++) pack_a<T>(a[k], c[2 * k], c[2 * k + 1]);
}

// Left operands, as a warp has them, to 16 rows of a tile, from a column on.
template <int WIDTH, int BLOCKS>
DEVICE void store_operands(ptx::Address tile, int row, int column, const uint32_t (&a)[BLOCKS][4]) {
#pragma unroll
  for (int n = 0; n < 2 * BLOCKS; n++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t chunk = Swizzle<WIDTH>::offset(row + half * 8 + lane_index() / 4, column / 8 + n);
      ptx::store_shared(tile + chunk + lane_index() % 4 * 4, a[n / 2][n % 2 * 2 + half]);
    }
}

// From A^T dO to dU, in one of the two rows that a thread has of a fragment, and some of its columns; returns what the
// thread's part of these columns adds to the row's delta.
template <class T, int COLUMNS>
DEVICE float grad_u_and_delta(float (&sum)[COLUMNS / 8][4], int half, const BackwardParams& p, int batch, int head,
                              int row, int first_column) {
  const bool exists = row < p.problem.seq;
  const uint16_t* grad_output = p.grad_output.rows(batch, head) + row * p.grad_output.row_stride;
  const uint16_t* u = p.u.rows(batch, head) + row * p.u.row_stride;
  const uint16_t* output = p.output.rows(batch, head) + row * p.output.row_stride;
  float delta = 0.f;
#pragma unroll
  for (int n = 0; n < COLUMNS / 8; n++) {
    const int column = first_column + n * 8 + lane_index() % 4 * 2;
    const uint32_t g = ptx::load_global(grad_output + column, exists);
    const uint32_t uu = ptx::load_global(u + column, exists);
    const uint32_t o = ptx::load_global(output + column, exists);
    float(&pair)[4] = sum[n];
    pair[2 * half] = 2.f * ptx::low(T{}, g) - pair[2 * half];
    pair[2 * half + 1] = 2.f * ptx::high(T{}, g) - pair[2 * half + 1];
    // Of dU as rounded: delta is to cancel what the products make of those elements.
    const uint32_t grad_u = ptx::pack(T{}, pair[2 * half], pair[2 * half + 1]);
    delta += ptx::low(T{}, grad_u) * ptx::low(T{}, uu) + ptx::high(T{}, grad_u) * ptx::high(T{}, uu);
    delta -= ptx::low(T{}, g) * (2.f * ptx::low(T{}, uu) - ptx::low(T{}, o));
    delta -= ptx::high(T{}, g) * (2.f * ptx::high(T{}, uu) - ptx::high(T{}, o));
  }
  return delta;
}

// Adds dS K of all the block's keys to dQ; each warp has 16 of the queries and some columns.
template <class T, int DIM, class Tiling>
DEVICE void add_grad_query(const BackwardParams& p, int batch, int head, ptx::Address grad_scores_tile,
                           ptx::Address key_tile, int first_query, int end) {
  constexpr int QUERY_GROUPS = Tiling::OTHER / 16, COLUMN_GROUPS = Tiling::WARPS / QUERY_GROUPS;
  constexpr int COLUMNS = (DIM / 16 + COLUMN_GROUPS - 1) / COLUMN_GROUPS * 16;
  const int tile_query = warp_index() % QUERY_GROUPS * 16, column = warp_index() / QUERY_GROUPS * COLUMNS;
  if (COLUMNS * COLUMN_GROUPS > DIM && column >= DIM) return;  // 96 columns for 4 warps: three have 32
  float grad_query[COLUMNS / 8][4];
  set_zero(grad_query);
#pragma unroll
  for (int k = 0; k < Tiling::OWN; k += 16) {
    uint32_t grad_scores[4];
    load_a_from_columns<Tiling::OTHER>(grad_scores, grad_scores_tile, tile_query, k);
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n += 2) {
      uint32_t b[4];
      load_b<DIM>(b, key_tile, k, column + n * 8);
      multiply_pair<T>(grad_query[n], grad_query[n + 1], grad_scores, b);
    }
  }
  const int query = first_query + tile_query + lane_index() / 4;
  float* sum = p.grad_query_sum + (p.problem.first_statistic(batch, head) + query) * DIM + column;
#pragma unroll
  for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      ptx::reduce_add_global(sum + i / 2 * 8 * DIM + n * 8 + lane_index() % 4 * 2 + i % 2, grad_query[n][i],
                             query + i / 2 * 8 < end);
}

// dU and delta.
template <class T, int DIM>
__global__ void __launch_bounds__(BackwardTiling<DIM>::THREADS, 1) backward_u(const BackwardParams p) {
  using Tiling = BackwardTiling<DIM>;
  constexpr int OWN = Tiling::OWN, OTHER = Tiling::OTHER, THREADS = Tiling::THREADS;
  const Problem& problem = p.problem;
  const Work work = work_of(ptx::block_index(), problem.heads, problem.batch);
  const int lane = lane_index(), warp_row = warp_index() * 16, first_key = work.block * OWN;
  const int last_key = smaller(first_key + OWN, problem.seq) - 1;
  const float scale_log2 = problem.scale * LOG2_E;
  const int64_t first_statistic = problem.first_statistic(work.batch, work.head);

  // Shared memory: the block's keys; two stages of queries, dO and lse; the span of queries that see each key.
  const ptx::Address key_tile = ptx::shared_memory(), stages = key_tile + Tiling::OWN_BYTES;
  const ptx::Address spans = stages + 2 * Tiling::U_STAGE_BYTES;
  auto stage = [&](int parity) { return stages + parity * Tiling::U_STAGE_BYTES; };

  const int begin = queries_of(problem, work.batch, first_key).begin;
  const int end = queries_of(problem, work.batch, last_key).end;
  auto start_copies = [&](int parity, int first_query) {
    const ptx::Address tile = stage(parity);
    const uint16_t* query = p.query.rows(work.batch, work.head);
    const uint16_t* grad_output = p.grad_output.rows(work.batch, work.head);
    load_tile<DIM, OTHER, THREADS>(tile, query, p.query.row_stride, first_query, end);
    load_tile<DIM, OTHER, THREADS>(tile + Tiling::OTHER_BYTES, grad_output, p.grad_output.row_stride, first_query, end);
    load_statistics<OTHER>(tile + 2 * Tiling::OTHER_BYTES, p.lse + first_statistic, first_query, end);
    ptx::cp_async_commit();
  };
  load_tile<DIM, OWN, THREADS>(key_tile, p.key.rows(work.batch, problem.key_head(work.head)), p.key.row_stride,
                               first_key, problem.seq);
  start_copies(0, begin);
  store_spans<OWN, THREADS>(spans, [&](int row) { return queries_of(problem, work.batch, first_key + row); });

  float sum[DIM / 8][4];  // A^T dO
  set_zero(sum);
#pragma unroll 1
  for (int first_query = begin, parity = 0; first_query < end; first_query += OTHER, parity ^= 1) {
    ptx::cp_async_wait<0>();
    ptx::sync_block();  // this stage has arrived, and nobody reads the other any more
    if (first_query + OTHER < end) start_copies(parity ^ 1, first_query + OTHER);

    const ptx::Address query_tile = stage(parity), grad_output_tile = query_tile + Tiling::OTHER_BYTES;
    const ptx::Address lse = query_tile + 2 * Tiling::OTHER_BYTES;
    float scores[OTHER / 8][4];
    set_zero(scores);
    multiply_rows<T, DIM, OTHER / 8>(scores, key_tile, warp_row, query_tile, 0);
    weights_from_scores(scores, scale_log2, lse, first_query, spans, warp_row);
    uint32_t weights[OTHER / 16][4];
    pack_all<T>(weights, scores);
    multiply_registers<T, DIM, OTHER / 16>(sum, weights, grad_output_tile);
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = first_key + warp_row + half * 8 + lane / 4;
    const float delta = sum_over_row(grad_u_and_delta<T, DIM>(sum, half, p, work.batch, work.head, row, 0));
    ptx::store_global(p.delta + first_statistic + row, delta, row < problem.seq && lane % 4 == 0);
  }
  store_rows<T, DIM>(sum, key_tile, warp_row, p.grad_u.rows(work.batch, work.head), p.grad_u.row_stride,
                     first_key + warp_row, problem.seq);
}

// dV and dK of 64 keys, summed over the query heads that share them; with ADD_QUERY also their part of dQ.
template <class T, int DIM, bool ADD_QUERY>
__global__ void __launch_bounds__(BackwardTiling<DIM>::THREADS, 1) backward_keys(const BackwardParams p) {
  using Tiling = BackwardTiling<DIM>;
  constexpr int OWN = Tiling::OWN, OTHER = Tiling::OTHER, THREADS = Tiling::THREADS, STAGES = Tiling::STAGES;
  const Problem& problem = p.problem;
  const Work work = work_of(ptx::block_index(), problem.key_heads, problem.batch);
  const int warp_row = warp_index() * 16, first_key = work.block * OWN;
  const int last_key = smaller(first_key + OWN, problem.seq) - 1;
  const float scale_log2 = problem.scale * LOG2_E;

  // Shared memory: the block's keys, values and U; stages of queries, dO, dU, lse and delta; dS^T; spans.
  const ptx::Address key_tile = ptx::shared_memory(), value_tile = key_tile + Tiling::OWN_BYTES;
  const ptx::Address u_tile = value_tile + Tiling::OWN_BYTES, stages = u_tile + Tiling::OWN_BYTES;
  const ptx::Address grad_scores_tile = stages + STAGES * Tiling::KEYS_STAGE_BYTES;
  const ptx::Address spans = grad_scores_tile + OWN * OTHER * 2;

  const int begin = queries_of(problem, work.batch, first_key).begin;
  const int end = queries_of(problem, work.batch, last_key).end;
  auto start_copies = [&](ptx::Address tile, int head, int first_query) {
    head = ptx::recompute(head);
    const int64_t first_statistic = problem.first_statistic(work.batch, head);
    for (const Tensor* tensor : {&p.query, &p.grad_output, &p.grad_u}) {
      load_tile<DIM, OTHER, THREADS>(tile, tensor->rows(work.batch, head), tensor->row_stride, first_query, end);
      tile += Tiling::OTHER_BYTES;
    }
    load_statistics<OTHER>(tile, p.lse + first_statistic, first_query, end);
    load_statistics<OTHER>(tile + Tiling::STATISTICS_BYTES, p.delta + first_statistic, first_query, end);
  };
  load_tile<DIM, OWN, THREADS>(key_tile, p.key.rows(work.batch, work.head), p.key.row_stride, first_key, problem.seq);
  load_tile<DIM, OWN, THREADS>(value_tile, p.value.rows(work.batch, work.head), p.value.row_stride, first_key,
                               problem.seq);
  store_spans<OWN, THREADS>(spans, [&](int row) { return queries_of(problem, work.batch, first_key + row); });

  float grad_value[DIM / 8][4], grad_key[DIM / 8][4];
  set_zero(grad_value);
  set_zero(grad_key);
  const int groups = problem.heads / problem.key_heads;
#pragma unroll 1
  for (int head = work.head * groups; head < (work.head + 1) * groups; head++) {
    load_tile<DIM, OWN, THREADS>(u_tile, p.u.rows(work.batch, head), p.u.row_stride, first_key, problem.seq);
#pragma unroll
    for (int i = 0; i < STAGES; i++) {
      if (begin + i * OTHER < end) start_copies(stages + i * Tiling::KEYS_STAGE_BYTES, head, begin + i * OTHER);
      ptx::cp_async_commit();
    }
#pragma unroll 1
    for (int first_query = begin, parity = 0; first_query < end; first_query += OTHER, parity = (parity + 1) % STAGES) {
      ptx::cp_async_wait<STAGES - 1>();
      ptx::sync_block();  // this stage has arrived
      const ptx::Address query_tile = stages + parity * Tiling::KEYS_STAGE_BYTES;
      const ptx::Address grad_output_tile = query_tile + Tiling::OTHER_BYTES;
      const ptx::Address grad_u_tile = grad_output_tile + Tiling::OTHER_BYTES;
      const ptx::Address lse = grad_u_tile + Tiling::OTHER_BYTES, delta = lse + Tiling::STATISTICS_BYTES;

      float weights[OTHER / 8][4];
      uint32_t a[OTHER / 16][4];
      set_zero(weights);
      multiply_rows<T, DIM, OTHER / 8>(weights, key_tile, warp_row, query_tile, 0);
      weights_from_scores(weights, scale_log2, lse, first_query, spans, warp_row);
      pack_all<T>(a, weights);
      multiply_registers<T, DIM, OTHER / 16>(grad_value, a, grad_u_tile);

      float grad_scores[OTHER / 8][4];
      set_zero(grad_scores);
      multiply_rows<T, DIM, OTHER / 8>(grad_scores, value_tile, warp_row, grad_u_tile, 0);
      multiply_rows<T, DIM, OTHER / 8, true>(grad_scores, u_tile, warp_row, grad_output_tile, 0);
      grad_scores_from_weights(grad_scores, weights, delta);
      pack_all<T>(a, grad_scores);
      multiply_registers<T, DIM, OTHER / 16>(grad_key, a, query_tile);

      if (ADD_QUERY) {
        // dQ needs all the block's keys, so the warps exchange dS^T.
        store_operands<OTHER>(grad_scores_tile, warp_row, 0, a);
        ptx::sync_block();  // dS^T is complete
        add_grad_query<T, DIM, Tiling>(p, work.batch, ptx::recompute(head), grad_scores_tile, key_tile, first_query,
                                       end);
      }
      ptx::sync_block();  // nobody reads this stage, dS^T or, after the last step, U any more
      if (first_query + STAGES * OTHER < end) start_copies(query_tile, head, first_query + STAGES * OTHER);
      ptx::cp_async_commit();
    }
  }

#pragma unroll
  for (int n = 0; n < DIM / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) grad_key[n][i] *= problem.scale;
  store_rows<T, DIM>(grad_key, key_tile, warp_row, p.grad_key.rows(work.batch, work.head), p.grad_key.row_stride,
                     first_key + warp_row, problem.seq);
  store_rows<T, DIM>(grad_value, value_tile, warp_row, p.grad_value.rows(work.batch, work.head),
                     p.grad_value.row_stride, first_key + warp_row, problem.seq);
}

// dQ of 64 queries, all of it.
template <class T, int DIM>
__global__ void __launch_bounds__(BackwardTiling<DIM>::THREADS, 1) backward_query(const BackwardParams p) {
  using Tiling = BackwardTiling<DIM>;
  constexpr int OWN = Tiling::OWN, OTHER = Tiling::OTHER, THREADS = Tiling::THREADS;
  const Problem& problem = p.problem;
  Work work = work_of(ptx::block_index(), problem.heads, problem.batch);
  if (problem.causal) work.block = (problem.seq - 1) / OWN - work.block;  // the longest first
  const int lane = lane_index(), warp_row = warp_index() * 16, first_query = work.block * OWN;
  const int last_query = smaller(first_query + OWN, problem.seq) - 1;
  const float scale_log2 = problem.scale * LOG2_E;

  // Shared memory: the block's queries, dO and dU; two stages of keys, values and U; the span of keys of each query.
  const ptx::Address query_tile = ptx::shared_memory(), grad_output_tile = query_tile + Tiling::OWN_BYTES;
  const ptx::Address grad_u_tile = grad_output_tile + Tiling::OWN_BYTES, stages = grad_u_tile + Tiling::OWN_BYTES;
  const ptx::Address spans = stages + 2 * Tiling::QUERY_STAGE_BYTES;
  auto stage = [&](int parity) { return stages + parity * Tiling::QUERY_STAGE_BYTES; };

  const int begin = keys_of(problem, work.batch, first_query).begin;
  const int end = keys_of(problem, work.batch, last_query).end;
  auto load_own = [&](ptx::Address tile, const Tensor& tensor) {
    load_tile<DIM, OWN, THREADS>(tile, tensor.rows(work.batch, work.head), tensor.row_stride, first_query, problem.seq);
  };
  auto load_other = [&](ptx::Address tile, const Tensor& tensor, int head, int first_key) {
    load_tile<DIM, OTHER, THREADS>(tile, tensor.rows(work.batch, head), tensor.row_stride, first_key, end);
  };
  auto start_copies = [&](int parity, int first_key) {
    const int key_head = problem.key_head(work.head);
    load_other(stage(parity), p.key, key_head, first_key);
    load_other(stage(parity) + Tiling::OTHER_BYTES, p.value, key_head, first_key);
    load_other(stage(parity) + 2 * Tiling::OTHER_BYTES, p.u, work.head, first_key);
    ptx::cp_async_commit();
  };
  load_own(query_tile, p.query);
  load_own(grad_output_tile, p.grad_output);
  load_own(grad_u_tile, p.grad_u);
  start_copies(0, begin);
  store_spans<OWN, THREADS>(spans, [&](int row) { return keys_of(problem, work.batch, first_query + row); });

  float lse_log2[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = first_query + warp_row + half * 8 + lane / 4;
    const int64_t statistic = problem.first_statistic(work.batch, work.head) + row;
    lse_log2[half] = LOG2_E * ptx::load_global(p.lse + statistic, row < problem.seq);
    delta[half] = ptx::load_global(p.delta + statistic, row < problem.seq);
  }

  float grad_query[DIM / 8][4];
  set_zero(grad_query);
#pragma unroll 1
  for (int first_key = begin, parity = 0; first_key < end; first_key += OTHER, parity ^= 1) {
    ptx::cp_async_wait<0>();
    ptx::sync_block();  // this stage has arrived, and nobody reads the other any more
    if (first_key + OTHER < end) start_copies(parity ^ 1, first_key + OTHER);

    const ptx::Address key_tile = stage(parity), value_tile = key_tile + Tiling::OTHER_BYTES;
    const ptx::Address u_tile = value_tile + Tiling::OTHER_BYTES;
    float scores[OTHER / 8][4], grad_scores[OTHER / 8][4];
    set_zero(scores);
    set_zero(grad_scores);
    multiply_rows<T, DIM, OTHER / 8>(scores, query_tile, warp_row, key_tile, 0);
    hide_keys(scores, first_key, spans, warp_row);
    multiply_rows<T, DIM, OTHER / 8>(grad_scores, grad_u_tile, warp_row, value_tile, 0);
    multiply_rows<T, DIM, OTHER / 8, true>(grad_scores, grad_output_tile, warp_row, u_tile, 0);
#pragma unroll
    for (int n = 0; n < OTHER / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        grad_scores[n][i] = ptx::exp2(scores[n][i] * scale_log2 - lse_log2[i / 2]) * (grad_scores[n][i] - delta[i / 2]);
    uint32_t a[OTHER / 16][4];
    pack_all<T>(a, grad_scores);
    multiply_registers<T, DIM, OTHER / 16>(grad_query, a, key_tile);
  }

#pragma unroll
  for (int n = 0; n < DIM / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) grad_query[n][i] *= problem.scale;
  store_rows<T, DIM>(grad_query, query_tile, warp_row, p.grad_query.rows(work.batch, work.head), p.grad_query.row_stride,
                     first_query + warp_row, problem.seq);
}

// dQ = scale * its sum in float32; two elements a thread.
constexpr int ROUND_THREADS = 256;

template <class T, int DIM>
__global__ void __launch_bounds__(ROUND_THREADS) round_query(const BackwardParams p) {
  const Problem& problem = p.problem;
  const int64_t pair = int64_t(ptx::block_index()) * ROUND_THREADS + ptx::thread_index();
  const int64_t row = pair / (DIM / 2);
  const int column = pair % (DIM / 2) * 2, position = row % problem.seq, head = row / problem.seq % problem.heads;
  const int batch = row / problem.seq / problem.heads;
  const bool exists = batch < problem.batch;
  const float* sum = p.grad_query_sum + row * DIM + column;
  const float low = problem.scale * ptx::load_global(sum, exists);
  const float high = problem.scale * ptx::load_global(sum + 1, exists);
  uint16_t* target = p.grad_query.rows(batch, head) + position * p.grad_query.row_stride + column;
  ptx::store_global(target, ptx::pack(T{}, low, high), exists);
}

// Launches what gives dK and dV, which with `add_query` adds to dQ's sum, and whatever it takes to have dQ.
template <class T, int DIM, class LaunchKeys>
ptx::Status run_with_grad_query(const BackwardParams& p, ptx::Stream stream, LaunchKeys launch_keys) {
  using Tiling = BackwardTiling<DIM>;
  const Problem& problem = p.problem;
  const int64_t heads = int64_t(problem.batch) * problem.heads, rows = heads * problem.seq;
  if (p.grad_query_sum == nullptr) {
    const ptx::Status status = launch_keys(std::false_type{});
    if (status != ptx::SUCCESS) return status;
    return ptx::launch(backward_query<T, DIM>, (problem.seq + Tiling::OWN - 1) / Tiling::OWN * heads, Tiling::THREADS,
                       Tiling::QUERY_SHARED_BYTES, stream, p);
  }
  ptx::Status status = ptx::fill_zero(p.grad_query_sum, rows * DIM * sizeof(float), stream);
  if (status != ptx::SUCCESS) return status;
  status = launch_keys(std::true_type{});
  if (status != ptx::SUCCESS) return status;
  const int64_t round_blocks = (rows * DIM / 2 + ROUND_THREADS - 1) / ROUND_THREADS;
  return ptx::launch(round_query<T, DIM>, round_blocks, ROUND_THREADS, 0, stream, p);
}

template <class T, int DIM>
ptx::Status run_backward(const BackwardParams& p, ptx::Stream stream) {
  using Tiling = BackwardTiling<DIM>;
  const Problem& problem = p.problem;
  const int64_t blocks = (problem.seq + Tiling::OWN - 1) / Tiling::OWN * int64_t(problem.batch);
  auto launch = [&](auto kernel, int heads, int shared_bytes) {
    return ptx::launch(kernel, blocks * heads, Tiling::THREADS, shared_bytes, stream, p);
  };
  const ptx::Status status = launch(backward_u<T, DIM>, problem.heads, Tiling::U_SHARED_BYTES);
  if (status != ptx::SUCCESS) return status;
  return run_with_grad_query<T, DIM>(p, stream, [&](auto add_query) {
    return launch(backward_keys<T, DIM, add_query.value>, problem.key_heads, Tiling::KEYS_SHARED_BYTES);
  });
}

}  // namespace twicing
