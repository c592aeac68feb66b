// What the row pass is told, in plain types: shared by the binding and by each instruction set's build of row_loss.cpp.
#pragma once

#include <cstdint>

#include "raw_logits.h"

namespace kd {

// Columns of the statistics matrix. kd_kernels/loss/cpp_impl.py names them in this order.
enum Stat { kDivergence, kStudentEntropy, kTeacherEntropy, kAgreement, kCapturedMass, kLabelLogprob, kTeacherLabelLogprob,
            kStudentTop1, kTeacherTop1, kStudentConfidence, kTeacherConfidence, kStats };

// Bits of a row's status: what was wrong with it.
enum Status { kBadStudent = 1, kBadTeacher = 2, kBadLabel = 4, kBadIds = 8, kBadTail = 16, kBadImportance = 32 };

enum Tail { kBucket, kRenormalize, kDrop };

// A teacher known at some ids only; see SparseRows in kd_kernels/products.py.
template <class S> struct SparseRows {
  const int64_t* starts;  // [rows], into ids
  const int64_t* ends;    // [rows]
  const int64_t* ids;
  const S* logprobs;
  const S* tail;        // [rows] or null
  const S* importance;  // or null
  Tail treatment;
};

template <class S> struct RowLoss {
  int64_t rows, vocab;
  RawLogits<S> student;
  int formula;
  const double* params;
  double temperature, kd_weight, ce_weight;
  const int64_t* labels;  // [rows] or null
  const double* weight;   // [rows], multiplies the gradient; a row of weight 0 is skipped
  S* gradient;            // [rows, vocab] with respect to raw, or null; may be the student's own memory
  uint16_t* bf16_gradient;  // the same rounded to bf16, or null: one of the two at most
  int64_t gradient_stride;  // of the one that is there
  double* loss;   // [rows], not weighted
  double* stats;  // [rows, kStats] or null
  int32_t* status;  // [rows]
  int threads;
  bool wants_gradient() const { return gradient || bf16_gradient; }
};

#define KD_DECLARE_ROW_LOSS(isa)                                                            \
  namespace isa {                                                                           \
  void dense_rows(const RowLoss<float>&, const RawLogits<float>& teacher);                  \
  void dense_rows(const RowLoss<double>&, const RawLogits<double>& teacher);                \
  void sparse_rows(const RowLoss<float>&, const SparseRows<float>& teacher);                \
  void sparse_rows(const RowLoss<double>&, const SparseRows<double>& teacher);              \
  int formula_number(const char* name);                                                     \
  }
KD_DECLARE_ROW_LOSS(baseline)
KD_DECLARE_ROW_LOSS(avx2)
KD_DECLARE_ROW_LOSS(avx512)
#undef KD_DECLARE_ROW_LOSS

}  // namespace kd
