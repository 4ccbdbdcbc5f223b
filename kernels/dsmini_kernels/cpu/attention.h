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
constexpr int64_t KEYS = 32, NEAR_KEYS = 8;   // that are decoded together, and that stay in the first cache
constexpr int QUERIES = BYTES == 64 ? 8 : 4;  // rows that share a key's numbers, whose sums stay in registers
// Keys of a part: few where the context is short, so that several threads have some.
inline int64_t part_length(int64_t keys) { return keys < 512 ? KEYS : keys < 2048 ? 2 * KEYS : 8 * KEYS; }

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
  if (rows.type != CACHE_FP8) return decode_numbers(rows.type, p, rows.latent + rows.rope, out);
  const char* scales = p + rows.latent;
  for (int64_t at = 0, tile = 0; at < rows.latent; at += BLOCK, ++tile) {
    const F up = splat(0x1p120f), scale = splat(load<float>(scales + 4 * tile));
    const int64_t n = least(BLOCK, rows.latent - at);
    int64_t i = 0;
    F v[2];
    for (; i + UNIT <= n; i += UNIT) {  // a tile with NaN has NaN as its scale
      DecodeE4m3::get(p + at + i, v);
      store(out + at + i, v[0] * up * scale), store(out + at + i + LANES, v[1] * up * scale);
    }
    Watch<DecodeE4m3> unused;
    if (i < n)
      along_units<DecodeE4m3>(p + at + i, n - i, unused, [&](int64_t, const F(&rest)[2]) {
        store_some(out + at + i, rest[0] * up * scale, n - i);
        if (n - i > LANES) store_some(out + at + i + LANES, rest[1] * up * scale, n - i - LANES);
      });
  }
  decode_bf16(scales + 4 * ((rows.latent + BLOCK - 1) / BLOCK), rows.rope, out + rows.latent);
}

// Calls body(count as a Constant, first row) for all of n query rows: QUERIES at a time, then half as many, and so on.
template <int Q = QUERIES, class Body>
inline void each_group(int64_t n, Body body, int64_t at = 0) {
  for (; at + Q <= n; at += Q) body(Constant<Q>(), at);
  if constexpr (Q > 1) each_group<Q / 2>(n, body, at);
}

// logits[r, k] of Q query rows and K decoded keys. Rows of all are `stride` numbers, with zeros after their width.
template <int Q, int K>
inline void logits_of(const float* q, const float* keys, int64_t stride, float* logits) {
  F sums[K][Q] = {};
  for (int64_t i = 0; i < stride; i += LANES) {
    F key[K];
    UNROLL for (int k = 0; k < K; ++k) key[k] = in_register(load<F>(keys + k * stride + i));
    UNROLL for (int r = 0; r < Q; ++r) {
      const F query = in_register(load<F>(q + r * stride + i));
      UNROLL for (int k = 0; k < K; ++k) sums[k][r] += query * key[k];
    }
  }
  UNROLL for (int k = 0; k < K; ++k) UNROLL for (int r = 0; r < Q; ++r) logits[r * KEYS + k] = sum(sums[k][r]);
}

// out[r] = out[r] * keep[r] + sum over keys of weights[r] * values, for n rows and `columns` numbers, rounded up to UNIT.
// A strip of values stays in the first cache for all rows.
inline void add_values(const float* weights, const float* keep, int64_t n, const float* values, int64_t stride, int64_t some,
                       int64_t columns, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < columns; i += UNIT)
    each_group(n, [&](auto count, int64_t row) {
      constexpr int Q = decltype(count)::value;
      float* to = out + row * out_stride + i;
      F total[Q][2];
      UNROLL for (int r = 0; r < Q; ++r) UNROLL for (int k = 0; k < 2; ++k)
          total[r][k] = load<F>(to + r * out_stride + k * LANES) * splat(keep[row + r]);
      for (int64_t t = 0; t < some; ++t) {
        const F v[2] = {in_register(load<F>(values + t * stride + i)), in_register(load<F>(values + t * stride + i + LANES))};
        UNROLL for (int r = 0; r < Q; ++r) {
          const F weight = splat(weights[(row + r) * KEYS + t]);
          UNROLL for (int k = 0; k < 2; ++k) total[r][k] += weight * v[k];
        }
      }
      UNROLL for (int r = 0; r < Q; ++r) UNROLL for (int k = 0; k < 2; ++k) store(to + r * out_stride + k * LANES, total[r][k]);
    });
}

// The weights of `some` keys from `at` on, in the place of their logits, and what the sums so far must be multiplied by.
inline void weights_of(float* logits, int64_t n, int64_t at, int64_t some, const int64_t* last, float* high, float* total,
                       float* keep) {
  for (int64_t r = 0; r < n; ++r) {
    float* row = logits + r * KEYS;
    const int64_t seen = least(some, last[r] + 1 - at);
    if (seen <= 0) {
      keep[r] = 1;
      memset(row, 0, KEYS * 4);
      continue;
    }
    for (int64_t t = seen; t < KEYS; ++t) row[t] = -INFINITY;
    F tops = splat(high[r]);
    for (int64_t t = 0; t < KEYS; t += LANES) tops = larger(load<F>(row + t), tops);
    float top = tops[0];
    UNROLL for (int lane = 1; lane < LANES; ++lane) top = tops[lane] > top ? tops[lane] : top;
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
}

// What `n` query rows of one sequence see of the keys [at, at + some), some <= KEYS. Row r sees keys up to last[r],
// included. decode(t) puts key `at + t` and its value in their places, just before they are used.
// q: rows of `stride` numbers, scaled, zero after their width, as keys are; values: rows of `v_stride` numbers, of which
// `value` count. high, total: [n]; out: [n, out_stride]. All strides are multiples of UNIT. logits: n * KEYS numbers;
// keep: n numbers.
template <class Decode>
inline void attend_block(int64_t at, int64_t some, Decode decode, const float* keys, int64_t stride, const float* values,
                         int64_t v_stride, int64_t value, const float* q, int64_t n, const int64_t* last, float* high,
                         float* total, float* out, int64_t out_stride, float* logits, float* keep) {
  for (int64_t from = 0; from < some; from += NEAR_KEYS)
    each_group(n, [&](auto count, int64_t r) {
      constexpr int Q = decltype(count)::value;
      const int64_t to = least(some, from + NEAR_KEYS);
      for (int64_t t = from; t < to; t += 2) {
        for (int64_t k = t; r == 0 && k < least(to, t + 2); ++k) decode(k);
        if (t + 1 < to)
          logits_of<Q, 2>(q + r * stride, keys + t * stride, stride, logits + r * KEYS + t);
        else
          logits_of<Q, 1>(q + r * stride, keys + t * stride, stride, logits + r * KEYS + t);
      }
    });
  weights_of(logits, n, at, some, last, high, total, keep);
  add_values(logits, keep, n, values, v_stride, some, value, out, out_stride);
}

// Zeros after the `width` numbers of each of KEYS rows, which decoding leaves.
inline void clear_after(float* rows, int64_t width, int64_t stride) {
  for (int64_t t = 0; t < KEYS && width < stride; ++t) memset(rows + t * stride + width, 0, (stride - width) * 4);
}

// Makes `n` query rows ready for the first block of a part.
inline void begin_part(int64_t n, float* high, float* total, float* out, int64_t out_stride) {
  memset(out, 0, n * out_stride * 4);
  for (int64_t r = 0; r < n; ++r) high[r] = -INFINITY, total[r] = 0;
}

// Asks memory for a row that is read soon: processors look ahead less than this.
constexpr int64_t SOON = 8;  // rows
inline void prefetch(const char* p, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(p + line);
}

// The part of the context [from, to) for `n` query rows of one sequence, whose keys are rows of latents and whose values
// are the latents; with `list`, the rows list[from] to list[to - 1]. Arguments as of attend_block. Scratch: scratch_for(n, q_stride) numbers.
inline int64_t scratch_for(int64_t n, int64_t q_stride) { return KEYS * q_stride + n * (KEYS + 1); }
inline void attend_part(const Rows& rows, int64_t from, int64_t to, const float* q, int64_t q_stride, int64_t n,
                        const int64_t* last, float* high, float* total, float* out, int64_t out_stride, float* scratch,
                        const int32_t* list = nullptr) {
  const auto row_at = [&](int64_t t) { return list == nullptr ? t : int64_t{list[t]}; };
  float *keys = scratch, *logits = keys + KEYS * q_stride;
  clear_after(keys, rows.latent + rows.rope, q_stride);
  begin_part(n, high, total, out, out_stride);
  for (int64_t at = from; at < to; at += KEYS) {
    const auto decode = [&](int64_t t) {
      if (list == nullptr || at + t + SOON < to) prefetch(rows.data + row_at(at + t + SOON) * rows.stride, rows.stride);
      decode_row(rows, row_at(at + t), keys + t * q_stride);
    };
    attend_block(at, least(KEYS, to - at), decode, keys, q_stride, keys, q_stride, rows.latent, q, n, last, high, total, out,
                 out_stride, logits, logits + n * KEYS);
  }
}

// The parts that a context is cut into.
inline int64_t parts_of(int64_t keys) {
  const int64_t length = part_length(keys);
  return (keys + length - 1) / length;
}

// Products of all tokens with a weight, some rows an item.
inline int64_t items_of(const Matrix& w, int64_t threads) { return divide_up(w.rows, rows_of_item(w.rows, threads)); }
template <class Put>
inline void product_item(const Matrix& w, int64_t threads, int64_t item, const float* x, int64_t stride, int64_t n, Put put) {
  const int64_t rows = rows_of_item(w.rows, threads), from = item * rows, to = least(w.rows, from + rows);
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
