// Bytes to rows of a teacher, for host and device: no allocation, and no exception. FORMAT.md, section 4, is the
// normative text.
#pragma once

#include <cmath>

#include "rans.h"

namespace kd {

constexpr uint32_t kBlockRows = 256;      // at most
constexpr uint32_t kFractions = 256;      // of a step, for the first entry of a row
constexpr double kTailFinesse = 4;        // the tail's log-odds are stored to step / 4
constexpr double kLogZFinesse = 16;       // log Z to step / 16
constexpr double kMaxLevel = 1u << 30;
constexpr double kMaxTailLevel = 1 << 20;  // that a tail is predicted from
constexpr uint32_t kPlaces = 8, kOctaves = 14, kRankLevels = 32;
constexpr uint32_t kTop = 16, kDeep = 8192;  // ranks below kTop are final; from kDeep on they rise faster

enum class Weights : int { none, fp32, counts };

// What the rows of a cache have in common: of the manifest.
struct RowLayout {
  uint32_t vocab, k;
  double step;            // nats; 0: log-probabilities are stored as they are
  uint32_t temperatures;  // whose log Z is stored
  bool tail;
  Weights weights;
};

// What is wrong with bytes. `what` is null where nothing is.
struct Complaint {
  const char* what = nullptr;
  int64_t expected = 0, found = 0;
  KD_HOST_DEVICE explicit operator bool() const { return what != nullptr; }
};

// Room for decoded rows. Rows that are not cached get a tail of 0, and NaN for the rest.
struct RowsOut {
  int64_t rows, entries;
  int64_t* offsets;  // [rows + 1]
  int64_t* ids;      // [entries]
  float* logprobs;   // [entries]
  float* tail;       // [rows], or null
  float* log_z;      // [temperatures, rows]
  float* next;       // [rows]
  float* weights;    // [entries], or null
  int32_t* counts;   // [entries], or null
};

// Room for what is known of a block while it is decoded. Entries stand by columns, as they are coded.
struct RowScratch {
  uint32_t* columns;  // [k + 1]: where the entries of a column begin
  uint32_t* ranks;    // [entries]
  uint8_t* company;   // [entries]: kIsTie, kIsFollowed
  uint32_t* ties;     // [k + 1]: places in a row
  uint32_t counts[kBlockRows];
  uint8_t order[kBlockRows];     // rows by falling count
  uint8_t position[kBlockRows];  // of a row in this order
  uint8_t cached[kBlockRows];    // rows that are
  double levels[kBlockRows];     // the last so far of the rows in this order, in fractions
};

// Contexts. A gap depends on the place in the row; a rank on that, too, or, where the entry has the level of the one
// before, on the octave of the rank before; and on whether the next entry has the same level.
enum Context : uint32_t { kCount, kTail, kCutTail, kNext, kNextLevel, kIdLevel, kWeight, kGap, kRank = kGap + kPlaces,
                          kTie = kRank + 2 * kPlaces, kLogZ = kTie + 2 * kOctaves };

enum Next : uint32_t { kNotKnown, kImpossible, kNotKept, kEntry };  // kEntry + j: the row's entry j

KD_HOST_DEVICE inline uint32_t context_count(const RowLayout& layout) { return kLogZ + layout.temperatures; }

KD_HOST_DEVICE inline uint32_t place_of(uint32_t j) {
  const uint32_t place = j == 0 ? 0 : 1 + log2_floor(j);
  return place < kPlaces ? place : kPlaces - 1;
}

// Where an entry has the level of the one before it, and where the next one has its. Entry 0 is apart: it stays the
// first.
enum Company : uint8_t { kIsFollowed = 1, kIsTie = 2 };

KD_HOST_DEVICE inline uint32_t rank_context(uint32_t place, uint32_t company, uint32_t before) {
  const uint32_t octave = log2_floor(before | 1), tie = octave < kOctaves ? octave : kOctaves - 1;
  return kRank + (company & kIsFollowed) + 2 * (place + company / kIsTie * (kPlaces - place + tie));
}

// An id that came moves from its rank to this one, and that one's id to its.
KD_HOST_DEVICE inline uint32_t promoted(uint32_t rank) { return rank >> ((rank >= kTop) + (rank >= kDeep)); }

KD_HOST_DEVICE inline void promote(uint32_t* id_of_rank, uint32_t rank) {
  const uint32_t to = promoted(rank), id = id_of_rank[rank];
  id_of_rank[rank] = id_of_rank[to];
  id_of_rank[to] = id;
}

// What a tail is expected to be, from the level of the last entry.
KD_HOST_DEVICE inline int64_t tail_of_level(double level) {
  return -static_cast<int64_t>(kTailFinesse * (level < kMaxTailLevel ? level : kMaxTailLevel));
}

KD_HOST_DEVICE inline int64_t unzigzag(uint32_t v) { return v & 1 ? -static_cast<int64_t>(v / 2) - 1 : v / 2; }

KD_HOST_DEVICE inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

constexpr uint32_t kInsertionMost = 16;  // longer runs of one level are sorted by a heap

// Decodes the payload of a block. What was written counts only if there is no complaint, but id_of_rank is then and
// now as it was.
class RowDecoder {
 public:
  // contexts [context_count(layout)]; id_of_rank [vocab], or null: every id is its own rank, always.
  KD_HOST_DEVICE RowDecoder(const RowLayout& layout, const Distribution* contexts, uint32_t* id_of_rank,
                            const RowsOut& out, RowScratch& scratch)
      : layout_(layout), contexts_(contexts), id_of_rank_(id_of_rank), out_(out), scratch_(scratch) {}

  KD_HOST_DEVICE Complaint decode(Span payload) {
    if (out_.rows > kBlockRows) return {"rows of a block, at most", kBlockRows, out_.rows};
    if (!reader_.open(payload)) return {"bytes of a payload", kCodeHeadBytes, static_cast<int64_t>(payload.size)};
    if (const Complaint wrong = counts()) return wrong;
    if (const Complaint wrong = is_exact() ? exact_logprobs() : rounded_logprobs()) return wrong;
    if (const Complaint wrong = ranks()) return wrong;
    ids();
    if (out_.weights || out_.counts) weights();
    if (!is_exact()) sort_ties();
    not_cached();
    if (out_.tail) tails();
    log_z();
    if (const Complaint wrong = next()) return wrong;
    if (!reader_.is_at_end()) return {"end of a payload", 1, 0};
    return {};
  }

 private:
  KD_HOST_DEVICE bool is_exact() const { return layout_.step == 0; }
  KD_HOST_DEVICE uint32_t rows() const { return static_cast<uint32_t>(out_.rows); }

  template <class Take> KD_HOST_DEVICE void run(uint32_t count, uint32_t context, const Take& take) {
    const Distribution& distribution = contexts_[context];
    reader_.run(count, [&](uint32_t) -> const Distribution& { return distribution; }, take);
  }

  KD_HOST_DEVICE Complaint counts() {
    run(rows(), kCount, [&](uint32_t row, uint32_t missing) { scratch_.counts[row] = missing; });
    int64_t entries = 0;
    out_.offsets[0] = 0;
    for (uint32_t row = 0; row < rows(); ++row) {
      const uint32_t missing = scratch_.counts[row], count = missing == 0 ? 0 : 1 + layout_.k - missing;
      if (missing > layout_.k) return {"entries that a row lacks, below k", layout_.k, int64_t{missing} - 1};
      scratch_.counts[row] = count;
      entries += count;
      out_.offsets[row + 1] = entries;
      if (count > 0) scratch_.cached[cached_++] = static_cast<uint8_t>(row);
      uint32_t i = row;  // rows that are as long stay in their order
      for (; i > 0 && scratch_.counts[scratch_.order[i - 1]] < count; --i) scratch_.order[i] = scratch_.order[i - 1];
      scratch_.order[i] = static_cast<uint8_t>(row);
    }
    if (entries != out_.entries) return {"entries of a block", out_.entries, entries};
    for (uint32_t i = 0; i < rows(); ++i) scratch_.position[scratch_.order[i]] = static_cast<uint8_t>(i);
    uint32_t at = 0;
    for (uint32_t active = cached_; active > 0; ++columns_) {
      scratch_.columns[columns_] = at;
      at += active;
      while (active > 0 && scratch_.counts[scratch_.order[active - 1]] == columns_ + 1) --active;
    }
    scratch_.columns[columns_] = at;
    return {};
  }

  KD_HOST_DEVICE uint32_t height(uint32_t j) const { return scratch_.columns[j + 1] - scratch_.columns[j]; }

  KD_HOST_DEVICE Complaint exact_logprobs() {
    for (int64_t i = 0; i < out_.entries; ++i) {
      out_.logprobs[i] = float_of(reader_.bits(32));
      scratch_.company[i] = 0;
    }
    return {};
  }

  KD_HOST_DEVICE Complaint rounded_logprobs() {
    const double unit = layout_.step / kFractions;
    double* const levels = scratch_.levels;
    float* first[kBlockRows];
    for (uint32_t i = 0; i < cached_; ++i) first[i] = out_.logprobs + out_.offsets[scratch_.order[i]];
    for (uint32_t i = 0; i < cached_; ++i) levels[i] = reader_.bits(8);
    for (uint32_t j = 0; j < columns_; ++j) {
      uint8_t* company = scratch_.company + scratch_.columns[j];
      run(height(j), kGap + place_of(j), [&](uint32_t i, uint32_t gap) {
        company[i] = gap == 0 && j > 1 ? kIsTie : 0;
        levels[i] += gap * static_cast<double>(kFractions);
        first[i][j] = static_cast<float>(0.0 - levels[i] * unit);
      });
    }
    for (uint32_t i = 0; i < cached_; ++i)
      if (levels[i] >= (kMaxLevel + 1) * kFractions)
        return {"levels, at most", static_cast<int64_t>(kMaxLevel), static_cast<int64_t>(levels[i] / kFractions)};
    for (uint32_t j = 2; j < columns_; ++j) {
      uint8_t* company = scratch_.company + scratch_.columns[j - 1];
      const uint8_t* after = scratch_.company + scratch_.columns[j];
      for (uint32_t i = 0, n = height(j); i < n; ++i) company[i] |= after[i] / kIsTie;
    }
    return {};
  }

  KD_HOST_DEVICE Complaint ranks() {
    for (uint32_t j = 0; j < columns_; ++j) {
      const uint8_t* company = scratch_.company + scratch_.columns[j];
      const uint32_t* before = j == 0 ? nullptr : scratch_.ranks + scratch_.columns[j - 1];
      uint32_t* ranks = scratch_.ranks + scratch_.columns[j];
      const Distribution* const contexts = contexts_;
      const uint32_t place = place_of(j), vocab = layout_.vocab;
      uint32_t most = 0;
      reader_.run(
          height(j),
          [&](uint32_t i) -> const Distribution& {
            return contexts[rank_context(place, company[i], j == 0 ? 0 : before[i])];
          },
          [&](uint32_t i, uint32_t number) {
            const uint64_t rank = (uint64_t{j == 0 ? 0 : before[i]} + 1) * (company[i] / kIsTie) + number;
            ranks[i] = static_cast<uint32_t>(rank);
            const uint32_t capped = static_cast<uint32_t>(rank < vocab ? rank : vocab);
            most = most < capped ? capped : most;
          });
      if (most >= layout_.vocab) return {"ids, below", layout_.vocab, most};
      if (reader_.is_short()) return {"columns in a payload", columns_, j};
    }
    return {};
  }

  KD_HOST_DEVICE uint32_t rank(uint32_t row, uint32_t j) const {
    return scratch_.ranks[scratch_.columns[j] + scratch_.position[row]];
  }

  KD_HOST_DEVICE bool is_tie(uint32_t row, uint32_t j) const {
    return (scratch_.company[scratch_.columns[j] + scratch_.position[row]] & kIsTie) != 0;
  }

  // Ids of ranks, as each row finds them and leaves them for the next.
  KD_HOST_DEVICE void ids() {
    for (uint32_t row = 0; row < rows(); ++row) {
      int64_t* ids = out_.ids + out_.offsets[row];
      const uint32_t count = scratch_.counts[row];
      for (uint32_t j = 0; j < count; ++j) ids[j] = id_of_rank_ ? id_of_rank_[rank(row, j)] : rank(row, j);
      for (uint32_t j = 0; id_of_rank_ && j < count; ++j) promote(id_of_rank_, rank(row, j));
    }
    for (uint32_t row = rows(); id_of_rank_ && row-- > 0;)
      for (uint32_t j = scratch_.counts[row]; j-- > 0;) promote(id_of_rank_, rank(row, j));
  }

  KD_HOST_DEVICE void weights() {
    if (out_.weights)
      for (int64_t i = 0; i < out_.entries; ++i) out_.weights[i] = float_of(reader_.bits(32));
    if (!out_.counts) return;
    for (uint32_t row = 0; row < rows(); ++row)
      run(scratch_.counts[row], kWeight, [&](uint32_t j, uint32_t count) {
        out_.counts[out_.offsets[row] + j] = static_cast<int32_t>(count);
      });
  }

  // Of entries of one level the one with the lower id comes first. Most have no company, or one: so ties are listed
  // without a branch that depends on the data, and the first exchange is none either.
  KD_HOST_DEVICE void sort_ties() {
    uint32_t* const ties = scratch_.ties;
    for (uint32_t row = 0; row < rows(); ++row) {
      const int64_t begin = out_.offsets[row];
      int64_t* const ids = out_.ids + begin;
      uint32_t count = 0;
      for (uint32_t j = 1; j < scratch_.counts[row]; ++j) {
        ties[count] = j;
        count += is_tie(row, j);
      }
      for (uint32_t i = 0; i < count; ++i) {
        const uint32_t j = ties[i];
        if (i + kInsertionMost <= count && ties[i + kInsertionMost - 1] == j + kInsertionMost - 1) {
          uint32_t stop = i + 1;
          while (stop < count && ties[stop] == ties[stop - 1] + 1) ++stop;
          heapsort(begin + j - 1, stop - i + 1);
          i = stop - 1;
          continue;
        }
        const int64_t a = ids[j - 1], b = ids[j];
        const bool falls = a > b;
        if (out_.weights || out_.counts) {
          if (falls) swap(begin + j - 1, begin + j);
        } else {
          ids[j - 1] = falls ? b : a;
          ids[j] = falls ? a : b;
        }
        for (uint32_t to = j - 1; falls && is_tie(row, to) && ids[to - 1] > ids[to]; --to)
          swap(begin + to - 1, begin + to);
      }
    }
  }

  KD_HOST_DEVICE void swap(int64_t a, int64_t b) {
    const auto exchange = [=](auto* values) {
      if (!values) return;
      const auto value = values[a];
      values[a] = values[b];
      values[b] = value;
    };
    exchange(out_.ids);
    exchange(out_.weights);
    exchange(out_.counts);
  }

  // A row may have 65,535 entries of one level.
  KD_HOST_DEVICE void heapsort(int64_t begin, uint32_t count) {
    const int64_t* ids = out_.ids + begin;
    const auto sift = [&](uint32_t root, uint32_t size) {
      for (uint32_t child; (child = 2 * root + 1) < size; root = child) {
        if (child + 1 < size && ids[child] < ids[child + 1]) ++child;
        if (ids[root] >= ids[child]) return;
        swap(begin + root, begin + child);
      }
    };
    for (uint32_t root = count / 2; root-- > 0;) sift(root, count);
    for (uint32_t size = count; --size > 0;) {
      swap(begin, begin + size);
      sift(0, size);
    }
  }

  // The tail, log Z and next token of rows that are not cached; those of the others follow.
  KD_HOST_DEVICE void not_cached() {
    for (uint32_t row = 0; row < rows(); ++row) {
      if (scratch_.counts[row] > 0) continue;
      if (out_.tail) out_.tail[row] = 0;
      for (uint32_t t = 0; t < layout_.temperatures; ++t) out_.log_z[t * out_.rows + row] = NAN;
      out_.next[row] = NAN;
    }
  }

  KD_HOST_DEVICE void exact(float* values) {
    for (uint32_t i = 0; i < cached_; ++i) values[scratch_.cached[i]] = float_of(reader_.bits(32));
  }

  // Of k entries the tail goes with the last. A row that was cut short of k was cut at some mass, like others before
  // it.
  KD_HOST_DEVICE void tails() {
    if (is_exact()) return exact(out_.tail);
    const auto is_cut = [&](uint32_t i) { return scratch_.counts[scratch_.cached[i]] < layout_.k; };
    int64_t cut_tail = 0;
    reader_.run(
        cached_, [&](uint32_t i) -> const Distribution& { return contexts_[is_cut(i) ? kCutTail : kTail]; },
        [&](uint32_t i, uint32_t code) {
          const uint32_t row = scratch_.cached[i];
          out_.tail[row] = -INFINITY;
          if (code == 0) return;
          const int64_t units = unzigzag(code - 1) + (is_cut(i) ? cut_tail : tail_of_level(last_level(row)));
          const double odds = static_cast<double>(units) * layout_.step / kTailFinesse;
          out_.tail[row] = static_cast<float>(odds < -40 ? odds : -log1p(exp(-odds)));
          if (is_cut(i)) cut_tail = units;
        });
  }

  KD_HOST_DEVICE double last_level(uint32_t row) const {
    return floor(scratch_.levels[scratch_.position[row]] / kFractions);
  }

  KD_HOST_DEVICE void log_z() {
    for (uint32_t t = 0; t < layout_.temperatures; ++t) {
      float* log_z = out_.log_z + t * out_.rows;
      if (is_exact()) {
        exact(log_z);
        continue;
      }
      int64_t units = 0;
      run(cached_, kLogZ + t, [&](uint32_t i, uint32_t code) {
        units += unzigzag(code);
        log_z[scratch_.cached[i]] = static_cast<float>(static_cast<double>(units) * layout_.step / kLogZFinesse);
      });
    }
  }

  KD_HOST_DEVICE Complaint next() {
    uint8_t* not_kept = scratch_.order;  // rows, by now free
    uint32_t count = 0;
    Complaint wrong;
    run(cached_, kNext, [&](uint32_t i, uint32_t code) {
      const uint32_t row = scratch_.cached[i], kept = scratch_.counts[row];
      if (code == kNotKnown) out_.next[row] = NAN;
      else if (code == kImpossible) out_.next[row] = -INFINITY;
      else if (code == kNotKept) not_kept[count++] = static_cast<uint8_t>(row);
      else if (code - kEntry < kept) out_.next[row] = out_.logprobs[out_.offsets[row] + (code - kEntry)];
      else wrong = {"entry of the next token, below", kept, int64_t{code} - kEntry};
    });
    if (is_exact())
      for (uint32_t i = 0; i < count; ++i) out_.next[not_kept[i]] = float_of(reader_.bits(32));
    else
      run(count, kNextLevel, [&](uint32_t i, uint32_t level) {
        out_.next[not_kept[i]] = static_cast<float>(0.0 - static_cast<double>(level) * layout_.step);
      });
    return wrong;
  }

  const RowLayout& layout_;
  const Distribution* contexts_;
  uint32_t* id_of_rank_;
  const RowsOut& out_;
  RowScratch& scratch_;
  CodeReader reader_;
  uint32_t cached_ = 0, columns_ = 0;
};

}  // namespace kd
