// Backward of the Gram join in its small matrices: gradients of weight and gamma, and the correction of the input's.
//
// A block has either sixteen rows of W, and finds their coefficients and gradients, or 32 by 32 of the coupling's upper
// triangle, and sums over all rows; those on the diagonal sum the constant on the way. The latter need the coefficients
// of all rows: of a narrow input they find them again, in the same launch; else they are a second one.
//
// Bytes: W and the product twice, the second time from a cache, gram from L2 for every sixteen rows, W again as often
// as there are 32 channels, and results. FLOPs 2*K*C*C and K*C*(C+32), in full float32: at K = 2048, C = 512 that
// is 1.1 GFLOP in 128 blocks and 0.6 in 136, 25 us at the 67 TFLOP/s of an H100's data sheet. Sums are of at most 16
// products before they are added to others.
#pragma once

#include "weight_panel.cuh"

namespace resnet_fused::cuda {

constexpr int kSquareCols = 32, kSquareDepth = 64, kSquareGroups = 4;
constexpr int kSquareFloats = kSquareDepth * kSquareCols;  // of either side; both hold the groups' sums in the end
constexpr int kNarrowChannels = 128;  // up to which finding coefficients again costs less than a launch that waits

struct GramCoefficients {
  float grad_gamma, b, d0, e;  // the last: what the constant is made of, d0 - b*(W centre)
};

// Of row k, by kLanes neighbours of a warp together, all of which get them; zeros of a row that is not there. Digits
// cancel where means are large: they are subtracted from each element of the product.
template <class T, int kLanes>
__device__ inline GramCoefficients find_coefficients(const GramGradParams& p, int k) {
  const bool there = k < p.outputs;
  const int64_t row = static_cast<int64_t>(k) * p.channels;
  const float per_pixel = 1.f / static_cast<float>(p.pixels);
  const float sum_g = there ? p.sum_g[k] : 0.f, scale = there ? p.scale[k] : 0.f, rstd = there ? p.rstd[k] : 0.f;
  float along = 0.f, of_mean = 0.f, of_centre = 0.f;
#pragma unroll 4
  for (int c = there ? threadIdx.x % kLanes : p.channels; c < p.channels; c += kLanes) {
    const float w = to_float(static_cast<const T*>(p.weight)[row + c]), centre = p.centre[c];
    const float mean = p.total[c] * per_pixel;
    along = fmaf(w, fmaf(-sum_g, mean, fmaf(-sum_g, centre, p.product[row + c])), along);
    of_mean = fmaf(w, mean, of_mean);
    of_centre = fmaf(w, centre, of_centre);
  }
  along = sum_of_lanes<1, kLanes>(along);
  of_mean = sum_of_lanes<1, kLanes>(of_mean);
  of_centre = sum_of_lanes<1, kLanes>(of_centre);
  const float grad_gamma = rstd * along, slope = rstd * grad_gamma, unit = scale * per_pixel;
  const float b = -unit * slope, d0 = unit * fmaf(slope, of_mean, -sum_g);
  return {grad_gamma, b, d0, fmaf(-b, of_centre, d0)};
}

// Rows from `first_row` on. `shared`: as WeightPanel takes it; `found`: b and d0 of the rows.
template <class T>
__device__ inline void find_rows(const GramGradParams& p, int first_row, float* shared, float (&found)[2][kPanelRows]) {
  constexpr int kLanes = kPanelThreads / kPanelRows;
  const int own = threadIdx.x / kLanes, k = first_row + own;
  const GramCoefficients c = find_coefficients<T, kLanes>(p, k);
  if (threadIdx.x % kLanes == 0) {
    found[0][own] = c.b;
    found[1][own] = c.d0;
    if (k < p.outputs) {
      p.grad_gamma[k] = c.grad_gamma;
      if (p.scratch) p.scratch[k] = c.b, p.scratch[p.outputs + k] = c.e;
    }
  }
  WeightPanel<T> panel(p.weight, p.gram, p.outputs, p.channels, first_row, shared);
#pragma unroll 1
  for (int first_col = 0; first_col < p.channels; first_col += kPanelCols) {
    float sums[4][4] = {};
    panel.add(sums, 0, p.channels, first_col, [](float value, int, int) { return value; });
    __syncthreads();  // the panel's place is free
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Four& other = *reinterpret_cast<Four*>(shared + (panel.row + i) * kPanelCols + panel.col);
      if (panel.group == 1) other = {{sums[i][0], sums[i][1], sums[i][2], sums[i][3]}};
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + panel.row + i;
      if (panel.group != 0 || row >= p.outputs) continue;
      const Four other = *reinterpret_cast<const Four*>(shared + (panel.row + i) * kPanelCols + panel.col);
      const float b = found[0][panel.row + i], d0 = found[1][panel.row + i];
      const float sum_g = p.sum_g[row], scale = p.scale[row];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int col = first_col + panel.col + j;
        if (col >= p.channels) continue;
        const int64_t at = static_cast<int64_t>(row) * p.channels + col;
        const float shifted = fmaf(-sum_g, p.centre[col], p.product[at]);
        const float correction = fmaf(b, sums[i][j] + other.v[j], d0 * p.total[col]);
        static_cast<T*>(p.grad_weight)[at] = from_float<T>(fmaf(scale, shifted, correction));
      }
    }
  }
}

// What a block of the coupling has of kSquareDepth rows of W, on their way to shared memory.
template <class T>
struct SquareStep {
  static constexpr int kDown = kPanelThreads / kSquareCols, kPerThread = kSquareDepth / kDown;
  float left[kPerThread], right[kPerThread], b, e;  // b and e: of row threadIdx.x / kLanes
  static constexpr int kLanes = kPanelThreads / kSquareDepth;

  __device__ void fetch(const GramGradParams& p, const TilePair& pair, int first_row) {
    const int x = threadIdx.x % kSquareCols, y = threadIdx.x / kSquareCols;
    const T* from = static_cast<const T*>(p.weight) + static_cast<int64_t>(first_row + y) * p.channels + x;
    const bool in_left = pair.left * kSquareCols + x < p.channels, in_right = pair.right * kSquareCols + x < p.channels;
#pragma unroll
    for (int n = 0; n < kPerThread; ++n) {
      const bool there = first_row + y + n * kDown < p.outputs;
      const T* row = from + static_cast<int64_t>(n * kDown) * p.channels;
      left[n] = there && in_left ? to_float(row[pair.left * kSquareCols]) : 0.f;
      right[n] = there && in_right ? to_float(row[pair.right * kSquareCols]) : 0.f;
    }
    const int own = first_row + static_cast<int>(threadIdx.x) / kLanes;
    if (!p.scratch) {
      const GramCoefficients c = find_coefficients<T, kLanes>(p, own);
      b = c.b, e = c.e;
    } else {
      b = own < p.outputs ? p.scratch[own] : 0.f;
      e = own < p.outputs ? p.scratch[p.outputs + own] : 0.f;
    }
  }
};

// A pair of tiles of the coupling and its mirror image. `shared`: 2 * kSquareFloats.
template <class T>
__device__ inline void find_square(const GramGradParams& p, const TilePair& pair, float* shared) {
  using Step = SquareStep<T>;
  __shared__ float found[2][2][kSquareDepth];  // b and e, of the step and of the one before
  __shared__ double constants[Step::kDown][kSquareCols];
  constexpr int kShare = kSquareDepth / kSquareGroups, kThreadsOfGroup = kPanelThreads / kSquareGroups;
  const int x = threadIdx.x % kSquareCols, y = threadIdx.x / kSquareCols, group = threadIdx.x / kThreadsOfGroup;
  const int row = threadIdx.x % kThreadsOfGroup / 8 * 4, col = threadIdx.x % 8 * 4;
  float* right = shared + kSquareFloats;
  float sums[4][4] = {};
  double constant = 0.;
  Step step;
  step.fetch(p, pair, 0);
  int turn = 0;
#pragma unroll 1
  for (int k = 0; k < p.outputs; k += kSquareDepth, turn ^= 1) {
    if (threadIdx.x % Step::kLanes == 0) {
      found[turn][0][threadIdx.x / Step::kLanes] = step.b;
      found[turn][1][threadIdx.x / Step::kLanes] = step.e;
    }
    __syncthreads();  // and all are done with the rows of the step before
    float part_of_constant = 0.f;
#pragma unroll
    for (int n = 0; n < Step::kPerThread; ++n) {
      const int at = y + n * Step::kDown;
      shared[at * kSquareCols + x] = step.left[n];
      right[at * kSquareCols + x] = found[turn][0][at] * step.right[n];
      part_of_constant = fmaf(found[turn][1][at], step.right[n], part_of_constant);
    }
    constant += part_of_constant;
    __syncthreads();
    if (k + kSquareDepth < p.outputs) step.fetch(p, pair, k + kSquareDepth);
    float part[4][4] = {};
    const int from = group * kShare * kSquareCols;
    add_products<kShare>(part, shared + from + row, kSquareCols, right + from + col, kSquareCols);
    add_squares(sums, part);
  }
  __syncthreads();
  constexpr int kElements = kSquareCols * kSquareCols;
  static_assert(kSquareGroups * kElements <= 2 * kSquareFloats);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<Four*>(shared + group * kElements + (row + i) * kSquareCols +
                             col) = {{sums[i][0], sums[i][1], sums[i][2], sums[i][3]}};
  }
  constants[y][x] = constant;
  __syncthreads();
  T* coupling = static_cast<T*>(p.coupling);
  for (int i = threadIdx.x; i < kElements; i += kPanelThreads) {
    const int r = pair.left * kSquareCols + i / kSquareCols, c = pair.right * kSquareCols + i % kSquareCols;
    if (r > c || c >= p.channels) continue;
    float sum = shared[i];
    for (int other = 1; other < kSquareGroups; ++other) sum += shared[other * kElements + i];
    const T rounded = from_float<T>(sum);
    coupling[static_cast<int64_t>(r) * p.channels + c] = rounded;
    coupling[static_cast<int64_t>(c) * p.channels + r] = rounded;
  }
  if (pair.left != pair.right || y != 0 || pair.right * kSquareCols + x >= p.channels) return;
  for (int other = 1; other < Step::kDown; ++other) constant += constants[other][x];
  p.constant[pair.right * kSquareCols + x] = static_cast<float>(constant);
}

// The first `row_blocks` blocks have rows of W, the others squares of the coupling.
template <class T>
__global__ void __launch_bounds__(kPanelThreads) gram_grad_kernel(const GramGradParams p, int row_blocks, int tiles) {
  static_assert(2 * kSquareFloats <= kPanelFloats + kPanelWeightFloats);
  __shared__ Four shared[(kPanelFloats + kPanelWeightFloats) / 4];
  __shared__ float found[2][kPanelRows];
  const int block = blockIdx.x;
  if (block < row_blocks) {
    find_rows<T>(p, block * kPanelRows, shared[0].v, found);
  } else {
    find_square<T>(p, TilePair(block - row_blocks, tiles), shared[0].v);
  }
}

// Floats of scratch: none where one launch suffices.
int64_t gram_grad_scratch_floats(int outputs, int channels) {
  return channels <= kNarrowChannels ? 0 : 2 * static_cast<int64_t>(outputs);
}

// T: float, __half or __nv_bfloat16. There are pixels.
template <class T>
void launch_gram_grad(const GramGradParams& p, cudaStream_t stream) {
  const int row_blocks = (p.outputs + kPanelRows - 1) / kPanelRows;
  const int tiles = (p.channels + kSquareCols - 1) / kSquareCols, squares = tile_pairs(tiles);
  const auto launch = [&](int rows, int blocks) {
    if (blocks == 0) return;
    RESNET_FUSED_LAUNCH(gram_grad_kernel<T>, dim3(blocks), dim3(kPanelThreads), stream, p, rows, tiles);
  };
  if (p.channels <= kNarrowChannels) {
    launch(row_blocks, row_blocks + squares);
  } else {
    launch(row_blocks, row_blocks);
    launch(0, squares);
  }
}

}  // namespace resnet_fused::cuda
