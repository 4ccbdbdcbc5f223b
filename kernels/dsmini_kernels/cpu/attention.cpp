// A layer's attention in a decoding step, from the residual stream to the residual stream: MLA in its absorbed form.

#include "attention.h"
#include "indexer.h"
#include "entry.h"

namespace {

// Tokens that attend to the same keys: those of a sequence, or each one alone where an indexer chooses keys.
struct Groups {
  bool chosen;
  int64_t count, tokens;  // tokens of each

  explicit Groups(const AttentionCall& c) : chosen(false) {
    for (int64_t i = 0; i < c.b; ++i) chosen = chosen || (c.index.topk > 0 && c.starts[i] + c.s > c.index.topk);
    count = chosen ? c.b * c.s : c.b, tokens = chosen ? 1 : c.s;
  }
  int64_t sequence(const AttentionCall& c, int64_t group) const { return group * tokens / c.s; }
  int64_t seen(const AttentionCall& c, int64_t group) const {
    return c.starts[sequence(c, group)] + group * tokens % c.s + tokens;
  }
  int64_t keys(const AttentionCall& c, int64_t group) const {
    return chosen ? least(c.index.topk, seen(c, group)) : seen(c, group);
  }
  int64_t parts(const AttentionCall& c, int64_t group) const { return parts_of(keys(c, group)); }
};

// The memory of a call; sizes in numbers.
struct AttentionBuffers {
  Groups groups;
  int64_t most;  // keys that a token of the call sees
  int64_t tokens, q_width, kv_width, q_stride, sums_stride, parts;
  int64_t own;  // of each thread
  float *plain, *normed, *q_a, *kv, *q_in, *q, *query, *attended, *merged, *high, *total, *sums, *owned;
  float *index_in, *index_k, *index_weights, *index_q;
  uint32_t* scores;
  int32_t* list;
  int64_t all;

  AttentionBuffers(const AttentionCall& c, float* memory) : groups(c), most(0) {
    tokens = c.b * c.s;
    q_width = c.q_rank ? c.q_rank : c.dim, kv_width = c.latent + c.rope;
    sums_stride = round_up(c.latent, UNIT);
    q_stride = round_up(kv_width, UNIT);
    parts = 0;
    for (int64_t i = 0; i < groups.count; ++i) parts += groups.parts(c, i);
    for (int64_t i = 0; i < c.b; ++i) most = larger(most, c.starts[i] + c.s);
    const int64_t rows = groups.tokens * c.heads, index = c.index.topk ? 1 : 0, scored = groups.chosen ? 1 : 0;
    own = larger(scratch_for(rows, q_stride) + 2 * rows, scored * index_panel_for(c.index.width));
    own = round_up(larger(own, tokens * larger(padded(c.latent), round_up(c.latent, WIDEST))), 16);
    all = 0;
    const auto take = [&](int64_t numbers) {
      float* at = memory == nullptr ? nullptr : memory + all;
      all += round_up(numbers, 16);
      return at;
    };
    plain = take(tokens * c.dim);
    normed = take(tokens * 2 * padded(c.dim));
    q_a = take(tokens * round_up(q_width, 16));
    kv = take(tokens * kv_width);
    q_in = take(tokens * padded(q_width));
    q = take(tokens * c.heads * (c.nope + c.rope));
    query = take(tokens * c.heads * q_stride);
    attended = take(tokens * c.heads * c.value);
    merged = take(tokens * padded(c.heads * c.value));
    high = take(parts * rows);
    total = take(parts * rows);
    sums = take(parts * rows * sums_stride);
    owned = take(c.threads * own);
    index_in = take(index * tokens * 2 * padded(c.dim));
    index_k = take(index * tokens * c.index.width);
    index_weights = take(index * tokens * c.index.heads);
    index_q = take(scored * tokens * c.index.heads * c.index.width);
    scores = reinterpret_cast<uint32_t*>(take(scored * tokens * round_up(most, SCORED)));
    list = reinterpret_cast<int32_t*>(take(scored * tokens * c.index.topk));
  }
};

// Stores a token's row in the cache.
void write_row(const AttentionCall& c, const float* row, char* to) {
  if (c.cache_type != CACHE_FP8) {
    encode_numbers(c.cache_type, row, c.latent + c.rope, to);
    return;
  }
  const Grid grid(FORMATS[0]);
  char* scales = to + c.latent;
  for (int64_t at = 0, tile = 0; at < c.latent; at += BLOCK, ++tile) {
    const int64_t n = least(BLOCK, c.latent - at);
    const int32_t top = largest_magnitude(row + at, n);
    const float amax = load<float>(&top);
    const float scale = top >= EXPONENT ? load<float>(&QUIET_NAN) : (amax > 0x1p-100f ? amax : 0x1p-100f) / 448.0f;
    store(scales + 4 * tile, scale);
    each_vector(row + at, n, [&](F v, int64_t i) {
      const F y = v / splat(scale);
      const I code = (y != y ? grid.nan : grid.code(grid.limit(y))) | (((I)y >> 24) & 0x80);
      const B bytes = narrow(code, uint8_t());
      memcpy(to + at + i, &bytes, least(LANES, n - i));
    });
  }
  char* key = scales + 4 * ((c.latent + BLOCK - 1) / BLOCK);
  for (int64_t i = 0; i < c.rope; ++i) store(key + 2 * i, rounded_bf16(row[c.latent + i]));
}

// Where the angles of a token begin.
int64_t angles_of(const AttentionCall& c, int64_t token) { return (c.cos_sin_batch == 1 ? token % c.s : token) * (c.rope / 2); }

// A query's or key's rotation and Hadamard transform.
void turn(const AttentionCall& c, int64_t token, float* x) {
  const int64_t angles = angles_of(c, token);
  (c.index.halves ? rotate_halves : rotate)(x, c.rope / 2, c.cos + angles, c.sin + angles);
  hadamard(x, c.index.width);
}

// Items of the products of an indexer: keys and weights of heads from `index_in`, and queries from what is arranged for wq.
int64_t key_items(const AttentionCall& c) { return c.index.topk ? items_of(c.index.wk, c.threads) : 0; }
int64_t index_items(const AttentionCall& c) {
  return c.index.topk ? key_items(c) + items_of(c.index.weights, c.threads) : 0;
}
void index_product(const AttentionCall& c, const AttentionBuffers& m, int64_t item) {
  const Indexer& index = c.index;
  const int64_t dim_stride = padded(c.dim), keys = key_items(c);
  if (item < keys)
    return product_item(index.wk, c.threads, item, m.index_in, dim_stride, m.tokens, m.index_k, index.width);
  product_item(index.weights, c.threads, item - keys, m.index_in + m.tokens * dim_stride, dim_stride, m.tokens,
               m.index_weights, index.heads);
}
void index_query(const AttentionCall& c, const AttentionBuffers& m, int64_t item, const float* x, int64_t stride) {
  product_item(c.index.wq, c.threads, item, x, stride, m.tokens, m.index_q, c.index.heads * c.index.width);
}

// A new token's key into the cache, and its weights of heads by their number.
void index_key(const AttentionCall& c, const AttentionBuffers& m, int64_t i) {
  const Indexer& index = c.index;
  float *key = m.index_k + i * index.width, *weights = m.index_weights + i * index.heads;
  for (int64_t h = 0; h < index.heads; ++h) weights[h] /= sqrtf(float(index.heads * index.width));
  layer_norm(key, index.norm, index.bias, index.width, index.eps);
  turn(c, i, key);
  encode_numbers(c.index_cache_type, key, index.width, c.index_cache + (i / c.s * c.room + c.starts[i / c.s] + i % c.s) * c.index_cache_row);
}

// The places of each token's keys: the scores of all keys that it sees, then the largest.
void select_keys(const AttentionCall& c, const AttentionBuffers& m, Team& team) {
  const Indexer& index = c.index;
  const int64_t width = index.width, room = round_up(m.most, SCORED), pieces = room / SCORED;
  team.each(m.tokens * pieces, [&](int64_t item, int64_t thread) {
    const int64_t i = item / pieces, from = item % pieces * SCORED, seen = m.groups.seen(c, i);
    float* panel = m.owned + thread * m.own;
    if (seen <= index.topk) return;
    for (int64_t at = from; at < least(seen, from + SCORED); at += PANEL_KEYS) {
      const int64_t some = least(PANEL_KEYS, seen - at), vectors = divide_up(some, LANES);
      const char* keys = c.index_cache + (i / c.s * c.room + at) * c.index_cache_row;
      prefetch(keys + PANEL_KEYS * c.index_cache_row, PANEL_KEYS * c.index_cache_row);
      with_keys(c.index_cache_type == CACHE_BF16, [&](auto words) {
        using Words = decltype(words);
        pack<Words>(c.index_cache_type == CACHE_BF16, width, some, vectors, [&](int64_t t) { return keys + t * c.index_cache_row; }, panel);
        const auto q_of = [&](int64_t h) { return reinterpret_cast<const char*>(m.index_q + (i * index.heads + h) * width); };
        score_panel<Words>(panel, vectors, width, index.heads, q_of, m.index_weights + i * index.heads, m.scores + i * room + at);
      });
    }
  });
  team.each(m.tokens, [&](int64_t i, int64_t) {
    const int64_t seen = m.groups.seen(c, i);
    int32_t* list = m.list + i * index.topk;
    if (seen > index.topk) return select_largest(m.scores + i * room, seen, index.topk, list);
    for (int64_t t = 0; t < seen; ++t) list[t] = int32_t(t);
  });
}

void step(const AttentionCall& c, const AttentionBuffers& m) {
  Team team(c.threads);
  const Groups& groups = m.groups;
  const int64_t head = c.nope + c.rope, dim_stride = padded(c.dim), rows = groups.tokens * c.heads;
  const float* for_kv = m.normed + m.tokens * dim_stride;
  // 1. the normed x, in the order of each weight that reads it
  team.each(m.tokens, [&](int64_t i, int64_t) {
    float* normed = m.plain + i * c.dim;
    rms_norm(c.x + i * c.dim, c.norm, c.dim, c.eps, normed);
    arrange(normed, c.dim, (c.q_rank ? c.wq_a : c.wq_b).type, m.normed + i * dim_stride);
    arrange(normed, c.dim, c.wkv_a.type, m.normed + (m.tokens + i) * dim_stride);
    if (c.index.topk == 0) return;
    arrange(normed, c.dim, c.index.wk.type, m.index_in + i * dim_stride);
    arrange(normed, c.dim, c.index.weights.type, m.index_in + (m.tokens + i) * dim_stride);
  });
  // 2. down: the query's latent, [c_kv | k_rope], and the indexer's keys and weights of heads
  const int64_t q_items = c.q_rank ? items_of(c.wq_a, c.threads) : items_of(c.wq_b, c.threads);
  const int64_t down_items = q_items + items_of(c.wkv_a, c.threads);
  team.each(down_items + index_items(c), [&](int64_t item, int64_t) {
    if (item >= down_items) {
      index_product(c, m, item - down_items);
    } else if (item >= q_items) {
      product_item(c.wkv_a, c.threads, item - q_items, for_kv, dim_stride, m.tokens, m.kv, m.kv_width);
    } else if (c.q_rank) {
      product_item(c.wq_a, c.threads, item, m.normed, dim_stride, m.tokens, m.q_a, round_up(m.q_width, 16));
    } else {
      product_item(c.wq_b, c.threads, item, m.normed, dim_stride, m.tokens, m.q, c.heads * head);
    }
  });
  // 3. norms, the key's rotation, the cache's new row
  team.each(m.tokens, [&](int64_t i, int64_t) {
    const int64_t sequence = i / c.s, token = i % c.s, angles = angles_of(c, i);
    float* kv = m.kv + i * m.kv_width;
    rms_norm(kv, c.kv_norm, c.latent, c.kv_eps, kv);
    rotate(kv + c.latent, c.rope / 2, c.cos + angles, c.sin + angles);
    write_row(c, kv, c.cache + ((sequence * c.room) + c.starts[sequence] + token) * c.cache_row);
    if (c.index.topk) index_key(c, m, i);
    if (!c.q_rank) return;
    float* q_a = m.q_a + i * round_up(m.q_width, 16);
    rms_norm(q_a, c.q_norm, c.q_rank, c.q_eps, q_a);
    arrange(q_a, c.q_rank, c.wq_b.type, m.q_in + i * padded(m.q_width));
  });
  // 4. up: queries of all heads, of the indexer too
  const float* for_q = c.q_rank ? m.q_in : m.normed;
  const int64_t up_items = c.q_rank ? items_of(c.wq_b, c.threads) : 0;
  team.each(up_items + (groups.chosen ? items_of(c.index.wq, c.threads) : 0), [&](int64_t item, int64_t) {
    if (item >= up_items) return index_query(c, m, item - up_items, for_q, padded(m.q_width));
    product_item(c.wq_b, c.threads, item, for_q, padded(m.q_width), m.tokens, m.q, c.heads * head);
  });
  // 5. queries of the latent: W_UK^T q_nope, and the rotated part, both scaled; a head is an item, or columns of one.
  // After them the indexer's queries, rotated
  const int64_t wanted = divide_up(4 * c.threads, c.heads), across = round_up(divide_up(c.latent, wanted), WIDEST);
  const int64_t pieces = divide_up(c.latent, across), latent_items = c.heads * pieces;
  team.each(latent_items + (groups.chosen ? m.tokens * c.index.heads : 0), [&](int64_t item, int64_t thread) {
    if (item >= latent_items) {
      const int64_t at = item - latent_items;
      return turn(c, at / c.index.heads, m.index_q + at * c.index.width);
    }
    const int64_t h = item / pieces, first = item % pieces * across, n = least(across, c.latent - first);
    float* own = m.owned + thread * m.own;
    weighted_rows(c.wkv_b, h * (c.nope + c.value), c.nope, m.q + h * head, c.heads * head, m.tokens, first, n, own, across);
    for (int64_t i = 0; i < m.tokens; ++i) {
      float *q = m.q + (i * c.heads + h) * head, *out = m.query + (i * c.heads + h) * m.q_stride;
      for (int64_t k = 0; k < n; ++k) out[first + k] = own[i * across + k] * float(c.scale);
      if (first != 0) continue;
      rotate(q + c.nope, c.rope / 2, c.cos + angles_of(c, i), c.sin + angles_of(c, i));
      for (int64_t k = 0; k < c.rope; ++k) out[c.latent + k] = q[c.nope + k] * float(c.scale);
      memset(out + m.kv_width, 0, (m.q_stride - m.kv_width) * 4);
    }
  });
  if (groups.chosen) select_keys(c, m, team);
  // 6. attention to parts of the context, or of the chosen keys
  team.each(m.parts, [&](int64_t item, int64_t thread) {
    float* own = m.owned + thread * m.own;
    int64_t group = 0, part = item;
    while (part >= groups.parts(c, group)) part -= groups.parts(c, group++);
    const int64_t keys = groups.keys(c, group), length = part_length(keys), sequence = groups.sequence(c, group);
    const Rows stored{c.cache + sequence * c.room * c.cache_row, c.cache_type, c.cache_row, c.latent, c.rope};
    int64_t* last = reinterpret_cast<int64_t*>(own);
    for (int64_t r = 0; r < rows; ++r) last[r] = keys - groups.tokens + r / c.heads;
    const int32_t* list = groups.chosen ? m.list + group * c.index.topk : nullptr;
    attend_part(stored, part * length, least(keys, (part + 1) * length), m.query + group * rows * m.q_stride,
                m.q_stride, rows, last, m.high + item * rows, m.total + item * rows, m.sums + item * rows * m.sums_stride,
                m.sums_stride, own + 2 * rows, list);
  });
  // 7. values: the merged latents of each head, times W_UV
  team.each(c.heads, [&](int64_t h, int64_t thread) {
    const int64_t from = h * (c.nope + c.value) + c.nope, stride = padded(c.latent);
    float* own = m.owned + thread * m.own;
    for (int64_t i = 0, first = 0, group = 0; i < m.tokens; ++i) {
      for (; group < i / groups.tokens; ++group) first += groups.parts(c, group);
      const int64_t at = first * rows + i % groups.tokens * c.heads + h;
      float* latent = m.query + (i * c.heads + h) * m.q_stride;  // read by the phase before
      merge_parts(m.high + at, m.total + at, m.sums + at * m.sums_stride, groups.parts(c, group), rows,
                  rows * m.sums_stride, c.latent, latent);
      arrange(latent, c.latent, c.wkv_b.type, own + i * stride);
    }
    product(c.wkv_b, from, from + c.value, own, stride, m.tokens, m.attended + h * c.value, c.heads * c.value);
  });
  // 8. out, and the residual
  const int64_t width = c.heads * c.value;
  team.each(m.tokens, [&](int64_t i, int64_t) {
    arrange(m.attended + i * width, width, c.wo.type, m.merged + i * padded(width));
  });
  team.each(items_of(c.wo, c.threads), [&](int64_t item, int64_t) {
    product_item(c.wo, c.threads, item, m.merged, padded(width), m.tokens, c.y, c.dim, c.x);
  });
}

bool attention(const AttentionCall& c) { return with_memory<AttentionBuffers>(c, step); }

int64_t check(const Indexer& i, const AttentionCall& c) {
  if (i.topk == 0) return FINE;
  if (!sizes({i.heads, i.width, i.topk}) || i.heads < 1 || i.width < c.rope || i.width < 2 || (i.width & (i.width - 1)) != 0)
    return BAD_SHAPE;
  int64_t queries;
  if (__builtin_mul_overflow(i.heads, i.width, &queries) || c.room > INT32_MAX) return BAD_SHAPE;
  if (i.wq.type != c.wq_b.type || c.index_cache_type < 0 || c.index_cache_type > 1) return BAD_CALL;
  if (!i.wq.fits(queries, c.q_rank ? c.q_rank : c.dim) || !i.wk.fits(i.width, c.dim) || !i.weights.fits(i.heads, c.dim) ||
      !within(i.norm, 4, i.width) || !within(i.bias, 4, i.width) ||
      c.index_cache_row != (c.index_cache_type == 0 ? 4 : 2) * i.width || !within(c.index_cache, c.index_cache_row, c.b, c.room))
    return OUT_OF_BOUNDS;
  return FINE;
}

int64_t check(const AttentionCall& c) {
  if (!sizes({c.b, c.s, c.dim, c.heads, c.nope, c.rope, c.latent, c.value, c.q_rank, c.room, c.cache_row})) return BAD_SHAPE;
  if (c.b < 1 || c.s < 1 || c.b * c.s > MOST_TOKENS || c.dim < 1 || c.heads < 1 || c.nope < 1 || c.rope % 2 != 0 ||
      c.latent < 1 || c.value < 1 || (c.cos_sin_batch != 1 && c.cos_sin_batch != c.b))
    return BAD_SHAPE;
  int64_t queries, kv_up, width;
  if (__builtin_mul_overflow(c.heads, c.nope + c.rope, &queries) || __builtin_mul_overflow(c.heads, c.nope + c.value, &kv_up) ||
      __builtin_mul_overflow(c.heads, c.value, &width))
    return BAD_SHAPE;
  const int64_t q_in = c.q_rank ? c.q_rank : c.dim;
  if ((c.q_rank ? !c.wq_a.fits(c.q_rank, c.dim) : !c.wq_a.none()) || !c.wq_b.fits(queries, q_in) ||
      !c.wkv_a.fits(c.latent + c.rope, c.dim) || !c.wkv_b.fits(kv_up, c.latent) || !c.wo.fits(c.dim, width))
    return OUT_OF_BOUNDS;
  if (!within(c.x, 4, c.b, c.s, c.dim) || !within(c.y, 4, c.b, c.s, c.dim) ||
      !within(c.norm, 4, c.dim) || !within(c.q_norm, 4, c.q_rank) ||
      !within(c.kv_norm, 4, c.latent) || !within(c.cos, 4, c.cos_sin_batch, c.s, c.rope / 2) ||
      !within(c.sin, 4, c.cos_sin_batch, c.s, c.rope / 2) || !within(c.starts, 8, c.b))
    return OUT_OF_BOUNDS;
  const int64_t numbers = c.latent + c.rope, tiles = (c.latent + BLOCK - 1) / BLOCK;
  const int64_t row = c.cache_type == 0 ? 4 * numbers : c.cache_type == 1 ? 2 * numbers : c.latent + 4 * tiles + 2 * c.rope;
  if (c.cache_type < 0 || c.cache_type > 2 || c.cache_row != row || !within(c.cache, row, c.b, c.room))
    return OUT_OF_BOUNDS;
  for (int64_t i = 0; i < c.b; ++i)
    if (c.starts[i] < 0 || c.starts[i] > c.room - c.s) return OUT_OF_BOUNDS;
  return check(c.index, c);
}

}  // namespace

ENTRY(attention, AttentionCall)
