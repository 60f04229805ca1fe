// What a Gram matrix is made of, in shared memory: rows of up to two tiles of 64 channels, as d = x^ - centre rounded
// to the dtype of a; and how the work is cut.
#pragma once

#include "conv_prologue.cuh"
#include "full_product.cuh"
#include "pool.cuh"

namespace resnet_fused::cuda {

constexpr int kGramCols = 64, kGramThreads = 256, kGramStages = 3, kGramBlocksPerSm = 2;
constexpr int kGramTile = kGramCols * kGramCols;  // elements that a block has
constexpr int kGramLeastRows = 256;               // of a split, so that merging costs less than what it merges

// Rows of both tiles of a pair. Of 16 bits they lie 16 bytes further apart, so that ldmatrix, which takes eight of
// them, touches every bank once.
template <class T>
struct GramStage {
  static constexpr int kRows = 128 / static_cast<int>(sizeof(T));
  static constexpr int kPitch = kGramCols * static_cast<int>(sizeof(T)) + (sizeof(T) == 2 ? 16 : 0);
  static constexpr int kSideBytes = kRows * kPitch, kBytes = 2 * kSideBytes;
  static constexpr int kElements = kChunkElements<T>, kChunksAcross = kGramCols / kElements;
  static_assert(kGramThreads / kChunksAcross * kGramCols * sizeof(float) <= kGramStages * kBytes);
};

// How the work is cut: by pairs of tiles of channels, and by rows.
struct GramSplits {
  int pixels, rows, count;  // all, those of a split but the last, splits
  int tiles, pairs;
  int64_t totals = 0;      // where those of all splits begin in scratch, behind the sums of products
  Divisor columns, lines;  // of an image
  bool dense;              // all pixels of a are taken

  GramSplits(const PixelGrid& g, int channels, int stage_rows)
      : pixels(g.samples * g.rows * g.columns),
        tiles((channels + kGramCols - 1) / kGramCols),
        pairs(tile_pairs(tiles)),
        columns(g.columns > 0 ? g.columns : 1),
        lines(g.rows > 0 ? g.rows : 1),
        dense(g.stride_h == 1 && g.stride_w == 1) {
    const int room = static_cast<int>(multiprocessors()) * kGramBlocksPerSm / pairs, most = pixels / kGramLeastRows;
    const int wanted = room < most ? room : most, stages = (pixels + stage_rows - 1) / stage_rows;
    rows = (wanted > 1 ? (stages + wanted - 1) / wanted : stages) * stage_rows;
    count = pixels == 0 ? 0 : (pixels + rows - 1) / rows;
    totals = static_cast<int64_t>(count) * pairs * kGramTile;
  }
};

// The chunks of one thread: on the diagonal one tile's, else of either tile for half of the threads.
template <class T, bool kVectors, bool kDiagonal>
class GramRows {
  using Stage = GramStage<T>;
  static constexpr int kElements = Stage::kElements;
  static constexpr int kThreadsOfSide = kDiagonal ? kGramThreads : kGramThreads / 2;
  static constexpr int kRowsAtOnce = kThreadsOfSide / Stage::kChunksAcross;
  static constexpr int kPerThread = Stage::kRows / kRowsAtOnce;
  static_assert(Stage::kRows % kRowsAtOnce == 0);

 public:
  __device__ GramRows(const GramParams& p, const TilePair& pair) {
    const int side = static_cast<int>(threadIdx.x) / kThreadsOfSide, within = threadIdx.x % kThreadsOfSide;
    const int column = within % Stage::kChunksAcross * kElements;
    row_ = within / Stage::kChunksAcross;
    channel_ = (side == 0 ? pair.left : pair.right) * kGramCols + column;
    offset_ = side * Stage::kSideBytes + row_ * Stage::kPitch + column * static_cast<int>(sizeof(T));
#pragma unroll
    for (int j = 0; j < kElements; ++j) {  // zeros beyond the last channel, where d is to be zero
      const bool there = channel_ + j < p.channels;
      centre_[j] = there ? p.centre[channel_ + j] : 0.f;
      scale_[j] = there && p.scale ? p.scale[channel_ + j] : 0.f;
      shift_[j] = there && p.scale ? p.shift[channel_ + j] : 0.f;
      total_[j] = kept_[j] = 0.f;
    }
  }

  // Pixels from `first` on to `stage`, of which `rows` are left.
  __device__ void copy(SharedAddress stage, const GramParams& p, const GramSplits& s, int first, int rows) const {
    const int width = p.channels - channel_;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int row = row_ + i * kRowsAtOnce;
      const bool there = row < rows && width > 0;
      const T* from = static_cast<const T*>(p.a);
      if (there) from += source(p.grid, s, first + row) * p.channels + channel_;
      const SharedAddress to = stage + offset_ + i * kRowsAtOnce * Stage::kPitch;
      if constexpr (kVectors) {
        copy_async(to, from, there);
      } else {
        copy_elements<T>(to, 0, there ? width : 0, [&](int j) { return from[j]; });
      }
    }
  }

  // What was copied to `stage` becomes d; zeros stay where there is no row.
  __device__ void shift(SharedAddress stage, const GramParams& p, int rows) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (row_ + i * kRowsAtOnce >= rows) continue;
      const SharedAddress at = stage + offset_ + i * kRowsAtOnce * Stage::kPitch;
      struct alignas(kChunkBytes) Chunk {
        T v[kElements];
      } chunk;
      *reinterpret_cast<uint4*>(&chunk) = load_chunk(at);
      float x[kElements];
#pragma unroll
      for (int j = 0; j < kElements; ++j) x[j] = to_float(chunk.v[j]);
      if (p.scale) activate(x);
#pragma unroll
      for (int j = 0; j < kElements; j += 2) {
        const float first = x[j] - centre_[j], second = x[j + 1] - centre_[j + 1];
        if constexpr (kDiagonal) total_[j] += first, total_[j + 1] += second;
        round_pair(chunk.v + j, first, second);
      }
      store_chunk(at, *reinterpret_cast<const uint4*>(&chunk));
    }
  }

  // The totals of a few stages to those of the split.
  __device__ void keep_totals() {
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      kept_[j] += total_[j];
      total_[j] = 0.f;
    }
  }

  // A tile's totals of all threads to `to`, those of a column in the order of rows; `folded`: in shared memory.
  __device__ void store_totals(float* folded, float* to) const {
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      folded[row_ * kGramCols + threadIdx.x % Stage::kChunksAcross * kElements + j] = kept_[j] + total_[j];
    }
    __syncthreads();
    if (threadIdx.x >= kGramCols) return;
    float total = 0.f;
    for (int row = 0; row < kRowsAtOnce; ++row) total += folded[row * kGramCols + threadIdx.x];
    to[threadIdx.x] = total;
  }

 private:
  // relu(scale*x + shift), rounded as if it had been written.
  __device__ void activate(float (&x)[kElements]) const {
#pragma unroll
    for (int j = 0; j < kElements; j += 2) {
      alignas(4) T pair[2];
      round_pair(pair, activation(x[j], scale_[j], shift_[j]), activation(x[j + 1], scale_[j + 1], shift_[j + 1]));
      x[j] = to_float(pair[0]);
      x[j + 1] = to_float(pair[1]);
    }
  }

  // Which of the image's pixels that of number `pixel` is.
  __device__ static int source(const PixelGrid& g, const GramSplits& s, int pixel) {
    if (s.dense) return pixel;
    const int line = s.columns.divide(pixel), sample = s.lines.divide(line);
    return (sample * g.h + (line - sample * g.rows) * g.stride_h) * g.w + (pixel - line * g.columns) * g.stride_w;
  }

  int row_, channel_, offset_;
  float centre_[kElements], scale_[kElements], shift_[kElements], total_[kElements], kept_[kElements];
};

}  // namespace resnet_fused::cuda
