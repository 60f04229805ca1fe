// The parts of the tensor-core kernels by themselves, for test_instructions.py. dtype: 0 float, 1 half, 2 bfloat16.

#include "cuda_on_cpu.h"

#include "../../csrc/cuda/kernels/shared_matrix.cuh"

using namespace resnet_fused::cuda;

namespace {

template <class T>
void multiply_fragment(const T* a, const T* b, float* sum) {  // a[16][k], b[8][k], sum[16][8]
  constexpr int kDepth = 32 / sizeof(T), kPair = 4 / sizeof(T);
  const int lane = threadIdx.x, group = lane / 4, within = lane % 4;
  const auto word = [](const T* from) {
    uint32_t bits;
    std::memcpy(&bits, from, 4);
    return bits;
  };
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) {
    left[i] = word(a + (group + 8 * (i % 2)) * kDepth + within * kPair + (i / 2) * kDepth / 2);
  }
  for (int i = 0; i < 2; ++i) right[i] = word(b + group * kDepth + within * kPair + i * kDepth / 2);
  float part[4];
  for (int i = 0; i < 4; ++i) part[i] = sum[(group + 8 * (i / 2)) * 8 + 2 * within + i % 2];
  multiply<T>(part, left, right);
  for (int i = 0; i < 4; ++i) sum[(group + 8 * (i / 2)) * 8 + 2 * within + i % 2] = part[i];
}

// a[32][128 bytes] times b[32][128 bytes]^T, copied to shared memory as rows come; `waits`: as a kernel has to.
template <class T>
void multiply_shared(const T* a, const T* b, float* sum, bool waits) {
  RESNET_FUSED_SHARED(shared);
  for (int i = threadIdx.x; i < 2 * 32 * kChunks; i += kWarpThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const T* from = (row < 32 ? a : b) + row % 32 * (kRowBytes / sizeof(T)) + chunk * kChunkElements<T>;
    copy_async(shared_address(shared) + chunk_offset(row, chunk), from, true);
  }
  commit_copies();
  if (waits) wait_for_copies<0>();
  __syncthreads();
  WarpSums<32, 32> sums{};
  multiply_rows<T>(sums, shared_address(shared), shared_address(shared) + 32 * kRowBytes);
  wait_for_copies<0>();
  const int lane = threadIdx.x;
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int e = 0; e < 4; ++e) {
        sum[(16 * i + lane / 4 + 8 * (e / 2)) * 32 + 8 * j + 2 * (lane % 4) + e % 2] = sums.v[i][j][e];
      }
    }
  }
}

}  // namespace

extern "C" {

void fragment_product(int dtype, const void* a, const void* b, float* sum) {
  cuda_on_cpu::with_type(dtype, [&](auto t) {
    using T = decltype(t);
    RESNET_FUSED_LAUNCH(multiply_fragment<T>, dim3(1), dim3(32), nullptr, static_cast<const T*>(a),
                        static_cast<const T*>(b), sum);
  });
}

void shared_product(int dtype, const void* a, const void* b, float* sum, bool waits) {
  cuda_on_cpu::with_type(dtype, [&](auto t) {
    using T = decltype(t);
    RESNET_FUSED_LAUNCH_SHARED(multiply_shared<T>, dim3(1), dim3(32), 64 * kRowBytes, nullptr, static_cast<const T*>(a),
                               static_cast<const T*>(b), sum, waits);
  });
}

uint32_t rounded_to_tf32(uint32_t bits) { return to_tf32(bits) & ~0x1FFFu; }

// A shared memory row of 16 bytes for each of 32 lanes -> four words a lane.
void matrices(const void* rows, uint32_t* words) {
  const auto kernel = [&] {
    RESNET_FUSED_SHARED(shared);
    std::memcpy(shared + 16 * threadIdx.x, static_cast<const char*>(rows) + 16 * threadIdx.x, 16);
    __syncwarp();
    uint32_t to[4];
    load_matrices(to, shared + 16 * threadIdx.x);
    std::memcpy(words + 4 * threadIdx.x, to, 16);
  };
  RESNET_FUSED_LAUNCH_SHARED(kernel, dim3(1), dim3(32), 512, nullptr);
}
}
