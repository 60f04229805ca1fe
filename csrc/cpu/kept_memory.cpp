// Memory of large tensors, kept as PyTorch keeps a GPU's (torch.cuda.empty_cache). All lies in one range of addresses,
// which is reserved once; the rules are
//
// - a request takes the beginning of the smallest free run that is large enough, and free neighbours are one run: no
//   matter what sizes a step's tensors have, those that follow take what those before had;
// - memory comes in huge pages when it is first written. Pages that hold no tensor stay, until all pages together are
//   more than `kSlack` times what held tensors at once during the last `kWindow` to twice as many requests: then those
//   that are free for longest go back;
// - a page that held nothing during the last `kWindow` requests goes back;
// - the system may take the free pages when it is short of memory (MADV_FREE);
// - `empty_cache` gives all free pages back; RESNET_FUSED_KEEP_MEMORY=0 in the environment turns all of it off. So does
//   a limit on addresses of less than 4 GiB.
//
// A tensor with a deleter needs `torch_from_blob`, which torch has from 2.11 on; with 2.10 nothing is kept.

#include "kept_memory.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
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
constexpr int32_t kNoIndex = -1;   // a CPU has none, and `torch_from_blob` refuses 0

constexpr size_t kUnit = 64 << 10;  // what tensors begin at a multiple of
constexpr size_t kPageUnits = kHugePage / kUnit;
constexpr size_t kOpened = size_t(64) << 20;  // bytes made usable at a time
constexpr size_t kLeast = size_t(1) << 30;    // of addresses: with fewer nothing is kept

size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Addresses for as much as there is memory, or for a quarter of a limit on them. They begin on a huge page, nobody may
// use them yet, and they cost nothing.
struct Range {
  char* data = nullptr;
  size_t bytes = 0;

  static Range reserve() {
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    if (pages <= 0 || page <= 0) return {};
    size_t bytes = rounded(size_t(pages) * size_t(page), kOpened);
    rlimit limit;
    if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
      bytes = std::min<size_t>(bytes, limit.rlim_cur / 4);
    }
    for (; bytes >= kLeast; bytes /= 2) {
      void* const raw = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (raw == MAP_FAILED) continue;
      const uintptr_t begin = rounded(reinterpret_cast<uintptr_t>(raw), kHugePage);
      const size_t lost = begin - reinterpret_cast<uintptr_t>(raw);
      return {reinterpret_cast<char*>(begin), (bytes - lost) / kHugePage * kHugePage};
    }
    return {};
  }
};

struct Page {
  uint32_t held = 0;      // units of tensors in it
  bool resident = false;  // whether it may have memory
  uint64_t since = 0;     // the request before which it became free
};

class Cache {
 public:
  static Cache& instance() {
    static Cache* const cache = new Cache;  // never destroyed: tensors may outlive every static object
    return *cache;
  }

  // How a tensor is made on kept memory; nullptr: nothing is kept.
  FromBlob from_blob() const { return from_blob_; }

  // Memory for `bytes`, a multiple of kUnit; nullptr where there is none.
  void* take(size_t bytes) {
    const std::lock_guard<std::mutex> guard(mutex_);
    begin_request();
    const size_t size = bytes / kUnit, first = find(size);
    if (first == kNowhere || !open((first + size) * kUnit)) return nullptr;
    const auto run = free_.find(first);
    const size_t left = run->second - size;
    if (left > 0) free_.emplace(first + size, left);  // may throw, before anything is changed
    free_.erase(run);
    for_each_page(first, size, [&](Page& page, size_t units) {
      held_ += page.held == 0;
      resident_ += !page.resident;
      page.held += static_cast<uint32_t>(units);
      page.resident = true;
    });
    peak_ = std::max(peak_, held_);
    const auto most = static_cast<size_t>(kSlack * static_cast<double>(std::max(peak_, last_peak_)));
    while (resident_ > most && release_oldest()) continue;
    return range_.data + first * kUnit;
  }

  void give(void* data, size_t bytes) noexcept {
    const std::lock_guard<std::mutex> guard(mutex_);
    const size_t first = static_cast<size_t>(static_cast<char*>(data) - range_.data) / kUnit, size = bytes / kUnit;
    Page *begin = nullptr, *end = nullptr;  // those that are free now: neighbours, as only the ends can be shared
    for_each_page(first, size, [&](Page& page, size_t units) {
      page.held -= static_cast<uint32_t>(units);
      if (page.held > 0) return;
      page.since = requests_;
      --held_;
      if (begin == nullptr) begin = &page;
      end = &page + 1;
    });
    if (begin != nullptr) advise(begin, end, MADV_FREE);  // a refusal changes nothing
    join(first, size);
  }

  // Gives all free pages back to the system; the bytes of them.
  size_t empty() {
    const std::lock_guard<std::mutex> guard(mutex_);
    return release([](const Page&) { return true; });
  }

 private:
  static constexpr size_t kNowhere = ~size_t(0);

  Cache() {
    const char* const word = std::getenv("RESNET_FUSED_KEEP_MEMORY");
    if (word == nullptr || std::strcmp(word, "0") != 0) range_ = Range::reserve();
    if (range_.data != nullptr) {
      from_blob_ = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
      pages_.resize(range_.bytes / kHugePage);
      free_.emplace(0, range_.bytes / kUnit);
    }
    // A child process must not inherit the lock from a thread that it does not have.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  void begin_request() {
    if (++requests_ % kWindow == 0) last_peak_ = std::exchange(peak_, held_);
    release([&](const Page& page) { return requests_ - page.since > kWindow; });
  }

  // Where the smallest free run of at least `size` units begins, the first of several.
  size_t find(size_t size) const {
    size_t best = kNowhere, least = kNowhere;
    for (const auto& [first, units] : free_) {
      if (units >= size && units < least) best = first, least = units;
    }
    return best;
  }

  // Make the range usable up to `bytes`.
  bool open(size_t bytes) {
    if (bytes <= opened_) return true;
    const size_t end = std::min(rounded(bytes, kOpened), range_.bytes);
    char* const data = range_.data + opened_;
    if (mprotect(data, end - opened_, PROT_READ | PROT_WRITE) != 0) return false;
    madvise(data, end - opened_, MADV_HUGEPAGE);  // advice: a refusal changes nothing
    opened_ = end;
    return true;
  }

  // Add a run to the free ones. Never in need of memory where a neighbour takes it in; else it may be lost.
  void join(size_t first, size_t size) noexcept {
    auto next = free_.lower_bound(first);
    if (next != free_.end() && next->first == first + size) {
      auto node = free_.extract(next++);
      node.key() = first;
      node.mapped() += size;
      next = free_.insert(next, std::move(node));
    } else {
      try {
        next = free_.emplace_hint(next, first, size);
      } catch (const std::bad_alloc&) {
        return;
      }
    }
    if (next == free_.begin()) return;
    const auto before = std::prev(next);
    if (before->first + before->second != first) return;
    before->second += next->second;
    free_.erase(next);
  }

  // f(page, units of it) for the pages of a run.
  template <class F>
  void for_each_page(size_t first, size_t size, const F& f) {
    for (size_t end = first + size; first < end;) {
      const size_t page = first / kPageUnits, stop = std::min(end, (page + 1) * kPageUnits);
      f(pages_[page], stop - first);
      first = stop;
    }
  }

  void advise(const Page* begin, const Page* end, int advice) const {
    const auto first = static_cast<size_t>(begin - pages_.data()), count = static_cast<size_t>(end - begin);
    madvise(range_.data + first * kHugePage, count * kHugePage, advice);
  }

  bool is_free(const Page& page) const { return page.resident && page.held == 0; }

  void release(Page& page) {
    advise(&page, &page + 1, MADV_DONTNEED);
    page.resident = false;
    --resident_;
  }

  template <class Condition>
  size_t release(Condition condition) {
    const size_t before = resident_;
    for (size_t i = 0; i < opened_ / kHugePage; ++i) {
      if (is_free(pages_[i]) && condition(pages_[i])) release(pages_[i]);
    }
    return (before - resident_) * kHugePage;
  }

  // Whether there was a free page.
  bool release_oldest() {
    Page* oldest = nullptr;
    for (size_t i = 0; i < opened_ / kHugePage; ++i) {
      if (is_free(pages_[i]) && (oldest == nullptr || pages_[i].since < oldest->since)) oldest = &pages_[i];
    }
    if (oldest != nullptr) release(*oldest);
    return oldest != nullptr;
  }

  std::mutex mutex_;
  Range range_;
  size_t opened_ = 0;              // bytes of the range that are usable
  std::map<size_t, size_t> free_;  // runs of units: where they begin, and how many
  std::vector<Page> pages_;
  uint64_t requests_ = 0;
  size_t held_ = 0, resident_ = 0;   // pages that hold tensors, and that may have memory
  size_t peak_ = 0, last_peak_ = 0;  // the most that held tensors at once, in this window and in the one before
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
  const size_t size = rounded(bytes, kUnit);
  void* const memory = cache.take(size);
  if (memory == nullptr) return false;
  const auto give_back = [](void* data, void* size) {
    Cache::instance().give(data, reinterpret_cast<uintptr_t>(size));
  };
  const AOTITorchError error =
      from_blob(memory, 4, sizes.data(), strides.data(), 0, dtype, aoti_torch_device_type_cpu(), kNoIndex, out,
                aoti_torch_layout_strided(), nullptr, 0, give_back, reinterpret_cast<void*>(size));
  if (error == AOTI_TORCH_SUCCESS) return true;
  // Nobody says whether torch has taken the memory: it is left alone.
#endif
  return false;
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, m) {
  m.impl("empty_cache", TORCH_BOX(&empty_cache));
}

}  // namespace resnet_fused::cpu
