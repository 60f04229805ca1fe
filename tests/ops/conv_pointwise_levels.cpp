// The stages of a 1x1 convolution with an unfolded weight at every level that this machine runs, on small numbers, of
// which every product and sum is exact: each result has to be that of plain loops. Buffers have no room to spare.
#include <cstdio>
#include <string_view>
#include <vector>

#include "../../csrc/cpu/conv_pointwise_stages.h"

using namespace resnet_fused::cpu;

namespace {

std::vector<float> numbers(int64_t size, int64_t step, int64_t modulus, float unit) {
  std::vector<float> found(size);
  for (int64_t i = 0; i < size; ++i) found[i] = static_cast<float>(i * step % modulus - modulus / 2) * unit;
  return found;
}

// `gap`: pixels of x for each that is read.
template <class Pack, class Multiply>
int64_t wrong(int64_t rows, int64_t C, int64_t K, int64_t gap, bool adds, bool relu, int64_t panel, Pack pack,
              Multiply multiply) {
  const auto x = numbers(((rows - 1) * gap + 1) * C, 31, 17, 1), weight = numbers(K * C, 13, 11, 0.125f);
  const auto bias = numbers(K, 3, 5, 1), mean = numbers(K, 5, 7, 1), gamma = numbers(K, 7, 9, 0.5f);
  const auto residual = numbers(rows * K, 11, 13, 1);
  const std::vector<float> var(K, 4);
  std::vector<float> out = adds ? residual : std::vector<float>(rows * K);
  Pointwise p{x.data(), weight.data(), out.data(), C, K, {}, {}};
  p.pixels.step = gap;
  p.behind = {bias.data(), mean.data(), var.data(), gamma.data(), nullptr, adds ? out.data() : nullptr, 0, relu};
  for (int64_t index = 0; index * panel < K; ++index) {
    std::vector<float> packed((C + 2) * panel);
    pack(p, index, packed.data());
    Later later{packed.data(), weight.data(), weight.data() + K * C};
    multiply(p, Tile{0, rows, x.data(), gap == 1 ? x.data() : nullptr}, index, packed.data(), later);
  }
  int64_t found = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < K; ++k) {
      float sum = 0;
      for (int64_t c = 0; c < C; ++c) sum += x[r * gap * C + c] * weight[k * C + c];
      float y = (sum + bias[k] - mean[k]) * gamma[k] / 2 + (adds ? residual[r * K + k] : 0.0f);
      if (relu && y < 0) y = 0;
      found += y != out[r * K + k];
    }
  }
  return found;
}

#define LEVEL(NAME, TARGET, L)                                                                                       \
  TARGET void pack_##NAME(const Pointwise& p, int64_t panel, float* packed) { pack_pointwise<L>(p, panel, packed); } \
  TARGET void multiply_##NAME(const Pointwise& p, const Tile& tile, int64_t panel, const float* packed,              \
                              Later& later) {                                                                        \
    multiply_tile<L>(p, tile, panel, packed, later);                                                                 \
  }                                                                                                                  \
  int64_t wrong_##NAME(int64_t rows, int64_t C, int64_t K, int64_t gap, bool adds, bool relu) {                      \
    return wrong(rows, C, K, gap, adds, relu, L::panel, pack_##NAME, multiply_##NAME);                               \
  }

#ifndef RESNET_FUSED_WITHOUT_512
LEVEL(512, RESNET_FUSED_TARGET_512, Level512)
#endif
LEVEL(256, RESNET_FUSED_TARGET_256, Level256)
LEVEL(128, , Level128)

}  // namespace

int main() {
  const std::string_view best = resnet_fused::cpu_level();
  int64_t found = 0, shapes = 0;
  for (const int64_t rows : {1, 6, 13, 28}) {
    for (const int64_t C : {1, 3, 17, 48, 1024}) {
      for (const int64_t K : {1, 4, 16, 21, 32, 37}) {
        for (const int64_t gap : {1, 2}) {
          const bool adds = shapes % 2, relu = shapes / 2 % 2;
          found += wrong_128(rows, C, K, gap, adds, relu);
          if (best != "baseline") found += wrong_256(rows, C, K, gap, adds, relu);
#ifndef RESNET_FUSED_WITHOUT_512
          if (best == "avx512") found += wrong_512(rows, C, K, gap, adds, relu);
#endif
          ++shapes;
        }
      }
    }
  }
  std::printf("%s: %lld wrong in %lld shapes\n", best.data(), static_cast<long long>(found),
              static_cast<long long>(shapes));
  return found != 0;
}
