// What the numbers of a row are coded with, and what they mean, for host and device. FORMAT.md, section 4, is the normative
// text.
#pragma once

#include "rans.h"

namespace kd {
namespace KD_ISA {

constexpr uint32_t kFractions = 256;      // of a step, for the first entry of a row
constexpr double kTailFinesse = 4;        // the tail's log-odds are stored to step / 4
constexpr double kLogZFinesse = 16;       // log Z to step / 16
constexpr uint32_t kMaxLevel = 1u << 30;
constexpr uint32_t kMaxTailLevel = 1 << 20;  // that a tail is predicted from
constexpr uint32_t kPlaces = 8, kOctaves = 14, kRankLevels = 32;
constexpr uint32_t kTop = 16, kDeep = 8192;  // ranks below kTop are final; from kDeep on they rise faster

KD_HOST_DEVICE inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

KD_HOST_DEVICE inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Contexts. A gap depends on the place in the row; a rank on that, too, or, where the entry has the level of the one
// before, on the octave of the rank before; and on whether the next entry has the same level.
enum Context : uint32_t { kCount, kTail, kCutTail, kNext, kNextLevel, kIdLevel, kWeight, kGap, kRank = kGap + kPlaces,
                          kTie = kRank + 2 * kPlaces, kLogZ = kTie + 2 * kOctaves };

enum Next : uint32_t { kNotKnown, kImpossible, kNotKept, kEntry };  // kEntry + j: the row's entry j

KD_HOST_DEVICE inline uint32_t context_count(const RowLayout& layout) { return kLogZ + layout.temperatures; }

KD_HOST_DEVICE inline uint32_t place_of(uint32_t j) {
  const uint32_t place = j == 0 ? 0 : 1 + log2_floor(j);
  return place < kPlaces ? place : kPlaces - 1;
}

// Where an entry has the level of the one before it, and where the next one has its. Entry 0 is apart: it stays the
// first.
enum Company : uint8_t { kIsFollowed = 1, kIsTie = 2 };

// before: the rank of the entry before, below 2^24, so that fp32 holds it. Its exponent is the octave.
KD_HOST_DEVICE inline uint32_t rank_context(uint32_t place, uint32_t company, uint32_t before) {
  const uint32_t octave = (bits_of(static_cast<float>(static_cast<int32_t>(before | 1))) >> 23) - 127;
  const uint32_t tie = kPlaces + (octave < kOctaves ? octave : kOctaves - 1);
  return kRank + (company & kIsFollowed) + 2 * (company & kIsTie ? tie : place);
}

// An id that came moves from its rank to this one, and that one's id to its.
KD_HOST_DEVICE inline uint32_t promoted(uint32_t rank) { return rank >> ((rank >= kTop) + (rank >= kDeep)); }

// What a tail is expected to be, from the level of the last entry.
KD_HOST_DEVICE inline int64_t tail_of_level(uint32_t level) {
  return -static_cast<int64_t>(kTailFinesse) * (level < kMaxTailLevel ? level : kMaxTailLevel);
}

KD_HOST_DEVICE inline int64_t unzigzag(uint32_t v) { return v & 1 ? -static_cast<int64_t>(v / 2) - 1 : v / 2; }

}  // namespace KD_ISA
}  // namespace kd
