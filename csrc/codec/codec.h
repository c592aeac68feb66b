// Rows of a teacher to bytes and back, in plain types: no Python, no torch, no allocation that the caller did not size.
// FORMAT.md, section 4, is the normative text.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "row_decoder.h"

namespace kd {

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
  const int32_t* counts;   // [nnz], or null
};

// Ids by frequency, and ranks by id. Within a block an id that comes moves up: it is likely to come again. Who is
// done with the block takes that back.
class Ranks {
 public:
  explicit Ranks(const std::vector<uint8_t>& levels);  // by falling level, then rising id
  explicit Ranks(std::vector<uint32_t> ids) : id_of_rank(std::move(ids)) { find_ranks(); }  // [vocab], each id once

  void find_ranks();
  void swap(uint32_t a, uint32_t b) {
    std::swap(id_of_rank[a], id_of_rank[b]);
    rank_of_id[id_of_rank[a]] = a;
    rank_of_id[id_of_rank[b]] = b;
  }
  // Done once more, it is undone.
  void promote(uint32_t rank) { swap(rank, promoted(rank)); }

  std::vector<uint32_t> id_of_rank;
  std::vector<uint32_t> rank_of_id;  // empty unless find_ranks was called: readers need none
};

// The distributions of all contexts, and how frequent ids are. Memory: 0.7 KiB a context and 128 KiB; where the model
// ranks ids, 1 byte an id and 4 more for every thread that decodes at a time (8 where it encodes).
class RowModel {
 public:
  RowModel();
  ~RowModel();

  // Reads the payload of a model block.
  Complaint read(const RowLayout& layout, Span payload);

  // Room for rows must be as RowsOut says. At most kBlockRows. What was written into it counts only if there is no
  // complaint.
  Complaint decode(Span payload, const RowsOut& out) const;

  std::vector<uint8_t> encode(const RowsIn& rows) const;

  // What each context adds to the code of these rows, in bits.
  std::vector<double> bits_by_context(const RowsIn& rows) const;

 private:
  struct Workspace;

  template <class Sink> void walk(const RowsIn& rows, Sink& sink) const;
  std::unique_ptr<Workspace> take_workspace() const;
  void give_back(std::unique_ptr<Workspace> workspace) const;

  RowLayout layout_{};
  std::vector<Distribution> contexts_;
  std::vector<SlotTable> gap_tables_;
  std::vector<uint8_t> levels_;  // [vocab]: logarithms of frequencies; empty: every id is its own rank, always
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Workspace>> idle_;
};

// The payload of a model block for rows like these. id_counts [vocab]: how often each id was seen so far; null: do not
// rank ids.
std::vector<uint8_t> learn_model(const RowLayout& layout, const std::vector<RowsIn>& rows, const int32_t* id_counts);

}  // namespace kd
