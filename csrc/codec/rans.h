// How numbers are coded: as the symbol of their class, by asymmetric numeral systems in interleaved lanes, and as many raw
// bits as the class leaves open. For host and device. FORMAT.md, section 4, is the normative text. Duda 2013,
// "Asymmetric numeral systems"; Giesen 2014, "Interleaved entropy coders".
//
// How likely the classes are depends on the context, and a context is one distribution.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "rows.h"

namespace kd {
namespace KD_ISA {

constexpr int kTotalBits = 11;
constexpr uint32_t kTotal = 1u << kTotalBits;  // frequencies of a distribution add up to this
constexpr uint32_t kLow = 1u << 16;            // a lane's state is at least this, and below 2^32
constexpr uint32_t kLanes = 16;
constexpr uint32_t kClasses = 72;                // of all numbers below 2^32
constexpr uint32_t kEscape = kClasses;
constexpr uint32_t kMaxAlphabet = kClasses + 1;  // and the escape
constexpr int64_t kCodeHeadBytes = 4 * kLanes + 4;

KD_HOST_DEVICE inline uint32_t log2_floor(uint32_t v) {
#ifdef __CUDA_ARCH__
  return 31 - static_cast<uint32_t>(__clz(static_cast<int>(v)));
#else
  return 31 - static_cast<uint32_t>(__builtin_clz(v));
#endif
}

// All ones or zeros, of which the compiler does not know so and makes no branch: for choices that cannot be foreseen.
KD_HOST_DEVICE inline uint32_t mask_of(bool condition) {
  uint32_t mask = 0 - static_cast<uint32_t>(condition);
#ifndef __CUDA_ARCH__
  asm("" : "+r"(mask));
#endif
  return mask;
}

// Classes: 0 to 15 for themselves, then two an octave.
KD_HOST_DEVICE inline uint32_t class_of(uint32_t v) {
  if (v < 16) return v;
  const uint32_t octave = log2_floor(v);
  return 16 + 2 * (octave - 4) + ((v >> (octave - 1)) & 1);
}
KD_HOST_DEVICE constexpr uint32_t class_bits(uint32_t c) { return c < 16 ? 0 : (c - 16) / 2 + 3; }

// What the numbers of a class have in common: number = base + (bits & mask).
struct ClassRange {
  uint32_t base, mask;
  uint64_t bits;  // how many follow
};

struct ClassRanges {
  ClassRange of[kMaxAlphabet];
  KD_HOST_DEVICE constexpr ClassRanges() : of() {
    for (uint32_t c = 0; c < kClasses; ++c) {
      const uint32_t bits = class_bits(c);
      of[c] = {c < 16 ? c : (2 + (c & 1)) << bits, (1u << bits) - 1, bits};
    }
    of[kEscape] = {0, ~0u, 32};
  }
};

KD_HOST_DEVICE inline const ClassRange& range_of(uint32_t number_class) {
  static constexpr ClassRanges kRanges;
  return kRanges.of[number_class];
}

// One word: a slot, or how far one is from the symbol's first; how many slots the symbol has; its class.
struct Symbol {
  uint32_t word;
  KD_HOST_DEVICE static Symbol of(uint32_t slot, uint32_t frequency, uint32_t number_class) {
    return {slot | frequency << kTotalBits | number_class << (2 * kTotalBits + 1)};
  }
  KD_HOST_DEVICE uint32_t slot() const { return word % kTotal; }
  KD_HOST_DEVICE uint32_t frequency() const { return word >> kTotalBits & (2 * kTotal - 1); }
  KD_HOST_DEVICE uint32_t number_class() const { return word >> (2 * kTotalBits + 1); }
  KD_HOST_DEVICE const ClassRange& range() const { return range_of(number_class()); }
};

// How likely the classes are in one context. The last symbol of the alphabet is the escape: 32 raw bits follow. So any
// number can be coded under any distribution, and the least of all, the escape alone, takes no more than those bits.
class Distribution {
 public:
  // frequencies [alphabet], at least 1 each, adding up to kTotal.
  void assign(const uint16_t* frequencies, uint32_t alphabet) {
    alphabet_ = alphabet;
    for (uint32_t s = 0, start = 0; s < alphabet; start += frequencies[s++])
      symbols_[s] = Symbol::of(start, frequencies[s], s + 1 == alphabet ? kEscape : s);
  }

  Symbol of(uint32_t value) const {
    const uint32_t c = class_of(value);
    return symbols_[c + 1 < alphabet_ ? c : alphabet_ - 1];
  }

  // What a reader looks up. slots [kTotal]: the symbol of each, and how far the slot is from the symbol's first.
  void spread(Symbol* slots) const {
    for (uint32_t s = 0; s < alphabet_; ++s)
      for (uint32_t i = 0; i < symbols_[s].frequency(); ++i)
        *slots++ = Symbol::of(i, symbols_[s].frequency(), symbols_[s].number_class());
  }

 private:
  uint32_t alphabet_ = 0;
  Symbol symbols_[kMaxAlphabet];
};

}  // namespace KD_ISA
using namespace KD_ISA;  // of one source there is one
}  // namespace kd
