// Dot products of rows of a weight with a few rows of x, those of tokens in a decoding step, and sums of weighted rows.

#include "dots.h"

namespace {

#if BF16_UNITS
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

// The same of codes of four bits. A sum of FOURS products has four lanes for each scale.
template <class W, int R, int N>
inline void dots_of_fours(const Matrix& w, int64_t row, const float* x, int64_t stride, float* out) {
  const int64_t group = R * w.stride, ahead = group * (AHEAD > group ? AHEAD / group : 1);
  F total[R][N] = {};
  const auto add = [&](int r, int64_t at, const char* codes, const char* exponents) __attribute__((always_inline)) {
    typename W::Numbers v;
    W::get(codes, v);
    const F scale = powers_of_two(exponents);
    UNROLL for (int n = 0; n < N; ++n)
      total[r][n] += W::multiply(v, reinterpret_cast<const typename W::Number*>(x + n * stride) + at) * scale;
  };
  int64_t at = 0;
  for (; at + FOURS <= w.columns; at += FOURS) {
    UNROLL for (int r = 0; r < R; ++r) {
      const char* codes = w.row(row + r) + at / 2;
      __builtin_prefetch(codes + (R > 1 ? ahead : NEAR));
      add(r, at, codes, w.exponents_of(row + r) + at / FOUR_BLOCK);
    }
  }
  for (int r = 0; at < w.columns && r < R; ++r) {
    char codes[BYTES] = {}, exponents[FOURS / FOUR_BLOCK] = {};
    memcpy(codes, w.row(row + r) + at / 2, divide_up(w.columns - at, 2));
    memcpy(exponents, w.exponents_of(row + r) + at / FOUR_BLOCK, divide_up(w.columns - at, FOUR_BLOCK));
    add(r, at, codes, exponents);
  }
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int n = 0; n < N; ++n) {
    const float all = out[r * N + n] = sum(total[r][n]);
    const bool finite = all - all == 0;
    if (!finite && memchr(w.exponents_of(row + r), 0xFF, divide_up(w.columns, FOUR_BLOCK)) != nullptr) out[r * N + n] = NAN;
  }
}

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

// Calls put(row, n, value) for rows [from, to) of the weight times `n` rows of x.
template <class W, class Put>
void products(const Matrix& w, int64_t from, int64_t to, const float* x, int64_t stride, int64_t n, Put put) {
  using Dots = std::conditional_t<std::is_same_v<W, DecodeE4m3>, QuarteredE4m3, W>;
  constexpr bool FOUR_BITS = std::is_base_of_v<DecodeE2m1, W>;
  constexpr int R = 4;
  float out[R * 4];
  const auto several = [&](auto of_w, auto of_x, int64_t row, const float* rows) {
    if constexpr (FOUR_BITS)
      dots_of_fours<W, decltype(of_w)::value, decltype(of_x)::value>(w, row, rows, stride, out);
    else
      dots<Dots, decltype(of_w)::value, decltype(of_x)::value>(w, row, rows, stride, out);
  };
  const auto some = [&](auto count, int64_t at) {
    constexpr int N = decltype(count)::value;
    const float* rows = x + at * stride;
    int64_t i = from;
    for (; i + R <= to; i += R) {
      several(Constant<R>(), count, i, rows);
      for (int r = 0; r < R; ++r)
        for (int k = 0; k < N; ++k) put(i + r, at + k, out[r * N + k]);
    }
    for (; i < to; ++i) {
      several(Constant<1>(), count, i, rows);
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
    if constexpr (FOUR_BITS)
      several(Constant<1>(), Constant<1>(), i, x + at * stride), put(i, at, out[0]);
    else if constexpr (W::SCALED)
      put(i, at, scaled_dot<Dots>(w, i, x + at * stride));
    else
      put(i, at, dot<W>(w, i, x + at * stride));
  }
}

// The sums of weighted_rows: eight rows at a time, strip by strip.
constexpr int64_t SOME_ROWS = 8;
template <class W>
void sums_of_rows(const Matrix& w, int64_t from, int64_t count, const float* factors, int64_t apart, int64_t n,
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
    if (watch.nan()) return sums_of_rows<DecodeE4m3WithNan>(w, from, count, factors, apart, n, first, width, out, out_stride);
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

void product(const Matrix& w, int64_t from, int64_t to, const float* x, int64_t stride, int64_t n, float* out,
             int64_t out_stride, const float* added) {
  const auto put = [&](int64_t row, int64_t token, float value) {
    const int64_t at = token * out_stride + row - from;
    out[at] = added == nullptr ? value : added[at] + value;
  };
  const auto run = [&](auto decoder) { products<decltype(decoder)>(w, from, to, x, stride, n, put); };
  if (w.fours())
    with_fours(w.type, run);
  else
    with_decoder(w.type, run);
}

void weighted_rows(const Matrix& w, int64_t from, int64_t count, const float* factors, int64_t apart, int64_t n, int64_t first,
                   int64_t width, float* out, int64_t out_stride) {
  with_decoder(w.type, [&](auto decoder) {
    sums_of_rows<decltype(decoder)>(w, from, count, factors, apart, n, first, width, out, out_stride);
  });
}
