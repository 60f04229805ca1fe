// Normalise, clamp and pool: one read of z, one write of the pooled output and of the winners' places.
//
// Each row of activations is computed once, into a ring of as many rows as a window has, which the second-level cache
// holds; windows then compare what lies there.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../checks/norm_relu_pool.h"
#include "alloc.h"
#include "pool.h"
#include "rows.h"

namespace resnet_fused::cpu {
namespace {

// What activations are compared by: their bits if they have 16, which are in order and half as wide as a float.
template <class T>
struct Key {
  using type = T;
  RESNET_FUSED_INLINE static T of(T value) { return value; }
  RESNET_FUSED_INLINE static T value(T key) { return key; }
  RESNET_FUSED_INLINE static bool is_nan(T key) { return key != key; }
};
template <class T, int16_t infinity>
struct Key16 {
  using type = int16_t;
  RESNET_FUSED_INLINE static int16_t of(T value) { return value.bits & 0x7FFF; }  // only NaN can have a sign
  RESNET_FUSED_INLINE static T value(int16_t key) { return {static_cast<uint16_t>(key)}; }
  RESNET_FUSED_INLINE static bool is_nan(int16_t key) { return key > infinity; }
};
template <>
struct Key<BFloat16> : Key16<BFloat16, 0x7F80> {};
template <>
struct Key<Half> : Key16<Half, 0x7C00> {};

template <class T>
using KeyOf = typename Key<T>::type;
// As wide as a key, so that one mask selects both.
template <class T>
using PlaceOf = std::conditional_t<sizeof(T) == 8, int64_t, std::conditional_t<sizeof(T) == 4, int32_t, int16_t>>;

// Keys of relu(scale*z + shift), rounded to T, for rows of C. NaN passes; zeros lose their sign, so that bits are in
// order.
template <class T, class A = acc_t<T>>
RESNET_FUSED_CLONES void activate(KeyOf<T>* __restrict keys, const T* __restrict z, const A* __restrict scale,
                                  const A* __restrict shift, int64_t rows, int64_t C) {
  for (int64_t m = 0; m < rows; ++m, keys += C, z += C) {
    for (int64_t c = 0; c < C; ++c) {
      const A y = load(z + c) * scale[c] + shift[c];
      T a;
      store(&a, y <= 0 ? A(0) : y);
      keys[c] = Key<T>::of(a);
    }
  }
}

template <class T>
struct Candidate {
  const KeyOf<T>* key;  // [C]
  PlaceOf<T> place;
};

template <class T>
RESNET_FUSED_INLINE void challenge(KeyOf<T>& best, PlaceOf<T>& where, KeyOf<T> key, PlaceOf<T> place) {
  const bool wins = (key > best) | Key<T>::is_nan(key);
  best = wins ? key : best;
  where = wins ? place : where;
}

// The winners among `more ? best : nothing` and some candidates, in scanning order.
template <class T, bool more, size_t... t>
RESNET_FUSED_INLINE void compare(KeyOf<T>* __restrict best, PlaceOf<T>* __restrict where,
                                 const Candidate<T>* candidates, int64_t C, std::index_sequence<t...>) {
  const KeyOf<T>* const keys[] = {candidates[t].key...};
  const PlaceOf<T> places[] = {candidates[t].place...};
  for (int64_t c = 0; c < C; ++c) {
    KeyOf<T> winner = more ? best[c] : keys[0][c];
    PlaceOf<T> place = more ? where[c] : places[0];
    (challenge<T>(winner, place, keys[t][c], places[t]), ...);
    best[c] = winner;
    where[c] = place;
  }
}

constexpr int kGroup = 3;  // candidates compared at a time

// Rows of keys that a row of windows covers, the topmost at place `place`.
template <class T>
struct Rows {
  const KeyOf<T>* const* rows;
  int64_t count, place;
  const char* ahead;    // what will be activated next
  int64_t ahead_bytes;  // of it, for each window
};

// One row of windows; meanwhile what comes next is fetched. best and where are scratch [C].
template <class T>
RESNET_FUSED_CLONES void pool_row(T* __restrict out, uint8_t* __restrict index, const Rows<T>& rows, const PoolAxis& w,
                                  int64_t C, KeyOf<T>* __restrict best, PlaceOf<T>* __restrict where) {
  constexpr auto each = std::make_index_sequence<kGroup>();
  Candidate<T> candidates[kGroup];
  for (int64_t o = 0; o < w.windows; ++o, out += C, index += C) {
    for (int64_t b = 0; b < rows.ahead_bytes; b += 64) __builtin_prefetch(rows.ahead + o * rows.ahead_bytes + b, 0, 2);
    const int64_t start = w.start(o), left = std::max<int64_t>(0, start), right = std::min(w.size, start + w.kernel);
    int count = 0;
    bool more = false;
    for (int64_t r = 0; r < rows.count; ++r) {
      for (int64_t x = left; x < right; ++x) {
        candidates[count] = {rows.rows[r] + x * C, static_cast<PlaceOf<T>>(rows.place + r * w.kernel + x - start)};
        if (++count < kGroup) continue;
        more ? compare<T, true>(best, where, candidates, C, each) : compare<T, false>(best, where, candidates, C, each);
        more = true;
        count = 0;
      }
    }
    if (count > 0) {  // a candidate given again changes nothing
      for (int i = count; i < kGroup; ++i) candidates[i] = candidates[count - 1];
      more ? compare<T, true>(best, where, candidates, C, each) : compare<T, false>(best, where, candidates, C, each);
    }
    for (int64_t c = 0; c < C; ++c) {
      out[c] = Key<T>::value(best[c]);
      index[c] = static_cast<uint8_t>(where[c]);
    }
  }
}

template <class T>
void run(const PoolShape& shape, const Tensor& z, const Tensor& scale, const Tensor& shift, const Tensor& out,
         const Tensor& index) {
  using A = acc_t<T>;
  const PoolAxis &h = shape.h, &w = shape.w;
  const int64_t C = shape.channels, in_row = w.size * C, out_row = w.windows * C;
  const int64_t grain = std::max<int64_t>(1, 65536 / (in_row * h.stride));  // a thread's first row is computed alone
  torch::stable::parallel_for(0, shape.samples * h.windows, grain, [&](int64_t begin, int64_t end) {
    std::vector<KeyOf<T>> ring(h.kernel * in_row), best(C);
    std::vector<PlaceOf<T>> where(C);
    std::vector<const KeyOf<T>*> rows(h.kernel);
    int64_t next = 0;  // rows of z before this one are activated
    for (int64_t y = begin; y < end; ++y) {
      const int64_t sample = y / h.windows, start = h.start(y % h.windows), image = sample * h.size;
      const int64_t top = std::max<int64_t>(0, start), bottom = std::min(h.size, start + h.kernel);
      for (next = std::max(next, image + top); next < image + bottom; ++next) {
        KeyOf<T>* keys = &ring[(next % h.kernel) * in_row];
        activate(keys, data<T>(z) + next * in_row, data<A>(scale), data<A>(shift), w.size, C);
      }
      for (int64_t i = top; i < bottom; ++i) rows[i - top] = &ring[((image + i) % h.kernel) * in_row];
      const int64_t ahead = y + 1 < end ? std::min(h.stride * in_row, z.numel() - next * in_row) * sizeof(T) : 0;
      const Rows<T> covered{rows.data(), bottom - top, (top - start) * w.kernel,
                            reinterpret_cast<const char*>(data<T>(z) + next * in_row), ahead / w.windows};
      pool_row<T>(data<T>(out) + y * out_row, data<uint8_t>(index) + y * out_row, covered, w, C, best.data(),
                  where.data());
    }
  });
}

std::tuple<Tensor, Tensor> norm_relu_pool(const Tensor& z, const Tensor& scale, const Tensor& shift,
                                          const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                                          const std::vector<int64_t>& padding) {
  check_norm_relu_pool(z, scale, shift, kernel, stride, padding);
  const PoolShape shape(z, kernel, stride, padding);
  const Tensor out = shape.empty_pooled(z.scalar_type()), index = shape.empty_pooled(ScalarType::Byte);
  for_element_type(z.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    run<T>(shape, z, scale, shift, out, index);
  });
  return {out, index};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("norm_relu_pool", TORCH_BOX(&norm_relu_pool)); }

}  // namespace resnet_fused::cpu
