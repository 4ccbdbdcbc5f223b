// Dot products of rows of a weight with a few rows of x, and sums of weight rows. Weights are decoded in registers.
//
// A weight's numbers come in units of two vectors. BF16 gives first the even and then the odd numbers of a unit,
// because a shift and a mask of the same 32 bits make FP32 numbers of both; products with E4M3 take every fourth number
// four times, for the same reason. x is put in the same order beforehand (`arrange`). Sums have one order, whatever the thread: that of the loops below.

#pragma once

#include "lanes.h"
#include "matrix.h"

#include <cmath>
#include <type_traits>

namespace {

template <int N>
using Constant = std::integral_constant<int, N>;

constexpr int64_t UNIT = 2 * LANES, UNITS_OF_X = 2 * UNIT;
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
// Numbers of a row of x in the order of a weight: zeros follow the last, then what products must be multiplied by.
inline int64_t padded(int64_t columns) { return round_up(columns, UNITS_OF_X) + LANES; }

struct DecodeFp32 {
  static constexpr int64_t SIZE = 4, VECTORS = 2;
  static constexpr float FACTOR = 1.0f;
  static constexpr bool SCALED = false, EVEN_ODD = false, WATCHED = false;
  static void get(const char* p, F (&v)[2]) { v[0] = load<F>(p), v[1] = load<F>(p + BYTES); }
};
struct DecodeBf16 {
  static constexpr int64_t SIZE = 2, VECTORS = 2;
  static constexpr float FACTOR = 1.0f;
  static constexpr bool SCALED = false, EVEN_ODD = true, WATCHED = false;
  static void get(const char* p, F (&v)[2]) {
    const I both = load<I>(p);
    v[0] = (F)(both << 16), v[1] = (F)(both & HIGH_HALF);
  }
};
// An E4M3 number is an FP32 number that is 2^120 times smaller, subnormal numbers too, when its bits are put in FP32's
// places. x is UP times larger for such a weight, and FACTOR, in the scale of a block, makes up for the rest. The codes
// of NaN become numbers: whoever uses this looks for them (Watch).
constexpr float UP = 0x1p60f;
struct DecodeE4m3 {
  static constexpr int64_t SIZE = 1, VECTORS = 2;
  static constexpr bool SCALED = true, EVEN_ODD = false, WATCHED = true;
  static constexpr float FACTOR = UP;
  static void get(const char* p, F (&v)[2]) {
    for (int k = 0; k < 2; ++k) v[k] = (F)((widen_signed(p + k * LANES) << 20) & int32_t(0x87F00000));
  }
};
// The same for dot products: four codes of 32 bits go to four vectors, of which none is widened.
struct QuarteredE4m3 : DecodeE4m3 {
  static constexpr int64_t VECTORS = 4;
  static void get(const char* p, F (&v)[4]) {
    typedef int16_t S __attribute__((vector_size(BYTES)));
    const S both = load<S>(p);
    const I even = (I)(((S)(both << 8) >> 4) & int16_t(0x87F0)), odd = (I)((both >> 4) & int16_t(0x87F0));
    v[0] = (F)(even << 16), v[1] = (F)(odd << 16), v[2] = (F)(even & HIGH_HALF), v[3] = (F)(odd & HIGH_HALF);
  }
};
// The same with NaN, by way of FP16: there the number is 2^8 times smaller.
struct DecodeE4m3WithNan {
  static constexpr int64_t SIZE = 1, VECTORS = 2;
  static constexpr bool SCALED = true, EVEN_ODD = false, WATCHED = false;
  static constexpr float FACTOR = UP * 0x1p-112f;
  static void get(const char* p, F (&v)[2]) {
#if BYTES == 64
    const __m512i code = _mm512_cvtepu8_epi16(load<__m256i>(p));
    const __m512i magnitude = _mm512_and_si512(_mm512_slli_epi16(code, 7), _mm512_set1_epi16(0x3F80));
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x3F80));
    const __m512i sign = _mm512_slli_epi16(_mm512_srli_epi16(code, 7), 15);
    const __m512i half = _mm512_mask_blend_epi16(nan, _mm512_or_si512(magnitude, sign), _mm512_set1_epi16(0x7E00));
    v[0] = (F)_mm512_cvtph_ps(_mm512_castsi512_si256(half));
    v[1] = (F)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
#elif BYTES == 32
    const __m256i code = _mm256_cvtepu8_epi16(load<__m128i>(p));
    const __m256i magnitude = _mm256_and_si256(_mm256_slli_epi16(code, 7), _mm256_set1_epi16(0x3F80));
    const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x3F80));
    const __m256i sign = _mm256_slli_epi16(_mm256_srli_epi16(code, 7), 15);
    const __m256i half = _mm256_or_si256(_mm256_or_si256(magnitude, sign), _mm256_and_si256(nan, _mm256_set1_epi16(0x7E00)));
    v[0] = (F)_mm256_cvtph_ps(_mm256_castsi256_si128(half));
    v[1] = (F)_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
#else
    for (int k = 0; k < 2; ++k) {
      const I code = widen(load<B>(p + k * LANES)), magnitude = code & 0x7F;
      const I subnormal = magnitude < 8, bits = (magnitude << 20) + (112 << 23);
      const F small = (F)(bits + (1 << 23)) - (F)splat(113 << 23);
      const F value = magnitude == 0x7F ? (F)splat(QUIET_NAN) : subnormal ? small : (F)bits;
      v[k] = (F)((I)value | ((code & 0x80) << 24));
    }
#endif
  }
};

#if BF16_UNITS
// E4M3 numbers as BF16, looked up by their code without the sign, NaN too: 64 codes at a time, in pairs with those of x in
// BF16, for CPUs that multiply those. A dot product alone reads them so.
struct PairedE4m3 : DecodeE4m3 {
  static constexpr int64_t CODES = 64;
};
struct PairedTable {
  uint8_t low[128] = {}, high[128] = {};
  constexpr PairedTable() {
    for (int code = 0; code < 128; ++code) {
      int fraction = code % 8, exponent = code / 8 + 120;
      if (code < 8) {  // subnormal: its first one goes
        for (exponent = fraction ? 121 : 0; fraction && fraction < 8; fraction *= 2) --exponent;
        fraction %= 8;
      }
      const int bits = code == 0x7F ? 0x7FC0 : exponent << 7 | fraction << 4;
      low[code] = uint8_t(bits), high[code] = uint8_t(bits >> 8);
    }
  }
};
alignas(64) constexpr PairedTable PAIRED_TABLE{};

inline bool multiplies_pairs() {
  static const bool both = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  return both;
}
#endif

// Calls body(decoder) with the decoder of a weight's type.
template <class Body>
inline void with_decoder(int64_t type, Body body) {
  switch (type) {
    case WEIGHT_FP32: return body(DecodeFp32());
    case WEIGHT_BF16: return body(DecodeBf16());
#if BF16_UNITS
    case WEIGHT_E4M3_BF16:
      if (multiplies_pairs()) return body(PairedE4m3());
#endif
    default: return body(DecodeE4m3());
  }
}

// The bits of the largest magnitude of n numbers. NaN is above infinity.
inline int32_t largest_magnitude(const float* x, int64_t n) {
  int32_t top = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t magnitude = load<int32_t>(x + i) & MAGNITUDE;
    top = magnitude > top ? magnitude : top;
  }
  return top;
}

// A power of two that makes the largest of n numbers about `UP`, so that none is lost when a weight is 2^120 smaller.
inline float factor_for(const float* x, int64_t n) {
  const int32_t exponent = largest_magnitude(x, n) >> 23;  // with its bias; 255 for infinity and NaN
  if (exponent == 255) return UP;
  const int32_t wanted = 127 + 60 + 127 - (exponent > 1 ? exponent : 1), bits = (wanted < 254 ? wanted : 254) << 23;
  return load<float>(&bits);
}

inline uint16_t rounded_bf16(float x) {  // to nearest even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return x != x ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

#if BF16_UNITS
// The place of code i of PairedE4m3::CODES among the numbers that are looked up: each 16 codes give 8 to one vector, and 8
// to the next.
constexpr int64_t paired_place(int64_t i) { return i % 16 / 8 * 32 + i / 16 * 8 + i % 8; }

inline void arrange_pairs(const float* x, int64_t columns, float* out) {
  uint16_t* to = reinterpret_cast<uint16_t*>(out);
  const int64_t all = round_up(columns, PairedE4m3::CODES);
  if (all > columns) memset(to + all - PairedE4m3::CODES, 0, 2 * PairedE4m3::CODES);
  for (int64_t i = 0; i < columns; ++i)
    to[i / PairedE4m3::CODES * PairedE4m3::CODES + paired_place(i % PairedE4m3::CODES)] = rounded_bf16(x[i]);
}
#endif

// Copies x, times a factor: first every APART-th number of a unit of APART vectors, then those after them. Zeros follow.
template <int APART>
inline void spread(const float* x, int64_t columns, float factor, float* out) {
  constexpr int64_t N = APART * LANES;
  float rest[N] = {};
  const auto unit = [&](const float* from, float* to) {
    for (int64_t k = 0; k < APART; ++k)
      for (int64_t l = 0; l < LANES; ++l) to[k * LANES + l] = from[l * APART + k] * factor;
  };
  int64_t i = 0;
  for (; i + N <= columns; i += N) unit(x + i, out + i);
  if (i < columns) memcpy(rest, x + i, (columns - i) * 4), unit(rest, out + i), i += N;
  memset(out + i, 0, (round_up(columns, UNITS_OF_X) - i) * 4);
}

// Copies x in the order of a weight of that type: padded(columns) numbers.
inline void arrange(const float* x, int64_t columns, int64_t type, float* out) {
  float* last = out + round_up(columns, UNITS_OF_X);
  *last = 1.0f;
  if (type == WEIGHT_FP32) return spread<1>(x, columns, 1.0f, out);
  if (type == WEIGHT_BF16) return spread<2>(x, columns, 1.0f, out);
#if BF16_UNITS
  if (type == WEIGHT_E4M3_BF16 && multiplies_pairs()) return arrange_pairs(x, columns, out);
#endif
  const float factor = factor_for(x, columns);
  *last = UP / factor;
  spread<4>(x, columns, factor, out);
}

typedef uint8_t CodesOfTwo __attribute__((vector_size(UNIT)));
typedef uint8_t CodesOfFour __attribute__((vector_size(UNITS_OF_X)));

// Looks for the codes of NaN among those that are read.
template <class W>
class Watch {
 public:
  void see(const char* p) {
    if constexpr (W::WATCHED) top_ = larger(top_, load<Codes>(p) & 0x7F);
  }
  bool nan() const {
    if constexpr (!W::WATCHED) return false;
    const Codes found = (Codes)(top_ == 0x7F);
    uint64_t words[sizeof(Codes) / 8], any = 0;
    memcpy(words, &found, sizeof words);
    for (uint64_t word : words) any |= word;
    return any != 0;
  }

 private:
  using Codes = std::conditional_t<W::VECTORS == 4, CodesOfFour, CodesOfTwo>;
  Codes top_{};
};

inline bool has_nan(const char* codes, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if ((codes[i] & 0x7F) == 0x7F) return true;
  return false;
}

// Calls body(place, vectors of a unit) along `columns` numbers at p; numbers after the end are zero.
template <class W, class Body>
inline void along_units(const char* p, int64_t columns, Watch<W>& watch, Body body) {
  F v[2];
  int64_t i = 0;
  for (; i + UNIT <= columns; i += UNIT) {
    watch.see(p + i * W::SIZE);
    W::get(p + i * W::SIZE, v);
    body(i, v);
  }
  if (i < columns) {
    char rest[UNIT * W::SIZE] = {};
    memcpy(rest, p + i * W::SIZE, (columns - i) * W::SIZE);
    watch.see(rest);
    W::get(rest, v);
    body(i, v);
  }
}

// The sum of a vector's numbers: halves are added until one number is left.
#if BYTES >= 32
inline float sum(F v) {
#if BYTES == 64
  const __m256 w = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
  const __m256 w = (__m256)v;
#endif
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
#else
inline float sum(F v) { return (v[0] + v[2]) + (v[1] + v[3]); }
#endif

constexpr int64_t AHEAD = 8192, NEAR = 1024;  // bytes
constexpr int64_t SHORT = 512;                // columns of codes

#if BF16_UNITS
template <int R, int N>
__attribute__((target("avx512bf16,avx512vbmi"), noinline)) void paired_dots(const Matrix& w, int64_t row, const float* x,
                                                                           int64_t stride, float* out) {
  constexpr int64_t CODES = PairedE4m3::CODES;
  const int64_t group = R * w.stride, ahead = group * (AHEAD > group ? AHEAD / group : 1);
  const __m512i low[2] = {load<__m512i>(PAIRED_TABLE.low), load<__m512i>(PAIRED_TABLE.low + 64)};
  const __m512i high[2] = {load<__m512i>(PAIRED_TABLE.high), load<__m512i>(PAIRED_TABLE.high + 64)};
  const __m512i signs = _mm512_set1_epi8(char(0x80));
  F total[R][N] = {};
  const char* p = w.row(row);
  for (int64_t at = 0; at < w.columns; at += BLOCK) {
    const int64_t end = least(w.columns, at + BLOCK);
    F part[R][N] = {};
    for (int64_t i = at; i < end; i += CODES) {
      __m512bh xs[N][2];
      UNROLL for (int n = 0; n < N; ++n) {
        const char* of = reinterpret_cast<const char*>(x + n * stride) + 2 * i;
        xs[n][0] = (__m512bh)load<__m512i>(of), xs[n][1] = (__m512bh)load<__m512i>(of + 64);
      }
      const __mmask64 there = end - i >= CODES ? ~uint64_t{0} : (uint64_t{1} << (end - i)) - 1;
      UNROLL for (int r = 0; r < R; ++r) {
        const char* from = p + r * w.stride + i;
        __builtin_prefetch(from + (R > 1 ? ahead : NEAR));
        const __m512i code = _mm512_maskz_loadu_epi8(there, from);
        const __m512i lows = _mm512_permutex2var_epi8(low[0], code, low[1]);
        const __m512i highs = _mm512_permutex2var_epi8(high[0], code, high[1]);
        const __m512i with_sign = _mm512_ternarylogic_epi64(highs, code, signs, 0xF8);
        const __m512bh first = (__m512bh)_mm512_unpacklo_epi8(lows, with_sign);
        const __m512bh second = (__m512bh)_mm512_unpackhi_epi8(lows, with_sign);
        UNROLL for (int n = 0; n < N; ++n) {
          part[r][n] = (F)_mm512_dpbf16_ps((__m512)part[r][n], first, xs[n][0]);
          part[r][n] = (F)_mm512_dpbf16_ps((__m512)part[r][n], second, xs[n][1]);
        }
      }
    }
    UNROLL for (int r = 0; r < R; ++r) {
      const F scale = splat(w.scales_of(row + r)[at / BLOCK]);
      UNROLL for (int n = 0; n < N; ++n) total[r][n] += part[r][n] * scale;
    }
  }
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int n = 0; n < N; ++n) out[r * N + n] = sum(total[r][n]);
}
#endif

// R rows of the weight from `row` on, times N rows of x (arranged, `stride` numbers apart): out[r * N + n].
template <class W, int R, int N>
inline void dots(const Matrix& w, int64_t row, const float* x, int64_t stride, float* out) {
#if BF16_UNITS
  if constexpr (std::is_same_v<W, PairedE4m3>) return paired_dots<R, N>(w, row, x, stride, out);
#endif
  constexpr int V = W::VECTORS;
  constexpr int64_t STEP = V * LANES;
  // processors look ahead less than this, and not from one page of memory into the next
  const int64_t group = R * w.stride, ahead = group * (AHEAD > group ? AHEAD / group : 1);
  F total[R][N] = {};
  Watch<W> watch;
  const char* p = w.row(row);
  for (int64_t at = 0; at < w.columns; at += W::SCALED ? BLOCK : w.columns) {
    const int64_t end = W::SCALED ? least(w.columns, at + BLOCK) : w.columns;
    F part[R][N] = {};
    int64_t i = at;
    const auto add = [&](const char* const* from, int64_t to) __attribute__((always_inline)) {
      F xs[N][V];
      UNROLL for (int n = 0; n < N; ++n) UNROLL for (int k = 0; k < V; ++k) xs[n][k] = load<F>(x + n * stride + to + k * LANES);
      UNROLL for (int r = 0; r < R; ++r) {
        F v[V];
        __builtin_prefetch(from[r] + (R > 1 ? ahead : NEAR));
        watch.see(from[r]);
        W::get(from[r], v);
        UNROLL for (int n = 0; n < N; ++n) UNROLL for (int k = 0; k < V; ++k) part[r][n] += v[k] * xs[n][k];
      }
    };
    for (; i + STEP <= end; i += STEP) {
      const char* from[R];
      UNROLL for (int r = 0; r < R; ++r) from[r] = p + r * w.stride + i * W::SIZE;
      add(from, i);
    }
    if (i < end) {
      char rest[R][STEP * W::SIZE] = {};
      const char* from[R];
      UNROLL for (int r = 0; r < R; ++r) {
        memcpy(rest[r], p + r * w.stride + i * W::SIZE, (end - i) * W::SIZE);
        from[r] = rest[r];
      }
      add(from, i);
    }
    UNROLL for (int r = 0; r < R; ++r) {
      const F scale = splat(W::SCALED ? w.scales_of(row + r)[at / BLOCK] * W::FACTOR : 1.0f);
      UNROLL for (int n = 0; n < N; ++n) total[r][n] += part[r][n] * scale;
    }
  }
  const bool nan = watch.nan();
  UNROLL for (int r = 0; r < R; ++r) {
    const float factor = nan && has_nan(w.row(row + r), w.columns) ? NAN : 1.0f;
    UNROLL for (int n = 0; n < N; ++n) {
      out[r * N + n] = sum(total[r][n]);
      if constexpr (W::SCALED) out[r * N + n] *= x[n * stride + round_up(w.columns, UNITS_OF_X)] * factor;
    }
  }
}

// One row of codes, times one row of x (arranged).
template <class W>
inline float scaled_dot(const Matrix& w, int64_t row, const float* x) {
#if BF16_UNITS
  if constexpr (std::is_same_v<W, PairedE4m3>) {
    float out;
    paired_dots<1, 1>(w, row, x, 0, &out);
    return out;
  }
#endif
  constexpr int V = W::VECTORS;
  const char* p = w.row(row);
  const float* scales = w.scales_of(row);
  F total[V] = {};
  Watch<W> watch;
  const auto add = [&](const char* from, int64_t i, F(&part)[V]) __attribute__((always_inline)) {
    F v[V];
    watch.see(from);
    W::get(from, v);
    UNROLL for (int k = 0; k < V; ++k) part[k] += v[k] * load<F>(x + i + k * LANES);
  };
  const auto close = [&](const F(&part)[V], float scale) __attribute__((always_inline)) {
    UNROLL for (int k = 0; k < V; ++k) total[k] += part[k] * splat(scale * W::FACTOR);
  };
  int64_t at = 0;
  for (; at + BLOCK <= w.columns; at += BLOCK) {
    F part[V] = {};
    for (int64_t line = 0; line < BLOCK; line += 64) __builtin_prefetch(p + at + NEAR + line);
    UNROLL for (int64_t i = at; i < at + BLOCK; i += V * LANES) add(p + i, i, part);
    close(part, *scales++);
  }
  if (at < w.columns) {
    F part[V] = {};
    char rest[BLOCK] = {};
    memcpy(rest, p + at, w.columns - at);
    for (int64_t i = at; i < w.columns; i += V * LANES) add(rest + i - at, i, part);
    close(part, *scales);
  }
  UNROLL for (int k = 1; k < V; ++k) total[0] += total[k];
  const float factor = watch.nan() && has_nan(p, w.columns) ? NAN : 1.0f;
  return sum(total[0]) * x[round_up(w.columns, UNITS_OF_X)] * factor;
}

// One row of a weight without scales, times one row of x (arranged).
template <class W>
inline float dot(const Matrix& w, int64_t row, const float* x) {
  constexpr int PARTS = 4;
  constexpr int64_t STEP = PARTS * UNIT;
  const char* p = w.row(row);
  F part[PARTS] = {};
  int64_t i = 0;
  for (; i + STEP <= w.columns; i += STEP) {
    UNROLL for (int u = 0; u < PARTS; ++u) {
      const int64_t to = i + u * UNIT;
      F v[2];
      __builtin_prefetch(p + to * W::SIZE + NEAR);
      W::get(p + to * W::SIZE, v);
      part[u] += v[0] * load<F>(x + to), part[u] += v[1] * load<F>(x + to + LANES);
    }
  }
  Watch<W> nothing;
  along_units<W>(p + i * W::SIZE, w.columns - i, nothing, [&](int64_t k, const F(&v)[2]) {
    part[0] += v[0] * load<F>(x + i + k), part[0] += v[1] * load<F>(x + i + k + LANES);
  });
  return sum((part[0] + part[1]) + (part[2] + part[3]));
}

// Rows of a weight that are an item of a team: long stretches come from memory fastest, but each thread should find four.
constexpr int64_t LEAST_ROWS = 32, MOST_ROWS = 128;
inline int64_t rows_of_item(int64_t rows, int64_t threads) {
  const int64_t wanted = rows / (4 * threads) / LEAST_ROWS * LEAST_ROWS;
  return wanted < LEAST_ROWS ? LEAST_ROWS : least(wanted, MOST_ROWS);
}

// Calls put(row, n, value) for rows [from, to) of the weight times `n` rows of x.
template <class W, class Put>
inline void products(const Matrix& w, int64_t from, int64_t to, const float* x, int64_t stride, int64_t n, Put put) {
  using Dots = std::conditional_t<std::is_same_v<W, DecodeE4m3>, QuarteredE4m3, W>;
  constexpr int R = 4;
  float out[R * 4];
  const auto some = [&](auto count, int64_t at) {
    constexpr int N = decltype(count)::value;
    const float* rows = x + at * stride;
    int64_t i = from;
    for (; i + R <= to; i += R) {
      dots<Dots, R, N>(w, i, rows, stride, out);
      for (int r = 0; r < R; ++r)
        for (int k = 0; k < N; ++k) put(i + r, at + k, out[r * N + k]);
    }
    for (; i < to; ++i) {
      dots<Dots, 1, N>(w, i, rows, stride, out);
      for (int k = 0; k < N; ++k) put(i, at + k, out[k]);
    }
  };
  constexpr int MOST = BYTES == 64 ? 4 : 2;  // of x, so that sums and operands stay in registers
  int64_t at = 0;
  for (; at + MOST <= n; at += MOST) some(Constant<MOST>(), at);
  if (MOST > 2 && at + 2 <= n) some(Constant<2>(), at), at += 2;
  if (at == n) return;
  if (W::SCALED && w.columns <= SHORT) return some(Constant<1>(), at);
  // one row of x: long rows that are read one after the other, and somewhat ahead, come from memory faster than four at a time
  for (int64_t i = from; i < to; ++i) {
    if constexpr (W::SCALED)
      put(i, at, scaled_dot<Dots>(w, i, x + at * stride));
    else
      put(i, at, dot<W>(w, i, x + at * stride));
  }
}

// The sums over rows [from, from + count) of factor * row, for columns [first, first + width), of n tokens: factors and sums
// of a token are so many numbers after those of the one before. `first` is a multiple of WIDEST, and `out` has room for
// round_up(width, WIDEST) numbers of a token. Eight rows at a time, strip by strip, so that each comes from memory once.
constexpr int UNITS = 4;
constexpr int64_t WIDEST = UNITS * UNIT, SOME_ROWS = 8;
template <class W>
inline void weighted_rows(const Matrix& w, int64_t from, int64_t count, const float* factors, int64_t apart, int64_t n,
                          int64_t first, int64_t width, float* out, int64_t out_stride) {
  Watch<W> watch;
  for (int64_t i = 0; i < n; ++i) memset(out + i * out_stride, 0, round_up(width, WIDEST) * 4);
  // rows [some, to) of WIDEST columns from `at` on, for a token
  const auto add = [&](int64_t some, int64_t to, int64_t at, int64_t i) {
    float* sums = out + i * out_stride + at;
    F total[2 * UNITS];
    UNROLL for (int k = 0; k < 2 * UNITS; ++k) total[k] = load<F>(sums + k * LANES);
    for (int64_t j = some; j < to; ++j) {
      const char* p = w.row(from + j) + (first + at) * W::SIZE;
      for (int64_t line = 0; i == 0 && line < WIDEST * W::SIZE; line += 64) __builtin_prefetch(p + SOME_ROWS * w.stride + line);
      float factor = factors[i * apart + j];
      if constexpr (W::SCALED) factor *= w.scales_of(from + j)[(first + at) / BLOCK] * W::FACTOR;
      if (at + WIDEST <= width) {
        UNROLL for (int u = 0; u < UNITS; ++u) {
          F v[2];
          watch.see(p + u * UNIT * W::SIZE);
          W::get(p + u * UNIT * W::SIZE, v);
          total[2 * u] += v[0] * splat(factor), total[2 * u + 1] += v[1] * splat(factor);
        }
      } else {
        along_units<W>(p, width - at, watch, [&](int64_t k, const F(&v)[2]) {
          total[k / LANES] += v[0] * splat(factor), total[k / LANES + 1] += v[1] * splat(factor);
        });
      }
    }
    UNROLL for (int k = 0; k < 2 * UNITS; ++k) store(sums + k * LANES, total[k]);
  };
  for (int64_t some = 0; some < count; some += SOME_ROWS)
    for (int64_t at = 0; at < width; at += WIDEST)
      for (int64_t i = 0; i < n; ++i) add(some, least(count, some + SOME_ROWS), at, i);
  if constexpr (W::WATCHED)
    if (watch.nan()) return weighted_rows<DecodeE4m3WithNan>(w, from, count, factors, apart, n, first, width, out, out_stride);
  for (int64_t i = 0; i < n; ++i)
    for (float* unit = out + i * out_stride; unit < out + i * out_stride + width; unit += UNIT) {
      float pair[UNIT];
      memcpy(pair, unit, sizeof pair);
      for (int64_t k = 0; k < LANES; ++k) {
        unit[W::EVEN_ODD ? 2 * k : k] = pair[k] * (W::SCALED ? UP : 1.0f);
        unit[W::EVEN_ODD ? 2 * k + 1 : LANES + k] = pair[LANES + k] * (W::SCALED ? UP : 1.0f);
      }
    }
}

}  // namespace
