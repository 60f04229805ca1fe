// The second convolution of a dense layer, 3x3 of a lazy tensor, into its slice of the block's buffer.
//
// A strip of images is normalised once into a thread's scratch, which Winograd's tiles then read: the activation has no
// tensor. Strips depend on the shape alone, and their statistics are merged in their order: no result depends on the
// number of threads.
// Bytes: z, weight and the slice once; FLOPs counted as the direct sum's, 2*M*K*G*9.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <string_view>
#include <tuple>
#include <vector>

#include "../checks/dense_conv3x3.h"
#include "alloc.h"
#include "dense_conv3x3_stages.h"
#include "dense_direct.h"
#include "moments.h"
#include "winograd_work.h"

namespace resnet_fused::cpu {
namespace {

struct Stages {
  int64_t panel;
  void (*weights)(const Problem&, int64_t, int64_t, int64_t, float*);
  bool (*strip)(const DenseConv&, int64_t, float*, float*);
};

template <class L>
struct At;

#define RESNET_FUSED_STAGES(LEVEL, TARGET)                                                              \
  template <>                                                                                           \
  struct At<LEVEL> {                                                                                    \
    TARGET static void weights(const Problem& p, int64_t panel, int64_t begin, int64_t end, float* u) { \
      transform_weights<LEVEL, Tile2, float>(p, panel, begin, end, nullptr, u);                         \
    }                                                                                                   \
    TARGET static bool strip(const DenseConv& p, int64_t index, float* scratch, float* y) {             \
      return convolve_strip<LEVEL>(p, index, scratch, y);                                               \
    }                                                                                                   \
    static constexpr Stages stages{LEVEL::panel, weights, strip};                                       \
  };

RESNET_FUSED_STAGES(Level512, RESNET_FUSED_TARGET_512)
RESNET_FUSED_STAGES(Level256, RESNET_FUSED_TARGET_256)
RESNET_FUSED_STAGES(Level128, )
#undef RESNET_FUSED_STAGES

const Stages& stages() {
  static const std::string_view level = cpu_level();
  return level == "avx512" ? At<Level512>::stages : level == "avx2" ? At<Level256>::stages : At<Level128>::stages;
}

RESNET_FUSED_CLONES void copy_rows(float* __restrict out, int64_t pitch, const float* __restrict y, int64_t y_pitch,
                                   int64_t rows, int64_t C) {
  for (int64_t m = 0; m < rows; ++m, out += pitch, y += y_pitch) {
    for (int64_t c = 0; c < C; ++c) out[c] = y[c];
  }
}

// Of every strip, [strips, channels]: as block_moments makes them.
struct StripSums {
  int64_t channels;
  std::vector<float> pivot, sum, square;

  StripSums(int64_t strips, int64_t channels) : channels(channels) {
    for (auto* part : {&pivot, &sum, &square}) part->resize(strips * channels);
  }

  void take(int64_t strip, const float* y, int64_t rows) {
    const int64_t at = strip * channels;
    block_mean(y, rows, channels, &pivot[at], &sum[at]);
    block_moments(y, rows, channels, &pivot[at], &sum[at], &square[at]);
  }

  void merge(const Strips& strips, const Tensor& mean, const Tensor& m2) const {
    const int64_t G = mean.numel();
    std::vector<double> total(G), squares(G);
    int64_t count = 0;
    for (int64_t strip = 0; strip < strips.count; ++strip) {
      const int64_t at = strip * channels, rows = strips.pixels_of(strips.at(strip));
      merge_block(total.data(), squares.data(), count, pivot.data(), &pivot[at], &sum[at], &square[at], rows, G);
      count += rows;
    }
    for (int64_t g = 0; g < G; ++g) {
      data<float>(mean)[g] = static_cast<float>(pivot[g] + total[g] / static_cast<double>(count));
      data<float>(m2)[g] = static_cast<float>(squares[g]);
    }
  }
};

Problem weight_of(const Tensor& weight, int64_t panel) {
  Problem p{};
  p.weight = data<float>(weight), p.C = weight.size(1), p.K = weight.size(0);
  p.stride_k = weight.stride(0), p.stride_c = weight.stride(1);
  p.stride_r = weight.stride(2), p.stride_s = weight.stride(3);
  p.cut(Tile2::outputs, panel);
  p.u_pitch = panel, p.u_gap = Problem::kGap;
  return p;
}

// Whether all outputs are finite; if not, some may be missing.
bool run(DenseConv p, const Stages& at, StripSums* sums) {
  constexpr int64_t kChannels = 64;  // of a panel of the weight, a unit of work
  const auto u = aligned_array<float>(p.weight.panels * p.weight.u_size());
  const int64_t parts = (p.weight.C + kChannels - 1) / kChannels;
  share(p.weight.panels * parts, [&] {
    return [&](int64_t unit) {
      const int64_t panel = unit / parts, begin = unit % parts * kChannels;
      at.weights(p.weight, panel, begin, std::min(p.weight.C, begin + kChannels), u.get() + panel * p.weight.u_size());
    };
  });
  p.u = u.get();
  std::atomic<bool> finite{true};
  share(p.strips.count, [&] {
    return [&, scratch = aligned_array<float>(p.scratch()),
            y = aligned_array<float>(p.strips.outputs() * p.y_pitch())](int64_t index) {
      if (!finite) return;
      if (!at.strip(p, index, scratch.get(), y.get())) finite = false;
      const Strip strip = p.strips.at(index);
      const int64_t rows = p.strips.pixels_of(strip);
      copy_rows(p.out + p.strips.first_pixel(strip) * p.out_pitch, p.out_pitch, y.get(), p.y_pitch(), rows, p.weight.K);
      if (sums) sums->take(index, y.get(), rows);
    };
  });
  return finite;
}

// By ATen's convolution, and statistics of what it makes.
void run_direct(const Tensor& z, const Tensor& weight, const Tensor& scale, const Tensor& shift, const Tensor& out,
                const Tensor& mean, const Tensor& m2) {
  const Tensor found = aten_convolution(dense_activation(z, scale, shift), weight, 1);
  Tensor target = out, y = empty_images(out.size(0), out.size(1), out.size(2), out.size(3), ScalarType::Float);
  torch::stable::copy_(y, found);
  torch::stable::copy_(target, y);
  if (mean.numel() == 0) return;
  const float* rows = data<float>(y);
  moments(Shape(y), rows, mean, m2, [&](int64_t c) { return rows[c]; }, [](int64_t, int64_t) {});
}

std::tuple<Tensor, Tensor> dense_conv3x3(const Tensor& z, const Tensor& weight, const Tensor& scale,
                                         const Tensor& shift, const Tensor& out, bool statistics) {
  check_dense_conv3x3(z, weight, scale, shift, out);
  Tensor mean = empty_stats(out, statistics), m2 = empty_stats(out, statistics);
  if (out.numel() == 0) {
    for (const Tensor* t : {&mean, &m2}) std::fill_n(data<float>(*t), t->numel(), 0.0f);
    return {mean, m2};
  }
  const int64_t K = z.size(1);
  const Stages& at = stages();
  const DenseConv p{{data<float>(z), data<float>(scale), data<float>(shift), K, Pixels(z, {1, 1})},
                    weight_of(weight, at.panel),
                    nullptr,
                    Strips(z.size(0), z.size(2), z.size(3), pitch_of(K)),
                    data<float>(out),
                    pixel_pitch(out)};
  StripSums sums(statistics ? p.strips.count : 0, p.y_pitch());
  if (!run(p, at, statistics ? &sums : nullptr)) {
    run_direct(z, weight, scale, shift, out, mean, m2);
  } else if (statistics) {
    sums.merge(p.strips, mean, m2);
  }
  return {mean, m2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("dense_conv3x3", TORCH_BOX(&dense_conv3x3)); }

}  // namespace resnet_fused::cpu
