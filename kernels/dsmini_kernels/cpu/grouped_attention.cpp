// A layer's attention in a decoding step, from the residual stream to the residual stream: MHA, GQA and MQA.

#include "attention.h"
#include "entry.h"

namespace {

int64_t keys_of(const GroupedAttentionCall& c, int64_t sequence) { return c.starts[sequence] + c.s; }

// The memory of a call; sizes in numbers. Query rows of a sequence have the order [key head, token, head of the group],
// so that those that share a key follow each other.
struct GroupedBuffers {
  int64_t tokens, heads, rows, keys_width, values_width, stride, v_stride, parts;
  int64_t own;  // of each thread
  float *plain, *for_q, *for_k, *for_v, *q, *kv, *query, *attended, *merged, *high, *total, *sums, *owned;
  int64_t all;

  GroupedBuffers(const GroupedAttentionCall& c, float* memory) {
    tokens = c.b * c.s, heads = c.key_heads * c.group, rows = heads * c.s;
    keys_width = c.key_heads * c.width, values_width = c.key_heads * c.value;
    stride = round_up(c.width, UNIT), v_stride = round_up(c.value, UNIT);
    parts = 0;
    for (int64_t i = 0; i < c.b; ++i) parts += parts_of(keys_of(c, i));
    const int64_t n = c.group * c.s;
    own = round_up(2 * n, 16) + round_up(KEYS * (stride + v_stride) + n * (KEYS + 1), 16);
    all = 0;
    const auto take = [&](int64_t numbers) {
      float* at = memory == nullptr ? nullptr : memory + all;
      all += round_up(numbers, 16);
      return at;
    };
    plain = take(tokens * c.dim);
    for_q = take(tokens * padded(c.dim));
    for_k = take(tokens * padded(c.dim));
    for_v = take(tokens * padded(c.dim));
    q = take(tokens * heads * c.width);
    kv = take(tokens * (keys_width + values_width));
    query = take(c.b * rows * stride);
    attended = take(tokens * heads * c.value);
    merged = take(tokens * padded(heads * c.value));
    high = take(parts * rows);
    total = take(parts * rows);
    sums = take(parts * rows * v_stride);
    owned = take(c.threads * own);
  }
};

// Attention of all heads to a part of a sequence's context. Blocks of keys are outside and heads inside: rows of the
// cache, which hold all heads, are then read one after the other.
void attend(const GroupedAttentionCall& c, const GroupedBuffers& m, int64_t sequence, int64_t part, int64_t item, float* own) {
  const int64_t keys = keys_of(c, sequence), length = part_length(keys), n = c.group * c.s;
  const int64_t size = c.cache_type == CACHE_FP32 ? 4 : 2, to = least(keys, (part + 1) * length);
  const char* cache = c.cache + sequence * c.room * c.cache_row;
  float *high = m.high + item * m.rows, *total = m.total + item * m.rows, *sums = m.sums + item * m.rows * m.v_stride;
  int64_t* last = reinterpret_cast<int64_t*>(own);
  float* key = own + round_up(2 * n, 16);
  float *value = key + KEYS * m.stride, *logits = value + KEYS * m.v_stride;
  for (int64_t r = 0; r < n; ++r) last[r] = c.starts[sequence] + r / c.group;
  clear_after(key, c.width, m.stride), clear_after(value, c.value, m.v_stride);
  begin_part(m.rows, high, total, sums, m.v_stride);
  for (int64_t at = part * length; at < to; at += KEYS) {
    const int64_t some = least(KEYS, to - at);
    for (int64_t g = 0; g < c.key_heads; ++g) {
      const auto decode = [&](int64_t t) {
        const char* k = cache + (at + t) * c.cache_row + g * c.width * size;
        const char* v = cache + (at + t) * c.cache_row + (m.keys_width + g * c.value) * size;
        prefetch(k + SOON * c.cache_row, c.width * size);
        prefetch(v + SOON * c.cache_row, c.value * size);
        decode_numbers(c.cache_type, k, c.width, key + t * m.stride);
        decode_numbers(c.cache_type, v, c.value, value + t * m.v_stride);
      };
      const int64_t first = g * n;
      attend_block(at, some, decoding(decode), key, m.stride, value, m.v_stride, c.value,
                   m.query + (sequence * m.rows + first) * m.stride, n, last, high + first, total + first,
                   sums + first * m.v_stride, m.v_stride, logits, logits + n * KEYS);
    }
  }
}

void step(const GroupedAttentionCall& c, const GroupedBuffers& m) {
  Team team(c.threads);
  const int64_t stride = padded(c.dim), kv_width = m.keys_width + m.values_width;
  // 1. the normed x, in the order of each weight that reads it
  team.each(m.tokens, [&](int64_t i, int64_t) {
    float* normed = m.plain + i * c.dim;
    rms_norm(c.x + i * c.dim, c.norm, c.dim, c.eps, normed);
    arrange(normed, c.dim, c.wq.type, m.for_q + i * stride);
    arrange(normed, c.dim, c.wk.type, m.for_k + i * stride);
    arrange(normed, c.dim, c.wv.type, m.for_v + i * stride);
  });
  // 2. queries, keys and values
  const int64_t q_items = items_of(c.wq, c.threads), k_items = items_of(c.wk, c.threads);
  team.each(q_items + k_items + items_of(c.wv, c.threads), [&](int64_t item, int64_t) {
    if (item < q_items)
      product_item(c.wq, c.threads, item, m.for_q, stride, m.tokens, m.q, m.heads * c.width);
    else if (item < q_items + k_items)
      product_item(c.wk, c.threads, item - q_items, m.for_k, stride, m.tokens, m.kv, kv_width);
    else
      product_item(c.wv, c.threads, item - q_items - k_items, m.for_v, stride, m.tokens, m.kv + m.keys_width, kv_width);
  });
  // 3. rotations, the cache's new row, and the scaled queries in their order
  team.each(m.tokens, [&](int64_t i, int64_t) {
    const int64_t sequence = i / c.s, token = i % c.s;
    const int64_t angles = ((c.cos_sin_batch == 1 ? 0 : sequence) * c.s + token) * (c.width / 2);
    float *kv = m.kv + i * kv_width, *q = m.q + i * m.heads * c.width;
    for (int64_t g = 0; g < c.key_heads; ++g) rotate(kv + g * c.width, c.width / 2, c.cos + angles, c.sin + angles);
    encode_numbers(c.cache_type, kv, kv_width, c.cache + (sequence * c.room + c.starts[sequence] + token) * c.cache_row);
    for (int64_t h = 0; h < m.heads; ++h) {
      float* head = q + h * c.width;
      const int64_t row = (h / c.group * c.s + token) * c.group + h % c.group;
      float* out = m.query + (sequence * m.rows + row) * m.stride;
      rotate(head, c.width / 2, c.cos + angles, c.sin + angles);
      for (int64_t k = 0; k < c.width; ++k) out[k] = head[k] * float(c.scale);
      memset(out + c.width, 0, (m.stride - c.width) * 4);
    }
  });
  // 4. attention to parts of the context
  team.each(m.parts, [&](int64_t item, int64_t thread) {
    int64_t sequence = 0, part = item;
    while (part >= parts_of(keys_of(c, sequence))) part -= parts_of(keys_of(c, sequence++));
    attend(c, m, sequence, part, item, m.owned + thread * m.own);
  });
  // 5. the merged values of each head
  team.each(m.tokens * m.heads, [&](int64_t item, int64_t) {
    const int64_t h = item % m.heads, i = item / m.heads, sequence = i / c.s;
    int64_t first = 0;
    for (int64_t k = 0; k < sequence; ++k) first += parts_of(keys_of(c, k));
    const int64_t at = first * m.rows + (h / c.group * c.s + i % c.s) * c.group + h % c.group;
    merge_parts(m.high + at, m.total + at, m.sums + at * m.v_stride, parts_of(keys_of(c, sequence)), m.rows,
                m.rows * m.v_stride, c.value, m.attended + item * c.value);
  });
  // 6. out, and the residual
  const int64_t width = m.heads * c.value;
  team.each(m.tokens, [&](int64_t i, int64_t) {
    arrange(m.attended + i * width, width, c.wo.type, m.merged + i * padded(width));
  });
  team.each(items_of(c.wo, c.threads), [&](int64_t item, int64_t) {
    product_item(c.wo, c.threads, item, m.merged, padded(width), m.tokens, c.y, c.dim, c.x);
  });
}

bool grouped_attention(const GroupedAttentionCall& c) { return with_memory<GroupedBuffers>(c, step); }

int64_t check(const GroupedAttentionCall& c) {
  if (!sizes({c.b, c.s, c.dim, c.key_heads, c.group, c.width, c.value, c.room, c.cache_row})) return BAD_SHAPE;
  if (c.b < 1 || c.s < 1 || c.b * c.s > MOST_TOKENS || c.dim < 1 || c.key_heads < 1 || c.group < 1 || c.width < 2 ||
      c.width % 2 != 0 || c.value < 1 || (c.cos_sin_batch != 1 && c.cos_sin_batch != c.b))
    return BAD_SHAPE;
  int64_t heads, queries, keys, values, width;
  if (__builtin_mul_overflow(c.key_heads, c.group, &heads) || __builtin_mul_overflow(heads, c.width, &queries) ||
      __builtin_mul_overflow(c.key_heads, c.width, &keys) || __builtin_mul_overflow(c.key_heads, c.value, &values) ||
      __builtin_mul_overflow(heads, c.value, &width))
    return BAD_SHAPE;
  if (!c.wq.fits(queries, c.dim) || !c.wk.fits(keys, c.dim) || !c.wv.fits(values, c.dim) || !c.wo.fits(c.dim, width))
    return OUT_OF_BOUNDS;
  if (!within(c.x, 4, c.b, c.s, c.dim) || !within(c.y, 4, c.b, c.s, c.dim) ||
      !within(c.norm, 4, c.dim) || !within(c.cos, 4, c.cos_sin_batch, c.s, c.width / 2) ||
      !within(c.sin, 4, c.cos_sin_batch, c.s, c.width / 2) || !within(c.starts, 8, c.b))
    return OUT_OF_BOUNDS;
  if (c.cache_type < 0 || c.cache_type > 1 || c.cache_row != (c.cache_type == 0 ? 4 : 2) * (keys + values) ||
      !within(c.cache, c.cache_row, c.b, c.room))
    return OUT_OF_BOUNDS;
  for (int64_t i = 0; i < c.b; ++i)
    if (c.starts[i] < 0 || c.starts[i] > c.room - c.s) return OUT_OF_BOUNDS;
  return FINE;
}

}  // namespace

ENTRY(grouped_attention, GroupedAttentionCall)
