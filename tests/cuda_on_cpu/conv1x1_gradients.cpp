// The gradients of a 1x1 convolution on tensor cores behind C functions that test_conv1x1_gradients.py calls; as a
// program, under a sanitizer. dtype: 0 float, 1 half, 2 bfloat16. Tile: 1 64x128, 2 128x64 (of the weight, 16 bits), 3
// 64x64, 4 that element by element.

#include "cuda_on_cpu.h"

#include "../../csrc/cuda/kernels/conv1x1_dgrad.cuh"
#include "../../csrc/cuda/kernels/conv1x1_wgrad.cuh"

using namespace resnet_fused;

namespace {

// Scratch of just the size that is asked for, in which nothing is a number yet.
template <int kWhich>
float* scratch(int64_t floats) {
  static std::vector<float> memory;
  std::vector<float>(floats, NAN).swap(memory);
  return memory.data();
}

template <class T, class Shape, bool kVectors>
int start_wgrad(Conv1x1WgradParams& p) {
  const int splits = cuda::wgrad_splits<T, Shape>(p).splits;
  p.partial = scratch<0>(int64_t(splits) * p.gradient.channels * (p.input.channels + 1));
  cuda::conv1x1_wgrad_as<T, Shape, kVectors>(p, nullptr);
  return splits;
}

// The splits.
template <class T>
int start_wgrad_as(Conv1x1WgradParams& p, int tile) {
  if (tile == 1) return start_wgrad<T, cuda::TileShape<64, 128>, true>(p);
  if constexpr (sizeof(T) == 2) {
    if (tile == 2) return start_wgrad<T, cuda::TileShape<128, 64>, true>(p);
  }
  if (tile == 3) return start_wgrad<T, cuda::TileShape<64, 64>, true>(p);
  return start_wgrad<T, cuda::TileShape<64, 64>, false>(p);
}

template <class T>
int wgrad_as(Conv1x1WgradParams p, int tile) {
  const int splits = start_wgrad_as<T>(p, tile);
  cuda::add_conv1x1_wgrad<T>(p, splits, nullptr);
  return splits;
}

template <class T, class Shape, bool kVectors>
void dgrad_tile(Conv1x1DgradParams p) {
  const int chunks = cuda::dgrad_tiles<T, Shape>(p).chunks;
  if (p.found.sum_g) p.partial = scratch<1>(int64_t(chunks) * cuda::kGradientSums * p.input.channels);
  cuda::conv1x1_dgrad_as<T, Shape, kVectors>(p, nullptr);
}

template <class T>
void dgrad_as(const Conv1x1DgradParams& p, int tile) {
  if (tile == 1) dgrad_tile<T, cuda::TileShape<64, 128>, true>(p);
  if (tile == 3) dgrad_tile<T, cuda::TileShape<64, 64>, true>(p);
  if (tile == 4) dgrad_tile<T, cuda::TileShape<64, 64>, false>(p);
}

}  // namespace

extern "C" {

// sizes: n, h, w, c, k, p, q, stride_h, stride_w. gradient: g, z, mask, a, b, d, scale, shift, sample_factor. Those
// that are absent are null.
int conv1x1_wgrad(int dtype, int tile, int multiprocessors, const int* s, const void* const* gradient, const void* x,
                  const void* x_scale, const void* x_shift, void* grad_weight, float* sum_g, bool rounded) {
  cuda_on_cpu::multiprocessors = multiprocessors;
  Conv1x1WgradParams p{{s[0] * s[5] * s[6], s[4], s[5] * s[6]},
                       {s[0] * s[5] * s[6], s[3], s[1], s[2], s[5], s[6], s[7], s[8], x,
                        static_cast<const float*>(x_scale), static_cast<const float*>(x_shift)},
                       nullptr,
                       grad_weight,
                       sum_g,
                       rounded};
  std::memcpy(&p.gradient.g, gradient, 9 * sizeof(void*));
  int splits = 0;
  cuda_on_cpu::with_type(dtype, [&](auto t) { splits = wgrad_as<decltype(t)>(p, tile); });
  return splits;
}
}

#ifdef RESNET_FUSED_SANITIZED

namespace {

using Values = std::vector<__nv_bfloat16>;
using Vector = std::vector<float>;

struct Drawn {
  unsigned state = 1;
  float next() { return static_cast<float>((state = state * 1103515245 + 12345) >> 29) - 4; }
  Values values(size_t count) {
    Values v(count);
    for (auto& each : v) each = __float2bfloat16_rn(next());
    return v;
  }
  Vector vector(size_t count) {
    Vector v(count);
    for (float& each : v) each = next() / 4;
    return v;
  }
};

float at(const Values& v, size_t i) { return __bfloat162float(v[i]); }
float round(float v) { return __bfloat162float(__float2bfloat16_rn(v)); }
bool near(double got, double want, double size) { return std::abs(got - want) <= 1e-2 * std::abs(want) + 1e-5 * size; }

// Everything at once, every tensor ending where its memory does, against plain loops. `n` images of 5x7.
bool are_right(int n, int k, int c, int tile) {
  Drawn draw;
  const int h = 5, w = 7, rows = n * h * w;
  const Values g = draw.values(size_t(rows) * k), z = draw.values(size_t(rows) * k), x = draw.values(size_t(rows) * c);
  const Values weight = draw.values(size_t(k) * c);
  const Vector a = draw.vector(k), b = draw.vector(k), d = draw.vector(k), factor = draw.vector(n);
  const Vector x_scale = draw.vector(c), x_shift = draw.vector(c), mean = draw.vector(c);
  std::vector<uint8_t> mask(size_t(rows) * ((k + 7) / 8));
  for (auto& each : mask) each = static_cast<uint8_t>(draw.state = draw.state * 1103515245 + 12345);
  Values dz(g.size()), read(x.size()), grad_x(x.size()), grad_weight(weight.size());
  for (size_t i = 0; i < dz.size(); ++i) {
    const int row = i / k, channel = i % k;
    const bool keep = mask[row * ((k + 7) / 8) + channel / 8] >> channel % 8 & 1;
    dz[i] = __float2bfloat16_rn(factor[row / (h * w)] * (keep ? at(g, i) : 0.f) * a[channel] + b[channel] * at(z, i) +
                                d[channel]);
  }
  for (size_t i = 0; i < read.size(); ++i) {
    read[i] = __float2bfloat16_rn(std::max(x_scale[i % c] * at(x, i) + x_shift[i % c], 0.f));
  }
  Vector sums(2 * size_t(c));
  Conv1x1DgradParams p{
      {rows, k, h * w, g.data(), z.data(), mask.data(), a.data(), b.data(), d.data(), nullptr, nullptr, factor.data()},
      {rows, c, h, w, h, w, 1, 1, x.data(), x_scale.data(), x_shift.data()},
      weight.data(),
      nullptr,
      nullptr,
      mean.data(),
      nullptr,
      nullptr,
      1,
      1,
      grad_x.data(),
      {},
      nullptr,
      {sums.data(), sums.data() + c, {rows, c}}};
  Conv1x1WgradParams of_weight{p.gradient, p.input, nullptr, nullptr, nullptr, true};
  const int splits = start_wgrad_as<__nv_bfloat16>(of_weight, tile);
  p.weight_grad = {of_weight.partial, splits, k * c + k, k * c, grad_weight.data()};
  dgrad_as<__nv_bfloat16>(p, tile == 2 ? 1 : tile);
  for (int channel = 0; channel < c; ++channel) {
    double sum = 0., product = 0.;
    for (int row = 0; row < rows; ++row) {
      double y = 0.;
      for (int i = 0; i < k; ++i) y += double(at(dz, size_t(row) * k + i)) * at(weight, size_t(i) * c + channel);
      const float value = at(x, size_t(row) * c + channel), got = at(grad_x, size_t(row) * c + channel);
      if (std::fma(x_scale[channel], value, x_shift[channel]) <= 0.f) y = 0.;
      if (!near(got, round(static_cast<float>(y)), k)) return false;
      sum += got, product += double(got) * (value - mean[channel]);
    }
    if (!near(sums[channel], sum, rows * k) || !near(sums[c + channel], product, rows * k)) return false;
    for (int i = 0; i < k; ++i) {
      double y = 0.;
      for (int row = 0; row < rows; ++row) {
        y += double(at(dz, size_t(row) * k + i)) * at(read, size_t(row) * c + channel);
      }
      if (!near(at(grad_weight, size_t(i) * c + channel), y, rows)) return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  cuda_on_cpu::multiprocessors = 1;  // so that blocks take several tiles
  bool right = are_right(3, 33, 65, 4) && are_right(1, 1, 3, 4);
  for (int tile = 1; tile < 5; ++tile) right = right && are_right(2, 72, 136, tile);
  std::puts(right ? "right" : "wrong");
  return right ? 0 : 1;
}

#endif
