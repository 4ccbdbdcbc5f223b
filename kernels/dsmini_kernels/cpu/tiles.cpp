// Quantise, dequantise, and both at once, tile by tile. dsmini/numerics/tiles.py says what it computes, to the bit.
//
// One source for all instruction sets: it is compiled once for each, with WORK naming the entry and BYTES the width of
// a vector. Everything else has no linkage, so that no linker can pick an AVX-512 version for a machine without.
//
// Rounding to a format with m bits of fraction needs no branch. Added to a power of two that is 2^(23-m) times larger
// than y's own, y loses all bits but m, rounded to even by the addition itself; below the smallest normal number the
// power stays, as the steps of subnormal numbers do:
//
//     E     = max(exponent field of |y|, 128 - bias)
//     magic = the float with exponent field E + 23 - m
//     value = (|y| + magic) - magic
//     code  = ((E - (128 - bias)) << m) + (bits(|y| + magic) - bits(magic))
//
// Powers of two as scales divide exactly by multiplication; others need a division. -ffp-contract=off, no -ffast-math.

#include "tiles.h"

#include <cstdlib>
#include <cstring>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define X86 1
#endif

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

// What compilers make poorly of plain vectors: short integers to and from int32, and the smaller of two floats, which
// is b if there is a NaN.
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
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The numbers of a format that every lane needs.
struct Grid {
  F max;
  I lowest, up;  // exponent bits of the smallest normal number; what makes an exponent that of `magic`
  int drop, sign;
  I nan;
  explicit Grid(const Format& f)
      : max(splat(f.max)),
        lowest(splat((128 - f.bias) << 23)),
        up(splat((23 - f.fraction_bits) << 23)),
        drop(23 - f.fraction_bits),
        sign(32 - f.bits),
        nan(splat(f.nan)) {}
  I magic(F magnitude) const {  // of NaN something negative
    return (I)((U)larger((I)magnitude & EXPONENT, lowest) + (U)up);
  }
  F limit(F y) const { return smaller((F)((I)y & MAGNITUDE), max); }  // of NaN: max
  I code(F magnitude) const {
    const I m = magic(magnitude);
    return ((m - up - lowest) >> drop) + ((I)(magnitude + (F)m) - m);
  }
};

// Input and output types. `Bits` is what memory holds; without the sign, larger numbers have larger bits.
struct Fp32 {
  using Bits = uint32_t;
  static F get(const void* p) { return load<F>(p); }
  static F put(F x, bool) { return x; }
};
struct Bf16 {
  using Bits = uint16_t;
  static F get(const void* p) { return (F)(widen(load<H>(p)) << 16); }
  static H put(F x, bool exact) { return narrow((I)(rounded(x, exact) >> 16), Bits()); }
  // To nearest even, in the high halves. NaN must be as QUIET_NAN, not to wrap round to zero.
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

// Two BF16 numbers lie in an int32, and both are FP32 numbers there but for a shift or a mask. Scales of columns then
// lie in the same order: of each PAIR numbers first the even ones', then the odd ones'.
constexpr int PAIR = 2 * LANES;
template <class In, class Out>
constexpr bool PAIRS = false;
template <>
constexpr bool PAIRS<Bf16, Bf16> = true;

// --- First pass: magnitudes as integers, where NaN is above infinity and infinity above all numbers.

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

// Calls body(vector of magnitudes, place) for n numbers; what fills up the last vector is zero.
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

// Of each column over the rows. `high` has room for whole vectors.
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

// Of each tile of a row.
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

// --- Second pass: a row, with a scale for each tile, or SPREAD, for each column.

// Calls body(from, to, scale, factor, place in the row) for UNIT numbers of IN bytes each, which become OUT bytes each.
template <int IN, int OUT, int UNIT, bool SPREAD, class Body>
inline void along(const char* x, char* out, int64_t n, int64_t width, const float* scales, const float* factors,
                  Body body) {
  if (SPREAD) width = n;
  for (int64_t at = 0, t = 0; at < n; at += width, ++t) {
    F scale = splat(scales[t]), factor = splat(factors[t]);
    const int64_t end = least(at + width, n);
    int64_t i = at;
    for (; i + UNIT <= end; i += UNIT) {
      if (SPREAD) scale = load<F>(scales + i), factor = load<F>(factors + i);
      body(x + i * IN, out + i * OUT, scale, factor, i);
    }
    if (i < end) {
      if (SPREAD) scale = load<F>(scales + i), factor = load<F>(factors + i);
      char from[UNIT * IN] = {};
      alignas(64) char to[UNIT * OUT];
      memcpy(from, x + i * IN, (end - i) * IN);
      body(from, to, scale, factor, i);
      memcpy(out + i * OUT, to, (end - i) * OUT);
    }
  }
}

using Row = void (*)(const Plan&, const char* x, char* out, int64_t n, int64_t width, const float* scales,
                     const float* factors, bool past);

// How y comes from x. EXACT: scales are powers of two and normal, so that no y is beyond the format's largest number,
// and all values are BF16 numbers. Nothing is left to limit or to round, and what is not a number stays so by itself.
enum Scaling { DIVIDE, MULTIPLY, EXACT };

template <class In, class Out, Scaling SCALING, bool SPREAD>
void round_row(const Plan& plan, const char* x, char* out, int64_t n, int64_t width, const float* scales,
               const float* factors, bool past) {
  const Grid grid(plan.format);
  const bool tiny = plan.tiny;
  constexpr bool exact = SCALING == EXACT;
  const auto round = [&](F number, F scale, F factor) {
    const F y = SCALING == DIVIDE ? number / scale : number * factor;
    const F magnitude = exact ? (F)((I)y & MAGNITUDE) : grid.limit(y), magic = (F)grid.magic(magnitude);
    F value = ((magnitude + magic) - magic) * scale;  // of NaN in a tile of NaN: max * NaN
    if (!exact && tiny) value = y != y ? (F)splat(QUIET_NAN) : value;
    return (F)((I)value | ((I)y & SIGN));
  };
  constexpr int IN = sizeof(typename In::Bits), OUT = sizeof(typename Out::Bits);
  if constexpr (PAIRS<In, Out>) {
    const auto body = [&](const void* from, void* to, F scale, F factor, int64_t i) {
      const I both = load<I>(from);
      const F even = round((F)(both << 16), scale, factor);
      if (SPREAD) scale = load<F>(scales + i + LANES), factor = load<F>(factors + i + LANES);
      const F odd = round((F)(both & HIGH_HALF), scale, factor);
      emit(to, (Bf16::rounded(even, exact) >> 16) | (Bf16::rounded(odd, exact) & uint32_t(HIGH_HALF)), past);
    };
    along<IN, OUT, PAIR, SPREAD>(x, out, n, width, scales, factors, body);
  } else {
    const auto body = [&](const void* from, void* to, F scale, F factor, int64_t) {
      emit(to, Out::put(round(In::get(from), scale, factor), exact), past);
    };
    along<IN, OUT, LANES, SPREAD>(x, out, n, width, scales, factors, body);
  }
}

// CODE holds one code: uint8_t, or uint16_t before packing.
template <class In, class CODE, Scaling SCALING, bool SPREAD>
void encode_row(const Plan& plan, const char* x, char* out, int64_t n, int64_t width, const float* scales,
                const float* factors, bool past) {
  const Grid grid(plan.format);
  along<sizeof(typename In::Bits), sizeof(CODE), LANES, SPREAD>(
      x, out, n, width, scales, factors, [&](const void* from, void* to, F scale, F factor, int64_t) {
        const F number = In::get(from), y = SCALING == DIVIDE ? number / scale : number * factor;
        const I code = grid.code(grid.limit(y)) | (I)(((U)y & uint32_t(SIGN)) >> grid.sign);
        emit(to, narrow(y != y ? grid.nan : code, CODE()), past);
      });
}

template <class CODE, class Out, bool SPREAD>
void decode_row(const Plan& plan, const char* x, char* out, int64_t n, int64_t width, const float* scales,
                const float* factors, bool past) {
  typedef CODE C __attribute__((vector_size(LANES * sizeof(CODE))));
  const Format& f = plan.format;
  const Grid grid(f);
  const int32_t smallest = (128 - f.bias) << 23;
  along<sizeof(CODE), sizeof(typename Out::Bits), LANES, SPREAD>(
      x, out, n, width, scales, factors, [&](const void* from, void* to, F scale, F, int64_t) {
        const I code = widen(load<C>(from)), magnitude = code & ((1 << (f.bits - 1)) - 1);
        // A subnormal number f / 2^m * 2^(1 - bias) is (1 + f / 2^m) 2^(1 - bias) less its leading one.
        const I subnormal = magnitude < (1 << f.fraction_bits);
        const I bits = (magnitude << grid.drop) + (smallest - (1 << 23));
        F value = subnormal ? (F)(bits + (1 << 23)) - (F)splat(smallest) : (F)bits;
        const F special = magnitude == f.infinity ? (F)splat(EXPONENT) : (F)splat(QUIET_NAN);
        value = magnitude >= f.first_special ? special : value;
        emit(to, Out::put((F)((I)value | ((code << grid.sign) & SIGN)) * scale, false), past);
      });
}

// Packed codes: four in six bytes, the first in the lowest bits. Eight bytes are moved for six, but for the last six.
inline uint64_t pack_four(uint64_t four) {
  four = (four & 0x00000FFF00000FFF) | ((four >> 4) & 0x00FFF00000FFF000);
  return (four & 0xFFFFFF) | ((four >> 8) & 0xFFFFFF000000);
}
inline uint64_t unpack_four(uint64_t six) {
  six = (six & 0xFFFFFF) | ((six & 0xFFFFFF000000) << 8);
  return (six & 0x00000FFF00000FFF) | ((six & 0x00FFF00000FFF000) << 4);
}
void pack(uint16_t* codes, int64_t n, char* out) {  // `codes` has room for whole vectors
  const int64_t last = divide_up(n, 8) * 2 - 1;
  memset(codes + n, 0, (last * 4 + 4 - n) * 2);
  for (int64_t q = 0; q < last; ++q) store(out + 6 * q, pack_four(load<uint64_t>(codes + 4 * q)));
  const uint64_t six = pack_four(load<uint64_t>(codes + 4 * last));
  memcpy(out + 6 * last, &six, 6);
}
void unpack(const char* packed, int64_t n, uint16_t* codes) {
  const int64_t last = divide_up(n, 8) * 2 - 1;
  for (int64_t q = 0; q < last; ++q) store(codes + 4 * q, unpack_four(load<uint64_t>(packed + 6 * q)));
  uint64_t six = 0;
  memcpy(&six, packed + 6 * last, 6);
  store(codes + 4 * last, unpack_four(six));
}

// --- The work: bands of chunks, for which threads take turns.

template <class In, class Out, Scaling SCALING>
Row pick_round(bool spread) {
  return spread ? round_row<In, Out, SCALING, true> : round_row<In, Out, SCALING, false>;
}
template <class In, class Out>
Row pick_round(const Plan& plan, bool spread) {
  if (plan.exact) return pick_round<In, Out, EXACT>(spread);
  return plan.call.powers_of_two ? pick_round<In, Out, MULTIPLY>(spread) : pick_round<In, Out, DIVIDE>(spread);
}
template <class In, class CODE>
Row pick_encode(const Plan& plan, bool spread) {
  if (plan.call.powers_of_two)
    return spread ? encode_row<In, CODE, MULTIPLY, true> : encode_row<In, CODE, MULTIPLY, false>;
  return spread ? encode_row<In, CODE, DIVIDE, true> : encode_row<In, CODE, DIVIDE, false>;
}
template <class In>
Row pick_from(const Plan& plan, bool spread) {
  if (plan.call.operation == QUANTIZE)
    return plan.format.bits == 8 ? pick_encode<In, uint8_t>(plan, spread) : pick_encode<In, uint16_t>(plan, spread);
  switch (plan.call.out_type) {
    case FP32: return pick_round<In, Fp32>(plan, spread);
    case BF16: return pick_round<In, Bf16>(plan, spread);
    default: return pick_round<In, Fp16>(plan, spread);
  }
}
template <class Out>
Row pick_decode(const Plan& plan, bool spread) {
  if (plan.format.bits == 8) return spread ? decode_row<uint8_t, Out, true> : decode_row<uint8_t, Out, false>;
  return spread ? decode_row<uint16_t, Out, true> : decode_row<uint16_t, Out, false>;
}
Row pick(const Plan& plan, bool spread) {
  const bool decode = plan.call.operation == DEQUANTIZE;
  switch (decode ? plan.call.out_type : plan.call.in) {
    case FP32: return decode ? pick_decode<Fp32>(plan, spread) : pick_from<Fp32>(plan, spread);
    case BF16: return decode ? pick_decode<Bf16>(plan, spread) : pick_from<Bf16>(plan, spread);
    default: return decode ? pick_decode<Fp16>(plan, spread) : pick_from<Fp16>(plan, spread);
  }
}

// What a thread needs beside the tensors; every part has room for a chunk's columns in whole vectors.
struct Scratch {
  char* memory;
  char* row;          // an output row on its way past the cache
  uint16_t* codes;    // of a row, not packed
  char* high;         // magnitudes of columns,
  char* tile_high;    // of tiles
  float *scales, *factors, *wide_scales, *wide_factors;
  explicit Scratch(int64_t columns) {
    const int64_t room = (columns / 64 + 2) * 64 * 4;
    memory = static_cast<char*>(malloc(8 * room + 64));
    row = memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64);
    high = row + room;
    tile_high = high + room;
    scales = reinterpret_cast<float*>(tile_high + room);
    factors = scales + room / 4;
    wide_scales = factors + room / 4;
    wide_factors = wide_scales + room / 4;
    codes = reinterpret_cast<uint16_t*>(wide_factors + room / 4);
  }
  ~Scratch() { free(memory); }
  Scratch(const Scratch&) = delete;
};

void stream(char* to, const char* from, int64_t bytes) {
#ifdef X86
  const int64_t head = least(bytes, -reinterpret_cast<uintptr_t>(to) % 64);
  memcpy(to, from, head);
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) {
#if BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), load<__m512i>(from + i));
#else
    for (int part = 0; part < 64; part += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + part), load<__m128i>(from + i + part));
#endif
  }
  memcpy(to + i, from + i, bytes - i);
#else
  memcpy(to, from, bytes);
#endif
}

template <class Bits>
void find_magnitudes(const Plan& plan, const char* x, int64_t rows, int64_t n, Scratch& scratch) {
  const Bits* row = reinterpret_cast<const Bits*>(x);
  if (rows > 1) {
    row = reinterpret_cast<const Bits*>(scratch.high);
    down_columns<Bits>(x, plan.call.row_stride * sizeof(Bits), rows, n, reinterpret_cast<Bits*>(scratch.high));
  }
  across_tiles<Bits>(row, n, plan.call.tile_columns, reinterpret_cast<Bits*>(scratch.tile_high));
}

void find_scales(const Plan& plan, const char* x, int64_t rows, int64_t n, int64_t tiles, Scratch& scratch) {
  if (plan.in_bytes == 4) find_magnitudes<uint32_t>(plan, x, rows, n, scratch);
  if (plan.in_bytes == 2) find_magnitudes<uint16_t>(plan, x, rows, n, scratch);
  const void* high = scratch.tile_high;
  const auto bits = static_cast<const uint16_t*>(high);
  if (plan.call.in == FP32)
    to_scales<Fp32>(plan, static_cast<const uint32_t*>(high), tiles, scratch.scales, scratch.factors);
  else if (plan.call.in == BF16)
    to_scales<Bf16>(plan, bits, tiles, scratch.scales, scratch.factors);
  else
    to_scales<Fp16>(plan, bits, tiles, scratch.scales, scratch.factors);
}

// A chunk: `rows` rows from `row` on, tiles of tile row `band`.
void do_chunk(const Plan& plan, Row run, bool spread, int64_t batch, int64_t band, int64_t row, int64_t rows,
              int64_t chunk, Scratch& scratch) {
  const Call& c = plan.call;
  const bool decode = c.operation == DEQUANTIZE, packed = c.operation != QUANTIZE_DEQUANTIZE && plan.format.bits == 12;
  const int64_t column = chunk * plan.chunk_columns, n = least(plan.chunk_columns, c.columns - column);
  const int64_t first = column / c.tile_columns, tiles = divide_up(n, c.tile_columns);
  const int64_t code_row = packed ? divide_up(c.columns, 8) * 12 : c.columns;
  const int64_t code_column = packed ? column / 8 * 12 : column;
  const char* x = c.x + (batch * c.batch_stride + row * c.row_stride) * plan.in_bytes +
                  (decode ? code_column : column * plan.in_bytes);
  char* stored = c.scales + ((batch * plan.bands + band) * plan.tile_columns_all + first) * 4;
  if (decode) {
    const float* given = reinterpret_cast<const float*>(stored);
    for (int64_t t = 0; t < tiles; ++t) scratch.scales[t] = given[t] == given[t] ? given[t] : load<float>(&QUIET_NAN);
  } else {
    find_scales(plan, x, rows, n, tiles, scratch);
    if (c.operation == QUANTIZE) memcpy(stored, scratch.scales, tiles * 4);
  }
  const float *scales = scratch.scales, *factors = scratch.factors;
  const bool pairs = c.operation == QUANTIZE_DEQUANTIZE && c.in == BF16 && c.out_type == BF16;
  if (spread && (c.tile_columns > 1 || pairs)) {
    for (int64_t i = 0, t = 0; i < n; ++t)
      for (const int64_t end = least(n, i + c.tile_columns); i < end; ++i) {
        const int64_t place = pairs ? i / PAIR * PAIR + i % 2 * LANES + i % PAIR / 2 : i;
        scratch.wide_scales[place] = scales[t], scratch.wide_factors[place] = factors[t];
      }
    scales = scratch.wide_scales, factors = scratch.wide_factors;
  }
  const int64_t out_row = c.operation == QUANTIZE ? code_row : c.columns * plan.out_bytes;
  const int64_t out_column = c.operation == QUANTIZE ? code_column : column * plan.out_bytes;
  const int64_t bytes = packed && !decode ? divide_up(n, 8) * 12 : n * plan.out_bytes;
  char* out = c.out + (batch * c.rows + row) * out_row + out_column;
  // While a chunk is written, the one beside it comes into the cache. By themselves processors read on along rows only.
  const int64_t width = n * plan.in_bytes;
  const int64_t ahead = !decode ? least(plan.chunk_columns, c.columns - column - n) * plan.in_bytes : 0;
  const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0 && (rows == 1 || out_row % 64 == 0);
  const bool past = plan.stream && aligned && (decode || !packed);  // otherwise by way of scratch.row
  for (int64_t r = 0; r < rows; ++r, x += c.row_stride * plan.in_bytes, out += out_row) {
    for (int64_t line = 0; line < ahead; line += 64) __builtin_prefetch(x + width + line);
    char* to = plan.stream && !past ? scratch.row : out;
    if (packed && decode) {
      unpack(x, n, scratch.codes);
      run(plan, reinterpret_cast<const char*>(scratch.codes), to, n, c.tile_columns, scales, factors, past);
    } else if (packed) {
      run(plan, x, reinterpret_cast<char*>(scratch.codes), n, c.tile_columns, scales, factors, false);
      pack(scratch.codes, n, to);
    } else {
      run(plan, x, to, n, c.tile_columns, scales, factors, past);
    }
    if (to != out) stream(out, scratch.row, bytes);
  }
}

}  // namespace

void WORK(Plan& plan) {
  const Call& c = plan.call;
  const bool spread = c.tile_columns < c.columns && c.tile_columns % PAIR != 0;
  const Row run = pick(plan, spread);
  Scratch scratch(plan.chunk_columns);
  if (scratch.memory == nullptr) {
    plan.failed = true;
    return;
  }
  const int64_t items = c.batch * plan.bands * plan.chunks;
  for (int64_t span; (span = plan.next.fetch_add(1)) < plan.spans;) {
    int64_t item = items / plan.spans * span + least(span, items % plan.spans);
    const int64_t end = item + items / plan.spans + (span < items % plan.spans);
    int64_t chunk = item % plan.chunks, band = item / plan.chunks % plan.bands, batch = item / plan.chunks / plan.bands;
    int64_t group = 0;
    for (; item < end; ++item) {
      int64_t row = band * c.tile_rows, last = least(c.rows, row + c.tile_rows);
      if (plan.first_band != nullptr) {
        while (band >= plan.first_band[group + 1]) ++group;
        row = (group ? c.ends[group - 1] : 0) + (band - plan.first_band[group]) * c.tile_rows;
        last = least(c.ends[group], row + c.tile_rows);
      }
      do_chunk(plan, run, spread, batch, band, row, last - row, chunk, scratch);
      if (++chunk == plan.chunks) {
        chunk = 0;
        if (++band == plan.bands) band = group = 0, ++batch;
      }
    }
  }
#ifdef X86
  if (plan.stream) _mm_sfence();
#endif
}
