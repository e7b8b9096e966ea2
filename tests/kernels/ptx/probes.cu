// The functions of ptx.cuh, one kernel each, as nvcc compiles them: those of ../emulator/probes.cpp of the same names.
#include "ptx.cuh"

using namespace ptx;

extern "C" {

__global__ void probe_mma(bool bf16, const uint32_t (*a)[4], const uint32_t (*b)[2], float (*d)[4]) {
  const int lane = thread_index();
  if (bf16) mma_m16n8k16(Bf16{}, d[lane], a[lane], b[lane][0], b[lane][1]);
  else mma_m16n8k16(Fp16{}, d[lane], a[lane], b[lane][0], b[lane][1]);
}

__global__ void probe_ldmatrix(const uint32_t* memory, int words, bool transposed, const Address* rows,
                               uint32_t (*r)[4]) {
  const int lane = thread_index();
  for (int i = lane; i < words; i += 32) store_shared(shared_memory() + i * 4, memory[i]);
  sync_warp();
  if (transposed) ldmatrix_x4_trans(r[lane], shared_memory() + rows[lane]);
  else ldmatrix_x4(r[lane], shared_memory() + rows[lane]);
}

__global__ void probe_shuffle(float* values, int mask) {
  const float value = values[thread_index()];
  values[thread_index()] = shuffle_xor(value, mask);
}

__global__ void probe_cp_async(const uint32_t* source, uint32_t (*result)[4]) {
  const int lane = thread_index();
  cp_async_16(shared_memory() + lane * 16, source + lane * 4, lane % 2 == 0);
  cp_async_commit();
  cp_async_wait<0>();
  const Words4 words = load_shared_16(shared_memory() + lane * 16);
  for (int i = 0; i < 4; i++) result[lane][i] = words.word[i];
}

__global__ void probe_cp_async_groups(const uint32_t* source, int pending, int read_group) {
  const int lane = thread_index();
  for (int group = 0; group < 2; group++) {
    cp_async_4(shared_memory() + group * 128 + lane * 4, source + lane, true);
    cp_async_commit();
  }
  if (pending) cp_async_wait<1>();
  else cp_async_wait<0>();
  uint32_t pair[2];
  load_shared(shared_memory() + read_group * 128 + lane / 2 * 8, pair);
  cp_async_wait<0>();
}

__global__ void probe_pack(bool bf16, float first, float second, uint32_t* word, float* unpacked) {
  *word = bf16 ? pack(Bf16{}, first, second) : pack(Fp16{}, first, second);
  unpacked[0] = bf16 ? low(Bf16{}, *word) : low(Fp16{}, *word);
  unpacked[1] = bf16 ? high(Bf16{}, *word) : high(Fp16{}, *word);
}

__global__ void probe_math(float x, float* results) {
  if (thread_index() > 0) return;
  results[0] = ptx::exp2(x);
  results[1] = ptx::log2(x);
  results[2] = ptx::reciprocal(x);
}

__global__ void probe_memory(const uint32_t* words, uint32_t* pairs, float* float_pairs, uint32_t* fours, uint32_t* copied,
                             float* sum) {
  const int lane = thread_index();
  for (int i = 0; i < 4; i++) {
    const uint32_t word = load_global(static_cast<const void*>(words + lane * 4 + i), true);
    store_shared(shared_memory() + lane * 16 + i * 4, word);
  }
  sync_block();
  uint32_t pair[2];
  float float_pair[2];
  load_shared(shared_memory() + lane * 8, pair);
  load_shared(shared_memory() + lane * 8, float_pair);
  for (int i = 0; i < 2; i++) {
    store_global(pairs + lane * 2 + i, pair[i], lane % 2 == 0);
    store_global(float_pairs + lane * 2 + i, float_pair[i], lane % 2 == 0);
  }
  store_global_16(fours + lane * 4, load_shared_16(shared_memory() + lane * 16), lane % 2 == 1);
  store_global_16(copied + lane * 4, load_global_16(words + lane * 4, lane % 2 == 0), true);
  reduce_add_global(sum, load_global(sum + 1, lane % 2 == 0) + lane, lane % 3 == 0);
}

__global__ void probe_ballot(const uint32_t* words, uint32_t* set, int* ones) {
  const uint32_t word = words[thread_index()];
  set[thread_index()] = ptx::ballot(word % 2 == 1);
  ones[thread_index()] = trailing_ones(word);
}

__global__ void probe_flags(int* flags, int* read) {
  if (thread_index() > 0) return;
  read[0] = fetch_add(flags, 5);
  read[1] = load_relaxed(flags);
  fence();
  store_release(flags + 1, 7);
}

}
