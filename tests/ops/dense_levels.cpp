// The stages of the 3x3 convolutions of dense blocks at every level that this machine runs, on small numbers, of which
// every product and sum is exact: each result has to be that of the direct sums. Buffers have no room to spare.
#include "../../csrc/cpu/dense_conv3x3_backward_stages.h"
#include "../../csrc/cpu/dense_conv3x3_stages.h"

#include <cstdio>
#include <string_view>
#include <vector>

using namespace resnet_fused::cpu;

namespace {

struct Sizes {
  int64_t N, H, W, K, G, rows;  // rows of a strip; 0: as it comes
};

Pixels dense(int64_t rows) {
  Pixels p;
  p.H = p.height = rows, p.W = p.width = p.stride_h = p.step = 1, p.rows = rows;
  return p;
}

std::vector<float> numbers(int64_t count, int64_t step, int64_t range, float unit) {
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(i * step % range - range / 2) * unit;
  return values;
}

// What a layer has, and its results by direct sums.
struct Layer {
  static constexpr int64_t kGap = 3;  // behind the channels of a slice
  Sizes s;
  int64_t pixels, pitch;
  std::vector<float> z, scale, shift, mean, weight, grad, y, b, d, activation, dy;

  explicit Layer(const Sizes& s)
      : s(s),
        pixels(s.N * s.H * s.W),
        pitch(s.G + kGap),
        z(numbers(pixels * s.K, 31, 17, 1)),
        scale(numbers(s.K, 7, 4, 1)),
        shift(numbers(s.K, 3, 5, 1)),
        mean(numbers(s.K, 5, 3, 1)),
        weight(numbers(s.G * s.K * 9, 13, 11, 0.5f)),
        grad(numbers(pixels * pitch, 19, 9, 1)),
        y(numbers(pixels * pitch, 23, 5, 1)),
        b(numbers(s.G, 3, 3, 1)),
        d(numbers(s.G, 5, 5, 1)),
        activation(pixels * s.K),
        dy(pixels * s.G) {
    for (int64_t i = 0; i < pixels * s.K; ++i) {
      const float value = scale[i % s.K] * z[i] + shift[i % s.K];
      activation[i] = value < 0 ? 0 : value;
    }
    for (int64_t i = 0; i < pixels * s.G; ++i) {
      const int64_t at = i / s.G * pitch + i % s.G;
      dy[i] = grad[at] + b[i % s.G] * y[at] + d[i % s.G];
    }
  }

  // f(pixel there, tap) for the taps around a pixel that lie in its image.
  template <class F>
  void around(int64_t pixel, const F& f) const {
    const int64_t h = pixel / s.W % s.H, w = pixel % s.W;
    for (int64_t r = -1; r <= 1; ++r) {
      for (int64_t t = -1; t <= 1; ++t) {
        if (h + r < 0 || h + r >= s.H || w + t < 0 || w + t >= s.W) continue;
        f(pixel + r * s.W + t, (r + 1) * 3 + t + 1);
      }
    }
  }
  float weight_at(int64_t g, int64_t k, int64_t tap) const { return weight[(g * s.K + k) * 9 + tap]; }

  Strips strips() const {
    Strips found(s.N, s.H, s.W, pitch_of(s.K));
    if (s.rows && s.rows < s.H) {
      found.rows = s.rows, found.images = 1, found.per_image = (s.H + s.rows - 1) / s.rows;
      found.count = s.N * found.per_image;
    }
    return found;
  }
  Problem problem(bool transposed, int64_t panel) const {
    Problem p{};
    p.weight = weight.data() + (transposed ? 8 : 0), p.C = transposed ? s.G : s.K, p.K = transposed ? s.K : s.G;
    p.stride_k = transposed ? 9 : 9 * s.K, p.stride_c = transposed ? 9 * s.K : 9;
    p.stride_r = transposed ? -3 : 3, p.stride_s = transposed ? -1 : 1;
    p.cut(2, panel);
    p.u_pitch = panel, p.u_gap = Problem::kGap;
    return p;
  }
  Activation input() const { return {z.data(), scale.data(), shift.data(), s.K, dense(pixels)}; }
};

template <class Weights>
std::vector<float> transformed(const Problem& p, const Weights& weights) {
  std::vector<float> u(p.panels * p.u_size());
  for (int64_t panel = 0; panel < p.panels; ++panel) weights(p, panel, u.data() + panel * p.u_size());
  return u;
}

template <class Weights, class Convolve>
int64_t wrong_forward(const Layer& layer, int64_t panel, const Weights& weights, const Convolve& convolve) {
  std::vector<float> out(layer.pixels * layer.pitch);  // of which lines are fetched
  DenseConv p{layer.input(), layer.problem(false, panel), nullptr, layer.strips(), out.data(), layer.pitch};
  const auto u = transformed(p.weight, weights);
  p.u = u.data();
  int64_t found = 0;
  for (int64_t index = 0; index < p.strips.count; ++index) {
    std::vector<float> scratch(p.scratch()), y(p.strips.outputs() * p.y_pitch());
    found += !convolve(p, index, scratch.data(), y.data());
    const Strip strip = p.strips.at(index);
    for (int64_t i = 0; i < p.strips.pixels_of(strip) * layer.s.G; ++i) {
      const int64_t g = i % layer.s.G, pixel = p.strips.first_pixel(strip) + i / layer.s.G;
      float sum = 0;
      layer.around(pixel, [&](int64_t there, int64_t tap) {
        for (int64_t k = 0; k < layer.s.K; ++k) {
          sum += layer.activation[there * layer.s.K + k] * layer.weight_at(g, k, tap);
        }
      });
      found += y[i / layer.s.G * p.y_pitch() + g] != sum;
    }
  }
  return found;
}

int64_t wrong_input(const Layer& layer, const std::vector<float>& g, const std::vector<double>& sum_g,
                    const std::vector<double>& sum_gz) {
  const int64_t K = layer.s.K;
  std::vector<double> want_g(K), want_gz(K);
  int64_t found = 0;
  for (int64_t i = 0; i < layer.pixels * K; ++i) {
    const int64_t k = i % K;
    float sum = 0;
    layer.around(i / K, [&](int64_t there, int64_t tap) {
      for (int64_t j = 0; j < layer.s.G; ++j) sum += layer.dy[there * layer.s.G + j] * layer.weight_at(j, k, 8 - tap);
    });
    if (layer.activation[i] <= 0) sum = 0;
    found += g[i] != sum;
    want_g[k] += sum, want_gz[k] += sum * (layer.z[i] - layer.mean[k]);
  }
  for (int64_t k = 0; k < K; ++k) found += sum_g[k] != want_g[k] || sum_gz[k] != want_gz[k];
  return found;
}

int64_t wrong_weight(const Layer& layer, const DenseConvBackward& p, const std::vector<float>& sums) {
  const int64_t K = layer.s.K, G = layer.s.G, P = p.weight.panel;
  std::vector<float> want(G * K * 9);
  for (int64_t pixel = 0; pixel < layer.pixels; ++pixel) {
    layer.around(pixel, [&](int64_t there, int64_t tap) {
      for (int64_t i = 0; i < G * K; ++i) {
        want[i * 9 + tap] += layer.dy[pixel * G + i / K] * layer.activation[there * K + i % K];
      }
    });
  }
  int64_t found = 0;
  for (int64_t i = 0; i < G * K; ++i) {
    const int64_t panel = i % K / P, at = (panel * G + i / K) * P + i % K % P;
    float half[3][4], column[4], row[3];
    for (int64_t s = 0; s < 4; ++s) {
      for (int64_t r = 0; r < 4; ++r) column[r] = sums[(r * 4 + s) * p.weight.panels * G * P + at];
      winograd_wgrad::OfSums::apply(column, row);
      for (int64_t r = 0; r < 3; ++r) half[r][s] = row[r];
    }
    for (int64_t r = 0; r < 3; ++r) {
      winograd_wgrad::OfSums::apply(half[r], row);
      for (int64_t s = 0; s < 3; ++s) found += row[s] != want[i * 9 + r * 3 + s];
    }
  }
  return found;
}

template <class Weights, class Backward>
int64_t wrong_backward(const Layer& layer, int64_t panel, const Weights& weights, const Backward& backward) {
  const int64_t K = layer.s.K;
  std::vector<float> g(layer.pixels * K);
  const SliceGradient gradient{layer.grad.data(), layer.y.data(), layer.b.data(), layer.d.data(),
                               layer.s.G,         layer.pitch,    layer.pitch};
  DenseConvBackward p{layer.input(), layer.mean.data(), gradient,      layer.problem(true, panel),
                      nullptr,       g.data(),          layer.strips()};
  const auto u = transformed(p.weight, weights);
  p.u = u.data();
  std::vector<float> scratch(p.scratch()), sums(p.weight_size());
  std::vector<double> sum_g(K), sum_gz(K);
  int64_t found = 0;
  for (int64_t first = 0; first < p.weight.panels; ++first) {  // a panel at a time, as threads may
    found += !backward(p, first, scratch.data(), sums.data(), sum_g.data(), sum_gz.data());
  }
  return found + wrong_input(layer, g, sum_g, sum_gz) + wrong_weight(layer, p, sums);
}

#define LEVEL(NAME, TARGET, L)                                                                                         \
  TARGET void weights_##NAME(const Problem& p, int64_t panel, float* u) {                                              \
    transform_weights<L, Tile2, float>(p, panel, 0, p.C, nullptr, u);                                                  \
  }                                                                                                                    \
  TARGET bool convolve_##NAME(const DenseConv& p, int64_t index, float* scratch, float* y) {                           \
    return convolve_strip<L>(p, index, scratch, y);                                                                    \
  }                                                                                                                    \
  TARGET bool backward_##NAME(const DenseConvBackward& p, int64_t first, float* scratch, float* weight, double* sum_g, \
                              double* sum_gz) {                                                                        \
    return backward_strips<L>(p, 0, p.strips.count, first, first + 1, scratch, weight, sum_g, sum_gz);                 \
  }                                                                                                                    \
  int64_t wrong_##NAME(const Layer& layer) {                                                                           \
    return wrong_forward(layer, L::panel, weights_##NAME, convolve_##NAME) +                                           \
           wrong_backward(layer, L::panel, weights_##NAME, backward_##NAME);                                           \
  }

#ifndef RESNET_FUSED_WITHOUT_512
LEVEL(512, RESNET_FUSED_TARGET_512, Level512)
#endif
LEVEL(256, RESNET_FUSED_TARGET_256, Level256)
LEVEL(128, , Level128)

}  // namespace

int main() {
  const std::string_view level = resnet_fused::cpu_level();
  int64_t found = 0, shapes = 0;
  for (const auto& [N, H, W, rows] : {std::array<int64_t, 4>{1, 1, 1, 0}, {5, 3, 4, 0}, {2, 7, 5, 2}, {1, 9, 15, 4}}) {
    for (int64_t K : {1, 16, 45}) {
      for (int64_t G : {1, 5, 16, 33}) {
        const Layer layer({N, H, W, K, G, rows});
        found += wrong_128(layer);
        if (level != "baseline") found += wrong_256(layer);
#ifndef RESNET_FUSED_WITHOUT_512
        if (level == "avx512") found += wrong_512(layer);
#endif
        ++shapes;
      }
    }
  }
  std::printf("%s: %lld wrong in %lld shapes\n", level.data(), static_cast<long long>(found),
              static_cast<long long>(shapes));
  return found != 0;
}
