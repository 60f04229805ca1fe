// Add to a tensor in place, and the batch statistics of the sum while each block of it is in the cache: two reads, one
// write.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../checks/add_stats.h"
#include "alloc.h"
#include "moments.h"

namespace resnet_fused::cpu {
namespace {

// out = factor * out + other, rounded once; a factor of 1 changes no bit. In the loop that sums for the mean, whose
// rows are read four at a time, it took longer.
template <class T, class A = acc_t<T>>
RESNET_FUSED_CLONES void add(T* __restrict out, const T* __restrict other, A factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(out + i, load(out + i) * factor + load(other + i));
}

template <class T>
void run(const Tensor& out, const Tensor& other, const OptionalTensor& sample_factor, const Tensor& mean,
         const Tensor& m2) {
  using A = acc_t<T>;
  const Shape shape(out);
  const int64_t C = shape.channels;
  T* rows = data<T>(out);
  const T* added = data<T>(other);
  const A* factors = data<A>(sample_factor);
  const auto first = [&](int64_t c) {
    T sum = rows[c];
    add(&sum, added + c, factors ? factors[0] : A(1), 1);
    return load(&sum);
  };
  moments(shape, rows, mean, m2, first, [&](int64_t begin, int64_t end) {
    const auto add_rows = [&](int64_t sample, int64_t row, int64_t stop) {
      add(rows + row * C, added + row * C, factors ? factors[sample] : A(1), (stop - row) * C);
    };
    factors ? for_each_sample(shape, begin, end, add_rows) : add_rows(0, begin, end);
  });
}

std::tuple<Tensor, Tensor> add_stats_(const Tensor& out, const Tensor& other, const OptionalTensor& sample_factor) {
  check_add_stats(out, other, sample_factor);
  Tensor mean = empty_stats(out), m2 = empty_stats(out);
  for_element_type(out.scalar_type(),
                   [&](auto* tag) { run<std::remove_pointer_t<decltype(tag)>>(out, other, sample_factor, mean, m2); });
  return {mean, m2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("add_stats_", TORCH_BOX(&add_stats_)); }

}  // namespace resnet_fused::cpu
