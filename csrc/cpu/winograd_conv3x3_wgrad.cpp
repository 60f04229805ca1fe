// Weight gradient of a 3x3 convolution of stride 1 by Winograd's F(3x3, 2x2): 16 multiplications instead of 36.
//
// A unit of work is (part of the tiles, some channels of grad, some of x): csrc/cpu/winograd_wgrad.h. It transforms a
// block of tiles at a time into buffers of its own, so that threads share nothing but the inputs. The parts depend on
// the shape alone and are added in order: the same bits for any number of threads, by which only channels are split.
//
// A tile spreads NaN, Inf and overflow over taps that they do not reach, and a transform can overflow where no product
// does. So where anything is not finite, ATen's convolution is asked instead: what it gives is the promise.
// Bytes: grad and x once per split of the other's channels; FLOPs: 2*16 per tile and pair of channels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <string_view>
#include <vector>

#include "../checks/winograd_conv3x3_wgrad.h"
#include "alloc.h"
#include "rows.h"
#include "winograd_wgrad.h"

namespace resnet_fused::cpu {
namespace {

using namespace winograd_wgrad;

constexpr int64_t kPartTiles = 256, kParts = 8;     // a part must be worth its merge
constexpr int64_t kMaxScratch = int64_t(16) << 20;  // bytes of partial results
constexpr int64_t kLeast = 32;                      // channels of a unit, unless there are no more

// Channels in equal pieces of at most `most`, each but the last a multiple of kLeast.
struct Split {
  int64_t size, width, pieces;

  Split(int64_t channels, int64_t most) : size(channels) {
    const int64_t wanted = (size + most - 1) / most, equal = (size + wanted - 1) / wanted;
    width = (equal + kLeast - 1) / kLeast * kLeast;
    pieces = (size + width - 1) / width;
  }

  int64_t width_of(int64_t piece) const { return std::min(width, size - piece * width); }
};

struct Work {
  const Geometry& g;
  Split k, c;
  int64_t parts;

  Work(const Geometry& geometry, int64_t threads) : g(geometry), k(g.K, kMost), c(g.C, kMost) {
    const int64_t affordable = kMaxScratch / (36 * g.K * g.C), pieces = k.pieces * c.pieces;
    parts = std::max<int64_t>(1, std::min({affordable, g.tiles / kPartTiles, kParts / pieces}));
    for (int64_t most = kMost / 2; most >= kLeast && units() < 2 * threads && threads > 1; most /= 2) {
      k = Split(g.K, most);
      if (units() < 2 * threads) c = Split(g.C, most);
    }
  }

  int64_t units() const { return parts * k.pieces * c.pieces; }
  int64_t part_of(int64_t index) const { return index / (k.pieces * c.pieces); }

  Unit unit(int64_t index) const {
    const int64_t part = part_of(index), i = index / c.pieces % k.pieces, j = index % c.pieces;
    return {g.tiles * part / parts, g.tiles * (part + 1) / parts, i * k.width, k.width_of(i), j * c.width,
            c.width_of(j)};
  }
};

struct Arguments {
  const float *grad, *x;
  float* partial;  // [parts, K, 3, 3, C]
  const Work& work;
};

// The units [begin, end); whether all is finite.
template <class L>
RESNET_FUSED_INLINE bool run_units(const Arguments& to, int64_t begin, int64_t end) {
  Buffers<L> buffers;
  bool finite = true;
  for (int64_t index = begin; index < end; ++index) {
    const Geometry& g = to.work.g;
    float* out = to.partial + to.work.part_of(index) * g.K * 9 * g.C;
    finite &= run_unit(buffers, to.grad, to.x, out, g, to.work.unit(index));
  }
  return finite;
}

#ifdef RESNET_FUSED_LEVEL_512
RESNET_FUSED_TARGET_512 bool run_units_512(const Arguments& to, int64_t begin, int64_t end) {
  return run_units<Level<64, 7, 4>>(to, begin, end);
}
RESNET_FUSED_TARGET_256 bool run_units_256(const Arguments& to, int64_t begin, int64_t end) {
  return run_units<Level<32, 6, 4>>(to, begin, end);
}
#endif

bool run_units_128(const Arguments& to, int64_t begin, int64_t end) {
  return run_units<Level<16, 6, 4>>(to, begin, end);
}

auto choose_level() {
#ifdef RESNET_FUSED_LEVEL_512
  const std::string_view level = cpu_level();
  if (level == "avx512") return &run_units_512;
  if (level == "avx2") return &run_units_256;
#endif
  return &run_units_128;
}

// The sum of the parts of one row of taps, [9, C]; whether it is finite.
RESNET_FUSED_CLONES bool add_parts(float* __restrict sum, const float* __restrict partial, int64_t parts, int64_t step,
                                   int64_t size) {
  for (int64_t i = 0; i < size; ++i) sum[i] = partial[i];
  for (int64_t part = 1; part < parts; ++part) {
    for (int64_t i = 0; i < size; ++i) sum[i] += partial[part * step + i];
  }
  bool finite = true;
  for (int64_t i = 0; i < size; ++i) finite &= sum[i] * 0.0f == 0.0f;
  return finite;
}

// Adds up the parts and puts them where `out` has them; whether all is finite.
bool merge(const Tensor& out, const float* partial, const Work& work) {
  const Geometry& g = work.g;
  const int64_t sk = out.stride(0), sc = out.stride(1), sr = out.stride(2), ss = out.stride(3);
  std::atomic<bool> finite = true;
  torch::stable::parallel_for(0, g.K, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(9 * g.C);
    for (int64_t k = begin; k < end; ++k) {
      if (!add_parts(sum.data(), partial + k * 9 * g.C, work.parts, g.K * 9 * g.C, 9 * g.C)) finite = false;
      float* to = data<float>(out) + k * sk;
      for (int64_t c = 0; c < g.C; ++c) {
        for (int64_t tap = 0; tap < 9; ++tap) to[c * sc + tap / 3 * sr + tap % 3 * ss] = sum[tap * g.C + c];
      }
    }
  });
  return finite;
}

// Fills `out`; whether all of it is finite.
bool run(const Tensor& grad, const Tensor& x, const Tensor& out, const Geometry& g) {
  static const auto run_level = choose_level();
  const Work work(g, torch::stable::get_num_threads());
  const bool direct = work.parts == 1 && is_channels_last(out);
  const auto partials = aligned_array<float>(direct ? 0 : work.parts * g.K * 9 * g.C);
  const Arguments to{data<float>(grad), data<float>(x), direct ? data<float>(out) : partials.get(), work};
  std::atomic<bool> finite = true;
  torch::stable::parallel_for(0, work.units(), 1, [&](int64_t begin, int64_t end) {
    if (!run_level(to, begin, end)) finite = false;
  });
  return direct || !finite ? finite.load() : merge(out, partials.get(), work);
}

// ATen's own gradient, in the strides of `out`.
void run_aten(const Tensor& grad, const Tensor& x, const Tensor& weight, const std::vector<int64_t>& padding,
              Tensor& out) {
  using torch::headeronly::HeaderOnlyArrayRef;
  using torch::stable::detail::from, torch::stable::detail::to;
  const std::vector<int64_t> ones{1, 1}, zeros{0, 0};
  constexpr bool mask[3] = {false, true, false};
  StableIValue stack[11] = {from(grad),
                            from(x),
                            from(weight),
                            from(std::nullopt),
                            from(ones),
                            from(padding),
                            from(ones),
                            from(false),
                            from(zeros),
                            from(int64_t(1)),
                            from(HeaderOnlyArrayRef<bool>(mask, 3))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution_backward", "", stack, TORCH_ABI_VERSION));
  Tensor results[3] = {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};  // ours to free
  torch::stable::copy_(out, results[1]);
}

Tensor winograd_conv3x3_wgrad(const Tensor& grad, const Tensor& x, const Tensor& weight, std::vector<int64_t> padding) {
  check_winograd_conv3x3_wgrad(grad, x, weight, padding);
  Tensor out =
      empty_strided<4>({weight.size(0), weight.size(1), 3, 3},
                       {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)}, weight.scalar_type());
  if (out.numel() == 0) return out;
  const Geometry g(x.size(0), x.size(2), x.size(3), x.size(1), grad.size(2), grad.size(3), grad.size(1), padding);
  if (g.tiles == 0) return torch::stable::zero_(out);
  if (!run(grad, x, out, g)) run_aten(grad, x, weight, padding, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("winograd_conv3x3_wgrad", TORCH_BOX(&winograd_conv3x3_wgrad));
}

}  // namespace resnet_fused::cpu
