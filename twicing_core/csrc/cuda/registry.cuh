// Which kernels there are. Every object compiled from kernels.cu enters its own when the library is loaded: what was
// linked can be called, and to leave kernels out is to leave objects out.
#pragma once
#include <functional>
#include <string_view>
#include <vector>

#include "backward.cuh"

namespace twicing {

enum class Element { BF16, FP16 };
constexpr Element element_of(ptx::Bf16) { return Element::BF16; }
constexpr Element element_of(ptx::Fp16) { return Element::FP16; }

template <class Params>  // ForwardParams or BackwardParams
struct Kernel {
  std::string_view name;  // as the operators' argument `kernel` has it
  Element element;
  int head_dim;
  std::function<ptx::Status(const Params&, void* workspace, ptx::Stream)> run;
  bool (*takes)(const Problem&) = [](const Problem&) { return true; };
  int64_t (*workspace_bytes)(const Problem&) = [](const Problem&) { return int64_t(0); };  // of scratch memory
};

template <class Params>
std::vector<Kernel<Params>>& kernels() {
  static std::vector<Kernel<Params>> entered;
  return entered;
}

template <class Params>
struct Enter {
  explicit Enter(const Kernel<Params>& kernel) { kernels<Params>().push_back(kernel); }
};

template <class Params>
const Kernel<Params>* find(std::string_view name, Element element, int64_t head_dim) {
  for (const Kernel<Params>& kernel : kernels<Params>())
    if (kernel.name == name && kernel.element == element && kernel.head_dim == head_dim) return &kernel;
  return nullptr;
}

}  // namespace twicing
