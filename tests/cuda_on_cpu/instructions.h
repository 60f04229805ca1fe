// What csrc/cuda/kernels/instructions.cuh has of a GPU, on the CPU. Which lane holds what of a matrix is as the PTX
// documentation draws it ("Matrix Fragments for mma.m16n8k16", ".m16n8k8", "ldmatrix"); test_instructions.py compares
// with a plain product.
#pragma once

namespace resnet_fused::cuda {

namespace on_cpu = ::cuda_on_cpu;

inline unsigned multiprocessors() { return on_cpu::multiprocessors; }

template <class Kernel>
void allow_shared(Kernel, int) {}

using SharedAddress = unsigned char*;
inline SharedAddress shared_address(void* p) { return static_cast<unsigned char*>(p); }

inline void make_copy(const on_cpu::Copy& copy) {
  on_cpu::copy_is_made(copy.to, 16);
  copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
}

inline void check_shared(const void* p) {
  const auto* at = static_cast<const unsigned char*>(p);
  const unsigned char* begin = on_cpu::shared.data();
  if (at < begin || at + 16 > begin + on_cpu::shared.size()) on_cpu::stop("an address is outside shared memory");
  if ((at - begin) % 16 != 0) on_cpu::stop("an address in shared memory is not a multiple of 16 bytes");
}

inline void copy_async(SharedAddress to, const void* from, bool there) {
  const on_cpu::Emulating now;
  check_shared(to);
  if (there && reinterpret_cast<uintptr_t>(from) % 16 != 0) on_cpu::stop("copies from an address that is not aligned");
  const on_cpu::Copy copy{to, there ? from : nullptr, on_cpu::current->group};
  if (there) on_cpu::read_memory(from, 16);
  if (!on_cpu::copies_wait) return make_copy(copy);
  on_cpu::copy_starts(to, 16);
  on_cpu::current->copies.push_back(copy);
}

inline void store_chunk(SharedAddress to, uint4 chunk) {
  const on_cpu::Emulating now;
  check_shared(to);
  on_cpu::write_memory(to, 16);
  std::memcpy(to, &chunk, 16);
}

inline uint4 load_chunk(SharedAddress from) {
  const on_cpu::Emulating now;
  check_shared(from);
  on_cpu::read_memory(from, 16);
  uint4 chunk;
  std::memcpy(&chunk, from, 16);
  return chunk;
}

inline void commit_copies() {
  const on_cpu::Emulating now;
  ++on_cpu::current->group;
}

// Until at most kGroups of the committed groups of this thread are on their way.
template <int kGroups>
void wait_for_copies() {
  const on_cpu::Emulating now;
  std::vector<on_cpu::Copy>& copies = on_cpu::current->copies;
  const int64_t until = on_cpu::current->group - kGroups;
  const auto later = std::find_if(copies.begin(), copies.end(), [&](const auto& c) { return c.group >= until; });
  std::for_each(copies.begin(), later, make_copy);
  copies.erase(copies.begin(), later);
}

// What a lane brings to ldmatrix.
struct MatrixLane {
  uint32_t* to;
  const unsigned char* row;
};

// Four 8x8 matrices of 16-bit values. Lane i names row i % 8 of matrix i / 8, and receives of every matrix two
// neighbours of row i / 4: those of columns 2 * (i % 4) and the next.
inline void load_matrices(uint32_t (&to)[4], SharedAddress row) {
  const on_cpu::Emulating now;
  MatrixLane mine{to, row};
  check_shared(row);
  on_cpu::read_memory(row, 16);
  on_cpu::together("ldmatrix", mine, [](MatrixLane* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        std::memcpy(&lanes[lane]->to[matrix], lanes[8 * matrix + lane / 4]->row + 4 * (lane % 4), 4);
      }
    }
  });
}

// Their transposes: two neighbours of column i / 4, of rows 2 * (i % 4) and the next.
inline void load_matrices_transposed(uint32_t (&to)[4], SharedAddress row) {
  const on_cpu::Emulating now;
  MatrixLane mine{to, row};
  check_shared(row);
  on_cpu::read_memory(row, 16);
  on_cpu::together("ldmatrix.trans", mine, [](MatrixLane* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {  // of a pair of each matrix one value
        const unsigned char* from = lanes[8 * (i / 2) + 2 * (lane % 4) + i % 2]->row + 2 * (lane / 4);
        std::memcpy(reinterpret_cast<unsigned char*>(lanes[lane]->to) + 2 * i, from, 2);
      }
    }
  });
}

inline uint32_t load_word(SharedAddress from) {
  const on_cpu::Emulating now;
  check_shared(from - (from - on_cpu::shared.data()) % 16);
  on_cpu::read_memory(from, 4);
  uint32_t word;
  std::memcpy(&word, from, 4);
  return word;
}

inline int anew(int value) { return value; }

inline float from_lane_xor(float value, int mask) {
  struct Lane {
    float given;
    int mask;
    float got;
  } mine{value, mask, 0.f};
  on_cpu::together("shfl", mine, [](Lane* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) lanes[lane]->got = lanes[lane ^ lanes[lane]->mask]->given;
  });
  return mine.got;
}

inline float of_tf32(uint32_t bits) {
  bits &= ~0x1FFFu;  // the hardware does not look at the lower bits
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// As cvt.rna.tf32.f32: to nearest, ties away from zero; NaN and infinity stay.
inline uint32_t to_tf32(uint32_t bits) { return (bits & 0x7F800000u) == 0x7F800000u ? bits : bits + 0x1000u; }

// Element of a fragment's 16-bit pairs, or of its TF32 words.
template <class T>
float fragment_element(const uint32_t* words, int i) {
  if constexpr (sizeof(T) == 4) {
    return of_tf32(words[i]);
  } else {
    T pair[2];
    std::memcpy(pair, &words[i / 2], 4);
    if constexpr (std::is_same_v<T, __half>) return __half2float(pair[i % 2]);
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(pair[i % 2]);
  }
}

// sum[16][8] += a[16][k] * b[k][8], k being 16, or 8 of TF32.
template <class T>
void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Lane {
    float* sum;
    const uint32_t *a, *b;
  } mine{sum, a, b};
  on_cpu::together("mma", mine, [](Lane* const* lanes) {
    constexpr int kDepth = 32 / sizeof(T), kPair = 4 / sizeof(T);
    float left[16][kDepth], right[kDepth][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, within = lane % 4;
      for (int i = 0; i < 4 * kPair; ++i) {
        const int word = i / kPair;
        const int column = within * kPair + i % kPair + (word >= 2 ? kDepth / 2 : 0);
        left[group + 8 * (word % 2)][column] = fragment_element<T>(lanes[lane]->a, i);
        if (word < 2)
          right[within * kPair + i % kPair + word * kDepth / 2][group] = fragment_element<T>(lanes[lane]->b, i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        double total = lanes[lane]->sum[i];
        for (int k = 0; k < kDepth; ++k) total += double(left[row][k]) * right[k][column];
        lanes[lane]->sum[i] = static_cast<float>(total);
      }
    }
  });
}

}  // namespace resnet_fused::cuda
