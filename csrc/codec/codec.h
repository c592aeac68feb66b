// Rows of a teacher to bytes and back, in plain types: no Python, no torch, no allocation that the caller did not size.
// FORMAT.md, section 4, is the normative text.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "contexts.h"
#include "decode_rows.h"

namespace kd {

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

// The bytes of a block, and what its head says of them.
struct Payload {
  Span bytes;
  int64_t rows, entries;
};

// The distributions of all contexts, and how frequent ids are. Memory: 8 KiB a context; where the model ranks ids, 1 byte
// an id and 4 more for every thread that decodes at a time (8 where it encodes).
class RowModel {
 public:
  explicit RowModel(DecodeRows decode_rows);
  ~RowModel();

  // Reads the payload of a model block.
  Complaint read(const RowLayout& layout, Span payload);

  // The rows of blocks, one after the other. Room for them must be as RowsOut says, for all together. What was written into
  // it counts only if there is no complaint.
  Complaint decode(const std::vector<Payload>& blocks, const RowsOut& out) const;

  std::vector<uint8_t> encode(const RowsIn& rows) const;

  // What each context adds to the code of these rows, in bits.
  std::vector<double> bits_by_context(const RowsIn& rows) const;

 private:
  struct Workspace;

  template <class Sink> void walk(const RowsIn& rows, Sink& sink) const;
  std::unique_ptr<Workspace> take_workspace() const;
  void give_back(std::unique_ptr<Workspace> workspace) const;

  DecodeRows decode_rows_;
  RowLayout layout_{};
  std::vector<Distribution> contexts_;
  std::vector<uint32_t> slots_;  // [contexts, kTotal]
  std::vector<uint8_t> levels_;  // [vocab]: logarithms of frequencies; empty: every id is its own rank, always
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Workspace>> idle_;
};

// The payload of a model block for rows like these. id_counts [vocab]: how often each id was seen so far; null: do not
// rank ids.
std::vector<uint8_t> learn_model(const RowLayout& layout, const std::vector<RowsIn>& rows, const int32_t* id_counts);

}  // namespace kd
