// Tiles of values that are no tensors: the gradient before a batch norm, and its input behind a norm and a ReLU, both
// made on load, in float32, and rounded once to the dtype of the data, as if they had been written and read again.
//
// A thread loads its chunks of the next step into registers while the block multiplies this one, applies what is to be
// applied and stores them to shared memory (shared_columns.cuh). What does not exist is zero, whatever the vectors
// are. Per step and chunk column the vectors come out of L1.
#pragma once

#include "../../gradient_params.h"
#include "shared_columns.cuh"

namespace resnet_fused::cuda {

// An SM's blocks: what is on its way takes registers, however small tiles are.
constexpr int kGradientBlocks = 2;

// A chunk on its way, in words: each value of 16 bits would take a register of its own.
template <class T>
struct alignas(kChunkBytes) LazyChunk {
  static constexpr int kPerWord = 4 / static_cast<int>(sizeof(T)), kWords = kChunkBytes / 4;
  static constexpr int kOfFour = 4 / kPerWord;  // words of four values
  uint32_t words[kWords];

  __device__ float value(int i) const {
    T values[kPerWord];
    memcpy(values, &words[i / kPerWord], 4);
    return to_float(values[i % kPerWord]);
  }

  __device__ uint4 bits() const { return {words[0], words[1], words[2], words[3]}; }

  // Of the first four, changed(value, its number).
  template <class New>
  __device__ void change_four(const New& changed) {
#pragma unroll
    for (int word = 0; word < kOfFour; ++word) {
      T values[kPerWord];
      memcpy(values, &words[word], 4);
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) values[i] = changed(values[i], word * kPerWord + i);
      memcpy(&words[word], values, 4);
    }
  }

  // The next four become the first ones: what a loop without copies of its body sees. As often as there are fours, it
  // changes nothing.
  __device__ void turn() {
#pragma unroll
    for (int i = 0; i < kWords - kOfFour; ++i) {
      const uint32_t first = words[i];
      words[i] = words[i + kOfFour];
      words[i + kOfFour] = first;
    }
  }
};

// `count` values, zeros behind them; with kVectors all or none.
template <class T, bool kVectors>
__device__ inline LazyChunk<T> load_chunk_of(const void* base, int at, int count) {
  const T* from = static_cast<const T*>(base) + at;
  LazyChunk<T> chunk;
  if constexpr (kVectors) {
    uint4 bits = {0u, 0u, 0u, 0u};
    if (count > 0) bits = *reinterpret_cast<const uint4*>(from);
    chunk = {{bits.x, bits.y, bits.z, bits.w}};
  } else {
    T values[kChunkElements<T>];
#pragma unroll
    for (int i = 0; i < kChunkElements<T>; ++i) values[i] = i < count ? from[i] : from_float<T>(0.f);
    memcpy(chunk.words, values, kChunkBytes);
  }
  return chunk;
}

// Eight values on their way.
template <class T>
struct LazyGroup {
  static constexpr int kParts = kGroup / kChunkElements<T>;
  LazyChunk<T> parts[kParts];

  __device__ float value(int i) const { return parts[i / kChunkElements<T>].value(i % kChunkElements<T>); }
};

template <class T, bool kVectors>
__device__ inline LazyGroup<T> load_group_of(const void* base, int at, int count) {
  LazyGroup<T> group;
#pragma unroll
  for (int i = 0; i < LazyGroup<T>::kParts; ++i) {
    const int first = i * kChunkElements<T>;
    group.parts[i] = load_chunk_of<T, kVectors>(base, count > first ? at + first : 0, count - first);
  }
  return group;
}

// Four values of a vector from `at` on, `absent` where there is none; zeros behind the last of `size`.
template <bool kVectors>
__device__ inline void load_four(float (&to)[4], const float* vector, int at, int size, float absent) {
  if (kVectors && vector && at < size) {
    const uint4 bits = *reinterpret_cast<const uint4*>(vector + at);
    to[0] = reinterpret_cast<const float*>(&bits)[0];
    to[1] = reinterpret_cast<const float*>(&bits)[1];
    to[2] = reinterpret_cast<const float*>(&bits)[2];
    to[3] = reinterpret_cast<const float*>(&bits)[3];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = !vector ? absent : !kVectors && at + i < size ? vector[at + i] : 0.f;
  }
}

// The lazy gradient's vectors of four channels.
template <bool kVectors>
struct GradientVectors {
  float a[4], b[4], d[4], scale[4], shift[4];

  __device__ GradientVectors(const LazyGradient& p, int channel) {
    load_four<kVectors>(a, p.a, channel, p.channels, 1.f);
    if (p.b) {
      load_four<kVectors>(b, p.b, channel, p.channels, 0.f);
      load_four<kVectors>(d, p.d, channel, p.channels, 0.f);
    }
    if (p.scale) {
      load_four<kVectors>(scale, p.scale, channel, p.channels, 0.f);
      load_four<kVectors>(shift, p.shift, channel, p.channels, 0.f);
    }
  }

  // dz of channel i of them.
  __device__ float apply(const LazyGradient& p, int i, float g, float z, bool keep, float factor) const {
    if (p.scale) keep = !(fmaf(scale[i], z, shift[i]) <= 0.f);  // fmaf as in the forward, whose sign this is
    float value = keep ? g : 0.f;                               // a select: a masked NaN becomes 0
    value = factor * value * a[i];
    if (p.b) value += fmaf(b[i], z, d[i]);  // else a NaN in z would come through
    return value;
  }
};

__device__ inline bool is_plain(const LazyGradient& p) {
  return !p.a && !p.b && !p.mask && !p.scale && !p.sample_factor;
}

__device__ inline float factor_of(const LazyGradient& p, int row) {
  return p.sample_factor && row < p.rows ? p.sample_factor[row / p.rows_per_sample] : 1.f;
}

// Bits of the channels from `channel` on, those of a chunk of them first.
__device__ inline unsigned keep_bits(const LazyGradient& p, int row, int channel) {
  return p.mask ? unsigned(p.mask[row * ((p.channels + 7) / 8) + channel / 8]) >> channel % 8 : 0xFFu;
}

// Of the lazy gradient kRows rows of kChannels channels.
template <class T, int kRows, int kChannels, bool kVectors>
class GradientTile {
  using Mine = TileChunks<T, kRows, kChannels>;
  static constexpr int kElements = kChunkElements<T>;
  static_assert(Mine::kPerThread <= 4);

 public:
  __device__ void fetch(const LazyGradient& p, int first_row, int first_channel) {
    first_row = anew(first_row) + Mine::row();  // else offsets of all rows would be kept through the products
    const int channel = first_channel + Mine::column();
    bits_ = 0;
#pragma unroll
    for (int i = 0; i < Mine::kPerThread; ++i) {
      const int row = first_row + i * Mine::kRowsAtOnce, count = row < p.rows ? p.channels - channel : 0;
      const int at = count > 0 ? row * p.channels + channel : 0;
      g_[i] = load_chunk_of<T, kVectors>(p.g, at, count);
      if (p.z) z_[i] = load_chunk_of<T, kVectors>(p.z, at, count);
      if (count > 0) bits_ |= (keep_bits(p, row, channel) & 0xFFu) << 8 * i;
    }
  }

  __device__ void store(const LazyGradient& p, SharedAddress to, int first_row, int first_channel) {
    store(p, to, first_row, first_channel, [](const LazyChunk<T>&) {});
  }

  // What was fetched, from the same place; `each(chunk)` sees what is stored.
  template <class Each>
  __device__ void store(const LazyGradient& p, SharedAddress to, int first_row, int first_channel, const Each& each) {
    first_row = anew(first_row) + Mine::row();
    const int channel = first_channel + Mine::column();
    if (!is_plain(p)) {
#pragma unroll 1  // there are registers for the vectors of four channels at a time
      for (int four = 0; four < kElements; four += 4) {
        const GradientVectors<kVectors> vectors(p, channel + four);
#pragma unroll
        for (int i = 0; i < Mine::kPerThread; ++i) {
          const int row = first_row + i * Mine::kRowsAtOnce, count = row < p.rows ? p.channels - channel - four : 0;
          const float factor = factor_of(p, row);
          const unsigned bits = bits_ >> (8 * i + four);
          g_[i].change_four([&](T g, int j) {
            const float z = p.z ? z_[i].value(j) : 0.f,
                        dz = vectors.apply(p, j, to_float(g), z, bits >> j & 1u, factor);
            return from_float<T>(j < count ? dz : 0.f);
          });
          g_[i].turn();
          z_[i].turn();
        }
      }
    }
    to += Mine::offset();
#pragma unroll
    for (int i = 0; i < Mine::kPerThread; ++i) {
      each(g_[i]);
      store_chunk(to + i * Mine::kApart, g_[i].bits());
    }
  }

 private:
  LazyChunk<T> g_[Mine::kPerThread], z_[Mine::kPerThread];
  unsigned bits_;  // of each chunk a byte
};

// The pixel of x, counted through the whole tensor, that a row of the result read.
__device__ inline int pixel_of(const LazyInput& p, int row) {
  if (p.stride_h == 1 && p.stride_w == 1) return row;
  const int line = row / p.q, sample = line / p.p;
  return (sample * p.h + (line - sample * p.p) * p.stride_h) * p.w + (row - line * p.q) * p.stride_w;
}

// Of the input behind its norm and ReLU kRows rows of kChannels channels.
template <class T, int kRows, int kChannels, bool kVectors>
class InputTile {
  using Mine = TileChunks<T, kRows, kChannels>;
  static constexpr int kElements = kChunkElements<T>;

 public:
  __device__ void fetch(const LazyInput& p, int first_row, int first_channel) {
    first_row = anew(first_row) + Mine::row();
    const int channel = first_channel + Mine::column();
#pragma unroll
    for (int i = 0; i < Mine::kPerThread; ++i) {
      const int row = first_row + i * Mine::kRowsAtOnce;
      const bool there = row < p.rows && channel < p.channels;
      const int at = there ? pixel_of(p, row) * p.channels + channel : 0;
      x_[i] = load_chunk_of<T, kVectors>(p.x, at, there ? p.channels - channel : 0);
    }
  }

  __device__ void store(const LazyInput& p, SharedAddress to, int first_row, int first_channel) {
    first_row = anew(first_row) + Mine::row();
    const int channel = first_channel + Mine::column();
    if (p.scale) {
#pragma unroll 1
      for (int four = 0; four < kElements; four += 4) {
        float scale[4], shift[4];
        load_four<kVectors>(scale, p.scale, channel + four, p.channels, 0.f);
        load_four<kVectors>(shift, p.shift, channel + four, p.channels, 0.f);
#pragma unroll
        for (int i = 0; i < Mine::kPerThread; ++i) {
          const int count = first_row + i * Mine::kRowsAtOnce < p.rows ? p.channels - channel - four : 0;
          x_[i].change_four(
              [&](T x, int j) { return j < count ? activated(x, scale[j], shift[j]) : from_float<T>(0.f); });
          x_[i].turn();
        }
      }
    }
    to += Mine::offset();
#pragma unroll
    for (int i = 0; i < Mine::kPerThread; ++i) {
      store_chunk(to + i * Mine::kApart, x_[i].bits());
    }
  }

 private:
  LazyChunk<T> x_[Mine::kPerThread];
};

// The vectors and tensors of both, for whether chunks and vectors are whole.
inline bool aligned(const LazyGradient& p) {
  return aligned(p.g) && aligned(p.z) && aligned(p.a) && aligned(p.b) && aligned(p.d) && aligned(p.scale) &&
         aligned(p.shift);
}
inline bool aligned(const LazyInput& p) { return aligned(p.x) && aligned(p.scale) && aligned(p.shift); }

}  // namespace resnet_fused::cuda
