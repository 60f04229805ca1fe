// The stages of convolutions of few channels at every level that this machine runs, on small numbers, of which every
// product and sum is exact: each result has to be that of plain loops. Buffers have no room to spare.
#include <cstdio>
#include <string_view>
#include <vector>

#include "../../csrc/cpu/stem_stages.h"

using namespace resnet_fused::cpu;

namespace {

using Convolve = void (*)(const Stem&, const float* const*, int64_t, int64_t, float*);
using Correlate = void (*)(const Stem&, const float* const*, const float*, int64_t, float*);

#define LEVEL(NAME, TARGET, L)                                                                                        \
  TARGET void convolve_##NAME(const Stem& p, const float* const* rows, int64_t q, int64_t end, float* out) {          \
    stem_convolve<L, 0>(p, rows, q, end, out);                                                                        \
  }                                                                                                                   \
  TARGET void correlate_##NAME(const Stem& p, const float* const* rows, const float* grad, int64_t pitch, float* s) { \
    stem_correlate<L>(p, rows, grad, pitch, s);                                                                       \
  }

LEVEL(128, , Level128)
LEVEL(256, RESNET_FUSED_TARGET_256, Level256)
#ifndef RESNET_FUSED_WITHOUT_512
LEVEL(512, RESNET_FUSED_TARGET_512, Level512)
#endif

std::vector<float> numbers(int64_t size, int64_t step, int64_t modulus) {
  std::vector<float> found(size);
  for (int64_t i = 0; i < size; ++i) found[i] = static_cast<float>(i * step % modulus - modulus / 2);
  return found;
}

struct Geometry {
  int64_t C, K, R, S, stride, padding, W;
};

// One row of outputs of an image as high as the filter, whose last row is outside. Returns how many results are wrong.
int64_t wrong(const Geometry& s, int64_t panel, Convolve convolve, Correlate correlate, bool finite) {
  Stem p{};
  p.C = s.C, p.K = s.K, p.R = s.R, p.S = s.S, p.W = s.W, p.H = s.R, p.N = p.P = 1;
  p.stride[0] = p.stride[1] = s.stride, p.padding[0] = p.padding[1] = s.padding;
  p.Q = (s.W + 2 * s.padding - s.S) / s.stride + 1;
  p.run = s.S * s.C, p.step = s.stride * s.C, p.width = (s.W + 2 * s.padding) * s.C, p.finite = finite;
  p.panel = panel, p.panels = (s.K + panel - 1) / panel;
  const auto weight = numbers(s.K * s.R * p.run, 13, 11), image = numbers(s.R * s.W * s.C, 31, 17);
  const auto grad = numbers(p.Q * p.panels * panel, 7, 13);
  std::vector<float> packed(p.packed_size()), sums(p.packed_size(), 1.0f), out(p.Q * s.K);
  for (int64_t k = 0; k < s.K; ++k) {
    for (int64_t t = 0; t < s.R * p.run; ++t) {
      packed[(k / panel * s.R * p.run + t) * panel + k % panel] = weight[k * s.R * p.run + t];
    }
  }
  p.packed = packed.data();
  std::vector<std::vector<float>> padded(s.R, std::vector<float>(p.width));
  std::vector<const float*> rows(s.R);
  for (int64_t r = 0; r < s.R; ++r) {
    std::copy_n(&image[r * s.W * s.C], s.W * s.C, padded[r].begin() + s.padding * s.C);
    rows[r] = r + 1 < s.R || s.R == 1 ? padded[r].data() : nullptr;
  }
  const int64_t middle = p.Q / 3;
  convolve(p, rows.data(), 0, middle, out.data());
  convolve(p, rows.data(), middle, p.Q, out.data() + middle * s.K);
  correlate(p, rows.data(), grad.data(), p.panels * panel, sums.data());
  int64_t count = 0;
  for (int64_t k = 0; k < s.K; ++k) {
    for (int64_t q = 0; q < p.Q; ++q) {
      float exact = 0;
      for (int64_t t = 0; t < s.R * p.run; ++t) {
        if (rows[t / p.run]) exact += rows[t / p.run][q * p.step + t % p.run] * weight[k * s.R * p.run + t];
      }
      count += out[q * s.K + k] != exact;
    }
    for (int64_t t = 0; t < s.R * p.run; ++t) {
      float exact = 1;
      for (int64_t q = 0; q < p.Q && rows[t / p.run]; ++q) {
        exact += rows[t / p.run][q * p.step + t % p.run] * grad[q * p.panels * panel + k];
      }
      count += sums[(k / panel * s.R * p.run + t) * panel + k % panel] != exact;
    }
  }
  return count;
}

}  // namespace

int main() {
  int64_t shapes = 0, bad = 0;
  const std::string_view level = resnet_fused::cpu_level();
  for (int64_t C : {1, 3, 4}) {
    for (int64_t K : {1, 5, 16, 33, 64}) {
      for (const auto& [R, S, stride, padding, W] :
           {std::array<int64_t, 5>{3, 3, 1, 1, 31}, {7, 7, 2, 3, 60}, {1, 2, 3, 0, 9}, {2, 5, 1, 4, 1}}) {
        const Geometry s{C, K, R, S, stride, padding, W};
        for (const bool finite : {true, false}) {
          bad += wrong(s, Level128::panel, convolve_128, correlate_128, finite);
          if (level != "baseline") bad += wrong(s, Level256::panel, convolve_256, correlate_256, finite);
#ifndef RESNET_FUSED_WITHOUT_512
          if (level == "avx512") bad += wrong(s, Level512::panel, convolve_512, correlate_512, finite);
#endif
          ++shapes;
        }
      }
    }
  }
  std::printf("%s: %ld wrong in %ld shapes\n", resnet_fused::cpu_level(), static_cast<long>(bad),
              static_cast<long>(shapes));
  return bad != 0;
}
