// The stages of stem.h, compiled for each level of the machine.
#include "stem.h"

#include <string_view>

#include "../cpu_levels.h"
#include "stem_stages.h"

namespace resnet_fused::cpu {
namespace {

template <class L>
struct At;

// The compiler knows the distance of pixels of three channels with a stride of 1 and 2: no register holds an address.
#define RESNET_FUSED_STAGES(LEVEL, TARGET)                                                                     \
  template <>                                                                                                  \
  struct At<LEVEL> {                                                                                           \
    TARGET static void convolve(const Stem& p, const float* const* rows, int64_t q, int64_t end, float* out) { \
      const int64_t step = p.finite && end - q >= kStemGroup<LEVEL> ? p.step : 0;                              \
      if (step == 3) return stem_convolve<LEVEL, 3>(p, rows, q, end, out);                                     \
      if (step == 6) return stem_convolve<LEVEL, 6>(p, rows, q, end, out);                                     \
      stem_convolve<LEVEL, 0>(p, rows, q, end, out);                                                           \
    }                                                                                                          \
    TARGET static void correlate(const Stem& p, const float* const* rows, const float* grad, int64_t pitch,    \
                                 float* sums) {                                                                \
      stem_correlate<LEVEL>(p, rows, grad, pitch, sums);                                                       \
    }                                                                                                          \
    static constexpr StemStages stages{LEVEL::panel, convolve, correlate};                                     \
  };

RESNET_FUSED_STAGES(Level512, RESNET_FUSED_TARGET_512)
RESNET_FUSED_STAGES(Level256, RESNET_FUSED_TARGET_256)
RESNET_FUSED_STAGES(Level128, )
#undef RESNET_FUSED_STAGES

}  // namespace

const StemStages& stem_stages() {
  static const std::string_view level = cpu_level();
  return level == "avx512" ? At<Level512>::stages : level == "avx2" ? At<Level256>::stages : At<Level128>::stages;
}

AlignedArray<float> pack_stem(Stem& p, const Tensor& weight) {
  p.panel = stem_stages().panel, p.panels = (p.K + p.panel - 1) / p.panel;
  AlignedArray<float> packed = aligned_array<float>(p.packed_size() + 1);
  std::fill_n(packed.get(), p.packed_size(), 0.0f);
  const float* w = data<float>(weight);
  const int64_t by_k = weight.stride(0), by_c = weight.stride(1), by_r = weight.stride(2), by_s = weight.stride(3);
  float zeros = 0;
  for (int64_t k = 0; k < p.K; ++k) {
    float* to = packed.get() + k / p.panel * p.R * p.run * p.panel + k % p.panel;
    for (int64_t r = 0; r < p.R; ++r) {
      for (int64_t s = 0; s < p.S; ++s) {
        for (int64_t c = 0; c < p.C; ++c, to += p.panel) {
          *to = w[k * by_k + c * by_c + r * by_r + s * by_s];
          zeros += *to * 0.0f;
        }
      }
    }
  }
  p.finite = zeros == 0, p.packed = packed.get();
  return packed;
}

}  // namespace resnet_fused::cpu
