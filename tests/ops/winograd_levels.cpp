// The stages of the Winograd convolutions at every level that this machine runs, on small numbers, of which with tiles
// of 2x2 every product and sum is exact: each result has to be that of the direct sum. Buffers have no room to spare.
#include "../../csrc/cpu/winograd_stages.h"

#include "../../csrc/cpu/winograd_outputs.h"
#include "../../csrc/cpu/winograd_strided.h"

#include <cmath>
#include <cstdio>
#include <string_view>
#include <vector>

using namespace resnet_fused::cpu;

namespace {

using Tiles2 = Filtering<2>;
using Tiles4 = Filtering<4>;

constexpr int64_t kColumns = 32;  // of a transformed weight that is kept

struct Shape {
  int64_t C, K, H, W, padding, block;
  bool transposed;
  int64_t columns;  // of the transformed weight's rows; 0: a panel's
};

template <class F, class L>
RESNET_FUSED_INLINE void transform(const Problem& p, int64_t block, float* v, const float* zeros) {
  const int64_t middle = p.size(block) / 2;
  for (const auto& tiles : {Problem::Range{0, middle}, Problem::Range{middle, p.size(block)}}) {
    if constexpr (F::stride == 2) {
      transform_strided_inputs<L>(p, block, tiles, v, zeros);
    } else {
      transform_inputs<L, F>(p, block, tiles, v, zeros);
    }
  }
}

#define LEVEL(NAME, TARGET, L, F)                                                                                     \
  TARGET void inputs_##NAME##_##F(const Problem& p, int64_t block, float* v, const float* zeros) {                    \
    transform<F, L>(p, block, v, zeros);                                                                              \
  }                                                                                                                   \
  TARGET void weights_##NAME##_##F(const Problem& p, int64_t panel, const float* scale, float* u) {                   \
    transform_weights<L, F, float>(p, panel, 0, p.C / 2, scale, u);                                                   \
    transform_weights<L, F, double>(p, panel, p.C / 2, p.C, scale, u);                                                \
  }                                                                                                                   \
  TARGET bool plain_##NAME##_##F(const Problem& p, int64_t block, int64_t panel, const float* v, const float* u,      \
                                 float* m, const Sums& sums) {                                                        \
    return write_outputs<L, F, L::panel>(p, block, panel, v, u, m, sums, Plain{}, panel % 2 ? u : nullptr);           \
  }                                                                                                                   \
  TARGET bool behind_##NAME##_##F(const Problem& p, int64_t block, int64_t panel, const float* v, const float* u,     \
                                  float* m, const Epilogue& epilogue) {                                               \
    if (p.m_columns == L::panel) return write_outputs<L, F, kColumns>(p, block, panel, v, u, m, {}, epilogue, u);     \
    m += panel * L::panel;                                                                                            \
    for (int64_t i = 0; i < F::sums * F::sums; ++i) multiply_sum<L, F, kColumns, true>(p, block, i, v, u, m, u, p.C); \
    const int64_t middle = p.size(block) / 2;                                                                         \
    const bool first = write_tiles<L, F>(p, block, panel, {0, middle}, m, epilogue);                                  \
    return write_tiles<L, F>(p, block, panel, {middle, p.size(block)}, m, epilogue) && first;                         \
  }                                                                                                                   \
  int64_t wrong_##NAME##_##F(const Shape& s) {                                                                        \
    return wrong<F>(s, L::panel, inputs_##NAME##_##F, weights_##NAME##_##F, plain_##NAME##_##F, behind_##NAME##_##F); \
  }

float direct(const Problem& p, int64_t n, int64_t i, int64_t j, int64_t k) {
  float sum = 0;
  for (int64_t r = 0; r < 3; ++r) {
    for (int64_t s = 0; s < 3; ++s) {
      const int64_t h = p.stride * i + r - p.padding, w = p.stride * j + s - p.padding;
      if (h < 0 || h >= p.H || w < 0 || w >= p.W) continue;
      for (int64_t c = 0; c < p.C; ++c) {
        const float weight = p.weight[k * p.stride_k + c * p.stride_c + r * p.stride_r + s * p.stride_s];
        sum += p.x[((n * p.H + h) * p.W + w) * p.C + c] * weight;
      }
    }
  }
  return sum;
}

// What follows the sum of an output, of which `residual` is one value.
float behind(float sum, int64_t k, float residual) {
  const float y = sum + static_cast<float>(k % 5 - 2) + residual;
  return y < 0 ? 0 : y;
}

float scale_of(int64_t k) { return k % 2 ? 2.0f : 0.5f; }

// How many results differ from the direct sum.
template <class F, class Inputs, class Weights, class Outputs, class Behind>
int64_t wrong(const Shape& s, int64_t panel, Inputs inputs, Weights weights, Outputs outputs, Behind with_epilogue) {
  if (F::stride == 2 && (s.C % 16 || s.transposed)) return 0;  // which are not asked for
  Problem p{};
  p.stride = F::stride;
  p.N = 2, p.C = s.C, p.K = s.K, p.H = s.H, p.W = s.W, p.padding = s.padding;
  const int64_t lost = 3 - 2 * s.padding;
  if (s.H < lost || s.W < lost) return 0;
  p.P = (s.H - lost) / p.stride + 1, p.Q = (s.W - lost) / p.stride + 1;
  std::vector<float> x(p.N * p.H * p.W * p.C), weight(9 * p.C * p.K), z(p.N * p.P * p.Q * p.K), zeros(p.C);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 31 % 17) - 8;
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = (static_cast<float>(i * 13 % 11) - 5) / 8;
  p.x = x.data(), p.weight = weight.data(), p.z = z.data();
  if (s.transposed) {
    p.stride_k = 1, p.stride_c = 9 * p.K, p.stride_r = -3 * p.K, p.stride_s = -p.K, p.weight += 8 * p.K;
  } else {
    p.stride_k = 9 * p.C, p.stride_c = 1, p.stride_r = 3 * p.C, p.stride_s = p.C;
  }
  p.cut(F::outputs, panel);
  if (s.columns && s.block > 3) p.m_columns = p.panels * panel;  // the sums of all panels are kept
  p.u_pitch = s.columns ? s.columns : panel, p.u_gap = s.columns ? 0 : Problem::kGap;
  p.blocks = (p.tiles + s.block - 1) / s.block;
  std::vector<float> scale, shift(p.panels * panel), residual(z.size());
  for (int64_t k = 0; s.columns && k < p.K; ++k) scale.push_back(scale_of(k));
  for (int64_t k = 0; k < p.K; ++k) shift[k] = static_cast<float>(k % 5 - 2);
  for (size_t i = 0; i < residual.size(); ++i) residual[i] = static_cast<float>(i % 7) - 3;
  const Epilogue epilogue{shift.data(), residual.data(), z.data(), true, p.K};
  int64_t found = 0;
  for (int64_t block = 0; block < p.blocks; ++block) {
    std::vector<float> v(p.v_size(p.size(block)));
    inputs(p, block, v.data(), zeros.data());
    for (int64_t k = 0; k < p.panels; ++k) {
      const int64_t column = k * panel % p.u_pitch;
      std::vector<float> u(p.u_size()), m(p.m_size()), pivot(p.panels * panel), sum(pivot), square(pivot);
      weights(p, k, s.columns ? scale.data() : nullptr, u.data() + column);
      if (s.columns) {
        found += !with_epilogue(p, block, k, v.data(), u.data() + column, m.data(), epilogue);
      } else {
        found += !outputs(p, block, k, v.data(), u.data(), m.data(), {pivot.data(), sum.data(), square.data()});
      }
    }
  }
  const float error = F::outputs == 2 ? 0 : 2e-3f;
  for (int64_t i = 0; i < p.N * p.P * p.Q * p.K; ++i) {
    const int64_t pixel = i / p.K, n = pixel / (p.P * p.Q), k = i % p.K;
    const float plain = direct(p, n, pixel / p.Q % p.P, pixel % p.Q, k);
    const float expected = s.columns ? behind(plain * scale_of(k), k, residual[i]) : plain;
    found += !(std::abs(z[i] - expected) <= error);
  }
  return found;
}

#ifndef RESNET_FUSED_WITHOUT_512
LEVEL(512, RESNET_FUSED_TARGET_512, Level512, Tiles2)
#endif
LEVEL(256, RESNET_FUSED_TARGET_256, Level256, Tiles2)
LEVEL(128, , Level128, Tiles2)
#ifndef RESNET_FUSED_WITHOUT_512
LEVEL(512, RESNET_FUSED_TARGET_512, Level512, Tiles4)
#endif
LEVEL(256, RESNET_FUSED_TARGET_256, Level256, Tiles4)
LEVEL(128, , Level128, Tiles4)
#ifndef RESNET_FUSED_WITHOUT_512
LEVEL(512, RESNET_FUSED_TARGET_512, Level512, Strided)
#endif
LEVEL(256, RESNET_FUSED_TARGET_256, Level256, Strided)
LEVEL(128, , Level128, Strided)

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
              const Shape s{C, K, H, W, padding, block, transposed, transposed ? 0 : kColumns};
              found += wrong_128_Tiles2(s) + wrong_128_Tiles4(s) + wrong_128_Strided(s);
              if (level != "baseline") found += wrong_256_Tiles2(s) + wrong_256_Tiles4(s) + wrong_256_Strided(s);
#ifndef RESNET_FUSED_WITHOUT_512
              if (level == "avx512") found += wrong_512_Tiles2(s) + wrong_512_Tiles4(s) + wrong_512_Strided(s);
#endif
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
