// Philox4x32-10 (Salmon et al. 2011) and the words of the contract of the draws (kd_kernels/sampling/DRAWS.md), for host and
// device. No state: whoever knows the names of a draw has its words.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define KD_PHILOX static __host__ __device__ __forceinline__
#else
#define KD_PHILOX static inline __attribute__((always_inline))
#endif

namespace kd {

struct Words {
  uint32_t word[4];
};

// What words are for.
enum Purpose : uint32_t { kRace = 0, kPick = 1, kTargets = 2, kAccept = 3, kResampleRace = 4, kResamplePick = 5 };

KD_PHILOX Words philox4x32(Words counter, uint32_t k0, uint32_t k1) {
  uint32_t* c = counter.word;
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t{0xD2511F53u} * c[0], odd = uint64_t{0xCD9E8D57u} * c[2];
    c[0] = static_cast<uint32_t>(odd >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<uint32_t>(odd);
    c[2] = static_cast<uint32_t>(even >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<uint32_t>(even);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

// What names the words of one row: a seed, a sequence key and a position.
struct Place {
  uint64_t seed, key;
  uint32_t position;
};

KD_PHILOX Words words(Place place, uint32_t purpose, uint32_t block, uint32_t draw) {
  const Words counter{{block | draw << 16 | purpose << 28, place.position, static_cast<uint32_t>(place.key),
                       static_cast<uint32_t>(place.key >> 32)}};
  return philox4x32(counter, static_cast<uint32_t>(place.seed), static_cast<uint32_t>(place.seed >> 32));
}

// The middle of a word's 2^-32: exact in fp64, never 0 and never 1.
KD_PHILOX double uniform(uint32_t word) { return (word + 0.5) * 0x1p-32; }

// The middle of the 2^-52 that the upper 52 bits of two words name.
KD_PHILOX double fine_uniform(uint32_t high, uint32_t low) {
  return (static_cast<double>(static_cast<uint64_t>(high) << 20 | low >> 12) + 0.5) * 0x1p-52;
}

}  // namespace kd
