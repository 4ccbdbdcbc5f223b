// The lightning indexer: its queries and keys, the scores of all keys of a token, and the places of the largest.
//
// Keys are transposed, a panel at a time, and all heads are multiplied with the panel. ReLU, the weights of the heads and
// the sum over heads then work on vectors of keys. A token's scores are stored once, as bits that sort like the numbers.

#pragma once

#include "panels.h"

#include <initializer_list>
#include <math.h>

namespace {

// Rotates pairs of the two halves of x by their angles, in place.
inline void rotate_halves(float* x, int64_t pairs, const float* cos, const float* sin) {
  for (int64_t j = 0; j < pairs; ++j) {
    const float a = x[j], b = x[pairs + j];
    x[j] = a * cos[j] - b * sin[j], x[pairs + j] = b * cos[j] + a * sin[j];
  }
}

// x H / sqrt(n) in place, with Sylvester's H; n is a power of two.
inline void hadamard(float* x, int64_t n) {
  for (int64_t half = 1; half < n; half *= 2)
    for (int64_t at = 0; at < n; at += 2 * half)
      for (int64_t i = at; i < at + half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b, x[i + half] = a - b;
      }
  const float scale = float(1 / sqrt(double(n)));
  for (int64_t i = 0; i < n; ++i) x[i] *= scale;
}

// x = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias.
inline void layer_norm(float* x, const float* weight, const float* bias, int64_t n, double eps) {
  double total = 0, squares = 0;
  for (int64_t i = 0; i < n; ++i) total += x[i];
  const double mean = total / n;
  for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float inverse = float(1 / sqrt(squares / n + eps));
  for (int64_t i = 0; i < n; ++i) x[i] = float(x[i] - mean) * inverse * weight[i] + bias[i];
}

// Bits that sort like the numbers: NaN is above infinity, both zeros are equal.
inline U sortable(F x) {
  const I bits = (I)(x + F{}), key = bits ^ ((bits >> 31) | SIGN);
  return (U)(x != x ? splat(-1) : key);
}

constexpr int64_t PANEL_KEYS = MOST_VECTORS * LANES;
constexpr int64_t SCORED = 16 * PANEL_KEYS;  // keys of an item of scores
inline int64_t index_panel_for(int64_t width) { return width * PANEL_KEYS; }  // numbers of memory for a panel

// FP32 rows times keys in BF16, whose words stay pairs in the panel: half as much is transposed and stored.
struct KeyPairs {
  static constexpr WordKind KIND = KEY_PAIRS;
  static constexpr int64_t NUMBERS = 2, SIZE = 4;
};

// Calls body(Words) for FP32 queries, and keys in BF16 or FP32.
template <class Body>
inline void with_keys(bool bf16, Body body) {
  if (bf16) return body(KeyPairs());
  body(Fp32Words());
}

// sum over heads of weights[h] * relu(q_h . k), as sortable bits, for up to PANEL_KEYS keys of a panel. q_of(h) finds the numbers of a head.
template <class Words, class QueryOf>
inline void score_panel(const float* panel, int64_t vectors, int64_t width, int64_t heads, QueryOf q_of,
                        const float* weights, uint32_t* out) {
  F total[MOST_VECTORS] = {};
  float products[ROWS_AT_ONCE * PANEL_KEYS];
  for (int64_t h = 0; h < heads; h += ROWS_AT_ONCE) {
    const char* rows[ROWS_AT_ONCE];
    for (int64_t r = 0; r < ROWS_AT_ONCE; ++r) rows[r] = q_of(least(h + r, heads - 1));
    multiply<Words>(rows, panel, vectors, width, 0, products);
    for (int64_t r = 0; r < least(ROWS_AT_ONCE, heads - h); ++r) {
      const F weight = splat(weights[h + r]);
      for (int64_t v = 0; v < vectors; ++v) {
        const F p = load<F>(products + (r * vectors + v) * LANES);
        total[v] += weight * (p < F{} ? F{} : p);
      }
    }
  }
  for (int64_t v = 0; v < vectors; ++v) store(out + v * LANES, sortable(total[v]));
}

// A bit for each lane that is not 0.
inline uint32_t lanes_of(I mask) {
#if BYTES == 64
  return _mm512_movepi32_mask((__m512i)mask);
#elif BYTES == 32
  return uint32_t(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < LANES; ++i) bits |= uint32_t(mask[i] != 0) << i;
  return bits;
#endif
}

// Calls body(first place, scores) for vectors of n scores; the last is filled up with zeros, which sort below all scores.
template <class Body>
inline void each_scores(const uint32_t* scores, int64_t n, Body body) {
  int64_t t = 0;
  for (; t + LANES <= n; t += LANES) body(t, load<U>(scores + t));
  if (t == n) return;
  U rest{};
  memcpy(&rest, scores + t, (n - t) * 4);
  body(t, rest);
}

// The places of the k largest of n scores, in order; of equal ones the first. k < n. The k-th largest is found eleven
// bits at a time, among the scores that have all bits so far.
inline void select_largest(const uint32_t* scores, int64_t n, int64_t k, int32_t* places) {
  int32_t counts[4][2048] = {};  // four, so that equal scores do not wait for each other
  uint32_t edge = 0;             // bits of the k-th largest
  int64_t wanted = k;            // of the scores whose bits so far are those of the edge
  const auto next_bits = [&](int shift, int64_t digit) {
    for (;; --digit) {
      const int64_t some = int64_t{counts[0][digit]} + counts[1][digit] + counts[2][digit] + counts[3][digit];
      if (some >= wanted) break;
      wanted -= some;
    }
    edge |= uint32_t(digit) << shift;
  };
  for (int64_t t = 0; t < n; ++t) ++counts[t % 4][scores[t] >> 21];
  next_bits(21, 2047);
  for (int shift : {10, 0}) {
    const int above = shift == 10 ? 21 : 10;
    const uint32_t most = shift == 10 ? 2047 : 1023;
    memset(counts, 0, sizeof counts);
    each_scores(scores, n, [&](int64_t t, U some) {
      for (uint32_t bits = lanes_of((I)(some >> above == U{} + (edge >> above))); bits; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        ++counts[lane % 4][scores[t + lane] >> shift & most];
      }
    });
    next_bits(shift, most);
  }
  int64_t found = 0;
  each_scores(scores, n, [&](int64_t t, U some) {
    const uint32_t equal = lanes_of((I)(some == U{} + edge));
    for (uint32_t bits = lanes_of((I)(some > U{} + edge)) | equal; bits; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      if (equal >> lane & 1 && wanted-- <= 0) continue;
      places[found++] = int32_t(t + lane);
    }
  });
}

}  // namespace
