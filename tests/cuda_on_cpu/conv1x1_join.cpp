// The join of a residual block on tensor cores behind a C function that test_conv1x1_join.py calls. dtype: 0 float,
// 1 half, 2 bfloat16.

#include "cuda_on_cpu.h"

#include "../../csrc/cuda/kernels/conv1x1_join.cuh"

using namespace resnet_fused;

namespace {

template <class T, class Shape, bool kVectors>
void run_tile(const Conv1x1JoinParams& p) {
  if (p.projects) {
    cuda::conv1x1_join_as<T, Shape, kVectors, true>(p, nullptr);
  } else {
    cuda::conv1x1_join_as<T, Shape, kVectors, false>(p, nullptr);
  }
}

// tile: 0 as the op chooses, 2 128x64, 3 64x64, 4 64x64 element by element.
template <class T>
void run_as(const Conv1x1JoinParams& p, int tile) {
  if (tile == 0) cuda::launch_conv1x1_join<T>(p, nullptr);
  if (tile == 2) run_tile<T, cuda::TileShape<128, 64>, true>(p);
  if (tile == 3) run_tile<T, cuda::TileShape<64, 64>, true>(p);
  if (tile == 4) run_tile<T, cuda::TileShape<64, 64>, false>(p);
}

}  // namespace

// `vectors`: six of them, those that are absent being null.
extern "C" int conv1x1_join(int dtype, int tile, const int* geometry, const int* projection, const void* x,
                            const float* x_scale, const float* x_shift, const void* weight, const float* const* vectors,
                            bool projects, const void* residual, const void* x2, const void* weight2,
                            const float* sample_factor, void* out, uint8_t* mask, bool relu) {
  Conv1x1JoinParams p{{}, x,  x_scale, x_shift,       weight, {},   residual, projects,
                      {}, x2, weight2, sample_factor, out,    mask, relu};
  std::memcpy(&p.geometry, geometry, sizeof p.geometry);
  std::memcpy(&p.projection, projection, sizeof p.projection);
  std::copy(vectors, vectors + 6, p.vectors);
  return cuda_on_cpu::with_type(dtype, [&](auto t) { run_as<decltype(t)>(p, tile); });
}
