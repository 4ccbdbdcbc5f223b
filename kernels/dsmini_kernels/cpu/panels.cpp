// Products of rows of a weight with panels of tokens, and rows converted for them.

#include "panels.h"

namespace {

// Sums of a tile: with a single vector of tokens, even and odd words have their own, so that one addition need not wait
// for the other.
template <int V>
constexpr int PARTS = V == 1 ? 2 : 1;
template <int V>
struct Sums {
  F of[PARTS<V>][ROWS_AT_ONCE][V] = {};
  void put(float* out) const {
    UNROLL for (int r = 0; r < ROWS_AT_ONCE; ++r)
      UNROLL for (int v = 0; v < V; ++v) {
        F all = of[0][r][v];
        if (PARTS<V> == 2) all += of[PARTS<V> - 1][r][v];
        store(out + (r * V + v) * LANES, all);
      }
  }
};

// out = the words of each row, of one number, times the tokens of a panel. One word at a time: of the 16 registers of AVX2
// none is left for a second one.
F number(const char* p, Fp32Words) { return splat(load<float>(p)); }
// Both halves of a word hold the number, and a shift empties the lower one.
F number(const char* p, WidenedWords) {
  typedef uint16_t S __attribute__((vector_size(BYTES)));
  return (F)((I)(S{} + load<uint16_t>(p)) << 16);
}
template <class Words>
struct OneNumber {
  template <int V>
  static void tile(const char* const* rows, const float* panel, int64_t k, int64_t ahead, float* out) {
    constexpr int P = PARTS<V>;
    Sums<V> sums;
    const auto add = [&](int64_t i, F(&into)[ROWS_AT_ONCE][V]) __attribute__((always_inline)) {
      F tokens[V];
      UNROLL for (int v = 0; v < V; ++v) tokens[v] = in_register(load<F>(panel + (i * V + v) * LANES));
      UNROLL for (int r = 0; r < ROWS_AT_ONCE; ++r) {
        const F w = number(rows[r] + i * Words::SIZE, Words());
        UNROLL for (int v = 0; v < V; ++v) into[r][v] += w * tokens[v];
      }
    };
    for (int64_t i = 0; i < k;) {
      for (int r = 0; r < ROWS_AT_ONCE; ++r) __builtin_prefetch(rows[r] + i * Words::SIZE + ahead);
      const int64_t end = least(k, i + 64 / Words::SIZE);
      for (; i + P <= end; i += P) UNROLL for (int p = 0; p < P; ++p) add(i + p, sums.of[p]);
      if (P > 1 && i < end) add(i++, sums.of[0]);
    }
    sums.put(out);
  }
};
// FP32 rows times pairs of BF16 numbers.
struct MixedNumbers {
  template <int V>
  static void tile(const char* const* rows, const float* panel, int64_t k, int64_t, float* out) {
    Sums<V> sums;
    const auto add = [&](int64_t number, F(&into)[ROWS_AT_ONCE][V], auto number_of) {
      F keys[V];
      UNROLL for (int v = 0; v < V; ++v) keys[v] = number_of(load<I>(panel + (number / 2 * V + v) * LANES));
      UNROLL for (int r = 0; r < ROWS_AT_ONCE; ++r) {
        const F q = splat(load<float>(rows[r] + number * 4));
        UNROLL for (int v = 0; v < V; ++v) into[r][v] += q * keys[v];
      }
    };
    for (int64_t i = 0; i + 2 <= k; i += 2) {
      add(i, sums.of[0], [](I both) { return (F)(both << 16); });
      add(i + 1, sums.of[PARTS<V> - 1], [](I both) { return (F)(both & HIGH_HALF); });
    }
    sums.put(out);
  }
};

#if BF16_UNITS
// The same of pairs.
struct TwoNumbers {
  template <int V, class Word>
  __attribute__((target("avx512bf16"), always_inline)) static inline void add(const char* const* rows, const float* panel,
                                                                              int64_t i, F (&into)[ROWS_AT_ONCE][V], Word) {
    __m512bh tokens[V];
    UNROLL for (int v = 0; v < V; ++v) tokens[v] = (__m512bh)_mm512_loadu_si512(panel + (i * V + v) * LANES);
    UNROLL for (int r = 0; r < ROWS_AT_ONCE; ++r) {
      const __m512bh w = (__m512bh)_mm512_set1_epi32(load<Word>(rows[r] + i * 4));
      UNROLL for (int v = 0; v < V; ++v) into[r][v] = (F)_mm512_dpbf16_ps((__m512)into[r][v], w, tokens[v]);
    }
  }
  template <int V>
  __attribute__((target("avx512bf16"))) static void tile(const char* const* given, const float* panel, int64_t k,
                                                         int64_t ahead, float* out) {
    Sums<V> sums;
    const char* rows[ROWS_AT_ONCE] = {given[0], given[1], given[2], given[3]};
    int64_t i = 0;
    for (; 2 * i + 4 <= k; i += 2) {
      if (i % 16 == 0)
        for (const char* row : rows) __builtin_prefetch(row + i * 4 + ahead);
      add<V>(rows, panel, i, sums.of[0], int32_t()), add<V>(rows, panel, i + 1, sums.of[PARTS<V> - 1], int32_t());
    }
    for (; 2 * i + 2 <= k; ++i) add<V>(rows, panel, i, sums.of[0], int32_t());
    if (2 * i < k) add<V>(rows, panel, i, sums.of[0], uint16_t());
    sums.put(out);
  }
};
#endif

#if BF16_UNITS
// Writes a row of E4M3 codes as BF16. False if a code is NaN.
__attribute__((target("avx512bf16"))) inline bool bf16_of_codes(const Matrix& w, int64_t row, char* out) {
  const char* p = w.row(row);
  const float* scales = w.scales_of(row);
  Watch<DecodeE4m3> watch;
  for (int64_t i = 0; i < w.columns; i += UNIT) {
    char rest[UNIT] = {};
    const char* from = p + i;
    if (i + UNIT > w.columns) memcpy(rest, from, w.columns - i), from = rest;
    F v[2];
    watch.see(from);
    DecodeE4m3::get(from, v);
    const F scale = splat(scales[i / BLOCK] * UP), up = splat(UP);
    store(out + 2 * i, (__m512i)_mm512_cvtne2ps_pbh((__m512)(v[1] * scale * up), (__m512)(v[0] * scale * up)));
  }
  return !watch.nan();
}
#endif

template <class Words>
void convert(const Matrix& w, int64_t row, char* out) {
  const auto put = [&](F v, int64_t i) {
    if constexpr (Words::SIZE == 4)
      store(out + 4 * i, v);
    else
      store(out + 2 * i, Bf16::put(v != v ? (F)splat(QUIET_NAN) : v, false));
  };
  if (w.fours()) {
    for (int64_t at = 0; at < w.columns; at += FOUR_BLOCK) {
      const F scale = splat(power_of_two(w.exponents_of(row)[at / FOUR_BLOCK]));
      each_of_fours(w.row(row) + at / 2, least(FOUR_BLOCK, w.columns - at), scale, [&](F v, int64_t i) { put(v, at + i); });
    }
    return;
  }
#if BF16_UNITS
  if constexpr (std::is_same_v<Words, Bf16Words>)
    if (w.codes() && bf16_of_codes(w, row, out)) return;
#endif
  const auto along = [&](auto decoder, auto scale_at) {
    using Decoder = decltype(decoder);
    Watch<Decoder> nothing;
    along_units<Decoder>(w.row(row), w.columns, nothing, [&](int64_t i, const F(&v)[2]) {
      F both[2] = {v[0], v[1]};
      if constexpr (Decoder::EVEN_ODD) interleave(v[0], v[1], both);
      put(both[0] * scale_at(i), i), put(both[1] * scale_at(i), i + LANES);
    });
  };
  const auto plain = [](int64_t) { return splat(1.0f); };
  if (w.codes()) {
    const float* scales = w.scales_of(row);
    along(DecodeE4m3WithNan(), [&](int64_t i) { return splat(scales[i / BLOCK] * 0x1p8f); });
  } else if (w.type == WEIGHT_BF16) {
    along(DecodeBf16(), plain);
  } else {
    along(DecodeFp32(), plain);
  }
}

template <class Tile>
void multiply_by(const char* const* rows, const float* panel, int64_t vectors, int64_t k, int64_t ahead, float* out) {
  const auto run = [&](auto count) { Tile::template tile<decltype(count)::value>(rows, panel, k, ahead, out); };
  switch (vectors) {
    case 1: return run(Constant<1>());
    case 2: return run(Constant<2>());
#if BYTES == 64
    case 4: return run(Constant<4>());
    case 5: return run(Constant<5>());
    case 6: return run(Constant<6>());
#endif
    default: return run(Constant<3>());
  }
}

}  // namespace

void multiply_panel(WordKind kind, const char* const* rows, const float* panel, int64_t vectors, int64_t k, int64_t ahead,
                    float* out) {
#if BF16_UNITS
  if (kind == BF16_WORDS) return multiply_by<TwoNumbers>(rows, panel, vectors, k, ahead, out);
#endif
  if (kind == KEY_PAIRS) return multiply_by<MixedNumbers>(rows, panel, vectors, k, ahead, out);
  if (kind == WIDENED_WORDS) return multiply_by<OneNumber<WidenedWords>>(rows, panel, vectors, k, ahead, out);
  multiply_by<OneNumber<Fp32Words>>(rows, panel, vectors, k, ahead, out);
}

void convert_row(WordKind kind, const Matrix& w, int64_t row, char* out) {
#if BF16_UNITS
  if (kind == BF16_WORDS) return convert<Bf16Words>(w, row, out);
#endif
  if (kind == WIDENED_WORDS) return convert<WidenedWords>(w, row, out);
  convert<Fp32Words>(w, row, out);
}
