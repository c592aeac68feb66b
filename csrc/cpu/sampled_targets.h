// Draws with replacement from rows of logits, counted: kd_kernels/sampling/DRAWS.md, section 6.
#pragma once

#include "kd/philox.h"
#include "raw_logits.h"

namespace kd {

template <class S> struct SampledTargets {
  int64_t rows, vocab;
  RawLogits<S> logits;
  Places places;
  double inverse;           // 1 / proposal temperature
  int64_t draws, certain;
  int64_t width;            // entries that a row has room for: at least min(draws + certain, vocab)
  int64_t* counts;          // [rows] entries written; -1: the row is no distribution
  int64_t* ids;             // [rows, width] by falling logit, the lower id first; as are the next two
  S *logprobs, *importance;
  int threads;
};

#define KD_DECLARE(isa)                                       \
  namespace isa {                                             \
  void target_rows(const SampledTargets<float>& job);         \
  void target_rows(const SampledTargets<double>& job);        \
  }
KD_DECLARE(baseline)
KD_DECLARE(avx2)
KD_DECLARE(avx512)
#undef KD_DECLARE

}  // namespace kd
