// Convolutions of few channels, as they begin a network: what forward and the weight's gradient share.
//
// With three channels a pixel is no vector, but the pixels under a row of the filter are a run of memory, in
// channels_last: 21 floats of a 7x7. So vectors hold output channels, each float of a run is broadcast to them, and the
// next pixel's run begins a few floats later. Rows of the image are copied between zeros, which makes all runs whole.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "../checks/common.h"
#include "panels.h"
#include "rows.h"

namespace resnet_fused::cpu {

// The geometry; `packed` is [panels][R][run][panel], zeros beyond the last output channel.
struct Stem {
  const float *x, *packed;
  int64_t N, C, H, W, K, R, S, P, Q, stride[2], padding[2];
  int64_t run;            // floats under a row of the filter
  int64_t step;           // floats from one pixel's run to the next one's
  int64_t width;          // floats of a row of the image between zeros
  int64_t panel, panels;  // output channels that are multiplied at once, and how many such there are
  bool finite;            // the weight: of zeros times its elements, none is NaN

  Stem() = default;
  Stem(const Tensor& image, const Tensor& weight, const std::vector<int64_t>& st, const std::vector<int64_t>& pad)
      : x(data<float>(image)),
        packed(nullptr),
        N(image.size(0)),
        C(image.size(1)),
        H(image.size(2)),
        W(image.size(3)),
        K(weight.size(0)),
        R(weight.size(2)),
        S(weight.size(3)),
        P((H + 2 * pad[0] - R) / st[0] + 1),
        Q((W + 2 * pad[1] - S) / st[1] + 1),
        stride{st[0], st[1]},
        padding{pad[0], pad[1]},
        run(S * C),
        step(st[1] * C),
        width((W + 2 * pad[1]) * C),
        panel(0),
        panels(0),
        finite(true) {}

  int64_t top(int64_t p) const { return p * stride[0] - padding[0]; }
  int64_t packed_size() const { return panels * R * run * panel; }
  std::array<int64_t, 4> sizes() const { return {N, K, P, Q}; }
};

// Rows of images between zeros, each copied once as long as they are asked for in their order.
class StemRows {
  const Stem& p;
  std::vector<float> ring;  // [R, width]
  std::vector<int64_t> held;
  std::vector<const float*> rows;

 public:
  explicit StemRows(const Stem& stem) : p(stem), ring(p.R * p.width), held(p.R, -1), rows(p.R) {}

  // The rows under row `row` of the output, of all rows of all images; null for those outside of the image.
  const float* const* under(int64_t row) {
    const int64_t n = row / p.P, top = p.top(row % p.P);
    for (int64_t r = 0; r < p.R; ++r) {
      const int64_t h = top + r, at = n * p.H + h;
      rows[r] = nullptr;
      if (h < 0 || h >= p.H) continue;
      float* own = &ring[at % p.R * p.width];
      if (held[at % p.R] != at) std::copy_n(p.x + at * p.W * p.C, p.W * p.C, own + p.padding[1] * p.C);
      held[at % p.R] = at;
      rows[r] = own;
    }
    return rows.data();
  }
};

// What is compiled for each level of the machine.
struct StemStages {
  int64_t panel;
  // Outputs [q, end) of a row, raw, into `out`, where that of q is, K apart.
  void (*convolve)(const Stem&, const float* const* rows, int64_t q, int64_t end, float* out);
  // sums[panels][R][run][panel] += gradient x pixel under the filter, over a row of outputs; `grad` is [Q, pitch],
  // whole vectors.
  void (*correlate)(const Stem&, const float* const* rows, const float* grad, int64_t pitch, float* sums);
};
const StemStages& stem_stages();

// The weight, which must live as long as the geometry; of any strides.
AlignedArray<float> pack_stem(Stem& p, const Tensor& weight);

}  // namespace resnet_fused::cpu
