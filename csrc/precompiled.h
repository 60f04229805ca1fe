// What most sources of csrc/cpu include, for a compiler to read once, see setup.py. They do not rely on it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
