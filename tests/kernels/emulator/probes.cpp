// Small kernels of one block, for the tests of the emulator itself: one instruction, or one mistake, each.
#include "instructions.h"

using namespace ptx;

extern "C" {

void probe_mma(bool bf16, const uint32_t (*a)[4], const uint32_t (*b)[2], float (*d)[4]) {
  simt::launch([&] {
    const int lane = thread_index();
    if (bf16) mma_m16n8k16(Bf16{}, d[lane], a[lane], b[lane][0], b[lane][1]);
    else mma_m16n8k16(Fp16{}, d[lane], a[lane], b[lane][0], b[lane][1]);
  }, 1, 32, 0);
}

// `memory` is copied to shared memory first.
void probe_ldmatrix(const uint32_t* memory, int words, bool transposed, const Address* rows, uint32_t (*r)[4]) {
  simt::launch([&] {
    const int lane = thread_index();
    for (int i = lane; i < words; i += 32) store_shared(i * 4, memory[i]);
    sync_warp();
    if (transposed) ldmatrix_x4_trans(r[lane], rows[lane]);
    else ldmatrix_x4(r[lane], rows[lane]);
  }, 1, 32, words * 4);
}

void probe_shuffle(float* values, int mask) {
  simt::launch([&] {
    const float value = values[thread_index()];
    values[thread_index()] = shuffle_xor(value, mask);
  }, 1, 32, 0);
}

// Each lane copies 16 bytes, every second lane zeros, and reads them back as soon as it may.
void probe_cp_async(const uint32_t* source, uint32_t (*result)[4]) {
  simt::launch([&] {
    const int lane = thread_index();
    cp_async_16(lane * 16, source + lane * 4, lane % 2 == 0);
    cp_async_commit();
    cp_async_wait<0>();
    const Words4 words = load_shared_16(lane * 16);
    for (int i = 0; i < 4; i++) result[lane][i] = words.word[i];
  }, 1, 32, 512);
}

// Two groups are started and `pending` (0 or 1) may be left when the lane reads what the first or the second brought.
void probe_cp_async_groups(const uint32_t* source, int pending, int read_group) {
  simt::launch([&] {
    const int lane = thread_index();
    for (int group = 0; group < 2; group++) {
      cp_async_4(group * 128 + lane * 4, source + lane, true);
      cp_async_commit();
    }
    if (pending) cp_async_wait<1>();
    else cp_async_wait<0>();
    uint32_t pair[2];
    load_shared(read_group * 128 + lane / 2 * 8, pair);
    cp_async_wait<0>();
  }, 1, 32, 256);
}

void probe_pack(bool bf16, float first, float second, uint32_t* word, float* unpacked) {
  *word = bf16 ? pack(Bf16{}, first, second) : pack(Fp16{}, first, second);
  unpacked[0] = bf16 ? low(Bf16{}, *word) : low(Fp16{}, *word);
  unpacked[1] = bf16 ? high(Bf16{}, *word) : high(Fp16{}, *word);
}

void probe_math(float x, float* results) {
  simt::launch([&] {
    if (thread_index() > 0) return;
    results[0] = exp2(x);
    results[1] = log2(x);
    results[2] = reciprocal(x);
  }, 1, 32, 0);
}

// The other ways to shared and global memory.
void probe_memory(const uint32_t* words, uint32_t* pairs, float* float_pairs, uint32_t* fours, uint32_t* copied,
                  float* sum) {
  simt::launch([&] {
    const int lane = thread_index();
    for (int i = 0; i < 4; i++) {
      const uint32_t word = load_global(static_cast<const void*>(words + lane * 4 + i), true);
      store_shared(lane * 16 + i * 4, word);
    }
    sync_block();
    uint32_t pair[2];
    float float_pair[2];
    load_shared(lane * 8, pair);
    load_shared(lane * 8, float_pair);
    for (int i = 0; i < 2; i++) {
      store_global(pairs + lane * 2 + i, pair[i], lane % 2 == 0);
      store_global(float_pairs + lane * 2 + i, float_pair[i], lane % 2 == 0);
    }
    store_global_16(fours + lane * 4, load_shared_16(lane * 16), lane % 2 == 1);
    store_global_16(copied + lane * 4, load_global_16(words + lane * 4, lane % 2 == 0), true);
    reduce_add_global(sum, load_global(sum + 1, lane % 2 == 0) + lane, lane % 3 == 0);
  }, 1, 32, 512);
}

void probe_ballot(const uint32_t* words, uint32_t* set, int* ones) {
  simt::launch([&] {
    const uint32_t word = words[thread_index()];
    set[thread_index()] = ballot(word % 2 == 1);
    ones[thread_index()] = trailing_ones(word);
  }, 1, 32, 0);
}

void probe_flags(int* flags, int* read) {
  simt::launch([&] {
    if (thread_index() > 0) return;
    read[0] = fetch_add(flags, 5);
    read[1] = load_relaxed(flags);
    fence();
    store_release(flags + 1, 7);
  }, 1, 32, 0);
}

// Threads read what others store: with a barrier of the block between (0), with none (1), with one of the warp (2).
void probe_barrier(int threads, int barrier, bool read_first) {
  simt::launch([&] {
    const int thread = thread_index();
    uint32_t pair[2];
    store_shared(thread * 8, 1u);
    store_shared(thread * 8 + 4, 1u);
    sync_block();
    if (read_first) load_shared((threads - 1 - thread) * 8, pair);
    else store_shared(thread * 8, 2u);
    if (barrier == 0) sync_block();
    if (barrier == 2) sync_warp();
    if (read_first) store_shared(thread * 8, 2u);
    else load_shared((threads - 1 - thread) * 8, pair);
  }, 1, threads, threads * 8);
}

enum Mistake { UNWRITTEN, OUTSIDE, MISALIGNED, GLOBAL_OUTSIDE, GLOBAL_READ_ONLY, GLOBAL_UNWRITTEN, GLOBAL_RACE,
               DEADLOCK, DIVERGENCE, DIFFERENT_BARRIERS, COPY_LEFT, TWO_BLOCKS };
void probe_mistake(int mistake, float* input, float* output) {
  simt::launch([&] {
    const int thread = thread_index();
    uint32_t pair[2];
    switch (mistake) {
      case UNWRITTEN: load_shared(thread * 8, pair); break;
      case OUTSIDE: store_shared(1024 + thread * 4, 0u); break;
      case MISALIGNED: load_shared(thread * 8 + 4, pair); break;
      case GLOBAL_OUTSIDE: load_global(input + 64 + thread, true); break;
      case GLOBAL_READ_ONLY: store_global(input + thread, 0.f, true); break;
      case GLOBAL_UNWRITTEN: load_global(output + thread, true); break;
      case GLOBAL_RACE: store_global(output + thread / 2, 0.f, true); break;
      case DEADLOCK: if (thread < 48) sync_block(); else sync_warp(); break;
      case DIVERGENCE: if (thread % 2) shuffle_xor(0, 1); else sync_warp(); break;
      case DIFFERENT_BARRIERS:
        if (thread < 32) sync_block();
        else
          sync_block();
        break;
      case COPY_LEFT: cp_async_4(thread * 4, input + thread, true); break;
      case TWO_BLOCKS: store_global(output + thread, 0.f, true); break;
    }
  }, mistake == TWO_BLOCKS ? 2 : 1, 64, 1024);
}

// A chain of blocks: each adds 1 to what the one before left, having awaited its flag, and sets its own. Tickets say which
// block is which. `flags`: the ticket, then a flag each.
enum Omission { NOTHING, RELEASE, RELEASE_AFTER_DATA, BARRIER_BEFORE_RELEASE, FENCE, BARRIER_AFTER_FENCE, AWAITING, RESET,
                ORDER_OF_TICKETS };
void probe_chain(int omitted, int blocks, int* flags, float* data) {
  if (omitted != RESET) fill_zero(flags, (1 + blocks) * sizeof(int), nullptr);
  simt::launch([&] {
    const int thread = thread_index();
    uint32_t ticket[2];
    const int taken = thread == 0 ? fetch_add(flags, 1) : 0;
    if (thread < 32) store_shared(thread * 4, static_cast<uint32_t>(taken));
    sync_block();
    load_shared(0, ticket);
    const int index = omitted == ORDER_OF_TICKETS ? blocks - 1 - ticket[0] : ticket[0];
    int* flag = flags + 1 + index;
    auto publish = [&] {
      if (thread > 0) return;
      if (omitted == RELEASE) store_global(static_cast<void*>(flag), 1, true);
      else store_release(flag, 1);
    };

    if (index > 0 && thread == 0 && omitted != AWAITING) {
      while (load_relaxed(flag - 1) == 0) {}
      if (omitted != FENCE) fence();
    }
    if (omitted != BARRIER_AFTER_FENCE) sync_block();
    const int other = 63 - thread;
    float value = 1;
    if (index > 0) value += load_global(data + (index - 1) * 64 + other, true);
    if (index > 1) value += load_global(data + other, true) - 1;  // of the first block, known by way of those between
    if (omitted == RELEASE_AFTER_DATA) publish();
    store_global(data + index * 64 + thread, value, true);
    if (omitted != BARRIER_BEFORE_RELEASE) sync_block();
    if (omitted != RELEASE_AFTER_DATA) publish();
  }, blocks, 64, 128);
}

// Block 1 reads what block 0 stores, without any order: does it see the value before the launch ends?
void probe_held_back(float* data, float* seen) {
  simt::launch([&] {
    const int thread = thread_index();
    if (block_index() == 0) store_global(data + thread, 1.f, true);
    else seen[thread] = load_global(data + thread, true);
  }, 2, 32, 0);
}

// A warp's ldmatrix of rows `pitch` bytes apart, and a 4-byte store at that pitch: for the counts of bank conflicts.
void probe_banks(int pitch) {
  simt::launch([&] {
    const int lane = thread_index();
    for (int i = 0; i < pitch / 4; i++) store_shared(i * 128 + lane * 4, 0u);
    sync_warp();
    uint32_t r[4];
    ldmatrix_x4(r, lane * pitch);
  }, 1, 32, 32 * pitch);
}

void probe_store_banks(int pitch) {
  simt::launch([&] { store_shared(thread_index() * pitch, 0u); }, 1, 32, 32 * pitch);
}

// The order in which warps pass a point: depends on the seed.
void probe_schedule(int* order) {
  int next = 0;
  simt::launch([&] {
    for (int i = 0; i < 8; i++) sync_warp();
    if (thread_index() % 32 == 0) order[next++] = thread_index() / 32;
  }, 1, 256, 0);
}

}  // extern "C"
