// Multi-versioning of the CPU loops: put RESNET_FUSED_CLONES before a function and the compiler emits it once per
// level; the dynamic loader picks the best one for the machine. A kernel whose blocking differs from level to level,
// too, is written once as a template and instantiated in functions with RESNET_FUSED_TARGET_512,
// RESNET_FUSED_TARGET_256 and neither, and chosen by cpu_level().
#pragma once

namespace resnet_fused {

#if defined(__clang__) || !defined(__x86_64__) || !defined(__gnu_linux__)
#define RESNET_FUSED_CLONES  // Clang (22 at the latest) has no clones of function templates: the baseline alone
#define RESNET_FUSED_TARGET_512
#define RESNET_FUSED_TARGET_256
#elif __GNUC__ >= 12
#define RESNET_FUSED_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define RESNET_FUSED_LEVEL_512 "x86-64-v4"
#define RESNET_FUSED_LEVEL_256 "x86-64-v3"
#define RESNET_FUSED_TARGET_PREFIX "arch="
#else
// GCC before 12 cannot dispatch on levels, only on single features: AVX2 then comes without FMA.
#define RESNET_FUSED_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define RESNET_FUSED_LEVEL_512 "avx512f"
#define RESNET_FUSED_LEVEL_256 "avx2"
#define RESNET_FUSED_TARGET_PREFIX ""
#endif

#ifdef RESNET_FUSED_LEVEL_512
#define RESNET_FUSED_TARGET_512 __attribute__((target(RESNET_FUSED_TARGET_PREFIX RESNET_FUSED_LEVEL_512)))
#define RESNET_FUSED_TARGET_256 __attribute__((target(RESNET_FUSED_TARGET_PREFIX RESNET_FUSED_LEVEL_256)))
inline constexpr const char* kCpuLevels = "avx512 avx2 baseline";

// The level that the loader chose: the same tests as its own resolver makes.
inline const char* cpu_level() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports(RESNET_FUSED_LEVEL_512)) return "avx512";
  return __builtin_cpu_supports(RESNET_FUSED_LEVEL_256) ? "avx2" : "baseline";
}
#else
inline constexpr const char* kCpuLevels = "baseline";
inline const char* cpu_level() { return "baseline"; }
#endif

}  // namespace resnet_fused
