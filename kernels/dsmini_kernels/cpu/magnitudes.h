// The first pass over a chunk: the largest magnitude of every tile, and the scales that it gives. For tiles.cpp alone.

#pragma once

#include "lanes.h"

namespace {

// Magnitudes as integers, where NaN is above infinity and infinity above all numbers.

template <int SIZE>
struct Magnitudes;
template <>
struct Magnitudes<2> {
  typedef int16_t V __attribute__((vector_size(BYTES)));
  static constexpr int16_t MASK = 0x7FFF;
};
template <>
struct Magnitudes<4> {
  typedef int32_t V __attribute__((vector_size(BYTES)));
  static constexpr int32_t MASK = MAGNITUDE;
};

// Calls body(vector of magnitudes, place) for n numbers; the last vector is filled up with zeros.
template <class Bits, class Body>
inline void each_magnitude(const Bits* x, int64_t n, Body body) {
  using M = Magnitudes<sizeof(Bits)>;
  using V = typename M::V;
  constexpr int64_t WIDTH = BYTES / sizeof(Bits);
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) body(load<V>(x + i) & M::MASK, i);
  if (i < n) {
    V rest{};
    memcpy(&rest, x + i, (n - i) * sizeof(Bits));
    body(rest & M::MASK, i);
  }
}

// The largest number in a vector: halves are compared until 16 bytes are left.
#if BYTES == 64
inline __m256i halves(__m512i v, uint16_t) {
  return _mm256_max_epi16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
}
inline __m256i halves(__m512i v, uint32_t) {
  return _mm256_max_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
}
#elif BYTES == 32
template <class Bits>
inline __m256i halves(__m256i v, Bits) {
  return v;
}
#endif
#if BYTES >= 32
inline uint16_t largest(Magnitudes<2>::V all) {
  const __m256i v = halves((Vector)all, uint16_t());
  const __m128i w = _mm_max_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  return ~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(w, _mm_set1_epi16(-1))));
}
inline uint32_t largest(Magnitudes<4>::V all) {
  const __m256i v = halves((Vector)all, uint32_t());
  __m128i w = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  w = _mm_max_epi32(w, _mm_unpackhi_epi64(w, w));
  return _mm_cvtsi128_si32(_mm_max_epi32(w, _mm_srli_epi64(w, 32)));
}
#else
template <class V>
inline auto largest(V v) {
  typedef uint64_t Q __attribute__((vector_size(16)));
  constexpr int MIDDLE = sizeof(V) / sizeof(v[0]) / 2;
  v = larger(v, (V)((Q)v >> 32));
  if constexpr (sizeof(v[0]) == 2) v = larger(v, (V)((Q)v >> 16));
  return v[0] > v[MIDDLE] ? v[0] : v[MIDDLE];
}
#endif

// The largest magnitude of each column. `high` has room for whole vectors.
template <class Bits>
void down_columns(const char* x, int64_t stride, int64_t rows, int64_t n, Bits* high) {
  using V = typename Magnitudes<sizeof(Bits)>::V;
  each_magnitude(reinterpret_cast<const Bits*>(x), n, [&](V v, int64_t i) { store(high + i, v); });
  for (int64_t r = 1; r < rows; ++r)
    each_magnitude(reinterpret_cast<const Bits*>(x + r * stride), n,
                   [&](V v, int64_t i) { store(high + i, larger(v, load<V>(high + i))); });
}

template <class Bits>
inline typename Magnitudes<sizeof(Bits)>::V highest(const Bits* x, int64_t n) {
  using M = Magnitudes<sizeof(Bits)>;
  using V = typename M::V;
  constexpr int64_t WIDTH = BYTES / sizeof(Bits);
  V top{};
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) top = larger(top, load<V>(x + i) & M::MASK);
  if (i < n) {
    V rest{};
    memcpy(&rest, x + i, (n - i) * sizeof(Bits));
    top = larger(top, rest & M::MASK);
  }
  return top;
}

// The largest magnitude of each tile of a row.
template <class Bits>
void across_tiles(const Bits* x, int64_t n, int64_t width, Bits* high) {
  if (width == 1) {
    each_magnitude(x, n, [&](auto v, int64_t i) { store(high + i, v); });
    return;
  }
  for (int64_t at = 0, t = 0; at < n; at += width, ++t) {
    high[t] = largest(highest(x + at, least(width, n - at)));
  }
}

template <class In>
void to_scales(const Plan& plan, const typename In::Bits* high, int64_t tiles, float* scales, float* factors) {
  const F max = splat(plan.format.max), floor = splat(float(plan.call.amax_min));
  for (int64_t t = 0; t < tiles; t += LANES) {
    const F amax = In::get(high + t);
    F scale = larger(amax, floor) / max;
    if (plan.call.powers_of_two) scale = (F)(((I)scale + 0x7FFFFF) & EXPONENT);
    scale = (I)amax < EXPONENT ? scale : splat(load<float>(&QUIET_NAN));
    store(scales + t, scale);
    store(factors + t, 1.0f / scale);
  }
}

}  // namespace
