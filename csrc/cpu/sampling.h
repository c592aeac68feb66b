// What the sampling pass is told, in plain types: shared by the binding and by each instruction set's build of sampling.cpp.
#pragma once

#include <cstdint>

#include "raw_logits.h"

namespace kd {

// Names and arguments are [rows]; a filter that is null is off. As `Request` in kd_kernels/sampling/reference.py.
template <class S> struct SampleRows {
  int64_t rows, vocab;
  RawLogits<S> logits;
  const int64_t *seeds, *keys, *positions;
  const S* inverse;  // 1 / temperature; infinite: the largest logit
  const int64_t* top_k;
  const double *top_p, *min_p;
  const int64_t* given;  // score these ids, in 0..vocab-1; null: draw
  uint32_t race;         // purpose of the words of the race; the pick's is one more
  // Results. A row that is no distribution gets -1 and NaN. Entropy and lse are both null, or neither.
  int64_t* ids;
  S *logprobs, *model_logprobs, *entropy, *lse;
  int threads;
};

#define KD_DECLARE_SAMPLING(isa)                \
  namespace isa {                               \
  void sample_rows(const SampleRows<float>&);   \
  void sample_rows(const SampleRows<double>&);  \
  }
KD_DECLARE_SAMPLING(baseline)
KD_DECLARE_SAMPLING(avx2)
KD_DECLARE_SAMPLING(avx512)
#undef KD_DECLARE_SAMPLING

}  // namespace kd
