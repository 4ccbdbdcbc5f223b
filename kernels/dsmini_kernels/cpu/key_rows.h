// Rows of a cache that stand for keys, as V4 stores them: FP32, BF16, or codes with scales in E8M0.
//
// In FP8 a row is codes in E4M3, a byte of scale for each tile of them, and the other numbers in BF16. In FP4 it is codes in
// E2M1, two a byte with the first in the low half, and their scales. A code becomes an FP32 number, subnormal ones too, when
// its bits are put in FP32's places and it is multiplied by a power of two. A tile with NaN has NaN as its scale.

#pragma once

#include "attention.h"
#include "entry.h"

namespace {

// Calls put(vector, place, count) along a row of `width` numbers. The last vectors of tiles may have fewer than LANES.
template <class Put>
inline void each_of_row(const KeyRows& rows, const char* p, int64_t width, Put put) {
  const auto put_some = [&](F v, int64_t at, int64_t n) {
    if (n > 0) put(v, at, least(n, LANES));
  };
  if (rows.type == KEYS_FP32 || rows.type == KEYS_BF16) {
    const bool bf16 = rows.type == KEYS_BF16;
    for (int64_t i = 0; i < width; i += LANES) put(get(bf16, p + i * (bf16 ? 2 : 4), least(LANES, width - i)), i, least(LANES, width - i));
    return;
  }
  const bool fp4 = rows.type == KEYS_FP4;
  const uint8_t* scales = reinterpret_cast<const uint8_t*>(p + (fp4 ? rows.codes / 2 : rows.codes));
  for (int64_t at = 0, tile = 0; at < rows.codes; at += rows.tile, ++tile) {
    const int64_t n = least(rows.tile, rows.codes - at);
    const F scale = splat(power_of_two(scales[tile]));
    if (fp4) {
      each_of_fours(p + at / 2, n, scale, [&](F v, int64_t i) { put_some(v, at + i, n - i); });
    } else {
      Watch<DecodeE4m3> unused;
      along_units<DecodeE4m3>(p + at, n, unused, [&](int64_t i, const F(&v)[2]) {
        const F up = splat(0x1p120f);
        put_some(v[0] * up * scale, at + i, n - i), put_some(v[1] * up * scale, at + i + LANES, n - i - LANES);
      });
    }
  }
  const char* rest = p + (fp4 ? rows.codes / 2 : rows.codes) + divide_up(rows.codes, rows.tile);
  for (int64_t i = rows.codes; i < width; i += LANES)
    put(get(true, rest + 2 * (i - rows.codes), least(LANES, width - i)), i, least(LANES, width - i));
}

// A row as FP32 numbers, or rounded to BF16.
inline void decode_key(const KeyRows& rows, const char* p, int64_t width, float* out) {
  each_of_row(rows, p, width, [&](F v, int64_t i, int64_t n) { store_some(out + i, v, n); });
}
inline void decode_key_in_bf16(const KeyRows& rows, const char* p, int64_t width, char* out) {
  each_of_row(rows, p, width, [&](F v, int64_t i, int64_t n) { put(true, v, n, out + 2 * i); });
}

// Writes the numbers of a row, rounded as the codecs of dsmini/nn/codec.py do: a scale is the smallest power of two that
// cuts no number of its tile off.
inline void encode_key(const KeyRows& rows, const float* x, int64_t width, char* to) {
  if (rows.type == KEYS_FP32 || rows.type == KEYS_BF16) return encode_numbers(rows.type, x, width, to);
  constexpr Format E2M1 = {4, 1, 1, 6.0f, 0.5f, 0, 8, -1};
  const bool fp4 = rows.type == KEYS_FP4;
  const Format& format = fp4 ? E2M1 : FORMATS[0];
  const Grid grid(format);
  char* scales = to + (fp4 ? rows.codes / 2 : rows.codes);
  for (int64_t at = 0; at < rows.codes; at += rows.tile) {
    const int64_t n = least(rows.tile, rows.codes - at);
    const int32_t top = largest_magnitude(x + at, n);
    const float least_amax = fp4 ? 6 * 0x1p-126f : 1e-4f, amax = larger(load<float>(&top), least_amax) / format.max;
    const int32_t bits = top >= EXPONENT ? EXPONENT : (load<int32_t>(&amax) + 0x7FFFFF) & EXPONENT;
    *scales++ = char(bits >> 23);
    const F scale = splat(power_of_two(uint8_t(bits >> 23)));
    each_vector(x + at, n, [&](F v, int64_t i) {
      const F y = v / scale;
      const I code = (y != y ? grid.nan : grid.code(grid.limit(y))) | (I)(((U)y & uint32_t(SIGN)) >> grid.sign);
      const B bytes = narrow(code, uint8_t());
      const uint8_t* codes = reinterpret_cast<const uint8_t*>(&bytes);
      if (!fp4) return void(memcpy(to + at + i, codes, least(LANES, n - i)));
      for (int64_t k = 0; k < least(LANES, n - i); k += 2) to[(at + i + k) / 2] = char(codes[k] | codes[k + 1] << 4);
    });
  }
  encode_numbers(KEYS_BF16, x + rows.codes, width - rows.codes, scales);
}

// True if the rows of `b` sequences lie within their memory.
INLINE bool key_rows_fit(const KeyRows& rows, int64_t b, int64_t width) {
  const bool codes = rows.type == KEYS_FP8 || rows.type == KEYS_FP4;
  if (rows.type < 0 || rows.type >= KEY_TYPES || rows.count < 0 || rows.batch < 0 || rows.codes < 0 || rows.codes > width) return false;
  if (rows.batch > MOST || rows.row > MOST || rows.count > MOST || (codes && rows.tile < 1)) return false;
  if (rows.type == KEYS_FP4 && (rows.codes != width || width % 2 || rows.tile % 2)) return false;
  const int64_t scales = codes ? divide_up(rows.codes, rows.tile) : 0;
  const int64_t sizes[] = {4 * width, 2 * width, rows.codes + scales + 2 * (width - rows.codes), rows.codes / 2 + scales};
  if (rows.row < sizes[rows.type]) return false;
  if (rows.count == 0) return true;
  int64_t all, last;
  return rows.data != nullptr && !__builtin_mul_overflow(b - 1, rows.batch, &all) &&
         !__builtin_mul_overflow(rows.count - 1, rows.row, &last) && !__builtin_add_overflow(all, last, &all) &&
         !__builtin_add_overflow(all, sizes[rows.type], &all) && all <= rows.data.bytes;
}

}  // namespace
