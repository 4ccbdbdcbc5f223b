// The routed experts in training: forward keeps the results of w1 and w3, backward makes all gradients. An expert is an
// item of work. Token-expert pairs lie in slots, sorted by expert and then by token. In panels (panels.h) tokens are the columns; for
// the gradients of weights, sums over tokens, rows along the tokens are multiplied with panels of pairs of tokens.
//
// Of a pair with weight p, with g = w1 x, u = w3 x, s = silu(g), h = s u, and dy the gradient of its token's result:
//
//     dp = (w2^T dy) h,  dh = p w2^T dy,  du = dh s,  dg = dh u silu'(g),  dx = w1^T dg + w3^T du
//     dw1 = dg x^T,  dw3 = du x^T,  dw2 = p dy h^T,  each summed over the expert's tokens
//
// Where there is a limit, s is of the smaller of g and the limit, and h of u cut to it. dg and du are 0 outside of it.

#include "activations.h"
#include "panels.h"
#include "entry.h"

#include <utility>

namespace {

constexpr int64_t WIDTH = MOST_VECTORS * LANES;    // of a panel
constexpr int64_t AT_ONCE = 384 / WIDTH * WIDTH;  // columns of x and dy that are packed at once: panels side by side

// The slots of all token-expert pairs, and the rows of results by slot. Sizes in numbers.
struct Slots {
  int64_t all = 0, most = 0;  // numbers of memory; tokens of the expert with the most
  int64_t *token, *slot, *first;
  float *weight, *dp, *rows;

  Slots(const TrainedExpertsCall& c, float* memory) {
    const int64_t n_pairs = c.n * c.k;
    const auto take = [&](int64_t numbers) {
      float* at = memory == nullptr ? nullptr : memory + all;
      all += round_up(numbers, 16);
      return at;
    };
    token = reinterpret_cast<int64_t*>(take(2 * n_pairs)), slot = reinterpret_cast<int64_t*>(take(2 * n_pairs));
    first = reinterpret_cast<int64_t*>(take(2 * (c.experts + 2)));
    weight = take(n_pairs), dp = take(n_pairs), rows = take(n_pairs * c.dim);
  }

  void sort(const TrainedExpertsCall& c) {
    memset(first, 0, (c.experts + 2) * 8);
    int64_t* end = first + 1;  // while sorting, of the pairs so far
    for (int64_t i = 0; i < c.n * c.k; ++i) ++first[c.indices[i] + 2];
    for (int64_t e = 0; e < c.experts; ++e) first[e + 2] += first[e + 1];
    for (int64_t i = 0; i < c.n * c.k; ++i) {
      const int64_t to = end[c.indices[i]]++;
      token[to] = i / c.k, weight[to] = c.weights[i], slot[i] = to;
    }
  }
};

int64_t most_tokens(const TrainedExpertsCall& c, int64_t* counts) {
  memset(counts, 0, c.experts * 8);
  int64_t most = 0;
  for (int64_t i = 0; i < c.n * c.k; ++i) {
    const int64_t now = ++counts[c.indices[i]];
    most = now > most ? now : most;
  }
  return most;
}

// The sum of each token's rows, in the order of its choices, with or without weights, to where it stays.
void combine(const TrainedExpertsCall& c, const Slots& s, Team& team, bool weighted, bool bf16, char* out) {
  const int64_t size = bf16 ? 2 : 4;
  constexpr int64_t TOKENS = 16;
  team.each(divide_up(c.n, TOKENS), [&](int64_t item, int64_t) {
    for (int64_t t = item * TOKENS; t < least(c.n, (item + 1) * TOKENS); ++t)
      for (int64_t i = 0; i < c.dim; i += LANES) {
        F sum{};
        for (int64_t j = 0; j < c.k; ++j) {
          const F row = load_some(s.rows + s.slot[t * c.k + j] * c.dim + i, c.dim - i);
          sum += weighted ? row * splat(c.weights[t * c.k + j]) : row;
        }
        put(bf16, sum, least(LANES, c.dim - i), out + (t * c.dim + i) * size);
      }
  });
}

bool rounds(const TrainedExpertsCall& c) { return c.bf16 && c.limit == INFINITY; }  // its result to BF16

// A thread's work on one expert.
template <class Words>
struct Expert {
  static constexpr int64_t SIZE = Words::SIZE, NUMBERS = Words::NUMBERS;
  const TrainedExpertsCall& c;
  const Slots& s;
  int64_t most;           // tokens of any expert, in whole vectors
  int64_t m_row, f_row, t_row;  // numbers of a row along the model's width, along the expert's, along tokens
  char *into, *up, *out;  // forward: w1, w3, w2; backward: w1^T, w3^T, w2^T
  float *x, *hidden, *second;  // panels
  char *dg, *du, *h;           // [f, tokens]
  float *pairs, *turned;       // panels of [tokens, WIDTH] in words, side by side; a strip and its transpose
  int64_t all = 0;

  Expert(const TrainedExpertsCall& call, const Slots& slots, int64_t most_, float* memory)
      : c(call), s(slots), most(round_up(most_, LANES)), m_row(round_up(c.dim, UNIT)), f_row(round_up(c.inter, UNIT)),
        t_row(round_up(most, UNIT)) {
    const auto take = [&](int64_t numbers) {
      float* at = memory == nullptr ? nullptr : memory + all;
      all += round_up(numbers, 16);
      return at;
    };
    const auto rows = [&](int64_t count, int64_t row) { return reinterpret_cast<char*>(take(count * row * SIZE / 4)); };
    const int64_t f = round_up(c.inter, LANES), m = round_up(c.dim, LANES);
    into = c.backward ? rows(m, f_row) : rows(f, m_row), up = c.backward ? rows(m, f_row) : rows(f, m_row);
    out = c.backward ? rows(f, m_row) : rows(m, f_row);
    x = take(WIDTH * words_of<Words>(c.dim)), hidden = take(WIDTH * words_of<Words>(f));
    second = take(c.backward ? WIDTH * words_of<Words>(f) : 0);
    const int64_t along = c.backward ? f : 0;
    dg = rows(along, t_row), du = rows(along, t_row), h = rows(along, t_row);
    pairs = take(c.backward ? least(AT_ONCE, round_up(c.dim, WIDTH)) * words_of<Words>(most) : 0);
    turned = take(LANES * WIDTH);
  }

  void put_numbers(char* to, F v) const {
    if constexpr (SIZE == 4)
      store(to, v);
    else
      store(to, Bf16::put(v != v ? (F)splat(QUIET_NAN) : v, false));
  }

  // Rows of a weight [rows, columns] as tiles read them; zeros follow the last.
  void copy(const char* w, int64_t rows, int64_t columns, char* to, int64_t row) const {
    for (int64_t r = 0; r < round_up(rows, LANES); ++r)
      for (int64_t i = 0; i < row; i += LANES)
        put_numbers(to + (r * row + i) * SIZE,
                    r < rows && i < columns ? load_some(reinterpret_cast<const float*>(w) + r * columns + i, columns - i) : F{});
  }
  void copy_turned(const char* w, int64_t rows, int64_t columns, char* to, int64_t row) const {
    for (int64_t r = 0; r < row; r += LANES)
      for (int64_t i = 0; i < round_up(columns, LANES); i += LANES) {
        F block[LANES];
        for (int64_t k = 0; k < LANES; ++k)
          block[k] = r + k < rows && i < columns
                         ? load_some(reinterpret_cast<const float*>(w) + (r + k) * columns + i, columns - i)
                         : F{};
        transpose(block);
        for (int64_t k = 0; k < LANES; ++k) put_numbers(to + ((i + k) * row + r) * SIZE, block[k]);
      }
  }
  void prepare(int64_t e) const {
    const int64_t size = c.inter * c.dim * 4;
    const char *w1 = c.w1.data + e * size, *w2 = c.w2.data + e * size, *w3 = c.w3.data + e * size;
    if (c.backward) {
      copy_turned(w1, c.inter, c.dim, into, f_row), copy_turned(w3, c.inter, c.dim, up, f_row);
      copy_turned(w2, c.dim, c.inter, out, m_row);
    } else {
      copy(w1, c.inter, c.dim, into, m_row), copy(w3, c.inter, c.dim, up, m_row), copy(w2, c.dim, c.inter, out, f_row);
    }
  }

  // out[LANES][vectors * LANES] = rows `row` and on times a panel.
  void times(const char* rows, int64_t row, int64_t length, const float* panel, int64_t vectors, int64_t k, float* to) const {
    strip<Words>([&](int64_t r) { return rows + (row + r) * length * SIZE; }, LANES, panel, vectors, k, LANES * length * SIZE, to);
  }

  // Hidden numbers of LANES rows and all tokens of a vector, as words of a panel.
  void put_words(const F (&block)[LANES], float* panel, int64_t row, int64_t vectors, int64_t v) const {
    for (int64_t r = 0; r < LANES; r += NUMBERS) {
      float* to = panel + ((row + r) / NUMBERS * vectors + v) * LANES;
      if constexpr (NUMBERS == 2)
        store(to, word_of(block[r], block[r + 1]));
      else
        store(to, block[r]);
    }
  }

  void pack_tokens(const char* from, int64_t slot, int64_t count, int64_t vectors) const {
    pack<Words>(c.bf16, c.dim, count, vectors,
                [&](int64_t t) { return from + s.token[slot + t] * c.dim * (c.bf16 ? 2 : 4); }, x);
  }

  // Writes a strip, transposed, to rows of FP32 numbers by slot.
  void put_rows(const float* strip_of, int64_t vectors, int64_t count, int64_t slot, int64_t column) const {
    for (int64_t v = 0; v < vectors; ++v) {
      F block[LANES];
      turn(strip_of, vectors, v, block);
      for (int64_t t = 0; t < least(LANES, count - v * LANES); ++t)
        store_some(s.rows + (slot + v * LANES + t) * c.dim + column, block[t], c.dim - column);
    }
  }

  // Numbers of at most the limit; NaN stays NaN.
  F at_most(F x) const { return x > splat(float(c.limit)) ? splat(float(c.limit)) : x; }
  F of_size(F x) const { return at_most(x < splat(-float(c.limit)) ? splat(-float(c.limit)) : x); }

  void forward(int64_t e) const {
    const int64_t from = s.first[e], tokens = s.first[e + 1] - from, size = c.bf16 ? 2 : 4;
    if (tokens == 0) return;
    prepare(e);
    float g[LANES * WIDTH], u[LANES * WIDTH];
    const Cut cut(tokens);
    for (int64_t at = 0; at < tokens; at += cut.tokens) {
      const int64_t slot = from + at, count = least(cut.tokens, tokens - at), vectors = divide_up(count, LANES);
      pack_tokens(c.x, slot, count, vectors);
      for (int64_t row = 0; row < c.inter; row += LANES) {
        times(into, row, m_row, x, vectors, c.dim, g), times(up, row, m_row, x, vectors, c.dim, u);
        for (int64_t v = 0; v < vectors; ++v) {
          F hidden_rows[LANES], block[LANES];
          for (int64_t r = 0; r < LANES; ++r)
            hidden_rows[r] = silu(at_most(load<F>(g + (r * vectors + v) * LANES))) * of_size(load<F>(u + (r * vectors + v) * LANES));
          put_words(hidden_rows, hidden, row, vectors, v);
          for (const auto& kept : {std::pair<const float*, char*>(g, c.gate), {u, c.up}}) {
            turn(kept.first, vectors, v, block);
            for (int64_t t = 0; t < least(LANES, count - v * LANES); ++t)
              put(c.bf16, block[t], least(LANES, c.inter - row), kept.second + ((slot + v * LANES + t) * c.inter + row) * size);
          }
        }
      }
      for (int64_t row = 0; row < c.dim; row += LANES) {
        times(out, row, f_row, hidden, vectors, c.inter, g);
        put_rows(g, vectors, count, slot, row);
      }
    }
  }

  // LANES rows of f of what was kept, for the tokens of a vector.
  void kept(const char* from, int64_t slot, int64_t count, int64_t row, F (&block)[LANES]) const {
    const int64_t size = c.bf16 ? 2 : 4;
    for (int64_t t = 0; t < LANES; ++t)
      block[t] = t < count ? get(c.bf16, from + ((slot + t) * c.inter + row) * size, least(LANES, c.inter - row)) : F{};
    transpose(block);
  }

  void backward(int64_t e) const {
    const int64_t from = s.first[e], tokens = s.first[e + 1] - from;
    if (tokens == 0) {
      for (float* grad : {c.dw1, c.dw2, c.dw3}) memset(grad + e * c.inter * c.dim, 0, c.inter * c.dim * 4);
      return;
    }
    prepare(e);
    const Cut cut(tokens);
    for (int64_t at = 0; at < tokens; at += cut.tokens)
      backward_of_tokens(from + at, least(cut.tokens, tokens - at), at);
    // gradients of weights
    for (int64_t first = 0; first < c.dim; first += AT_ONCE) {
      const int64_t at = e * c.inter * c.dim;
      pack_pairs(c.x, from, tokens, first, false);
      each_panel(tokens, first, [&](const float* panel, int64_t column, int64_t width) {
        weight_gradient(dg, tokens, panel, c.dw1 + at + column, width);
        weight_gradient(du, tokens, panel, c.dw3 + at + column, width);
      });
      pack_pairs(c.dy, from, tokens, first, true);
      each_panel(tokens, first, [&](const float* panel, int64_t column, int64_t width) {
        turned_gradient(tokens, panel, c.dw2 + at + column * c.inter, width);
      });
    }
  }

  void backward_of_tokens(int64_t slot, int64_t count, int64_t at) const {
    const int64_t vectors = divide_up(count, LANES);
    float* result = turned;
    F dp[MOST_VECTORS] = {};
    pack_tokens(c.dy, slot, count, vectors);
    for (int64_t row = 0; row < c.inter; row += LANES) {
      times(out, row, m_row, x, vectors, c.dim, result);
      for (int64_t v = 0; v < vectors; ++v) {
        F g[LANES], u[LANES], grad_g[LANES], grad_u[LANES];
        const int64_t first = slot + v * LANES, some = least(LANES, count - v * LANES);
        kept(c.gate, first, some, row, g), kept(c.up, first, some, row, u);
        const F weight = load_some(s.weight + first, some);
        for (int64_t r = 0; r < LANES; ++r) {
          const F dy = load<F>(result + (r * vectors + v) * LANES), one = splat(1.0f);
          const F low = at_most(g[r]), middle = of_size(u[r]), limit = splat(float(c.limit));
          const F share = one / (one + exponential(-low)), swish = low * share, product = swish * middle;
          dp[v] += dy * product;
          const F dh = weight * dy;
          grad_u[r] = u[r] > limit ? F{} : u[r] < -limit ? F{} : dh * swish;
          grad_g[r] = g[r] > limit ? F{} : dh * middle * (share + swish * (one - share));
          const int64_t to = ((row + r) * t_row + at + v * LANES) * SIZE;
          put_numbers(dg + to, grad_g[r]), put_numbers(du + to, grad_u[r]), put_numbers(h + to, product);
        }
        put_words(grad_g, hidden, row, vectors, v), put_words(grad_u, second, row, vectors, v);
      }
    }
    for (int64_t v = 0; v < vectors; ++v) {
      float each[LANES];
      store(each, dp[v]);
      for (int64_t t = 0; t < least(LANES, count - v * LANES); ++t) s.dp[slot + v * LANES + t] = each[t];
    }
    float more[LANES * WIDTH];
    for (int64_t row = 0; row < c.dim; row += LANES) {
      times(into, row, f_row, hidden, vectors, c.inter, result), times(up, row, f_row, second, vectors, c.inter, more);
      for (int64_t i = 0; i < LANES * vectors * LANES; i += LANES) store(result + i, load<F>(result + i) + load<F>(more + i));
      put_rows(result, vectors, count, slot, row);
    }
  }

  // Calls body(panel of pairs, its first column of x, columns) for AT_ONCE columns.
  template <class Body>
  void each_panel(int64_t tokens, int64_t first, Body body) const {
    for (int64_t column = first; column < least(c.dim, first + AT_ONCE); column += WIDTH)
      body(pairs + (column - first) * words_of<Words>(tokens), column, least(WIDTH, c.dim - column));
  }

  // The panels of AT_ONCE columns of an expert's rows, times their weights if `weighted`. Rows lie anywhere, so long
  // pieces of them are read: those of a panel alone would be far apart.
  void pack_pairs(const char* rows, int64_t from, int64_t tokens, int64_t first, bool weighted) const {
    const int64_t size = c.bf16 ? 2 : 4;
    const auto numbers = [&](int64_t t, int64_t i) {
      if (t >= tokens) return F{};
      const F x_ = get(c.bf16, rows + (s.token[from + t] * c.dim + i) * size, least(LANES, c.dim - i));
      return weighted ? x_ * splat(s.weight[from + t]) : x_;
    };
    for (int64_t word = 0; word < words_of<Words>(tokens); ++word)
      each_panel(tokens, first, [&](float* panel, int64_t column, int64_t width) {
        float* to = panel + word * round_up(width, LANES);
        for (int64_t i = 0; i < width; i += LANES) {
          if constexpr (NUMBERS == 2)
            store(to + i, word_of(numbers(2 * word, column + i), numbers(2 * word + 1, column + i)));
          else
            store(to + i, numbers(word, column + i));
        }
      });
  }

  void weight_gradient(const char* rows, int64_t tokens, const float* panel, float* grad, int64_t width) const {
    const int64_t vectors = divide_up(width, LANES);
    for (int64_t row = 0; row < c.inter; row += LANES) {
      times(rows, row, t_row, panel, vectors, tokens, turned);
      for (int64_t r = 0; r < least(LANES, c.inter - row); ++r)
        memcpy(grad + (row + r) * c.dim, turned + r * vectors * LANES, width * 4);
    }
  }

  void turned_gradient(int64_t tokens, const float* panel, float* grad, int64_t width) const {
    const int64_t vectors = divide_up(width, LANES);
    for (int64_t row = 0; row < c.inter; row += LANES) {
      times(h, row, t_row, panel, vectors, tokens, turned);
      for (int64_t v = 0; v < vectors; ++v) {
        F block[LANES];
        turn(turned, vectors, v, block);
        for (int64_t i = 0; i < least(LANES, width - v * LANES); ++i)
          store_some(grad + (v * LANES + i) * c.inter + row, block[i], c.inter - row);
      }
    }
  }
};

template <class Words>
bool run_all(const TrainedExpertsCall& c) {
  const Slots sizes(c, nullptr);
  float* memory = scratch_of(sizes.all + 2 * c.experts + 16);
  if (memory == nullptr) return false;
  const int64_t most = most_tokens(c, reinterpret_cast<int64_t*>(memory + sizes.all));
  const int64_t each = round_up(Expert<Words>(c, sizes, most, nullptr).all, 16);
  memory = scratch_of(sizes.all + c.threads * each);
  if (memory == nullptr) return false;
  Slots s(c, memory);
  s.sort(c);
  Team team(c.threads, Team::LONG);
  team.each(c.experts, [&](int64_t e, int64_t thread) {
    const Expert<Words> expert(c, s, most, memory + sizes.all + thread * each);
    c.backward ? expert.backward(e) : expert.forward(e);
  });
  combine(c, s, team, !c.backward, c.backward ? c.bf16 : rounds(c), c.backward ? c.dx : c.y);
  if (c.backward)
    for (int64_t i = 0; i < c.n * c.k; ++i) c.dweights[i] = s.dp[s.slot[i]];
  return true;
}

bool trained_experts(const TrainedExpertsCall& c) {
#if BF16_UNITS
  if (c.bf16 && __builtin_cpu_supports("avx512bf16")) return run_all<Bf16Words>(c);
#endif
  return run_all<Fp32Words>(c);
}

int64_t check(const TrainedExpertsCall& c) {
  if (!sizes({c.n, c.dim, c.inter, c.experts, c.k}) || c.dim < 1 || c.inter < 1 || c.k < 1 || c.experts > MOST_STACK)
    return BAD_SHAPE;
  if (c.bf16 < 0 || c.bf16 > 1 || c.backward < 0 || c.backward > 1 || !(c.limit > 0)) return BAD_CALL;
  for (const Matrix* w : {&c.w1, &c.w2, &c.w3})
    if (w->type != WEIGHT_FP32 || w->stride != 4 * w->columns) return BAD_CALL;
  if (!c.w1.fits_stack(c.experts, c.inter, c.dim) || !c.w3.fits_stack(c.experts, c.inter, c.dim) ||
      !c.w2.fits_stack(c.experts, c.dim, c.inter))
    return OUT_OF_BOUNDS;
  const int64_t size = c.bf16 ? 2 : 4;
  if (!within(c.x, size, c.n, c.dim) || !within(c.indices, 8, c.n, c.k) ||
      !within(c.weights, 4, c.n, c.k) || !within(c.gate, size, c.n, c.k, c.inter) ||
      !within(c.up, size, c.n, c.k, c.inter))
    return OUT_OF_BOUNDS;
  if (c.backward ? !within(c.dy, size, c.n, c.dim) || !within(c.dx, size, c.n, c.dim) ||
                       !within(c.dweights, 4, c.n, c.k) ||
                       !within(c.dw1, 4, c.experts, c.inter, c.dim) ||
                       !within(c.dw2, 4, c.experts, c.inter, c.dim) ||
                       !within(c.dw3, 4, c.experts, c.inter, c.dim)
                 : !within(c.y, rounds(c) ? 2 : 4, c.n, c.dim))
    return OUT_OF_BOUNDS;
  return indices_fit(c.indices, c.n * c.k, c.experts) ? FINE : OUT_OF_BOUNDS;
}

}  // namespace

ENTRY(trained_experts, TrainedExpertsCall)
