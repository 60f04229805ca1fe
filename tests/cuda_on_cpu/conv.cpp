// The convolution on tensor cores behind a C function that test_conv.py calls; as a program, under a sanitizer.
// dtype: 0 float, 1 half, 2 bfloat16.

#include "cuda_on_cpu.h"

#include "../../csrc/cuda/kernels/conv_norm_add_relu.cuh"

using namespace resnet_fused;

namespace {

// tile: 0 as the op chooses, 1 128x128 (of 16 bits), 2 128x64, 3 64x64, 4 128x64 element by element.
template <class T>
void run_as(const ConvNormAddReluParams& p, int tile) {
  if (tile == 0) cuda::launch_conv_norm_add_relu<T>(p, nullptr);
  if constexpr (sizeof(T) == 2) {
    if (tile == 1) cuda::conv_norm_add_relu_as<T, cuda::TileShape<128, 128>, true>(p, nullptr);
  }
  if (tile == 2) cuda::conv_norm_add_relu_as<T, cuda::TileShape<128, 64>, true>(p, nullptr);
  if (tile == 3) cuda::conv_norm_add_relu_as<T, cuda::TileShape<64, 64>, true>(p, nullptr);
  if (tile == 4) cuda::conv_norm_add_relu_as<T, cuda::TileShape<128, 64>, false>(p, nullptr);
}

}  // namespace

extern "C" int conv_norm_add_relu(int dtype, int tile, bool copies_wait, const int* geometry, const void* x,
                                  const void* weight, const float* bias, const float* mean, const float* var,
                                  const float* gamma, const float* beta, float eps, const void* residual, void* out,
                                  bool relu, const float* scale, const float* shift, const float* sample_factor,
                                  uint8_t* mask) {
  ConvNormAddReluParams p{
      {}, x, weight, {bias, mean, var, gamma, beta, eps}, residual, out, relu, scale, shift, sample_factor, mask};
  std::memcpy(&p.geometry, geometry, sizeof p.geometry);
  cuda_on_cpu::copies_wait = copies_wait;
  return cuda_on_cpu::with_type(dtype, [&](auto t) { run_as<decltype(t)>(p, tile); });
}

#ifdef RESNET_FUSED_SANITIZED

namespace {

// A join of whole numbers, whose every tensor ends where its memory does, against a plain loop.
bool is_right(const ConvGeometry& g, int tile) {
  unsigned state = 1;
  const auto drawn = [&state](size_t count) {
    std::vector<__nv_bfloat16> values(count);
    for (auto& v : values) v = __float2bfloat16_rn(static_cast<float>((state = state * 1103515245 + 12345) >> 29) - 4);
    return values;
  };
  const auto x = drawn(size_t(g.n) * g.h * g.w * g.c), weight = drawn(size_t(g.k) * g.r * g.s * g.c);
  const auto residual = drawn(size_t(g.n) * g.p * g.q * g.k);
  std::vector<__nv_bfloat16> out(residual.size());
  const std::vector<float> scale(g.k, 1.f), shift(g.k, 2.f);
  std::vector<float> factor{0.f, 2.f, 1.f};
  factor.resize(g.n);
  std::vector<uint8_t> mask(out.size() / g.k * ((g.k + 7) / 8));
  const ConvNormAddReluParams p{g,          x.data(), weight.data(), {},           residual.data(),
                                out.data(), true,     scale.data(),  shift.data(), factor.data(),
                                mask.data()};
  run_as<__nv_bfloat16>(p, tile);
  size_t at = 0;
  for (int n = 0; n < g.n; ++n) {
    for (int i = 0; i < g.p * g.q; ++i) {
      for (int k = 0; k < g.k; ++k, ++at) {
        float sum = 2.f;
        for (int tap = 0; tap < g.r * g.s; ++tap) {
          const int h = i / g.q * g.stride_h - g.padding_h + tap / g.s * g.dilation_h;
          const int w = i % g.q * g.stride_w - g.padding_w + tap % g.s * g.dilation_w;
          if (h < 0 || h >= g.h || w < 0 || w >= g.w) continue;
          for (int c = 0; c < g.c; ++c) {
            sum += __bfloat162float(x[((n * g.h + h) * g.w + w) * g.c + c]) *
                   __bfloat162float(weight[(k * g.r * g.s + tap) * g.c + c]);
          }
        }
        sum = factor[n] * sum + __bfloat162float(residual[at]);
        const float rounded = __bfloat162float(__float2bfloat16_rn(sum < 0.f ? 0.f : sum));
        const bool bit = (mask[at / g.k * ((g.k + 7) / 8) + k / 8] >> (k % 8)) & 1;
        if (__bfloat162float(out[at]) != rounded || bit != (rounded > 0.f)) return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  const ConvGeometry same{2, 5, 7, 16, 24, 3, 3, 5, 7, 1, 1, 1, 1, 1, 1};
  const ConvGeometry stem{1, 9, 11, 3, 5, 7, 7, 5, 6, 2, 2, 3, 3, 1, 1};
  const ConvGeometry apart{1, 6, 6, 65, 8, 3, 3, 6, 6, 1, 1, 2, 2, 2, 2};
  const ConvGeometry pointwise{3, 5, 5, 72, 136, 1, 1, 3, 3, 2, 2, 0, 0, 1, 1};
  const ConvGeometry many{1, 20, 15, 8, 8, 1, 1, 20, 15, 1, 1, 0, 0, 1, 1};
  cuda_on_cpu::multiprocessors = 1;  // so that blocks take several tiles
  const bool right = is_right(same, 1) && is_right(same, 2) && is_right(same, 3) && is_right(same, 4) &&
                     is_right(stem, 0) && is_right(apart, 0) && is_right(pointwise, 1) && is_right(pointwise, 0) &&
                     is_right(many, 2);
  std::puts(right ? "right" : "wrong");
  return right ? 0 : 1;
}

#endif
