// Decoders of weights, the order that products want of x, products and sums of rows. Weights are decoded in registers.
//
// A weight's numbers come in units of two vectors. BF16 gives first the even and then the odd numbers of a unit,
// because a shift and a mask of the same 32 bits make FP32 numbers of both; products with E4M3 take every fourth number
// four times, for the same reason. x is put in the same order beforehand (`arrange`). Sums have one order, whatever the thread: that of the loops below.

#pragma once

#include "lanes.h"
#include "matrix.h"

#include <cmath>
#include <type_traits>

// Rows [from, to) of a weight times `n` rows of x (arranged, `stride` numbers apart): out[n * out_stride + row - from], or
// the same added to `added`, which lies as out does. In products.cpp: each copy of the products takes long to compile.
void product(const Matrix& w, int64_t from, int64_t to, const float* x, int64_t stride, int64_t n, float* out,
             int64_t out_stride, const float* added = nullptr);

namespace {

template <int N>
using Constant = std::integral_constant<int, N>;

constexpr int64_t UNIT = 2 * LANES, UNITS_OF_X = 2 * UNIT;
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
// Numbers of a row of x in the order of a weight: zeros follow the last, then what products must be multiplied by.
constexpr int64_t FOURS = 2 * BYTES;  // codes of four bits in a vector
inline int64_t padded(int64_t columns) { return round_up(columns, FOURS) + LANES; }

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

inline uint16_t rounded_bf16(float x) {  // to nearest even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return x != x ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// A scale in UE8M0. 255 is NaN.
inline float power_of_two(uint8_t exponent) {
  const int32_t bits = exponent == 0 ? 0x00400000 : exponent == 255 ? QUIET_NAN : int32_t{exponent} << 23;
  return load<float>(&bits);
}
// Calls put(vector, place) along n numbers in E2M1, each times `scale`. Vectors come in pairs; zeros follow the last number.
template <class Put>
inline void each_of_fours(const char* codes, int64_t n, F scale, Put put) {
  const auto number = [&](I code) { return (F)(((code & 7) << 22) | ((code & 8) << 28)) * splat(0x1p126f) * scale; };
  for (int64_t i = 0; i < n; i += UNIT) {
    B some{};
    if (n - i >= UNIT) some = load<B>(codes + i / 2);
    else memcpy(&some, codes + i / 2, (n - i + 1) / 2);
    const I both = widen(some);
    F numbers[2];
    interleave(number(both & 15), number(both >> 4), numbers);
    put(numbers[0], i), put(numbers[1], i + LANES);
  }
}

// E2M1 numbers as BF16. A shuffle of 32 numbers looks at five bits.
alignas(64) constexpr uint16_t BF16_OF_E2M1[] = {
    0, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0,
    0, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0};
// FOURS codes in E2M1 at a time, looked up as FP32 numbers. Four lanes of all vectors have the numbers that share a scale.
struct DecodeE2m1 {
  static constexpr bool SCALED = true;
  using Number = float;
  static float rounded(float x) { return x; }
  // The place of the number i among those of the vectors.
  static constexpr int64_t place(int64_t i) {
#if BYTES == 32
    return (i % 2 * 4 + i / 16 % 2 * 2 + i / 2 % 2) * LANES + i / 32 * 4 + i % 16 / 4;
#else
    return i % 8 * LANES + i / 8;
#endif
  }
  struct Numbers {
    F of[8];
  };
  static void get(const char* p, Numbers& v) {
#if BYTES == 64
    const I codes = load<I>(p);
    const __m512 table = (__m512)Bf16::get(BF16_OF_E2M1);
    UNROLL for (int k = 0; k < 8; ++k) v.of[k] = (F)_mm512_permutexvar_ps((__m512i)((U)codes >> 4 * k), table);
#elif BYTES == 32
    // one table for the low bytes of BF16 numbers, and one for the high ones
    const __m128i first = load<__m128i>(BF16_OF_E2M1), second = load<__m128i>(BF16_OF_E2M1 + 8), byte = _mm_set1_epi16(0xFF);
    const __m256i low = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte)));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8)));
    const __m256i codes = load<__m256i>(p), four = _mm256_set1_epi8(15);
    UNROLL for (int k = 0; k < 8; k += 4) {
      const __m256i some = _mm256_and_si256(k ? _mm256_srli_epi16(codes, 4) : codes, four);
      const __m256i lows = _mm256_shuffle_epi8(low, some), highs = _mm256_shuffle_epi8(high, some);
      const I a = (I)_mm256_unpacklo_epi8(lows, highs), b = (I)_mm256_unpackhi_epi8(lows, highs);
      v.of[k] = (F)(a << 16), v.of[k + 1] = (F)(a & HIGH_HALF), v.of[k + 2] = (F)(b << 16), v.of[k + 3] = (F)(b & HIGH_HALF);
    }
#else
    const I codes = load<I>(p);
    for (int k = 0; k < 8; ++k)
      v.of[k] = (F)((((codes >> 4 * k) & 7) << 22) | (((codes >> 4 * k) & 8) << 28)) * splat(0x1p126f);
#endif
  }
  static F multiply(const Numbers& v, const float* x) {
    F sum = v.of[0] * load<F>(x);
    UNROLL for (int k = 1; k < 8; ++k) sum += v.of[k] * load<F>(x + k * LANES);
    return sum;
  }
};
// The scales of FOURS numbers, each in four lanes. Infinity stands for NaN.
inline F powers_of_two(const char* exponents) {
#if BYTES == 16
  const I exponent = splat(int32_t{uint8_t(*exponents)});
#else
  std::conditional_t<BYTES == 64, int32_t, int16_t> some;
  memcpy(&some, exponents, sizeof some);
  const __m128i fourfold = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m128i spread = _mm_shuffle_epi8(_mm_cvtsi32_si128(some), fourfold);
  const I exponent = widen(load<B>(&spread));
#endif
  return (F)larger(exponent << 23, splat(0x00400000));
}

#if BF16_UNITS
// The same as BF16 numbers, whose products with pairs of x are sums of FP32. The instruction has a name here, so that code for
// CPUs without it can have it in its templates.
struct PairedE2m1 : DecodeE2m1 {
  using Number = uint16_t;
  static uint16_t rounded(float x) { return rounded_bf16(x); }
  static constexpr int64_t place(int64_t i) { return i % 4 * 32 + i / 4; }
  struct Numbers {
    I of[4];
  };
  static void get(const char* p, Numbers& v) {
    const __m512i codes = load<__m512i>(p), table = load<__m512i>(BF16_OF_E2M1);
    UNROLL for (int k = 0; k < 4; ++k) v.of[k] = (I)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * k), table);
  }
  static F multiply(const Numbers& v, const uint16_t* x) {
    F sum{};
    UNROLL for (int k = 0; k < 4; ++k) asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(v.of[k]), "vm"(load<I>(x + 32 * k)));
    return sum;
  }
};

// E4M3 numbers as BF16, looked up by their code without the sign, NaN too: 64 codes at a time, in pairs with those of x in
// BF16, for CPUs that multiply those. A dot product alone reads them so.
struct PairedE4m3 : DecodeE4m3 {
  static constexpr int64_t CODES = 64;
};

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

// The same for codes of four bits.
template <class Body>
inline void with_fours([[maybe_unused]] int64_t type, Body body) {
#if BF16_UNITS
  if (type == WEIGHT_E2M1_BF16 && multiplies_pairs()) return body(PairedE2m1());
#endif
  body(DecodeE2m1());
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

// Copies x in the order of codes of four bits. Zeros follow.
template <class W>
inline void arrange_fours(const float* x, int64_t columns, float* out) {
  auto* to = reinterpret_cast<typename W::Number*>(out);
  const int64_t all = round_up(columns, FOURS);
  if (all > columns) memset(to + all - FOURS, 0, FOURS * sizeof *to);
  for (int64_t i = 0; i < columns; ++i) to[i / FOURS * FOURS + W::place(i % FOURS)] = W::rounded(x[i]);
}

// Copies x in the order of a weight of that type: padded(columns) numbers.
inline void arrange(const float* x, int64_t columns, int64_t type, float* out) {
  float* last = out + round_up(columns, UNITS_OF_X);
  *last = 1.0f;
  if (type >= WEIGHT_E2M1) return with_fours(type, [&](auto decoder) { arrange_fours<decltype(decoder)>(x, columns, out); });
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

// Rows of a weight that are an item of a team: long stretches come from memory fastest, but each thread should find four.
constexpr int64_t LEAST_ROWS = 32, MOST_ROWS = 128;
inline int64_t rows_of_item(int64_t rows, int64_t threads) {
  const int64_t wanted = rows / (4 * threads) / LEAST_ROWS * LEAST_ROWS;
  return wanted < LEAST_ROWS ? LEAST_ROWS : least(wanted, MOST_ROWS);
}

constexpr int UNITS = 4;
constexpr int64_t WIDEST = UNITS * UNIT;  // numbers of a strip of weighted_rows

}  // namespace

// The sums over rows [from, from + count) of factor * row, for columns [first, first + width), of n tokens: factors and sums
// of a token are so many numbers after those of the one before. `first` is a multiple of WIDEST, and `out` has room for
// round_up(width, WIDEST) numbers of a token. Each row comes from memory once.
void weighted_rows(const Matrix& w, int64_t from, int64_t count, const float* factors, int64_t apart, int64_t n, int64_t first,
                   int64_t width, float* out, int64_t out_stride);
