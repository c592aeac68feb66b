// What the top-k pass is told, in plain types: shared by the binding and by each instruction set's build of topk.cpp.
#pragma once

#include <cstdint>

namespace kd {

// A candidate for the k kept entries of a row: 8 bytes with a logit in fp32, 16 in fp64.
template <class S> struct Candidate {
  S logit;
  int32_t id;
};

// Candidates are taken up this many columns at a time, so a row must have room for as many beyond k.
constexpr int64_t kTopkSlack = 128;

// Instead of a number of entries: what was wrong with a row. A row without entries is -inf throughout.
enum TopkComplaint : int64_t { kTopkInfinite = -1, kTopkNaN = -2 };

// Columns [first_column, first_column + columns) of rows of logits. A row is seen once, from left to right, in as many
// panels as suit the caller; what was learned so far stays in `candidates`, `counts` and `running` between the calls.
// The results are written together with the last panel.
template <class S> struct TopkRows {
  const S* panel;
  int64_t stride, rows, first_column, columns;
  bool is_last;
  int64_t k;
  double mass;             // keep the shortest prefix that reaches it; infinite for all k
  const double* inverses;  // [temperatures], 1 / T
  int64_t temperatures;
  Candidate<S>* candidates;  // [rows, capacity]
  int64_t capacity;          // at least min(2 k, vocab) + kTopkSlack
  double* running;           // [rows, 3 + temperatures]: bound, reference and sums of the tail
  int64_t* counts;           // [rows]; in the end the number of entries, or a TopkComplaint
  int64_t* ids;              // [rows, k], as are the log-probabilities: by falling logit, the lower id first
  S* logprobs;
  S* tail_logprob;  // [rows]
  S* log_z;         // [rows, temperatures]
  int threads;
};

#define KD_DECLARE_TOPK(isa)                  \
  namespace isa {                             \
  void topk_rows(const TopkRows<float>&);     \
  void topk_rows(const TopkRows<double>&);    \
  }
KD_DECLARE_TOPK(baseline)
KD_DECLARE_TOPK(avx2)
KD_DECLARE_TOPK(avx512)
#undef KD_DECLARE_TOPK

}  // namespace kd
