// The weight's gradient of a convolution in bfloat16 as products by vdpbf16ps, a strip of an image's lines at a time.
//
// Neighbouring pixels of a line are a pair, the last one with zeros where their number is odd. Of the gradient the
// pairs are packed once for all outputs; of the input once for each column s of the weight, for a panel of channels, as
// many lines as the strip's taps reach, so that the products of tap (r, s) run through both without a gap. Chunks of
// strips depend on the shape alone and are added up in their order. Bytes: grad once for each block of channels, x
// once; FLOPs: 2*M*K*C*R*S.
#include "conv_weight_grad_bf16.h"

#include <algorithm>
#include <bit>

#include "bf16.h"
#include "conv1x1_values.h"
#include "rows.h"

namespace resnet_fused::cpu {

#ifdef RESNET_FUSED_BF16
namespace {

using bf16::kGroup, bf16::kLanes;
constexpr int64_t kColumns = bf16::kPanel;

struct Problem {
  const uint16_t *grad, *x;  // [N, P, Q, K], [N, H, W, C]
  int64_t N, H, W, C, P, Q, K, R, S, stride[2], padding[2], dilation[2];

  static constexpr int64_t kPairs = 128;  // of a strip, if a line has not more: a panel of them fills a third of 48 KiB

  int64_t taps() const { return R * S; }
  int64_t panels() const { return bf16::padded(C) / kColumns; }
  int64_t groups() const { return (K + kGroup - 1) / kGroup; }
  int64_t pairs() const { return bf16::pairs_of(Q); }  // of a line
  // Strips of small images, which have less pairs, go on in the next image.
  bool is_small() const { return P * pairs() < kPairs / 2; }
  int64_t lines() const { return std::clamp(kPairs / pairs(), int64_t(1), is_small() ? N * P : P); }  // of a strip
  int64_t strips() const {
    const int64_t among = is_small() ? N * P : P;
    return (is_small() ? 1 : N) * ((among + lines() - 1) / lines());
  }
  // The first line of a strip, counted through all images.
  int64_t first_line(int64_t strip) const {
    if (is_small()) return N * P * strip / strips();
    const int64_t each = strips() / N;
    return strip / each * P + P * (strip % each) / each;
  }
  // Whether the taps of a column read the same lines.
  bool shares_lines() const { return stride[0] == 1 && dilation[0] == 1 && !is_small(); }

  // Elements of the scratch: the pairs of the gradient, and of the input for all columns, or of one tap.
  int64_t gradient_size() const { return groups() * lines() * pairs() * 2 * kLanes; }
  int64_t column_size() const { return (shares_lines() ? lines() + R - 1 : lines()) * pairs() * 2 * kColumns; }
  int64_t scratch() const { return gradient_size() + (shares_lines() ? S : 1) * column_size(); }
};

struct Work {
  static constexpr int64_t kSums = int64_t(1) << 20, kChunks = 64, kUnits = 16;
  int64_t strips, chunks, blocks;

  explicit Work(const Problem& p) : strips(p.strips()) {
    const int64_t afforded = std::min(kSums / (p.K * p.C * p.taps()), strips);
    chunks = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(std::clamp(afforded, int64_t(1), kChunks))));
    blocks = std::clamp(kUnits / chunks, int64_t(1), p.panels());
  }
};

// The lines [begin, begin + lines), as pairs of pixels: [groups][lines][pairs][kLanes][2].
RESNET_FUSED_BF16 void pair_gradient(const Problem& t, int64_t begin, int64_t lines, uint16_t* out) {
  for (int64_t group = 0; group < t.groups(); ++group) {
    const int64_t k = t.K * group / t.groups();
    const __mmask16 outputs = bf16::lanes_of(t.K * (group + 1) / t.groups() - k);
    for (int64_t line = 0; line < lines; ++line) {
      const uint16_t* from = t.grad + (begin + line) * t.Q * t.K + k;
      for (int64_t q = 0; q < t.Q; q += 2, from += 2 * t.K, out += 2 * kLanes) {
        const __m256i first = _mm256_maskz_loadu_epi16(outputs, from);
        const __m256i second = q + 1 < t.Q ? _mm256_maskz_loadu_epi16(outputs, from + t.K) : _mm256_setzero_si256();
        _mm512_storeu_si512(out, bf16::interleaved(first, second));
      }
    }
  }
}

// Line h of image n for the pixels of column s and channels [c, c + kColumns): [pairs][kColumns][2], zeros in the
// padding.
RESNET_FUSED_BF16 void pair_line(const Problem& t, int64_t n, int64_t h, int64_t s, int64_t c, uint16_t* out) {
  const __mmask32 columns = bf16::columns_of(t.C - c);
  const uint16_t* line = t.x + (n * t.H + h) * t.W * t.C + c;
  const bool outside = h < 0 || h >= t.H;
  int64_t w = s * t.dilation[1] - t.padding[1];
  for (int64_t q = 0; q < t.Q; q += 2, w += 2 * t.stride[1], out += 2 * kColumns) {
    const int64_t next = w + t.stride[1];
    __m512i first = _mm512_setzero_si512(), second = first;
    if (!outside && w >= 0 && w < t.W) first = bf16::load_columns(columns, line + w * t.C);
    if (!outside && q + 1 < t.Q && next >= 0 && next < t.W) second = bf16::load_columns(columns, line + next * t.C);
    bf16::interleave(first, second, out);
  }
}

// A tap's products for the pairs of a strip, added to its sums of a panel, [K][kColumns].
RESNET_FUSED_BF16 void multiply_tap(const Problem& t, const uint16_t* gradient, const uint16_t* activation,
                                    int64_t pairs, bool add, float* weight) {
  for (int64_t group = 0; group < t.groups(); ++group) {
    const int64_t k = t.K * group / t.groups(), count = t.K * (group + 1) / t.groups() - k;
    bf16::weight_group_of<kGroup>(count, gradient + group * pairs * 2 * kLanes, activation, pairs, add,
                                  weight + k * kColumns);
  }
}

// The sums of a strip for one panel of channels, [taps][K][kColumns]; `gradient`: its pairs.
void run_panel(const Problem& t, int64_t begin, int64_t lines, int64_t panel, bool add, const uint16_t* gradient,
               uint16_t* activation, float* weight) {
  const int64_t pairs = lines * t.pairs(), line_size = t.pairs() * 2 * kColumns;
  const int64_t first = begin % t.P * t.stride[0] - t.padding[0];
  for (int64_t s = 0; s < t.S; ++s) {
    uint16_t* const column = activation + (t.shares_lines() ? s * t.column_size() : 0);
    for (int64_t line = 0; t.shares_lines() && line < lines + t.R - 1; ++line) {
      pair_line(t, begin / t.P, first + line, s, panel * kColumns, column + line * line_size);
    }
    for (int64_t r = 0; r < t.R; ++r) {
      for (int64_t line = 0; !t.shares_lines() && line < lines; ++line) {
        const int64_t h = (begin + line) % t.P * t.stride[0] - t.padding[0] + r * t.dilation[0];
        pair_line(t, (begin + line) / t.P, h, s, panel * kColumns, column + line * line_size);
      }
      const uint16_t* read = column + (t.shares_lines() ? r * line_size : 0);
      multiply_tap(t, gradient, read, pairs, add, weight + (r * t.S + s) * t.K * kColumns);
    }
  }
}

// The strips of a chunk for a block of panels; `weight`: the chunk's sums, [panels][taps][K][kColumns].
void run_unit(const Problem& t, const Work& work, int64_t chunk, int64_t block, uint16_t* scratch, float* weight) {
  const int64_t first = t.panels() * block / work.blocks, end = t.panels() * (block + 1) / work.blocks;
  const int64_t begin = work.strips * chunk / work.chunks, stop = work.strips * (chunk + 1) / work.chunks;
  for (int64_t strip = begin; strip < stop; ++strip) {
    const int64_t line = t.first_line(strip), lines = t.first_line(strip + 1) - line;
    pair_gradient(t, line, lines, scratch);
    for (int64_t panel = first; panel < end; ++panel) {
      run_panel(t, line, lines, panel, strip > begin, scratch, scratch + t.gradient_size(),
                weight + panel * t.taps() * t.K * kColumns);
    }
  }
}

void merge(const Problem& t, const Work& work, const float* sums, int64_t size, const Tensor& out) {
  const int64_t sk = out.stride(0), sc = out.stride(1), sr = out.stride(2), ss = out.stride(3);
  torch::stable::parallel_for(0, t.panels() * t.taps() * t.K, 256, [&](int64_t begin, int64_t end) {
    float total[kColumns];
    for (int64_t line = begin; line < end; ++line) {
      const int64_t k = line % t.K, tap = line / t.K % t.taps(), c = line / t.K / t.taps() * kColumns;
      std::copy_n(sums + line * kColumns, kColumns, total);
      for (int64_t chunk = 1; chunk < work.chunks; ++chunk) {
        for (int64_t j = 0; j < kColumns; ++j) total[j] += sums[chunk * size + line * kColumns + j];
      }
      BFloat16* const to = data<BFloat16>(out) + k * sk + c * sc + tap / t.S * sr + tap % t.S * ss;
      for (int64_t j = 0; j < std::min(kColumns, t.C - c); ++j) store(to + j * sc, total[j]);
    }
  });
}

}  // namespace

void conv_weight_grad_bf16(const Tensor& grad, const Tensor& x, const Tensor& out, const std::vector<int64_t>& stride,
                           const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  const Problem t{data<uint16_t>(grad),
                  data<uint16_t>(x),
                  x.size(0),
                  x.size(2),
                  x.size(3),
                  x.size(1),
                  grad.size(2),
                  grad.size(3),
                  grad.size(1),
                  out.size(2),
                  out.size(3),
                  {stride[0], stride[1]},
                  {padding[0], padding[1]},
                  {dilation[0], dilation[1]}};
  const int64_t size = t.panels() * t.taps() * t.K * kColumns;
  if (t.N * t.P * t.Q == 0) return (void)std::fill_n(data<BFloat16>(out), out.numel(), BFloat16{0});
  const Work work(t);
  const auto sums = aligned_array<float>(work.chunks * size);
  share_units(work.chunks * work.blocks, [&] {
    return [&, scratch = aligned_array<uint16_t>(t.scratch())](int64_t unit) {
      const int64_t chunk = unit / work.blocks;
      run_unit(t, work, chunk, unit % work.blocks, scratch.get(), sums.get() + chunk * size);
    };
  });
  merge(t, work, sums.get(), size, out);
}
#else
void conv_weight_grad_bf16(const Tensor&, const Tensor&, const Tensor&, const std::vector<int64_t>&,
                           const std::vector<int64_t>&, const std::vector<int64_t>&) {}
#endif

}  // namespace resnet_fused::cpu
