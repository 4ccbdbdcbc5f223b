// Vectors of BYTES bytes, the numbers of a format, and the types of inputs and outputs: of the instruction set that the
// library is compiled for.

#pragma once

#include "tiles.h"

#include <cstdlib>
#include <cstring>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define X86 1
#endif

// 1 where the compiler can write for AVX-512's products of BF16 numbers. The CPU is asked at run time.
#if BYTES == 64 && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#define BF16_UNITS 1
#else
#define BF16_UNITS 0
#endif
#define UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int LANES = BYTES / 4;
typedef float F __attribute__((vector_size(BYTES)));
typedef int32_t I __attribute__((vector_size(BYTES)));
typedef uint32_t U __attribute__((vector_size(BYTES)));
typedef uint16_t H __attribute__((vector_size(BYTES / 2)));
typedef uint8_t B __attribute__((vector_size(BYTES / 4)));

constexpr int32_t SIGN = INT32_MIN, MAGNITUDE = INT32_MAX, EXPONENT = 0x7F800000, QUIET_NAN = 0x7FC00000;
constexpr int32_t HIGH_HALF = ~0xFFFF;

template <class V>
V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
void store(void* p, V v) {
  memcpy(p, &v, sizeof v);
}
// A vector that several products use. Compilers would read it from memory again for each, and such reads are the limit.
inline F in_register(F v) {
#ifdef X86
  asm("" : "+v"(v));
#endif
  return v;
}
// a * b as an FP32 number. A compiler may fuse a product and the difference that follows, whose result is then far from 0
// for two large numbers that are equal once they are rounded.
inline F rounded_product(F a, F b) {
  F v = a * b;
#ifdef X86
  asm("" : "+v"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}
// The first n numbers, a vector at most; zeros follow.
inline F load_some(const float* p, int64_t n) {
  if (n >= LANES) return load<F>(p);
  F v{};
  memcpy(&v, p, n * 4);
  return v;
}
inline void store_some(float* p, F v, int64_t n) {
  if (n >= LANES) return store(p, v);
  memcpy(p, &v, n * 4);
}
// A store, or one past the cache, for which p must be a multiple of the vector's size.
template <class V>
inline void emit(void* p, V v, bool past) {
#ifdef X86
  if constexpr (sizeof v >= 16) {
    if (past) {
#if BYTES == 64
      if constexpr (sizeof v == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#endif
#if BYTES >= 32
      if constexpr (sizeof v == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
      if constexpr (sizeof v == 16) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
    }
  }
#endif
  store(p, v);
}
inline I splat(int32_t x) { return I{} + x; }
inline F splat(float x) { return (F)splat(load<int32_t>(&x)); }
template <class V>
V larger(V a, V b) {
  return a > b ? a : b;
}

// Functions that compilers translate poorly from plain vectors: short integers to and from int32, and the smaller of
// two floats, which is b if there is a NaN.
#if BYTES == 64
using Vector = __m512i;
inline I widen(H x) { return (I)_mm512_cvtepu16_epi32((__m256i)x); }
inline I widen(B x) { return (I)_mm512_cvtepu8_epi32((__m128i)x); }
inline H narrow(I x, uint16_t) { return (H)_mm512_cvtepi32_epi16((__m512i)x); }
inline B narrow(I x, uint8_t) { return (B)_mm512_cvtepi32_epi8((__m512i)x); }
inline F smaller(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
#elif BYTES == 32
using Vector = __m256i;
inline I widen(H x) { return (I)_mm256_cvtepu16_epi32((__m128i)x); }
inline I widen(B x) { return (I)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(load<int64_t>(&x))); }
inline __m128i half_width(I x) {
  return _mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
}
inline H narrow(I x, uint16_t) { return (H)half_width(x & 0xFFFF); }
inline B narrow(I x, uint8_t) {
  const __m128i words = half_width(x & 0xFF), bytes = _mm_packus_epi16(words, words);
  return load<B>(&bytes);
}
inline F smaller(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline I widen(H x) { return __builtin_convertvector(x, I); }
inline I widen(B x) { return __builtin_convertvector(x, I); }
inline H narrow(I x, uint16_t) { return __builtin_convertvector(x, H); }
inline B narrow(I x, uint8_t) { return __builtin_convertvector(x, B); }
inline F smaller(F a, F b) { return a < b ? a : b; }
#endif
inline I widen_signed(const void* p) {  // of bytes
#if BYTES == 64
  return (I)_mm512_cvtepi8_epi32(load<__m128i>(p));
#elif BYTES == 32
  return (I)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load<int64_t>(p)));
#else
  typedef int8_t S __attribute__((vector_size(BYTES / 4)));
  return __builtin_convertvector(load<S>(p), I);
#endif
}
// a0 b0 a1 b1 ..., in two vectors.
inline void interleave(F a, F b, F* out) {
#if BYTES == 64
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  out[0] = (F)_mm512_permutex2var_ps((__m512)a, low, (__m512)b);
  out[1] = (F)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), (__m512)b);
#elif BYTES == 32
  const __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b), high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  out[0] = (F)_mm256_permute2f128_ps(low, high, 0x20), out[1] = (F)_mm256_permute2f128_ps(low, high, 0x31);
#else
  out[0] = F{a[0], b[0], a[1], b[1]}, out[1] = F{a[2], b[2], a[3], b[3]};
#endif
}

// Turns rows into columns. Each time a row is interleaved with the one half the rows further on, two bits of the place
// move: after as many times as LANES has bits, rows are columns.
inline void transpose(F (&rows)[LANES]) {
  F mixed[LANES];
  UNROLL for (int bit = 1; bit < LANES; bit *= 2) {
    UNROLL for (int r = 0; r < LANES / 2; ++r) interleave(rows[r], rows[r + LANES / 2], mixed + 2 * r);
    UNROLL for (int r = 0; r < LANES; ++r) rows[r] = mixed[r];
  }
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Constants of a format, one for each lane.
struct Grid {
  F max;
  I lowest, up;  // exponent bits of the smallest normal number; distance from an exponent to that of `magic`
  int drop, sign;
  I nan;
  explicit Grid(const Format& f)
      : max(splat(f.max)),
        lowest(splat((128 - f.bias) << 23)),
        up(splat((23 - f.fraction_bits) << 23)),
        drop(23 - f.fraction_bits),
        sign(32 - f.bits),
        nan(splat(f.nan)) {}
  I magic(F magnitude) const {  // negative for NaN
    return (I)((U)larger((I)magnitude & EXPONENT, lowest) + (U)up);
  }
  F limit(F y) const { return smaller((F)((I)y & MAGNITUDE), max); }  // max for NaN
  I code(F magnitude) const {
    const I m = magic(magnitude);
    return ((m - up - lowest) >> drop) + ((I)(magnitude + (F)m) - m);
  }
};

// Input and output types. `Bits` is the type in memory; without the sign, larger numbers have larger bits.
struct Fp32 {
  using Bits = uint32_t;
  static F get(const void* p) { return load<F>(p); }
  static F put(F x, bool) { return x; }
};
struct Bf16 {
  using Bits = uint16_t;
  static F get(const void* p) { return (F)(widen(load<H>(p)) << 16); }
  static H put(F x, bool exact) { return narrow((I)(rounded(x, exact) >> 16), Bits()); }
  // To nearest even, in the high halves. NaN must be QUIET_NAN, so that it does not wrap round to zero.
  static U rounded(F x, bool exact) { return exact ? (U)x : (U)x + (0x7FFF + (((U)x >> 16) & 1)); }
};
struct Fp16 {
  using Bits = uint16_t;
#if BYTES == 64
  static F get(const void* p) { return (F)_mm512_cvtph_ps(load<__m256i>(p)); }
  static H put(F x, bool) { return (H)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif BYTES == 32
  static F get(const void* p) { return (F)_mm256_cvtph_ps(load<__m128i>(p)); }
  static H put(F x, bool) { return (H)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
  static F get(const void* p) {
    const I half = widen(load<H>(p)), magnitude = half & 0x7FFF;
    const I bits = (I)((F)(magnitude << 13) * splat(0x1p112f));
    return (F)((magnitude >= 0x7C00 ? bits | EXPONENT : bits) | ((half & 0x8000) << 16));
  }
  static H put(F x, bool) {  // 65536 has the code of infinity
    const Grid grid({16, 10, 15, 65536.0f, 0x1p-24f, 0x7E00, 0x7C00, 0x7C00});
    const I code = x != x ? grid.nan : grid.code(grid.limit(x));
    return narrow(code | (((I)x >> 16) & 0x8000), Bits());
  }
#endif
};

// The first n numbers of a vector, from and to where they stay, in FP32 or BF16. Zeros follow in the vector.
inline F get(bool bf16, const char* x, int64_t n) {
  char some[4 * LANES] = {};
  if (n < LANES) memcpy(some, x, n * (bf16 ? 2 : 4)), x = some;
  return bf16 ? Bf16::get(x) : load<F>(x);
}
inline void put(bool bf16, F v, int64_t n, char* out) {
  if (!bf16) return store_some(reinterpret_cast<float*>(out), v, n);
  const H rounded = Bf16::put(v != v ? (F)splat(QUIET_NAN) : v, false);
  if (n == LANES) return store(out, rounded);
  memcpy(out, &rounded, 2 * n);
}

// An int32 holds two BF16 numbers, and a shift or a mask makes each an FP32 number. Scales of columns have the same
// order: of each PAIR of vectors first those of the even numbers, then those of the odd ones.
constexpr int PAIR = 2 * LANES;
template <class In, class Out>
constexpr bool PAIRS = false;
template <>
constexpr bool PAIRS<Bf16, Bf16> = true;

}  // namespace
