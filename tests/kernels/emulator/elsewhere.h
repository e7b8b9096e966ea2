// Launches that somebody else than the emulator is to carry out. The host's part of the kernels, which decides on grids
// and shared memory, is then the same for all.
#pragma once
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>

namespace simt {

struct Elsewhere {
  // The kernel's symbol, the grid, and the bytes of its parameters.
  void (*launch)(const char* kernel, int64_t blocks, int threads, int shared_bytes, const void* parameters, size_t bytes);
  void (*fill_zero)(void* address, size_t bytes);  // has been done
};
static Elsewhere elsewhere;  // null: the emulator. Of this library: an inline variable would be that of all loaded ones

inline const char* symbol_of(const void* function) {
  Dl_info info;
  return dladdr(function, &info) ? info.dli_sname : nullptr;
}

// For Python.
extern "C" inline __attribute__((used)) void emulator_hand_launches_to(Elsewhere to) { elsewhere = to; }

}  // namespace simt
