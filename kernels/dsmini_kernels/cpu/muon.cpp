// Muon's step for many matrices: momentum, iterations of Newton and Schulz or of Halley, and the parameters. A thread
// takes a matrix at a time and iterates on it within its own second-level cache. Products such as X X^T and A A are
// symmetric: blocks below the diagonal are copied from those above. dsmini/training/muon.py has the equations.
//
// Matrices are cut into square blocks of SIDE numbers. An operand of a product is stored in words along the sum, each an
// FP32 number or two BF16 numbers. The left one is [sum / SIDE][row][words of SIDE numbers], and the right one is
// [column / SIDE][words of the sum][SIDE]. So a product reads both one after the other. Rows, columns and sums are filled
// up with zeros to multiples of SIDE.

#include "dots.h"
#include "entry.h"

#include <math.h>

namespace {

constexpr int64_t SIDE = 2 * LANES, AREA = SIDE * SIDE;
constexpr int64_t TILE = BYTES == 64 ? 8 : 4;  // rows whose sums stay in registers

// A word of one number.
struct Fp32Word {
  static constexpr int64_t NUMBERS = 1;
  // out[TILE][SIDE] = left right. A block of the left operand lies `stride` words behind the one before.
  static void tile(const float* left, int64_t stride, const float* right, int64_t blocks, float* out) {
    F sums[TILE][2] = {};
    for (int64_t b = 0; b < blocks; ++b, left += stride)
      for (int64_t k = 0; k < SIDE; ++k, right += SIDE) {
        const F first = load<F>(right), second = load<F>(right + LANES);
        UNROLL for (int r = 0; r < TILE; ++r) {
          const F x = splat(left[r * SIDE + k]);
          sums[r][0] += x * first, sums[r][1] += x * second;
        }
      }
    UNROLL for (int r = 0; r < TILE; ++r) store(out + r * SIDE, sums[r][0]), store(out + r * SIDE + LANES, sums[r][1]);
  }
  static void put_left(const float* block, float* out) { memcpy(out, block, AREA * 4); }
  static void put_right(const float* block, float* out) { memcpy(out, block, AREA * 4); }
  static F get_left(const float* words, int64_t row, int64_t half) { return load<F>(words + row * SIDE + half * LANES); }
};

#if BF16_UNITS
// A word of two numbers, for the CPU's products of BF16 numbers with sums in FP32.
struct Bf16Word {
  static constexpr int64_t NUMBERS = 2;
  __attribute__((target("avx512bf16"))) static void tile(const float* left, int64_t stride, const float* right,
                                                         int64_t blocks, float* out) {
    __m512 sums[TILE][2] = {};
    for (int64_t b = 0; b < blocks; ++b, left += stride)
      for (int64_t k = 0; k < SIDE / 2; ++k, right += SIDE) {
        const __m512bh first = (__m512bh)_mm512_loadu_si512(right), second = (__m512bh)_mm512_loadu_si512(right + LANES);
        UNROLL for (int r = 0; r < TILE; ++r) {
          int32_t word;
          memcpy(&word, left + r * (SIDE / 2) + k, 4);
          const __m512bh x = (__m512bh)_mm512_set1_epi32(word);
          sums[r][0] = _mm512_dpbf16_ps(sums[r][0], x, first), sums[r][1] = _mm512_dpbf16_ps(sums[r][1], x, second);
        }
      }
    UNROLL for (int r = 0; r < TILE; ++r) {
      _mm512_storeu_ps(out + r * SIDE, sums[r][0]), _mm512_storeu_ps(out + r * SIDE + LANES, sums[r][1]);
    }
  }
  static U rounded(const float* x) {
    const F v = load<F>(x);
    return Bf16::rounded(v != v ? (F)splat(QUIET_NAN) : v, false);
  }
  static void put_left(const float* block, float* out) {
    char* to = reinterpret_cast<char*>(out);
    for (int64_t i = 0; i < AREA; i += LANES) store(to + 2 * i, narrow((I)(rounded(block + i) >> 16), uint16_t()));
  }
  static void put_right(const float* block, float* out) {  // the numbers of two rows are a word
    for (int64_t r = 0; r < SIDE; r += 2)
      for (int64_t i = r * SIDE; i < (r + 1) * SIDE; i += LANES, out += LANES)
        store(out, (rounded(block + i) >> 16) | (rounded(block + i + SIDE) & uint32_t(HIGH_HALF)));
  }
  static F get_left(const float* words, int64_t row, int64_t half) {
    return Bf16::get(reinterpret_cast<const char*>(words) + 2 * (row * SIDE + half * LANES));
  }
};
#endif

void transpose(const float* block, float* out) {
  for (int64_t down = 0; down < SIDE; down += LANES)
    for (int64_t across = 0; across < SIDE; across += LANES) {
      F rows[LANES];
      UNROLL for (int r = 0; r < LANES; ++r) rows[r] = load<F>(block + (down + r) * SIDE + across);
      transpose(rows);
      UNROLL for (int r = 0; r < LANES; ++r) store(out + (across + r) * SIDE + down, rows[r]);
    }
}

// One matrix of a piece, [rows, columns]; X is [o, i], the matrix itself or, if it is tall, its transpose.
template <class Word>
struct Iteration {
  const MuonCall& c;
  int64_t rows, columns;
  float *p, *m;
  const float* g;
  bool tall;
  int64_t o, i;  // blocks
  float *x_left, *x_right, *xt_right, *a_left, *a_right, *p_left, *strip, *block, *turned;
  float *w, *factor, *corners;  // of Halley's iterations
  int64_t numbers = 0;  // of memory

  static constexpr int64_t W = AREA / Word::NUMBERS;  // words of a block

  Iteration(const MuonCall& call, const MuonPiece& piece, int64_t index, float* memory)
      : c(call), rows(piece.rows), columns(piece.columns), tall(piece.rows > piece.columns) {
    const int64_t at = index * rows * columns;
    p = piece.p + at, m = piece.m + at, g = piece.g + at;
    o = divide_up(least(rows, columns), SIDE), i = divide_up(tall ? rows : columns, SIDE);
    const auto take = [&](int64_t more) {
      float* from = memory == nullptr ? nullptr : memory + numbers;
      numbers += more;
      return from;
    };
    const bool apart = Word::NUMBERS > 1;  // a left and a right operand of one number a word are the same
    x_left = take(o * i * W), x_right = apart ? take(o * i * W) : x_left, xt_right = take(o * i * W);
    a_left = take(o * o * W), a_right = apart ? take(o * o * W) : a_left, p_left = take(o * o * W);
    strip = take(o * AREA), block = take(AREA), turned = take(AREA);
    const int64_t h = c.rational;
    w = take(h * o * o * W), factor = take(h * o * o * W), corners = take(h * o * W);
  }

  // The block in row `down` and column `across` of an operand with `height` blocks in a column.
  static float* at(float* operand, int64_t height, int64_t down, int64_t across) {
    return operand + (across * height + down) * W;
  }

  F mixed(F gradient, F momentum) const { return momentum - (momentum - gradient) * splat(float(1 - c.momentum)); }

  // Moves the momentum and returns the sum of the squares of what is to be made orthogonal; negative where a matrix of
  // a stack has no gradient.
  double begin(bool stacked) {
    const F share = splat(float(1 - c.momentum));
    double squares = 0;
    bool any = !stacked;
    const int64_t all = rows * columns;
    for (int64_t from = 0; from < all; from += 4096) {
      F sum{};
      I bits{};
      const int64_t to = least(all, from + 4096);
      for (int64_t k = from; k < to; k += LANES) {
        const int64_t n = least(LANES, to - k);
        const F gradient = load_some(g + k, n), before = load_some(m + k, n);
        const F momentum = before + share * (gradient - before), v = mixed(gradient, momentum);
        sum += v * v, bits |= (I)gradient & MAGNITUDE;
        store_some(m + k, momentum, n);
      }
      float sums[LANES];
      int32_t seen[LANES];
      store(sums, sum), store(seen, bits);
      for (int lane = 0; lane < LANES; ++lane) squares += sums[lane], any |= seen[lane] != 0;
    }
    return any ? squares : -1;
  }

  // Calls body(place in the matrix, place in a block, count) for the vectors of the block at (down, across) of X.
  template <class Body>
  void each_vector_of(int64_t down, int64_t across, Body body) const {
    const int64_t top = (tall ? across : down) * SIDE, left = (tall ? down : across) * SIDE;
    for (int64_t r = 0; r < least(SIDE, rows - top); ++r)
      for (int64_t k = 0; k < least(SIDE, columns - left); k += LANES)
        body((top + r) * columns + left + k, r * SIDE + k, least(LANES, columns - left - k));
  }

  void put_x(int64_t down, int64_t across, const float* upright, const float* transposed) {
    Word::put_left(upright, at(x_left, o, down, across));
    if (x_right != x_left) Word::put_right(upright, at(x_right, o, down, across));
    Word::put_right(transposed, at(xt_right, i, across, down));
  }

  void read(float scale) {
    for (int64_t down = 0; down < o; ++down)
      for (int64_t across = 0; across < i; ++across) {
        memset(block, 0, AREA * 4);
        each_vector_of(down, across, [&](int64_t from, int64_t to, int64_t n) {
          store(block + to, mixed(load_some(g + from, n), load_some(m + from, n)) * splat(scale));
        });
        transpose(block, turned);
        put_x(down, across, tall ? turned : block, tall ? block : turned);
      }
  }

  void multiply(const float* left, int64_t height, const float* right, int64_t blocks, float* out) {
    constexpr int64_t ROW = SIDE / Word::NUMBERS;
    for (int64_t r = 0; r < SIDE; r += TILE) Word::tile(left + r * ROW, height * W, right, blocks, out + r * SIDE);
  }

  // A = X X^T
  void gram() {
    for (int64_t across = 0; across < o; ++across)
      for (int64_t down = 0; down <= across; ++down) {
        multiply(at(x_left, o, down, 0), o, at(xt_right, i, 0, across), i, block);
        put_symmetric(down, across, [&](const float* from, int64_t d, int64_t a) {
          Word::put_left(from, at(a_left, o, d, a));
          if (a_right != a_left) Word::put_right(from, at(a_right, o, d, a));
        });
      }
  }

  template <class Put>
  void put_symmetric(int64_t down, int64_t across, Put put) {
    put(block, down, across);
    if (down == across) return;
    transpose(block, turned);
    put(turned, across, down);
  }

  // P = b A + c A A
  void polynomial(float b, float c) {
    for (int64_t across = 0; across < o; ++across)
      for (int64_t down = 0; down <= across; ++down) {
        multiply(at(a_left, o, down, 0), o, at(a_right, o, 0, across), o, block);
        add(at(a_left, o, down, across), b, c, block);
        put_symmetric(down, across, [&](const float* from, int64_t d, int64_t a) {
          Word::put_left(from, at(p_left, o, d, a));
        });
      }
  }

  // product = b * block + c * product
  static void add(const float* left, float b, float c, float* product) {
    for (int64_t r = 0; r < SIDE; ++r)
      for (int64_t half = 0; half < 2; ++half) {
        float* here = product + r * SIDE + half * LANES;
        store(here, splat(b) * Word::get_left(left, r, half) + splat(c) * load<F>(here));
      }
  }

  // X <- a X + P X, or in the last iteration the parameters move by it.
  void apply(float a, bool last) {
    for (int64_t across = 0; across < i; ++across) {
      for (int64_t down = 0; down < o; ++down) {
        multiply(at(p_left, o, down, 0), o, at(x_right, o, 0, across), o, strip + down * AREA);
        add(at(x_left, o, down, across), a, 1, strip + down * AREA);
      }
      for (int64_t down = 0; down < o; ++down) {
        const float* upright = strip + down * AREA;
        if (!last || tall) transpose(upright, turned);
        if (last)
          move(down, across, tall ? turned : upright);
        else
          put_x(down, across, upright, turned);
      }
    }
  }

  void move(int64_t down, int64_t across, const float* by) {
    const F kept = splat(float(1 - c.lr * c.decay));
    const F step = splat(float(-c.lr * sqrt(tall ? double(rows) / columns : 1.0)));
    each_vector_of(down, across, [&](int64_t to, int64_t from, int64_t n) {
      store_some(p + to, load_some(p + to, n) * kept + step * load<F>(by + from), n);
    });
  }

  void decay() {
    const float kept = float(1 - c.lr * c.decay);
    for (int64_t k = 0; k < rows * columns; ++k) p[k] *= kept;
  }

  // W = (1 + c A)^-1 = Z^T Z, where Z is the inverse of Cholesky's factor L. An inverse without factors, as Gauss and Jordan
  // make it, is not exact enough where A has large and small singular values.
  void invert(float c_) {
    for (int64_t k = 0; k < o * o * W; ++k) w[k] = c_ * a_left[k];
    for (int64_t k = 0; k < o * SIDE; ++k) at(w, o, k / SIDE, k / SIDE)[k % SIDE * (SIDE + 1)] += 1;
    float* z = factor;  // Z, and Z^T above the diagonal; its own blocks on the diagonal turned are in `corners`
    const auto subtract = [&](const float* left, const float* right, int64_t blocks, float* from) {
      multiply(left, o, right, blocks, block);
      for (int64_t k = 0; k < AREA; k += LANES) store(from + k, load<F>(from + k) - load<F>(block + k));
    };
    for (int64_t k = 0; k < o; ++k) {  // L below the diagonal of W, L^T above it
      invert_factor(at(w, o, k, k), at(z, o, k, k));
      transpose(at(z, o, k, k), corners + k * W);
      for (int64_t i = k + 1; i < o; ++i) {
        multiply(at(w, o, i, k), o, corners + k * W, 1, block);
        memcpy(at(w, o, i, k), block, AREA * 4), transpose(block, at(w, o, k, i));
      }
      for (int64_t j = k + 1; j < o; ++j)
        for (int64_t i = j; i < o; ++i) subtract(at(w, o, i, k), at(w, o, k, j), 1, at(w, o, i, j));
    }
    for (int64_t k = 0; k < o; ++k)
      for (int64_t i = k + 1; i < o; ++i) {  // L Z = 1
        memset(strip, 0, AREA * 4);
        subtract(at(w, o, i, k), at(z, o, k, k), i - k, strip);
        multiply(at(z, o, i, i), o, strip, 1, at(z, o, i, k));
        transpose(at(z, o, i, k), at(z, o, k, i));
      }
    for (int64_t across = 0; across < o; ++across)
      for (int64_t down = 0; down <= across; ++down) {
        float* to = at(w, o, down, across);
        multiply(down == across ? corners + down * W : at(z, o, down, across), o, at(z, o, across, across), 1, to);
        if (across + 1 == o) continue;
        multiply(at(z, o, down, across + 1), o, at(z, o, across + 1, across), o - across - 1, block);
        for (int64_t k = 0; k < AREA; k += LANES) store(to + k, load<F>(to + k) + load<F>(block + k));
      }
  }

  // The inverse of Cholesky's factor of a block, by elimination: what turns the block into L^T turns 1 into it.
  static void invert_factor(float* x, float* out) {
    memset(out, 0, AREA * 4);
    for (int64_t k = 0; k < SIDE; ++k) out[k * (SIDE + 1)] = 1;
    for (int64_t k = 0; k < SIDE; ++k) {
      const float* pivot = x + k * SIDE;
      float* made = out + k * SIDE;
      for (int64_t r = k + 1; r < SIDE; ++r) {
        const F share = splat(x[r * SIDE + k] / pivot[k]);
        for (int64_t half = 0; half < SIDE; half += LANES) {
          float *a = x + r * SIDE + half, *b = out + r * SIDE + half;
          store(a, load<F>(a) - share * load<F>(pivot + half)), store(b, load<F>(b) - share * load<F>(made + half));
        }
      }
      const F scale = splat(1 / sqrtf(pivot[k]));
      for (int64_t half = 0; half < SIDE; half += LANES) store(made + half, load<F>(made + half) * scale);
    }
  }

  // X <- (a + b A) (1 + c A)^-1 X = b/c X + (a - b/c) (1 + c A)^-1 X, with A = X X^T of each X. A of the last X could follow
  // from that of the one before, by fewer products. But what is left of a small singular value cancels there.
  void halley() {
    for (int64_t k = 0; k < c.steps; ++k) {
      const double a = c.coefficients[3 * k], b = c.coefficients[3 * k + 1], d = c.coefficients[3 * k + 2];
      const float share = float(a - b / d);
      gram(), invert(float(d));
      for (int64_t across = 0; across < o; ++across)
        for (int64_t down = 0; down <= across; ++down) {
          float *from = at(w, o, down, across), *to = at(p_left, o, down, across);
          for (int64_t n = 0; n < AREA; ++n) to[n] = share * from[n];
          if (down < across) transpose(to, at(p_left, o, across, down));
        }
      apply(float(b / d), k == c.steps - 1);
    }
  }

  void run(bool stacked) {
    const double squares = begin(stacked);
    if (squares < 0) return decay();
    read(float(1 / (sqrt(squares) + 1e-7)));
    if constexpr (Word::NUMBERS == 1)
      if (c.rational) return halley();
    for (int64_t k = 0; k < c.steps; ++k) {
      gram(), polynomial(float(c.coefficients[3 * k + 1]), float(c.coefficients[3 * k + 2]));
      apply(float(c.coefficients[3 * k]), k == c.steps - 1);
    }
  }
};

template <class Word>
bool run_all(const MuonCall& c) {
  int64_t each = 0, matrices = 0;
  for (int64_t k = 0; k < c.pieces; ++k) {
    const int64_t numbers = Iteration<Word>(c, c.piece[k], 0, nullptr).numbers;
    each = numbers > each ? numbers : each, matrices += c.piece[k].count;
  }
  const int64_t threads = least(c.threads, matrices);
  float* memory = scratch_of(threads * each);
  if (memory == nullptr) return false;
  Team team(threads);
  team.each(matrices, [&](int64_t item, int64_t thread) {
    const MuonPiece* piece = c.piece;
    for (; item >= piece->count; ++piece) item -= piece->count;
    Iteration<Word>(c, *piece, item, memory + thread * each).run(piece->stacked != 0);
  });
  return true;
}

bool muon(const MuonCall& c) {
#if BF16_UNITS
  if (c.bf16 && !c.rational && __builtin_cpu_supports("avx512bf16")) return run_all<Bf16Word>(c);
#endif
  return run_all<Fp32Word>(c);
}

int64_t check(const MuonCall& c) {
  if (!sizes({c.pieces, c.steps}) || c.steps < 1 || c.steps > 100) return BAD_SHAPE;
  if (c.bf16 < 0 || c.bf16 > 1 || c.rational < 0 || c.rational > 1) return BAD_CALL;
  if (!within(c.piece, sizeof(MuonPiece), c.pieces) ||
      !within(c.coefficients, 24, c.steps))
    return OUT_OF_BOUNDS;
  for (int64_t k = 0; k < c.pieces; ++k) {
    const MuonPiece& piece = c.piece[k];
    if (piece.count < 0 || piece.rows < 1 || piece.columns < 1 || piece.rows > MOST_SIDE || piece.columns > MOST_SIDE)
      return BAD_SHAPE;
    if (!within(piece.p, 4, piece.count, piece.rows, piece.columns) ||
        !within(piece.g, 4, piece.count, piece.rows, piece.columns) ||
        !within(piece.m, 4, piece.count, piece.rows, piece.columns))
      return OUT_OF_BOUNDS;
  }
  return FINE;
}

}  // namespace

ENTRY(muon, MuonCall)
