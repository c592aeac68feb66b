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

// Classes: 0 to 15 for themselves, then two an octave.
KD_HOST_DEVICE inline uint32_t class_of(uint32_t v) {
  if (v < 16) return v;
  const uint32_t octave = log2_floor(v);
  return 16 + 2 * (octave - 4) + ((v >> (octave - 1)) & 1);
}
KD_HOST_DEVICE inline uint32_t class_bits(uint32_t c) { return c < 16 ? 0 : (c - 16) / 2 + 3; }

// How likely the classes are in one context. The last symbol of the alphabet is the escape: 32 raw bits follow. So any
// number can be coded under any distribution, and the least of all, the escape alone, takes no more than those bits.
//
// A distribution is small, so that those of all contexts stay in the cache next to the core: a symbol is found from
// the first one of its bucket of slots, mostly without a step that depends on the data.
class Distribution {
 public:
  struct alignas(8) Symbol {
    uint16_t start, frequency;
    uint8_t high, bits;  // a number is high << bits, and raw bits below
  };

  // frequencies [alphabet], at least 1 each, adding up to kTotal.
  KD_HOST_DEVICE void assign(const uint16_t* frequencies, uint32_t alphabet) {
    alphabet_ = alphabet;
    uint32_t start = 0;
    for (uint32_t s = 0; s < alphabet; ++s) {
      const bool is_escape = s + 1 == alphabet;
      symbols_[s] = {static_cast<uint16_t>(start), frequencies[s],
                     static_cast<uint8_t>(is_escape ? 0 : s < 16 ? s : 2 + (s & 1)),
                     static_cast<uint8_t>(is_escape ? 32 : class_bits(s))};
      const uint32_t stop = start + frequencies[s];
      for (uint32_t bucket = (start + kBucketSlots - 1) / kBucketSlots; bucket * kBucketSlots < stop; ++bucket)
        first_[bucket] = static_cast<uint8_t>(s);
      start = stop;
    }
    symbols_[alphabet] = {kTotal, 0, 0, 0};
  }

  KD_HOST_DEVICE const Symbol& at(uint32_t slot) const {
    const Symbol* s = symbols_ + first_[slot / kBucketSlots];
    s += slot >= s[1].start;
    while (slot >= s[1].start) ++s;
    return *s;
  }
  KD_HOST_DEVICE const Symbol& of(uint32_t value) const {
    const uint32_t c = class_of(value);
    return symbols_[c + 1 < alphabet_ ? c : alphabet_ - 1];
  }

 private:
  static constexpr uint32_t kBucketSlots = 16;

  uint32_t alphabet_ = 0;
  Symbol symbols_[kMaxAlphabet + 1];  // and one behind the last
  uint8_t first_[kTotal / kBucketSlots];
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

  // A run of numbers: take(i, number i), which is of distribution_of(i), for i below count. Lanes are decoded at the
  // same time, so distribution_of(i) must not depend on numbers of this run.
  template <class DistributionOf, class Take>
  KD_HOST_DEVICE void run(uint32_t count, const DistributionOf& distribution_of, const Take& take) {
    const size_t words_end = word_count_ + bits_size_ / 2;  // words that can be read: those behind the last are bits
    const bool is_inside = word_ + count < words_end && (at_ >> 3) + 4 * size_t{count} + 8 < bits_size_;
    // A copy, whose members no store through a pointer can change.
    CodeReader reader = *this;
    if (is_inside) reader.run<false>(count, distribution_of, take);
    else reader.run<true>(count, distribution_of, take);
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

  template <bool is_checked, class DistributionOf, class Take>
  KD_HOST_DEVICE void run(uint32_t count, const DistributionOf& distribution_of, const Take& take) {
    const auto number = [&](uint32_t& state, uint32_t i) {
      const uint32_t slot = state & (kTotal - 1);
      const Distribution::Symbol s = distribution_of(i).at(slot);
      const uint32_t x = s.frequency * (state >> kTotalBits) + slot - s.start;
      // Without a branch that depends on the data. The word may be bits where the words are at an end: is_short tells.
      uint16_t next = 0;
      if (!is_checked || 2 * word_ + 2 <= 2 * word_count_ + bits_size_) std::memcpy(&next, words_ + 2 * word_, 2);
      const uint32_t is_low = x < kLow;
      state = x << 16 * is_low | (next & (0 - is_low));
      word_ += is_low;
      const uint64_t rest = window<is_checked>(at_) & ((uint64_t{1} << s.bits) - 1);
      at_ += s.bits;
      take(i, static_cast<uint32_t>(uint64_t{s.high} << s.bits | rest));
    };
    uint32_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (uint32_t lane = 0; lane < kLanes; ++lane) number(states_[lane], i + lane);
    for (uint32_t lane = 0; i < count; ++i, ++lane) number(states_[lane], i);
  }

  uint32_t states_[kLanes];
  const uint8_t *words_, *bits_;
  size_t word_count_, word_ = 0, bits_size_;
  uint64_t at_ = 0;
};

}  // namespace kd
