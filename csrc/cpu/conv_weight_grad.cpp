// Weight gradient of a dense convolution: grad_w[k, c, r, s] = sum over pixels of grad[pixel, k] * x[pixel at (r, s),
// c].
//
// For each tap (r, s) this is a product of two tall matrices, grad' [K, M] and the pixels of x under the tap [M, C]. A
// unit of work is (chunk of pixels, macro tile of K, macro tile of C). It packs kDepth pixels of grad into panels, then
// for each tap those of x (zeros where the tap lies in the padding), multiplies in registers and adds to the tap's tile
// in cache; meanwhile it prefetches the next pixels, since packing alone would wait for memory.
// Bytes: grad and x once per macro tile of the other; FLOPs: 2*M*K*C*R*S.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../checks/conv_weight_grad.h"
#include "alloc.h"
#include "panels.h"
#include "rows.h"

namespace resnet_fused::cpu {
namespace {

constexpr int64_t kRegisterRows = 4;
constexpr int64_t kChunkRows = 256, kUnits = 16;    // enough units to share out evenly, each worth its merge
constexpr int64_t kMaxScratch = int64_t(16) << 20;  // bytes of partial results

struct Geometry {
  int64_t N, H, W, C, P, Q, K, R, S, stride[2], padding[2], dilation[2], pixels;
  int64_t k_macros, c_macros, units, chunks;

  Geometry(const Tensor& grad, const Tensor& x, const Tensor& weight, const std::vector<int64_t>& st,
           const std::vector<int64_t>& pad, const std::vector<int64_t>& dil)
      : N(x.size(0)),
        H(x.size(2)),
        W(x.size(3)),
        C(x.size(1)),
        P(grad.size(2)),
        Q(grad.size(3)),
        K(grad.size(1)),
        R(weight.size(2)),
        S(weight.size(3)),
        stride{st[0], st[1]},
        padding{pad[0], pad[1]},
        dilation{dil[0], dil[1]},
        pixels(N * P * Q) {
    k_macros = (K + kMacro - 1) / kMacro;
    c_macros = (C + kMacro - 1) / kMacro;
    units = k_macros * c_macros;
    const int64_t affordable = kMaxScratch / (4 * K * C * R * S);
    chunks =
        std::clamp(std::min({affordable, pixels / kChunkRows, (kUnits + units - 1) / units}), int64_t(1), int64_t(32));
  }

  int64_t first_row(int64_t chunk) const { return pixels * chunk / chunks; }
};

struct Unit {
  int64_t begin, end, k, k_width, c, c_width;

  Unit(const Geometry& g, int64_t index) {
    const int64_t chunk = index / g.units, within = index % g.units;
    begin = g.first_row(chunk), end = g.first_row(chunk + 1);
    c = within % g.c_macros * kMacro, c_width = std::min(kMacro, g.C - c);
    k = within / g.c_macros * kMacro, k_width = std::min(kMacro, g.K - k);
  }
};

// packed[panel][row][kPanel] = source[row][channel], 0 beyond `width` channels; null rows are 0.
template <class T, class A>
RESNET_FUSED_CLONES void pack(A* __restrict packed, const T* const* __restrict rows_of, int64_t rows, int64_t width) {
  constexpr int64_t P = kPanel<A>;
  for (int64_t m = 0; m < rows; ++m, packed += P) {
    const T* __restrict source = rows_of[m];
    for (int64_t c = 0; c < width; c += P) {
      A* __restrict target = packed + c * kDepth;
      const int64_t full = source ? std::min(P, width - c) : 0;
      if (full == P) {
        for (int64_t i = 0; i < P; ++i) target[i] = load(source + c + i);
      } else {
        for (int64_t i = 0; i < full; ++i) target[i] = load(source + c + i);
        for (int64_t i = full; i < P; ++i) target[i] = A(0);
      }
    }
  }
}

// Rows that will be packed next, `lines` cache lines each.
template <class T>
struct Ahead {
  std::vector<const T*> rows = std::vector<const T*>(kDepth);
  int64_t count = 0, lines = 0;

  // Share `part` of `parts`.
  void prefetch(int64_t part, int64_t parts) const {
    for (int64_t m = count * part / parts; m < count * (part + 1) / parts; ++m) {
      const char* row = reinterpret_cast<const char*>(rows[m]);
      for (int64_t line = 0; row && line < lines; ++line) __builtin_prefetch(row + 64 * line);
    }
  }
};

// tile += a' b for one panel of a and all of b, over `rows` packed rows: both panels at work stay in first-level cache.
template <class A>
RESNET_FUSED_CLONES void multiply(A* tile, const A* a, const A* b, int64_t rows, int64_t a_width, int64_t b_width) {
  constexpr int64_t P = kPanel<A>;
  for (int64_t j = 0; j < b_width; j += P) {
    for (int64_t r = 0; r < P && r < a_width; r += kRegisterRows) {
      multiply_tile<kRegisterRows, P>(tile + r * kMacro + j, a + r, b + j * kDepth, rows);
    }
  }
}

template <class T, class A>
struct Buffers {
  AlignedArray<A> grad = aligned_array<A>(kMacro * kDepth), x = aligned_array<A>(kMacro * kDepth), tiles;
  std::vector<const T*> rows = std::vector<const T*>(kDepth);
  Ahead<T> next_grad, next_x;

  explicit Buffers(int64_t taps) : tiles(aligned_array<A>(taps * kMacro * kMacro)) {}
};

// Pointers to the pixels of x under tap (r, s) for output pixels [first, first + rows), null in the padding.
template <class T>
void tap_rows(std::vector<const T*>& to, const T* x, const Geometry& g, int64_t r, int64_t s, int64_t first,
              int64_t rows) {
  int64_t q = first % g.Q, p = first / g.Q % g.P, n = first / (g.Q * g.P);
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t h = p * g.stride[0] - g.padding[0] + r * g.dilation[0];
    const int64_t w = q * g.stride[1] - g.padding[1] + s * g.dilation[1];
    to[m] = h >= 0 && h < g.H && w >= 0 && w < g.W ? x + ((n * g.H + h) * g.W + w) * g.C : nullptr;
    if (++q == g.Q) q = 0, ++p;
    if (p == g.P) p = 0, ++n;
  }
}

template <class T>
void grad_rows(std::vector<const T*>& to, const T* grad, const Geometry& g, int64_t first, int64_t rows) {
  for (int64_t m = 0; m < rows; ++m) to[m] = grad + (first + m) * g.K;
}

// One tap's product, prefetching its share (`tap` of `taps`) of what comes next.
template <class T, class A>
void multiply_tap(Buffers<T, A>& buffers, A* tile, int64_t rows, const Unit& unit, int64_t tap, int64_t taps) {
  constexpr int64_t P = kPanel<A>;
  const int64_t panels = (unit.k_width + P - 1) / P;
  for (int64_t panel = 0; panel < panels; ++panel) {
    buffers.next_grad.prefetch(tap * panels + panel, taps * panels);
    buffers.next_x.prefetch(tap * panels + panel, taps * panels);
    const int64_t k = panel * P;
    multiply(tile + k * kMacro, buffers.grad.get() + k * kDepth, buffers.x.get(), rows, unit.k_width - k, unit.c_width);
  }
}

template <class T, class A>
void run_unit(Buffers<T, A>& buffers, const T* grad, const T* x, const Geometry& g, const Unit& unit, A* partial) {
  const int64_t taps = g.R * g.S;
  std::fill_n(buffers.tiles.get(), taps * kMacro * kMacro, A(0));
  const int64_t blocks = std::max<int64_t>(1, (unit.end - unit.begin + kDepth - 1) / kDepth);
  const int64_t depth = std::max<int64_t>(1, (unit.end - unit.begin + blocks - 1) / blocks);
  buffers.next_grad.lines = (unit.k_width * sizeof(T) + 63) / 64;
  buffers.next_x.lines = (unit.c_width * sizeof(T) + 63) / 64;
  for (int64_t row = unit.begin; row < unit.end; row += depth) {
    const int64_t rows = std::min(depth, unit.end - row), more = std::min(depth, unit.end - row - rows);
    grad_rows(buffers.rows, grad + unit.k, g, row, rows);
    pack(buffers.grad.get(), buffers.rows.data(), rows, unit.k_width);
    buffers.next_grad.count = buffers.next_x.count = more;
    grad_rows(buffers.next_grad.rows, grad + unit.k, g, row + rows, more);
    tap_rows(buffers.next_x.rows, x + unit.c, g, g.R / 2, g.S / 2, row + rows, more);
    for (int64_t tap = 0; tap < taps; ++tap) {
      tap_rows(buffers.rows, x + unit.c, g, tap / g.S, tap % g.S, row, rows);
      pack(buffers.x.get(), buffers.rows.data(), rows, unit.c_width);
      multiply_tap(buffers, buffers.tiles.get() + tap * kMacro * kMacro, rows, unit, tap, taps);
    }
  }
  for (int64_t k = 0; k < unit.k_width; ++k) {  // partial is [K, R, S, C]
    for (int64_t tap = 0; tap < taps; ++tap) {
      const A* from = buffers.tiles.get() + (tap * kMacro + k) * kMacro;
      std::copy_n(from, unit.c_width, partial + ((unit.k + k) * taps + tap) * g.C + unit.c);
    }
  }
}

template <class T>
void run(const Tensor& grad, const Tensor& x, const Tensor& out, const Geometry& g) {
  using A = acc_t<T>;
  const int64_t size = g.K * g.R * g.S * g.C;
  const auto partials = aligned_array<A>(g.chunks * size + 1);  // [chunks, K, R, S, C]
  torch::stable::parallel_for(0, g.chunks * g.units, 1, [&](int64_t begin, int64_t end) {
    Buffers<T, A> buffers(g.R * g.S);
    for (int64_t index = begin; index < end; ++index) {
      run_unit(buffers, data<T>(grad), data<T>(x), g, Unit(g, index), partials.get() + index / g.units * size);
    }
  });
  const int64_t sk = out.stride(0), sc = out.stride(1), sr = out.stride(2), ss = out.stride(3);
  torch::stable::parallel_for(0, g.K, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t tap = 0; tap < g.R * g.S; ++tap) {
        T* target = data<T>(out) + k * sk + tap / g.S * sr + tap % g.S * ss;
        const A* from = partials.get() + (k * g.R * g.S + tap) * g.C;
        for (int64_t c = 0; c < g.C; ++c) {
          A sum = from[c];
          for (int64_t chunk = 1; chunk < g.chunks; ++chunk) sum += from[chunk * size + c];
          store(target + c * sc, sum);
        }
      }
    }
  });
}

Tensor conv_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& weight, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  check_conv_weight_grad(grad, x, weight, stride, padding, dilation);
  Tensor out =
      empty_strided<4>({weight.size(0), weight.size(1), weight.size(2), weight.size(3)},
                       {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)}, weight.scalar_type());
  if (out.numel() == 0) return out;
  const Geometry geometry(grad, x, weight, stride, padding, dilation);
  for_element_type(x.scalar_type(),
                   [&](auto* tag) { run<std::remove_pointer_t<decltype(tag)>>(grad, x, out, geometry); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("conv_weight_grad", TORCH_BOX(&conv_weight_grad)); }

}  // namespace resnet_fused::cpu
