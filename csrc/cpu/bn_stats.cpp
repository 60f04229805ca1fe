// Batch statistics per channel: mean and centred second moment. One read of z.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../checks/bn_stats.h"
#include "affine.h"
#include "alloc.h"
#include "moments.h"

namespace resnet_fused::cpu {
namespace {

template <class T>
void run(const Tensor& z, const Tensor& mean, const Tensor& m2) {
  const T* rows = data<T>(z);
  moments(Shape(z), rows, mean, m2, [&](int64_t c) { return load(rows + c); }, [](int64_t, int64_t) {});
}

Statistics bn_stats(const Tensor& z, const OptionalTensor& gamma, const OptionalTensor& beta,
                    std::optional<double> eps) {
  check_bn_stats(z, gamma, beta, eps);
  Tensor mean = empty_stats(z), m2 = empty_stats(z);
  for_element_type(z.scalar_type(), [&](auto* tag) { run<std::remove_pointer_t<decltype(tag)>>(z, mean, m2); });
  return statistics(mean, m2, gamma, beta, z, eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("bn_stats", TORCH_BOX(&bn_stats)); }

}  // namespace resnet_fused::cpu
