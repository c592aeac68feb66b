// Draws from rows of logits, as kd_kernels/sampling/DRAWS.md defines them.
#pragma once

#include "kd/philox.h"
#include "raw_logits.h"

namespace kd {

// How rows are tempered and cut: [rows] each. A filter that is null is off for all.
template <class S> struct Warp {
  const S* inverse;  // 1 / temperature; inf: temperature 0; NaN: no distribution
  const int64_t* top_k;
  const double *top_p, *min_p;
  bool cuts() const { return top_k || top_p || min_p; }
};

// The group that leads a race: its maximum, log(s / e) of DRAWS.md, and its number.
template <class S> struct Leader {
  S top;
  double height;
  int64_t group;  // -1: none yet
};

// What is known of a row without filters between two panels. Sums are relative to the maximum.
template <class S> struct Running {
  S max;
  int64_t best;                    // the first id with that maximum
  double own, weighted, tempered;  // of e^(z - max); of that times z - max; of e^((z - max) / T)
  Leader<S> leader;
  S winner[kGroupIds];             // logits of the group that leads
};

template <class S> struct Sampling {
  int64_t rows, vocab;
  RawLogits<S> logits;    // of `columns` ids from `first_column` on: a panel of whole groups, or all
  int64_t first_column, columns;
  const int64_t* picked;  // [rows]: which rows of the logits; null: the first
  Running<S>* running;    // [rows], for panels in rising order; null: the rows are whole, and there may be filters
  Places places;
  Warp<S> warp;
  uint32_t race;          // purpose of the words of the race; that of the pick is one more
  // [rows] each
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
