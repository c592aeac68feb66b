#include "codec.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "code_reader.h"
#include "rans_writer.h"

namespace kd {
namespace {

uint32_t zigzag(int64_t v) { return static_cast<uint32_t>(v < 0 ? -2 * v - 1 : 2 * v); }

// A tail of mass t as log(t / (1 - t)): as exact for the entries' mass as for the tail's own.
double log_odds(double log_tail) { return std::min(log_tail - std::log(-std::expm1(std::min(log_tail, 0.0))), 89.0); }

// To the nearest integer, halves to the even one, below 2^51: without a call of the C library for each number.
double rounded(double x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  return (x + kMagic) - kMagic;
}

// Puts the numbers of rows into a sink, in the order in which they are coded.
template <class Sink> class RowWalk {
 public:
  RowWalk(const RowLayout& layout, const RowsIn& rows, Ranks* ranks, Sink& sink)
      : layout_(layout), rows_(rows), ranks_(ranks), sink_(sink), entries_(rows.offsets[rows.rows] - rows.offsets[0]) {}

  void all() {
    sink_.run();
    for (int64_t row = 0; row < rows_.rows; ++row) {
      sink_.number(kCount, count(row) == 0 ? 0 : 1 + layout_.k - count(row));
      if (count(row) > 0) cached_.push_back(row);
    }
    lay_columns();
    for (const int64_t row : cached_) {
      if (layout_.step > 0) round(row);
      put(row);
    }
    if (ranks_) take_back();
    if (layout_.step > 0) gaps();
    else for (int64_t i = rows_.offsets[0]; i < rows_.offsets[rows_.rows]; ++i) exact(kGap, rows_.logprobs[i]);
    by_columns([&](uint32_t, size_t i) { sink_.number(rank_contexts_[i], rank_numbers_[i]); });
    weights();
    if (layout_.tail) tails();
    for (uint32_t t = 0; t < layout_.temperatures; ++t) log_z(t);
    next();
  }

 private:
  struct Entry {
    uint32_t level, rank;
    int64_t source;  // where it is in the rows as they were given
  };

  uint32_t count(int64_t row) const { return static_cast<uint32_t>(rows_.offsets[row + 1] - rows_.offsets[row]); }
  Entry* entries(int64_t row) { return entries_.data() + (rows_.offsets[row] - rows_.offsets[0]); }
  void exact(uint32_t context, float value) { sink_.bits(context, bits_of(value), 32); }

  // Where the entries of each column stand, those of the longest row first.
  void lay_columns() {
    std::vector<int64_t> order = cached_;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return count(a) > count(b); });
    position_.resize(rows_.rows);
    for (size_t i = 0; i < order.size(); ++i) position_[order[i]] = i;
    columns_.push_back(0);
    for (size_t active = order.size(); active > 0;) {
      columns_.push_back(columns_.back() + active);
      while (active > 0 && count(order[active - 1]) + 1 == columns_.size()) --active;
    }
    fractions_.resize(order.size());
    gaps_.resize(entries_.size());
    rank_numbers_.resize(entries_.size());
    rank_contexts_.resize(entries_.size());
  }

  // Levels of the entries of a row, whose first has the row's fraction of a step.
  void round(int64_t row) {
    Entry* e = entries(row);
    const float* logprobs = rows_.logprobs + rows_.offsets[row];
    const double scale = -1.0 / layout_.step;
    const double first = std::max(0.0, rounded(logprobs[0] * scale * kFractions));
    const uint32_t fraction = static_cast<uint32_t>(static_cast<uint64_t>(first) % kFractions);
    const double shift = fraction / static_cast<double>(kFractions);
    fractions_[position_[row]] = static_cast<uint8_t>(fraction);
    for (uint32_t j = 0; j < count(row); ++j)
      e[j].level = static_cast<uint32_t>(std::max(0.0, rounded(logprobs[j] * scale - shift)));
  }

  // The numbers of a row into their columns: entries of one level by rank. The ranks then change for the next row.
  void put(int64_t row) {
    Entry* e = entries(row);
    const uint32_t n = count(row);
    const bool has_levels = layout_.step > 0;
    for (uint32_t j = 0; j < n; ++j) {
      e[j].source = rows_.offsets[row] + j;
      const uint32_t id = static_cast<uint32_t>(rows_.ids[e[j].source]);
      e[j].rank = ranks_ ? ranks_->rank_of_id[id] : id;
    }
    for (uint32_t j = 1, stop; has_levels && j < n; j = stop) {
      for (stop = j + 1; stop < n && e[stop].level == e[j].level;) ++stop;
      if (stop - j > 1) std::sort(e + j, e + stop, [](const Entry& a, const Entry& b) { return a.rank < b.rank; });
    }
    bool is_tie = false;
    uint32_t level = 0, before = 0;
    for (uint32_t j = 0; j < n; ++j) {
      const bool is_followed = has_levels && j > 0 && j + 1 < n && e[j + 1].level == e[j].level;
      const size_t i = columns_[j] + position_[row];
      gaps_[i] = e[j].level - level;
      rank_numbers_[i] = is_tie ? e[j].rank - before - 1 : e[j].rank;
      const uint32_t company = (is_tie ? kIsTie : 0) | (is_followed ? kIsFollowed : 0);
      rank_contexts_[i] = static_cast<uint8_t>(rank_context(place_of(j), company, before));
      is_tie = is_followed;
      level = e[j].level;
      before = e[j].rank;
    }
    for (uint32_t j = 0; ranks_ && j < n; ++j) ranks_->promote(e[j].rank);
  }

  // Ranks as they were before the rows.
  void take_back() {
    for (size_t i = cached_.size(); i-- > 0;) {
      const Entry* e = entries(cached_[i]);
      for (uint32_t j = count(cached_[i]); j-- > 0;) ranks_->promote(e[j].rank);
    }
  }

  // Calls with the column and the place of each entry, one column after the other.
  template <class Call> void by_columns(const Call& call) {
    for (uint32_t j = 0; j + 1 < columns_.size(); ++j) {
      sink_.run();
      for (size_t i = columns_[j]; i < columns_[j + 1]; ++i) call(j, i);
    }
  }

  void gaps() {
    for (const uint8_t fraction : fractions_) sink_.bits(kGap, fraction, 8);
    by_columns([&](uint32_t j, size_t i) { sink_.number(kGap + place_of(j), gaps_[i]); });
  }

  void weights() {
    if (layout_.weights)
      for (const Entry& e : entries_) exact(kWeight, rows_.weights[e.source]);
  }

  void tails() {
    int64_t cut_tail = 0;
    sink_.run();
    for (const int64_t row : cached_) {
      if (layout_.step == 0) {
        exact(kTail, rows_.tail[row]);
        continue;
      }
      const double odds = log_odds(rows_.tail[row]) * kTailFinesse / layout_.step;
      const bool is_cut = count(row) < layout_.k;
      const uint32_t context = is_cut ? kCutTail : kTail;
      if (odds < -(kMaxLevel / 2.0)) {
        sink_.number(context, 0);  // mass 0
        continue;
      }
      const int64_t units = std::llround(odds);
      const int64_t expected = is_cut ? cut_tail : tail_of_level(entries(row)[count(row) - 1].level);
      sink_.number(context, 1 + zigzag(units - expected));
      if (is_cut) cut_tail = units;
    }
  }

  void log_z(uint32_t t) {
    int64_t before = 0;
    sink_.run();
    for (const int64_t row : cached_) {
      const float value = rows_.log_z[t * rows_.rows + row];
      if (layout_.step == 0) {
        exact(kLogZ + t, value);
        continue;
      }
      const int64_t units = std::llround(value * kLogZFinesse / layout_.step);
      sink_.number(kLogZ + t, zigzag(units - before));
      before = units;
    }
  }

  void next() {
    std::vector<float> not_kept;
    sink_.run();
    for (const int64_t row : cached_) {
      const uint32_t code = next_code(row);
      sink_.number(kNext, code);
      if (code == kNotKept) not_kept.push_back(rows_.next[row]);
    }
    sink_.run();
    for (const float value : not_kept) {
      if (layout_.step == 0) exact(kNextLevel, value);
      else sink_.number(kNextLevel, static_cast<uint32_t>(std::max(0.0, rounded(-value / layout_.step))));
    }
  }

  uint32_t next_code(int64_t row) {
    const float value = rows_.next[row];
    if (std::isnan(value)) return kNotKnown;
    if (std::isinf(value)) return kImpossible;
    const Entry* e = entries(row);
    for (uint32_t j = 0; j < count(row); ++j)
      if (rows_.logprobs[e[j].source] == value) return kEntry + j;
    return kNotKept;
  }

  const RowLayout& layout_;
  const RowsIn& rows_;
  Ranks* ranks_;  // null: every id is its own rank
  Sink& sink_;
  std::vector<Entry> entries_;
  std::vector<int64_t> cached_;                    // rows that are
  std::vector<size_t> position_, columns_;         // of a row in a column; where each column begins
  std::vector<uint8_t> fractions_, rank_contexts_;
  std::vector<uint32_t> gaps_, rank_numbers_;      // by columns, as the contexts
};

struct CodeSink {
  const std::vector<Distribution>& contexts;
  CodeWriter writer;
  void run() { writer.run(); }
  void number(uint32_t context, uint32_t value) { writer.number(contexts[context], value); }
  void bits(uint32_t, uint32_t value, uint32_t count) { writer.bits(value, count); }
};

struct CountSink {
  std::vector<std::vector<double>> counts;
  explicit CountSink(uint32_t contexts) : counts(contexts, std::vector<double>(kClasses)) {}
  void run() {}
  void number(uint32_t context, uint32_t value) { ++counts[context][class_of(value)]; }
  void bits(uint32_t, uint32_t, uint32_t) {}
};

constexpr double kPrior = 16;  // a context that is new leans on the others of its kind with so many numbers

// Adds to the contexts [begin, end) that were seen at all what they have in common.
void lean_on_each_other(std::vector<std::vector<double>>& counts, uint32_t begin, uint32_t end) {
  std::vector<double> sum(kClasses);
  double total = 0;
  for (uint32_t c = begin; c < end; ++c)
    for (uint32_t s = 0; s < kClasses; ++s) sum[s] += counts[c][s], total += counts[c][s];
  for (uint32_t c = begin; c < end; ++c) {
    if (std::all_of(counts[c].begin(), counts[c].end(), [](double n) { return n == 0; })) continue;
    for (uint32_t s = 0; s < kClasses; ++s) counts[c][s] += kPrior * sum[s] / total;
  }
}

struct CostSink {
  const std::vector<Distribution>& contexts;
  std::vector<double> cost;
  void run() {}
  void number(uint32_t context, uint32_t value) {
    const Symbol s = contexts[context].of(value);
    cost[context] += kTotalBits - std::log2(s.frequency()) + s.range().bits;
  }
  void bits(uint32_t context, uint32_t, uint32_t count) { cost[context] += count; }
};

// Frequencies in the proportion of the counts, each at least 1, with an escape after the highest class that was seen.
std::vector<uint16_t> normalised(const std::vector<double>& counts) {
  double total = 0;
  size_t alphabet = 1, most = 0;
  for (size_t c = 0; c < counts.size(); ++c) {
    total += counts[c];
    if (counts[c] > 0) alphabet = c + 2;
    if (counts[c] > counts[most]) most = c;
  }
  std::vector<uint16_t> frequencies(alphabet, 1);
  const uint32_t room = kTotal - static_cast<uint32_t>(alphabet);
  uint32_t left = room;
  for (size_t c = 0; c + 1 < alphabet; ++c) {
    const uint32_t share = std::min(static_cast<uint32_t>(counts[c] / total * room), left);
    frequencies[c] = static_cast<uint16_t>(1 + share);
    left -= share;
  }
  frequencies[most] = static_cast<uint16_t>(frequencies[most] + left);
  return frequencies;
}

// Ranks to learn from. An id that was seen once would not have been seen without the entry that is looked at: in rows
// to come such ids stand among those not seen yet. So they change places with some of these, evenly spread.
Ranks ranks_to_learn_from(const std::vector<uint8_t>& levels, const int32_t* id_counts) {
  Ranks ranks(levels);
  const size_t total = levels.size();
  const auto seen = [&](int32_t least) {
    return static_cast<uint64_t>(std::count_if(id_counts, id_counts + total, [=](int32_t n) { return n >= least; }));
  };
  const uint64_t first_once = seen(2), first_new = seen(1), once = first_new - first_once, fresh = total - first_new;
  ranks.find_ranks();
  if (fresh >= once)
    for (uint64_t i = 0; i < once; ++i)
      ranks.swap(static_cast<uint32_t>(first_once + i), static_cast<uint32_t>(first_new + i * fresh / once));
  return ranks;
}

}  // namespace

Ranks::Ranks(const std::vector<uint8_t>& levels) : id_of_rank(levels.size()) {
  uint32_t begin[kRankLevels + 1] = {};
  for (const uint8_t level : levels) ++begin[kRankLevels - level];
  for (uint32_t i = 1; i <= kRankLevels; ++i) begin[i] += begin[i - 1];
  for (uint32_t id = 0; id < levels.size(); ++id) id_of_rank[begin[kRankLevels - 1 - levels[id]]++] = id;
}

void Ranks::find_ranks() {
  rank_of_id.resize(id_of_rank.size());
  for (uint32_t rank = 0; rank < id_of_rank.size(); ++rank) rank_of_id[id_of_rank[rank]] = rank;
}

std::vector<uint8_t> learn_model(const RowLayout& layout, const std::vector<RowsIn>& rows, const int32_t* id_counts) {
  std::vector<uint8_t> levels;
  std::unique_ptr<Ranks> ranks;
  CountSink sink(context_count(layout));
  if (id_counts) {
    levels.resize(layout.vocab);
    for (uint32_t id = 0; id < layout.vocab; ++id) {
      levels[id] = static_cast<uint8_t>(std::log2(1.0 + id_counts[id]));
      sink.number(kIdLevel, levels[id]);
    }
    ranks = std::make_unique<Ranks>(ranks_to_learn_from(levels, id_counts));
  }
  for (const RowsIn& part : rows) RowWalk<CountSink>(layout, part, ranks.get(), sink).all();
  lean_on_each_other(sink.counts, kGap, kRank);
  lean_on_each_other(sink.counts, kRank, kLogZ);

  CodeWriter writer;
  std::vector<Distribution> contexts(context_count(layout));
  for (size_t c = 0; c < contexts.size(); ++c) {
    const std::vector<uint16_t> frequencies = normalised(sink.counts[c]);
    contexts[c].assign(frequencies.data(), static_cast<uint32_t>(frequencies.size()));
    writer.gamma(static_cast<uint32_t>(frequencies.size()));
    for (size_t s = 0; s + 1 < frequencies.size(); ++s) writer.gamma(frequencies[s]);
  }
  writer.bits(id_counts != nullptr, 1);
  writer.run();
  for (const uint8_t level : levels) writer.number(contexts[kIdLevel], level);
  return writer.finish();
}

Complaint RowModel::read(const RowLayout& layout, Span payload) {
  layout_ = layout;
  std::vector<uint8_t> bytes(payload.data, payload.data + payload.size);
  bytes.resize(payload.size + kCodePad);
  CodeReader reader;
  if (!reader.open({bytes.data(), payload.size})) return {"bytes of a model", kCodeHeadBytes, static_cast<int64_t>(payload.size)};
  contexts_.resize(context_count(layout));
  for (Distribution& context : contexts_) {
    const uint32_t alphabet = reader.gamma();
    if (alphabet > kMaxAlphabet) return {"symbols of a context, at most", kMaxAlphabet, alphabet};
    std::vector<uint16_t> frequencies(alphabet);
    uint32_t left = kTotal;
    for (uint32_t s = 0; s + 1 < alphabet; ++s) {
      const uint32_t frequency = reader.gamma();
      if (frequency >= left) return {"frequencies of a context, below", kTotal, int64_t{kTotal} - left + frequency};
      frequencies[s] = static_cast<uint16_t>(frequency);
      left -= frequency;
    }
    frequencies.back() = static_cast<uint16_t>(left);
    context.assign(frequencies.data(), alphabet);
  }
  slots_.resize(contexts_.size() * kTotal);
  auto* const slots = reinterpret_cast<Symbol*>(slots_.data());
  for (size_t c = 0; c < contexts_.size(); ++c) contexts_[c].spread(slots + c * kTotal);
  levels_.assign(reader.bits(1) ? layout.vocab : 0, 0);
  uint32_t most = 0, levels[kBlockRows];
  static_assert(kBlockRows % kLanes == 0, "a part of a run goes on with the lane that follows");
  for (size_t id = 0; id < levels_.size(); id += kBlockRows) {
    const uint32_t count = static_cast<uint32_t>(std::min<size_t>(kBlockRows, levels_.size() - id));
    reader.run(count, OneContext{slots + kIdLevel * kTotal}, levels);
    for (uint32_t i = 0; i < count; ++i) {
      levels_[id + i] = static_cast<uint8_t>(levels[i]);
      most = std::max(most, levels[i]);
    }
  }
  if (most >= kRankLevels) return {"level of an id, below", kRankLevels, most};
  idle_.clear();
  if (!reader.is_at_end()) return {"end of a model", 1, 0};
  return {};
}

// What one thread decodes or encodes with.
struct RowModel::Workspace {
  std::unique_ptr<Ranks> ranks;  // null: every id is its own rank
  std::vector<uint8_t> bytes;
  std::vector<uint32_t> columns, entries, row;
  std::vector<float> moved;
  std::vector<uint64_t> run;
  RowScratch scratch;
};

RowModel::RowModel(DecodeRows decode_rows) : decode_rows_(decode_rows) {}
RowModel::~RowModel() = default;

std::unique_ptr<RowModel::Workspace> RowModel::take_workspace() const {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      std::unique_ptr<Workspace> workspace = std::move(idle_.back());
      idle_.pop_back();
      return workspace;
    }
  }
  auto workspace = std::make_unique<Workspace>();
  if (!levels_.empty()) workspace->ranks = std::make_unique<Ranks>(levels_);
  workspace->columns.resize(layout_.k + 1);
  const size_t keys = layout_.k + 2 * kCountMost + kScratchLanes;
  workspace->row.resize(keys + layout_.k + kScratchLanes);
  workspace->moved.resize(layout_.k);
  workspace->run.resize(layout_.k);
  workspace->scratch.columns = workspace->columns.data();
  workspace->scratch.keys = workspace->row.data();
  workspace->scratch.places = workspace->scratch.keys + keys;
  workspace->scratch.moved = workspace->moved.data();
  workspace->scratch.run = workspace->run.data();
  return workspace;
}

void RowModel::give_back(std::unique_ptr<Workspace> workspace) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(workspace));
}

template <class Sink> void RowModel::walk(const RowsIn& rows, Sink& sink) const {
  std::unique_ptr<Workspace> workspace = take_workspace();
  Ranks* ranks = workspace->ranks.get();
  if (ranks && ranks->rank_of_id.empty()) ranks->find_ranks();
  RowWalk<Sink>(layout_, rows, ranks, sink).all();
  give_back(std::move(workspace));
}

std::vector<uint8_t> RowModel::encode(const RowsIn& rows) const {
  CodeSink sink{contexts_, {}};
  walk(rows, sink);
  return sink.writer.finish();
}

std::vector<double> RowModel::bits_by_context(const RowsIn& rows) const {
  CostSink sink{contexts_, std::vector<double>(contexts_.size())};
  walk(rows, sink);
  return sink.cost;
}

Complaint RowModel::decode(const std::vector<Payload>& blocks, const RowsOut& out) const {
  std::unique_ptr<Workspace> workspace = take_workspace();
  RowScratch& scratch = workspace->scratch;
  Ranks* ranks = workspace->ranks.get();
  uint32_t* id_of_rank = ranks ? ranks->id_of_rank.data() : nullptr;
  RowsOut part = out;
  Complaint wrong;
  for (const Payload& block : blocks) {
    part.rows = block.rows;
    part.entries = block.entries;
    const size_t room = static_cast<size_t>(block.entries) + kScratchSlack, bytes = block.bytes.size;
    if (workspace->entries.size() < 3 * room) workspace->entries.resize(3 * room);
    scratch.gaps = workspace->entries.data();
    scratch.ranks = scratch.gaps + room;
    scratch.by_row = scratch.ranks + room;
    if (workspace->bytes.size() < bytes + kCodePad) workspace->bytes.resize(bytes + kCodePad);
    std::copy_n(block.bytes.data, bytes, workspace->bytes.data());
    std::fill_n(workspace->bytes.data() + bytes, kCodePad, uint8_t{});
    wrong = decode_rows_(layout_, slots_.data(), id_of_rank, part, scratch, {workspace->bytes.data(), bytes});
    if (wrong) break;
    const int64_t begin = part.ids - out.ids;
    for (int64_t row = 0; row <= block.rows; ++row) part.offsets[row] += begin;
    part.offsets += block.rows;
    part.ids += block.entries;
    part.logprobs += block.entries;
    if (part.tail) part.tail += block.rows;
    part.log_z += block.rows;
    part.next += block.rows;
    if (part.weights) part.weights += block.entries;
  }
  // An encoder's ranks of ids stay as they are: the decoder takes back what it changes.
  give_back(std::move(workspace));
  return wrong;
}

}  // namespace kd
