// Both gradients of a dense layer's 3x3 convolution from one read of what has gathered at its slice of the block's
// buffer, the input's through the ReLU before with its batch norm's sums.
//
// Chunks of strips depend on the shape alone; their sums are added in their order. Threads split channels where there
// are fewer chunks than threads, which changes no sum: the same bits for any number of threads.
// Bytes: grad, y, z and g once; FLOPs counted as the direct sums', 2*M*K*G*9 for each gradient.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <bit>
#include <string_view>
#include <tuple>
#include <vector>

#include "../checks/dense_conv3x3_backward.h"
#include "alloc.h"
#include "dense_conv3x3_backward_stages.h"
#include "dense_direct.h"
#include "winograd_work.h"

namespace resnet_fused::cpu {
namespace {

struct Stages {
  int64_t panel;
  void (*weights)(const Problem&, int64_t, int64_t, int64_t, float*);
  bool (*strips)(const DenseConvBackward&, int64_t, int64_t, int64_t, int64_t, float*, float*, double*, double*);
};

template <class L>
struct At;

#define RESNET_FUSED_STAGES(LEVEL, TARGET)                                                                         \
  template <>                                                                                                      \
  struct At<LEVEL> {                                                                                               \
    TARGET static void weights(const Problem& p, int64_t panel, int64_t begin, int64_t end, float* u) {            \
      transform_weights<LEVEL, Tile2, float>(p, panel, begin, end, nullptr, u);                                    \
    }                                                                                                              \
    TARGET static bool strips(const DenseConvBackward& p, int64_t begin, int64_t end, int64_t first, int64_t last, \
                              float* scratch, float* weight, double* sum_g, double* sum_gz) {                      \
      return backward_strips<LEVEL>(p, begin, end, first, last, scratch, weight, sum_g, sum_gz);                   \
    }                                                                                                              \
    static constexpr Stages stages{LEVEL::panel, weights, strips};                                                 \
  };

RESNET_FUSED_STAGES(Level512, RESNET_FUSED_TARGET_512)
RESNET_FUSED_STAGES(Level256, RESNET_FUSED_TARGET_256)
RESNET_FUSED_STAGES(Level128, )
#undef RESNET_FUSED_STAGES

const Stages& stages() {
  static const std::string_view level = cpu_level();
  return level == "avx512" ? At<Level512>::stages : level == "avx2" ? At<Level256>::stages : At<Level128>::stages;
}

// How strips and channels are cut. A chunk of strips costs a copy of the weight's gradient: it must be worth that.
struct Work {
  static constexpr int64_t kTiles = 784, kChunks = 16;  // of a chunk, at least; at most
  int64_t strips, chunks, blocks;

  explicit Work(const DenseConvBackward& p) : strips(p.strips.count) {
    const int64_t most = std::clamp(std::min(p.strips.tiles() / kTiles, strips), int64_t(1), kChunks);
    chunks = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(most)));
    const int64_t threads = torch::stable::get_num_threads();
    for (blocks = 1; chunks * blocks < threads && 2 * blocks <= p.weight.panels;) blocks *= 2;
  }

  int64_t first_strip(int64_t chunk) const { return strips * chunk / chunks; }
};

// taps[9][P] of one output and one panel of inputs: the sums of all chunks, transformed. Whether all are finite.
RESNET_FUSED_CLONES bool merge_taps(float* __restrict taps, const float* __restrict from, int64_t chunks, int64_t step,
                                    int64_t plane, int64_t P) {
  bool finite = true;
  float sums[Tile2::values][Level512::panel];
  for (int64_t i = 0; i < Tile2::values; ++i) {
    for (int64_t j = 0; j < P; ++j) sums[i][j] = from[i * plane + j];
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      for (int64_t j = 0; j < P; ++j) sums[i][j] += from[chunk * step + i * plane + j];
    }
  }
  for (int64_t j = 0; j < P; ++j) {
    float half[3][4], column[4], row[3];
    for (int64_t s = 0; s < 4; ++s) {
      for (int64_t r = 0; r < 4; ++r) column[r] = sums[r * 4 + s][j];
      winograd_wgrad::OfSums::apply(column, row);
      for (int64_t r = 0; r < 3; ++r) half[r][s] = row[r];
    }
    for (int64_t r = 0; r < 3; ++r) {
      winograd_wgrad::OfSums::apply(half[r], row);
      for (int64_t s = 0; s < 3; ++s) taps[(r * 3 + s) * P + j] = row[s];
    }
  }
  for (int64_t i = 0; i < 9 * P; ++i) finite &= taps[i] * 0.0f == 0.0f;
  return finite;
}

// The weight's gradient from the sums of chunks; whether it is finite.
bool merge(const DenseConvBackward& p, const Work& work, const float* sums, const Tensor& out) {
  std::atomic<bool> finite{true};
  const int64_t P = p.weight.panel, panels = p.weight.panels, G = p.gradient.G, plane = panels * G * P;
  const int64_t strides[4] = {out.stride(0), out.stride(1), out.stride(2), out.stride(3)};
  torch::stable::parallel_for(0, G, 4, [&](int64_t begin, int64_t end) {
    float taps[9 * Level512::panel];
    for (int64_t g = begin; g < end; ++g) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t c = panel * P, columns = std::min(P, p.K() - c);
        const float* from = sums + (panel * G + g) * P;
        if (!merge_taps(taps, from, work.chunks, p.weight_size(), plane, P)) finite = false;
        float* to = data<float>(out) + g * strides[0] + c * strides[1];
        for (int64_t tap = 0; tap < 9; ++tap) {
          float* target = to + tap / 3 * strides[2] + tap % 3 * strides[3];
          for (int64_t j = 0; j < columns; ++j) target[j * strides[1]] = taps[tap * P + j];
        }
      }
    }
  });
  return finite;
}

struct Results {
  Tensor g, sum_g, sum_gz, grad_weight;
};

void merge_vector(const std::vector<double>& sums, const Tensor& out) {
  for (int64_t k = 0; k < out.numel(); ++k) {
    double sum = 0;
    for (size_t at = k; at < sums.size(); at += out.numel()) sum += sums[at];
    data<float>(out)[k] = static_cast<float>(sum);
  }
}

// Whether all is finite; if not, some may be missing.
bool run(DenseConvBackward p, const Stages& at, const Results& results) {
  const auto u = aligned_array<float>(p.weight.panels * p.weight.u_size());
  share(p.weight.panels, [&] {
    return [&](int64_t panel) { at.weights(p.weight, panel, 0, p.weight.C, u.get() + panel * p.weight.u_size()); };
  });
  p.u = u.get();
  const Work work(p);
  const int64_t K = p.K();
  const auto weight = aligned_array<float>(work.chunks * p.weight_size());
  std::vector<double> sum_g(work.chunks * K), sum_gz(work.chunks * K);
  std::atomic<bool> finite{true};
  share(work.chunks * work.blocks, [&] {
    return [&, scratch = aligned_array<float>(p.scratch())](int64_t unit) {
      if (!finite) return;
      const int64_t chunk = unit / work.blocks, block = unit % work.blocks, panels = p.weight.panels;
      if (!at.strips(p, work.first_strip(chunk), work.first_strip(chunk + 1), panels * block / work.blocks,
                     panels * (block + 1) / work.blocks, scratch.get(), weight.get() + chunk * p.weight_size(),
                     &sum_g[chunk * K], &sum_gz[chunk * K])) {
        finite = false;
      }
    };
  });
  if (!finite || !merge(p, work, weight.get(), results.grad_weight)) return false;
  merge_vector(sum_g, results.sum_g), merge_vector(sum_gz, results.sum_gz);
  return true;
}

// Masks the rows of g where the activation has none, and sums.
void mask_and_sum(const Tensor& activation, const Tensor& z, const Tensor& mean, const Results& results) {
  const Shape shape(z);
  const int64_t K = shape.channels;
  std::vector<double> sum_g(K), sum_gz(K);
  const float *values = data<float>(activation), *zs = data<float>(z), *means = data<float>(mean);
  float* g = data<float>(results.g);
  for (int64_t i = 0; i < shape.rows * K; ++i) {
    if (values[i] <= 0) g[i] = 0;
    sum_g[i % K] += g[i], sum_gz[i % K] += static_cast<double>(g[i]) * (zs[i] - means[i % K]);
  }
  merge_vector(sum_g, results.sum_g), merge_vector(sum_gz, results.sum_gz);
}

// By ATen's convolutions.
void run_direct(const Tensor& dy, const Tensor& activation, const Tensor& weight, Results& results) {
  using torch::stable::detail::from, torch::stable::detail::to;
  static const std::array<bool, 3> wanted{true, true, false};
  std::array<StableIValue, 11> stack{from(dy),
                                     from(activation),
                                     from(weight),
                                     from(std::nullopt),
                                     ints({1, 1}),
                                     ints({1, 1}),
                                     ints({1, 1}),
                                     from(false),
                                     ints({0, 0}),
                                     from(int64_t(1)),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted.data(), 3))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor found[3] = {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};  // all are ours to free
  torch::stable::copy_(results.g, found[0]);
  torch::stable::copy_(results.grad_weight, found[1]);
}

Problem weight_of(const Tensor& weight, int64_t panel) {
  Problem p{};
  p.C = weight.size(0), p.K = weight.size(1);
  p.stride_k = weight.stride(1), p.stride_c = weight.stride(0);
  p.stride_r = -weight.stride(2), p.stride_s = -weight.stride(3);  // taps from the last to the first
  p.weight = data<float>(weight) - 2 * (p.stride_r + p.stride_s);
  p.cut(Tile2::outputs, panel);
  p.u_pitch = panel, p.u_gap = Problem::kGap;
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dense_conv3x3_backward(const Tensor& grad, const Tensor& y, const Tensor& b,
                                                                  const Tensor& d, const Tensor& z,
                                                                  const Tensor& weight, const Tensor& scale,
                                                                  const Tensor& shift, const Tensor& mean) {
  check_dense_conv3x3_backward({grad, y, b, d}, z, weight, scale, shift, mean);
  Results results{
      empty_channels_last(z), empty_stats(z), empty_stats(z),
      empty_strided<4>({weight.size(0), weight.size(1), 3, 3},
                       {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)}, ScalarType::Float)};
  const auto all = [&] { return std::tuple{results.g, results.sum_g, results.sum_gz, results.grad_weight}; };
  if (z.numel() == 0 || grad.numel() == 0) {
    for (Tensor* t : {&results.g, &results.sum_g, &results.sum_gz, &results.grad_weight}) torch::stable::zero_(*t);
    return all();
  }
  const int64_t K = z.size(1);
  const Stages& at = stages();
  const DenseConvBackward p{{data<float>(z), data<float>(scale), data<float>(shift), K, Pixels(z, {1, 1})},
                            data<float>(mean),
                            {data<float>(grad), data<float>(y), data<float>(b), data<float>(d), grad.size(1),
                             pixel_pitch(grad), pixel_pitch(y)},
                            weight_of(weight, at.panel),
                            nullptr,
                            data<float>(results.g),
                            Strips(z.size(0), z.size(2), z.size(3), pitch_of(K))};
  if (!run(p, at, results)) {
    const Tensor activation = dense_activation(z, scale, shift);
    run_direct(dense_gradient(grad, y, b, d), activation, weight, results);
    mask_and_sum(activation, z, mean, results);
  }
  return all();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("dense_conv3x3_backward", TORCH_BOX(&dense_conv3x3_backward));
}

}  // namespace resnet_fused::cpu
