// The stages of the 1x1 convolutions at every level that this machine runs, on small numbers, of which every product
// and sum is exact: each result has to be that of plain loops. Buffers have no room to spare.
#include <cstdio>
#include <string_view>
#include <vector>

#include "../../csrc/cpu/conv1x1_backward_stages.h"
#include "../../csrc/cpu/conv1x1_stages.h"

using namespace resnet_fused::cpu;

namespace {

#define LEVEL(NAME, TARGET, L)                                                                                   \
  TARGET void pack_##NAME(const Conv1x1& p, int64_t panel, float* packed) { pack_outputs<L>(p, panel, packed); } \
  TARGET void tile_##NAME(const Conv1x1& p, int64_t row, int64_t rows, float* scratch, const BlockSums& sums) {  \
    convolve_tile<L>(p, row, rows, 0, p.panels, scratch, sums);                                                  \
  }                                                                                                              \
  TARGET void inputs_##NAME(const Conv1x1Backward& p, int64_t panel, float* packed, float* coupled) {            \
    pack_inputs<L>(p, panel, packed, coupled);                                                                   \
  }                                                                                                              \
  TARGET void back_##NAME(const Conv1x1Backward& p, float* scratch, const BackwardSums& s) {                     \
    backward_rows<L>(p, 0, p.rows, 0, p.panels, scratch, s);                                                     \
  }                                                                                                              \
  int64_t wrong_##NAME(int64_t rows, int64_t C, int64_t K) {                                                     \
    return forward(rows, C, K, L::panel, pack_##NAME, tile_##NAME) +                                             \
           backward(rows, C, K, L::panel, inputs_##NAME, back_##NAME);                                           \
  }

std::vector<float> numbers(int64_t size, int64_t step, int64_t modulus, float unit) {
  std::vector<float> found(size);
  for (int64_t i = 0; i < size; ++i) found[i] = static_cast<float>(i * step % modulus - modulus / 2) * unit;
  return found;
}

Pixels dense(int64_t rows) {
  Pixels pixels{};
  pixels.H = pixels.height = rows, pixels.W = pixels.width = pixels.stride_h = pixels.step = 1, pixels.rows = rows;
  return pixels;
}

float activated(float x, float scale, float shift) { return std::max(x * scale + shift, 0.0f); }

// Rows of `values`, C each, with kGap others between them, and none behind the last.
constexpr int64_t kGap = 3;
std::vector<float> spread(const std::vector<float>& values, int64_t C) {
  const int64_t rows = static_cast<int64_t>(values.size()) / C;
  std::vector<float> found(rows * (C + kGap) - kGap, 7);
  for (int64_t i = 0; i < rows * C; ++i) found[i / C * (C + kGap) + i % C] = values[i];
  return found;
}

template <class Pack, class Tile>
int64_t forward(int64_t rows, int64_t C, int64_t K, int64_t panel, Pack pack, Tile tile) {
  const auto x = numbers(rows * C, 31, 17, 1), weight = numbers(K * C, 13, 11, 0.125f);
  const auto scale = numbers(C, 3, 5, 0.5f), shift = numbers(C, 5, 7, 1);
  const auto apart = spread(x, C);
  std::vector<float> z(rows * K);
  Conv1x1 p{{apart.data(), scale.data(), shift.data(), C, dense(rows), kGap},
            weight.data(),
            nullptr,
            z.data(),
            rows,
            C,
            K,
            panel,
            (K + panel - 1) / panel};
  std::vector<float> packed(p.panels * C * panel), scratch(p.scratch()), sums[3];
  for (auto& part : sums) part.resize(p.panels * panel);
  for (int64_t i = 0; i < p.panels; ++i) pack(p, i, packed.data() + i * C * panel);
  p.packed = packed.data();
  for (int64_t row = 0; row < rows; row += Conv1x1::kTile) {
    const BlockSums block{sums[0].data(), sums[1].data(), sums[2].data(), row == 0, row == 0};
    tile(p, row, std::min(Conv1x1::kTile, rows - row), scratch.data(), block);
  }
  int64_t found = 0;
  for (int64_t k = 0; k < K; ++k) {
    double total = 0, exact = 0;
    for (int64_t r = 0; r < rows; ++r) {
      float sum = 0;
      for (int64_t c = 0; c < C; ++c) sum += activated(x[r * C + c], scale[c], shift[c]) * weight[k * C + c];
      found += sum != z[r * K + k];
      exact += sum;
    }
    total = static_cast<double>(sums[0][k]) * static_cast<double>(rows) + sums[1][k];
    found += std::abs(total - exact) > 1e-5 * (1 + std::abs(exact) + static_cast<double>(rows));
  }
  return found;
}

// The same gradient of the input, not through a ReLU but with that of another path added, which has every second row.
template <class Run>
int64_t added(Conv1x1Backward p, const std::vector<float>& dz, Run run) {
  const auto residual = numbers((p.rows + 1) / 2 * p.C, 19, 15, 1);
  const auto grad_x = aligned_array<float>(p.rows * p.C);
  p.through = false, p.grad_x = grad_x.get(), p.stream = p.panel == Level512::panel && p.C % 16 == 0;
  p.added = {residual.data(), nullptr, p.rows, 1, 2, 1};
  int64_t found = 0;
  for (const bool weight_grad : {true, false}) {
    p.weight_grad = weight_grad;
    std::vector<float> scratch(p.scratch()), grad_weight(p.panels * p.K * p.panel);
    run(p, scratch.data(), {grad_weight.data(), nullptr, nullptr, nullptr});
    for (int64_t i = 0; i < p.rows * p.C; ++i) {
      const int64_t r = i / p.C, c = i % p.C;
      float sum = r % 2 == 0 ? residual[r / 2 * p.C + c] : 0;
      for (int64_t k = 0; k < p.K; ++k) sum += dz[r * p.K + k] * p.weight[k * p.C + c];
      found += grad_x[i] != sum;
    }
  }
  return found;
}

// The gradient through the ReLU, `masked`, times the scale of the input and added to what is there, of rows that lie
// apart.
template <class Run>
int64_t apart(Conv1x1Backward p, const std::vector<float>& x, const std::vector<float>& masked, Run run) {
  const auto before = numbers(p.rows * p.C, 19, 15, 1);
  const auto input = spread(x, p.C);
  auto out = spread(before, p.C);
  p.input.x = input.data(), p.input.gap = p.gap = kGap, p.grad_x = out.data();
  p.added = {out.data(), nullptr, p.rows, 1, 1, 1, kGap};
  std::vector<float> scratch(p.scratch()), grad_weight(p.panels * p.K * p.panel), want(masked.size());
  std::vector<double> sum_g(p.C), sum_gx(p.C), sum_dz(p.K);
  run(p, scratch.data(), {grad_weight.data(), sum_g.data(), sum_gx.data(), sum_dz.data()});
  for (size_t i = 0; i < want.size(); ++i) want[i] = before[i] + p.input.scale[i % p.C] * masked[i];
  int64_t found = out != spread(want, p.C);
  for (int64_t c = 0; c < p.C; ++c) {
    double sum = 0;
    for (int64_t r = 0; r < p.rows; ++r) sum += masked[r * p.C + c];
    found += sum != sum_g[c];
  }
  return found;
}

template <class Pack, class Run>
int64_t backward(int64_t rows, int64_t C, int64_t K, int64_t panel, Pack pack, Run run) {
  const auto g = numbers(rows * K, 7, 9, 1), z = numbers(rows * K, 11, 13, 1), x = numbers(rows * C, 31, 17, 1);
  const auto weight = numbers(K * C, 13, 11, 0.125f), a = numbers(K, 3, 5, 0.5f), b = numbers(K, 2, 3, 0.5f);
  const auto scale = numbers(C, 3, 5, 0.5f), shift = numbers(C, 5, 7, 1), mean = numbers(C, 2, 5, 1);
  std::vector<uint8_t> mask(rows * mask_bytes(K));
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = static_cast<uint8_t>(i * 37 % 251);
  std::vector<float> grad_x(rows * C);
  Conv1x1Backward p{};
  p.gradient = {g.data(), z.data(), a.data(), b.data(), a.data(), nullptr, nullptr, nullptr, mask.data(), K, rows};
  p.input = {x.data(), scale.data(), shift.data(), C, dense(rows)};
  p.weight = weight.data(), p.mean = mean.data(), p.grad_x = grad_x.data(), p.through = p.weight_grad = true;
  p.rows = rows, p.K = K, p.C = C, p.panel = panel, p.panels = (C + panel - 1) / panel;
  std::vector<float> packed(p.panels * K * panel), scratch(p.scratch()), grad_weight(p.panels * K * panel);
  std::vector<double> sum_g(C), sum_gx(C), sum_dz(K);
  for (int64_t i = 0; i < p.panels; ++i) pack(p, i, packed.data() + i * K * panel, nullptr);
  p.packed = packed.data();
  run(p, scratch.data(), {grad_weight.data(), sum_g.data(), sum_gx.data(), sum_dz.data()});
  std::vector<float> dz(rows * K);
  std::vector<double> want_g(C), want_gx(C), want_dz(K), want_weight(K * C);
  for (int64_t i = 0; i < rows * K; ++i) {
    const int64_t r = i / K, k = i % K;
    const bool keep = mask[r * mask_bytes(K) + k / 8] >> (k % 8) & 1;
    dz[i] = (keep ? g[i] : 0) * a[k] + b[k] * z[i] + a[k];
    want_dz[k] += dz[i];
  }
  int64_t found = 0;
  for (int64_t i = 0; i < rows * C; ++i) {
    const int64_t r = i / C, c = i % C;
    const float y = activated(x[i], scale[c], shift[c]);
    float sum = 0;
    for (int64_t k = 0; k < K; ++k) {
      sum += dz[r * K + k] * weight[k * C + c];
      want_weight[k * C + c] += dz[r * K + k] * y;
    }
    found += grad_x[i] != (y > 0 ? sum : 0);
    want_g[c] += grad_x[i], want_gx[c] += grad_x[i] * (x[i] - mean[c]);
  }
  for (int64_t c = 0; c < C; ++c) {
    found += sum_g[c] != want_g[c] || sum_gx[c] != want_gx[c];
    for (int64_t k = 0; k < K; ++k) {
      found += grad_weight[(c / panel * K + k) * panel + c % panel] != want_weight[k * C + c];
    }
  }
  for (int64_t k = 0; k < K; ++k) found += sum_dz[k] != want_dz[k];
  return found + added(p, dz, run) + apart(p, x, grad_x, run);
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
  const auto try_shape = [&](int64_t rows, int64_t C, int64_t K) {
    ++shapes;
    found += wrong_128(rows, C, K);
    if (level != "baseline") found += wrong_256(rows, C, K);
#ifndef RESNET_FUSED_WITHOUT_512
    if (level == "avx512") found += wrong_512(rows, C, K);
#endif
  };
  for (int64_t rows : {1, 27, 28, 57, 130}) {
    for (int64_t C : {1, 5, 16, 33, 65}) {
      for (int64_t K : {1, 8, 16, 45}) try_shape(rows, C, K);
    }
  }
  try_shape(130, 336, 320);  // a weight that is read once a tile
  std::printf("%s: %lld wrong in %lld shapes\n", level.data(), static_cast<long long>(found),
              static_cast<long long>(shapes));
  return found != 0;
}
