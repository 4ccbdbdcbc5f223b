// The entry of tiles: check a call against the memory that its pointers have, plan it, run it.

#include "tiles.h"

#include <cstddef>
#include <cstdlib>

namespace {

constexpr int64_t CHUNK_BYTES = 128 << 10;  // of input, to stay in a core's second-level cache
constexpr int64_t CHUNK_COLUMNS = 2048;
constexpr int64_t STREAM_BYTES = 16 << 20;  // of output: more would push everything else out of the cache

bool multiply(int64_t a, int64_t b, int64_t* out) { return !__builtin_mul_overflow(a, b, out); }
bool add(int64_t a, int64_t b, int64_t* out) { return !__builtin_add_overflow(a, b, out); }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t common_multiple(int64_t a, int64_t b) {
  int64_t x = a, y = b;
  while (y != 0) {
    const int64_t rest = x % y;
    x = y, y = rest;
  }
  return a / x * b;
}

// Bytes of [batch, rows] rows with strides, from the first to the end of the last. False if no int64 holds them.
bool extent(const TilesCall& c, int64_t element, int64_t row, int64_t* bytes) {
  int64_t batches, rows, elements;
  return multiply(c.batch - 1, c.batch_stride, &batches) && multiply(c.rows - 1, c.row_stride, &rows) &&
         add(batches, rows, &elements) && multiply(elements, element, &elements) && add(elements, row, bytes);
}

bool contiguous(const TilesCall& c, int64_t rows, int64_t row, int64_t* bytes) {
  return multiply(c.batch, rows, bytes) && multiply(*bytes, row, bytes);
}

int64_t check_ends(const TilesCall& c) {
  if (c.groups < 0 || c.groups > c.ends.bytes / 8 || c.batch != 1) return BAD_ENDS;
  if (c.operation != QUANTIZE_DEQUANTIZE) return BAD_ENDS;
  for (int64_t g = 0; g < c.groups; ++g)
    if (c.ends[g] < (g == 0 ? 0 : c.ends[g - 1]) || c.ends[g] > c.rows) return BAD_ENDS;
  return (c.groups == 0 ? 0 : c.ends[c.groups - 1]) == c.rows ? FINE : BAD_ENDS;
}

int64_t check(const TilesCall& c) {
  if (c.operation < 0 || c.operation >= OPERATIONS || c.format < 0 || c.format > 2 || c.threads < 1) return BAD_CALL;
  if (c.in_type < 0 || c.in_type >= TYPES || c.out_type < 0 || c.out_type >= TYPES) return BAD_CALL;
  if (c.batch < 0 || c.rows < 0 || c.columns < 0 || c.tile_rows < 1 || c.tile_columns < 1) return BAD_SHAPE;
  if (c.columns > (INT64_MAX >> 8)) return BAD_SHAPE;
  if (c.batch_stride < 0 || c.row_stride < 0) return BAD_STRIDE;
  return FINE;
}

int64_t check_bounds(const Plan& plan, int64_t code_row) {
  const TilesCall& c = plan.call;
  int64_t in, out, scales = 0;
  const int64_t in_row = c.operation == DEQUANTIZE ? code_row : c.columns * plan.in_bytes;
  const int64_t out_row = c.operation == QUANTIZE ? code_row : c.columns * plan.out_bytes;
  if (!extent(c, plan.in_bytes, in_row, &in) || !contiguous(c, c.rows, out_row, &out)) return OUT_OF_BOUNDS;
  if (c.operation != QUANTIZE_DEQUANTIZE && !contiguous(c, plan.bands, plan.tile_columns_all * 4, &scales))
    return OUT_OF_BOUNDS;
  if (in > c.x.bytes || out > c.out.bytes || scales > c.scales.bytes) return OUT_OF_BOUNDS;
  return c.x == nullptr || c.out == nullptr || (scales > 0 && c.scales == nullptr) ? OUT_OF_BOUNDS : FINE;
}

// With tiles of one row that end with the row's end, all rows of a contiguous tensor are one.
void join_rows(TilesCall& c, bool packed) {
  int64_t all;
  const bool joined = c.tile_rows == 1 && c.rows > 1 && c.row_stride == c.columns && c.columns % c.tile_columns == 0 &&
                      (c.batch == 1 || c.batch_stride == c.rows * c.columns) && !packed;
  if (!joined || !multiply(c.batch, c.rows, &all)) return;
  c.columns *= all;
  c.rows = c.batch = 1;
  c.row_stride = c.columns;
}

void cut(Plan& plan, bool packed) {
  const TilesCall& c = plan.call;
  plan.tile_columns_all = divide_up(c.columns, c.tile_columns);
  plan.bands = plan.first_band != nullptr ? plan.first_band[c.groups] : divide_up(c.rows, c.tile_rows);
  const int64_t want = CHUNK_BYTES / plan.in_bytes / c.tile_rows;
  const int64_t columns = want < 64 ? 64 : least(want, CHUNK_COLUMNS);
  int64_t step = common_multiple(c.tile_columns, 64);
  if (step > columns) step = packed ? common_multiple(c.tile_columns, 8) : c.tile_columns;
  plan.chunk_columns = least(c.columns, step > columns ? step : columns / step * step);
  plan.chunks = divide_up(c.columns, plan.chunk_columns);
}

int64_t run(Plan& plan) {
  TilesCall& c = plan.call;
  const int64_t items = c.batch * plan.bands * plan.chunks;
  const bool alone = c.threads == 1 || c.parallel == nullptr || items == 1;
  plan.spans = alone ? 1 : least(items, c.threads * 4);
  if (alone)
    work(plan);
  else
    c.parallel([](void* p) { work(*static_cast<Plan*>(p)); }, &plan, static_cast<unsigned>(c.threads), 0);
  return plan.failed ? NO_MEMORY : FINE;
}

}  // namespace

extern "C" {

// `bytes` is the size of the caller's struct. Returns an Error.
__attribute__((visibility("default"))) int64_t dsmini_tiles(const TilesCall* call, int64_t bytes) {
  if (bytes != sizeof(TilesCall)) return BAD_CALL;
  Plan plan{};
  plan.call = *call;
  TilesCall& c = plan.call;
  if (const int64_t error = check(c)) return error;
  plan.format = FORMATS[c.format];
  constexpr int64_t SIZES[] = {4, 2, 2};
  const bool packed = plan.format.bits == 12 && c.operation != QUANTIZE_DEQUANTIZE;
  plan.in_bytes = c.operation == DEQUANTIZE ? 1 : SIZES[c.in_type];
  plan.out_bytes = c.operation == QUANTIZE ? 1 : SIZES[c.out_type];
  const int64_t code_row = packed ? divide_up(c.columns, 8) * 12 : c.columns;
  if (c.batch == 0 || c.rows == 0 || c.columns == 0) return FINE;
  int64_t* first_band = nullptr;
  if (c.ends != nullptr) {
    if (const int64_t error = check_ends(c)) return error;
    first_band = static_cast<int64_t*>(malloc((c.groups + 1) * 8));
    if (first_band == nullptr) return NO_MEMORY;
    first_band[0] = 0;
    for (int64_t g = 0; g < c.groups; ++g)
      first_band[g + 1] = first_band[g] + divide_up(c.ends[g] - (g ? c.ends[g - 1] : 0), c.tile_rows);
    plan.first_band = first_band;
  }
  c.tile_rows = least(c.tile_rows, c.rows);
  c.tile_columns = least(c.tile_columns, c.columns);
  plan.tile_columns_all = divide_up(c.columns, c.tile_columns);
  plan.bands = divide_up(c.rows, c.tile_rows);
  int64_t error = check_bounds(plan, code_row);
  if (error == FINE) {
    if (c.tile_rows == 1 && first_band != nullptr) plan.first_band = nullptr;  // groups change nothing then
    join_rows(c, packed);
    cut(plan, packed);
    plan.stream = c.batch * c.rows * c.columns * plan.out_bytes >= STREAM_BYTES;
    const double least_scale = c.amax_min / plan.format.max;
    plan.tiny = least_scale < 0x1p-126;
    plan.exact = c.powers_of_two && least_scale * plan.format.least >= 0x1p-133;
    error = run(plan);
  }
  free(first_band);
  return error;
}
}
