// What is known of each word of memory, and which accesses are ordered.
#include <algorithm>
#include <climits>
#include <cstring>

#include "simt.h"

namespace simt {

namespace {

constexpr int LATE = 2000;  // steps of the scheduler until a release is seen, at most

Access now(int thread, Where where) {
  const Block& b = block();
  return {b.index, thread, b.epoch, b.warps[thread / 32].epoch, machine.releases, static_cast<int>(where.line())};
}

bool ordered_in_block(const Access& before, const Access& after) {
  if (before.thread == after.thread || before.block_epoch < after.block_epoch) return true;
  return before.thread / 32 == after.thread / 32 && before.warp_epoch < after.warp_epoch;
}

bool covers(const Access& release, const Access& access) {
  return access.block == release.block && access.releases <= release.releases && ordered_in_block(access, release);
}

bool known(const Knowledge& knowledge, const Access& access) {
  auto release = knowledge.lower_bound({access.block, INT_MIN});
  for (; release != knowledge.end() && release->first.first == access.block; ++release)
    if (covers(release->second, access)) return true;
  return false;
}

bool ordered(const Access& before, const Access& after) {
  if (before.block == after.block) return ordered_in_block(before, after);
  return known(block().acquired, before) || known(block().threads[after.thread].acquired, before);
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
  const bool same_block = other.block == block().index;
  report(std::string(what) + (same_block ? " without a barrier between" : " of another block, without release and acquire between") +
             "; the other access was in line " + std::to_string(other.line), where);
}

void record_read(Word& word, const Access& read, Where where) {
  if (word.in_flight) report("read of a copy in flight", where);
  else if (!word.written) report("read of memory that nobody wrote", where);
  else if (word.write.block >= 0 && (word.atomic || !ordered(word.write, read))) report_race("read after write", word.write, where);

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

void check_write(const Word& word, const Access& write, Where where) {
  if (word.in_flight) report("write over a copy in flight", where);
  else if (word.write.block >= 0 && !ordered(word.write, write)) report_race("write after write", word.write, where);
  if (!reads_are_ordered(word, write)) report_race("write after read", word.read, where);
}

void record_write(Word& word, const Access& write, Where where, bool asynchronous) {
  check_write(word, write, where);
  word = Word{};
  word.write = write;
  word.written = true;
  word.in_flight = asynchronous;
}

void show(Word& word, char* address) {
  if (word.held_back) std::memcpy(address, &word.value, 4);
  word.held_back = false;
}

// Atomic accesses are ordered among themselves; a plain write before the first of them is as for plain accesses.
void record_atomic(Word& word, char* address, const Access& access, Where where, Kind kind) {
  if (!word.written && kind != Kind::ATOMIC_STORE) report("read of memory that nobody wrote", where);
  if (!word.atomic && word.written) {
    if (kind != Kind::ATOMIC_LOAD) check_write(word, access, where);
    else if (word.write.block >= 0 && !ordered(word.write, access)) report_race("read after write", word.write, where);
  }
  if (kind == Kind::ATOMIC_LOAD) return;
  show(word, address);
  word = Word{};
  word.write = access;
  word.written = word.atomic = true;
}

bool inside_shared(uint32_t address, int bytes, Where where) {
  if (address % bytes) report("misaligned access to shared memory", where);
  if (address + bytes <= block().shared.size()) return true;
  report("access outside of shared memory", where);
  return false;
}

Buffer* buffer_of(const void* address, int bytes) {
  const char* p = static_cast<const char*>(address);
  for (Buffer& buffer : machine.buffers)
    if (p >= buffer.begin && p + bytes <= buffer.begin + buffer.bytes) return &buffer;
  return nullptr;
}

void merge(Knowledge& into, const Knowledge& from) {
  for (const auto& [by, release] : from) {
    Access& latest = into[by];
    if (latest.block < 0 || latest.releases < release.releases) latest = release;
  }
}

}  // namespace

void read_shared(uint32_t address, int bytes, int thread, Where where) {
  if (!inside_shared(address, bytes, where)) return;
  for (uint32_t i = address / 4; i < (address + bytes) / 4; i++) record_read(block().shared_words[i], now(thread, where), where);
}

void write_shared(uint32_t address, int bytes, int thread, Where where, bool asynchronous) {
  if (!inside_shared(address, bytes, where)) return;
  for (uint32_t i = address / 4; i < (address + bytes) / 4; i++)
    record_write(block().shared_words[i], now(thread, where), where, asynchronous);
}

void land(Copy& copy) {
  if (copy.landed || copy.destination + copy.bytes > block().shared.size()) return;  // the latter was reported at its start
  char* destination = &block().shared[copy.destination];
  if (copy.valid) read_global(destination, copy.source, copy.bytes);
  else std::memset(destination, 0, copy.bytes);
  copy.landed = true;
}

void finish(const Copy& copy, int thread) {
  if (copy.destination + copy.bytes > block().shared.size()) return;
  for (uint32_t i = copy.destination / 4; i < (copy.destination + copy.bytes) / 4; i++) {
    block().shared_words[i].in_flight = false;
    block().shared_words[i].write = now(thread, copy.where);
  }
}

bool access_global(const void* address, int bytes, Kind kind, Where where) {
  const bool reads = kind == Kind::READ || kind == Kind::ATOMIC_LOAD;
  (reads ? counters().global_read_bytes : counters().global_written_bytes) += bytes;
  if (reinterpret_cast<uintptr_t>(address) % bytes) {
    report("misaligned access to global memory", where);
    return false;
  }
  Buffer* buffer = buffer_of(address, bytes);
  if (buffer == nullptr) {
    report("access outside of all buffers", where);
    return false;
  }
  if (!buffer->writable) {
    if (!reads) report("write to " + buffer->name + ", which is only read", where);
    return reads;
  }
  const size_t first = (static_cast<const char*>(address) - buffer->begin) / 4;
  const Access access = now(block().thread, where);
  for (size_t i = first; i < first + bytes / 4; i++) {
    Word& word = buffer->words[i];
    if (kind == Kind::READ) record_read(word, access, where);
    else if (kind == Kind::WRITE) record_write(word, access, where, false);
    else record_atomic(word, buffer->begin + i * 4, access, where, kind);
  }
  return true;
}

void read_global(void* destination, const void* address, int bytes) {
  std::memcpy(destination, address, bytes);
  const Buffer* buffer = buffer_of(address, bytes);
  if (!buffer->writable) return;
  const Word* word = &buffer->words[(static_cast<const char*>(address) - buffer->begin) / 4];
  for (int i = 0; i < bytes; i += 4, word++)
    if (word->held_back && word->write.block == block().index) std::memcpy(static_cast<char*>(destination) + i, &word->value, 4);
}

void write_global(void* address, const void* source, int bytes) {
  Buffer* buffer = buffer_of(address, bytes);
  char* p = static_cast<char*>(address);
  for (int i = 0; i < bytes; i += 4) {
    Word* word = &buffer->words[(p + i - buffer->begin) / 4];
    std::memcpy(&word->value, static_cast<const char*>(source) + i, 4);
    word->held_back = true;
    block().held_back.push_back({word, p + i});
  }
}

int fetch_add(int* address, int value, Where where) {
  maybe_yield();
  if (!access_global(address, 4, Kind::ATOMIC_UPDATE, where)) return 0;
  machine.news++;
  *address += value;
  return *address - value;
}

int load_relaxed(const int* address, Where where) {
  maybe_yield();
  Thread& t = thread();
  if (t.polled == address && t.polled_at == machine.news) {
    t.state = State::POLLING;
    t.polled_where = where;
    yield();
  }
  t.polled = address;
  t.polled_at = machine.news;
  if (!access_global(address, 4, Kind::ATOMIC_LOAD, where)) return 0;
  merge(t.loaded, machine.released_with[address]);
  return *address;
}

void fence() {
  merge(thread().acquired, thread().loaded);
  thread().loaded.clear();
}

void store_release(int* address, int value, Where where) {
  if (!access_global(address, 4, Kind::ATOMIC_STORE, where)) return;
  Block& b = block();
  const Access me = now(b.thread, where);
  machine.releases++;
  for (HeldBack& held : b.held_back)
    if (held.word->write.block == b.index && covers(me, held.word->write)) show(*held.word, held.address);
  std::erase_if(b.held_back, [](const HeldBack& held) { return !held.word->held_back; });

  uint64_t due = machine.options.seed ? machine.step + machine.random() % LATE : UINT64_MAX;
  for (const Release& other : machine.releasing)  // all agree on the order of one address' values
    if (other.address == address) due = std::max(due, other.due);
  Knowledge knowledge = b.acquired;
  merge(knowledge, thread().acquired);
  merge(knowledge, {{{b.index, b.thread}, me}});
  machine.releasing.push_back({address, value, due, std::move(knowledge)});
  maybe_yield();
}

void show_release(size_t i) {
  Release release = std::move(machine.releasing[i]);
  machine.releasing.erase(machine.releasing.begin() + i);
  *release.address = release.value;
  machine.released_with[release.address] = std::move(release.knowledge);
  machine.news++;
}

void show_everything() {
  while (!machine.releasing.empty()) show_release(0);
  for (Buffer& buffer : machine.buffers)
    for (size_t i = 0; i < buffer.words.size(); i++) show(buffer.words[i], buffer.begin + i * 4);
}

void share_in_block() {
  for (Thread& t : block().threads) {
    merge(block().acquired, t.acquired);
    t.acquired.clear();
  }
}

void share_in_warp() {
  Knowledge all;
  const auto first = block().threads.begin() + block().thread / 32 * 32;
  for (auto t = first; t != first + 32; ++t) merge(all, t->acquired);
  if (all.empty()) return;
  for (auto t = first; t != first + 32; ++t) t->acquired = all;
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

}  // namespace simt
