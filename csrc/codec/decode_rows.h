// The decoder of rows, as it was built for each instruction set.
#pragma once

#include "rans.h"

namespace kd {

// slots [contexts, kTotal] words: Symbol. The rest is RowDecoder's.
using DecodeRows = Complaint (*)(const RowLayout&, const uint32_t* slots, uint32_t* id_of_rank, const RowsOut&, RowScratch&,
                                 Span payload);

#define KD_DECLARE_DECODE_ROWS(isa)                                                                           \
  namespace isa {                                                                                             \
  Complaint decode_rows(const RowLayout&, const uint32_t*, uint32_t*, const RowsOut&, RowScratch&, Span); \
  }
KD_DECLARE_DECODE_ROWS(baseline)
KD_DECLARE_DECODE_ROWS(avx2)
KD_DECLARE_DECODE_ROWS(avx512)
#undef KD_DECLARE_DECODE_ROWS

}  // namespace kd
