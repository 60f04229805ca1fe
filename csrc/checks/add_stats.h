// Argument errors of add_stats_.
#pragma once

#include <functional>

#include "common.h"

namespace resnet_fused {

inline void check_add_stats(const Tensor& out, const Tensor& other, const OptionalTensor& sample_factor) {
  const char* op = "add_stats_";
  check_data(op, "out", out);
  check_like(op, "other", other, "out", out);
  check_factor(op, sample_factor, out);
  const auto end = [](const Tensor& t) {
    return static_cast<const char*>(t.data_ptr()) + t.numel() * t.element_size();
  };
  const std::less<const void*> before;
  if (before(out.data_ptr(), end(other)) && before(other.data_ptr(), end(out))) {
    fail("add_stats_: other shares memory with out, which is written; pass one with memory of its own");
  }
}

}  // namespace resnet_fused
