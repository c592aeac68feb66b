// The decoder of the teacher cache on any bytes. An input is
//
//   u32 vocab | u32 entries | u32 bytes of the model | u16 k | u16 rows | f32 step | u8 temperatures, tail, weights, 0
//   | payload of a model block | payload of rows
//
// Every buffer has exactly the size that the decoder may use. Two builds of it, the plain one and the one with vectors, must
// say the same of all bytes. What they accept must be what a cache may hold, and must come back unchanged when it is encoded
// and decoded again.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "codec/codec.h"

namespace {

struct Head {
  uint32_t vocab, entries, model_bytes;
  uint16_t k, rows;
  float step;
  uint8_t temperatures, tail, weights, zero;
};
static_assert(sizeof(Head) == 24);

void require(bool holds) {
  if (!holds) std::abort();
}

template <class T>
struct Room {
  std::unique_ptr<T[]> data;
  size_t size;
  explicit Room(size_t n, bool wanted = true) : data(wanted ? new T[n] : nullptr), size(wanted ? n : 0) {}
};

struct Rows {
  Room<int64_t> offsets, ids;
  Room<float> logprobs, tail, log_z, next, weights;
  int64_t rows, entries;

  Rows(const kd::RowLayout& layout, size_t rows, size_t entries)
      : offsets(rows + 1), ids(entries), logprobs(entries), tail(rows, layout.tail), log_z(rows * layout.temperatures),
        next(rows), weights(entries, layout.weights), rows(rows), entries(entries) {}

  kd::RowsOut out() const {
    return {rows, entries, offsets.data.get(), ids.data.get(), logprobs.data.get(), tail.data.get(), log_z.data.get(),
            rows, next.data.get(), weights.data.get()};
  }
  kd::RowsIn in() const {
    return {rows, offsets.data.get(), ids.data.get(), logprobs.data.get(), tail.data.get(), log_z.data.get(),
            next.data.get(), weights.data.get()};
  }
};

template <class T>
bool same(const Room<T>& a, const Room<T>& b) {
  return a.size == b.size && (a.size == 0 || std::memcmp(a.data.get(), b.data.get(), a.size * sizeof(T)) == 0);
}

bool same(const Rows& a, const Rows& b) {
  return same(a.offsets, b.offsets) && same(a.ids, b.ids) && same(a.logprobs, b.logprobs) && same(a.tail, b.tail) &&
         same(a.log_z, b.log_z) && same(a.next, b.next) && same(a.weights, b.weights);
}

bool same(const kd::Complaint& a, const kd::Complaint& b) {
  if (!a || !b) return !a == !b;
  return std::strcmp(a.what, b.what) == 0 && a.expected == b.expected && a.found == b.found;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Head head;
  if (size < sizeof head) return 0;
  std::memcpy(&head, data, sizeof head);
  data += sizeof head;
  size -= sizeof head;
  // What a manifest and the head of a block are checked for before the decoder is asked.
  const uint32_t vocab = 1 + head.vocab % (1u << 18), k = 1 + (head.k - 1u) % 65535u, rows = head.rows % 257u;
  const uint32_t entries = std::min<uint64_t>(head.entries % (1u << 17), uint64_t{rows} * k);
  const double step = head.step > 1e-6f && head.step <= 1.0f ? head.step : 0.0;
  const kd::RowLayout layout{vocab, std::min(k, vocab), step, head.temperatures % 4u, head.tail % 2 != 0,
                             head.weights % 2 != 0};
  const size_t model_bytes = std::min<size_t>(head.model_bytes, size);

  kd::RowModel model(kd::avx2::decode_rows), plain_model(kd::baseline::decode_rows);
  if (model.read(layout, {data, model_bytes})) return 0;
  plain_model.read(layout, {data, model_bytes});
  const Rows found(layout, rows, entries), plain(layout, rows, entries);
  const kd::Payload payload{{data + model_bytes, size - model_bytes}, rows, entries};
  const kd::Complaint wrong = model.decode({payload}, found.out());
  require(same(wrong, plain_model.decode({payload}, plain.out())));
  if (wrong) return 0;
  require(same(found, plain));

  bool is_ordinary = step > 0;  // rounded, and not so far down that fp32 loses the step
  for (uint32_t row = 0; row < rows; ++row) {
    const int64_t begin = found.offsets.data[row], end = found.offsets.data[row + 1];
    require(begin <= end && end - begin <= layout.k);
    for (int64_t j = begin; j < end; ++j) {
      const float logprob = found.logprobs.data[j];
      require(found.ids.data[j] >= 0 && found.ids.data[j] < vocab);
      if (step > 0) require(logprob <= 0 && (j == begin || logprob <= found.logprobs.data[j - 1]));
      is_ordinary = is_ordinary && logprob > -step * (1 << 18);
    }
  }
  require(found.offsets.data[0] == 0 && found.offsets.data[rows] == entries);
  if (!is_ordinary) return 0;

  const std::vector<uint8_t> again = model.encode(found.in());
  const Rows twice(layout, rows, entries);
  require(!model.decode({{{again.data(), again.size()}, rows, entries}}, twice.out()));
  require(same(found.offsets, twice.offsets) && same(found.ids, twice.ids) && same(found.logprobs, twice.logprobs) &&
          same(found.weights, twice.weights));
  return 0;
}
