// Every instruction the kernels use that is not plain C++, one function each, and nothing else.
//
// nvcc takes the definitions below. A host compiler takes those of tests/kernels/emulator instead, which execute the
// same functions on the CPU and check them; so the kernels themselves are one source for both.
// Instructions are described in the PTX ISA, whose names the functions keep.
#pragma once

#ifndef __CUDACC__
#include "instructions.h"
#else

#include <cstdint>

#define DEVICE __device__ __forceinline__

namespace ptx {

struct Bf16 {};  // element types, passed as tags: both are two bytes, kept in uint16_t
struct Fp16 {};

using Address = uint32_t;  // bytes, in the block's shared memory
using Stream = cudaStream_t;

struct Words4 {  // what one 16-byte access moves
  uint32_t word[4];
};

// The same number, but what follows from it is computed where it is used, instead of before a loop for lack of registers.
DEVICE int recompute(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }

DEVICE Address shared_memory() {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  return static_cast<Address>(__cvta_generic_to_shared(shared_bytes));
}

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

// Tensor cores: d[16x8] += a[16x16] b[16x8], accumulated in float32.
DEVICE void mma_m16n8k16(Bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_m16n8k16(Fp16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices from shared memory; lane 8m + r gives the address of row r of matrix m.
DEVICE void ldmatrix_x4(uint32_t (&r)[4], Address row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], Address row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// Copies that go on while the thread computes; where `valid` is false they write zeros and read nothing.
DEVICE void cp_async_16(Address destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}
DEVICE void cp_async_4(Address destination, const void* source, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(destination), "l"(source), "r"(valid ? 4 : 0)
               : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void cp_async_wait() {  // until at most PENDING of this thread's groups are under way
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }  // a bit a lane
DEVICE int trailing_ones(uint32_t bits) { return __clz(__brev(~bits)); }

DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two elements in a word, the one of the lower column in the lower half.
DEVICE uint32_t pack(Bf16, float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
DEVICE uint32_t pack(Fp16, float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
DEVICE float low(Bf16, uint32_t word) { return __uint_as_float(word << 16); }
DEVICE float high(Bf16, uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
DEVICE float low(Fp16, uint32_t word) {
  float value;
  asm("{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %1; cvt.f32.f16 %0, lo; }" : "=f"(value) : "r"(word));
  return value;
}
DEVICE float high(Fp16, uint32_t word) {
  float value;
  asm("{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %1; cvt.f32.f16 %0, hi; }" : "=f"(value) : "r"(word));
  return value;
}

DEVICE void store_shared(Address address, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}
DEVICE void store_shared(Address address, float value) { store_shared(address, __float_as_uint(value)); }
DEVICE void load_shared(Address address, uint32_t (&pair)[2]) {
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(pair[0]), "=r"(pair[1]) : "r"(address) : "memory");
}
DEVICE void load_shared(Address address, float (&pair)[2]) {
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(pair[0]), "=f"(pair[1]) : "r"(address) : "memory");
}
DEVICE Words4 load_shared_16(Address address) {
  Words4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(address)
               : "memory");
  return v;
}

// Global memory; an access that is not `valid` does not happen, and a load then gives 0.
DEVICE uint32_t load_global(const void* address, bool valid) {
  return valid ? *static_cast<const uint32_t*>(address) : 0;
}
DEVICE float load_global(const float* address, bool valid) { return valid ? *address : 0.f; }
DEVICE int load_global(const int* address) { return *address; }
DEVICE Words4 load_global_16(const void* address, bool valid) {
  const uint4 v = valid ? *static_cast<const uint4*>(address) : make_uint4(0, 0, 0, 0);
  return {{v.x, v.y, v.z, v.w}};
}
DEVICE void store_global(float* address, float value, bool valid) {
  if (valid) *address = value;
}
DEVICE void store_global(void* address, uint32_t word, bool valid) {
  if (valid) *static_cast<uint32_t*>(address) = word;
}
DEVICE void store_global_16(void* address, Words4 v, bool valid) {
  if (valid) *static_cast<uint4*>(address) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}
DEVICE void reduce_add_global(float* address, float value, bool valid) {  // in no particular order
  if (valid) asm volatile("red.global.add.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}

// Blocks of a launch that talk to each other (PTX ISA, "Memory Consistency Model"), in the scope of the whole device.
DEVICE int fetch_add(int* address, int value) {  // relaxed
  int old;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(value) : "memory");
  return old;
}
DEVICE int load_relaxed(const int* address) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
DEVICE void store_release(int* address, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// Host side: the next work on a stream. Return what CUDA says of it; no call waits for the device.
template <class Kernel, class Parameters>
cudaError_t launch(Kernel kernel, int64_t blocks, int threads, int shared_bytes, Stream stream, const Parameters& p) {
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(p);
  return cudaGetLastError();
}
inline cudaError_t fill_zero(void* address, size_t bytes, Stream stream) {
  return cudaMemsetAsync(address, 0, bytes, stream);
}
using Status = cudaError_t;
constexpr Status SUCCESS = cudaSuccess;
inline const char* describe(Status status) { return cudaGetErrorString(status); }

}  // namespace ptx
#endif
