// The other half of rans.h: numbers to bytes, on the host.
#pragma once

#include <vector>

#include "rans.h"

namespace kd {
namespace KD_ISA {

// Writes a code. Symbols are kept and coded last to first when all are known, as a stack is filled.
class CodeWriter {
 public:
  void bits(uint32_t value, uint32_t count) {
    window_ |= static_cast<uint64_t>(value) << filled_;
    filled_ += count;
    if (filled_ < 32) return;
    bits_.push_back(static_cast<uint32_t>(window_));
    window_ >>= 32;
    filled_ -= 32;
  }

  void gamma(uint32_t value) {
    const uint32_t zeros = log2_floor(value);
    for (uint32_t i = 0; i < zeros; ++i) bits(0, 1);
    if (zeros < 31) bits(1, 1);
    bits(value & ((1u << zeros) - 1), zeros);
  }

  // The numbers up to the next call are one run.
  void run() { lane_ = 0; }

  void number(const Distribution& d, uint32_t value) {
    const Symbol s = d.of(value);
    symbols_.push_back(Symbol::of(s.slot(), s.frequency(), lane_));
    lane_ = (lane_ + 1) % kLanes;
    bits(value - s.range().base, static_cast<uint32_t>(s.range().bits));
  }

  std::vector<uint8_t> finish() {
    uint32_t states[kLanes];
    for (uint32_t& state : states) state = kLow;
    std::vector<uint16_t> words(symbols_.size());  // last to first, as symbols: at most one each
    size_t first = words.size();
    for (size_t i = symbols_.size(); i-- > 0;) {
      const uint32_t start = symbols_[i].slot(), frequency = symbols_[i].frequency();
      uint32_t& state = states[symbols_[i].number_class()];
      const uint32_t is_full = mask_of(state >= static_cast<uint64_t>(frequency) << (32 - kTotalBits));
      words[first - 1] = static_cast<uint16_t>(state);
      first -= is_full & 1;
      const uint32_t x = state >> (is_full & 16);
      state = ((x / frequency) << kTotalBits) + x % frequency + start;
    }
    const uint32_t count = static_cast<uint32_t>(words.size() - first);
    const size_t whole = 4 * bits_.size(), rest = (filled_ + 7) / 8;
    std::vector<uint8_t> code(kCodeHeadBytes + 2 * count + whole + rest);
    std::memcpy(code.data(), states, sizeof states);
    std::memcpy(code.data() + sizeof states, &count, sizeof count);
    uint8_t* out = code.data() + kCodeHeadBytes;
    if (count > 0) std::memcpy(out, words.data() + first, 2 * count);
    if (whole > 0) std::memcpy(out + 2 * count, bits_.data(), whole);
    if (rest > 0) std::memcpy(out + 2 * count + whole, &window_, rest);
    return code;
  }

 private:
  std::vector<Symbol> symbols_;  // with the lane in the place of the class
  uint32_t lane_ = 0;
  std::vector<uint32_t> bits_;
  uint64_t window_ = 0;
  uint32_t filled_ = 0;
};

}  // namespace KD_ISA
}  // namespace kd
