// Attention of a panel of heads to rows in BF16, for CPUs that multiply pairs of BF16 numbers. A row is a key of all heads,
// and its first numbers are the value.
//
// For the logits the heads are the tokens of a panel, for the values the weights of two keys are a word. The result of a
// block of keys is added to FP32 sums, relative to the largest logit so far (Milakov and Gimelshein 2018).

#pragma once

#include "attention.h"
#include "panels.h"

#if BF16_UNITS
namespace {

constexpr int64_t SOME = 64;          // keys of a block
constexpr int64_t CHUNK = 2 * LANES;  // numbers of a row in a vector
constexpr int64_t HEADS_AT_ONCE = 8;  // whose sums stay in registers

// What attention has of the heads of a panel. Columns of the sums stay in the order in which two rows are interleaved: of
// 32 numbers, four and four of each eighth go to two vectors.
struct PanelOfHeads {
  int64_t vectors, heads, width, columns;  // heads: LANES of each vector; columns: numbers of a value
  const float* q;
  float *logits, *values, *keep;  // of a block: [SOME, heads], words of [SOME / 2, columns], [heads]
  float *sums, *high, *total;     // [heads, columns], [heads], [heads]
};

// The weights of `some` keys in the place of their logits: for each two keys a vector of words, of the heads. With `hidden`
// a key with 1 has no weight; one at least has 0.
inline void weights_of_block(const PanelOfHeads& own, int64_t some, float scale, const uint8_t* hidden) {
  const int64_t heads = own.heads;
  const auto is_seen = [&](int64_t t) { return t < some && (hidden == nullptr || hidden[t] == 0); };
  for (int64_t v = 0; v < own.vectors; ++v) {
    const F before = load<F>(own.high + v * LANES);
    F top = before;
    for (int64_t t = 0; t < some; ++t) {
      const F logit = load<F>(own.logits + t * heads + v * LANES) * splat(scale);
      if (is_seen(t)) top = logit > top ? logit : top;
    }
    F total{};
    for (int64_t t = 0; t < SOME; t += 2) {
      F p[2];
      UNROLL for (int j = 0; j < 2; ++j) {
        const F logit = rounded_product(load<F>(own.logits + (t + j) * heads + v * LANES), splat(scale));
        p[j] = is_seen(t + j) ? exponential(logit - top) : F{};
        total += p[j];
      }
      store(own.logits + t / 2 * heads + v * LANES, word_of(p[0], p[1]));
    }
    const F keep = exponential(before - top);
    store(own.high + v * LANES, top), store(own.keep + v * LANES, keep);
    store(own.total + v * LANES, load<F>(own.total + v * LANES) * keep + total);
  }
}

// sums = sums * keep + weights times values, for HEADS_AT_ONCE heads and all columns.
__attribute__((target("avx512bf16"))) inline void add_block(const PanelOfHeads& own, int64_t first, int64_t pairs) {
  const int64_t columns = own.columns;
  for (int64_t at = 0; at < columns; at += CHUNK) {
    F total[HEADS_AT_ONCE][2];
    UNROLL for (int h = 0; h < HEADS_AT_ONCE; ++h) UNROLL for (int k = 0; k < 2; ++k)
      total[h][k] = load<F>(own.sums + (first + h) * columns + at + k * LANES) * splat(own.keep[first + h]);
    const float *values = own.values + at, *weights = own.logits + first;
    for (int64_t pair = 0; pair < pairs; ++pair, values += columns, weights += own.heads) {
      const __m512bh v[2] = {(__m512bh)load<__m512i>(values), (__m512bh)load<__m512i>(values + LANES)};
      UNROLL for (int h = 0; h < HEADS_AT_ONCE; ++h) {
        const __m512bh weight = (__m512bh)_mm512_set1_epi32(load<int32_t>(weights + h));
        UNROLL for (int k = 0; k < 2; ++k) total[h][k] = (F)_mm512_dpbf16_ps((__m512)total[h][k], weight, v[k]);
      }
    }
    UNROLL for (int h = 0; h < HEADS_AT_ONCE; ++h) UNROLL for (int k = 0; k < 2; ++k)
      store(own.sums + (first + h) * columns + at + k * LANES, total[h][k]);
  }
}

// Adds `some` <= SOME keys to what the first `count` heads have. row_at(t) finds a row, and any row for t >= some; it is
// asked for `ahead` rows before it is read.
template <class RowAt>
void add_keys(const PanelOfHeads& own, RowAt row_at, int64_t some, int64_t ahead, float scale, int64_t count,
              const uint8_t* hidden = nullptr) {
  const int64_t pairs = divide_up(some, 2);
  for (int64_t t = 0; t < some; t += ROWS_AT_ONCE) {
    const char* four[ROWS_AT_ONCE];
    for (int64_t r = 0; r < ROWS_AT_ONCE; ++r) {
      four[r] = row_at(t + r);
      if (ahead) prefetch(row_at(ahead + t + r), 2 * own.width);
    }
    multiply<Bf16Words>(four, own.q, own.vectors, own.width, 0, own.logits + t * own.heads);
  }
  weights_of_block(own, some, scale, hidden);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const char *a = row_at(2 * pair), *b = row_at(2 * pair + 1);
    float* to = own.values + pair * own.columns;
    for (int64_t i = 0; i < own.columns; i += CHUNK) {
      const __m512i one = load<__m512i>(a + 2 * i), two = load<__m512i>(b + 2 * i);
      store(to + i, _mm512_unpacklo_epi16(one, two)), store(to + i + LANES, _mm512_unpackhi_epi16(one, two));
    }
  }
  for (int64_t h = 0; h < count; h += HEADS_AT_ONCE) add_block(own, h, pairs);
}

// Writes sums / total in BF16, with their columns in order.
inline void put_mean(const float* sums, float of_all, int64_t columns, char* out) {
  const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i back = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const F total = splat(of_all);
  for (int64_t at = 0; at < columns; at += CHUNK) {
    const __m512 low = (__m512)(load<F>(sums + at) / total), high = (__m512)(load<F>(sums + at + LANES) / total);
    put(true, (F)_mm512_permutex2var_ps(low, front, high), LANES, out + 2 * at);
    put(true, (F)_mm512_permutex2var_ps(low, back, high), LANES, out + 2 * (at + LANES));
  }
}

}  // namespace
#endif
