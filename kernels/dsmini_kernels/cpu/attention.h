// Attention of a few query rows to the rows of a cache, over a part of the context, and the merge of parts.
//
// A part keeps for each query row the largest logit, the sum of weights relative to it, and the weighted sum of values.
// The softmax over all parts follows from these (Milakov and Gimelshein 2018). Parts have a fixed length, so the
// result does not depend on who computed which.

#pragma once

#include "activations.h"
#include "dots.h"

// The rows [latent | rotary key] of a sequence. In FP8: codes, FP32 scales of 128 numbers each, BF16 rotary key.
struct Rows {
  const char* data;
  int64_t type, stride;  // stride in bytes
  int64_t latent, rope;
};

namespace {

enum CacheType : int64_t { CACHE_FP32, CACHE_BF16, CACHE_FP8, CACHE_TYPES };
constexpr int64_t KEYS = 32;  // that are decoded together
// Keys of a part: few where the context is short, so that several threads have some.
inline int64_t part_length(int64_t keys) { return keys < 512 ? KEYS : keys < 2048 ? 2 * KEYS : 8 * KEYS; }

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

inline int64_t scratch_for(int64_t n, int64_t q_stride) { return KEYS * q_stride + n * (KEYS + 1); }

// The parts that a context is cut into.
inline int64_t parts_of(int64_t keys) {
  const int64_t length = part_length(keys);
  return (keys + length - 1) / length;
}

// Products of all tokens with a weight, some rows an item.
inline int64_t items_of(const Matrix& w, int64_t threads) { return divide_up(w.rows, rows_of_item(w.rows, threads)); }
inline void product_item(const Matrix& w, int64_t threads, int64_t item, const float* x, int64_t stride, int64_t n, float* out,
                         int64_t out_stride, const float* added = nullptr) {
  const int64_t rows = rows_of_item(w.rows, threads), from = item * rows, to = least(w.rows, from + rows);
  product(w, from, to, x, stride, n, out + from, out_stride, added == nullptr ? nullptr : added + from);
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
    each_vector(out + p * out_stride, n, [&](F v, int64_t i) {
      store_some(result + i, load_some(result + i, n - i) + splat(share) * v, n - i);
    });
  }
  for (int64_t i = 0; i < n; ++i) result[i] /= sum_of_all;
}

}  // namespace

// Puts key `t` of a block and its value in their places, for attend_block.
struct Decode {
  void (*run)(const void* by, int64_t t);
  const void* by;
};
template <class Body>
Decode decoding(const Body& body) {
  return {[](const void* by, int64_t t) { (*static_cast<const Body*>(by))(t); }, &body};
}

// What `n` query rows of one sequence see of the keys [at, at + some), some <= KEYS. Row r sees keys up to last[r],
// included, but for those where `hidden` is 1. Key `at + t` and its value are decoded just before they are used.
// q: rows of `stride` numbers, scaled, zero after their width, as keys are; values: rows of `v_stride` numbers, of which
// `value` count. high, total: [n]; out: [n, out_stride]. All strides are multiples of UNIT. logits: n * KEYS numbers;
// keep: n numbers.
void attend_block(int64_t at, int64_t some, Decode decode, const float* keys, int64_t stride, const float* values,
                  int64_t v_stride, int64_t value, const float* q, int64_t n, const int64_t* last, float* high, float* total,
                  float* out, int64_t out_stride, float* logits, float* keep, const uint8_t* hidden = nullptr);

// The part of the context [from, to) for `n` query rows of one sequence, whose keys are rows of latents and whose values
// are the latents; with `list`, the rows list[from] to list[to - 1]. Arguments as of attend_block. Scratch: scratch_for(n, q_stride) numbers.
void attend_part(const Rows& rows, int64_t from, int64_t to, const float* q, int64_t q_stride, int64_t n, const int64_t* last,
                 float* high, float* total, float* out, int64_t out_stride, float* scratch, const int32_t* list = nullptr);
