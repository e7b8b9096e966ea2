// Blocks of CUDA threads on one CPU core: each thread is a fiber, run until it has to wait for others.
//
// What is checked while a kernel runs, whatever values it computes:
//   races      Every 4 bytes of shared memory, and of global memory that a launch may write, remember who wrote and who
//              read them last. Two accesses, one of them a write, must be by the same thread or have a barrier between
//              them: that of the block, or that of the warp if both are in it. This does not depend on the schedule.
//              Between blocks: the reader must have acquired what the writer released, or what somebody released who
//              had acquired it, and so on (PTX ISA, "Memory Consistency Model": causality order).
//   copies     What cp.async brings may be touched only after its thread waited for it; before, it is in flight.
//   memory     Accesses outside of a buffer, misaligned, to read-only buffers, or reads of what nobody wrote.
//   barriers   Lanes of a warp at different collective instructions, threads at different barriers, deadlock.
// Memory starts as NaN. With a seed, blocks start in any order, blocks and warps take turns at random, and copies arrive at
// random as early or as late as the rules allow; without one, as late as possible, and a warp runs on until it must wait.
//
// `resident` blocks are in flight at a time; another starts when one ends, as on a device that has no room for more.
// Other blocks do not see a plain store before its block releases it, and what was released is seen some time later.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
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
  int resident = 1;       // blocks in flight
};

struct Counters {  // of one launch; instructions of whole warps
  uint64_t blocks, barriers, mma, exp2_lanes, ldmatrix, shared_stores, shared_loads;
  // How often shared memory had to be accessed for them: 4 for an ldmatrix.x4 and 1 for a 4-byte store without conflicts.
  uint64_t ldmatrix_passes, shared_store_passes, shared_load_passes;
  uint64_t global_read_bytes, global_written_bytes, errors;
};

struct Access {  // when and by whom: compared to find out whether one access must come before another
  int block = -1, thread = 0;
  uint32_t block_epoch = 0, warp_epoch = 0;  // barriers passed
  uint32_t releases = 0;                     // by anybody in this launch
  int line = 0;
};

// Releases that happened before: the last of each thread, by block and thread.
using Knowledge = std::map<std::pair<int, int>, Access>;

struct Word {  // what is known of 4 bytes of memory
  Access write, read;
  uint64_t reading_warps = 0;  // of the block that read last, since its last barrier
  uint32_t value = 0;          // if held back: only the block that wrote it sees it
  bool several_lanes = false, several_blocks = false, written = false, in_flight = false, atomic = false;
  bool held_back = false;
};

struct HeldBack {
  Word* word;
  char* address;
};

struct Release {  // on its way to be seen
  int* address;
  int value;
  uint64_t due;
  Knowledge knowledge;
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
  bool valid, landed;
  Where where;
};

enum class State : uint8_t { RUNNABLE, AT_COLLECTIVE, AT_BARRIER, POLLING, DONE };

struct Thread {
  void* stack_pointer = nullptr;
  State state = State::RUNNABLE;
  std::vector<Copy> copies;
  int groups = 0;              // committed
  Knowledge acquired, loaded;  // since the last barrier; by relaxed loads since the last fence
  const int* polled = nullptr;
  uint64_t polled_at = 0;
  Where polled_where;
};

struct Warp {
  int arrived;
  const char* operation;
  Where where;
  void* arguments[32];
  uint32_t epoch;
};

struct Block {
  int index;
  int thread;  // that runs
  int live, at_barrier;
  Where barrier;
  uint32_t epoch;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<char> shared;
  std::vector<Word> shared_words;
  Knowledge acquired;  // known to all its threads
  std::vector<HeldBack> held_back;
  std::unique_ptr<char[]> stacks;
};

struct Machine {
  Options options;
  std::vector<Buffer> buffers;
  std::vector<Counters> launches;
  std::string log;  // the first errors, a line each
  std::mt19937 random;
  std::vector<Block> resident;
  Block* block;  // that runs
  std::function<void()> kernel;
  void* scheduler_stack_pointer;
  size_t favoured;                                // a resident block
  uint64_t step, news;                            // of the scheduler; how often a flag has changed for all to see
  uint32_t releases;                              // of this launch
  std::vector<Release> releasing;
  std::map<const int*, Knowledge> released_with;  // what a flag's present value tells who acquires it
};
extern Machine machine;

// Runs all blocks of a launch. Appends to machine.launches and machine.log.
void launch(const std::function<void()>& kernel, int64_t blocks, int threads, int shared_bytes);

inline Block& block() { return *machine.block; }
inline Thread& thread() { return block().threads[block().thread]; }
inline Warp& warp() { return block().warps[block().thread / 32]; }
inline Counters& counters() { return machine.launches.back(); }

void report(const std::string& what, Where where);
void abandon(const std::string& what, Where where);  // reports, and ends the block, which cannot go on
void yield();                                        // lets other threads run until this one is runnable and chosen again
void maybe_yield();                                  // with a seed: now and then, in favour of another warp
void sync_block(Where where);
void share_in_block();  // what its threads have acquired
void share_in_warp();

void read_shared(uint32_t address, int bytes, int thread, Where where);
void write_shared(uint32_t address, int bytes, int thread, Where where, bool asynchronous = false);
void land(Copy& copy);                      // the bytes of a copy arrive
void finish(const Copy& copy, int thread);  // its thread has waited for it
// Passes over the 32 banks that a warp's accesses take; lanes are served 128 bytes at a time.
int passes(const uint32_t (&address)[32], int bytes);

enum class Kind { READ, WRITE, ATOMIC_LOAD, ATOMIC_STORE, ATOMIC_UPDATE };
bool access_global(const void* address, int bytes, Kind kind, Where where);  // may it happen?
void read_global(void* destination, const void* address, int bytes);         // what this block sees there
void write_global(void* address, const void* source, int bytes);

// Atomic accesses, in the scope of the device. A load with nothing new to see since the thread's last one, of the same
// address, waits until there is: that is how loops spin. A fence acquires what loads before it have seen, and no more.
int fetch_add(int* address, int value, Where where);
int load_relaxed(const int* address, Where where);
void fence();
void store_release(int* address, int value, Where where);
void show_release(size_t index);
void show_everything();  // at the end of a launch

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

// For Python and binding.cpp, which begin a run by these.
extern "C" void emulator_reset(uint32_t seed, bool truncate, int resident);
extern "C" void emulator_buffer(const char* name, void* begin, size_t bytes, bool writable, bool written);

}  // namespace simt
