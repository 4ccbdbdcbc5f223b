// The routed experts for any number of tokens, whose routing is known. Panels of an expert's tokens go through w1 and w3
// to hidden numbers, which are panels again; then each part of the columns of y sums over all experts, in their order.

#include "activations.h"
#include "panels.h"
#include "entry.h"

namespace {

constexpr int64_t MOST_HIDDEN = 8 << 20;  // numbers of memory for hidden panels: more tokens are computed in turns
constexpr int64_t HALF = ROWS_AT_ONCE / 2;
constexpr int64_t WIDEST_PART = 64;  // columns of y that an item sums
constexpr int64_t SHARED = 4;        // panels of an expert that share a row of its weights, which may have to be converted

// Tokens of one expert, and their hidden numbers.
struct PairPanel {
  int64_t expert, slot, count, vectors;
  float* hidden;
};

// The memory of `n` tokens; sizes in numbers. A slot is a token-expert pair; they are sorted by expert.
template <class Words>
struct ExpertBuffers {
  int64_t all = 0, threads, panel_numbers, inter_words, each;
  int64_t *slot_token, *first_slot, *counts, *groups;  // of up to SHARED panels of an expert: their first panels
  float *slot_weight, *hidden, *of_threads;
  PairPanel* panels;

  ExpertBuffers(const ExpertsCall& c, int64_t n, float* memory) {
    const int64_t slots = n * c.k;
    threads = c.threads;
    const auto take = [&](int64_t numbers) {
      float* at = memory == nullptr ? nullptr : memory + all;
      all += round_up(numbers, 16);
      return at;
    };
    slot_token = reinterpret_cast<int64_t*>(take(2 * slots));
    slot_weight = take(slots);
    first_slot = reinterpret_cast<int64_t*>(take(2 * (c.experts + 1)));
    counts = reinterpret_cast<int64_t*>(take(2 * c.experts));
    panels = reinterpret_cast<PairPanel*>(take(most_panels(c, n) * int64_t(sizeof(PairPanel) / 4)));
    groups = reinterpret_cast<int64_t*>(take(2 * (most_panels(c, n) + 1)));
    inter_words = words_of<Words>(round_up(c.inter, HALF));
    hidden = take(most_vectors(c, n) * LANES * inter_words);
    panel_numbers = MOST_VECTORS * LANES * words_of<Words>(c.dim);
    const int64_t longest = c.dim > c.inter ? c.dim : c.inter;
    each = SHARED * panel_numbers + LANES * converted(longest) + n * WIDEST_PART;
    each = round_up(each, 16);
    of_threads = take(threads * each);
  }
  static int64_t most_panels(const ExpertsCall& c, int64_t n) {
    return n * c.k / (MOST_VECTORS * LANES) + least(c.experts, n * c.k);
  }
  // A panel of Cut has less than a vector more than its tokens need, and less than a vector each in rounding.
  static int64_t most_vectors(const ExpertsCall& c, int64_t n) { return n * c.k / LANES + 2 * most_panels(c, n); }
};

// Sorts the token-expert pairs of n tokens by expert, and cuts each expert's into panels, and these into groups. Returns the number of
// groups.
template <class Words>
int64_t sort_pairs(const ExpertsCall& c, const ExpertBuffers<Words>& m, const int64_t* indices, const float* weights, int64_t n) {
  memset(m.counts, 0, c.experts * 8);
  for (int64_t i = 0; i < n * c.k; ++i) ++m.counts[indices[i]];
  int64_t slot = 0, panels = 0, groups = 0;
  float* hidden = m.hidden;
  for (int64_t e = 0; e < c.experts; ++e) {
    m.first_slot[e] = slot;
    const Cut cut(m.counts[e]);
    for (int64_t from = 0; from < m.counts[e]; from += cut.tokens) {
      const int64_t count = least(cut.tokens, m.counts[e] - from), vectors = divide_up(count, LANES);
      if (from / cut.tokens % SHARED == 0) m.groups[groups++] = panels;
      m.panels[panels++] = {e, slot + from, count, vectors, hidden};
      hidden += vectors * LANES * m.inter_words;
    }
    slot += m.counts[e];
  }
  for (int64_t i = 0; i < n * c.k; ++i) {
    const int64_t to = m.first_slot[indices[i]]++;
    m.slot_token[to] = i / c.k, m.slot_weight[to] = weights[i];
  }
  m.groups[groups] = panels;
  return groups;
}

// Hidden numbers [from, to) of the `count` panels of a group: silu(w1 x) * (w3 x). `from` is a multiple of HALF.
template <class Words>
void gate_and_up(const ExpertsCall& c, const ExpertBuffers<Words>& m, const PairPanel* group, int64_t count, const float* x, int64_t from,
                 int64_t to, float* memory) {
  const Matrix w1 = part_of(c.w1, group->expert, c.inter), w3 = part_of(c.w3, group->expert, c.inter);
  for (int64_t row = from; row < to; row += HALF) {
    float both[ROWS_AT_ONCE * MOST_VECTORS * LANES];
    const char* rows[ROWS_AT_ONCE];
    for (int64_t r = 0; r < ROWS_AT_ONCE; ++r)
      rows[r] = get_row<Words>(r < HALF ? w1 : w3, least(row + r % HALF, c.inter - 1), memory + r * converted(c.dim));
    for (const PairPanel* p = group; p < group + count; ++p) {
      const int64_t width = p->vectors * LANES;
      multiply<Words>(rows, x + (p - group) * m.panel_numbers, p->vectors, c.dim, HALF * w1.stride, both);
      for (int64_t i = 0; i < width; i += LANES) {
        F h[HALF];
        for (int64_t r = 0; r < HALF; ++r) {
          const F up = load<F>(both + (HALF + r) * width + i);
          h[r] = row + r < c.inter ? silu(load<F>(both + r * width + i)) * up : F{};
        }
        if constexpr (Words::NUMBERS == 2) {
          store(p->hidden + row / 2 * width + i, word_of(h[0], h[1]));
        } else {
          for (int64_t r = 0; r < HALF; ++r) store(p->hidden + (row + r) * width + i, h[r]);
        }
      }
    }
  }
}

// Adds columns [from, to) of w2 hidden of a group, times the weight of each pair, to total [tokens, WIDEST_PART].
template <class Words>
void add_down(const ExpertsCall& c, const ExpertBuffers<Words>& m, const PairPanel* group, int64_t count, int64_t from, int64_t to,
              float* total, float* memory) {
  const Matrix w2 = part_of(c.w2, group->expert, c.dim);
  float out[LANES * MOST_VECTORS * LANES];
  for (int64_t column = from; column < to; column += LANES) {
    const char* rows[LANES];
    for (int64_t r = 0; r < LANES; ++r)
      rows[r] = get_row<Words>(w2, least(column + r, c.dim - 1), memory + r * converted(c.inter));
    for (const PairPanel* p = group; p < group + count; ++p) {
      strip<Words>([&](int64_t r) { return rows[r]; }, LANES, p->hidden, p->vectors, c.inter, LANES * w2.stride, out);
      for (int64_t v = 0; v < p->vectors; ++v) {
        F block[LANES];
        turn(out, p->vectors, v, block);
        for (int64_t t = 0; t < least(LANES, p->count - v * LANES); ++t) {
          const int64_t slot = p->slot + v * LANES + t;
          float* sum = total + m.slot_token[slot] * WIDEST_PART + column - from;
          store(sum, load<F>(sum) + block[t] * splat(m.slot_weight[slot]));
        }
      }
    }
  }
}

template <class Words>
void compute(const ExpertsCall& c, ExpertBuffers<Words>& m, Team& team, int64_t first, int64_t n) {
  const int64_t size = c.bf16 ? 2 : 4;
  const int64_t groups = sort_pairs(c, m, c.indices + first * c.k, c.weights + first * c.k, n);
  const auto memory_of = [&](int64_t thread) { return m.of_threads + thread * m.each; };
  const auto size_of = [&](int64_t group) { return m.groups[group + 1] - m.groups[group]; };
  // 1. hidden numbers of all panels; few groups are shared by parts, each of which packs x once more
  const int64_t wanted = m.threads > 1 && groups < 4 * m.threads ? divide_up(4 * m.threads, groups ? groups : 1) : 1;
  const int64_t part = round_up(divide_up(c.inter, wanted), 32), parts = divide_up(c.inter, part);
  team.each(groups * parts, [&](int64_t item, int64_t thread) {
    const PairPanel* group = m.panels + m.groups[item / parts];
    const int64_t count = size_of(item / parts), from = item % parts * part;
    float* x = memory_of(thread);
    const char* rows = c.x + first * c.dim * size;
    for (int64_t i = 0; i < count; ++i)
      pack<Words>(c.bf16, c.dim, group[i].count, group[i].vectors,
                  [&](int64_t token) { return rows + m.slot_token[group[i].slot + token] * c.dim * size; }, x + i * m.panel_numbers);
    gate_and_up(c, m, group, count, x, from, least(c.inter, from + part), x + SHARED * m.panel_numbers);
  });
  // 2. y, a part of its columns at a time
  team.each(divide_up(c.dim, WIDEST_PART), [&](int64_t item, int64_t thread) {
    const int64_t from = item * WIDEST_PART, to = least(c.dim, from + WIDEST_PART);
    float* total = memory_of(thread);
    float* memory = total + n * WIDEST_PART;
    memset(total, 0, n * WIDEST_PART * 4);
    for (int64_t i = 0; i < groups; ++i) add_down(c, m, m.panels + m.groups[i], size_of(i), from, to, total, memory);
    for (int64_t t = 0; t < n; ++t)
      for (int64_t i = from; i < to; i += LANES)
        put(c.bf16, load<F>(total + t * WIDEST_PART + i - from), least(LANES, to - i), c.y + ((first + t) * c.dim + i) * size);
  });
}

bool experts(const ExpertsCall& c) {
  bool fine = true;
  const bool one_type = c.w1.type == c.w2.type && c.w1.type == c.w3.type;
  // with several panels an expert, rows that become FP32 once are faster than those that do in registers; the bits are equal
  const bool widened = one_type && c.n * c.k < 2 * MOST_VECTORS * LANES * c.experts;
  with_words(c.bf16 != 0, widened ? c.w1.type : int64_t{WEIGHT_FP32}, [&](auto words) {
    using Words = decltype(words);
    const int64_t room = MOST_HIDDEN / (c.k * round_up(c.inter, HALF)), some = least(c.n, room < 512 ? 512 : room);
    float* memory = scratch_of(ExpertBuffers<Words>(c, some, nullptr).all);
    if (memory == nullptr) return void(fine = false);
    Team team(c.threads, Team::LONG);
    for (int64_t first = 0; first < c.n; first += some) {
      const int64_t n = least(some, c.n - first);
      ExpertBuffers<Words> m(c, n, memory);
      compute<Words>(c, m, team, first, n);
    }
  });
  return fine;
}

int64_t check(const ExpertsCall& c) {
  if (!sizes({c.n, c.dim, c.inter, c.experts, c.k}) || c.dim < 1 || c.inter < 1 || c.k < 1 || c.experts > MOST_STACK)
    return BAD_SHAPE;
  if (c.bf16 < 0 || c.bf16 > 1) return BAD_CALL;
  const int64_t size = c.bf16 ? 2 : 4;
  if (!c.w1.fits_stack(c.experts, c.inter, c.dim) || !c.w3.fits_stack(c.experts, c.inter, c.dim) ||
      !c.w2.fits_stack(c.experts, c.dim, c.inter))
    return OUT_OF_BOUNDS;
  if (!within(c.x, size, c.n, c.dim) || !within(c.y, size, c.n, c.dim) ||
      !within(c.indices, 8, c.n, c.k) || !within(c.weights, 4, c.n, c.k))
    return OUT_OF_BOUNDS;
  return indices_fit(c.indices, c.n * c.k, c.experts) ? FINE : OUT_OF_BOUNDS;
}

}  // namespace

ENTRY(experts, ExpertsCall)
