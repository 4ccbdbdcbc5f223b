// A layer's feed-forward in a decoding step, from the residual stream to the residual stream: a dense SwiGLU, or the
// gate, the routed experts that the tokens chose, and the shared experts.

#include "activations.h"
#include "dots.h"
#include "entry.h"

namespace {

// The memory of a call; sizes in numbers. A slot is a token-expert pair; they are sorted by expert.
struct FeedForwardBuffers {
  int64_t wide, inter, expert_inter, slots;
  float *plain, *for_gate, *for_dense, *for_experts, *gated, *hidden, *rows, *expert_gated, *expert_hidden, *slot_weight;
  int64_t *slot_token, *first_slot, *chosen, *n_chosen;
  int64_t all;

  FeedForwardBuffers(const FeedForwardCall& c, float* memory) {
    wide = padded(c.dim), inter = padded(c.inter), expert_inter = padded(c.expert_inter), slots = c.n * c.k;
    all = 0;
    const auto take = [&](int64_t numbers) {
      float* at = memory == nullptr ? nullptr : memory + all;
      all += round_up(numbers, 16);
      return at;
    };
    const auto take_whole = [&](int64_t numbers) { return reinterpret_cast<int64_t*>(take(2 * numbers)); };
    plain = take(c.n * c.dim);
    for_gate = take(c.n * wide);
    for_dense = take(c.n * wide);
    for_experts = take(c.n * wide);
    gated = take(c.n * c.inter);
    hidden = take(c.n * inter);
    rows = take(slots * wide);
    expert_gated = take(slots * c.expert_inter);
    expert_hidden = take(slots * expert_inter);
    slot_weight = take(slots);
    slot_token = take_whole(slots);
    first_slot = take_whole(c.experts + 1);
    chosen = take_whole(c.experts);
    n_chosen = take_whole(1);
  }
};

// True if a comes before b in descending order: NaN first, as torch sorts.
bool before(float a, float b) { return a > b || (a != a && b == b); }

// The places of the k first of n numbers, the lower place first among equals. `taken` is [n].
void top(const float* x, int64_t n, int64_t k, bool* taken, int64_t* out) {
  for (int64_t j = 0; j < k; ++j) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; ++i)
      if (!taken[i] && (best < 0 || before(x[i], x[best]))) best = i;
    taken[best] = true, out[j] = best;
  }
}

// Chooses a token's experts from its logits, which lie in `scores` and become scores, or from the table.
void route(const FeedForwardCall& c, int64_t token, float* scores, int64_t* indices, float* weights) {
  const int64_t e = c.experts, size = e / c.groups;
  if (c.score == SIGMOID) {
    for (int64_t i = 0; i < e; ++i) scores[i] = 1 / (1 + expf(-scores[i]));
  } else if (c.score == SQRT_SOFTPLUS) {
    for (int64_t i = 0; i < e; ++i) {
      const float x = scores[i], soft = x > 20 ? x : log1pf(expf(x));
      scores[i] = sqrtf(soft < 0x1p-126f ? 0x1p-126f : soft);
    }
  } else {
    float high = -INFINITY, total = 0;
    for (int64_t i = 0; i < e; ++i) high = scores[i] > high ? scores[i] : high;
    for (int64_t i = 0; i < e; ++i) scores[i] = expf(scores[i] - high), total += scores[i];
    for (int64_t i = 0; i < e; ++i) scores[i] /= total;
  }
  float choice[MOST_EXPERTS], group[MOST_EXPERTS];
  bool taken[MOST_EXPERTS] = {};
  for (int64_t i = 0; i < e; ++i) choice[i] = c.bias == nullptr ? scores[i] : scores[i] + c.bias[i];
  if (c.groups > 1) {
    for (int64_t g = 0; g < c.groups; ++g) {
      int64_t best[2];
      bool seen[MOST_EXPERTS] = {};
      top(choice + g * size, size, c.bias == nullptr ? 1 : 2, seen, best);
      group[g] = choice[g * size + best[0]];
      if (c.bias != nullptr) group[g] += choice[g * size + best[1]];
    }
    int64_t kept[MOST_EXPERTS];
    bool in[MOST_EXPERTS] = {};
    top(group, c.groups, c.kept_groups, in, kept);
    for (int64_t i = 0; i < e; ++i) taken[i] = !in[i / size];
  }
  if (c.table == nullptr)
    top(choice, e, c.k, taken, indices);
  else
    for (int64_t j = 0; j < c.k; ++j) indices[j] = c.table[c.tokens[token] * c.k + j];
  float total = 0;
  for (int64_t j = 0; j < c.k; ++j) weights[j] = scores[indices[j]], total += weights[j];
  for (int64_t j = 0; j < c.k; ++j) {
    if (c.normed) weights[j] /= total + 1e-20f;
    weights[j] *= float(c.route_scale);
  }
}

// Gives each token-expert pair a slot, in the order of experts and of tokens within an expert.
void sort_pairs(const FeedForwardCall& c, const FeedForwardBuffers& m) {
  memset(c.counts, 0, c.experts * 8);
  for (int64_t i = 0; i < m.slots; ++i) ++c.counts[c.indices[i]];
  int64_t slot = 0;
  *m.n_chosen = 0;
  for (int64_t e = 0; e < c.experts; ++e) {
    m.first_slot[e] = slot;
    if (c.counts[e] == 0) continue;
    m.chosen[(*m.n_chosen)++] = e;
    for (int64_t i = 0; i < m.slots; ++i)
      if (c.indices[i] == e) m.slot_token[slot] = i / c.k, m.slot_weight[slot++] = c.weights[i];
  }
  m.first_slot[c.experts] = slot;
}

// out = silu(w1 x) * (w3 x) for rows [from, to) of both weights and n rows of x, both products within the limit.
void gate_and_up(const Matrix& w1, const Matrix& w3, double limit, int64_t from, int64_t to, const float* x, int64_t stride,
                 int64_t n, float* out) {
  const int64_t rows = to - from;
  alignas(64) float gate[MOST_TOKENS * MOST_ROWS], up[MOST_TOKENS * MOST_ROWS];
  const auto multiply = [&](const Matrix& w, float* y) {
    product(w, from, to, x, stride, n, y, rows);
    for (int64_t i = n * rows; i % LANES; ++i) y[i] = 0;
  };
  multiply(w1, gate), multiply(w3, up);
  const F high = splat(float(limit)), low = -high;
  for (int64_t i = 0; i < n * rows; i += LANES) {
    F g = load<F>(gate + i), u = load<F>(up + i);
    g = g > high ? high : g, u = u > high ? high : u < low ? low : u;  // NaN stays
    store(gate + i, silu(g) * u);
  }
  for (int64_t k = 0; k < n; ++k) memcpy(out + k * w1.rows + from, gate + k * rows, rows * 4);
}

void step(const FeedForwardCall& c, const FeedForwardBuffers& m) {
  Team team(c.threads);
  const Span<const char> numbers{reinterpret_cast<const char*>(c.gate.data), c.gate.bytes};
  const Matrix gate{numbers, WEIGHT_FP32, c.experts, c.dim, c.dim * 4, {nullptr, 0}};
  // 1. the normed x, in the order of the weights that read it
  team.each(c.n, [&](int64_t i, int64_t) {
    float* normed = m.plain + i * c.dim;
    rms_norm(c.x + i * c.dim, c.norm, c.dim, c.eps, normed);
    arrange(normed, c.dim, WEIGHT_FP32, m.for_gate + i * m.wide);
    arrange(normed, c.dim, c.w1.type, m.for_dense + i * m.wide);
    arrange(normed, c.dim, c.e1.type, m.for_experts + i * m.wide);
  });
  // 2. logits of the gate, and the hidden numbers of the dense or shared experts
  const int64_t some = rows_of_item(c.inter, c.threads), gate_items = divide_up(c.experts, LEAST_ROWS);
  team.each(gate_items + divide_up(c.inter, some), [&](int64_t item, int64_t) {
    if (item < gate_items) {
      const int64_t from = item * LEAST_ROWS, to = least(c.experts, from + LEAST_ROWS);
      product(gate, from, to, m.for_gate, m.wide, c.n, c.scores + from, c.experts);
    } else {
      const int64_t from = (item - gate_items) * some;
      gate_and_up(c.w1, c.w3, c.limit, from, least(c.inter, from + some), m.for_dense, m.wide, c.n, m.gated);
    }
  });
  if (c.experts) {
    // 3. the experts of each token, and the slots of all pairs
    team.each(1, [&](int64_t, int64_t) {
      for (int64_t i = 0; i < c.n; ++i) route(c, i, c.scores + i * c.experts, c.indices + i * c.k, c.weights + i * c.k);
      sort_pairs(c, m);
    });
    team.each(m.slots, [&](int64_t slot, int64_t) {
      memcpy(m.rows + slot * m.wide, m.for_experts + m.slot_token[slot] * m.wide, m.wide * 4);
    });
    // 4. the hidden numbers of the chosen experts
    const int64_t rows = rows_of_item(*m.n_chosen * c.expert_inter, c.threads), across = divide_up(c.expert_inter, rows);
    team.each(*m.n_chosen * across, [&](int64_t item, int64_t) {
      const int64_t e = m.chosen[item / across], slot = m.first_slot[e], from = item % across * rows;
      gate_and_up(part_of(c.e1, e, c.expert_inter), part_of(c.e3, e, c.expert_inter), c.limit, from, least(c.expert_inter, from + rows),
                  m.rows + slot * m.wide, m.wide, c.counts[e], m.expert_gated + slot * c.expert_inter);
    });
  }
  team.each((c.inter ? c.n : 0) + m.slots, [&](int64_t i, int64_t) {
    const int64_t slot = i - (c.inter ? c.n : 0);
    if (slot < 0)
      arrange(m.gated + i * c.inter, c.inter, c.w2.type, m.hidden + i * m.inter);
    else
      arrange(m.expert_gated + slot * c.expert_inter, c.expert_inter, c.e2.type, m.expert_hidden + slot * m.expert_inter);
  });
  // 5. out: shared experts, then the routed ones in their order, and the residual
  const int64_t rows = rows_of_item(c.dim, c.threads);
  team.each(divide_up(c.dim, rows), [&](int64_t item, int64_t) {
    const int64_t from = item * rows, to = least(c.dim, from + rows);
    float total[MOST_TOKENS * MOST_ROWS], part[MOST_TOKENS * MOST_ROWS];
    for (int64_t n = 0; n < c.n; ++n) {
      if (c.added)
        memcpy(total + n * rows, c.x + n * c.dim + from, (to - from) * 4);
      else
        memset(total + n * rows, 0, (to - from) * 4);
    }
    if (c.inter) product(c.w2, from, to, m.hidden, m.inter, c.n, total, rows, total);
    for (int64_t v = 0; c.experts && v < *m.n_chosen; ++v) {
      const int64_t e = m.chosen[v], slot = m.first_slot[e];
      product(part_of(c.e2, e, c.dim), from, to, m.expert_hidden + slot * m.expert_inter, m.expert_inter, c.counts[e], part,
              rows);
      for (int64_t k = 0; k < c.counts[e]; ++k) {
        float* of_token = total + m.slot_token[slot + k] * rows;
        for (int64_t r = 0; r < to - from; ++r) of_token[r] += m.slot_weight[slot + k] * part[k * rows + r];
      }
    }
    for (int64_t n = 0; n < c.n; ++n) memcpy(c.y + n * c.dim + from, total + n * rows, (to - from) * 4);
  });
}

bool feed_forward(const FeedForwardCall& c) { return with_memory<FeedForwardBuffers>(c, step); }

int64_t check(const FeedForwardCall& c) {
  if (!sizes({c.n, c.dim, c.inter, c.experts, c.expert_inter, c.k, c.groups, c.kept_groups})) return BAD_SHAPE;
  if (c.n < 1 || c.n > MOST_TOKENS || c.dim < 1 || c.experts > MOST_EXPERTS) return BAD_SHAPE;
  if (c.score < 0 || c.score >= SCORES || c.added < 0 || c.added > 1 || !(c.limit > 0)) return BAD_CALL;
  if (c.w1.type != c.w3.type) return BAD_CALL;
  if (c.inter ? !c.w1.fits(c.inter, c.dim) || !c.w3.fits(c.inter, c.dim) || !c.w2.fits(c.dim, c.inter)
              : !c.w1.none() || !c.w2.none() || !c.w3.none())
    return OUT_OF_BOUNDS;
  if (!within(c.x, 4, c.n, c.dim) || !within(c.y, 4, c.n, c.dim) ||
      !within(c.norm, 4, c.dim))
    return OUT_OF_BOUNDS;
  if (c.experts == 0) return c.k == 0 && c.expert_inter == 0 ? FINE : BAD_SHAPE;
  if (c.groups < 1 || c.experts % c.groups != 0 || c.kept_groups < 1 || c.kept_groups > c.groups || c.k < 1 ||
      c.k > c.experts / c.groups * c.kept_groups || c.expert_inter < 1)
    return BAD_SHAPE;
  if (c.groups > 1 && c.bias != nullptr && c.experts / c.groups < 2) return BAD_SHAPE;
  if (!c.e1.fits_stack(c.experts, c.expert_inter, c.dim) || !c.e3.fits_stack(c.experts, c.expert_inter, c.dim) ||
      !c.e2.fits_stack(c.experts, c.dim, c.expert_inter) || c.e1.type != c.e3.type)
    return OUT_OF_BOUNDS;
  if (!within(c.gate, 4, c.experts, c.dim) || (c.bias != nullptr && !within(c.bias, 4, c.experts)) ||
      !within(c.indices, 8, c.n, c.k) || !within(c.weights, 4, c.n, c.k) ||
      !within(c.scores, 4, c.n, c.experts) || !within(c.counts, 8, c.experts))
    return OUT_OF_BOUNDS;
  if (c.table == nullptr) return FINE;
  if (!within(c.tokens, 8, c.n) || !within(c.table, 4, c.vocabulary, c.k)) return OUT_OF_BOUNDS;
  for (int64_t i = 0; i < c.n; ++i) {
    if (c.tokens[i] < 0 || c.tokens[i] >= c.vocabulary) return OUT_OF_BOUNDS;
    for (int64_t j = 0; j < c.k; ++j)
      if (const int64_t e = c.table[c.tokens[i] * c.k + j]; e < 0 || e >= c.experts) return OUT_OF_BOUNDS;
  }
  return FINE;
}

}  // namespace

ENTRY(feed_forward, FeedForwardCall)
