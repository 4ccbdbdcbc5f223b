// Quantize, dequantize, and both at once, tile by tile. dsmini/numerics/tiles.py defines the results, to the bit.
//
// BYTES is the width of a vector of the instruction set.
//
// A chunk is passed over twice: magnitudes.h finds the scales, rows.h rounds. lanes.h has vectors and types.

#include "magnitudes.h"
#include "rows.h"

namespace {

// The work: bands of chunks, which threads take one after the other.

template <class In, class Out, Scaling SCALING>
Row select_round(bool spread) {
  return spread ? round_row<In, Out, SCALING, true> : round_row<In, Out, SCALING, false>;
}
template <class In, class Out>
Row select_round(const Plan& plan, bool spread) {
  if (plan.exact) return select_round<In, Out, EXACT>(spread);
  return plan.call.powers_of_two ? select_round<In, Out, MULTIPLY>(spread) : select_round<In, Out, DIVIDE>(spread);
}
template <class In, class CODE>
Row select_encode(const Plan& plan, bool spread) {
  if (plan.call.powers_of_two)
    return spread ? encode_row<In, CODE, MULTIPLY, true> : encode_row<In, CODE, MULTIPLY, false>;
  return spread ? encode_row<In, CODE, DIVIDE, true> : encode_row<In, CODE, DIVIDE, false>;
}
template <class In>
Row select_from(const Plan& plan, bool spread) {
  if (plan.call.operation == QUANTIZE)
    return plan.format.bits == 8 ? select_encode<In, uint8_t>(plan, spread) : select_encode<In, uint16_t>(plan, spread);
  switch (plan.call.out_type) {
    case FP32: return select_round<In, Fp32>(plan, spread);
    case BF16: return select_round<In, Bf16>(plan, spread);
    default: return select_round<In, Fp16>(plan, spread);
  }
}
template <class Out>
Row select_decode(const Plan& plan, bool spread) {
  if (plan.format.bits == 8) return spread ? decode_row<uint8_t, Out, true> : decode_row<uint8_t, Out, false>;
  return spread ? decode_row<uint16_t, Out, true> : decode_row<uint16_t, Out, false>;
}
Row select(const Plan& plan, bool spread) {
  const bool decode = plan.call.operation == DEQUANTIZE;
  switch (decode ? plan.call.out_type : plan.call.in_type) {
    case FP32: return decode ? select_decode<Fp32>(plan, spread) : select_from<Fp32>(plan, spread);
    case BF16: return decode ? select_decode<Bf16>(plan, spread) : select_from<Bf16>(plan, spread);
    default: return decode ? select_decode<Fp16>(plan, spread) : select_from<Fp16>(plan, spread);
  }
}

// The buffers of a thread; each has room for a chunk's columns in whole vectors.
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
  if (plan.call.in_type == FP32)
    to_scales<Fp32>(plan, static_cast<const uint32_t*>(high), tiles, scratch.scales, scratch.factors);
  else if (plan.call.in_type == BF16)
    to_scales<Bf16>(plan, bits, tiles, scratch.scales, scratch.factors);
  else
    to_scales<Fp16>(plan, bits, tiles, scratch.scales, scratch.factors);
}

// A chunk: `rows` rows from `row` on, tiles of tile row `band`.
void do_chunk(const Plan& plan, Row run, bool spread, int64_t batch, int64_t band, int64_t row, int64_t rows,
              int64_t chunk, Scratch& scratch) {
  const TilesCall& c = plan.call;
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
  const bool pairs = c.operation == QUANTIZE_DEQUANTIZE && c.in_type == BF16 && c.out_type == BF16;
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
  // Prefetch the next chunk while this one is written. By themselves processors prefetch along rows only.
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

void work(Plan& plan) {
  const TilesCall& c = plan.call;
  const bool spread = c.tile_columns < c.columns && c.tile_columns % PAIR != 0;
  const Row run = select(plan, spread);
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
