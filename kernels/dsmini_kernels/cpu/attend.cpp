// Attention of a few query rows to a part of the context: logits, their weights, and the sums of values.

#include "attention.h"

namespace {

constexpr int64_t NEAR_KEYS = 8;              // that stay in the first cache
constexpr int QUERIES = BYTES == 64 ? 8 : 4;  // rows that share a key's numbers, whose sums stay in registers

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
                       float* keep, const uint8_t* hidden) {
  for (int64_t r = 0; r < n; ++r) {
    float* row = logits + r * KEYS;
    const int64_t seen = least(some, last[r] + 1 - at);
    if (seen <= 0) {
      keep[r] = 1;
      memset(row, 0, KEYS * 4);
      continue;
    }
    for (int64_t t = seen; t < KEYS; ++t) row[t] = -INFINITY;
    for (int64_t t = 0; hidden != nullptr && t < seen; ++t) row[t] = hidden[t] ? -INFINITY : row[t];
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

}  // namespace

void attend_block(int64_t at, int64_t some, Decode decode, const float* keys, int64_t stride, const float* values,
                         int64_t v_stride, int64_t value, const float* q, int64_t n, const int64_t* last, float* high,
                         float* total, float* out, int64_t out_stride, float* logits, float* keep, const uint8_t* hidden) {
  for (int64_t from = 0; from < some; from += NEAR_KEYS)
    each_group(n, [&](auto count, int64_t r) {
      constexpr int Q = decltype(count)::value;
      const int64_t to = least(some, from + NEAR_KEYS);
      for (int64_t t = from; t < to; t += 2) {
        for (int64_t k = t; r == 0 && k < least(to, t + 2); ++k) decode.run(decode.by, k);
        if (t + 1 < to)
          logits_of<Q, 2>(q + r * stride, keys + t * stride, stride, logits + r * KEYS + t);
        else
          logits_of<Q, 1>(q + r * stride, keys + t * stride, stride, logits + r * KEYS + t);
      }
    });
  weights_of(logits, n, at, some, last, high, total, keep, hidden);
  add_values(logits, keep, n, values, v_stride, some, value, out, out_stride);
}

void attend_part(const Rows& rows, int64_t from, int64_t to, const float* q, int64_t q_stride, int64_t n,
                        const int64_t* last, float* high, float* total, float* out, int64_t out_stride, float* scratch,
                        const int32_t* list) {
  const auto row_at = [&](int64_t t) { return list == nullptr ? t : int64_t{list[t]}; };
  float *keys = scratch, *logits = keys + KEYS * q_stride;
  clear_after(keys, rows.latent + rows.rope, q_stride);
  begin_part(n, high, total, out, out_stride);
  for (int64_t at = from; at < to; at += KEYS) {
    const auto decode = [&](int64_t t) {
      if (list == nullptr || at + t + SOON < to) prefetch(rows.data + row_at(at + t + SOON) * rows.stride, rows.stride);
      decode_row(rows, row_at(at + t), keys + t * q_stride);
    };
    attend_block(at, least(KEYS, to - at), decoding(decode), keys, q_stride, keys, q_stride, rows.latent, q, n, last, high, total, out,
                 out_stride, logits, logits + n * KEYS);
  }
}
