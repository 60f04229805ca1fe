// Grouped convolutions and their gradients at every level that this machine runs, on small numbers of which every
// product and sum is exact: each result has to be that of the direct sum. Buffers have no room to spare.
#include "../../csrc/cpu/grouped_conv3x3.h"
#include "../../csrc/cpu/grouped_wgrad.h"

#include <cstdio>
#include <string_view>
#include <vector>

using namespace resnet_fused::cpu;

namespace {

struct Case {
  int64_t width, groups, H, W, stride;  // of the convolution's input
};

constexpr int64_t kImages = 2;

int64_t made(int64_t size, int64_t stride) { return (size - 1) / stride + 1; }

// The convolution of every output: f(x, weight, output) of all that meet, by their indices.
template <class F>
void for_each_product(const Case& t, const F& f) {
  const int64_t C = t.width * t.groups, P = made(t.H, t.stride), Q = made(t.W, t.stride);
  for (int64_t i = 0; i < kImages * P * Q * C * 9 * t.width; ++i) {
    const int64_t j = i % t.width, s = i / t.width % 3, r = i / t.width / 3 % 3, k = i / t.width / 9 % C;
    const int64_t q = i / t.width / 9 / C % Q, p = i / t.width / 9 / C / Q % P, n = i / t.width / 9 / C / Q / P;
    const int64_t h = p * t.stride - 1 + r, w = q * t.stride - 1 + s;
    if (h < 0 || h >= t.H || w < 0 || w >= t.W) continue;
    f(((n * t.H + h) * t.W + w) * C + k / t.width * t.width + j, ((k * t.width + j) * 3 + r) * 3 + s,
      ((n * P + p) * Q + q) * C + k);
  }
}

struct Numbers {
  std::vector<float> x, weight, grad, z, back, grad_w;

  explicit Numbers(const Case& t) {
    const int64_t C = t.width * t.groups, pixels = kImages * made(t.H, t.stride) * made(t.W, t.stride);
    x.resize(kImages * t.H * t.W * C), weight.resize(C * t.width * 9), grad.resize(pixels * C);
    z.resize(grad.size()), back.resize(x.size()), grad_w.resize(weight.size());
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 31 % 17) - 8;
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<float>(i * 13 % 11) - 5;
    for (size_t i = 0; i < grad.size(); ++i) grad[i] = static_cast<float>(i * 7 % 13) - 6;
    for_each_product(t, [&](int64_t a, int64_t b, int64_t c) {
      z[c] += x[a] * weight[b];
      back[a] += grad[c] * weight[b];
      grad_w[b] += grad[c] * x[a];
    });
  }
};

Grouped problem_of(const Case& t, int64_t lanes, bool transposed) {
  Grouped g{};
  const int64_t P = made(t.H, t.stride), Q = made(t.W, t.stride);
  g.N = kImages, g.C = t.width * t.groups, g.width = t.width, g.stride = t.stride, g.lanes = lanes;
  g.transposed = transposed;
  g.H = transposed ? P : t.H, g.W = transposed ? Q : t.W, g.P = transposed ? t.H : P, g.Q = transposed ? t.W : Q;
  g.cut();
  return g;
}

template <class Part>
void for_each_unit(const Grouped& g, const Part& part) {
  for (int64_t i = 0; i < g.ranges * g.N * g.strips; ++i) part(g.unit(i / (g.N * g.strips), i % (g.N * g.strips)));
}

int64_t different(const std::vector<float>& a, const std::vector<float>& b) {
  int64_t count = 0;
  for (size_t i = 0; i < a.size(); ++i) count += a[i] != b[i];
  return count;
}

#define LEVEL(NAME, TARGET, L, SHARES)                                                                                 \
  template <Walk walk, int64_t Q, bool shared>                                                                         \
  TARGET void strip_##NAME(const Grouped& g, const Unit& unit, int64_t slot, const float* packed, const float* weight, \
                           const SlotSums& sums, float* z) {                                                           \
    convolve_strip<L, walk, Q, shared>(g, unit, slot, packed, weight, sums, z);                                        \
  }                                                                                                                    \
  TARGET void pack_##NAME(const Grouped& g, const Unit& unit, const float* x, float* dst) {                            \
    pack_read<L>(g, unit, x, dst);                                                                                     \
  }                                                                                                                    \
  TARGET void pack_grad_##NAME(const Grouped& g, const Unit& unit, const float* grad, float* dst) {                    \
    const float* first = grad + (unit.sample * g.P + unit.first_row) * g.Q * g.C;                                      \
    pack_rows<L>(g, unit, first, unit.end_row - unit.first_row, g.Q, g.strip_rows * (g.Q + 2) * g.lanes, dst);         \
  }                                                                                                                    \
  template <bool strided, bool shared>                                                                                 \
  TARGET void add_##NAME(const Grouped& g, const Unit& unit, int64_t depth, const float* x, const float* grad,         \
                         float* dst) {                                                                                 \
    add_strip<L, strided, shared>(g, unit, depth, x, grad, dst);                                                       \
  }                                                                                                                    \
  template <bool shared, int64_t Q>                                                                                    \
  void any_##NAME(const Grouped& g, const Unit& unit, int64_t slot, const float* packed, const float* weight,          \
                  const SlotSums& sums, float* z) {                                                                    \
    if (g.scatters()) return strip_##NAME<Walk::kScattered, Q, shared>(g, unit, slot, packed, weight, sums, z);        \
    if (g.stride == 2) return strip_##NAME<Walk::kStrided, Q, shared>(g, unit, slot, packed, weight, sums, z);         \
    strip_##NAME<Walk::kPlain, Q, shared>(g, unit, slot, packed, weight, sums, z);                                     \
  }                                                                                                                    \
  template <bool shared>                                                                                               \
  int64_t convolution_##NAME(const Case& t, bool transposed, const std::vector<float>& from,                           \
                             const std::vector<float>& weight, const std::vector<float>& wanted) {                     \
    const Grouped g = problem_of(t, L::lanes, transposed);                                                             \
    std::vector<float> z(wanted.size()), taps(g.slots * g.weight_slot()), moments(3 * L::lanes);                       \
    for (int64_t slot = 0; slot < g.slots; ++slot) {                                                                   \
      pack_weight(g, weight.data(), {t.width * 9, 9, 3, 1}, slot, taps.data() + slot * g.weight_slot());               \
    }                                                                                                                  \
    for_each_unit(g, [&](const Unit& unit) {                                                                           \
      std::vector<float> packed(g.packed_size());                                                                      \
      pack_##NAME(g, unit, from.data(), packed.data());                                                                \
      for (int64_t slot = unit.first_slot; slot < unit.end_slot; ++slot) {                                             \
        const float* group = packed.data() + g.group_slot(unit, slot) * g.packed_slot();                               \
        const SlotSums sums{moments.data(), moments.data() + L::lanes, moments.data() + 2 * L::lanes};                 \
        const float* w = taps.data() + slot * g.weight_slot();                                                         \
        any_##NAME<shared, 2>(g, unit, slot, group, w, sums, z.data());                                                \
      }                                                                                                                \
    });                                                                                                                \
    return different(z, wanted);                                                                                       \
  }                                                                                                                    \
  template <bool shared>                                                                                               \
  int64_t gradient_##NAME(const Case& t, const Numbers& n) {                                                           \
    const Grouped g = problem_of(t, L::lanes, false);                                                                  \
    const int64_t depth = (t.width + kWgradInputs<L> - 1) / kWgradInputs<L> * kWgradInputs<L>;                         \
    const int64_t of_slot = 9 * depth * L::lanes, grad_slot = g.strip_rows * (g.Q + 2) * L::lanes;                     \
    std::vector<float> sums(g.slots * of_slot), found(n.grad_w.size());                                                \
    for_each_unit(g, [&](const Unit& unit) {                                                                           \
      std::vector<float> x(g.packed_size()), grad(g.range_slots * grad_slot);                                          \
      pack_##NAME(g, unit, n.x.data(), x.data());                                                                      \
      pack_grad_##NAME(g, unit, n.grad.data(), grad.data());                                                           \
      for (int64_t slot = unit.first_slot; slot < unit.end_slot; ++slot) {                                             \
        const float* a = x.data() + g.group_slot(unit, slot) * g.packed_slot();                                        \
        const float* b = grad.data() + (slot - unit.first_slot) * grad_slot;                                           \
        float* to = sums.data() + slot * of_slot;                                                                      \
        t.stride == 2 ? add_##NAME<true, shared>(g, unit, depth, a, b, to)                                             \
                      : add_##NAME<false, shared>(g, unit, depth, a, b, to);                                           \
      }                                                                                                                \
    });                                                                                                                \
    for (size_t i = 0; i < found.size(); ++i) {                                                                        \
      const int64_t tap = i % 9, j = i / 9 % t.width, k = i / 9 / t.width;                                             \
      int64_t slot = 0;                                                                                                \
      while (k >= g.first_channel(slot) + g.channels(slot)) ++slot;                                                    \
      found[i] = sums[slot * of_slot + ((tap / 3 * depth + j) * 3 + tap % 3) * L::lanes + k - g.first_channel(slot)];  \
    }                                                                                                                  \
    return different(found, n.grad_w);                                                                                 \
  }                                                                                                                    \
  template <bool shared>                                                                                               \
  int64_t all_##NAME(const Case& t, const Numbers& n) {                                                                \
    return convolution_##NAME<shared>(t, false, n.x, n.weight, n.z) +                                                  \
           convolution_##NAME<shared>(t, true, n.grad, n.weight, n.back) + gradient_##NAME<shared>(t, n);              \
  }                                                                                                                    \
  int64_t wrong_##NAME(const Case& t) {                                                                                \
    const Numbers n(t);                                                                                                \
    if constexpr (SHARES) {                                                                                            \
      if (problem_of(t, L::lanes, false).shared) return all_##NAME<true>(t, n);                                        \
    }                                                                                                                  \
    return all_##NAME<false>(t, n);                                                                                    \
  }

LEVEL(128, , Level128, false)
#ifdef RESNET_FUSED_LEVEL_512
LEVEL(256, RESNET_FUSED_TARGET_256, Level256, true)
#ifndef RESNET_FUSED_WITHOUT_512
LEVEL(512, RESNET_FUSED_TARGET_512, Level512, true)
#endif
#endif

}  // namespace

int main() {
  const std::string_view level = resnet_fused::cpu_level();
  int64_t found = 0, shapes = 0;
  for (const auto& [width, groups] :
       {std::pair<int64_t, int64_t>{4, 1}, {4, 9}, {8, 3}, {2, 5}, {16, 2}, {5, 3}, {36, 1}, {1, 4}, {12, 11}}) {
    for (const auto& [H, W] : {std::pair<int64_t, int64_t>{2, 3}, {5, 4}, {9, 7}, {8, 8}, {3, 13}}) {
      for (int64_t stride : {1, 2}) {
        const Case t{width, groups, H, W, stride};
        found += wrong_128(t);
#ifdef RESNET_FUSED_LEVEL_512
        if (level != "baseline") found += wrong_256(t);
#ifndef RESNET_FUSED_WITHOUT_512
        if (level == "avx512") found += wrong_512(t);
#endif
#endif
        ++shapes;
      }
    }
  }
  std::printf("%s: %lld wrong in %lld shapes\n", level.data(), static_cast<long long>(found),
              static_cast<long long>(shapes));
  return found != 0;
}
