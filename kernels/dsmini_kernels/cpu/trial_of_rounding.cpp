// The trial of the library for rounding. Results are also compared with values that all formats hold.

#include "trial.h"

extern "C" int64_t dsmini_tiles(const TilesCall*, int64_t);

namespace {

constexpr int64_t ROWS = 3, COLUMNS = 130;

void try_tiles(Trial& trial, int64_t operation, int64_t format, int64_t powers, int64_t in, int64_t out_type, int64_t tile_rows,
               int64_t tile_columns) {
  constexpr int64_t SIZES[] = {4, 2, 2};
  const bool packed = FORMATS[format].bits == 12;
  const int64_t code_row = packed ? divide_up(COLUMNS, 8) * 12 : COLUMNS;
  const int64_t tiles = divide_up(ROWS, tile_rows) * divide_up(COLUMNS, tile_columns);
  float values[ROWS * COLUMNS];
  for (int64_t i = 0; i < ROWS * COLUMNS; ++i) values[i] = (i % 2 ? -0.125f : 0.125f) * float(1 << i % 5);
  Memory memory;
  TilesCall c{};
  c.operation = operation, c.threads = 1, c.in_type = in, c.out_type = out_type, c.format = format, c.powers_of_two = powers;
  c.batch = 1, c.rows = ROWS, c.columns = COLUMNS, c.tile_rows = tile_rows, c.tile_columns = tile_columns;
  c.row_stride = operation == DEQUANTIZE ? code_row : COLUMNS, c.amax_min = 1e-4;
  const Lent x = memory.bytes(ROWS * c.row_stride * (operation == DEQUANTIZE ? 1 : SIZES[in]));
  const Lent out = memory.bytes(operation == QUANTIZE ? ROWS * code_row : ROWS * COLUMNS * SIZES[out_type]);
  const bool compared = operation == QUANTIZE_DEQUANTIZE && in == FP32 && out_type == FP32;
  if (compared) memcpy(x.data, values, sizeof values);
  c.x = x, c.out = out;
  if (operation != QUANTIZE_DEQUANTIZE) c.scales = memory.bytes(4 * tiles);
  trial.run("tiles", dsmini_tiles, c);
  for (int64_t i = 0; compared && i < ROWS * COLUMNS; ++i)
    if (__builtin_fabsf(static_cast<float*>(out.data)[i] - values[i]) > 1e-6f) trial.failed = "tiles: it computes wrong values";
}

}  // namespace

const char* dsmini_try() {
  Trial trial;
  constexpr int64_t TILES[][2] = {{1, 128}, {128, 1}, {3, 5}};
  for (int64_t operation = 0; operation < OPERATIONS; ++operation)
    for (const int64_t format : {0, 1, 2})
      for (const int64_t powers : {0, 1})
        for (int64_t in = 0; in < TYPES; ++in)
          for (int64_t out = 0; out < TYPES; ++out)
            for (const auto& [rows, columns] : TILES) try_tiles(trial, operation, format, powers, in, out, rows, columns);
  return trial.failed;
}
