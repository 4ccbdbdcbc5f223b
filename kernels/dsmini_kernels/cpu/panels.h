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

// Kinds of words: FP32 numbers, BF16 numbers that become FP32 in registers, pairs of BF16 numbers in rows and panel, and
// such pairs in the panel alone, for rows of FP32 numbers.
enum WordKind : int { FP32_WORDS, WIDENED_WORDS, BF16_WORDS, KEY_PAIRS };
// out[ROWS_AT_ONCE][vectors * LANES] = four rows times the tokens of a panel of k numbers; rows are asked for `ahead` bytes
// further on. In panels.cpp, as copies of it take long to compile.
void multiply_panel(WordKind kind, const char* const* rows, const float* panel, int64_t vectors, int64_t k, int64_t ahead,
                    float* out);
// Converts a row of a weight of another type into `out`.
void convert_row(WordKind kind, const Matrix& w, int64_t row, char* out);

namespace {

constexpr int MOST_VECTORS = BYTES == 64 ? 6 : 3;  // of a panel: sums and operands stay in registers
constexpr int ROWS_AT_ONCE = 4;                    // of a weight

// How rows and panels lie: numbers of a word, bytes of a number in a row, and the type of such a weight.
struct Fp32Words {
  static constexpr WordKind KIND = FP32_WORDS;
  static constexpr int64_t NUMBERS = 1, SIZE = 4;
  static constexpr WeightType TYPE = WEIGHT_FP32;
};
struct WidenedWords {
  static constexpr WordKind KIND = WIDENED_WORDS;
  static constexpr int64_t NUMBERS = 1, SIZE = 2;
  static constexpr WeightType TYPE = WEIGHT_BF16;
};
#if BF16_UNITS
// For CPUs that multiply pairs of BF16 numbers, with sums in FP32. They take subnormal numbers as zeros.
struct Bf16Words {
  static constexpr WordKind KIND = BF16_WORDS;
  static constexpr int64_t NUMBERS = 2, SIZE = 2;
  static constexpr WeightType TYPE = WEIGHT_BF16;
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

inline int64_t converted(int64_t columns) { return round_up(columns, UNIT); }  // numbers of memory for a row

// A row of a weight as a product reads it: where it lies, or converted into `memory`.
template <class Words>
const char* get_row(const Matrix& w, int64_t row, float* memory) {
  if (w.type == Words::TYPE) return w.row(row);
  convert_row(Words::KIND, w, row, reinterpret_cast<char*>(memory));
  return reinterpret_cast<const char*>(memory);
}

template <class Words>
void multiply(const char* const* rows, const float* panel, int64_t vectors, int64_t k, int64_t ahead, float* out) {
  multiply_panel(Words::KIND, rows, panel, vectors, k, ahead, out);
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
