// Backward of the Gram join in its small matrices: a few loops instead of many calls.
//
// First by blocks of rows of W: gamma's gradient and the coefficients of each row from its sums in float64, then the
// block's product with `gram` in registers and, while that is in cache, its rows of the weight gradient. Then by panels
// of columns: the upper triangle of W' diag(b) W from short sums added up in float64, and the constant on the way. W is
// kept in panels between the two. FLOPs: 2*K*C*C and K*C*C.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "../checks/gram_grad.h"
#include "alloc.h"
#include "rows.h"
#include "weight_rows.h"

namespace resnet_fused::cpu {
namespace {

constexpr int64_t kSquareRows = 4;  // register rows of W' diag(b) W

template <class A>
struct Arguments {
  const A *product, *gram, *total, *centre, *sum_g, *scale, *rstd;
  double count;
};

// Vectors on the rows of W: correction of the gradient's rows, b * (W gram) + d0 * total', and what `constant` is of.
template <class A>
struct Coefficients {
  A b, d0, constant;
};

// P - sum_g centre' in float64: digits cancel.
template <class A>
RESNET_FUSED_CLONES void pack_shifted(A* packed, const A* product, const A* sum_g, const A* centre, int64_t rows,
                                      int64_t C) {
  pack_panels(packed, kBlockRows, rows, C, [&](int64_t r, int64_t c) {
    return static_cast<A>(std::fma(-static_cast<double>(sum_g[r]), centre[c], product[r * C + c]));
  });
}

template <class A>
RESNET_FUSED_CLONES void find_coefficients(Coefficients<A>* found, A* grad_gamma, const Arguments<A>& t, const A* w,
                                           int64_t pitch, const A* shifted, const A* mean, const A* centre, int64_t row,
                                           int64_t rows, int64_t C) {
  constexpr int64_t P = kPanel<A>;
  for (int64_t r = 0; r < rows; ++r, ++row) {
    const double own = dot_rows(w + r * P, pitch, shifted + r * P, kBlockRows, C);
    const double offset = dot_rows(w + r * P, pitch, mean, 1, C);
    const double of_centre = dot_rows(w + r * P, pitch, centre, 1, C);
    const A sum_g = t.sum_g[row], gradient = t.rstd[row] * static_cast<A>(std::fma(-offset, sum_g, own));
    const A slope = t.rstd[row] * gradient, unit = t.scale[row] / static_cast<A>(t.count), b = -unit * slope;
    const A d0 = unit * std::fma(slope, static_cast<A>(offset), -sum_g);
    grad_gamma[row] = gradient;
    found[row] = {b, d0, std::fma(-b, static_cast<A>(of_centre), d0)};
  }
}

// The weight gradient's rows: b * y + d0 * total' + scale * shifted.
template <class T, class A>
RESNET_FUSED_CLONES void write_rows(T* __restrict grad_weight, const Coefficients<A>* __restrict found,
                                    const A* __restrict scale, const A* __restrict total, const A* __restrict y,
                                    const A* __restrict shifted, int64_t rows, int64_t C) {
  constexpr int64_t P = kPanel<A>;
  for (int64_t r = 0; r < rows; ++r, grad_weight += C, y += P, shifted += P) {
    const A b = found[r].b, d0 = found[r].d0, s = scale[r];
    for (int64_t c = 0; c < C; c += P) {
      const int64_t width = std::min(P, C - c), from = c * kBlockRows;
      for (int64_t i = 0; i < width; ++i) {
        store(grad_weight + c + i, b * y[from + i] + d0 * total[c + i] + s * shifted[from + i]);
      }
    }
  }
}

// One panel of W by its rows' coefficients: left = diag(b) W; sum += coefficients of `constant` times W.
template <class A>
RESNET_FUSED_CLONES void scale_panel(A* __restrict left, double* __restrict sum, const Coefficients<A>* __restrict by,
                                     const A* __restrict w, int64_t depth) {
  constexpr int64_t P = kPanel<A>;
  double sums[P] = {};
  for (int64_t m = 0; m < depth; ++m) {
    for (int64_t i = 0; i < P; ++i) {
      left[m * P + i] = by[m].b * w[m * P + i];
      sums[i] += static_cast<double>(by[m].constant) * w[m * P + i];
    }
  }
  for (int64_t i = 0; i < P; ++i) sum[i] += sums[i];
}

// g += left' w over `depth` rows: kPanel rows of g, whose columns and those of w begin at a panel's own.
template <class A>
RESNET_FUSED_CLONES void multiply_panel(double* g, const A* left, const A* w, int64_t pitch, int64_t depth,
                                        int64_t columns) {
  constexpr int64_t P = kPanel<A>;
  for (int64_t j = 0; j < columns; j += P) {
    for (int64_t r = 0; r < P; r += kSquareRows) {
      multiply_tile<kSquareRows, P>(g + r * columns + j, left + r, w + j * pitch, depth, columns);
    }
  }
}

// Rows i to i + kPanel of the upper triangle of the coupling, rounded, and the columns that mirror them.
template <class T>
RESNET_FUSED_CLONES void write_coupling(T* __restrict coupling, T* __restrict rounded, const double* __restrict g,
                                        int64_t i, int64_t C, int64_t columns) {
  using A = acc_t<T>;
  const int64_t height = std::min(kPanel<A>, C - i);
  for (int64_t n = 0; n < height * columns; ++n) store(rounded + n, static_cast<A>(g[n]));
  for (int64_t r = 0; r < height; ++r) {
    std::copy_n(rounded + r * columns + r, C - i - r, coupling + (i + r) * C + i + r);
  }
  for (int64_t j = 0; j < C - i; ++j) {
    T* mirrored = coupling + (i + j) * C + i;
    for (int64_t r = 0; r < std::min(height, j); ++r) mirrored[r] = rounded[r * columns + j];
  }
}

template <class T>
class Run {
  using A = acc_t<T>;
  static constexpr int64_t P = kPanel<A>;

 public:
  Run(const Tensor& weight, const Arguments<A>& arguments)
      : t(arguments),
        K(weight.size(0)),
        C(weight.size(1)),
        pitch((K + kTileRows - 1) / kTileRows * kTileRows),
        columns(padded<A>(C)),
        weight(data<T>(weight)),
        w(aligned_array<A>(pitch * columns)),
        coefficients(K) {
    for (int64_t c = 0; c < C; c += P) std::fill_n(w.get() + c * pitch + K * P, (pitch - K) * P, A(0));
  }

  // Coefficients of all rows, and the gradients of weight and gamma.
  void rows(T* grad_weight, A* grad_gamma) {
    std::vector<A> mean(columns), centre(columns);
    for (int64_t c = 0; c < C; ++c) {
      mean[c] = t.total[c] / static_cast<A>(t.count);
      centre[c] = t.centre[c];
    }
    const auto gram = aligned_array<A>(columns * C);
    parallel_panels<A>(C, 4,
                       [&](int64_t j) { pack_rows(gram.get() + j * C, C, t.gram + j, C, C, std::min(P, C - j)); });
    parallel_row_blocks<A>(K, C, [&](int64_t row, int64_t rows, BlockBuffers<A>& buffers) {
      A *own = w.get() + row * P, *shifted = buffers.first.get(), *y = buffers.second.get();
      pack_rows(own, pitch, weight + row * C, C, rows, C);
      pack_shifted(shifted, t.product + row * C, t.sum_g + row, t.centre, rows, C);
      find_coefficients(coefficients.data(), grad_gamma, t, own, pitch, shifted, mean.data(), centre.data(), row, rows,
                        C);
      multiply_rows(y, own, pitch, gram.get(), rows, C);
      write_rows(grad_weight + row * C, &coefficients[row], t.scale + row, t.total, y, shifted, rows, C);
    });
  }

  // Needs what `rows` found. Panels are taken in pairs of a wide and a narrow one, which cost the same.
  void square(T* coupling, A* constant) {
    const int64_t panels = columns / P, pairs = (panels + 1) / 2;
    torch::stable::parallel_for(0, pairs, grain(K * P * columns), [&](int64_t begin, int64_t end) {
      const auto left = aligned_array<A>(kDepth * P);
      const auto g = aligned_array<double>(P * columns);
      const auto rounded = std::make_unique<T[]>(P * columns);
      for (int64_t pair = begin; pair < end; ++pair) {
        square_panel(coupling, constant, pair * P, left.get(), g.get(), rounded.get());
        const int64_t other = panels - 1 - pair;
        if (other != pair) square_panel(coupling, constant, other * P, left.get(), g.get(), rounded.get());
      }
    });
  }

 private:
  void square_panel(T* coupling, A* constant, int64_t i, A* left, double* g, T* rounded) const {
    double sums[P] = {};
    const A* panel = w.get() + i * pitch;
    std::fill_n(g, P * (columns - i), 0.0);
    for (int64_t row = 0; row < K; row += kDepth) {
      const int64_t depth = std::min(kDepth, K - row);
      scale_panel(left, sums, &coefficients[row], panel + row * P, depth);
      multiply_panel(g, left, panel + row * P, pitch, depth, columns - i);
    }
    write_coupling(coupling, rounded, g, i, C, columns - i);
    for (int64_t c = i; c < std::min(C, i + P); ++c) constant[c] = static_cast<A>(sums[c - i]);
  }

  const Arguments<A>& t;
  const int64_t K, C, pitch, columns;
  const T* weight;
  AlignedArray<A> w;
  std::vector<Coefficients<A>> coefficients;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> gram_grad(const Tensor& weight, const Tensor& product, const Tensor& gram,
                                                     const Tensor& total, const Tensor& centre, const Tensor& sum_g,
                                                     const Tensor& scale, const Tensor& rstd, const Tensor& a) {
  check_gram_grad(weight, product, gram, total, centre, sum_g, scale, rstd, a);
  const int64_t K = weight.size(0), C = weight.size(1), count = a.size(0) * a.size(2) * a.size(3);
  const ScalarType dtype = stat_dtype(weight.scalar_type());
  const int64_t pitch = std::max<int64_t>(C, 1);  // as torch counts the strides of empty tensors
  Tensor grad_weight = empty_strided<2>({K, C}, {pitch, 1}, weight.scalar_type());
  Tensor grad_gamma = empty_vector(K, dtype);
  Tensor coupling = empty_strided<4>({C, C, 1, 1}, {pitch, 1, 1, 1}, weight.scalar_type());
  Tensor constant = empty_vector(C, dtype);
  if (count == 0) {
    for (Tensor* result : {&grad_weight, &grad_gamma, &coupling, &constant}) torch::stable::zero_(*result);
    return {grad_weight, grad_gamma, coupling, constant};
  }
  for_element_type(weight.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = acc_t<T>;
    const Arguments<A> arguments{data<A>(product), data<A>(gram),  data<A>(total), data<A>(centre),
                                 data<A>(sum_g),   data<A>(scale), data<A>(rstd),  static_cast<double>(count)};
    Run<T> run(weight, arguments);
    run.rows(data<T>(grad_weight), data<A>(grad_gamma));
    run.square(data<T>(coupling), data<A>(constant));
  });
  return {grad_weight, grad_gamma, coupling, constant};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("gram_grad", TORCH_BOX(&gram_grad)); }

}  // namespace resnet_fused::cpu
