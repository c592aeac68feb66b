// Philox4x32-10 and the words of kd_kernels/sampling/DRAWS.md, for host and device. Salmon et al. 2011, "Parallel random numbers:
// as easy as 1, 2, 3".
#pragma once

#include <cstdint>

#include "kd/host_device.h"

namespace kd {

constexpr int kGroupIds = 128;  // ids of the vocabulary that share one word of the race

// What words are for: four bits of the counter.
enum Purpose : uint32_t { kRace = 0, kPick = 1, kTargets = 2, kAccept = 3, kResampleRace = 4, kResamplePick = 5 };

struct Words {
  uint32_t w[4];
};

KD_HOST_DEVICE inline Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = static_cast<uint64_t>(c0) * 0xD2511F53u, odd = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(odd >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(odd);
    c2 = static_cast<uint32_t>(even >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(even);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Where a row's words are: seed, key of the sequence, position in it.
struct Place {
  uint64_t seed, key;
  uint32_t position;

  KD_HOST_DEVICE Words words(uint32_t purpose, uint32_t block, uint32_t draw = 0) const {
    return philox(block + (draw << 16) + (purpose << 28), position, static_cast<uint32_t>(key),
                  static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  }
};

// The places of rows: [rows] each.
struct Places {
  const int64_t *seeds, *keys, *positions;

  KD_HOST_DEVICE Place of(int64_t row) const {
    return {static_cast<uint64_t>(seeds[row]), static_cast<uint64_t>(keys[row]), static_cast<uint32_t>(positions[row])};
  }
};

// A word as a number of (0, 1): the middle of its 2^-32, exactly.
KD_HOST_DEVICE inline double uniform(uint32_t word) { return (word + 0.5) * 0x1p-32; }

// The first two words as one number of (0, 1): the middle of its 2^-52, exactly; the 12 lowest bits are not used.
KD_HOST_DEVICE inline double fine_uniform(const Words& words) {
  const uint64_t high = static_cast<uint64_t>(words.w[0]) << 20 | words.w[1] >> 12;
  return (static_cast<double>(high) + 0.5) * 0x1p-52;
}

}  // namespace kd
