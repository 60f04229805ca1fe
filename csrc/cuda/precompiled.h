// What all sources of csrc/cuda include but its kernels, for a compiler to read once, see setup.py.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include "../precompiled.h"
