// Rows of logits as the CPU kernels are given them, in plain types.
#pragma once

#include <cstdint>

namespace kd {

// Rows of raw products [rows, vocab] that stand for logits: softcap * tanh(scale * (raw + bias) / softcap).
template <class S> struct RawLogits {
  const S* raw;
  int64_t stride;
  const S* bias;  // [vocab] or null
  double scale, softcap;  // softcap 0: none
  bool is_plain() const { return bias == nullptr && scale == 1.0 && softcap == 0.0; }
};

}  // namespace kd
