// A convolution's two operands as matrices of a product, read by addressing: nothing is unfolded in memory.
//
// x is [pixels of the output][reduction], weight [outputs][reduction]. In channels_last what a filter row meets is
// contiguous in the image and in the weight: a *run* of S*C elements, or, where taps lie apart (dilation), S runs of C.
// Runs are padded to whole 16-byte chunks; the reduction is all runs one after another, so the 147 elements of a 7x7
// stem on 3 channels are 7 runs of 24, not 49 taps of as much as a chunk. What is outside the image is zero.
//
// With channels that fill chunks, at aligned addresses, chunks go to shared memory by cp.async; else element by element
// through registers.
#pragma once

#include "shared_matrix.cuh"

namespace resnet_fused::cuda {

// How the reduction is cut into runs; in elements.
struct Runs {
  int across;  // runs of a filter row
  int length;
  int padded;
  int elements;  // of all runs, padded

  Runs(const ConvGeometry& g, int chunk) {
    const bool whole_rows = g.dilation_w == 1 || g.s == 1;
    across = whole_rows ? 1 : g.s;
    length = whole_rows ? g.s * g.c : g.c;
    padded = length == 0 ? chunk : (length + chunk - 1) / chunk * chunk;
    elements = g.r * across * padded;
  }
};

// Where in the reduction a thread's next chunk lies.
struct ReductionPlace {
  int row, tap, element;  // filter row, run within it, element within that

  __device__ ReductionPlace(const Runs& runs, int first) : row(0), tap(0), element(first) { settle(runs); }
  __device__ void advance(const Runs& runs, int elements) {
    element += elements;
    settle(runs);
  }
  __device__ void settle(const Runs& runs) {
    while (element >= runs.padded) {
      element -= runs.padded;
      if (++tap == runs.across) {
        tap = 0;
        ++row;
      }
    }
  }
};

// value(i) for i in [begin, end), which lie within a chunk, zeros around them, as one chunk in shared memory.
template <class T, class Value>
__device__ inline void copy_elements(SharedAddress to, int begin, int end, const Value& value) {
  constexpr int kElements = kChunkElements<T>;
  struct alignas(kChunkBytes) Chunk {
    T v[kElements];
  } chunk;
#pragma unroll
  for (int i = 0; i < kElements; ++i) chunk.v[i] = i >= begin && i < end ? value(i) : from_float<T>(0.f);
  store_chunk(to, *reinterpret_cast<const uint4*>(&chunk));
}

// The rows of a tile that one thread copies, kPerThread of them, kRowsAtOnce apart, and the chunk of each that it does.
template <class T, int kTileRows, int kThreadsPerBlock>
struct Copier {
  static constexpr int kRowsAtOnce = kThreadsPerBlock / kChunks;
  static constexpr int kPerThread = kTileRows / kRowsAtOnce;
  static_assert(kTileRows % kRowsAtOnce == 0);
  __device__ static int row(int i) { return static_cast<int>(threadIdx.x) / kChunks + i * kRowsAtOnce; }
  __device__ static int chunk() { return static_cast<int>(threadIdx.x) % kChunks; }
};

// x: kTileRows pixels of the output from `first` on.
template <class T, int kTileRows, int kThreadsPerBlock, bool kVectors>
class PixelRows {
  using Copies = Copier<T, kTileRows, kThreadsPerBlock>;

 public:
  __device__ PixelRows(const ConvGeometry& g, const void* x, int first) : x_(static_cast<const T*>(x)) {
    const int rows = anew(g.p), columns = anew(g.q), pixels = g.n * rows * columns;
#pragma unroll
    for (int i = 0; i < Copies::kPerThread; ++i) {
      const int pixel = first + Copies::row(i), line = pixel / columns, sample = line / rows;
      const int h = (line - sample * rows) * g.stride_h - g.padding_h;
      const int w = (pixel - line * columns) * g.stride_w - g.padding_w;
      place_[i] = (pixel < pixels ? h : kNowhere) * 65536 + (w & 0xFFFF);
      offset_[i] = ((sample * g.h + h) * g.w + w) * g.c;
    }
  }

  // `prologue` (conv_prologue.cuh) is applied here to elements that come through registers. Returns which chunks came
  // from the image, bit i for row i of this thread: cp.async brought them, the others are zeros.
  template <class Prologue>
  __device__ unsigned copy(SharedAddress to, const ConvGeometry& g, const Runs& runs, const ReductionPlace& at,
                           const Prologue& prologue) const {
    unsigned came = 0;
    const int down = at.row * g.dilation_h, right = at.tap * g.dilation_w * g.c + at.element;
    const int line = g.w * g.c, away = down * line + right;
#pragma unroll
    for (int i = 0; i < Copies::kPerThread; ++i) {
      const SharedAddress chunk = to + chunk_offset(Copies::row(i), Copies::chunk());
      const int column = static_cast<int16_t>(place_[i]) * g.c + right;
      const bool meets = at.row < g.r && static_cast<unsigned>((place_[i] >> 16) + down) < static_cast<unsigned>(g.h);
      if constexpr (kVectors) {
        const bool there = meets && static_cast<unsigned>(column) < static_cast<unsigned>(line);
        copy_async(chunk, there ? x_ + (offset_[i] + away) : x_, there);
        came |= unsigned(there) << i;
      } else {
        const int of_run = runs.length - at.element, of_line = line - column;
        const int from = offset_[i] + away;
        copy_elements<T>(chunk, -column,
                         !meets             ? 0
                         : of_run < of_line ? of_run
                                            : of_line,
                         [&](int j) { return prologue(x_[from + j], at.element + j, g.c); });
      }
    }
    return came;
  }

 private:
  static constexpr int kNowhere = -(1 << 15);  // no filter row reaches the image from there
  const T* x_;
  int place_[Copies::kPerThread], offset_[Copies::kPerThread];  // h and w, 16 bits each; elements from x_
};

// weight: kTileRows outputs from `first` on.
template <class T, int kTileRows, int kThreadsPerBlock, bool kVectors>
class WeightRows {
  using Copies = Copier<T, kTileRows, kThreadsPerBlock>;

 public:
  __device__ WeightRows(const ConvGeometry& g, const void* weight, int first)
      : weight_(static_cast<const T*>(weight)), first_(first + Copies::row(0)) {}

  __device__ void copy(SharedAddress to, const ConvGeometry& g, const Runs& runs, const ReductionPlace& at) const {
    const int step = g.r * g.s * g.c;
    const int within = (at.row * g.s + at.tap) * g.c + at.element;
#pragma unroll
    for (int i = 0; i < Copies::kPerThread; ++i) {
      const SharedAddress chunk = to + chunk_offset(Copies::row(i), Copies::chunk());
      const int output = first_ + i * Copies::kRowsAtOnce;
      const bool there = at.row < g.r && output < g.k;
      const T* from = there ? weight_ + (output * step + within) : weight_;
      if constexpr (kVectors) {
        copy_async(chunk, from, there);
      } else {
        copy_elements<T>(chunk, 0, there ? runs.length - at.element : 0, [&](int j) { return from[j]; });
      }
    }
  }

 private:
  const T* weight_;
  int first_;
};

}  // namespace resnet_fused::cuda
