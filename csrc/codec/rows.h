// Rows of a teacher in plain types, which host and device and all instruction sets share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kd/host_device.h"

namespace kd {

constexpr uint32_t kBlockRows = 256;  // at most

struct Span {
  const uint8_t* data;
  size_t size;
};

// What the rows of a cache have in common: of the manifest.
struct RowLayout {
  uint32_t vocab, k;
  double step;            // nats; 0: log-probabilities are stored as they are
  uint32_t temperatures;  // whose log Z is stored
  bool tail, weights;     // whether rows have a tail, and entries a weight
};

// What is wrong with bytes. `what` is null where nothing is.
struct Complaint {
  const char* what = nullptr;
  int64_t expected = 0, found = 0;
  KD_HOST_DEVICE explicit operator bool() const { return what != nullptr; }
};

// Rows before they are coded: CSR, entries in falling order; a row without entries is not cached.
struct RowsIn {
  int64_t rows;
  const int64_t* offsets;  // [rows + 1]
  const int64_t* ids;      // [nnz]
  const float* logprobs;   // [nnz], nats
  const float* tail;       // [rows], or null
  const float* log_z;      // [temperatures, rows]
  const float* next;       // [rows], nats; NaN: not known
  const float* weights;    // [nnz], or null
};

// Room for decoded rows. Rows that are not cached get a tail of 0, and NaN for the rest.
struct RowsOut {
  int64_t rows, entries;
  int64_t* offsets;      // [rows + 1]
  int64_t* ids;          // [entries]
  float* logprobs;       // [entries]
  float* tail;           // [rows], or null
  float* log_z;          // [temperatures, rows], each temperature log_z_stride after the one before
  int64_t log_z_stride;  // at least rows
  float* next;           // [rows]
  float* weights;        // [entries], or null
};

constexpr uint32_t kCountMost = 16;     // longer runs of one level are sorted by a heap
constexpr uint32_t kScratchLanes = 8;   // of keys and places at a time
constexpr uint32_t kScratchSlack = 16;  // entries behind the last that may be written

// Room for what is known of a block while it is decoded. Entries stand by columns, as they are coded, or by rows.
struct RowScratch {
  uint32_t* columns;  // [k + 1]: where the entries of a column begin
  uint32_t* gaps;     // [entries + kScratchSlack], by columns
  uint32_t* ranks;    // [entries + kScratchSlack], by columns
  uint32_t* by_row;   // [entries + kScratchSlack]: log-probabilities by columns, and then ranks by rows
  uint32_t *keys, *places;  // of the entries of a row: [k + 2 kCountMost + kScratchLanes], [k + kScratchLanes]
  float* moved;             // [k]
  uint64_t* run;            // [k]: the entries of one level
  uint32_t counts[kBlockRows];
  uint8_t order[kBlockRows];     // cached rows by falling count
  uint8_t position[kBlockRows];  // of a row in this order
  uint8_t cached[kBlockRows];    // rows that are
  // Of the rows in this order: the last level so far, how many entries have it, and the most that have one.
  uint32_t fractions[kBlockRows], levels[kBlockRows];
  int32_t lengths[kBlockRows], longest[kBlockRows];
  uint32_t key_levels[kBlockRows];  // the levels so far, counted, as keys have them
  uint32_t numbers[kBlockRows];
};

}  // namespace kd
