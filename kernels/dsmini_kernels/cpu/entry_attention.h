// V4's attention of a few queries to the rows of a window, to entries, and to a sink, in one pass.
//
// Rows are read as they are stored. The queries of a sequence that see all entries share them: a block of rows is decoded
// once for all queries and heads. With chosen entries each query has rows of its own. Rows that none of the queries sees are
// left out. The rows are cut into parts, whatever the number of threads, and parts are merged by their largest logits
// and sums. The sink is what the first part begins with: a logit with a weight of 1 and no value.

#pragma once

#include "key_rows.h"
#include "pairs.h"

namespace {

#if !BF16_UNITS
constexpr int64_t SOME = KEYS;
#endif

inline bool in_pairs(const EntryAttentionCall& c) {
#if BF16_UNITS
  return c.bf16 && c.width % CHUNK == 0 && __builtin_cpu_supports("avx512bf16");
#else
  return false && c.bf16;
#endif
}

// The memory of a call; sizes in numbers.
struct EntryBuffers {
  const bool pairs;
  const Cut cut;
  int64_t groups, queries;  // groups of queries that share rows, and how many share them
  int64_t rows, length, parts;
  int64_t heads, stride, of_query;  // heads with those that fill the last panel; numbers of a row; of a query for products
  int64_t own, all = 0;
  float *q, *high, *total, *sums, *owned;

  EntryBuffers(const EntryAttentionCall& c, float* memory) : pairs(in_pairs(c)), cut(c.heads) {
    queries = c.chosen != nullptr ? 1 : c.s, groups = c.b * c.s / queries;
    rows = c.near.count + (c.chosen != nullptr ? c.k : c.entries.count);
    // an even number of parts, so that two threads have the same
    const int64_t most = round_up(larger(32 / (c.b * c.s), int64_t{1}), 2);
    const int64_t wanted = rows < 64 ? 1 : least(most, round_up(divide_up(rows, 128), 2));
    length = larger(round_up(divide_up(rows, wanted), 16), int64_t{16}), parts = larger(divide_up(rows, length), int64_t{1});
    heads = pairs ? cut.panels * cut.tokens : c.heads;
    stride = round_up(c.width, UNIT);
    of_query = pairs ? heads * c.width / 2 : heads * stride;
    const auto take = [&](int64_t numbers) {
      float* at = memory == nullptr ? nullptr : memory + all;
      all += round_up(numbers, 16);
      return at;
    };
    q = take(c.b * c.s * of_query);
    high = take(groups * parts * queries * heads);
    total = take(groups * parts * queries * heads);
    sums = take(groups * parts * queries * heads * stride);
    own = round_up(Own(c, *this, nullptr).all, 16);
    owned = take(c.threads * own);
  }

  // Query `i` of a group, in a part.
  int64_t state(int64_t group, int64_t part, int64_t i) const { return ((group * parts + part) * queries + i) * heads; }

  // The memory of a thread.
  struct Own {
    int64_t all = 0;
    float *keys, *logits, *values, *keep;
    int64_t* last;
    uint8_t* hidden;  // [queries, SOME]
    Own(const EntryAttentionCall& c, const EntryBuffers& m, float* memory) {
      const auto take = [&](int64_t numbers) {
        float* at = memory == nullptr ? nullptr : memory + all;
        all += round_up(numbers, 16);
        return at;
      };
      keys = take(SOME * m.stride);
      logits = take(SOME * m.heads), keep = take(m.heads);
      values = take(m.pairs ? SOME / 2 * c.width : 0);
      last = reinterpret_cast<int64_t*>(take(2 * m.heads));
      hidden = reinterpret_cast<uint8_t*>(take(m.queries * SOME / 4));
    }
  };
};

// A query's heads as products read them: panels of pairs, or scaled FP32 rows with zeros after them.
inline void prepare_query(const EntryAttentionCall& c, const EntryBuffers& m, int64_t query) {
  const int64_t size = c.bf16 ? 2 : 4;
  const char* q = c.q + query * c.heads * c.width * size;
  float* to = m.q + query * m.of_query;
#if BF16_UNITS
  for (int64_t first = 0; m.pairs && first < c.heads; first += m.cut.tokens)
    pack<Bf16Words>(true, c.width, least(m.cut.tokens, c.heads - first), m.cut.tokens / LANES,
                    [&](int64_t h) { return q + (first + h) * c.width * size; }, to + first * c.width / 2);
#endif
  for (int64_t h = 0; !m.pairs && h < c.heads; ++h, to += m.stride) {
    decode_numbers(c.bf16 ? CACHE_BF16 : CACHE_FP32, q + h * c.width * size, c.width, to);
    for (int64_t i = 0; i < c.width; ++i) to[i] *= float(c.scale);
    memset(to + c.width, 0, (m.stride - c.width) * 4);
  }
}

// The rows [t, end) that some query of a group sees, `most` at most: calls take(rows, place) for each, and writes to `hidden`
// which query does not see it. Returns where the next block begins.
template <class Take>
int64_t gather(const EntryAttentionCall& c, const EntryBuffers& m, int64_t group, int64_t t, int64_t end, int64_t most, uint8_t* hidden,
               Take take) {
  const int64_t first = group * m.queries, sequence = first / c.s;
  int64_t found = 0;
  for (; t < end && found < most; ++t) {
    const bool is_near = t < c.near.count;
    const int64_t i = is_near ? t : t - c.near.count;
    const KeyRows& rows = is_near ? c.near : c.entries;
    const int64_t place = is_near || c.chosen == nullptr ? i : c.chosen[group * c.k + i];
    const uint8_t* mask = is_near ? c.masked : c.hidden;
    const int64_t batch = is_near ? c.masked_batch : c.hidden_batch;
    bool seen = false;
    for (int64_t j = 0; j < m.queries; ++j) {
      const int64_t query = batch == 1 ? first % c.s + j : first + j;
      const bool hides = !is_near && c.chosen != nullptr ? place < 0 : mask[query * rows.count + i] != 0;
      hidden[j * SOME + found] = hides, seen = seen || !hides;
    }
    if (!seen) continue;
    take(rows, rows.data + sequence * rows.batch + place * rows.row);
    ++found;
  }
  return t;
}

inline bool sees_any(const uint8_t* hidden, int64_t some) {
  for (int64_t t = 0; t < some; ++t)
    if (hidden[t] == 0) return true;
  return false;
}

inline void attend_entries_of(const EntryAttentionCall& c, const EntryBuffers& m, int64_t group, int64_t part, float* memory) {
  const EntryBuffers::Own own(c, m, memory);
  const int64_t block = m.pairs ? SOME : KEYS, end = least(m.rows, (part + 1) * m.length);
  for (int64_t j = 0; j < m.queries; ++j) {
    const int64_t at = m.state(group, part, j);
    begin_part(m.heads, m.high + at, m.total + at, m.sums + at * m.stride, m.stride);
    for (int64_t h = 0; part == 0 && h < c.heads; ++h) m.high[at + h] = c.sink[h], m.total[at + h] = 1;
  }
  for (int64_t h = 0; h < m.heads; ++h) own.last[h] = KEYS;
  if (!m.pairs) clear_after(own.keys, c.width, m.stride);
  for (int64_t t = part * m.length; t < end;) {
    const char *places[SOME], *decoded[SOME];
    bool is_near[SOME];
    int64_t some = 0;
    t = gather(c, m, group, t, end, block, own.hidden, [&](const KeyRows& rows, const char* place) {
      is_near[some] = &rows == &c.near, places[some++] = place;
    });
    for (int64_t i = 0; i < some; ++i) {
      const KeyRows& rows = is_near[i] ? c.near : c.entries;
      if (i + SOON < some) prefetch(places[i + SOON], rows.row);
      char* to = reinterpret_cast<char*>(own.keys + i * m.stride);
      decoded[i] = m.pairs && rows.type == KEYS_BF16 ? places[i] : to;
      if (!m.pairs)
        decode_key(rows, places[i], c.width, own.keys + i * m.stride);
      else if (decoded[i] == to)
        decode_key_in_bf16(rows, places[i], c.width, to);
    }
    for (int64_t j = 0; j < m.queries; ++j) {
      const uint8_t* hidden = own.hidden + j * SOME;
      if (!sees_any(hidden, some)) continue;
      const int64_t at = m.state(group, part, j);
      const float* q = m.q + (group * m.queries + j) * m.of_query;
      if (!m.pairs) {
        const auto nothing = [](int64_t) {};
        attend_block(0, some, decoding(nothing), own.keys, m.stride, own.keys, m.stride, c.width, q, c.heads, own.last, m.high + at,
                     m.total + at, m.sums + at * m.stride, m.stride, own.logits, own.keep, hidden);
        continue;
      }
#if BF16_UNITS
      for (int64_t h = 0; h < c.heads; h += m.cut.tokens) {
        const PanelOfHeads panel{m.cut.tokens / LANES, m.cut.tokens, c.width, c.width, q + h * c.width / 2, own.logits, own.values,
                                 own.keep, m.sums + (at + h) * m.stride, m.high + at + h, m.total + at + h};
        add_keys(panel, [&](int64_t i) { return decoded[least(i, some - 1)]; }, some, 0, float(c.scale),
                 least(m.cut.tokens, c.heads - h), hidden);
      }
#endif
    }
  }
}

// The weighted mean over all parts of the rows that a head of a query sees.
inline void merge_entries(const EntryAttentionCall& c, const EntryBuffers& m, int64_t query, int64_t head) {
  const int64_t at = m.state(query / m.queries, 0, query % m.queries) + head, apart = m.queries * m.heads;
  char* out = c.out + (query * c.heads + head) * c.width * (c.bf16 ? 2 : 4);
  float mean[MOST_WIDTH];
  merge_parts(m.high + at, m.total + at, m.sums + at * m.stride, m.parts, apart, apart * m.stride, c.width, mean);
#if BF16_UNITS
  if (m.pairs) return put_mean(mean, 1.0f, c.width, out);
#endif
  encode_numbers(c.bf16 ? CACHE_BF16 : CACHE_FP32, mean, c.width, out);
}

inline void attend_entries(const EntryAttentionCall& c, const EntryBuffers& m, Team& team) {
  constexpr int64_t HEADS_OF_ITEM = 8;
  team.each(c.b * c.s, [&](int64_t query, int64_t) { prepare_query(c, m, query); });
  team.each(m.groups * m.parts, [&](int64_t item, int64_t thread) {
    attend_entries_of(c, m, item / m.parts, item % m.parts, m.owned + thread * m.own);
  });
  const int64_t items = divide_up(c.heads, HEADS_OF_ITEM);
  team.each(c.b * c.s * items, [&](int64_t item, int64_t) {
    const int64_t first = item % items * HEADS_OF_ITEM;
    for (int64_t h = first; h < least(c.heads, first + HEADS_OF_ITEM); ++h) merge_entries(c, m, item / items, h);
  });
}

}  // namespace
