// Runs the kernels of csrc/cuda/kernels on the CPU, from the very source that nvcc compiles: every CUDA thread is a
// fiber that runs up to its next barrier, the blocks of a grid run one after another. A missing barrier may show as a
// wrong value, always the same one, and is found by races.cpp whether it does or not. Tensor cores and copies to shared
// memory are in instructions.h. What this cannot show: speed, coalescing, bank conflicts.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "races.h"

#define __global__
#define __device__
#define __shared__ static  // blocks run one at a time, so that one copy serves
#define __launch_bounds__(...)
#define RESNET_FUSED_LAUNCH(kernel, grid, block, stream, ...) \
  cuda_on_cpu::launch([&] { (kernel)(__VA_ARGS__); }, grid, block)
#define RESNET_FUSED_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
  cuda_on_cpu::launch([&] { (kernel)(__VA_ARGS__); }, grid, block, bytes)
#define RESNET_FUSED_SHARED(name) unsigned char* const name = cuda_on_cpu::shared.data()

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorNoKernelImageForDevice };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;

// A copy to shared memory that was started and perhaps not made.
struct Copy {
  void* to;
  const void* from;  // null: zeros
  int64_t group;
};

// Where a thread, or the scheduler, goes on. ucontext begins a stack; each later switch by it would be two system
// calls, so that jumps do those, but under AddressSanitizer, which follows ucontext alone.
struct Place {
  ucontext_t context;
  jmp_buf jump;
  bool begun = false;
};

inline void go(Place& from, Place& to) {
#if defined(__SANITIZE_ADDRESS__)
  swapcontext(&from.context, &to.context);
#else
  from.begun = true;
  if (_setjmp(from.jump) != 0) return;
  if (to.begun) _longjmp(to.jump, 1);
  to.begun = true;
  setcontext(&to.context);
#endif
}

struct Fiber : Place {
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done = false;
  const int64_t* gate = nullptr;  // waits until *gate is no longer `closed`
  int64_t closed = 0;
  std::vector<Copy> copies;
  int64_t group = 0;  // groups of copies committed
};

// Where threads meet: the last to come finds all the others waiting.
struct Meeting {
  unsigned arrived = 0;
  int64_t generation = 0;
};

// A warp's, with what its lanes brought.
struct Warp : Meeting {
  int32_t syncs = 0;  // of them those that order memory
  const char* kind = nullptr;
  void* brought[kWarp];
};

inline int launches = 0;              // since it was last set to 0
inline bool copies_wait = true;       // whether copies are made when they are waited for, or when they are started
inline unsigned multiprocessors = 3;  // few, so that blocks take several tiles each
inline std::vector<unsigned char> shared;
inline Place scheduler;
inline Fiber* current = nullptr;
inline std::vector<Warp> warps;
inline Meeting block_meeting;
inline const std::function<void()>* kernel_body = nullptr;

[[noreturn]] inline void stop(const char* text) {
  std::fprintf(stderr, "thread (%u, %u) of block (%u, %u): %s\n", threadIdx.x, threadIdx.y, blockIdx.x, blockIdx.y,
               text);
  std::abort();
}

// Wait for `threads` to come; whether this one is the last, and then all others still wait until release().
inline bool is_last_to(Meeting& meeting, unsigned threads) {
  if (++meeting.arrived == threads) return true;
  current->gate = &meeting.generation;
  current->closed = meeting.generation;
  go(*current, scheduler);
  return false;
}

inline void release(Meeting& meeting) {
  meeting.arrived = 0;
  ++meeting.generation;
}

inline unsigned thread_number() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

// f(lanes) once for a warp, `lanes` being the arguments of its 32 threads.
template <class Lane, class F>
void together(const char* kind, Lane& mine, const F& f) {
  const Emulating now;
  const unsigned thread = thread_number();
  Warp& warp = warps[thread / kWarp];
  if (warp.arrived != 0 && std::strcmp(warp.kind, kind) != 0) stop("the lanes of a warp run different instructions");
  warp.kind = kind;
  warp.brought[thread % kWarp] = &mine;
  if (!is_last_to(warp, kWarp)) return;
  f(reinterpret_cast<Lane* const*>(warp.brought));
  release(warp);
}

inline void meet_block(const char* file, int line) {
  const Emulating now;
  if (is_left_out(file, line) || !is_last_to(block_meeting, blockDim.x * blockDim.y * blockDim.z)) return;
  block_meets();
  release(block_meeting);
}

inline void meet_warp(const char* file, int line) {
  if (is_left_out(file, line)) return;
  Warp* warp = &warps[thread_number() / kWarp];
  together("__syncwarp", warp, [](Warp* const* const* lanes) { ++(*lanes[0])->syncs; });
}

}  // namespace cuda_on_cpu

#define __syncthreads() cuda_on_cpu::meet_block(__FILE__, __LINE__)
#define __syncwarp() cuda_on_cpu::meet_warp(__FILE__, __LINE__)

struct __half {
  _Float16 value;
};
inline float __half2float(__half h) { return h.value; }
inline __half __float2half_rn(float f) { return {static_cast<_Float16>(f)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 b) {
  const uint32_t word = static_cast<uint32_t>(b.bits) << 16;
  float f;
  std::memcpy(&f, &word, sizeof f);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  if (std::isnan(f)) return {0x7FFF};
  uint32_t word;
  std::memcpy(&word, &f, sizeof word);
  return {static_cast<uint16_t>((word + 0x7FFF + ((word >> 16) & 1)) >> 16)};
}

namespace cuda_on_cpu {

inline void fiber_main() {
  kernel_runs(true);
  (*kernel_body)();
  kernel_runs(false);
  if (!current->copies.empty()) stop("ended before its copies to shared memory had");
  current->done = true;
  for (;;) go(*current, scheduler);
}

inline void start(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = nullptr;
  fiber.begun = false;
  fiber.done = false;
  fiber.gate = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

inline void run_block(std::vector<Fiber>& fibers) {
  std::fill(shared.begin(), shared.end(), 0xFF);  // NaN in every dtype
  warps.assign((fibers.size() + kWarp - 1) / kWarp, Warp());
  block_meeting = Meeting();
  block_begins();
  for (Fiber& fiber : fibers) start(fiber);
  for (size_t left = fibers.size(); left > 0;) {
    bool moved = false;
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber& fiber = fibers[i];
      if (fiber.done || (fiber.gate && *fiber.gate == fiber.closed)) continue;
      current = &fiber;
      fiber.gate = nullptr;
      moved = true;
      threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
      go(scheduler, fiber);
      left -= fiber.done;
    }
    if (left != 0 && !moved) {
      std::fprintf(stderr, "%zu threads wait at a barrier for others that have ended or wait elsewhere\n", left);
      std::abort();
    }
  }
}

inline void launch(const std::function<void()>& body, dim3 grid, dim3 block, size_t bytes = 0) {
  ++launches;
#if defined(CUDA_ON_CPU_STARTS_NOTHING)  // benchmarks/host_time.py
  return;
#endif
  static std::vector<Fiber> fibers;
  fibers.resize(block.x * block.y * block.z);
  std::vector<unsigned char>(bytes).swap(shared);  // of just that size: a sanitizer sees what is beyond
  kernel_body = &body;
  launch_begins();
  blockDim = block;
  gridDim = grid;
  for (unsigned i = 0; i < grid.x * grid.y * grid.z; ++i) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    run_block(fibers);
  }
}

}  // namespace cuda_on_cpu

#include "instructions.h"

namespace cuda_on_cpu {

// f(T{}) for the dtype that a test's number stands for: 0 float, 1 half, 2 bfloat16. How often f launched something.
template <class F>
int with_type(int dtype, const F& f) {
  launches = 0;
  if (dtype == 0) f(float{});
  if (dtype == 1) f(__half{});
  if (dtype == 2) f(__nv_bfloat16{});
  return launches;
}

}  // namespace cuda_on_cpu
