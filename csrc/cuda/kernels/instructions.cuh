// What tensor-core kernels need of a GPU from sm_80 on, an instruction a function: asynchronous copies to shared
// memory, matrix fragments out of it, products of fragments. A fragment of TF32 lies as one of 16-bit values of twice
// the width would: ldmatrix moves 16-byte rows and asks not what is in them.
#pragma once

#include "tile.cuh"

// Whether what is compiled now has these instructions: a build may ask for sm_75 too.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define RESNET_FUSED_HAS_TENSOR_CORES 0
#else
#define RESNET_FUSED_HAS_TENSOR_CORES 1
#endif

#if defined(__CUDACC__)  // else the including file has defined them, see tests/cuda_on_cpu/instructions.h

namespace resnet_fused::cuda {

// Of the current device. The attribute is asked of the driver's memory: no synchronisation.
inline unsigned multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
}

// Let a kernel have more than 48 KB of dynamic shared memory. It is a property of the kernel on each device: cheap
// enough to be said at every launch, which spares a table of devices.
template <class Kernel>
void allow_shared(Kernel kernel, int bytes) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// In shared memory, in half the bits of a pointer.
using SharedAddress = unsigned;
__device__ inline SharedAddress shared_address(const void* p) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(p));
}

// 16 bytes to shared memory, past L1, or zeros if they are not `there`.
__device__ inline void copy_async(SharedAddress to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}

// 16 bytes that are in registers.
__device__ inline void store_chunk(SharedAddress to, uint4 chunk) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(to), "r"(chunk.x), "r"(chunk.y), "r"(chunk.z),
               "r"(chunk.w)
               : "memory");
}

__device__ inline uint4 load_chunk(SharedAddress from) {
  uint4 chunk;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(chunk.x), "=r"(chunk.y), "=r"(chunk.z), "=r"(chunk.w)
               : "r"(from)
               : "memory");
  return chunk;
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Until at most kGroups of the committed groups of this thread are on their way.
template <int kGroups>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroups) : "memory");
}

// Four 8x8 matrices of 16-bit values, or 8x4 of 32-bit ones. Lane i names row i % 8 of matrix i / 8.
__device__ inline void load_matrices(uint32_t (&to)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// Their transposes, of 16-bit values: each lane receives of every matrix two neighbours of column i / 4.
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

__device__ inline uint32_t load_word(SharedAddress from) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(word) : "r"(from) : "memory");
  return word;
}

// The same number, of which the compiler does not know so: what follows from it is computed where it stands, instead of
// once before a loop, to be kept in registers that the loop needs.
__device__ inline int anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// What the lane has whose number differs in the bits of `mask`; of all lanes of a warp at once.
__device__ inline float from_lane_xor(float value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }

// Of a float32: the nearest TF32, where the tensor core would cut it off.
__device__ inline uint32_t to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

#define RESNET_FUSED_MMA(shape, types)                                         \
  asm("mma.sync.aligned." shape ".row.col.f32." types                          \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n" \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                 \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// sum[16][8] += a[16][k] * b[k][8] in float32, k being 16, or 8 of TF32.
template <class T>
__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ inline void multiply<__nv_bfloat16>(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  RESNET_FUSED_MMA("m16n8k16", "bf16.bf16");
}
template <>
__device__ inline void multiply<__half>(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  RESNET_FUSED_MMA("m16n8k16", "f16.f16");
}
template <>
__device__ inline void multiply<float>(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  RESNET_FUSED_MMA("m16n8k8", "tf32.tf32");
}
#undef RESNET_FUSED_MMA

}  // namespace resnet_fused::cuda

#endif
