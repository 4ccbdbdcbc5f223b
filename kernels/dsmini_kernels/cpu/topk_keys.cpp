// The keys that an indexer chooses, for any number of queries: scores of all keys, and the places of the largest.
//
// Keys are transposed once for all queries. Each item scores some queries against one panel after the other, so that a
// panel comes from the first-level cache for all but the first of them.

#include "indexer.h"
#include "entry.h"

namespace {

constexpr int64_t QUERIES_OF_ITEM = 8;
constexpr uint32_t UNSEEN = 0x007FFFFF;  // what sorts like minus infinity

// The memory of a call; sizes in numbers.
template <class Words>
struct KeyBuffers {
  int64_t all = 0, panels, panel_numbers, room;
  float* keys;       // [b, panels, panel_numbers]
  uint32_t* scores;  // [threads, QUERIES_OF_ITEM, room]
  int32_t* places;   // [threads, topk]

  KeyBuffers(const TopkKeysCall& c, float* memory) {
    const auto take = [&](int64_t numbers) {
      float* at = memory == nullptr ? nullptr : memory + all;
      all += round_up(numbers, 16);
      return at;
    };
    panels = divide_up(c.t, PANEL_KEYS), panel_numbers = PANEL_KEYS * words_of<Words>(c.width), room = panels * PANEL_KEYS;
    keys = take(c.b * panels * panel_numbers);
    scores = reinterpret_cast<uint32_t*>(take(c.threads * QUERIES_OF_ITEM * room));
    places = reinterpret_cast<int32_t*>(take(c.threads * round_up(c.topk, 16)));
  }
};

// The places of a query's keys in order, and -1 after them.
void write_indices(const TopkKeysCall& c, uint32_t* scores, const uint8_t* mask, int32_t* places, int64_t* indices) {
  for (int64_t t = 0; t < c.t; ++t) scores[t] = mask[t] ? UNSEEN : scores[t];
  if (c.topk < c.t) select_largest(scores, c.t, c.topk, places);
  int64_t found = 0;
  for (int64_t i = 0; i < c.topk; ++i) {
    const int64_t place = c.topk < c.t ? places[i] : i;
    indices[found] = place;
    found += scores[place] > UNSEEN;
  }
  for (; found < c.topk; ++found) indices[found] = -1;
}

template <class Words>
void step(const TopkKeysCall& c, const KeyBuffers<Words>& m) {
  Team team(c.threads, Team::LONG);
  const int64_t size = c.bf16 ? 2 : 4, of_query = c.heads * c.width * size;
  const auto vectors_of = [&](int64_t panel) { return divide_up(least(PANEL_KEYS, c.t - panel * PANEL_KEYS), LANES); };
  team.each(c.b * m.panels, [&](int64_t item, int64_t) {
    const int64_t i = item / m.panels, first = item % m.panels * PANEL_KEYS;
    const auto row_of = [&](int64_t t) { return c.k + i * c.k_stride + (first + t) * c.width * size; };
    pack<Words>(c.bf16, c.width, least(PANEL_KEYS, c.t - first), vectors_of(item % m.panels), row_of,
                m.keys + item * m.panel_numbers);
  });
  const int64_t blocks = divide_up(c.s, QUERIES_OF_ITEM);
  team.each(c.b * blocks, [&](int64_t item, int64_t thread) {
    const int64_t i = item / blocks, first = item % blocks * QUERIES_OF_ITEM, some = least(QUERIES_OF_ITEM, c.s - first);
    uint32_t* scores = m.scores + thread * QUERIES_OF_ITEM * m.room;
    for (int64_t panel = 0; panel < m.panels; ++panel)
      for (int64_t n = 0; n < some; ++n) {
        const int64_t query = i * c.s + first + n;
        const auto q_of = [&](int64_t h) { return c.q + query * of_query + h * c.width * size; };
        score_panel<Words>(m.keys + (i * m.panels + panel) * m.panel_numbers, vectors_of(panel), c.width, c.heads, q_of,
                           c.weights + query * c.heads, scores + n * m.room + panel * PANEL_KEYS);
      }
    for (int64_t n = 0; n < some; ++n) {
      const int64_t query = i * c.s + first + n, row = c.mask_batch == 1 ? first + n : query;
      write_indices(c, scores + n * m.room, c.mask + row * c.t, m.places + thread * round_up(c.topk, 16),
                  c.topk_indices + query * c.topk);
    }
  });
}

bool topk_keys(const TopkKeysCall& c) {
  bool fine = true;
  with_words(c.bf16, c.bf16 ? WEIGHT_BF16 : WEIGHT_FP32, [&](auto words) {
    using Words = decltype(words);
    fine = with_memory<KeyBuffers<Words>>(c, step<Words>);
  });
  return fine;
}

int64_t check(const TopkKeysCall& c) {
  if (!sizes({c.b, c.s, c.t, c.heads, c.width, c.topk}) || c.b < 1 || c.s < 1 || c.t < 1 || c.t > INT32_MAX || c.heads < 1 ||
      c.width < 1 || c.topk < 1 || c.topk > c.t)
    return BAD_SHAPE;
  if (c.bf16 < 0 || c.bf16 > 1 || (c.mask_batch != 1 && c.mask_batch != c.b)) return BAD_CALL;
  const int64_t size = c.bf16 ? 2 : 4;
  if (!within(c.q, size, c.b, c.s, c.heads, c.width) || !rows_fit(c.k, c.k_stride, size, c.b, c.t, c.width) ||
      !within(c.weights, 4, c.b, c.s, c.heads) || !within(c.mask, 1, c.mask_batch, c.s, c.t) ||
      !within(c.topk_indices, 8, c.b, c.s, c.topk))
    return OUT_OF_BOUNDS;
  return FINE;
}

}  // namespace

ENTRY(topk_keys, TopkKeysCall)
