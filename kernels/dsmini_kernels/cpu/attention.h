// Attention of a few query rows to the rows of a cache, over a part of the context, and the merge of parts.
//
// A part keeps for each query row the largest logit, the sum of weights relative to it, and the weighted sum of values.
// The softmax over all parts follows from these (Milakov and Gimelshein 2018). Parts have a fixed length, so the
// result does not depend on who computed which.

#pragma once

#include "activations.h"
#include "dots.h"

namespace {

enum CacheType : int64_t { CACHE_FP32, CACHE_BF16, CACHE_FP8, CACHE_TYPES };
constexpr int64_t KEYS = 16;                        // decoded at a time, which stay in the first-level cache
constexpr int QUERIES = BYTES == 64 ? 4 : 2;        // rows whose logits are computed at a time
constexpr int COLUMNS = BYTES == 64 ? 4 : 2;        // vectors of a value's columns at a time
constexpr int64_t ALIGNED = COLUMNS * LANES;        // decoded rows and sums are padded to this
inline int64_t part_length(int64_t keys) { return keys <= 2048 ? 64 : 256; }

// The rows [latent | rotary key] of a sequence. In FP8: codes, FP32 scales of 128 numbers each, BF16 rotary key.
struct Rows {
  const char* data;
  int64_t type, stride;  // stride in bytes
  int64_t latent, rope;
};

inline void decode_bf16(const char* p, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(out + i, Bf16::get(p + 2 * i));
  for (; i < n; ++i) {
    uint32_t bits = uint32_t(load<uint16_t>(p + 2 * i)) << 16;
    memcpy(out + i, &bits, 4);
  }
}

// Numbers of a cache in FP32 or BF16.
inline void decode_numbers(int64_t type, const char* p, int64_t n, float* out) {
  if (type == CACHE_FP32)
    memcpy(out, p, n * 4);
  else
    decode_bf16(p, n, out);
}
inline void encode_numbers(int64_t type, const float* x, int64_t n, char* to) {
  if (type == CACHE_FP32)
    memcpy(to, x, n * 4);
  else
    for (int64_t i = 0; i < n; ++i) store(to + 2 * i, rounded_bf16(x[i]));
}

inline void decode_row(const Rows& rows, int64_t t, float* out) {
  const char* p = rows.data + t * rows.stride;
  if (rows.type != CACHE_FP8) {
    decode_numbers(rows.type, p, rows.latent + rows.rope, out);
  } else {
    const char* scales = p + rows.latent;
    for (int64_t at = 0, tile = 0; at < rows.latent; at += BLOCK, ++tile) {
      const F up = splat(0x1p120f), scale = splat(load<float>(scales + 4 * tile));
      const int64_t n = least(BLOCK, rows.latent - at);
      Watch<DecodeE4m3> unused;  // a tile with NaN has NaN as its scale
      along_units<DecodeE4m3>(p + at, n, unused, [&](int64_t i, const F(&v)[2]) {
        store_some(out + at + i, v[0] * up * scale, n - i);
        if (n - i > LANES) store_some(out + at + i + LANES, v[1] * up * scale, n - i - LANES);
      });
    }
    decode_bf16(scales + 4 * ((rows.latent + BLOCK - 1) / BLOCK), rows.rope, out + rows.latent);
  }
}

// Logits of Q query rows and 4 keys: vectors along the row, then a sum.
template <int Q>
inline void logits_of(const float* q, int64_t q_stride, const float* keys, int64_t stride, int64_t n, float* out) {
  F total[Q][4] = {};
  for (int64_t i = 0; i < n; i += LANES) {
    F k[4];
    UNROLL for (int j = 0; j < 4; ++j) k[j] = load<F>(keys + j * stride + i);
    UNROLL for (int r = 0; r < Q; ++r) {
      const F v = load<F>(q + r * q_stride + i);
      UNROLL for (int j = 0; j < 4; ++j) total[r][j] += v * k[j];
    }
  }
  UNROLL for (int r = 0; r < Q; ++r) UNROLL for (int j = 0; j < 4; ++j) out[r * KEYS + j] = sum(total[r][j]);
}

// out[r] = out[r] * keep[r] + sum over keys of weights[r] * values, for Q rows.
template <int Q>
inline void add_values(const float* weights, const float* keep, const float* values, int64_t stride, int64_t keys,
                       int64_t n, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < n; i += ALIGNED) {
    F total[Q][COLUMNS];
    UNROLL for (int r = 0; r < Q; ++r) UNROLL for (int c = 0; c < COLUMNS; ++c)
        total[r][c] = load<F>(out + r * out_stride + i + c * LANES) * splat(keep[r]);
    for (int64_t t = 0; t < keys; ++t) {
      F v[COLUMNS];
      UNROLL for (int c = 0; c < COLUMNS; ++c) v[c] = load<F>(values + t * stride + i + c * LANES);
      UNROLL for (int r = 0; r < Q; ++r) {
        const F weight = splat(weights[r * KEYS + t]);
        UNROLL for (int c = 0; c < COLUMNS; ++c) total[r][c] += weight * v[c];
      }
    }
    UNROLL for (int r = 0; r < Q; ++r) UNROLL for (int c = 0; c < COLUMNS; ++c)
        store(out + r * out_stride + i + c * LANES, total[r][c]);
  }
}

// What `n` query rows of one sequence see of the keys [at, at + some), some <= KEYS. Row r sees keys up to last[r],
// included. q: rows of `stride` numbers, scaled, zero after `width`, as keys are; values: rows of `v_stride` numbers, of
// which `value` count. high, total: [n]; out: [n, out_stride]. All strides are multiples of ALIGNED.
// logits: (n + 4) * KEYS numbers; keep: n numbers.
inline void attend_block(int64_t at, int64_t some, const float* keys, int64_t stride, int64_t width, const float* values,
                         int64_t v_stride, int64_t value, const float* q, int64_t n, const int64_t* last, float* high,
                         float* total, float* out, int64_t out_stride, float* logits, float* keep) {
  const int64_t padded_width = round_up(width, LANES);
  // keys from `some` on are those of the turn before: their logits are not read
  for (int64_t t = 0; t < some; t += 4) {
    const float* four = keys + t * stride;
    int64_t r = 0;
    for (; r + QUERIES <= n; r += QUERIES)
      logits_of<QUERIES>(q + r * stride, stride, four, stride, padded_width, logits + r * KEYS + t);
    for (; r < n; ++r) logits_of<1>(q + r * stride, stride, four, stride, padded_width, logits + r * KEYS + t);
  }
  for (int64_t r = 0; r < n; ++r) {
    float* row = logits + r * KEYS;
    const int64_t seen = least(some, last[r] + 1 - at);
    if (seen <= 0) {
      keep[r] = 1;
      memset(row, 0, KEYS * 4);
      continue;
    }
    float top = high[r];
    for (int64_t t = 0; t < seen; ++t) top = row[t] > top ? row[t] : top;
    for (int64_t t = seen; t < KEYS; ++t) row[t] = -INFINITY;
    keep[r] = total[r] == 0 && high[r] == -INFINITY ? 0 : expf(high[r] - top);
    F sums{};
    for (int64_t t = 0; t < KEYS; t += LANES) {
      const F p = exponential(load<F>(row + t) - splat(top));
      store(row + t, p);
      sums += p;
    }
    for (int64_t t = seen; t < KEYS; ++t) row[t] = 0;  // NaN - NaN of hidden keys
    total[r] = total[r] * keep[r] + sum(sums), high[r] = top;
  }
  int64_t r = 0;
  for (; r + 4 <= n; r += 4)
    add_values<4>(logits + r * KEYS, keep + r, values, v_stride, some, value, out + r * out_stride, out_stride);
  for (; r < n; ++r)
    add_values<1>(logits + r * KEYS, keep + r, values, v_stride, some, value, out + r * out_stride, out_stride);
}

// Makes `n` query rows ready for the first block of a part.
inline void begin_part(int64_t n, float* high, float* total, float* out, int64_t out_stride) {
  memset(out, 0, n * out_stride * 4);
  for (int64_t r = 0; r < n; ++r) high[r] = -INFINITY, total[r] = 0;
}

inline void prefetch(const char* p, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(p + line);
}

// The part of the context [from, to) for `n` query rows of one sequence, whose keys are rows of latents and whose values
// are the latents. Arguments as of attend_block. Scratch: KEYS * q_stride + (n + 4) * (KEYS + 1) numbers.
inline void attend_part(const Rows& rows, int64_t from, int64_t to, const float* q, int64_t q_stride, int64_t n,
                        const int64_t* last, float* high, float* total, float* out, int64_t out_stride, float* scratch) {
  float* keys = scratch;
  float* logits = keys + KEYS * q_stride;
  memset(keys, 0, KEYS * q_stride * 4);
  begin_part(n, high, total, out, out_stride);
  for (int64_t at = from; at < to; at += KEYS) {
    const int64_t some = least(KEYS, to - at);
    for (int64_t t = 0; t < some; ++t) {
      prefetch(rows.data + (at + t + KEYS) * rows.stride, rows.stride);
      decode_row(rows, at + t, keys + t * q_stride);
    }
    attend_block(at, some, keys, q_stride, rows.latent + rows.rope, keys, q_stride, rows.latent, q, n, last, high, total,
                 out, out_stride, logits, logits + (n + 4) * KEYS);
  }
}

// The parts that a context is cut into.
inline int64_t parts_of(int64_t keys) {
  const int64_t length = part_length(keys);
  return (keys + length - 1) / length;
}

// Products of all tokens with rows of a weight; ROWS rows are an item.
constexpr int64_t ROWS = 32;
inline int64_t items_of(const Matrix& w) { return (w.rows + ROWS - 1) / ROWS; }
template <class Put>
inline void product_item(const Matrix& w, int64_t item, const float* x, int64_t stride, int64_t n, Put put) {
  const int64_t from = item * ROWS, to = least(w.rows, from + ROWS);
  with_decoder(w.type, [&](auto decoder) { products<decltype(decoder)>(w, from, to, x, stride, n, put); });
}

// The weighted mean of values over all parts, of one query row: high, total and out of a part are `stride` numbers
// after those of the part before.
inline void merge_parts(const float* high, const float* total, const float* out, int64_t parts, int64_t stride,
                        int64_t out_stride, int64_t n, float* result) {
  float top = -INFINITY;
  for (int64_t p = 0; p < parts; ++p) top = total[p * stride] != 0 && high[p * stride] > top ? high[p * stride] : top;
  float sum_of_all = 0;
  memset(result, 0, n * 4);
  for (int64_t p = 0; p < parts; ++p) {
    if (total[p * stride] == 0) continue;  // this row sees no key of the part
    const float share = expf(high[p * stride] - top);
    sum_of_all += share * total[p * stride];
    for (int64_t i = 0; i < n; ++i) result[i] += share * out[p * out_stride + i];
  }
  for (int64_t i = 0; i < n; ++i) result[i] /= sum_of_all;
}

}  // namespace
