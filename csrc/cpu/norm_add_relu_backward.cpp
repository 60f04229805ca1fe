// Mask the gradient and sum it for batch norm's backward: one read of everything given, one write of g.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../checks/norm_add_relu_backward.h"
#include "alloc.h"
#include "bits.h"
#include "rows.h"

namespace resnet_fused::cpu {
namespace {

struct Arguments {
  Tensor grad_out;
  std::optional<Tensor> z, mean, scale, shift, mask, residual, residual_mean, sample_factor;
  bool relu, emit_grad;
  Tensor g, sum_g, sum_gz, residual_sum_g, residual_sum_gz;
};

enum class Keep { kAll, kBits, kOutput, kRecompute };

Keep keep_of(const Arguments& a) {
  if (!a.relu) return Keep::kAll;
  if (!a.mask) return Keep::kRecompute;
  return a.mask->scalar_type() == ScalarType::Byte ? Keep::kBits : Keep::kOutput;
}

// keep ? value : 0, a select: NaN vanishes too. GCC 12 does not vectorise the choice between two structs.
template <class T>
RESNET_FUSED_INLINE T select(bool keep, T value) {
  if constexpr (sizeof(T) == 2) {
    return T{static_cast<uint16_t>(value.bits & (keep ? 0xFFFFu : 0u))};
  } else {
    return keep ? value : T{};
  }
}

// g = not (y <= 0) ? grad : 0, with y the forward's output or its recomputation.
template <class T>
RESNET_FUSED_CLONES void select_by_output(T* __restrict g, const T* __restrict grad, const T* __restrict y,
                                          int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    g[i] = select(!(load(y + i) <= 0), grad[i]);
  }
}

template <class T, class A = acc_t<T>>
RESNET_FUSED_CLONES void select_by_recomputed(T* __restrict g, const T* __restrict grad, const T* __restrict z,
                                              const A* __restrict scale, const A* __restrict shift, int64_t rows,
                                              int64_t C) {
  for (int64_t m = 0; m < rows; ++m, g += C, grad += C, z += C) {
    for (int64_t c = 0; c < C; ++c) {
      g[c] = select(!(load(z + c) * scale[c] + shift[c] <= 0), grad[c]);
    }
  }
}

template <class T>
RESNET_FUSED_CLONES void select_by_bits(T* __restrict g, const T* __restrict grad, const uint8_t* __restrict mask,
                                        int64_t rows, int64_t C) {
  alignas(64) uint8_t keep[kMaskTile];
  for (int64_t m = 0; m < rows; ++m, g += C, grad += C, mask += mask_bytes(C)) {
    for (int64_t c = 0; c < C; c += kMaskTile) {
      const int64_t count = C - c < kMaskTile ? C - c : kMaskTile;
      for (int64_t i = 0; i < mask_bytes(count); ++i) {
        const uint64_t word = unpack8(mask[c / 8 + i]);
        std::memcpy(keep + 8 * i, &word, 8);
      }
      for (int64_t i = 0; i < count; ++i) {
        g[c + i] = select(keep[i] != 0, grad[c + i]);
      }
    }
  }
}

// Sums of one block in the accumulation type, [C] each; block sums are short, so float32 holds them well.
template <class A>
struct Partial {
  A *g, *gz, *gr;
};

// What the products are centred by, [C] each; null without the tensor that it belongs to.
template <class A>
struct Means {
  const A *z, *residual;
};

template <class T, bool with_z, bool with_residual, class A = acc_t<T>>
RESNET_FUSED_CLONES void sum_rows(const Partial<A>& sums, const T* __restrict g, const T* __restrict z,
                                  const T* __restrict r, const Means<A>& means, int64_t rows, int64_t C) {
  const A* __restrict mean = means.z, * __restrict r_mean = means.residual;
  A* __restrict sum_g = sums.g, * __restrict sum_gz = sums.gz, * __restrict sum_gr = sums.gr;
  for (int64_t c = 0; c < C; ++c) sum_g[c] = sum_gz[c] = sum_gr[c] = 0;
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4, g += 4 * C, z += with_z ? 4 * C : 0, r += with_residual ? 4 * C : 0) {
    for (int64_t c = 0; c < C; ++c) {
      const A g0 = load(g + c), g1 = load(g + C + c), g2 = load(g + 2 * C + c), g3 = load(g + 3 * C + c);
      sum_g[c] += (g0 + g1) + (g2 + g3);
      if constexpr (with_z) {
        const A z0 = load(z + c) - mean[c], z1 = load(z + C + c) - mean[c];
        const A z2 = load(z + 2 * C + c) - mean[c], z3 = load(z + 3 * C + c) - mean[c];
        sum_gz[c] += (g0 * z0 + g1 * z1) + (g2 * z2 + g3 * z3);
      }
      if constexpr (with_residual) {
        const A r0 = load(r + c) - r_mean[c], r1 = load(r + C + c) - r_mean[c];
        const A r2 = load(r + 2 * C + c) - r_mean[c], r3 = load(r + 3 * C + c) - r_mean[c];
        sum_gr[c] += (g0 * r0 + g1 * r1) + (g2 * r2 + g3 * r3);
      }
    }
  }
  for (; m < rows; ++m, g += C, z += with_z ? C : 0, r += with_residual ? C : 0) {
    for (int64_t c = 0; c < C; ++c) {
      const A value = load(g + c);
      sum_g[c] += value;
      if constexpr (with_z) sum_gz[c] += value * (load(z + c) - mean[c]);
      if constexpr (with_residual) sum_gr[c] += value * (load(r + c) - r_mean[c]);
    }
  }
}

// Totals of one chunk, [C] each, in float64.
struct Totals {
  double *g, *gz, *residual_g, *residual_gz;
};

template <class A>
RESNET_FUSED_CLONES void add_partial(const Totals& totals, const Partial<A>& sums, double factor, int64_t C) {
  double* __restrict g = totals.g, * __restrict gz = totals.gz;
  double* __restrict residual_g = totals.residual_g, * __restrict residual_gz = totals.residual_gz;
  for (int64_t c = 0; c < C; ++c) {
    g[c] += factor * sums.g[c];
    gz[c] += factor * sums.gz[c];
    residual_g[c] += sums.g[c];
    residual_gz[c] += sums.gr[c];
  }
}

// Rows [begin, end), at most a block, of one sample: g into `g`, or where nothing is masked the gradient itself.
template <class T>
const T* masked_rows(const Arguments& a, Keep keep, T* g, int64_t begin, int64_t end, int64_t C) {
  const T* grad = data<T>(a.grad_out) + begin * C;
  const int64_t rows = end - begin;
  switch (keep) {
    case Keep::kAll:
      if (!a.emit_grad) return grad;
      std::memcpy(g, grad, static_cast<size_t>(rows * C) * sizeof(T));
      break;
    case Keep::kBits: select_by_bits(g, grad, data<uint8_t>(a.mask) + begin * mask_bytes(C), rows, C); break;
    case Keep::kOutput: select_by_output(g, grad, data<T>(a.mask) + begin * C, rows * C); break;
    case Keep::kRecompute:
      select_by_recomputed(g, grad, data<T>(a.z) + begin * C, data<acc_t<T>>(a.scale), data<acc_t<T>>(a.shift), rows,
                           C);
  }
  return g;
}

template <class T, bool with_z, bool with_residual>
struct ChunkSums {
  using A = acc_t<T>;
  const Arguments& a;
  const Shape shape;
  const int64_t C = shape.channels, step = std::max<int64_t>(4, 4096 / C / 4 * 4);  // rows in the first-level cache
  const Means<A> means{data<A>(a.mean), data<A>(a.residual_mean)};
  std::vector<A> sums = std::vector<A>(6 * C);
  std::vector<T> scratch = std::vector<T>(a.emit_grad ? 0 : step * C);

  explicit ChunkSums(const Arguments& arguments) : a(arguments), shape(arguments.grad_out) {}

  // Rows [begin, end) of one sample, at most a block.
  void block(const Totals& totals, double factor, int64_t begin, int64_t end) {
    const Keep keep = keep_of(a);
    const Partial<A> block{&sums[0], &sums[C], &sums[2 * C]}, piece{&sums[3 * C], &sums[4 * C], &sums[5 * C]};
    for (int64_t row = begin; row < end; row += step) {
      const int64_t stop = std::min(end, row + step);
      T* target = a.emit_grad ? data<T>(a.g) + row * C : scratch.data();
      const T* g = masked_rows(a, keep, target, row, stop, C);
      const T* z = with_z ? data<T>(a.z) + row * C : nullptr;
      const T* residual = with_residual ? data<T>(a.residual) + row * C : nullptr;
      const Partial<A>& sum = row == begin ? block : piece;
      sum_rows<T, with_z, with_residual>(sum, g, z, residual, means, stop - row, C);
      if (row == begin) continue;
      for (int64_t i = 0; i < 3 * C; ++i) sums[i] += sums[3 * C + i];
    }
    add_partial(totals, block, factor, C);
  }
};

template <class T, bool with_z, bool with_residual>
void run(const Arguments& a) {
  using A = acc_t<T>;
  const Shape shape(a.grad_out);
  const int64_t C = shape.channels;
  if (C == 0) return;  // all results are empty
  const Partition part(shape);
  std::vector<double> totals(std::max<int64_t>(part.chunks, 1) * 4 * C);  // [chunks, 4, C]
  torch::stable::parallel_for(0, part.chunks, 1, [&](int64_t begin, int64_t end) {
    ChunkSums<T, with_z, with_residual> sums(a);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      double* t = &totals[chunk * 4 * C];
      const Totals to{t, t + C, t + 2 * C, t + 3 * C};
      part.for_each_block(chunk, [&](int64_t first, int64_t stop) {
        if (!a.sample_factor) return sums.block(to, 1.0, first, stop);
        for_each_sample(shape, first, stop, [&](int64_t sample, int64_t row, int64_t last) {
          sums.block(to, static_cast<double>(data<A>(*a.sample_factor)[sample]), row, last);
        });
      });
    }
  });
  for (int64_t chunk = 1; chunk < part.chunks; ++chunk) {
    for (int64_t i = 0; i < 4 * C; ++i) totals[i] += totals[chunk * 4 * C + i];
  }
  const Tensor* results[] = {&a.sum_g, &a.sum_gz, &a.residual_sum_g, &a.residual_sum_gz};
  for (int64_t k = 0; k < 4; ++k) {
    for (int64_t c = 0; c < results[k]->numel(); ++c) data<A>(*results[k])[c] = static_cast<A>(totals[k * C + c]);
  }
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results norm_add_relu_backward(const Tensor& grad_out, const std::optional<Tensor>& z,
                               const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
                               const std::optional<Tensor>& shift, const std::optional<Tensor>& mask,
                               const std::optional<Tensor>& residual, const std::optional<Tensor>& residual_mean,
                               const std::optional<Tensor>& sample_factor, bool relu, bool emit_grad) {
  check_norm_add_relu_backward(grad_out, z, mean, scale, shift, mask, residual, residual_mean, sample_factor, relu);
  Arguments a{grad_out,      z,    mean,      scale, shift, mask, residual, residual_mean,
              sample_factor, relu, emit_grad, {},    {},    {},   {},       {}};
  a.g = emit_grad ? empty_channels_last(grad_out) : empty_vector(0, grad_out.scalar_type());
  a.sum_g = empty_stats(grad_out);
  a.sum_gz = empty_stats(grad_out, z.has_value());
  a.residual_sum_g = empty_stats(grad_out, residual.has_value());
  a.residual_sum_gz = empty_stats(grad_out, residual.has_value());
  for_element_type(grad_out.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    if (z) return residual ? run<T, true, true>(a) : run<T, true, false>(a);
    residual ? run<T, false, true>(a) : run<T, false, false>(a);
  });
  return {a.g, a.sum_g, a.sum_gz, a.residual_sum_g, a.residual_sum_gz};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("norm_add_relu_backward", TORCH_BOX(&norm_add_relu_backward));
}

}  // namespace resnet_fused::cpu
