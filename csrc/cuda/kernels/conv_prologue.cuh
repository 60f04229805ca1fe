// What a convolution makes of its input on load: nothing, or relu(scale*x + shift) per channel, in float32 and rounded
// once to the dtype of the data, as if that had been written and read again.
//
// Chunks that cp.async brought past registers are changed where they lie in shared memory, once for all warps that
// multiply them, by the thread that copied them: it waits for its own copies alone, and the barrier that shows them to
// the others comes after. What is outside the image, or beyond the last pixel, stays zero.
#pragma once

#include "gather.cuh"

namespace resnet_fused::cuda {

template <class T>
__device__ inline float activation(T x, float scale, float shift) {
  const float y = fmaf(scale, to_float(x), shift);  // by name: the backward recomputes this sign and must round alike
  return y < 0.f ? 0.f : y;                         // not fmaxf, which would drop NaN
}

template <class T>
__device__ inline T activated(T x, float scale, float shift) {
  return from_float<T>(activation(x, scale, shift));
}

// A prologue is called with an element of the reduction within a run, and says by InPlace what becomes of the chunks of
// one thread in shared memory. kAhead: steps that are copied beyond the one that is awaited.
struct AsItIs {
  template <class T>
  __device__ T operator()(T x, int, int) const {
    return x;
  }

  template <class T, int kTileRows, int kThreadsPerBlock, int kAhead>
  struct InPlace {
    __device__ void copied(unsigned) {}
    template <class Prologue>
    __device__ void fetch(const Prologue&, int, int) {}
    __device__ void apply(SharedAddress) {}
  };
};

// Element by element, where speed is not what counts, it serves a plain input too: scale is null then.
struct NormRelu {
  const float *scale, *shift;  // [C]

  template <class T>
  __device__ T operator()(T x, int element, int channels) const {
    if (!scale) return x;
    while (element >= channels) element -= channels;  // a run is of as many pixels as a filter row has taps, or of one
    return activated(x, scale[element], shift[element]);
  }

  // With kVectors: chunks lie within the channels of a pixel, and the vectors at multiples of 16 bytes.
  template <class T, int kTileRows, int kThreadsPerBlock, int kAhead>
  class InPlace {
    using Copies = Copier<T, kTileRows, kThreadsPerBlock>;
    static constexpr int kElements = kChunkElements<T>;
    static_assert(Copies::kPerThread * (kAhead + 1) <= 32);

   public:
    // Of the next step: what PixelRows::copy returned.
    __device__ void copied(unsigned came) { came_ = came_ << Copies::kPerThread | came; }

    // Scale and shift of the step that is next to be awaited, which begins at `element`: on their way meanwhile.
    __device__ void fetch(const NormRelu& prologue, int element, int channels) {
      int channel = element + Copies::chunk() * kElements;
      if (channel >= channels) channel %= channels;  // behind the last channel is the next tap's first
#pragma unroll
      for (int i = 0; i < kElements / 4; ++i) {
        reinterpret_cast<uint4*>(scale_)[i] = reinterpret_cast<const uint4*>(prologue.scale + channel)[i];
        reinterpret_cast<uint4*>(shift_)[i] = reinterpret_cast<const uint4*>(prologue.shift + channel)[i];
      }
    }

    // To that step, in `stage`.
    __device__ void apply(SharedAddress stage) const {
      const unsigned came = came_ >> Copies::kPerThread * kAhead;
#pragma unroll
      for (int i = 0; i < Copies::kPerThread; ++i) {
        if (!(came >> i & 1u)) continue;
        const SharedAddress at = stage + chunk_offset(Copies::row(i), Copies::chunk());
        struct alignas(kChunkBytes) Chunk {
          T v[kElements];
        } chunk;
        *reinterpret_cast<uint4*>(&chunk) = load_chunk(at);
#pragma unroll
        for (int j = 0; j < kElements; ++j) chunk.v[j] = activated(chunk.v[j], scale_[j], shift_[j]);
        store_chunk(at, *reinterpret_cast<const uint4*>(&chunk));
      }
    }

   private:
    unsigned came_ = 0;
    alignas(16) float scale_[kElements], shift_[kElements];
  };
};

// f(prologue) with the one that serves: two kernels where a plain input is one of its own, else one.
template <bool kPlain, class F>
void with_prologue(const float* scale, const float* shift, const F& f) {
  if constexpr (kPlain) {
    if (!scale) return f(AsItIs{});
  }
  f(NormRelu{scale, shift});
}

}  // namespace resnet_fused::cuda
