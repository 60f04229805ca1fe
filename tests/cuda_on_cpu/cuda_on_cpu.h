// Runs the kernels of csrc/cuda/kernels on the CPU, from the very source that nvcc compiles: every CUDA thread is a
// fiber that runs up to its next __syncthreads, the blocks of a grid run one after another. A missing barrier shows as
// a wrong value, always the same one. What this cannot show: warps, coalescing, memory ordering between blocks.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // blocks run one at a time, so that one copy serves
#define __launch_bounds__(...)
#define RESNET_FUSED_LAUNCH(kernel, grid, block, stream, ...) \
  cuda_on_cpu::launch([&] { (kernel)(__VA_ARGS__); }, grid, block)

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

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done = false;
};

inline int launches = 0;  // since it was last set to 0
inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline const std::function<void()>* kernel_body = nullptr;

}  // namespace cuda_on_cpu

inline void __syncthreads() { swapcontext(&cuda_on_cpu::current->context, &cuda_on_cpu::scheduler); }

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
  (*kernel_body)();
  current->done = true;
}

inline void run_block(std::vector<Fiber>& fibers) {
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    fiber.done = false;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (size_t left = fibers.size(); left > 0;) {
    const size_t before = left;
    for (size_t i = 0; i < fibers.size(); ++i) {
      if (fibers[i].done) continue;
      current = &fibers[i];
      threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
      swapcontext(&scheduler, &current->context);
      left -= current->done;
    }
    if (left != 0 && left != before) {
      std::fprintf(stderr, "%zu threads wait in __syncthreads for others that have ended\n", left);
      std::abort();
    }
  }
}

inline void launch(const std::function<void()>& body, dim3 grid, dim3 block) {
  static std::vector<Fiber> fibers;
  ++launches;
  fibers.resize(block.x * block.y * block.z);
  kernel_body = &body;
  blockDim = block;
  gridDim = grid;
  for (unsigned i = 0; i < grid.x * grid.y * grid.z; ++i) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    run_block(fibers);
  }
}

}  // namespace cuda_on_cpu
