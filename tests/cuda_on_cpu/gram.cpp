// The Gram matrix on tensor cores behind a C function that test_gram.py calls; as a program, under a sanitizer, with
// the small matrices that follow from it. dtype: 0 float, 1 half, 2 bfloat16.

#include <numeric>

#include "cuda_on_cpu.h"

#include "../../csrc/cuda/kernels/gram.cuh"
#include "../../csrc/cuda/kernels/gram_grad.cuh"
#include "../../csrc/cuda/kernels/gram_norm.cuh"

using namespace resnet_fused;

namespace {

// Scratch of just the size that is asked for, in which nothing is a number yet.
float* scratch(int64_t floats) {
  static std::vector<float> memory;
  std::vector<float>(floats, NAN).swap(memory);
  return memory.data();
}

// `by_elements`: also where chunks are whole.
template <class T>
void run_as(GramParams p, bool by_elements) {
  p.partial = scratch(cuda::gram_partial_floats<T>(p));
  if (!by_elements) return cuda::launch_gram<T>(p, nullptr);
  const auto s = cuda::gram_splits<T>(p);
  cuda::gram_first_stage<T, false>(p, s, nullptr);
  cuda::merge_gram(p, s, nullptr);
}

}  // namespace

#ifndef RESNET_FUSED_SANITIZED

extern "C" int gram(int dtype, bool by_elements, int multiprocessors, bool copies_wait, const int* grid, int channels,
                    const void* a, const float* centre, const float* scale, const float* shift, float* gram,
                    float* total) {
  GramParams p{{}, channels, a, centre, scale, shift, nullptr, gram, total};
  std::memcpy(&p.grid, grid, sizeof p.grid);
  cuda_on_cpu::multiprocessors = multiprocessors;
  cuda_on_cpu::copies_wait = copies_wait;
  return cuda_on_cpu::with_type(dtype, [&](auto t) { run_as<decltype(t)>(p, by_elements); });
}

#else

namespace {

unsigned state = 1;
float drawn() { return static_cast<float>((state = state * 1103515245 + 12345) >> 29) - 4; }
std::vector<float> vector(int size) {
  std::vector<float> values(size);
  for (float& v : values) v = drawn();
  return values;
}
template <class T>
std::vector<T> data(size_t size) {
  std::vector<T> values(size);
  for (T& v : values) v = cuda::from_float<T>(drawn());
  return values;
}
bool near(double got, double want, double size) { return std::abs(got - want) <= 1e-5 * size; }

// Of whole numbers, every tensor ending where its memory does, against a plain loop.
template <class T>
bool gram_is_right(const PixelGrid& g, int channels, bool lazy, bool by_elements) {
  const auto a = data<T>(size_t(g.samples) * g.h * g.w * channels);
  const auto centre = vector(channels), scale = vector(channels), shift = vector(channels);
  std::vector<float> gram(size_t(channels) * channels), total(channels);
  run_as<T>({g, channels, a.data(), centre.data(), lazy ? scale.data() : nullptr, shift.data(), nullptr, gram.data(),
             total.data()},
            by_elements);
  const auto d = [&](int m, int c) {
    const int sample = m / (g.rows * g.columns), row = m / g.columns % g.rows, column = m % g.columns;
    const float x =
        cuda::to_float(a[((size_t(sample) * g.h + row * g.stride_h) * g.w + column * g.stride_w) * channels + c]);
    return (lazy ? std::max(scale[c] * x + shift[c], 0.f) : x) - centre[c];
  };
  const int pixels = g.samples * g.rows * g.columns;
  std::vector<double> values(size_t(channels) * pixels);  // by channel
  for (int i = 0; i < channels; ++i) {
    for (int m = 0; m < pixels; ++m) values[size_t(i) * pixels + m] = d(m, i);
  }
  for (int i = 0; i < channels; ++i) {
    const double* of_i = values.data() + size_t(i) * pixels;
    if (total[i] != std::accumulate(of_i, of_i + pixels, 0.)) return false;
    for (int j = 0; j < channels; j += 7) {
      const double product = std::inner_product(of_i, of_i + pixels, values.data() + size_t(j) * pixels, 0.);
      if (gram[size_t(i) * channels + j] != product || gram[size_t(j) * channels + i] != product) return false;
    }
  }
  return true;
}

// What follows from a Gram matrix of nothing in particular, by the formulas.
template <class T>
bool matrices_are_right(int outputs, int channels) {
  const int64_t pixels = 64;
  const auto weight = data<T>(size_t(outputs) * channels);
  const auto product = vector(outputs * channels), total = vector(channels), centre = vector(channels);
  const auto sum_g = vector(outputs), scale = vector(outputs), rstd = vector(outputs);
  auto gram = vector(channels * channels);
  for (int i = 0; i < channels; ++i) {
    for (int j = 0; j < i; ++j) gram[i * channels + j] = gram[j * channels + i];
    gram[i * channels + i] += 1000;
  }
  std::vector<float> mean(outputs), m2(outputs), grad_gamma(outputs), constant(channels);
  std::vector<float> kept(cuda::gram_grad_scratch_floats(outputs, channels), NAN);
  std::vector<T> grad_weight(size_t(outputs) * channels), coupling(size_t(channels) * channels);
  cuda::launch_gram_norm<T>({outputs,
                             channels,
                             weight.data(),
                             gram.data(),
                             total.data(),
                             centre.data(),
                             {pixels, outputs, mean.data(), m2.data(), {}}},
                            nullptr);
  cuda::launch_gram_grad<T>(
      {pixels, outputs, channels, weight.data(), product.data(), gram.data(), total.data(), centre.data(), sum_g.data(),
       scale.data(), rstd.data(), kept.empty() ? nullptr : kept.data(), grad_weight.data(), grad_gamma.data(),
       coupling.data(), constant.data()},
      nullptr);
  std::vector<double> constants(channels), square(size_t(channels) * channels);
  for (int k = 0; k < outputs; ++k) {
    const auto w = [&](int c) { return double(cuda::to_float(weight[size_t(k) * channels + c])); };
    double at = 0., of_mean = 0., along = 0., variance = 0.;
    std::vector<double> y(channels);
    for (int i = 0; i < channels; ++i) {
      const double shifted = product[k * channels + i] - double(sum_g[k]) * centre[i], m = total[i] / double(pixels);
      at += w(i) * (m + centre[i]), of_mean += w(i) * m, along += w(i) * (shifted - sum_g[k] * m);
      for (int j = 0; j < channels; ++j) {
        y[i] += w(j) * gram[j * channels + i];
        variance += w(i) * w(j) * (gram[i * channels + j] / double(pixels) - m * total[j] / pixels);
      }
    }
    const double gradient = rstd[k] * along, b = -scale[k] * rstd[k] * gradient / pixels;
    const double d0 = scale[k] * (rstd[k] * gradient * of_mean - sum_g[k]) / pixels;
    if (!near(mean[k], at, channels * 16) || !near(m2[k], variance * pixels, variance * pixels)) return false;
    if (!near(grad_gamma[k], gradient, std::abs(gradient) + channels * 64)) return false;
    for (int i = 0; i < channels; ++i) {
      const double shifted = product[k * channels + i] - double(sum_g[k]) * centre[i];
      const double want = scale[k] * shifted + b * y[i] + d0 * total[i], got = grad_weight[size_t(k) * channels + i];
      if (!near(got, want, std::abs(b) * channels * 1e4 + 1000)) return false;
      constants[i] += (d0 - b * (at - of_mean)) * w(i);
      for (int j = 0; j < channels; ++j) square[size_t(i) * channels + j] += b * w(i) * w(j);
    }
  }
  double largest = 1.;
  for (const double s : square) largest = std::max(largest, std::abs(s));
  for (int i = 0; i < channels; ++i) {
    if (!near(constant[i], constants[i], largest * channels)) return false;
    for (int j = 0; j < channels; ++j) {
      const size_t at = size_t(i) * channels + j, mirrored = size_t(j) * channels + i;
      if (!near(coupling[at], square[at], largest) || coupling[at] != coupling[mirrored]) return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  const PixelGrid plain{2, 13, 11, 13, 11, 1, 1}, strided{3, 9, 8, 5, 4, 2, 2}, many{1, 27, 20, 27, 20, 1, 1};
  bool right = true;
  for (const bool lazy : {false, true}) {
    for (const bool by_elements : {false, true}) {
      right = right && gram_is_right<__nv_bfloat16>(many, 72, lazy, by_elements);
      right = right && gram_is_right<float>(plain, 68, lazy, by_elements);
    }
    right = right && gram_is_right<__nv_bfloat16>(strided, 65, lazy, true);
    right = right && gram_is_right<float>(strided, 3, lazy, true);
  }
  right = right && matrices_are_right<float>(70, 65) && matrices_are_right<float>(33, 133);
  std::puts(right ? "right" : "wrong");
  return right ? 0 : 1;
}

#endif
