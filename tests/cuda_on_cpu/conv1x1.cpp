// Training's forward product on tensor cores behind a C function that test_conv1x1.py calls, with any filter; as a
// program, under a sanitizer. dtype: 0 float, 1 half, 2 bfloat16.

#include "cuda_on_cpu.h"

#include "../../csrc/cuda/kernels/conv1x1.cuh"

using namespace resnet_fused;

namespace {

// Scratch of just the size that is asked for, in which nothing is a number yet.
float* scratch(int64_t floats) {
  static std::vector<float> memory;
  std::vector<float>(floats, NAN).swap(memory);
  return memory.data();
}

template <class T, class Shape, bool kVectors>
void run_tile(Conv1x1Params p) {
  const int64_t chunks = cuda::chunked_tiles<T, Shape>(p.geometry, true).chunks;
  if (p.found.mean) p.partial = scratch(chunks * cuda::kMoments * p.geometry.k);
  cuda::conv1x1_as<T, Shape, kVectors>(p, nullptr);
}

// tile: 0 as the op chooses, 1 128x128 (of 16 bits), 2 128x64, 3 64x64, 4 128x64 element by element.
template <class T>
void run_as(Conv1x1Params p, int tile) {
  if (tile == 0) {
    const int64_t floats = cuda::conv1x1_partial_floats<T>(p);
    if (p.found.mean && floats > 0) p.partial = scratch(floats);
    cuda::launch_conv1x1<T>(p, nullptr);
  }
  if constexpr (sizeof(T) == 2) {
    if (tile == 1) run_tile<T, cuda::TileShape<128, 128>, true>(p);
  }
  if (tile == 2) run_tile<T, cuda::TileShape<128, 64>, true>(p);
  if (tile == 3) run_tile<T, cuda::TileShape<64, 64>, true>(p);
  if (tile == 4) run_tile<T, cuda::TileShape<128, 64>, false>(p);
}

Conv1x1Params params(const ConvGeometry& g, const void* x, const float* x_scale, const float* x_shift,
                     const void* weight, void* z, float* mean, float* m2) {
  const StatisticsParams found{int64_t(g.n) * g.p * g.q, g.k, mean, m2, {}};
  return {g, x, x_scale, x_shift, weight, z, nullptr, found};
}

}  // namespace

extern "C" int conv1x1(int dtype, int tile, int multiprocessors, bool copies_wait, const int* geometry, const void* x,
                       const float* x_scale, const float* x_shift, const void* weight, void* z, float* mean,
                       float* m2) {
  ConvGeometry g;
  std::memcpy(&g, geometry, sizeof g);
  const Conv1x1Params p = params(g, x, x_scale, x_shift, weight, z, mean, m2);
  cuda_on_cpu::multiprocessors = multiprocessors;
  cuda_on_cpu::copies_wait = copies_wait;
  return cuda_on_cpu::with_type(dtype, [&](auto t) { run_as<decltype(t)>(p, tile); });
}

#ifdef RESNET_FUSED_SANITIZED

namespace {

// A convolution of whole numbers, whose every tensor ends where its memory does, against a plain loop.
bool is_right(const ConvGeometry& g, int tile, bool lazy) {
  unsigned state = 1;
  const auto next = [&state] { return static_cast<float>((state = state * 1103515245 + 12345) >> 29) - 4; };
  const auto drawn = [&](size_t count) {
    std::vector<__nv_bfloat16> values(count);
    for (auto& v : values) v = __float2bfloat16_rn(next());
    return values;
  };
  const auto x = drawn(size_t(g.n) * g.h * g.w * g.c), weight = drawn(size_t(g.k) * g.r * g.s * g.c);
  std::vector<float> scale(g.c), shift(g.c), mean(g.k), m2(g.k);
  for (int c = 0; c < g.c; ++c) scale[c] = next(), shift[c] = next() + 4;
  std::vector<__nv_bfloat16> z(size_t(g.n) * g.p * g.q * g.k);
  run_as<__nv_bfloat16>(
      params(g, x.data(), lazy ? scale.data() : nullptr, shift.data(), weight.data(), z.data(), mean.data(), m2.data()),
      tile);
  const int pixels = g.n * g.p * g.q;
  for (int k = 0; k < g.k; ++k) {
    double total = 0., squares = 0.;
    for (int at = 0; at < pixels; ++at) {
      float sum = 0.f;
      const int n = at / (g.p * g.q), i = at % (g.p * g.q);
      for (int tap = 0; tap < g.r * g.s; ++tap) {
        const int h = i / g.q * g.stride_h - g.padding_h + tap / g.s * g.dilation_h;
        const int w = i % g.q * g.stride_w - g.padding_w + tap % g.s * g.dilation_w;
        if (h < 0 || h >= g.h || w < 0 || w >= g.w) continue;
        for (int c = 0; c < g.c; ++c) {
          const float value = __bfloat162float(x[((n * g.h + h) * g.w + w) * g.c + c]);
          const float read = lazy ? std::max(scale[c] * value + shift[c], 0.f) : value;
          sum += read * __bfloat162float(weight[(k * g.r * g.s + tap) * g.c + c]);
        }
      }
      const float rounded = __bfloat162float(__float2bfloat16_rn(sum));
      if (__bfloat162float(z[size_t(at) * g.k + k]) != rounded) return false;
      total += rounded, squares += double(rounded) * rounded;
    }
    const double expected = squares - total * total / pixels;
    if (std::abs(mean[k] - total / pixels) > 1e-4 || std::abs(m2[k] - expected) > 1e-5 * expected + 1e-3) return false;
  }
  return true;
}

}  // namespace

int main() {
  const ConvGeometry pointwise{3, 5, 5, 72, 136, 1, 1, 3, 3, 2, 2, 0, 0, 1, 1};
  const ConvGeometry odd{2, 5, 7, 65, 33, 1, 1, 5, 7, 1, 1, 0, 0, 1, 1};
  const ConvGeometry same{2, 5, 7, 16, 24, 3, 3, 5, 7, 1, 1, 1, 1, 1, 1};
  const ConvGeometry many{1, 60, 50, 8, 8, 1, 1, 60, 50, 1, 1, 0, 0, 1, 1};
  bool right = true;
  for (const bool lazy : {false, true}) {
    for (int tile = 0; tile < 5; ++tile) right = right && is_right(pointwise, tile, lazy);
    right = right && is_right(odd, 0, lazy) && is_right(same, 2, lazy) && is_right(same, 4, lazy);
    right = right && is_right(many, 3, lazy);
  }
  std::puts(right ? "right" : "wrong");
  return right ? 0 : 1;
}

#endif
