// Numbers to bytes and back: range coding with asymmetric numeral systems in four interleaved lanes, and raw bits beside
// it. FORMAT.md, section 4, is the normative text. Duda 2013, "Asymmetric numeral systems"; Giesen 2014, "Interleaved
// entropy coders".
//
// A number is coded as the symbol of its class and as many raw bits as the class leaves open. How likely the classes are
// depends on the context, and a context is one distribution. Nothing here trusts the bytes that it reads: a reader that
// runs past their end goes on with zeros, writes nothing, and says so when it is asked.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace kd {

constexpr int kTotalBits = 12;
constexpr uint32_t kTotal = 1u << kTotalBits;  // frequencies of a distribution add up to this
constexpr uint32_t kLow = 1u << 16;            // a lane's state is at least this, and below 2^32
constexpr int kLanes = 4;
constexpr uint32_t kClasses = 72;               // of all numbers below 2^32
constexpr uint32_t kMaxAlphabet = kClasses + 1;  // and the escape
constexpr int64_t kCodeHeadBytes = 4 * kLanes + 4;

struct Span {
  const uint8_t* data;
  size_t size;
};

inline uint32_t log2_floor(uint32_t v) { return 31 - static_cast<uint32_t>(__builtin_clz(v)); }

// Classes: 0 to 15 for themselves, then two an octave.
inline uint32_t class_of(uint32_t v) {
  if (v < 16) return v;
  const uint32_t octave = log2_floor(v);
  return 16 + 2 * (octave - 4) + ((v >> (octave - 1)) & 1);
}
inline uint32_t class_bits(uint32_t c) { return c < 16 ? 0 : (c - 16) / 2 + 3; }
inline uint32_t class_base(uint32_t c) { return c < 16 ? c : (2 + (c & 1)) << class_bits(c); }

// How likely the classes are in one context. The last symbol of the alphabet is the escape: 32 raw bits follow. So any
// number can be coded under any distribution, and the least of all, the escape alone, takes no more than those bits.
class Distribution {
 public:
  struct Symbol {
    uint16_t start, frequency;
    uint32_t base, bits;
  };

  // frequencies [alphabet], at least 1 each, adding up to kTotal.
  void assign(const std::vector<uint16_t>& frequencies) {
    alphabet_ = static_cast<uint32_t>(frequencies.size());
    uint32_t start = 0;
    for (uint32_t s = 0; s < alphabet_; ++s) {
      const bool is_escape = s + 1 == alphabet_;
      symbols_[s] = {static_cast<uint16_t>(start), frequencies[s], is_escape ? 0 : class_base(s),
                     is_escape ? 32 : class_bits(s)};
      std::memset(symbol_of_ + start, static_cast<int>(s), frequencies[s]);
      start += frequencies[s];
    }
  }

  const Symbol& at(uint32_t slot) const { return symbols_[symbol_of_[slot]]; }
  const Symbol& of(uint32_t value) const {
    const uint32_t c = class_of(value);
    return symbols_[c + 1 < alphabet_ ? c : alphabet_ - 1];
  }

 private:
  uint32_t alphabet_ = 0;
  Symbol symbols_[kMaxAlphabet];
  uint8_t symbol_of_[kTotal];
};

// Reads a code: states of the lanes, number of words, words, bits.
class CodeReader {
 public:
  // False where the code is shorter than it says.
  bool open(Span code) {
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

  uint32_t bits(uint32_t count) {  // count <= 32
    uint64_t window = 0;
    const size_t byte = static_cast<size_t>(at_ >> 3);
    if (byte + 8 <= bits_size_) std::memcpy(&window, bits_ + byte, 8);
    else if (byte < bits_size_) std::memcpy(&window, bits_ + byte, bits_size_ - byte);
    window >>= at_ & 7;
    at_ += count;
    return static_cast<uint32_t>(window & ((uint64_t{1} << count) - 1));
  }

  uint32_t gamma() {  // at least 1; Elias 1975
    uint32_t zeros = 0;
    while (zeros < 31 && bits(1) == 0) ++zeros;
    return (1u << zeros) | bits(zeros);
  }

  uint32_t number(const Distribution& d) {
    uint32_t& state = states_[lane_];
    lane_ = (lane_ + 1) % kLanes;
    const uint32_t slot = state & (kTotal - 1);
    const Distribution::Symbol& s = d.at(slot);
    const uint32_t x = s.frequency * (state >> kTotalBits) + slot - s.start;
    // Without a branch that depends on the data. The word may be bits where the words are at an end: is_short tells.
    uint16_t word = 0;
    if (2 * word_ + 2 <= 2 * word_count_ + bits_size_) std::memcpy(&word, words_ + 2 * word_, 2);
    const bool is_low = x < kLow;
    state = is_low ? x << 16 | word : x;
    word_ += is_low;
    return s.base + bits(s.bits);
  }

  bool is_short() const { return word_ > word_count_ || (at_ + 7) / 8 > bits_size_; }

  // Whether all was read, and the lanes are back where the writer began.
  bool is_at_end() {
    for (const uint32_t state : states_)
      if (state != kLow) return false;
    if (is_short() || word_ != word_count_ || (at_ + 7) / 8 != bits_size_) return false;
    return bits(static_cast<uint32_t>(8 * bits_size_ - at_)) == 0;
  }

 private:
  uint32_t states_[kLanes];
  const uint8_t *words_, *bits_;
  size_t word_count_, word_ = 0, bits_size_;
  uint64_t at_ = 0;
  uint32_t lane_ = 0;
};

// Writes a code. Symbols are kept and coded last to first when all are known, as a stack is filled.
class CodeWriter {
 public:
  void bits(uint32_t value, uint32_t count) {
    window_ |= static_cast<uint64_t>(value) << filled_;
    filled_ += count;
    while (filled_ >= 8) {
      bits_.push_back(static_cast<uint8_t>(window_));
      window_ >>= 8;
      filled_ -= 8;
    }
  }

  void gamma(uint32_t value) {
    const uint32_t zeros = log2_floor(value);
    for (uint32_t i = 0; i < zeros; ++i) bits(0, 1);
    if (zeros < 31) bits(1, 1);
    bits(value & ((1u << zeros) - 1), zeros);
  }

  void number(const Distribution& d, uint32_t value) {
    const Distribution::Symbol& s = d.of(value);
    symbols_.push_back(static_cast<uint32_t>(s.start) << 16 | s.frequency);
    bits(value - s.base, s.bits);
  }

  std::vector<uint8_t> finish() {
    uint32_t states[kLanes] = {kLow, kLow, kLow, kLow};
    std::vector<uint16_t> words;
    words.reserve(symbols_.size());
    for (size_t i = symbols_.size(); i-- > 0;) {
      const uint32_t start = symbols_[i] >> 16, frequency = symbols_[i] & 0xffff;
      uint32_t& x = states[i % kLanes];
      if (x >= static_cast<uint64_t>(frequency) << (32 - kTotalBits)) {
        words.push_back(static_cast<uint16_t>(x));
        x >>= 16;
      }
      x = ((x / frequency) << kTotalBits) + x % frequency + start;
    }
    if (filled_ > 0) bits(0, 8 - filled_);
    const uint32_t count = static_cast<uint32_t>(words.size());
    std::vector<uint8_t> code(kCodeHeadBytes + 2 * words.size() + bits_.size());
    std::memcpy(code.data(), states, sizeof states);
    std::memcpy(code.data() + sizeof states, &count, sizeof count);
    uint8_t* out = code.data() + kCodeHeadBytes;
    for (size_t i = words.size(); i-- > 0; out += 2) std::memcpy(out, &words[i], 2);
    if (!bits_.empty()) std::memcpy(out, bits_.data(), bits_.size());
    return code;
  }

 private:
  std::vector<uint32_t> symbols_;
  std::vector<uint8_t> bits_;
  uint64_t window_ = 0;
  uint32_t filled_ = 0;
};

}  // namespace kd
