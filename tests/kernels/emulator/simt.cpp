#include "simt.h"

#include <algorithm>
#include <cstring>

#ifndef __x86_64__
#error "the emulator switches fibers with x86-64 instructions"
#endif

// Saves the running fiber's registers on its stack and goes on with another's.
extern "C" void simt_switch(void** save_stack_pointer, void* stack_pointer);
asm(R"(
.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace simt {

Machine machine;

namespace {

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr int REPORTED = 8, SWITCH_ONE_IN = 8;
constexpr int SAVED_REGISTERS = 6;

int next_runnable(int warp_index) {
  const int first = warp_index * 32;
  for (int lane = 0; lane < 32; lane++)
    if (block().threads[first + lane].state == State::RUNNABLE) return first + lane;
  return -1;
}

void release_barrier() {
  block().at_barrier = 0;
  block().epoch++;
  for (Thread& t : block().threads)
    if (t.state == State::AT_BARRIER) t.state = State::RUNNABLE;
}

void run_thread() {
  machine.kernel();
  Block& b = block();
  if (!thread().copies.empty()) report("a thread ends with copies in flight", thread().copies.front().where);
  thread().state = State::DONE;
  b.live--;
  if (b.at_barrier > 0) {
    report("a thread ends while others wait at a barrier", b.barrier);
    if (b.at_barrier == b.live) release_barrier();
  }
  yield();
}

void start_thread(int index) {
  Thread& t = block().threads[index];
  const uintptr_t top = (reinterpret_cast<uintptr_t>(machine.stacks.data()) + STACK_BYTES * (index + 1)) & ~uintptr_t(15);
  void** stack = reinterpret_cast<void**>(top);
  *--stack = nullptr;  // where run_thread would return to; also aligns its frame
  *--stack = reinterpret_cast<void*>(run_thread);
  for (int i = 0; i < SAVED_REGISTERS; i++) *--stack = nullptr;
  t = {stack, State::RUNNABLE, {}, 0};
}

void run_block(int64_t index, int threads, int shared_bytes) {
  Block& b = block();
  b.index = index;
  b.live = threads;
  b.at_barrier = 0;
  b.abandoned = false;
  b.epoch = 0;
  b.threads.resize(threads);
  b.warps.assign(threads / 32, Warp{});
  b.shared.assign(shared_bytes, char(0xff));
  b.shared_words.assign((shared_bytes + 3) / 4, Word{});
  for (int i = 0; i < threads; i++) start_thread(i);

  const int warps = threads / 32;
  while (b.live > 0 && !b.abandoned) {
    const int first = machine.options.seed ? machine.random() % warps : 0;
    int next = -1;
    for (int i = 0; i < warps && next < 0; i++) next = next_runnable((first + i) % warps);
    if (next < 0) {
      int stuck = 0;
      while (b.threads[stuck].state == State::DONE) stuck++;
      const bool barrier = b.threads[stuck].state == State::AT_BARRIER;
      report(std::string("deadlock: thread ") + std::to_string(stuck) + " waits here, others elsewhere",
             barrier ? b.barrier : b.warps[stuck / 32].where);
      return;
    }
    b.thread = next;
    simt_switch(&machine.scheduler_stack_pointer, b.threads[next].stack_pointer);
  }
}

Access now(int thread, Where where) {
  return {block().index, thread, block().epoch, block().warps[thread / 32].epoch, static_cast<int>(where.line())};
}

bool ordered(const Access& before, const Access& after) {
  if (before.block != after.block) return false;
  if (before.thread == after.thread || before.block_epoch < after.block_epoch) return true;
  return before.thread / 32 == after.thread / 32 && before.warp_epoch < after.warp_epoch;
}

bool reads_are_ordered(const Word& word, const Access& write) {
  if (word.read.block < 0) return true;
  if (word.several_blocks || word.read.block != write.block) return false;
  if (word.read.block_epoch < write.block_epoch) return true;
  if (word.reading_warps & ~(uint64_t(1) << (write.thread / 32))) return false;
  const bool same_thread = !word.several_lanes && word.read.thread == write.thread;
  return same_thread || word.read.warp_epoch < write.warp_epoch;
}

void report_race(const char* what, const Access& other, Where where) {
  report(std::string(what) + " without a barrier between; the other access was in line " + std::to_string(other.line), where);
}

void record_read(Word& word, const Access& read, Where where) {
  if (word.in_flight) report("read of a copy in flight", where);
  else if (!word.written) report("read of memory that nobody wrote", where);
  else if (word.write.block >= 0 && !ordered(word.write, read)) report_race("read after write", word.write, where);

  const bool other_block = word.read.block >= 0 && word.read.block != read.block;
  if (other_block) word.several_blocks = true;
  if (other_block || word.read.block < 0 || word.read.block_epoch != read.block_epoch) {
    word.reading_warps = 0;
    word.several_lanes = false;
  } else if (word.read.thread != read.thread) {
    word.several_lanes = true;
  }
  word.reading_warps |= uint64_t(1) << (read.thread / 32);
  word.read = read;
}

void record_write(Word& word, const Access& write, Where where, bool asynchronous, bool add) {
  if (add && word.only_added_to) return;  // additions may come in any order
  if (word.in_flight) report("write over a copy in flight", where);
  else if (word.write.block >= 0 && !ordered(word.write, write)) report_race("write after write", word.write, where);
  if (!reads_are_ordered(word, write)) report_race("write after read", word.read, where);
  word = Word{};
  word.write = write;
  word.written = true;
  word.in_flight = asynchronous;
  word.only_added_to = add;
}

bool inside_shared(uint32_t address, int bytes, Where where) {
  if (address % bytes) report("misaligned access to shared memory", where);
  if (address + bytes <= block().shared.size()) return true;
  report("access outside of shared memory", where);
  return false;
}

}  // namespace

void report(const std::string& what, Where where) {
  if (counters().errors++ >= REPORTED) return;
  const char* slash = std::strrchr(where.file_name(), '/');
  machine.log += std::string(slash ? slash + 1 : where.file_name()) + ":" + std::to_string(where.line()) + ": block " +
                 std::to_string(block().index) + ", thread " + std::to_string(block().thread) + ": " + what + "\n";
}

void abandon(const std::string& what, Where where) {
  report(what, where);
  block().abandoned = true;
  simt_switch(&thread().stack_pointer, machine.scheduler_stack_pointer);
}

void yield() {
  Block& b = block();
  const int me = b.thread, next = next_runnable(me / 32);
  if (next < 0) {
    simt_switch(&b.threads[me].stack_pointer, machine.scheduler_stack_pointer);
  } else {
    b.thread = next;
    simt_switch(&b.threads[me].stack_pointer, b.threads[next].stack_pointer);
  }
}

void maybe_yield() {
  if (machine.options.seed && machine.random() % SWITCH_ONE_IN == 0)
    simt_switch(&thread().stack_pointer, machine.scheduler_stack_pointer);
}

void sync_block(Where where) {
  Block& b = block();
  if (b.thread % 32 == 0) counters().barriers++;
  if (b.at_barrier == 0) b.barrier = where;
  else if (b.barrier.line() != where.line()) report("threads at different barriers, the other in line " + std::to_string(b.barrier.line()), where);
  if (++b.at_barrier < b.live) {
    thread().state = State::AT_BARRIER;
    yield();
  } else {
    release_barrier();
    maybe_yield();
  }
}

void read_shared(uint32_t address, int bytes, int thread, Where where) {
  if (!inside_shared(address, bytes, where)) return;
  for (uint32_t i = address / 4; i < (address + bytes) / 4; i++) record_read(block().shared_words[i], now(thread, where), where);
}

void write_shared(uint32_t address, int bytes, int thread, Where where, bool asynchronous) {
  if (!inside_shared(address, bytes, where)) return;
  for (uint32_t i = address / 4; i < (address + bytes) / 4; i++)
    record_write(block().shared_words[i], now(thread, where), where, asynchronous, false);
}

void land(const Copy& copy, int) {
  if (copy.destination + copy.bytes > block().shared.size()) return;  // reported when it was started
  char* destination = &block().shared[copy.destination];
  if (copy.valid) std::memcpy(destination, copy.source, copy.bytes);
  else std::memset(destination, 0, copy.bytes);
}

void finish(const Copy& copy, int thread) {
  if (copy.destination + copy.bytes > block().shared.size()) return;
  for (uint32_t i = copy.destination / 4; i < (copy.destination + copy.bytes) / 4; i++) {
    block().shared_words[i].in_flight = false;
    block().shared_words[i].write = now(thread, copy.where);
  }
}

bool access_global(const void* address, int bytes, bool write, Where where, bool add) {
  (write ? counters().global_written_bytes : counters().global_read_bytes) += bytes;
  const char* p = static_cast<const char*>(address);
  if (reinterpret_cast<uintptr_t>(p) % bytes) {
    report("misaligned access to global memory", where);
    return false;
  }
  for (Buffer& buffer : machine.buffers) {
    if (p < buffer.begin || p + bytes > buffer.begin + buffer.bytes) continue;
    if (!buffer.writable) {
      if (write) report("write to " + buffer.name + ", which is only read", where);
      return !write;
    }
    const size_t first = (p - buffer.begin) / 4;
    for (size_t i = first; i < first + bytes / 4; i++) {
      if (write) record_write(buffer.words[i], now(block().thread, where), where, false, add);
      else record_read(buffer.words[i], now(block().thread, where), where);
    }
    return true;
  }
  report("access outside of all buffers", where);
  return false;
}

int passes(const uint32_t (&address)[32], int bytes) {
  const int lanes_at_a_time = std::min(32, 128 / bytes);
  int total = 0;
  for (int first = 0; first < 32; first += lanes_at_a_time) {
    std::vector<uint32_t> words;  // lanes that read the same word share it
    for (int lane = first; lane < first + lanes_at_a_time; lane++)
      for (int i = 0; i < bytes / 4; i++) words.push_back(address[lane] / 4 + i);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int in_bank[32] = {};
    for (uint32_t word : words) in_bank[word % 32]++;
    total += *std::max_element(in_bank, in_bank + 32);
  }
  return total;
}

void launch(const std::function<void()>& kernel, int64_t blocks, int threads, int shared_bytes) {
  machine.launches.push_back(Counters{});
  machine.kernel = kernel;
  machine.random.seed(machine.options.seed);
  machine.stacks.resize(STACK_BYTES * threads);
  for (Buffer& buffer : machine.buffers)  // the end of a launch orders everything before it
    for (Word& word : buffer.words) {
      const bool written = word.written;
      word = Word{};
      word.written = written;
    }
  for (int64_t i = 0; i < blocks; i++) run_block(i, threads, shared_bytes);
  counters().blocks = blocks;
}

// For Python.
extern "C" {

void emulator_reset(uint32_t seed, bool truncate) {
  machine.options = {seed, truncate};
  machine.buffers.clear();
  machine.launches.clear();
  machine.log.clear();
}

// Memory that kernels may touch. `written` false: its contents are not to be read before they are written.
void emulator_buffer(const char* name, void* begin, size_t bytes, bool writable, bool written) {
  Buffer buffer{name, static_cast<char*>(begin), bytes, writable, {}};
  if (writable) buffer.words.resize((bytes + 3) / 4);
  for (Word& word : buffer.words) word.written = written;
  machine.buffers.push_back(std::move(buffer));
}

int emulator_launches() { return static_cast<int>(machine.launches.size()); }
const Counters* emulator_counters(int launch) { return &machine.launches[launch]; }
const char* emulator_log() { return machine.log.c_str(); }

}  // extern "C"

}  // namespace simt
