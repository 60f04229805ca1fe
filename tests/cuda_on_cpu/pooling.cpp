// The kernels of the stem's pooling behind C functions that test_pooling.py calls; as a program, under a sanitizer.
// dtype: 0 float, 1 half, 2 bfloat16.

#include "cuda_on_cpu.h"

#include "../../csrc/cuda/kernels/norm_relu_pool.cuh"
#include "../../csrc/cuda/kernels/norm_relu_pool_apply.cuh"
#include "../../csrc/cuda/kernels/norm_relu_pool_backward.cuh"

using namespace resnet_fused;

namespace {

// sizes: samples, channels, then size, windows, kernel, stride and padding of the height, and of the width.
PoolGeometry geometry_of(const int* s) {
  return {s[0], s[1], {s[2], s[3], s[4], s[5], s[6]}, {s[7], s[8], s[9], s[10], s[11]}};
}

}  // namespace

extern "C" {

int norm_relu_pool(int dtype, const int* sizes, const void* z, const float* scale, const float* shift, void* out,
                   uint8_t* index) {
  const NormReluPoolParams p{geometry_of(sizes), z, scale, shift, out, index};
  return cuda_on_cpu::with_type(dtype, [&](auto t) { cuda::launch_norm_relu_pool<decltype(t)>(p, nullptr); });
}

int64_t pool_partial_floats(const int* sizes) { return cuda::pool_partial_floats(geometry_of(sizes)); }

int norm_relu_pool_backward(int dtype, const int* sizes, const void* grad_out, const uint8_t* index, const void* z,
                            const float* mean, const float* scale, const float* shift, float* partial, float* sum_g,
                            float* sum_gz) {
  const NormReluPoolBackwardParams p{geometry_of(sizes), grad_out, index, z, mean, scale, shift, partial,
                                     {sum_g, sum_gz}};
  return cuda_on_cpu::with_type(dtype, [&](auto t) { cuda::launch_norm_relu_pool_backward<decltype(t)>(p, nullptr); });
}

int norm_relu_pool_apply(int dtype, const int* sizes, const void* grad_out, const uint8_t* index, const void* z,
                         const float* a, const float* b, const float* d, const float* scale, const float* shift,
                         void* dz) {
  const NormReluPoolApplyParams p{geometry_of(sizes), grad_out, index, z, a, b, d, scale, shift, dz};
  return cuda_on_cpu::with_type(dtype, [&](auto t) { cuda::launch_norm_relu_pool_apply<decltype(t)>(p, nullptr); });
}

int quotient(int n, int divisor) { return cuda::Divisor(divisor).divide(n); }
}

#ifdef RESNET_FUSED_SANITIZED

namespace {

// All three, every tensor ending where its memory does: that no address lies beyond, the sanitizer says.
bool runs(int channels, const PoolAxis& h, const PoolAxis& w) {
  const int sizes[] = {2,         channels, h.size,    h.windows, h.kernel, h.stride,
                       h.padding, w.size,   w.windows, w.kernel,  w.stride, w.padding};
  const size_t pixels = size_t(2) * h.size * w.size * channels, pooled = size_t(2) * h.windows * w.windows * channels;
  const std::vector<float> vector(channels, 1.f);
  std::vector<float> partial(pool_partial_floats(sizes)), sum_g(channels), sum_gz(channels);
  std::vector<uint8_t> index(pooled);
  std::vector<__nv_bfloat16> z(pixels), dz(pixels), out(pooled);
  for (size_t i = 0; i < pixels; ++i) z[i] = __float2bfloat16_rn(static_cast<float>(i * 7 % 13) - 4.f);
  const float* v = vector.data();
  norm_relu_pool(2, sizes, z.data(), v, v, out.data(), index.data());
  norm_relu_pool_backward(2, sizes, out.data(), index.data(), z.data(), v, v, v, partial.data(), sum_g.data(),
                          sum_gz.data());
  norm_relu_pool_apply(2, sizes, out.data(), index.data(), z.data(), v, v, v, v, v, dz.data());
  float total = 0.f, arrived = 0.f;  // of small whole numbers: exact
  for (const auto& value : out) total += __bfloat162float(value);
  for (const float value : sum_g) arrived += value;
  return total == arrived;
}

}  // namespace

int main() {
  bool right = true;
  for (const int channels : {1, 16, 20}) {
    right &= runs(channels, {9, 5, 3, 2, 1}, {8, 4, 3, 2, 1});   // a stem's
    right &= runs(channels, {7, 3, 2, 3, 1}, {11, 4, 2, 3, 1});  // gaps between windows
    right &= runs(channels, {5, 5, 3, 1, 1}, {1, 1, 3, 2, 1});   // nine windows a pixel, one column
  }
  std::puts(right ? "right" : "wrong");
  return 0;
}

#endif
