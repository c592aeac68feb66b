// Speculative sampling: drafts of a student that a teacher accepts or replaces, as kd_kernels/sampling/DRAWS.md defines it.
#pragma once

#include "sampling.h"

namespace kd {

enum Fault : uint8_t { kTeacherFault = 1, kStudentFault = 2 };

template <class S> struct Drafts {
  int64_t rows, vocab;
  RawLogits<S> teacher, student;
  Warp<S> teacher_warp, student_warp;
  Places places;
  // [rows] each
  const int64_t* drafts;
  int64_t* ids;  // -1: a row of either is no distribution
  bool* accepted;
  uint8_t* faults;  // of which, or 0
  S *logprobs, *model_logprobs;
  int threads;
};

#define KD_DECLARE(isa)                            \
  namespace isa {                                  \
  void judge_rows(const Drafts<float>& job);       \
  void judge_rows(const Drafts<double>& job);      \
  }
KD_DECLARE(baseline)
KD_DECLARE(avx2)
KD_DECLARE(avx512)
#undef KD_DECLARE

}  // namespace kd
