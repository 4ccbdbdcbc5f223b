// The second pass over a chunk: rows are rounded, encoded or decoded under their scales. For tiles.cpp alone.
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

#pragma once

#include "lanes.h"

namespace {

// A row has a scale for each tile; with SPREAD, for each column.

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

// The way from x to y. EXACT: scales are powers of two and normal, so that no y is beyond the format's largest number,
// and all values are BF16 numbers. Then nothing must be limited or rounded, and NaN stays NaN.
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
    F value = ((magnitude + magic) - magic) * scale;  // for NaN in a tile of NaN: max * NaN
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

}  // namespace
