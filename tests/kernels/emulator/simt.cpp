// Fibers, barriers and the schedule.
#include "simt.h"

#include <algorithm>
#include <cstring>
#include <numeric>

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
constexpr int FAVOUR_ONE_IN = 128, NOT_FAVOURED_ONE_IN = 4;  // so that blocks get far ahead of others
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
  share_in_block();
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

void start_thread(Block& b, int index) {
  const uintptr_t top = (reinterpret_cast<uintptr_t>(b.stacks.get()) + STACK_BYTES * (index + 1)) & ~uintptr_t(15);
  void** stack = reinterpret_cast<void**>(top);
  *--stack = nullptr;  // where run_thread would return to; also aligns its frame
  *--stack = reinterpret_cast<void*>(run_thread);
  for (int i = 0; i < SAVED_REGISTERS; i++) *--stack = nullptr;
  b.threads[index] = Thread{};
  b.threads[index].stack_pointer = stack;
}

void start_block(Block& b, int index, int threads, int shared_bytes) {
  if (b.threads.size() != static_cast<size_t>(threads)) b.stacks.reset(new char[STACK_BYTES * threads]);
  b.index = index;
  b.live = threads;
  b.at_barrier = 0;
  b.epoch = 0;
  b.threads.resize(threads);
  b.warps.assign(threads / 32, Warp{});
  b.shared.assign(shared_bytes, char(0xff));
  b.shared_words.assign((shared_bytes + 3) / 4, Word{});
  b.acquired.clear();
  b.held_back.clear();
  for (int i = 0; i < threads; i++) start_thread(b, i);
}

// Below n, at random; without a seed, 0.
size_t choose(size_t n) { return machine.options.seed ? machine.random() % n : 0; }

// Makes a thread that can run the running one, if there is one. Without a seed, the block that ran last goes on.
bool choose_thread() {
  const size_t blocks = machine.resident.size();
  if (machine.options.seed && choose(FAVOUR_ONE_IN) == 0) machine.favoured = choose(blocks);
  const bool other = machine.options.seed && choose(NOT_FAVOURED_ONE_IN) == 0;
  const size_t first_block = other ? choose(blocks) : machine.favoured;
  for (size_t i = 0; i < blocks; i++) {
    Block& b = machine.resident[(first_block + i) % blocks];
    if (b.live == 0) continue;
    machine.block = &b;
    const size_t warps = b.warps.size(), first_warp = choose(warps);
    for (size_t w = 0; w < warps; w++) {
      b.thread = next_runnable((first_warp + w) % warps);
      if (b.thread < 0) continue;
      if (!machine.options.seed) machine.favoured = (first_block + i) % blocks;
      return true;
    }
  }
  return false;
}

// What was released becomes visible: what is due, or, if everybody waits, what is due next. Was there anything?
bool show_releases(bool everybody_waits) {
  if (machine.releasing.empty()) return false;
  size_t next = 0;
  for (size_t i = 1; i < machine.releasing.size(); i++)
    if (machine.releasing[i].due < machine.releasing[next].due) next = i;
  if (!everybody_waits && machine.releasing[next].due > machine.step) return false;
  show_release(next);
  for (Block& b : machine.resident)
    for (Thread& t : b.threads)
      if (t.state == State::POLLING) t.state = State::RUNNABLE;
  return true;
}

void report_deadlock() {
  for (Block& b : machine.resident) {
    if (b.live == 0) continue;
    machine.block = &b;
    b.thread = 0;
    while (thread().state == State::DONE) b.thread++;
    const State state = thread().state;
    report("deadlock: this thread waits here, others elsewhere",
           state == State::POLLING ? thread().polled_where : state == State::AT_BARRIER ? b.barrier : warp().where);
    return;
  }
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
  block().live = 0;
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

void launch(const std::function<void()>& kernel, int64_t blocks, int threads, int shared_bytes) {
  machine.launches.push_back(Counters{});
  counters().blocks = blocks;
  machine.kernel = kernel;
  machine.random.seed(machine.options.seed);
  machine.resident.resize(std::min<int64_t>(blocks, machine.options.resident));
  machine.favoured = 0;
  machine.step = machine.news = machine.releases = 0;
  machine.released_with.clear();
  for (Buffer& buffer : machine.buffers)  // the end of a launch orders everything before it
    for (Word& word : buffer.words) {
      const bool written = word.written;
      word = Word{};
      word.written = written;
    }

  std::vector<int> order(blocks);  // in which they start
  std::iota(order.begin(), order.end(), 0);
  if (machine.options.seed) std::shuffle(order.begin(), order.end(), machine.random);
  size_t next = 0;
  for (Block& b : machine.resident) start_block(b, order[next++], threads, shared_bytes);
  for (;; machine.step++) {
    show_releases(false);
    if (choose_thread()) {
      simt_switch(&machine.scheduler_stack_pointer, thread().stack_pointer);
      if (block().live == 0 && next < order.size()) start_block(block(), order[next++], threads, shared_bytes);
    } else if (!show_releases(true)) {
      break;
    }
  }
  report_deadlock();  // of blocks that have not ended
  show_everything();
}

// For Python.
extern "C" {

void emulator_reset(uint32_t seed, bool truncate, int resident) {
  machine.options = {seed, truncate, resident};
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
