// A convolution of few channels and the statistics of its output: one read, one write.
//
// A block of outputs is convolved, and its statistics taken from the second-level cache. No result depends on the
// number of threads: an output is a sum in one order, and blocks depend on the shape alone.
// Bytes: x, weight and z once; FLOPs 2*M*K*C*R*S.
#include "../checks/stem_conv.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "alloc.h"
#include "moments.h"
#include "stem.h"

namespace resnet_fused::cpu {
namespace {

// Outputs [begin, end) of all outputs.
void convolve_outputs(const Stem& p, const StemStages& at, StemRows& image, int64_t begin, int64_t end, float* z) {
  while (begin < end) {
    const int64_t row = begin / p.Q, q = begin % p.Q, stop = std::min(p.Q, q + end - begin);
    at.convolve(p, image.under(row), q, stop, z + begin * p.K);
    begin += stop - q;
  }
}

std::tuple<Tensor, Tensor, Tensor> stem_conv(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                                             const std::vector<int64_t>& padding, bool statistics) {
  check_stem_conv(x, weight, stride, padding);
  Stem p(x, weight, stride, padding);
  Tensor z = empty_images(p.N, p.K, p.P, p.Q, ScalarType::Float);
  Tensor mean = empty_stats(z, statistics), m2 = empty_stats(z, statistics);
  const auto packed = pack_stem(p, weight);
  const StemStages& at = stem_stages();
  float* out = data<float>(z);
  if (statistics) {
    StemRows first(p);
    if (z.numel()) convolve_outputs(p, at, first, 0, 1, out);
    moments(
        Shape(z), out, mean, m2, [&](int64_t c) { return out[c]; },
        [&] {
          return [&, image = StemRows(p)](int64_t begin, int64_t end) mutable {
            convolve_outputs(p, at, image, begin, end, out);
          };
        });
  } else if (z.numel()) {
    torch::stable::parallel_for(0, p.N * p.P, 1, [&](int64_t begin, int64_t end) {
      StemRows image(p);
      convolve_outputs(p, at, image, begin * p.Q, end * p.Q, out);
    });
  }
  return {z, mean, m2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("stem_conv", TORCH_BOX(&stem_conv)); }

}  // namespace resnet_fused::cpu
