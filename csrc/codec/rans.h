// Bytes to numbers: range coding with asymmetric numeral systems in four interleaved lanes, and raw bits beside it.
// For host and device. FORMAT.md, section 4, is the normative text. Duda 2013, "Asymmetric numeral systems"; Giesen
// 2014, "Interleaved entropy coders".
//
// A number is coded as the symbol of its class and as many raw bits as the class leaves open. How likely the classes
// are depends on the context, and a context is one distribution. Nothing here trusts the bytes that it reads: a
// reader that runs past their end goes on with zeros, writes nothing, and says so when it is asked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kd/host_device.h"

namespace kd {

constexpr int kTotalBits = 12;
constexpr uint32_t kTotal = 1u << kTotalBits;  // frequencies of a distribution add up to this
constexpr uint32_t kLow = 1u << 16;            // a lane's state is at least this, and below 2^32
constexpr uint32_t kLanes = 4;
constexpr uint32_t kClasses = 72;                // of all numbers below 2^32
constexpr uint32_t kEscape = kClasses;
constexpr uint32_t kMaxAlphabet = kClasses + 1;  // and the escape
constexpr int64_t kCodeHeadBytes = 4 * kLanes + 4;

struct Span {
  const uint8_t* data;
  size_t size;
};

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

// One word: the first slot, how many there are, and the class.
struct Symbol {
  uint32_t word;
  KD_HOST_DEVICE uint32_t start() const { return word % kTotal; }
  KD_HOST_DEVICE uint32_t frequency() const { return word >> kTotalBits & (2 * kTotal - 1); }
  KD_HOST_DEVICE uint32_t number_class() const { return word >> (2 * kTotalBits + 1); }
  KD_HOST_DEVICE const ClassRange& range() const { return range_of(number_class()); }
};

// How likely the classes are in one context. The last symbol of the alphabet is the escape: 32 raw bits follow. So any
// number can be coded under any distribution, and the least of all, the escape alone, takes no more than those bits.
//
// A distribution is small, so that those of all contexts stay in the cache next to the core: a symbol is found from
// the first one of its bucket of slots, mostly without a step that depends on the data.
class Distribution {
 public:
  // frequencies [alphabet], at least 1 each, adding up to kTotal.
  KD_HOST_DEVICE void assign(const uint16_t* frequencies, uint32_t alphabet) {
    alphabet_ = alphabet;
    uint32_t start = 0;
    for (uint32_t s = 0; s < alphabet; ++s) {
      const uint32_t number_class = s + 1 == alphabet ? kEscape : s;
      symbols_[s].word = start | uint32_t{frequencies[s]} << kTotalBits | number_class << (2 * kTotalBits + 1);
      starts_[s] = static_cast<uint16_t>(start);
      const uint32_t stop = start + frequencies[s];
      for (uint32_t bucket = (start + kBucketSlots - 1) / kBucketSlots; bucket * kBucketSlots < stop; ++bucket)
        first_[bucket] = static_cast<uint8_t>(s);
      start = stop;
    }
    starts_[alphabet] = starts_[alphabet + 1] = kTotal;
    symbols_[alphabet].word = 0;
  }

  KD_HOST_DEVICE Symbol at(uint32_t slot) const {
    uint32_t s = first_[slot / kBucketSlots];
    if (slot >= starts_[s + 2]) {
      for (s += 2; slot >= starts_[s + 1];) ++s;
      return symbols_[s];
    }
    return symbols_[s + (slot >= starts_[s + 1])];
  }
  KD_HOST_DEVICE Symbol of(uint32_t value) const {
    const uint32_t c = class_of(value);
    return symbols_[c + 1 < alphabet_ ? c : alphabet_ - 1];
  }

 private:
  static constexpr uint32_t kBucketSlots = 16;

  uint32_t alphabet_ = 0;
  Symbol symbols_[kMaxAlphabet + 1];   // and one behind the last
  uint16_t starts_[kMaxAlphabet + 2];  // and two
  uint8_t first_[kTotal / kBucketSlots];
};

// The symbol of each slot: found with one step, where the cache has room for it.
class SlotTable {
 public:
  explicit SlotTable(const Distribution& distribution) {
    for (uint32_t slot = 0; slot < kTotal; ++slot) symbols_[slot] = distribution.at(slot);
  }
  KD_HOST_DEVICE Symbol at(uint32_t slot) const { return symbols_[slot]; }

 private:
  Symbol symbols_[kTotal];
};

// Reads a code: states of the lanes, number of words, words, bits.
class CodeReader {
 public:
  // False where the code is shorter than it says.
  KD_HOST_DEVICE bool open(Span code) {
    if (code.size < kCodeHeadBytes) return false;
    std::memcpy(states_, code.data, sizeof states_);
    uint32_t words;
    std::memcpy(&words, code.data + sizeof states_, sizeof words);
    if (words > (code.size - kCodeHeadBytes) / 2) return false;
    words_ = code.data + kCodeHeadBytes;
    word_count_ = words;
    bits_ = words_ + 2 * static_cast<size_t>(words);
    bits_size_ = static_cast<size_t>(code.data + code.size - bits_);
    return true;
  }

  KD_HOST_DEVICE uint32_t bits(uint32_t count) {  // count <= 32
    const uint32_t value = static_cast<uint32_t>(window<true>(at_) & ((uint64_t{1} << count) - 1));
    at_ += count;
    return value;
  }

  KD_HOST_DEVICE uint32_t gamma() {  // at least 1; Elias 1975
    uint32_t zeros = 0;
    while (zeros < 31 && bits(1) == 0) ++zeros;
    return (1u << zeros) | bits(zeros);
  }

  // A run of numbers: number i, which is of distribution_of(i), for i below count. Lanes are decoded at the same time,
  // so distribution_of(i) must not depend on numbers of this run.
  template <class DistributionOf>
  KD_HOST_DEVICE void run(uint32_t count, const DistributionOf& distribution_of, uint32_t* numbers) {
    const size_t words_end = word_count_ + bits_size_ / 2;  // words that can be read: those behind the last are bits
    const bool is_inside = word_ + count < words_end && (at_ >> 3) + 4 * size_t{count} + 8 < bits_size_;
    // A copy, whose members no store through a pointer can change.
    CodeReader reader = *this;
    if (is_inside) reader.run<false>(count, distribution_of, numbers);
    else reader.run<true>(count, distribution_of, numbers);
    *this = reader;
  }

  KD_HOST_DEVICE bool is_short() const { return word_ > word_count_ || (at_ + 7) / 8 > bits_size_; }

  // Whether all was read, and the lanes are back where the writer began.
  KD_HOST_DEVICE bool is_at_end() {
    for (const uint32_t state : states_)
      if (state != kLow) return false;
    if (is_short() || word_ != word_count_ || (at_ + 7) / 8 != bits_size_) return false;
    return bits(static_cast<uint32_t>(8 * bits_size_ - at_)) == 0;
  }

 private:
  // At least 57 bits from bit `at` on.
  template <bool is_checked> KD_HOST_DEVICE uint64_t window(uint64_t at) const {
    uint64_t window = 0;
    const size_t byte = static_cast<size_t>(at >> 3);
    if (!is_checked || byte + 8 <= bits_size_) std::memcpy(&window, bits_ + byte, 8);
    else if (byte < bits_size_) std::memcpy(&window, bits_ + byte, bits_size_ - byte);
    return window >> (at & 7);
  }

  template <bool is_checked, class DistributionOf>
  KD_HOST_DEVICE void run(uint32_t count, const DistributionOf& distribution_of, uint32_t* numbers) {
    if (symbols<is_checked>(count, distribution_of, numbers) < 16) return;  // these are their classes
    uint64_t at = at_;
    for (uint32_t i = 0; i < count; ++i) {
      const ClassRange& range = range_of(numbers[i]);
      numbers[i] = range.base + (static_cast<uint32_t>(window<is_checked>(at)) & range.mask);
      at += range.bits;
    }
    at_ = at;
  }

  // The classes of numbers. Returns the highest, or more, but no more than 15 where none is higher.
  template <bool is_checked, class DistributionOf>
  KD_HOST_DEVICE uint32_t symbols(uint32_t count, const DistributionOf& distribution_of, uint32_t* found) {
    const uint8_t* const words = words_;
    const size_t size = 2 * word_count_ + bits_size_;
    size_t word = 2 * word_;
    uint32_t states[kLanes], most = 0;
    for (uint32_t lane = 0; lane < kLanes; ++lane) states[lane] = states_[lane];
    const auto symbol = [&](uint32_t& state, uint32_t i) {
      const uint32_t slot = state & (kTotal - 1);
      const Symbol s = distribution_of(i).at(slot);
      const uint32_t x = s.frequency() * (state >> kTotalBits) + slot - s.start();
      // Without a branch that depends on the data. The word may be bits where the words are at an end: is_short tells.
      uint16_t next = 0;
      if (!is_checked || word + 2 <= size) std::memcpy(&next, words + word, 2);
      const uint32_t is_low = mask_of(x < kLow);
      word += is_low & 2;
      state = x ^ ((x ^ (x << 16 | next)) & is_low);
      found[i] = s.number_class();
      most |= found[i];
    };
    uint32_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      KD_UNROLL
      for (uint32_t lane = 0; lane < kLanes; ++lane) symbol(states[lane], i + lane);
    }
    KD_UNROLL
    for (uint32_t lane = 0; lane < kLanes; ++lane)
      if (i + lane < count) symbol(states[lane], i + lane);
    for (uint32_t lane = 0; lane < kLanes; ++lane) states_[lane] = states[lane];
    word_ = word / 2;
    return most;
  }

  uint32_t states_[kLanes];
  const uint8_t *words_, *bits_;
  size_t word_count_, word_ = 0, bits_size_;
  uint64_t at_ = 0;
};

}  // namespace kd
