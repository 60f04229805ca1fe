// A file of its own, since the git revision changes with every commit and ops.cpp is slow to compile.

#include "build_info.h"

namespace resnet_fused {

const std::vector<std::pair<const char*, const char*>>& build_facts() {
  static const std::vector<std::pair<const char*, const char*>> facts = {
#include "build_facts.inc"  // written by setup.py: compiler, torch, nvcc, their flags, cuda_architectures, git, sources
  };
  return facts;
}

}  // namespace resnet_fused
