// Products of rows of a weight with panels of tokens: for tens of rows of x and more, where a weight's row in registers
// serves many tokens.
//
// A panel holds up to MOST_VECTORS vectors of tokens, transposed: [words of the sum][tokens]. A word is an FP32 number,
// or two BF16 numbers of one token for CPUs that multiply those. A weight is read where it lies, a word at a time, which
// is multiplied with all tokens of the panel. So nothing of a weight is packed or copied, but for rows of another type,
// which are converted a strip at a time. The result comes out transposed: [rows of the weight][tokens]. In this form the
// hidden numbers of a feed-forward are the panel of its second product.

#pragma once

#include "dots.h"

namespace {

constexpr int MOST_VECTORS = BYTES == 64 ? 6 : 3;  // of a panel: sums and operands stay in registers
constexpr int ROWS_AT_ONCE = 4;                    // of a weight

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

// How rows and panels lie: NUMBERS of a word, bytes of a number in a row, and `tile`. out = the words of each row times the
// tokens of a panel. One word at a time: of the 16 registers of AVX2 none is left for a second one.
template <class Words>
struct OneNumber {
  static constexpr int64_t NUMBERS = 1;
  template <int V>
  static void tile(const char* const* rows, const float* panel, int64_t k, int64_t ahead, float* out) {
    constexpr int P = PARTS<V>;
    Sums<V> sums;
    const auto add = [&](int64_t i, F(&into)[ROWS_AT_ONCE][V]) __attribute__((always_inline)) {
      F tokens[V];
      UNROLL for (int v = 0; v < V; ++v) tokens[v] = in_register(load<F>(panel + (i * V + v) * LANES));
      UNROLL for (int r = 0; r < ROWS_AT_ONCE; ++r) {
        const F w = Words::number(rows[r] + i * Words::SIZE);
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
struct Fp32Words : OneNumber<Fp32Words> {
  static constexpr int64_t SIZE = 4;
  static constexpr WeightType TYPE = WEIGHT_FP32;
  static F number(const char* p) { return splat(load<float>(p)); }
};
// Rows in BF16, whose numbers become FP32 in registers: both halves of a word hold one, and a shift empties the lower.
struct WidenedWords : OneNumber<WidenedWords> {
  static constexpr int64_t SIZE = 2;
  static constexpr WeightType TYPE = WEIGHT_BF16;
  static F number(const char* p) {
    typedef uint16_t S __attribute__((vector_size(BYTES)));
    return (F)((I)(S{} + load<uint16_t>(p)) << 16);
  }
};

#if BF16_UNITS
// Pairs of BF16 numbers, which the CPU multiplies, with sums in FP32. It takes subnormal numbers as zeros.
struct Bf16Words {
  static constexpr int64_t NUMBERS = 2, SIZE = 2;
  static constexpr WeightType TYPE = WEIGHT_BF16;
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

// Calls body(Words) for rows of x in BF16 or FP32, and a weight of a type or, if there are several, FP32.
template <class Body>
void with_words([[maybe_unused]] bool bf16, int64_t type, Body body) {
#if BF16_UNITS
  if (bf16 && __builtin_cpu_supports("avx512bf16")) return body(Bf16Words());
#endif
  if (type == WEIGHT_BF16) return body(WidenedWords());
  body(Fp32Words());
}

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

inline int64_t converted(int64_t columns) { return round_up(columns, UNIT); }  // numbers of memory for a row

// A row of a weight as a tile reads it: where it lies, or converted into `memory`.
template <class Words>
const char* get_row(const Matrix& w, int64_t row, float* memory) {
  if (w.type == Words::TYPE) return w.row(row);
  char* out = reinterpret_cast<char*>(memory);
#if BF16_UNITS
  if constexpr (std::is_same_v<Words, Bf16Words>)
    if (w.codes() && bf16_of_codes(w, row, out)) return out;
#endif
  const auto put = [&](F v, int64_t i) {
    if constexpr (Words::SIZE == 4)
      store(out + 4 * i, v);
    else
      store(out + 2 * i, Bf16::put(v != v ? (F)splat(QUIET_NAN) : v, false));
  };
  const auto convert = [&](auto decoder, auto scale_at) {
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
    convert(DecodeE4m3WithNan(), [&](int64_t i) { return splat(scales[i / BLOCK] * 0x1p8f); });
  } else if (w.type == WEIGHT_BF16) {
    convert(DecodeBf16(), plain);
  } else {
    convert(DecodeFp32(), plain);
  }
  return out;
}

// out[ROWS_AT_ONCE][vectors * LANES] = four rows times the tokens of a panel.
template <class Words>
void multiply(const char* const* rows, const float* panel, int64_t vectors, int64_t k, int64_t ahead, float* out) {
  const auto run = [&](auto count) { Words::template tile<decltype(count)::value>(rows, panel, k, ahead, out); };
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

template <class Words>
int64_t words_of(int64_t numbers) {
  return divide_up(numbers, Words::NUMBERS);
}

// Fills a panel with the rows of `count` tokens of x, which row_of(token) finds. Zeros follow the last token.
template <class Words, class RowOf>
void pack(bool bf16, int64_t columns, int64_t count, int64_t vectors, RowOf row_of, float* panel) {
  const int64_t size = bf16 ? 2 : 4, row_bytes = columns * size, width = vectors * LANES;
  for (int64_t v = 0; v < vectors; ++v)
    for (int64_t at = 0; at < row_bytes; at += BYTES) {
      F words[LANES];
      UNROLL for (int t = 0; t < LANES; ++t) {
        const int64_t token = v * LANES + t, left = row_bytes - at;
        words[t] = F{};
        if (token >= count) continue;
        if (left >= BYTES)
          words[t] = load<F>(row_of(token) + at);
        else
          memcpy(&words[t], row_of(token) + at, left);
      }
      transpose(words);
      const int64_t numbers = least(BYTES, row_bytes - at) / size, first = at / size;
      const auto put = [&](int64_t word, F x) { store(panel + word * width + v * LANES, x); };
      if constexpr (Words::NUMBERS == 2) {
        for (int64_t i = 0; 2 * i < numbers; ++i) put(first / 2 + i, words[i]);
      } else if (bf16) {
        for (int64_t i = 0; i < numbers; ++i)
          put(first + i, i % 2 ? (F)((I)words[i / 2] & HIGH_HALF) : (F)((I)words[i / 2] << 16));
      } else {
        for (int64_t i = 0; i < numbers; ++i) put(first + i, words[i]);
      }
    }
}

// Two BF16 numbers as a word: those of a in the low halves.
inline U word_of(F a, F b) {
  a = a != a ? (F)splat(QUIET_NAN) : a, b = b != b ? (F)splat(QUIET_NAN) : b;
  return (Bf16::rounded(a, false) >> 16) | (Bf16::rounded(b, false) & uint32_t(HIGH_HALF));
}

// `count` rows, row_of(0) and on, times a panel: out[count][vectors * LANES].
template <class Words, class RowOf>
void strip(RowOf row_of, int64_t count, const float* panel, int64_t vectors, int64_t k, int64_t ahead, float* out) {
  for (int64_t r = 0; r < count; r += ROWS_AT_ONCE) {
    const char* rows[ROWS_AT_ONCE] = {row_of(r), row_of(r + 1), row_of(r + 2), row_of(r + 3)};
    multiply<Words>(rows, panel, vectors, k, ahead, out + r * vectors * LANES);
  }
}

// Columns v * LANES and on of the result of LANES rows, transposed: LANES tokens by LANES rows.
inline void turn(const float* out, int64_t vectors, int64_t v, F (&block)[LANES]) {
  for (int64_t r = 0; r < LANES; ++r) block[r] = load<F>(out + (r * vectors + v) * LANES);
  transpose(block);
}

// How `count` tokens are cut into panels of about one size.
struct Cut {
  int64_t panels, tokens;  // of each panel but the last
  explicit Cut(int64_t count)
      : panels(divide_up(count, MOST_VECTORS * LANES)), tokens(panels ? round_up(divide_up(count, panels), LANES) : 0) {}
};

}  // namespace
