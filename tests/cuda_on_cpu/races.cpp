// Finds races between CUDA's threads in kernels that run on the CPU: what ThreadSanitizer is for, but its library sees
// the one thread of the CPU that runs all fibers. So only its half in the compiler is taken: with -fsanitize=thread,
// code calls a function at each access to memory, and here are these functions. This file is compiled without it.
//
// Two accesses to a byte, of which one writes, race unless they are of one thread, or a barrier of their block lies
// between them, or __syncwarp() and they are of one warp; shuffles, ldmatrix and mma order no memory. Blocks of a
// launch are in no order, but have shared memory each of their own. A copy by cp.async that is not yet waited for races
// with all accesses to where it goes. The order that threads ran in does not matter: barriers alone decide.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <utility>

#include "cuda_on_cpu.h"

extern "C" char __executable_start[], __bss_start[], _end[];  // of the linker

namespace {

using namespace cuda_on_cpu;

bool watching = false;  // calls by the compiler count

constexpr int kSeveral = -1;  // warps, or lanes of one

struct Access {
  int32_t phase = -1;
  int32_t sync = 0;  // how often the warp had synchronised in its block
  int16_t warp = 0, lane = 0;
  const void* code = nullptr;
};

struct Byte {
  Access written, read;     // the last; of reads of the last phase all together
  int32_t first_read = -1;  // phase of the first read in the launch
  bool awaits_copy = false;
};

constexpr uintptr_t kPage = 4096;
struct Page {
  Byte bytes[kPage];
};

Byte& byte_at(uintptr_t address) {
  static std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  static uintptr_t last_number = 0;
  static Page* last = nullptr;
  if (!last || last_number != address / kPage) {
    std::unique_ptr<Page>& page = pages[last_number = address / kPage];
    if (!page) page = std::make_unique<Page>();
    last = page.get();
  }
  return last->bytes[address % kPage];
}

bool is_within(uintptr_t address, const void* begin, size_t size) {
  return address - reinterpret_cast<uintptr_t>(begin) < size;
}

// Memory of a block: what a launch was given, or an array, which is `static` here; tests' tensors are on the heap.
bool is_shared(uintptr_t address) {
  return is_within(address, shared.data(), shared.size()) || is_within(address, __bss_start, _end - __bss_start);
}

// Whether nothing orders `now` after `before`, a set of accesses.
bool races(const Access& before, const Access& now) {
  if (before.phase != now.phase) return false;
  return before.warp != now.warp || (before.sync == now.sync && before.lane != now.lane);
}

bool of_another_block(int32_t before) { return before >= launch_began && before < block_began; }

[[noreturn]] void report(const char* what, uintptr_t address, const Access& now, const Access& before) {
  watching = false;
  const bool dynamic = is_within(address, shared.data(), shared.size());
  const auto in_program = [](const void* code) { return static_cast<const char*>(code) - __executable_start; };
  std::fprintf(stderr, "race at byte %zu of %s: %s, at program+0x%tx; before, at program+0x%tx by warp %d, lane %d\n",
               dynamic ? address - reinterpret_cast<uintptr_t>(shared.data()) : address,
               dynamic              ? "shared memory"
               : is_shared(address) ? "a shared array"
                                    : "global memory",
               what, in_program(now.code), in_program(before.code), before.warp, before.lane);
  stop("races");
}

void note_read(Byte& byte, const Access& now) {
  Access& read = byte.read;
  if (byte.first_read < launch_began) byte.first_read = now.phase;
  if (read.phase != now.phase) {
    read = now;
  } else if (read.warp != now.warp) {
    read.warp = kSeveral;
  } else if (read.sync != now.sync) {
    read = now;
  } else if (read.lane != now.lane) {
    read.lane = kSeveral;
  }
}

enum class Kind { kRead, kWrite, kCopyStarts, kCopyIsMade };

void access(const void* memory, size_t size, Kind kind, const void* code) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(memory);
  if (is_within(first, current->stack.data(), current->stack.size())) return;  // the thread's own
  const int thread = static_cast<int>(thread_number()), warp = thread / static_cast<int>(kWarp);
  const Access now{phase, warps[warp].syncs, static_cast<int16_t>(warp), static_cast<int16_t>(thread % kWarp), code};
  const bool blocks_share = !is_shared(first);
  for (uintptr_t address = first; address < first + size; ++address) {
    Byte& byte = byte_at(address);
    if (kind == Kind::kCopyIsMade) byte.awaits_copy = false;
    const char* const what = kind == Kind::kRead ? "a read" : kind == Kind::kWrite ? "a write" : "a copy";
    if (byte.awaits_copy) report("an access to where a copy goes that is not waited for", address, now, byte.written);
    if (races(byte.written, now) || (blocks_share && of_another_block(byte.written.phase))) {
      report(what, address, now, byte.written);
    }
    if (kind == Kind::kRead) {
      note_read(byte, now);
      continue;
    }
    if (races(byte.read, now) || (blocks_share && of_another_block(byte.first_read))) {
      report(what, address, now, byte.read);
    }
    byte.written = now;
    byte.awaits_copy = kind == Kind::kCopyStarts;
  }
}

}  // namespace

namespace cuda_on_cpu {

// By the emulation itself for a thread.
void read_memory(const void* from, size_t bytes) { access(from, bytes, Kind::kRead, __builtin_return_address(0)); }
void write_memory(const void* to, size_t bytes) { access(to, bytes, Kind::kWrite, __builtin_return_address(0)); }
void copy_starts(const void* to, size_t bytes) { access(to, bytes, Kind::kCopyStarts, __builtin_return_address(0)); }
void copy_is_made(const void* to, size_t bytes) { access(to, bytes, Kind::kCopyIsMade, __builtin_return_address(0)); }

bool watch(bool own) { return std::exchange(watching, own); }

bool is_left_out(const char* file, int line) {
  static const char* const without = std::getenv("CUDA_ON_CPU_WITHOUT");
  if (!without) return false;
  const char* const slash = std::strrchr(file, '/');
  char here[256];
  std::snprintf(here, sizeof here, "%s:%d", slash ? slash + 1 : file, line);
  return std::strcmp(here, without) == 0;
}

}  // namespace cuda_on_cpu

#define RESNET_FUSED_ACCESS(name, size, kind)                                    \
  void __tsan_##name(void* memory) {                                             \
    if (watching) access(memory, size, Kind::kind, __builtin_return_address(0)); \
  }
#define RESNET_FUSED_ACCESSES(size)              \
  RESNET_FUSED_ACCESS(read##size, size, kRead)   \
  RESNET_FUSED_ACCESS(write##size, size, kWrite) \
  RESNET_FUSED_ACCESS(unaligned_read##size, size, kRead) RESNET_FUSED_ACCESS(unaligned_write##size, size, kWrite)

extern "C" {
RESNET_FUSED_ACCESSES(1)
RESNET_FUSED_ACCESSES(2)
RESNET_FUSED_ACCESSES(4)
RESNET_FUSED_ACCESSES(8)
RESNET_FUSED_ACCESSES(16)
void __tsan_read_range(void* memory, size_t size) {
  if (watching) access(memory, size, Kind::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* memory, size_t size) {
  if (watching) access(memory, size, Kind::kWrite, __builtin_return_address(0));
}
// What else the compiler calls: it says where functions begin and end, and checks once that a local static is made.
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
char __tsan_atomic8_load(const volatile char* from, int) { return __atomic_load_n(from, __ATOMIC_ACQUIRE); }
}
