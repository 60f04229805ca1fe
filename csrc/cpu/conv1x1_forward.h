// A 1x1 convolution with the statistics of its output, cut into units of work: what conv1x1 and dense_conv1x1 share.
#pragma once

#include "../checks/common.h"
#include "conv1x1_stages.h"

namespace resnet_fused::cpu {

// Fills p.z, whose input, weight and sizes are given, and the statistics, which are empty where nobody asks for them.
// Sums are of chunks of rows, which depend on the shape alone, and are merged in their order.
void run_forward(Conv1x1 p, const Tensor& mean, const Tensor& m2);

}  // namespace resnet_fused::cpu
