// The stages of the Winograd convolution at every level that this machine runs, on small numbers, of which every
// product and sum is exact: each result has to be that of the direct sum. Buffers have no room to spare.
#include "../../csrc/cpu/winograd_stages.h"

#include <cstdio>
#include <string_view>
#include <vector>

using namespace resnet_fused::cpu;

namespace {

struct Shape {
  int64_t C, K, H, W, padding, block;
  bool transposed;
};

#define LEVEL(NAME, TARGET, L)                                                                                         \
  TARGET void inputs_##NAME(const Problem& p, int64_t block, float* v, const float* zeros) {                           \
    transform_inputs<L>(p, block, v, zeros);                                                                           \
  }                                                                                                                    \
  TARGET void weights_##NAME(const Problem& p, int64_t panel, float* u) {                                              \
    transform_weights<L>(p, panel, 0, p.C / 2, u);                                                                     \
    transform_weights<L>(p, panel, p.C / 2, p.C, u);                                                                   \
  }                                                                                                                    \
  TARGET bool outputs_##NAME(const Problem& p, int64_t block, int64_t panel, const float* v, const float* u, float* m, \
                             const Sums& sums) {                                                                       \
    return write_outputs<L>(p, block, panel, v, u, m, sums);                                                           \
  }                                                                                                                    \
  int64_t wrong_##NAME(const Shape& s) { return wrong(s, L::panel, inputs_##NAME, weights_##NAME, outputs_##NAME); }

float direct(const Problem& p, int64_t n, int64_t i, int64_t j, int64_t k) {
  float sum = 0;
  for (int64_t r = 0; r < 3; ++r) {
    for (int64_t s = 0; s < 3; ++s) {
      const int64_t h = i + r - p.padding, w = j + s - p.padding;
      if (h < 0 || h >= p.H || w < 0 || w >= p.W) continue;
      for (int64_t c = 0; c < p.C; ++c) {
        const float weight = p.weight[k * p.stride_k + c * p.stride_c + r * p.stride_r + s * p.stride_s];
        sum += p.x[((n * p.H + h) * p.W + w) * p.C + c] * weight;
      }
    }
  }
  return sum;
}

// How many results differ from the direct sum.
template <class Inputs, class Weights, class Outputs>
int64_t wrong(const Shape& s, int64_t panel, Inputs inputs, Weights weights, Outputs outputs) {
  Problem p{};
  p.N = 2, p.C = s.C, p.K = s.K, p.H = s.H, p.W = s.W, p.padding = s.padding;
  p.P = s.H + 2 * s.padding - 2, p.Q = s.W + 2 * s.padding - 2;
  if (p.P < 1 || p.Q < 1) return 0;
  std::vector<float> x(p.N * p.H * p.W * p.C), weight(9 * p.C * p.K), z(p.N * p.P * p.Q * p.K), zeros(p.C);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 31 % 17) - 8;
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = (static_cast<float>(i * 13 % 11) - 5) / 8;
  p.x = x.data(), p.weight = weight.data(), p.z = z.data();
  if (s.transposed) {
    p.stride_k = 1, p.stride_c = 9 * p.K, p.stride_r = -3 * p.K, p.stride_s = -p.K, p.weight += 8 * p.K;
  } else {
    p.stride_k = 9 * p.C, p.stride_c = 1, p.stride_r = 3 * p.C, p.stride_s = p.C;
  }
  p.panel = panel, p.panels = (p.K + panel - 1) / panel;
  p.tile_rows = (p.P + 1) / 2, p.tile_columns = (p.Q + 1) / 2, p.tiles = p.N * p.tile_rows * p.tile_columns;
  p.blocks = (p.tiles + s.block - 1) / s.block;
  int64_t found = 0;
  for (int64_t block = 0; block < p.blocks; ++block) {
    std::vector<float> v(p.v_size(p.size(block)));
    inputs(p, block, v.data(), zeros.data());
    for (int64_t k = 0; k < p.panels; ++k) {
      std::vector<float> u(p.u_size()), m(p.m_size()), pivot(p.panels * panel), sum(pivot), square(pivot);
      weights(p, k, u.data());
      found += !outputs(p, block, k, v.data(), u.data(), m.data(), {pivot.data(), sum.data(), square.data()});
    }
  }
  for (int64_t i = 0; i < p.N * p.P * p.Q * p.K; ++i) {
    const int64_t pixel = i / p.K, n = pixel / (p.P * p.Q);
    found += z[i] != direct(p, n, pixel / p.Q % p.P, pixel % p.Q, i % p.K);
  }
  return found;
}

LEVEL(512, RESNET_FUSED_TARGET_512, Level512)
LEVEL(256, RESNET_FUSED_TARGET_256, Level256)
LEVEL(128, , Level128)

}  // namespace

int main() {
  const std::string_view level = resnet_fused::cpu_level();
  int64_t found = 0, shapes = 0;
  for (int64_t C : {1, 5, 16, 33}) {
    for (int64_t K : {1, 16, 45}) {
      for (const auto& [H, W] : {std::pair<int64_t, int64_t>{1, 1}, {3, 4}, {7, 5}}) {
        for (int64_t padding : {0, 1, 2}) {
          for (bool transposed : {false, true}) {
            for (int64_t block : {3, 14}) {
              const Shape s{C, K, H, W, padding, block, transposed};
              found += wrong_128(s);
              if (level != "baseline") found += wrong_256(s);
              if (level == "avx512") found += wrong_512(s);
              ++shapes;
            }
          }
        }
      }
    }
  }
  std::printf("%s: %lld wrong in %lld shapes\n", level.data(), static_cast<long long>(found),
              static_cast<long long>(shapes));
  return found != 0;
}
