// What races.cpp has to know of a grid that runs on the CPU; without CUDA_ON_CPU_RACES all of it is nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_on_cpu {

#if defined(CUDA_ON_CPU_RACES)

inline int32_t phase = 0;         // the count of blocks begun and of barriers of a block passed
inline int32_t launch_began = 0;  // the phase in which the launch did
inline int32_t block_began = 0;

// Of the thread that runs. A started copy is neither there nor gone before it is made.
void read_memory(const void* from, size_t bytes);
void write_memory(const void* to, size_t bytes);
void copy_starts(const void* to, size_t bytes);
void copy_is_made(const void* to, size_t bytes);

// Whether what runs from now on is a kernel's own code, and whether it was.
bool watch(bool own);

// Whether the barrier in that line is to be left out, as CUDA_ON_CPU_WITHOUT=<file>:<line> says.
bool is_left_out(const char* file, int line);

// While one lives, what runs is no kernel's code.
struct Emulating {
  bool before = watch(false);
  ~Emulating() { watch(before); }
};

inline void launch_begins() { launch_began = ++phase; }
inline void block_begins() { block_began = ++phase; }
inline void block_meets() { ++phase; }
inline void kernel_runs(bool it_does) { watch(it_does); }

#else

inline void read_memory(const void*, size_t) {}
inline void write_memory(const void*, size_t) {}
inline void copy_starts(const void*, size_t) {}
inline void copy_is_made(const void*, size_t) {}
constexpr bool is_left_out(const char*, int) { return false; }
struct Emulating {
  Emulating() {}
};
inline void launch_begins() {}
inline void block_begins() {}
inline void block_meets() {}
inline void kernel_runs(bool) {}

#endif

}  // namespace cuda_on_cpu
