// y = x w^T for a few rows of x: every weight is read once, and decoded in registers.

#include "dots.h"
#include "steps.h"

bool OF_ISA(linear)(const LinearCall& c) {
  const int64_t width = padded(c.w.columns), in = c.w.columns;
  float* x = scratch_of(c.n * (width + in));
  if (x == nullptr) return false;
  float* plain = x + c.n * width;
  for (int64_t n = 0; n < c.n; ++n) {
    const float* row = reinterpret_cast<const float*>(c.x) + n * in;
    if (c.bf16) {
      for (int64_t i = 0; i < in; ++i) {
        const uint32_t bits = uint32_t(load<uint16_t>(c.x + (n * in + i) * 2)) << 16;
        memcpy(plain + i, &bits, 4);
      }
      row = plain;
    }
    arrange(row, in, c.w.type, x + n * width);
  }
  constexpr int64_t ROWS = 32;
  Team team(c.place.threads);
  team.each((c.w.rows + ROWS - 1) / ROWS, [&](int64_t item, int64_t) {
      const int64_t from = item * ROWS, to = least(c.w.rows, from + ROWS);
      with_decoder(c.w.type, [&](auto decoder) {
        products<decltype(decoder)>(c.w, from, to, x, width, c.n, [&](int64_t row, int64_t n, float value) {
          const int64_t at = n * c.w.rows + row;
          if (c.bf16)
            store(c.y + 2 * at, rounded_bf16(value));
          else
            store(c.y + 4 * at, value);
        });
      });
    });
  return true;
}
