// What the ops of dense blocks check alike: slices of a block's buffer.
#pragma once

#include <functional>

#include "conv1x1.h"

namespace resnet_fused {

// How far apart the pixels of a slice lie, in elements; 0: it is none. A dimension of size 1 says nothing, and an empty
// tensor lies as it should.
inline int64_t pixel_pitch(const Tensor& t) {
  const int64_t C = t.size(1);
  if (t.numel() == 0) return std::max<int64_t>(C, 1);
  if (C > 1 && t.stride(1) != 1) return 0;
  const int64_t steps[3] = {1, t.size(3), t.size(2) * t.size(3)}, dims[3] = {3, 2, 0};
  int64_t pitch = 0;
  for (int i = 0; i < 3; ++i) {
    if (t.size(dims[i]) == 1) continue;
    const int64_t stride = t.stride(dims[i]);
    if (pitch == 0 && stride % steps[i] == 0) pitch = stride / steps[i];
    if (stride != pitch * steps[i] || pitch < C) return 0;
  }
  return pitch ? pitch : C;
}

// Of the dtype that the CPU's loops take.
inline void check_slice(const char* op, const char* name, const Tensor& t) {
  if (t.dim() != 4) fail(op, ": ", name, " has shape ", shape_of(t), "; pass a [N, C, H, W] tensor");
  check_float(op, name, t);
  if (pixel_pitch(t) == 0) {
    fail(op, ": ", name, " of shape ", shape_of(t), " does not lie in pixels of channels; pass ", name,
         ".contiguous(memory_format=torch.channels_last), or some channels of such a tensor");
  }
}

// `channels`: how many it has; it has the pixels of `data`.
inline void check_pixels(const char* op, const char* name, const Tensor& t, int64_t channels, const char* data_name,
                         const Tensor& data) {
  check_slice(op, name, t);
  check_device(op, name, t, data);
  if (t.size(0) != data.size(0) || t.size(1) != channels || t.size(2) != data.size(2) || t.size(3) != data.size(3)) {
    fail(op, ": ", name, " has shape ", shape_of(t), " but ", data_name, " has ", shape_of(data), "; pass ", channels,
         " channels for each of its pixels");
  }
}

inline void check_dense_pixels(const char* op, const char* name, const Tensor& t, int64_t channels,
                               const char* data_name, const Tensor& data) {
  check_pixels(op, name, t, channels, data_name, data);
  check_layout(op, name, t);
}

// A vector [channels] of statistics' dtype.
inline void check_size(const char* op, const char* name, const Tensor& t, int64_t channels, const Tensor& data) {
  check_device(op, name, t, data);
  if (t.dim() != 1 || t.size(0) != channels || t.scalar_type() != ScalarType::Float || !t.is_contiguous()) {
    fail(op, ": ", name, " is ", t.scalar_type(), " of shape ", shape_of(t), "; pass a contiguous [", channels,
         "] Float vector");
  }
}

inline void check_weight3x3(const char* op, const Tensor& weight, int64_t outputs, int64_t inputs, const Tensor& data) {
  check_device(op, "weight", weight, data);
  check_float(op, "weight", weight);
  if (weight.dim() != 4 || weight.size(0) != outputs || weight.size(1) != inputs || weight.size(2) != 3 ||
      weight.size(3) != 3) {
    fail(op, ": weight has shape ", shape_of(weight), "; pass [", outputs, ", ", inputs, ", 3, 3]");
  }
}

// Whether two slices have an element in common; of one buffer, they may be channels apart.
inline bool share_memory(const Tensor& s, const Tensor& t) {
  if (s.numel() == 0 || t.numel() == 0) return false;
  const auto pixels = [](const Tensor& u) { return u.size(0) * u.size(2) * u.size(3); };
  const auto span = [&](const Tensor& u) { return ((pixels(u) - 1) * pixel_pitch(u) + u.size(1)) * int64_t(4); };
  const char *a = static_cast<const char*>(s.data_ptr()), *b = static_cast<const char*>(t.data_ptr());
  const std::less<const char*> before;
  if (!before(a, b + span(t)) || !before(b, a + span(s))) return false;
  const int64_t pitch = pixel_pitch(s) * 4;
  if (pitch != pixel_pitch(t) * 4) return true;
  const int64_t apart = ((b - a) % pitch + pitch) % pitch;
  return apart < s.size(1) * 4 || pitch - apart < t.size(1) * 4;
}

inline void check_apart(const char* op, const char* name, const Tensor& t, const Tensor& out) {
  if (share_memory(t, out)) {
    fail(op, ": ", name, " shares memory with out, which is written; pass one with memory of its own");
  }
}

}  // namespace resnet_fused
