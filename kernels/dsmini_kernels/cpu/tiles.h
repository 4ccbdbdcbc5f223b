// Shared by library.cpp and tiles.cpp: the plan of a call.

#pragma once

#include "calls.h"

#include <atomic>
#include <cstdint>

enum Operation : int64_t { QUANTIZE, DEQUANTIZE, QUANTIZE_DEQUANTIZE, OPERATIONS };
enum Type : int64_t { FP32, BF16, FP16, TYPES };
enum Error : int64_t { FINE, BAD_CALL, BAD_SHAPE, BAD_STRIDE, BAD_ENDS, OUT_OF_BOUNDS, NO_MEMORY };

struct Format {
  int bits, fraction_bits, bias;
  float max, least;     // numbers above zero
  int nan;              // the code of NaN
  int first_special;    // codes from here on are NaN,
  int infinity;         // except this one; -1 if the format has no infinities
};

constexpr Format FORMATS[] = {
    {8, 3, 7, 448.0f, 0x1p-9f, 0x7F, 0x7F, -1},
    {8, 2, 15, 57344.0f, 0x1p-16f, 0x7F, 0x7C, 0x7C},
    {12, 6, 15, 65024.0f, 0x1p-20f, 0x7FF, 0x7C0, -1},
};

// The matrix is cut into bands (the rows of a row of tiles), and bands into chunks (columns of some tiles). A chunk is
// so small that it is still in the cache when the second pass, which rounds, follows the first, which finds the scales.
struct Plan {
  TilesCall call;
  Format format;
  int64_t in_bytes, out_bytes;  // of an element; 0 for packed codes
  int64_t tile_columns_all;     // tiles in a row of tiles
  int64_t bands, chunks, chunk_columns;
  const int64_t* first_band;    // of each group, where there are ends
  bool stream;                  // write past the cache
  bool tiny;                    // scales may be 0, and 0 / 0 is NaN
  bool exact;                   // scales are powers of two and normal, and all values BF16 numbers
  int64_t spans;                // parts that threads fetch one after the other
  std::atomic<int64_t> next;
  std::atomic<bool> failed;     // out of memory
};

inline int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

void work(Plan&);  // fetch spans until none is left
