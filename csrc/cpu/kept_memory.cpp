// A cache of large buffers, as PyTorch has one for GPUs (torch.cuda.empty_cache): the rules are
//
// - a request takes the smallest free buffer that is large enough and not more than a quarter larger; else one is
//   mapped, aligned to huge pages, with advice to use them;
// - all buffers together are to be no more than `kSlack` times what tensors had at once during the last `kWindow` to
//   twice as many requests. Where they would be with one more, but are not yet, the smallest free one that is large
//   enough is taken, however large; else the oldest free ones go back to the system before one is mapped;
// - a buffer that nobody took during the last `kWindow` requests goes back;
// - the system may take the pages of free buffers when it is short of memory (MADV_FREE); where it refuses to map one,
//   all free buffers go back, and it is asked once more;
// - `empty_cache` gives all free buffers back; RESNET_FUSED_KEEP_MEMORY=0 in the environment turns all of it off.
//
// A tensor with a deleter needs `torch_from_blob`, which torch has from 2.11 on; with 2.10 nothing is kept.

#include "kept_memory.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace resnet_fused::cpu {
namespace {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

// Of torch's stable ABI (torch/csrc/stable/c/shim.h), looked up since it is younger than the ABI we build for.
using FromBlob = AOTITorchError (*)(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                                    int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                                    AtenTensorHandle* ret, int32_t layout, const uint8_t* opaque_metadata,
                                    int64_t opaque_metadata_size, void (*deleter)(void* data, void* ctx),
                                    void* deleter_ctx);

constexpr uint64_t kWindow = 512;  // some six training steps of ResNet-50 at batch 16
constexpr double kSlack = 1.25;    // measured below 1.2 where all steps are alike
constexpr size_t kPage = 4096;
constexpr int32_t kNoIndex = -1;  // a CPU has none, and `torch_from_blob` refuses 0

size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// `bytes` of new memory that begins on a huge page, or nullptr.
void* map(size_t bytes) {
  const size_t room = bytes + kHugePage;
  void* const raw = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  const uintptr_t first = reinterpret_cast<uintptr_t>(raw), begin = rounded(first, kHugePage), end = begin + bytes;
  if (begin > first) munmap(raw, begin - first);
  if (first + room > end) munmap(reinterpret_cast<void*>(end), first + room - end);
  madvise(reinterpret_cast<void*>(begin), bytes, MADV_HUGEPAGE);  // advice: a refusal changes nothing
  return reinterpret_cast<void*>(begin);
}

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0, used = 0;  // in whole pages; `used`: by the tensor that has it
};

// Both sizes of a buffer as what torch keeps for a deleter, counted in pages.
constexpr uintptr_t kSizeBits = sizeof(uintptr_t) * 4;
void* sizes_of(const Buffer& buffer) {
  return reinterpret_cast<void*>(((buffer.bytes / kPage) << kSizeBits) | (buffer.used / kPage));
}
Buffer with_sizes(void* data, void* sizes) {
  const auto both = reinterpret_cast<uintptr_t>(sizes);
  return {data, (both >> kSizeBits) * kPage, (both & ((uintptr_t(1) << kSizeBits) - 1)) * kPage};
}

class Cache {
 public:
  static Cache& instance() {
    static Cache* const cache = new Cache;  // never destroyed: tensors may outlive every static object
    return *cache;
  }

  // How a tensor is made on a buffer; nullptr: nothing is kept.
  FromBlob from_blob() const { return from_blob_; }

  // A buffer of at least `bytes`; without data where the system refuses.
  Buffer take(size_t bytes) {
    const std::lock_guard<std::mutex> guard(mutex_);
    begin_request();
    Buffer found = find(bytes, bytes + bytes / 4);
    const size_t all = live_ + kept_, most = allowed(bytes);
    if (found.data == nullptr && all + bytes > most && all <= most) found = find(bytes, all);
    if (found.data == nullptr) {
      make_room(all + bytes > most ? all + bytes - most : 0);
      found = {map(bytes), bytes};
      if (found.data == nullptr && release([](const Free&) { return true; }) > 0) found.data = map(bytes);
      if (found.data == nullptr) return found;
    }
    found.used = bytes;
    live_ += found.bytes;
    used_ += bytes;
    peak_ = std::max(peak_, used_);
    return found;
  }

  void give(const Buffer& buffer) noexcept {
    const std::lock_guard<std::mutex> guard(mutex_);
    live_ -= buffer.bytes;
    used_ -= buffer.used;
    try {
      free_.push_back({buffer, requests_});
      kept_ += buffer.bytes;
      madvise(buffer.data, buffer.bytes, MADV_FREE);  // advice: a refusal changes nothing
    } catch (const std::bad_alloc&) {
      munmap(buffer.data, buffer.bytes);
    }
  }

  // Gives all free buffers back to the system; the bytes of them.
  size_t empty() {
    const std::lock_guard<std::mutex> guard(mutex_);
    return release([](const Free&) { return true; });
  }

 private:
  struct Free {
    Buffer buffer;
    uint64_t since;  // the request before which it became free
  };

  Cache() {
    const char* const word = std::getenv("RESNET_FUSED_KEEP_MEMORY");
    if (word == nullptr || std::strcmp(word, "0") != 0)
      from_blob_ = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
    // A child process must not inherit the lock from a thread that it does not have.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  void begin_request() {
    if (++requests_ % kWindow == 0) last_peak_ = std::exchange(peak_, used_);
    release([&](const Free& one) { return requests_ - one.since > kWindow; });
  }

  // The smallest free buffer of `bytes` to `most`, which is free no more; without data where there is none.
  Buffer find(size_t bytes, size_t most) {
    auto best = free_.end();
    for (auto one = free_.begin(); one != free_.end(); ++one) {
      const size_t size = one->buffer.bytes;
      if (size < bytes || size > most) continue;
      if (best == free_.end() || size < best->buffer.bytes) best = one;
    }
    if (best == free_.end()) return {};
    const Buffer found = best->buffer;
    free_.erase(best);
    kept_ -= found.bytes;
    return found;
  }

  // How much all buffers may be together where a tensor asks for `bytes` more.
  size_t allowed(size_t bytes) const {
    return static_cast<size_t>(kSlack * static_cast<double>(std::max({peak_, last_peak_, used_ + bytes})));
  }

  // Release the oldest free buffers, which are the first, until they are `excess` less.
  void make_room(size_t excess) {
    release([&](const Free& one) {
      if (excess == 0) return false;
      excess -= std::min(excess, one.buffer.bytes);
      return true;
    });
  }

  template <class Condition>
  size_t release(Condition condition) {
    size_t bytes = 0;
    const auto released = [&](const Free& one) {
      if (!condition(one)) return false;
      bytes += one.buffer.bytes;
      munmap(one.buffer.data, one.buffer.bytes);
      return true;
    };
    free_.erase(std::remove_if(free_.begin(), free_.end(), released), free_.end());
    kept_ -= bytes;
    return bytes;
  }

  std::mutex mutex_;
  std::vector<Free> free_;  // the oldest first
  uint64_t requests_ = 0;
  size_t live_ = 0, kept_ = 0;       // bytes of the buffers that tensors have, and of those that are free
  size_t used_ = 0;                  // bytes of tensors
  size_t peak_ = 0, last_peak_ = 0;  // the most that tensors had at once, in this window and in the one before
  FromBlob from_blob_ = nullptr;
};

#endif

int64_t empty_cache() {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  return static_cast<int64_t>(Cache::instance().empty());
#else
  return 0;
#endif
}

}  // namespace

bool kept_tensor([[maybe_unused]] const std::array<int64_t, 4>& sizes,
                 [[maybe_unused]] const std::array<int64_t, 4>& strides, [[maybe_unused]] int32_t dtype,
                 [[maybe_unused]] size_t bytes, [[maybe_unused]] AtenTensorHandle* out) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  Cache& cache = Cache::instance();
  const FromBlob from_blob = cache.from_blob();
  if (from_blob == nullptr) return false;
  const Buffer buffer = cache.take(rounded(bytes, kPage));
  if (buffer.data == nullptr) return false;
  const auto give_back = [](void* data, void* sizes) { Cache::instance().give(with_sizes(data, sizes)); };
  const AOTITorchError error =
      from_blob(buffer.data, 4, sizes.data(), strides.data(), 0, dtype, aoti_torch_device_type_cpu(), kNoIndex, out,
                aoti_torch_layout_strided(), nullptr, 0, give_back, sizes_of(buffer));
  if (error == AOTI_TORCH_SUCCESS) return true;
  // Nobody says whether torch has taken the buffer: it is left alone.
#endif
  return false;
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, m) {
  m.impl("empty_cache", TORCH_BOX(&empty_cache));
}

}  // namespace resnet_fused::cpu
