// What the pass for token_stats is told, in plain types: shared by the binding and by each instruction set's build of
// token_stats.cpp.
#pragma once

#include <cstdint>

#include "raw_logits.h"

namespace kd {

// Results are [rows]. A row without a normaliser (NaN, +inf, or -inf throughout) gets NaN, and -1 for a place.
template <class S> struct TokenStats {
  int64_t rows, vocab;
  RawLogits<S> logits;
  const int64_t* ids;  // [rows], in 0..vocab-1
  S *logprob, *lse, *entropy, *max;
  int64_t *argmax, *rank;
  int threads;
};

#define KD_DECLARE_TOKEN_STATS(isa)               \
  namespace isa {                                 \
  void token_stats(const TokenStats<float>&);     \
  void token_stats(const TokenStats<double>&);    \
  }
KD_DECLARE_TOKEN_STATS(baseline)
KD_DECLARE_TOKEN_STATS(avx2)
KD_DECLARE_TOKEN_STATS(avx512)
#undef KD_DECLARE_TOKEN_STATS

}  // namespace kd
