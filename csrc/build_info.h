// What setup.py knew when it built this library, as name-value pairs.
#pragma once

#include <utility>
#include <vector>

namespace resnet_fused {

const std::vector<std::pair<const char*, const char*>>& build_facts();

}  // namespace resnet_fused
