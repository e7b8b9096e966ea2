// A block of CUDA threads on one CPU core: each thread is a fiber, run until it has to wait for others.
//
// What is checked while a kernel runs, whatever values it computes:
//   races      Every 4 bytes of shared memory, and of global memory that a launch may write, remember who wrote and who
//              read them last. Two accesses, one of them a write, must be by the same thread or have a barrier between
//              them: that of the block, or that of the warp if both are in it. This does not depend on the schedule.
//   copies     What cp.async brings may be touched only after its thread waited for it; before, it is in flight.
//   memory     Accesses outside of a buffer, misaligned, to read-only buffers, or reads of what nobody wrote.
//   barriers   Lanes of a warp at different collective instructions, threads at different barriers, deadlock.
// Memory starts as NaN. With a seed, warps take turns at random and copies arrive at random as early or as late as the
// rules allow; without one, as late as possible, and a warp runs on until it must wait.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <random>
#include <source_location>
#include <string>
#include <vector>

namespace simt {

using Where = std::source_location;  // a place in a kernel's source
#define SIMT_HERE const ::simt::Where where = ::simt::Where::current()

struct Options {
  uint32_t seed = 0;
  bool truncate = false;  // tensor cores round sums towards zero, as the hardware's do, instead of to nearest
};

struct Counters {  // of one launch; instructions of whole warps
  uint64_t blocks, barriers, mma, exp2_lanes, ldmatrix, shared_stores, shared_loads;
  // How often shared memory had to be accessed for them: 4 for an ldmatrix.x4 and 1 for a 4-byte store without conflicts.
  uint64_t ldmatrix_passes, shared_store_passes, shared_load_passes;
  uint64_t global_read_bytes, global_written_bytes, errors;
};

struct Access {  // when and by whom: compared to find out whether one access must come before another
  int64_t block = -1;
  int thread = 0;
  uint32_t block_epoch = 0, warp_epoch = 0;  // barriers passed
  int line = 0;
};

struct Word {  // what is known of 4 bytes of memory
  Access write, read;
  uint64_t reading_warps = 0;  // of the block that read last, since its last barrier
  bool several_lanes = false, several_blocks = false, written = false, in_flight = false, only_added_to = false;
};

struct Buffer {  // global memory that a launch may touch
  std::string name;
  char* begin;
  size_t bytes;
  bool writable;
  std::vector<Word> words;  // if writable
};

struct Copy {
  uint32_t destination;
  const void* source;
  int bytes, group;
  bool valid;
  Where where;
};

enum class State : uint8_t { RUNNABLE, AT_COLLECTIVE, AT_BARRIER, DONE };

struct Thread {
  void* stack_pointer;
  State state;
  std::vector<Copy> copies;
  int groups;  // committed
};

struct Warp {
  int arrived;
  const char* operation;
  Where where;
  void* arguments[32];
  uint32_t epoch;
};

struct Block {
  int64_t index;
  int thread;  // that runs
  int live, at_barrier;
  bool abandoned;
  Where barrier;
  uint32_t epoch;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<char> shared;
  std::vector<Word> shared_words;
};

struct Machine {
  Options options;
  std::vector<Buffer> buffers;
  std::vector<Counters> launches;
  std::string log;  // the first errors, a line each
  std::mt19937 random;
  Block block;
  std::function<void()> kernel;
  void* scheduler_stack_pointer;
  std::vector<char> stacks;
};
extern Machine machine;

// Runs all blocks of a launch, one after the other. Appends to machine.launches and machine.log.
void launch(const std::function<void()>& kernel, int64_t blocks, int threads, int shared_bytes);

inline Block& block() { return machine.block; }
inline Thread& thread() { return block().threads[block().thread]; }
inline Warp& warp() { return block().warps[block().thread / 32]; }
inline Counters& counters() { return machine.launches.back(); }

void report(const std::string& what, Where where);
void abandon(const std::string& what, Where where);  // reports, and ends the block, which cannot go on
void yield();                              // lets other threads run until this one is runnable and chosen again
void maybe_yield();                        // with a seed: now and then, in favour of another warp
void sync_block(Where where);
void read_shared(uint32_t address, int bytes, int thread, Where where);
void write_shared(uint32_t address, int bytes, int thread, Where where, bool asynchronous = false);
void land(const Copy& copy, int thread);   // the bytes of a copy arrive
void finish(const Copy& copy, int thread); // its thread has waited for it
bool access_global(const void* address, int bytes, bool write, Where where, bool add = false);  // may it happen?
// Passes over the 32 banks that a warp's accesses take; lanes are served 128 bytes at a time.
int passes(const uint32_t (&address)[32], int bytes);

// An instruction that all lanes of a warp execute together: the last to arrive performs it for all of them.
template <class Arguments, class Perform>
void collective(const char* operation, Where where, Arguments& arguments, Perform perform) {
  Warp& w = warp();
  if (w.arrived == 0) {
    w.operation = operation;
    w.where = where;
  } else if (w.where.line() != where.line() || w.operation != operation) {
    abandon("lanes of a warp at different instructions, the other in line " + std::to_string(w.where.line()), where);
  }
  w.arguments[block().thread % 32] = &arguments;
  if (++w.arrived < 32) {
    thread().state = State::AT_COLLECTIVE;
    yield();
    return;
  }
  w.arrived = 0;
  const int first = block().thread / 32 * 32;
  perform(reinterpret_cast<Arguments* const*>(w.arguments), first);
  for (int lane = 0; lane < 32; lane++) block().threads[first + lane].state = State::RUNNABLE;
  maybe_yield();
}

}  // namespace simt
