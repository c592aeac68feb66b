// Draws from rows of logits, as kd_kernels/sampling/DRAWS.md defines them.
#pragma once

#include "raw_logits.h"

namespace kd {

template <class S> struct Sampling {
  int64_t rows, vocab;
  RawLogits<S> logits;
  // [rows] each
  const int64_t *seeds, *keys, *positions;
  const S* inverse;       // 1 / temperature; inf: temperature 0; NaN: no distribution
  const int64_t* top_k;   // or null, as the next three
  const double* top_p;
  const double* min_p;
  const int64_t* given;   // score these ids, draw nothing
  uint32_t race;          // purpose of the words of the race; that of the pick is one more
  int64_t* ids;           // -1: the row is no distribution
  S *logprobs, *model_logprobs;
  S *entropy, *lse;       // or null, both
  int threads;
};

#define KD_DECLARE(isa)                              \
  namespace isa {                                    \
  void sample_rows(const Sampling<float>& job);      \
  void sample_rows(const Sampling<double>& job);     \
  }
KD_DECLARE(baseline)
KD_DECLARE(avx2)
KD_DECLARE(avx512)
#undef KD_DECLARE

}  // namespace kd
