// A checksum of the content of tensors, by which cached weights notice writes that no version counter saw.
//
// Position-dependent: 64 interleaved 32-bit lanes, each a hash of its words, folded in order. One read, at memory
// bandwidth. Not cryptographic; a chance collision has probability about 2^-32 per lane that changed. Each step also
// shifts down: a product carries differences upwards only, and those of an even number of sign bits would cancel.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../checks/common.h"
#include "../cpu_levels.h"

namespace resnet_fused::cpu {
namespace {

using torch::stable::Tensor;

constexpr int64_t kLanes = 64, kChunkWords = 1 << 15, kGrain = 4;

uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15ull;
  return hash ^ (hash >> 32);
}

RESNET_FUSED_CLONES void hash_lanes(const uint32_t* __restrict words, int64_t groups, uint32_t* __restrict lanes) {
  for (int64_t i = 0; i < groups; ++i) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const uint32_t product = (lanes[lane] ^ words[i * kLanes + lane]) * 0x9E3779B1u + 0x7F4A7C15u;
      lanes[lane] = product ^ (product >> 15);
    }
  }
}

uint64_t hash_chunk(const unsigned char* bytes, int64_t size) {
  uint32_t lanes[kLanes] = {};
  const int64_t groups = size / (kLanes * 4), body = groups * kLanes * 4;
  hash_lanes(reinterpret_cast<const uint32_t*>(bytes), groups, lanes);
  uint64_t hash = static_cast<uint64_t>(size);
  for (const uint32_t lane : lanes) hash = mix(hash, lane);
  for (int64_t i = body; i < size; ++i) hash = mix(hash, bytes[i]);
  return hash;
}

struct Chunk {
  const unsigned char* bytes;
  int64_t size;
};

// The chunks of a dense tensor: it spans as many elements as it has, in whatever order.
std::vector<Chunk> chunks_of(const Tensor& t) {
  if (!t.is_cpu()) fail("checksum: got a tensor on ", device_of(t), "; pass CPU tensors");
  int64_t extent = 1;
  for (int64_t i = 0; i < t.dim(); ++i) extent += (t.size(i) - 1) * t.stride(i);
  if (t.numel() != 0 && extent != t.numel()) fail("checksum: a tensor is not dense; pass t.contiguous()");
  const auto* bytes = static_cast<const unsigned char*>(t.data_ptr());
  std::vector<Chunk> chunks;
  const int64_t size = t.numel() * t.element_size(), step = kChunkWords * 4;
  for (int64_t begin = 0; begin < size; begin += step) chunks.push_back({bytes + begin, std::min(step, size - begin)});
  return chunks;
}

// One for each tensor, in one parallel loop over them all: most of a network's tensors are too small for one of their
// own.
std::vector<int64_t> checksum(std::vector<Tensor> tensors) {
  std::vector<Chunk> chunks;
  std::vector<size_t> ends;
  for (const Tensor& t : tensors) {
    for (const Chunk& chunk : chunks_of(t)) chunks.push_back(chunk);
    ends.push_back(chunks.size());
  }
  std::vector<uint64_t> parts(chunks.size());
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) parts[i] = hash_chunk(chunks[i].bytes, chunks[i].size);
  });
  std::vector<int64_t> sums;
  size_t i = 0;
  for (const size_t end : ends) {
    uint64_t hash = end - i;
    for (; i < end; ++i) hash = mix(hash, parts[i]);
    sums.push_back(static_cast<int64_t>(hash));
  }
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("checksum", TORCH_BOX(&checksum)); }

}  // namespace resnet_fused::cpu
