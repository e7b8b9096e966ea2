// How the blocks of one launch hand rows on to each other, so that causal attention needs only one (wavefront_*.cuh).
//
// Blocks of rows depend on those before them (backward: after them). Each takes a ticket when it starts: whichever the
// device starts first, and however few fit on it at a time, they are given work in the order of its dependencies. So what
// a block waits for has been computed or is being, by a running block that waits in turn only for earlier ones: there is
// no deadlock.
//
// A block stores the rows of a tile as usual, then sets the tile's flag:
//
//     every thread:  st.global rows  |  bar.sync  |  thread 0: st.release.gpu flag
//     first warp:    ld.relaxed.gpu flags until set  |  fence.acq_rel.gpu  |  every thread: bar.sync  |  cp.async rows
//
// The barriers order the threads of each block and the release is observed by the load, so by causality, which is
// transitive, the stores happen before the copies (PTX ISA, "Memory Consistency Model"). cp.async is an ordinary weak
// read; pointers to such rows must not be __restrict__, which would let the compiler read them by way of a cache
// (ld.global.nc) that is not kept coherent.
#pragma once
#include "tile.cuh"

namespace twicing {

constexpr int LEAST_FLAG_ROWS = 32;  // rows that share a flag, at least
constexpr int NOTE_BYTES = 32 * 4;   // shared memory by which one warp tells a number to the others

// Device memory that a launch works with: the next ticket, then flags of each head's tiles. Zeros when it starts.
inline int64_t wavefront_workspace_bytes(const Problem& problem) {
  const int64_t tiles = (problem.seq + LEAST_FLAG_ROWS - 1) / LEAST_FLAG_ROWS;
  return sizeof(int) * (1 + tiles * problem.heads * problem.batch);
}

// What the first thread has, for all threads of the block.
DEVICE int broadcast(int value, ptx::Address note) {
  if (warp_index() == 0) ptx::store_shared(note + lane_index() * 4, static_cast<uint32_t>(value));
  ptx::sync_block();
  uint32_t pair[2];
  ptx::load_shared(note, pair);
  return pair[0];
}

DEVICE int take_ticket(int* workspace, ptx::Address note) {
  return broadcast(ptx::thread_index() == 0 ? ptx::fetch_add(workspace, 1) : 0, note);
}

// Waits until the first of `count` tiles is final, and returns how many from there on are seen to be: up to 32.
DEVICE int await_tiles(const int* flags, int count, ptx::Address note) {
  uint32_t set = 0;
  if (warp_index() == 0) {
    while (!(set & 1)) set = ptx::ballot(lane_index() < count && ptx::load_relaxed(flags + lane_index()) != 0);
    ptx::fence();
  }
  return broadcast(ptx::trailing_ones(set), note);
}

// Declares a tile final when all threads have stored what they have of it.
DEVICE void publish_tile(int* flag) {
  ptx::sync_block();
  if (ptx::thread_index() == 0) ptx::store_release(flag, 1);
}

}  // namespace twicing
