#include "decode_rows.h"

#include "row_decoder.h"

namespace kd {
namespace KD_ISA {

Complaint decode_rows(const RowLayout& layout, const uint32_t* slots, uint32_t* id_of_rank, const RowsOut& out,
                      RowScratch& scratch, Span payload) {
  return RowDecoder(layout, reinterpret_cast<const Symbol*>(slots), id_of_rank, out, scratch).decode(payload);
}

}  // namespace KD_ISA
}  // namespace kd
