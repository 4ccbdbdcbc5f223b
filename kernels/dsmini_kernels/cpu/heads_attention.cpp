// Attention of many queries to the keys and values of every head: in training, forward and backward, and of prompts. An
// item is a block of queries of a head, or in backward a whole head. No logits of more than KEYS keys exist at a time.
//
// Queries are the columns of panels (panels.h), so that largest logits and sums are vectors. Rows of keys, and values
// turned round, are multiplied with them. With p = exp(scale k q - lse), y = sum p v, and dy the gradient of y:
//
//     ds = scale p (v dy - y dy),  dq = sum over keys of ds k,  dk = sum over queries of ds q,  dv = sum of p dy
//
// lse, the logarithm of the sum of exponentials, and y are kept by forward; p is made again. Of the last three sums, keys
// are the rows of the second and third, and their panels are queries as they lie, a block at a time.

#include "activations.h"
#include "panels.h"
#include "entry.h"

#include <float.h>

namespace {

constexpr int64_t WIDTH = MOST_VECTORS * LANES;             // of a panel
constexpr int64_t PANELS = BYTES == 64 ? 2 : 4, QUERIES = PANELS * WIDTH;  // of a block
constexpr int64_t KEYS = 64;                                // at a time; a multiple of LANES

// A panel's queries of a block, and how many of KEYS keys they see.
struct QueryPanel {
  int64_t number, first, count, vectors;
};

// A thread's work on a head.
struct Head {
  const HeadsAttentionCall& c;
  const int64_t size, t_row;  // bytes of a number; keys in whole blocks
  float *q, *dy, *y, *dq;     // panels of a block: [width, WIDTH] each, one after the other
  float *q_rows, *dy_rows;    // the same queries as they lie, cut into panels of columns
  float *keys, *values;       // backward: keys turned round, [d, t_row]; forward: keys and turned values of KEYS keys
  float *weights, *ds;        // panels [KEYS, WIDTH]
  float *weight_rows, *ds_rows;  // [KEYS, QUERIES]
  float *high, *total;        // of each query; in backward lse and y dy
  float* result;              // of a product
  int64_t all = 0;

  Head(const HeadsAttentionCall& call, float* memory) : c(call), size(call.bf16 ? 2 : 4), t_row(round_up(call.t, KEYS)) {
    const auto take = [&](int64_t numbers) {
      float* at = memory == nullptr ? nullptr : memory + all;
      all += round_up(numbers, 16);
      return at;
    };
    const int64_t d = round_up(c.d, LANES), v = round_up(c.v, LANES), wide = d > v ? d : v, back = c.backward;
    q = take(d * QUERIES), y = take(v * QUERIES), dy = take(back * v * QUERIES), dq = take(back * d * QUERIES);
    q_rows = take(back * columns_of(c.d) * QUERIES), dy_rows = take(back * columns_of(c.v) * QUERIES);
    keys = take(back ? d * t_row : KEYS * d), values = take(back ? 0 : v * KEYS);
    weights = take(KEYS * WIDTH), ds = take(back * KEYS * WIDTH);
    weight_rows = take(back * KEYS * QUERIES), ds_rows = take(back * KEYS * QUERIES);
    high = take(QUERIES), total = take(QUERIES), result = take((wide > KEYS ? wide : KEYS) * WIDTH);
  }

  static int64_t columns_of(int64_t width) { return Cut(width).panels * Cut(width).tokens; }

  // `count` rows that lie `stride` bytes apart, times a panel: [count, rounded up to four][vectors * LANES].
  static void times(const char* rows, int64_t stride, int64_t count, const float* panel, int64_t vectors, int64_t k,
                    float* out) {
    const auto row_of = [&](int64_t r) { return rows + least(r, count - 1) * stride; };
    strip<Fp32Words>(row_of, count, panel, vectors, k, 4 * stride, out);
  }
  static void times(const float* rows, int64_t stride, int64_t count, const float* panel, int64_t vectors, int64_t k,
                    float* out) {
    times(reinterpret_cast<const char*>(rows), 4 * stride, count, panel, vectors, k, out);
  }

  template <class Body>
  void each_panel(int64_t first, int64_t count, Body body) const {
    const Cut cut(count);
    for (int64_t n = 0; n < cut.panels; ++n) {
      const int64_t some = least(cut.tokens, count - n * cut.tokens);
      body(QueryPanel{n, first + n * cut.tokens, some, divide_up(some, LANES)});
    }
  }
  float* part(float* panels, const QueryPanel& p, int64_t width) const {
    return panels + p.number * round_up(width, LANES) * WIDTH;
  }

  // The number of keys of the block from `from` on that some query of a panel sees: all after it are masked.
  int64_t seen(const QueryPanel& p, int64_t b, int64_t from) const {
    const int64_t some = least(KEYS, c.t - from);
    if (c.causal) {
      const int64_t visible = p.first + p.count + c.t - c.s - from;
      return visible < 0 ? 0 : least(some, visible);
    }
    if (c.mask == nullptr) return some;
    for (int64_t n = some; n > 0; --n)
      for (int64_t i = 0; i < p.count; ++i)
        if (!row_of_mask(b, p.first + i)[from + n - 1]) return n;
    return 0;
  }
  const uint8_t* row_of_mask(int64_t b, int64_t query) const {
    return c.mask + ((c.mask_batch > 1 ? b : 0) * c.s + query) * c.t;
  }

  // Logits of n keys, with those that are masked at -inf.
  void hide(const QueryPanel& p, int64_t b, int64_t from, int64_t n, float* logits) const {
    const int64_t width = p.vectors * LANES;
    if (c.causal) {
      const int64_t last = p.first + c.t - c.s - from;  // key that the first query sees last
      I lane;
      UNROLL for (int l = 0; l < LANES; ++l) lane[l] = l;
      for (int64_t r = last + 1 > 0 ? last + 1 : 0; r < n; ++r)
        for (int64_t i = 0; i < width; i += LANES) {
          float* at = logits + r * width + i;
          store(at, lane + splat(int32_t(last + i)) < splat(int32_t(r)) ? splat(-INFINITY) : load<F>(at));
        }
    } else if (c.mask != nullptr) {
      for (int64_t i = 0; i < p.count; ++i) {
        const uint8_t* hidden = row_of_mask(b, p.first + i) + from;
        for (int64_t r = 0; r < n; ++r)
          if (hidden[r]) logits[r * width + i] = -INFINITY;
      }
    }
  }

  // A panel's sums after n more keys: the softmax goes on where it was.
  void add(const QueryPanel& p, int64_t n) const {
    const int64_t width = p.vectors * LANES;
    float *most = high + p.number * WIDTH, *sums = total + p.number * WIDTH, *out = part(y, p, c.v);
    F keep[MOST_VECTORS];
    for (int64_t v = 0; v < p.vectors; ++v) {
      const F before = load<F>(most + v * LANES), scale = splat(float(c.scale));
      F now = before, sum{};
      for (int64_t r = 0; r < n; ++r) now = larger(now, load<F>(weights + r * width + v * LANES) * scale);
      for (int64_t r = 0; r < n; ++r) {
        float* at = weights + r * width + v * LANES;
        const F weight = exponential(rounded_product(load<F>(at), scale) - now);
        sum += weight;
        store(at, weight);
      }
      keep[v] = exponential(before - now);
      store(most + v * LANES, now), store(sums + v * LANES, load<F>(sums + v * LANES) * keep[v] + sum);
    }
    times(values, KEYS, c.v, weights, p.vectors, n, result);
    for (int64_t r = 0; r < c.v; ++r)
      for (int64_t v = 0; v < p.vectors; ++v) {
        float* at = out + r * width + v * LANES;
        store(at, load<F>(at) * keep[v] + load<F>(result + r * width + v * LANES));
      }
  }

  // A panel, times a factor of each query if there are some, to rows of queries.
  void put_rows(const QueryPanel& p, const float* panel, int64_t columns, const F* factors, const Heads& to, int64_t b,
                int64_t h) const {
    for (int64_t v = 0; v < p.vectors; ++v)
      for (int64_t i = 0; i < columns; i += LANES) {
        F block[LANES];
        for (int64_t r = 0; r < LANES; ++r) {
          if (i + r < columns) {
            const F numbers_ = load<F>(panel + ((i + r) * p.vectors + v) * LANES);
            block[r] = factors == nullptr ? numbers_ : numbers_ * factors[v];
          } else {
            block[r] = F{};
          }
        }
        transpose(block);
        for (int64_t q_ = 0; q_ < least(LANES, p.count - v * LANES); ++q_)
          put(c.bf16, block[q_], least(LANES, columns - i), to.of(b, h, p.first + v * LANES + q_) + i * size);
      }
  }

  void pack_rows(const QueryPanel& p, const Heads& from, int64_t width, int64_t b, int64_t h, float* panel) const {
    pack<Fp32Words>(c.bf16, width, p.count, p.vectors, [&](int64_t i) { return from.of(b, h, p.first + i); }, panel);
  }

  // Columns of `count` rows turned round, to rows of FP32 numbers.
  void turn_rows(const Heads& from, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width, int64_t row,
                 float* out) const {
    for (int64_t r = 0; r < count; r += LANES)
      for (int64_t i = 0; i < width; i += LANES) {
        F block[LANES];
        for (int64_t k = 0; k < LANES; ++k)
          block[k] = r + k < count ? numbers(from.of(b, h, first + r + k), i, width) : F{};
        transpose(block);
        for (int64_t k = 0; k < least(LANES, width - i); ++k) store(out + (i + k) * row + r, block[k]);
      }
  }
  F numbers(const char* row, int64_t i, int64_t width) const {
    const int64_t n = least(LANES, width - i);
    if (!c.bf16) return load_some(reinterpret_cast<const float*>(row) + i, n);
    char some[2 * LANES] = {};
    if (n < LANES) memcpy(some, row + 2 * i, 2 * n);
    return Bf16::get(n < LANES ? some : row + 2 * i);
  }

  void forward(int64_t b, int64_t h, int64_t block) const {
    const int64_t first = block * QUERIES, count = least(QUERIES, c.s - first), group = h / (c.h / c.groups);
    each_panel(first, count, [&](const QueryPanel& p) { pack_rows(p, c.q, c.d, b, h, part(q, p, c.d)); });
    memset(y, 0, PANELS * round_up(c.v, LANES) * WIDTH * 4), memset(total, 0, QUERIES * 4);
    for (int64_t i = 0; i < QUERIES; ++i) high[i] = -FLT_MAX;  // so that a query without keys has 0 / 0
    for (int64_t from = 0; from < c.t; from += KEYS) {
      const int64_t some = least(KEYS, c.t - from);
      bool ready = false;
      each_panel(first, count, [&](const QueryPanel& p) {
        const int64_t n = seen(p, b, from);
        if (n == 0) return;
        if (!ready) turn_rows(c.v_rows, b, group, from, some, c.v, KEYS, values);
        if (!ready && c.bf16)
          for (int64_t r = 0; r < some; ++r)
            for (int64_t i = 0; i < c.d; i += LANES)
              store(keys + r * round_up(c.d, LANES) + i, numbers(c.k.of(b, group, from + r), i, c.d));
        ready = true;
        if (c.bf16)
          times(keys, round_up(c.d, LANES), n, part(q, p, c.d), p.vectors, c.d, weights);
        else
          times(c.k.of(b, group, from), c.k.row, n, part(q, p, c.d), p.vectors, c.d, weights);
        hide(p, b, from, n, weights);
        add(p, n);
      });
    }
    each_panel(first, count, [&](const QueryPanel& p) {
      F factors[MOST_VECTORS];
      for (int64_t v = 0; v < p.vectors; ++v) factors[v] = splat(1.0f) / load<F>(total + p.number * WIDTH + v * LANES);
      put_rows(p, part(y, p, c.v), c.v, factors, c.y, b, h);
      if (c.lse != nullptr)
        for (int64_t i = 0; i < p.count; ++i)
          c.lse[(b * c.h + h) * c.s + p.first + i] = high[p.number * WIDTH + i] + logf(total[p.number * WIDTH + i]);
    });
  }

  // Rows of a block as they lie, in panels of columns: [count, columns] each.
  void lay(const Heads& from, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width, float* out) const {
    const Cut cut(width);
    for (int64_t at = 0; at < width; at += cut.tokens)
      for (int64_t r = 0; r < count; ++r)
        for (int64_t i = 0; i < round_up(least(cut.tokens, width - at), LANES); i += LANES, out += LANES)
          store(out, load_some(reinterpret_cast<const float*>(from.of(b, h, first + r)) + at + i, width - at - i));
  }

  // Adds rows [n, count of the block's queries] times its rows to gradients of keys or values.
  void add_gradient(const float* rows, int64_t n, int64_t count, const float* panels, int64_t width, const Heads& to, int64_t b,
                    int64_t h, int64_t from) const {
    const Cut cut(width);
    for (int64_t at = 0; at < width; at += cut.tokens) {
      const int64_t some = least(cut.tokens, width - at), vectors = divide_up(some, LANES);
      times(rows, QUERIES, n, panels, vectors, count, result);
      panels += count * vectors * LANES;
      for (int64_t r = 0; r < n; ++r) {
        float* out = reinterpret_cast<float*>(to.of(b, h, from + r)) + at;
        for (int64_t i = 0; i < some; i += LANES)
          store_some(out + i, load_some(out + i, some - i) + load<F>(result + r * vectors * LANES + i), some - i);
      }
    }
  }

  void backward(int64_t b, int64_t h) const {
    turn_rows(c.k, b, h, 0, c.t, c.d, t_row, keys);
    for (int64_t r = 0; r < c.t; ++r) memset(c.dk.of(b, h, r), 0, c.d * 4), memset(c.dv.of(b, h, r), 0, c.v * 4);
    for (int64_t first = 0; first < c.s; first += QUERIES) {
      const int64_t count = least(QUERIES, c.s - first);
      lay(c.q, b, h, first, count, c.d, q_rows), lay(c.dy, b, h, first, count, c.v, dy_rows);
      memset(dq, 0, PANELS * round_up(c.d, LANES) * WIDTH * 4);
      each_panel(first, count, [&](const QueryPanel& p) {
        pack_rows(p, c.q, c.d, b, h, part(q, p, c.d)), pack_rows(p, c.dy, c.v, b, h, part(dy, p, c.v));
        pack_rows(p, c.y, c.v, b, h, part(y, p, c.v));
        const float *gradient = part(dy, p, c.v), *value = part(y, p, c.v), *kept = c.lse + (b * c.h + h) * c.s + p.first;
        for (int64_t v = 0; v < p.vectors; ++v) {
          F sum{};
          for (int64_t r = 0; r < c.v; ++r)
            sum += load<F>(gradient + (r * p.vectors + v) * LANES) * load<F>(value + (r * p.vectors + v) * LANES);
          store(total + p.number * WIDTH + v * LANES, sum);
          store(high + p.number * WIDTH + v * LANES, load_some(kept + v * LANES, p.count - v * LANES));
        }
      });
      for (int64_t from = 0; from < c.t; from += KEYS) {
        int64_t most = 0, queries = 0;
        each_panel(first, count, [&](const QueryPanel& p) {
          const int64_t n = seen(p, b, from);
          most = n > most ? n : most;
        });
        if (most == 0) continue;
        each_panel(first, count, [&](const QueryPanel& p) {
          gradients_of_keys(p, b, h, from, seen(p, b, from), most, queries);
          queries += p.count;
        });
        add_gradient(weight_rows, most, count, dy_rows, c.v, c.dv, b, h, from);
        add_gradient(ds_rows, most, count, q_rows, c.d, c.dk, b, h, from);
      }
      each_panel(first, count, [&](const QueryPanel& p) { put_rows(p, part(dq, p, c.d), c.d, nullptr, c.dq, b, h); });
    }
  }

  // p and ds of a panel for n keys, as rows of `most` keys from column `at` on; and dq.
  void gradients_of_keys(const QueryPanel& p, int64_t b, int64_t h, int64_t from, int64_t n, int64_t most, int64_t at) const {
    const int64_t width = p.vectors * LANES;
    for (int64_t r = n; r < most; ++r)
      for (float* rows : {weight_rows, ds_rows}) memset(rows + r * QUERIES + at, 0, p.count * 4);
    if (n == 0) return;
    times(c.k.of(b, h, from), c.k.row, n, part(q, p, c.d), p.vectors, c.d, weights);
    hide(p, b, from, n, weights);
    times(c.v_rows.of(b, h, from), c.v_rows.row, n, part(dy, p, c.v), p.vectors, c.v, ds);
    for (int64_t v = 0; v < p.vectors; ++v) {
      const F lse = load<F>(high + p.number * WIDTH + v * LANES), mean = load<F>(total + p.number * WIDTH + v * LANES);
      const F scale = splat(float(c.scale));
      for (int64_t r = 0; r < n; ++r) {
        float* here = ds + r * width + v * LANES;
        const F weight = exponential(rounded_product(load<F>(weights + r * width + v * LANES), scale) - lse);
        const F slope = weight * (load<F>(here) - mean) * scale;
        store(here, slope);
        const int64_t to = r * QUERIES + at + v * LANES, some = p.count - v * LANES;
        store_some(weight_rows + to, weight, some), store_some(ds_rows + to, slope, some);
      }
    }
    float* sums = part(dq, p, c.d);
    times(keys + from, t_row, c.d, ds, p.vectors, n, result);
    for (int64_t i = 0; i < c.d * width; i += LANES) store(sums + i, load<F>(sums + i) + load<F>(result + i));
  }
};

bool heads_attention(const HeadsAttentionCall& c) {
  const int64_t each = Head(c, nullptr).all, blocks = c.backward ? 1 : divide_up(c.s, QUERIES);
  float* memory = scratch_of(c.threads * each);
  if (memory == nullptr) return false;
  Team team(c.threads, Team::LONG);
  team.each(c.b * c.h * blocks, [&](int64_t item, int64_t thread) {
    const Head head(c, memory + thread * each);
    const int64_t b = item / blocks / c.h, h = item / blocks % c.h;
    c.backward ? head.backward(b, h) : head.forward(b, h, blocks - 1 - item % blocks);  // the longest first
  });
  return true;
}

int64_t check(const HeadsAttentionCall& c) {
  if (!sizes({c.b, c.h, c.groups, c.s, c.t, c.d, c.v, c.mask_batch}) || c.b < 1 || c.h < 1 || c.groups < 1 || c.h % c.groups ||
      c.s < 1 || c.t < 1 || c.t > INT32_MAX || c.d < 1 || c.v < 1 || c.d > MOST_SIDE || c.v > MOST_SIDE ||
      (c.causal && c.t < c.s) || (c.mask != nullptr && c.mask_batch != 1 && c.mask_batch != c.b))
    return BAD_SHAPE;
  if (c.bf16 < 0 || c.bf16 > 1 || c.backward < 0 || c.backward > 1 || c.causal < 0 || c.causal > 1) return BAD_CALL;
  if (c.backward && (c.bf16 || c.groups != c.h || c.lse == nullptr)) return BAD_CALL;
  const int64_t size = c.bf16 ? 2 : 4;
  bool fits = c.q.fit(c.b, c.h, c.s, c.d * size) && c.k.fit(c.b, c.groups, c.t, c.d * size) &&
              c.v_rows.fit(c.b, c.groups, c.t, c.v * size) && c.y.fit(c.b, c.h, c.s, c.v * size);
  if (c.backward)
    fits = fits && c.dy.fit(c.b, c.h, c.s, c.v * size) && c.dq.fit(c.b, c.h, c.s, c.d * size) &&
           c.dk.fit(c.b, c.h, c.t, c.d * size) && c.dv.fit(c.b, c.h, c.t, c.v * size);
  fits = fits && (c.lse == nullptr || within(c.lse, 4, c.b, c.h, c.s)) &&
         (c.mask == nullptr || within(c.mask, 1, c.mask_batch, c.s, c.t));
  return fits ? FINE : OUT_OF_BOUNDS;
}

}  // namespace

ENTRY(heads_attention, HeadsAttentionCall)
