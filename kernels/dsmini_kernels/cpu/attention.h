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

inline void decode_row(const Rows& rows, int64_t t, float* out) {
  const char* p = rows.data + t * rows.stride;
  const int64_t all = rows.latent + rows.rope;
  if (rows.type == CACHE_FP32) {
    memcpy(out, p, all * 4);
  } else if (rows.type == CACHE_BF16) {
    decode_bf16(p, all, out);
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

// The part of the context [from, to) for `n` query rows of one sequence. Row r sees keys up to last[r], included.
// q: rows of `q_stride` numbers, zero after latent + rope, scaled. high, total: [n]; out: [n, out_stride], out_stride =
// latent rounded up to ALIGNED. Scratch: KEYS * q_stride + (n + 4) * (KEYS + 1) numbers.
inline void attend_part(const Rows& rows, int64_t from, int64_t to, const float* q, int64_t q_stride, int64_t n,
                        const int64_t* last, float* high, float* total, float* out, int64_t out_stride, float* scratch) {
  float* keys = scratch;
  float* logits = keys + KEYS * q_stride;
  float* keep = logits + (n + 4) * KEYS;
  memset(keys, 0, KEYS * q_stride * 4);
  memset(out, 0, n * out_stride * 4);
  for (int64_t r = 0; r < n; ++r) high[r] = -INFINITY, total[r] = 0;
  const int64_t width = rows.latent + rows.rope, padded_width = round_up(width, LANES);
  for (int64_t at = from; at < to; at += KEYS) {
    const int64_t some = least(KEYS, to - at);
    for (int64_t t = 0; t < some; ++t) {
      const char* next = rows.data + (at + t + KEYS) * rows.stride;
      for (int64_t line = 0; line < rows.stride; line += 64) __builtin_prefetch(next + line);
      decode_row(rows, at + t, keys + t * q_stride);
    }
    // keys from `some` on are those of the turn before: their logits are not read
    for (int64_t t = 0; t < some; t += 4) {
      const float* four = keys + t * q_stride;
      int64_t r = 0;
      for (; r + QUERIES <= n; r += QUERIES)
        logits_of<QUERIES>(q + r * q_stride, q_stride, four, q_stride, padded_width, logits + r * KEYS + t);
      for (; r < n; ++r) logits_of<1>(q + r * q_stride, q_stride, four, q_stride, padded_width, logits + r * KEYS + t);
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
      add_values<4>(logits + r * KEYS, keep + r, keys, q_stride, some, rows.latent, out + r * out_stride, out_stride);
    for (; r < n; ++r)
      add_values<1>(logits + r * KEYS, keep + r, keys, q_stride, some, rows.latent, out + r * out_stride, out_stride);
  }
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
