// y = x w^T. For a few rows of x every weight is read once, and decoded in registers; for more, rows of the weight are
// multiplied with panels of x.

#include "panels.h"
#include "entry.h"

namespace {

constexpr int64_t FEW = 16;  // rows of x: from here on panels are as fast
constexpr int64_t STRIP = 32;            // rows of the weight that share a panel while the cache has it
constexpr int64_t MOST_WORDS = 2 << 20;  // of memory for panels: more rows of x are computed in turns

bool few_rows(const LinearCall& c) {
  const int64_t width = padded(c.w.columns), in = c.w.columns;
  float* x = scratch_of(c.n * (width + in));
  if (x == nullptr) return false;
  float* plain = x + c.n * width;
  for (int64_t n = 0; n < c.n; ++n) {
    const float* row = reinterpret_cast<const float*>(c.x.data) + n * in;
    if (c.bf16) {
      for (int64_t i = 0; i < in; ++i) {
        const uint32_t bits = uint32_t(load<uint16_t>(c.x + (n * in + i) * 2)) << 16;
        memcpy(plain + i, &bits, 4);
      }
      row = plain;
    }
    arrange(row, in, c.w.type, x + n * width);
  }
  const int64_t rows = rows_of_item(c.w.rows, c.threads);
  Team team(c.threads);
  team.each(divide_up(c.w.rows, rows), [&](int64_t item, int64_t) {
    const int64_t from = item * rows, to = least(c.w.rows, from + rows);
    if (!c.bf16) return product(c.w, from, to, x, width, c.n, reinterpret_cast<float*>(c.y.data) + from, c.w.rows);
    float y[FEW * MOST_ROWS];
    product(c.w, from, to, x, width, c.n, y, rows);
    for (int64_t n = 0; n < c.n; ++n)
      for (int64_t r = 0; r < to - from; ++r) store(c.y + 2 * (n * c.w.rows + from + r), rounded_bf16(y[n * rows + r]));
  });
  return true;
}

// STRIP rows of the weight, from `row` on, times all panels.
template <class Words>
void columns_of_y(const LinearCall& c, const Cut& cut, int64_t first, int64_t n, int64_t row, const float* panels,
                  float* memory) {
  const int64_t size = c.bf16 ? 2 : 4, count = least(STRIP, c.w.rows - row), k = c.w.columns;
  const char* rows[STRIP];
  for (int64_t r = 0; r < STRIP; ++r) rows[r] = r < count ? get_row<Words>(c.w, row + r, memory + r * converted(k)) : rows[count - 1];
  float out[STRIP * MOST_VECTORS * LANES];
  for (int64_t from = 0; from < n; from += cut.tokens) {
    const int64_t tokens = least(cut.tokens, n - from), vectors = divide_up(tokens, LANES);
    strip<Words>([&](int64_t r) { return rows[r]; }, round_up(count, LANES), panels + from * words_of<Words>(k), vectors, k,
                 LANES * c.w.stride, out);
    for (int64_t r = 0; r < count; r += LANES)
      for (int64_t v = 0; v < vectors; ++v) {
        F block[LANES];
        turn(out + r * vectors * LANES, vectors, v, block);
        for (int64_t t = v * LANES; t < least((v + 1) * LANES, tokens); ++t)
          put(c.bf16, block[t % LANES], least(LANES, count - r), c.y + ((first + from + t) * c.w.rows + row + r) * size);
      }
  }
}

bool many_rows(const LinearCall& c) {
  bool fine = true;
  // without BF16 units a row becomes FP32 once (get_row), which is faster than to widen BF16 for each panel
  with_words(c.bf16 != 0, WEIGHT_FP32, [&](auto kind) {
    using Words = decltype(kind);
    const int64_t k = c.w.columns, words = words_of<Words>(k), size = c.bf16 ? 2 : 4;
    const int64_t room = MOST_WORDS / (words ? words : 1), some = least(c.n, room < 512 ? 512 : room);
    const int64_t panels = round_up(some + MOST_VECTORS * LANES, LANES) * words, each = STRIP * converted(k);
    float* memory = scratch_of(panels + c.threads * each);
    if (memory == nullptr) return void(fine = false);
    Team team(c.threads, Team::LONG);
    for (int64_t first = 0; first < c.n; first += some) {
      const int64_t n = least(some, c.n - first);
      const Cut cut(n);
      team.each(cut.panels, [&](int64_t item, int64_t) {
        const int64_t from = item * cut.tokens, count = least(cut.tokens, n - from);
        pack<Words>(c.bf16, k, count, divide_up(count, LANES),
                    [&](int64_t token) { return c.x + (first + from + token) * k * size; }, memory + from * words);
      });
      team.each(divide_up(c.w.rows, STRIP), [&](int64_t item, int64_t thread) {
        columns_of_y<Words>(c, cut, first, n, item * STRIP, memory, memory + panels + thread * each);
      });
    }
  });
  return fine;
}

bool linear(const LinearCall& c) { return c.n < FEW ? few_rows(c) : many_rows(c); }

int64_t check(const LinearCall& c) {
  if (!sizes({c.n, c.w.rows, c.w.columns}) || c.n < 1 || c.bf16 < 0 || c.bf16 > 1) return BAD_SHAPE;
  const int64_t size = c.bf16 ? 2 : 4;
  if (!c.w.fits_stack(1, c.w.rows, c.w.columns) || !within(c.x, size, c.n, c.w.columns) ||
      !within(c.y, size, c.n, c.w.rows))
    return OUT_OF_BOUNDS;
  return FINE;
}

}  // namespace

ENTRY(linear, LinearCall)
