// V4's attention in a decoding step, from hidden states to its output, or to the residual stream.
//
// New rows go to rings, whose places follow from positions alone: SLACK more than a window or an entry reads, so that the
// rows of a step overwrite none that it reads. A block that a new token completes becomes an entry from the raw rows of the
// ring, and an indexer's key in the same way. Then each token attends to the ring of the window, whose other rows are
// masked, and to all entries or those that its indexer chooses (entry_attention.h).

#include "entry.h"
#include "entry_attention.h"
#include "indexer.h"

namespace {

int64_t position_of(const CompressedAttentionCall& c, int64_t token) { return c.starts[token / c.s] + token % c.s; }
bool is_token(const CompressedAttentionCall& c, int64_t token) { return token % c.s < c.counts[token / c.s]; }
int64_t entries_of(const CompressedAttentionCall& c, int64_t sequence) {
  return c.ratio ? (c.starts[sequence] + c.counts[sequence]) / c.ratio : 0;
}
// Entries that a token sees.
int64_t seen_by(const CompressedAttentionCall& c, int64_t token) {
  return c.ratio ? least((position_of(c, token) + 1) / c.ratio, entries_of(c, token / c.s)) : 0;
}
int64_t raw_width(const CompressedAttentionCall& c, const CompressorWeights& w) { return 2 * c.series * w.numbers; }

// The memory of a call; sizes in numbers.
struct CompressedBuffers {
  int64_t tokens, most, queries, group, own, all = 0;  // most: entries of a sequence; group: numbers of a group of heads
  bool chosen, bf16;
  EntryAttentionCall attention;
  float *plain, *normed, *q_a, *q_in, *kv, *raw, *raw_keys, *q, *index_q, *index_weights, *grouped_in, *grouped, *out_in, *owned;
  char *q_heads, *attended;
  uint8_t *masked, *hidden;
  uint32_t* scores;
  int64_t* places;
  float* of_attention;

  CompressedBuffers(const CompressedAttentionCall& c, float* memory) : attention{} {
    tokens = c.b * c.s, queries = c.heads * c.width, group = queries / c.groups, most = 0;
    for (int64_t i = 0; i < c.b; ++i) most = larger(most, entries_of(c, i));
    chosen = c.index_heads > 0 && most > c.topk;
    const auto take = [&](int64_t numbers) {
      float* at = memory == nullptr ? nullptr : memory + all;
      all += round_up(numbers, 16);
      return at;
    };
    const auto take_bytes = [&](int64_t bytes) { return reinterpret_cast<uint8_t*>(take(divide_up(bytes, 4))); };
    const int64_t keys = c.key_compressor.numbers, heads = c.index_heads;
    plain = take(tokens * c.dim), normed = take(3 * tokens * padded(c.dim));
    q_a = take(tokens * c.q_rank), q_in = take(tokens * padded(c.q_rank)), kv = take(tokens * c.width);
    raw = take(tokens * raw_width(c, c.compressor)), raw_keys = take(tokens * raw_width(c, c.key_compressor));
    q = take(tokens * queries);
    index_weights = take(tokens * heads), index_q = take(chosen * tokens * heads * keys);
    scores = reinterpret_cast<uint32_t*>(take(chosen * tokens * round_up(most, SCORED)));
    places = reinterpret_cast<int64_t*>(take(chosen * 2 * tokens * c.topk));
    grouped_in = take(tokens * c.groups * padded(group)), grouped = take(tokens * c.groups * c.rank);
    out_in = take(tokens * padded(c.groups * c.rank));
    masked = take_bytes(tokens * c.latest.count), hidden = take_bytes((1 - chosen) * tokens * most);
    q_heads = reinterpret_cast<char*>(take(tokens * queries)), attended = reinterpret_cast<char*>(take(tokens * queries));
    own = larger(group, chosen * (index_panel_for(keys) + PANEL_KEYS * keys + c.topk));
    own = round_up(larger(own, 3 * larger(c.width, keys)), 16);
    owned = take(c.threads * own);
    describe(c);
    of_attention = memory == nullptr ? nullptr : memory + all;
    all += EntryBuffers(attention, nullptr).all;
  }

 private:
  void describe(const CompressedAttentionCall& c) {
    const auto lend = [](auto* data) { return Span<std::remove_pointer_t<decltype(data)>>{data, 0}; };
    EntryAttentionCall& a = attention;
    a.threads = c.threads, a.b = c.b, a.s = c.s, a.heads = c.heads, a.width = c.width, a.bf16 = c.bf16, a.scale = c.scale;
    bf16 = in_pairs(a), a.bf16 = bf16;  // without such products numbers stay FP32
    a.q = {q_heads, 0}, a.out = lend(attended), a.sink = c.sink;
    a.near = c.latest, a.entries = c.entries.made, a.entries.count = most;
    a.masked = {masked, 0}, a.hidden = {hidden, 0}, a.masked_batch = a.hidden_batch = c.b;
    if (!chosen) return;
    a.k = c.topk;
    static const int64_t somewhere = 0;  // while sizes are found
    a.chosen = {places == nullptr ? &somewhere : places, 0};
  }
};

// A product of all tokens, of which `items` items are parts.
struct Product {
  const Matrix* w;
  const float* x;
  int64_t stride;
  float* out;
  int64_t out_stride;
};

// Makes all products, and then calls other(item, thread) for `others` items, in one phase.
template <int64_t N, class Other>
void multiply_all(const CompressedAttentionCall& c, Team& team, const Product (&all)[N], int64_t others, Other other) {
  int64_t ends[N], items = 0;
  for (int64_t i = 0; i < N; ++i) ends[i] = items += all[i].w->none() ? 0 : items_of(*all[i].w, c.threads);
  team.each(items + others, [&](int64_t item, int64_t thread) {
    if (item >= items) return other(item - items, thread);
    int64_t i = 0;
    while (item >= ends[i]) ++i;
    const Product& p = all[i];
    product_item(*p.w, c.threads, item - (i ? ends[i - 1] : 0), p.x, p.stride, c.b * c.s, p.out, p.out_stride);
  });
}

// The numbers as they are after a row in codes was written and read.
void round_as(int64_t type, int64_t codes, int64_t tile, float* x, int64_t width, float* memory) {
  const KeyRows rows{{}, type, 1, 0, 0, codes, tile};
  encode_key(rows, x, width, reinterpret_cast<char*>(memory));
  decode_key(rows, reinterpret_cast<char*>(memory), width, x);
}
// An indexer's query or key, rotated and transformed.
void turn(const CompressedAttentionCall& c, int64_t position, float* x, float* memory) {
  const int64_t n = c.key_compressor.numbers, angles = position * (c.rope / 2);
  rotate(x + n - c.rope, c.rope / 2, c.cos + angles, c.sin + angles);
  hadamard(x, n);
  if (c.key_tile) round_as(KEYS_FP4, n, least(c.key_tile, n), x, n, memory);
}
// A row of the window or an entry, rotated, in its place.
void put_row(const CompressedAttentionCall& c, const KeyRows& rows, int64_t sequence, int64_t place, int64_t position, float* x,
             float* memory) {
  const int64_t angles = position * (c.rope / 2);
  rotate(x + c.width - c.rope, c.rope / 2, c.cos + angles, c.sin + angles);
  if (c.tile) round_as(KEYS_FP8, c.width - c.rope, c.tile, x, c.width - c.rope, memory);
  encode_key(rows, x, c.width, rows.data + sequence * rows.batch + place * rows.row);
}

// The normed row of the block whose last token is at this position: a softmax of its raw rows, for each number.
void compress(const CompressedAttentionCall& c, const CompressorWeights& w, const BlockRows& rows, int64_t sequence, int64_t last,
              float* out) {
  const int64_t d = w.numbers, side = c.series * d;
  const float* raw = rows.raw + sequence * rows.raw_places * raw_width(c, w);
  for (int64_t at = 0; at < d; at += LANES) {
    const int64_t n = least(LANES, d - at);
    // calls body(content, weight) for all rows
    const auto each = [&](auto body) {
      for (int64_t i = 0; i < c.series; ++i)
        for (int64_t j = 0; j < c.ratio; ++j) {
          const int64_t position = last - (c.series - i) * c.ratio + 1 + j;
          if (position < 0) continue;  // the first block has none before it
          const float* row = raw + position % rows.raw_places * raw_width(c, w) + i * d + at;
          body(load_some(row, n), load_some(row + side, n) + load_some(w.bias + j * side + i * d + at, n));
        }
    };
    F top = splat(-INFINITY), total{}, mean{};
    each([&](F, F z) { top = larger(z, top); });
    each([&](F content, F z) {
      const F p = exponential(z - top);
      total += p, mean += p * content;
    });
    store_some(out + at, mean / total, n);
  }
  rms_norm(out, w.weight, d, w.epsilon, out);
}

// A new token's rows: of the window, and those of which entries and keys are made.
void store_token(const CompressedAttentionCall& c, const CompressedBuffers& m, int64_t i, float* memory) {
  const int64_t sequence = i / c.s, position = position_of(c, i);
  float *q_a = m.q_a + i * c.q_rank, *kv = m.kv + i * c.width;
  rms_norm(q_a, c.q_norm, c.q_rank, c.q_eps, q_a);
  arrange(q_a, c.q_rank, c.wq_b.type, m.q_in + i * padded(c.q_rank));
  for (int64_t h = 0; h < c.index_heads; ++h)
    m.index_weights[i * c.index_heads + h] /= sqrtf(float(c.index_heads * c.key_compressor.numbers));
  if (!is_token(c, i)) return;
  rms_norm(kv, c.kv_norm, c.width, c.kv_eps, kv);
  put_row(c, c.latest, sequence, position % c.latest.count, position, kv, memory);
  const auto put_raw = [&](const CompressorWeights& w, const BlockRows& rows, const float* raw) {
    const int64_t n = raw_width(c, w);
    if (n) memcpy(rows.raw + (sequence * rows.raw_places + position % rows.raw_places) * n, raw + i * n, n * 4);
  };
  put_raw(c.compressor, c.entries, m.raw), put_raw(c.key_compressor, c.keys, m.raw_keys);
}

// The entry, and with `key` the indexer's key, of the block that a token completes.
void store_block(const CompressedAttentionCall& c, int64_t i, bool key, float* memory) {
  const int64_t position = position_of(c, i), first = position + 1 - c.ratio, place = position / c.ratio;
  if (!is_token(c, i) || (position + 1) % c.ratio != 0) return;
  float* row = memory + larger(c.width, c.key_compressor.numbers);
  if (!key) {
    compress(c, c.compressor, c.entries, i / c.s, position, row);
    return put_row(c, c.entries.made, i / c.s, place, first, row, memory);
  }
  const KeyRows& keys = c.keys.made;
  compress(c, c.key_compressor, c.keys, i / c.s, position, row);
  turn(c, first, row, memory);
  encode_key(keys, row, c.key_compressor.numbers, keys.data + i / c.s * keys.batch + place * keys.row);
}

// The entries that each token chooses: the scores of all that it sees, then the largest.
void choose(const CompressedAttentionCall& c, const CompressedBuffers& m, Team& team) {
  const KeyRows& keys = c.keys.made;
  const int64_t width = c.key_compressor.numbers, room = round_up(m.most, SCORED), pieces = room / SCORED;
  team.each(c.b * pieces, [&](int64_t item, int64_t thread) {
    const int64_t sequence = item / pieces, from = item % pieces * SCORED, end = least(entries_of(c, sequence), from + SCORED);
    float *panel = m.owned + thread * m.own, *decoded = panel + index_panel_for(width);
    for (int64_t at = from; at < end; at += PANEL_KEYS) {
      const int64_t some = least(PANEL_KEYS, end - at), vectors = divide_up(some, LANES);
      const char* stored = keys.data + sequence * keys.batch + at * keys.row;
      prefetch(stored + PANEL_KEYS * keys.row, least(PANEL_KEYS, end - at - some) * keys.row);
      const bool codes = keys.type >= KEYS_FP8;
      for (int64_t t = 0; codes && t < some; ++t) decode_key(keys, stored + t * keys.row, width, decoded + t * width);
      const char* rows = codes ? reinterpret_cast<char*>(decoded) : stored;
      const int64_t apart = codes ? 4 * width : keys.row;
      with_keys(keys.type == KEYS_BF16, [&](auto words) {
        using Words = decltype(words);
        pack<Words>(keys.type == KEYS_BF16, width, some, vectors, [&](int64_t t) { return rows + t * apart; }, panel);
        for (int64_t i = sequence * c.s; i < (sequence + 1) * c.s; ++i) {
          const auto q_of = [&](int64_t h) { return reinterpret_cast<const char*>(m.index_q + (i * c.index_heads + h) * width); };
          score_panel<Words>(panel, vectors, width, c.index_heads, q_of, m.index_weights + i * c.index_heads, m.scores + i * room + at);
        }
      });
    }
  });
  team.each(m.tokens, [&](int64_t i, int64_t thread) {
    const int64_t seen = seen_by(c, i);
    int32_t* list = reinterpret_cast<int32_t*>(m.owned + thread * m.own);
    int64_t* places = m.places + i * c.topk;
    if (seen > c.topk) select_largest(m.scores + i * room, seen, c.topk, list);
    for (int64_t k = 0; k < c.topk; ++k) places[k] = seen > c.topk ? list[k] : k < seen ? k : -1;
  });
}

// Hides from a token the rows of the ring that are not in its window, and the entries with a later token.
void mask(const CompressedAttentionCall& c, const CompressedBuffers& m, int64_t i) {
  const int64_t sequence = i / c.s, position = position_of(c, i), last = c.starts[sequence] + c.counts[sequence] - 1;
  const int64_t ring = c.latest.count, seen = seen_by(c, i);
  for (int64_t place = 0; place < ring; ++place) {
    const int64_t at = last - (last - place + ring) % ring;
    m.masked[i * ring + place] = at < 0 || at > position || at <= position - c.window;
  }
  for (int64_t t = 0; !m.chosen && t < m.most; ++t) m.hidden[i * m.most + t] = t >= seen;
}

void step(const CompressedAttentionCall& c, const CompressedBuffers& m) {
  Team team(c.threads);
  const int64_t wide = padded(c.dim), number = m.bf16 ? 2 : 4, group_wide = padded(m.group);
  const float *for_kv = m.normed + m.tokens * wide, *for_fp32 = for_kv + m.tokens * wide;
  const auto own = [&](int64_t thread) { return m.owned + thread * m.own; };
  // 1. the normed x, in the order of each weight that reads it; the masks
  team.each(m.tokens, [&](int64_t i, int64_t) {
    float* normed = m.plain + i * c.dim;
    rms_norm(c.x + i * c.dim, c.norm, c.dim, c.eps, normed);
    arrange(normed, c.dim, c.wq_a.type, m.normed + i * wide);
    arrange(normed, c.dim, c.wkv.type, m.normed + (m.tokens + i) * wide);
    arrange(normed, c.dim, WEIGHT_FP32, m.normed + (2 * m.tokens + i) * wide);
    mask(c, m, i);
  });
  // 2. the compressed query, the row of the window, the raw rows of compressors, the weights of the indexer's heads
  const int64_t raw = raw_width(c, c.compressor), raw_keys = raw_width(c, c.key_compressor);
  const Product down[] = {{&c.wq_a, m.normed, wide, m.q_a, c.q_rank},
                          {&c.wkv, for_kv, wide, m.kv, c.width},
                          {&c.compressor.wkv, for_fp32, wide, m.raw, raw},
                          {&c.compressor.wgate, for_fp32, wide, m.raw + raw / 2, raw},
                          {&c.key_compressor.wkv, for_fp32, wide, m.raw_keys, raw_keys},
                          {&c.key_compressor.wgate, for_fp32, wide, m.raw_keys + raw_keys / 2, raw_keys},
                          {&c.index_weights, for_fp32, wide, m.index_weights, c.index_heads}};
  multiply_all(c, team, down, 0, [](int64_t, int64_t) {});
  // 3. norms, and what is stored of each token
  team.each(m.tokens, [&](int64_t i, int64_t thread) { store_token(c, m, i, own(thread)); });
  // 4. queries of all heads, also of the indexer; entries and keys of the blocks that are complete
  const Matrix none{};
  const int64_t index = c.index_heads * c.key_compressor.numbers;
  const Product up[] = {{&c.wq_b, m.q_in, padded(c.q_rank), m.q, m.queries},
                        {m.chosen ? &c.index_wq : &none, m.q_in, padded(c.q_rank), m.index_q, index}};
  multiply_all(c, team, up, c.ratio ? m.tokens * (c.index_heads ? 2 : 1) : 0,
               [&](int64_t item, int64_t thread) { store_block(c, item % m.tokens, item >= m.tokens, own(thread)); });
  // 5. queries: normed, rotated
  team.each(m.tokens * (c.heads + (m.chosen ? c.index_heads : 0)), [&](int64_t item, int64_t thread) {
    const int64_t keys = c.key_compressor.numbers, other = item - m.tokens * c.heads;
    if (other >= 0) return turn(c, position_of(c, other / c.index_heads), m.index_q + other * keys, own(thread));
    const int64_t angles = position_of(c, item / c.heads) * (c.rope / 2);
    float* q = m.q + item * c.width;
    rms_norm(q, nullptr, c.width, c.head_eps, q);
    rotate(q + c.width - c.rope, c.rope / 2, c.cos + angles, c.sin + angles);
    encode_numbers(m.bf16 ? CACHE_BF16 : CACHE_FP32, q, c.width, m.q_heads + item * c.width * number);
  });
  // 6. attention
  if (m.chosen) choose(c, m, team);
  attend_entries(m.attention, EntryBuffers(m.attention, m.of_attention), team);
  // 7. rotated back; the products of each group of heads, and of all
  team.each(m.tokens * c.groups, [&](int64_t item, int64_t thread) {
    const int64_t i = item / c.groups, g = item % c.groups, angles = position_of(c, i) * (c.rope / 2);
    float* numbers = own(thread);
    decode_numbers(m.bf16 ? CACHE_BF16 : CACHE_FP32, m.attended + (i * m.queries + g * m.group) * number, m.group, numbers);
    for (int64_t h = c.width - c.rope; h < m.group; h += c.width) rotate_back(numbers + h, c.rope / 2, c.cos + angles, c.sin + angles);
    arrange(numbers, m.group, c.wo_a.type, m.grouped_in + (g * m.tokens + i) * group_wide);
  });
  const int64_t rows = rows_of_item(c.rank, c.threads), pieces = divide_up(c.rank, rows), ranks = c.groups * c.rank;
  team.each(c.groups * pieces, [&](int64_t item, int64_t) {
    const int64_t g = item / pieces, from = g * c.rank + item % pieces * rows, to = least((g + 1) * c.rank, from + rows);
    product(c.wo_a, from, to, m.grouped_in + g * m.tokens * group_wide, group_wide, m.tokens, m.grouped + from, ranks);
  });
  team.each(m.tokens, [&](int64_t i, int64_t) { arrange(m.grouped + i * ranks, ranks, c.wo_b.type, m.out_in + i * padded(ranks)); });
  team.each(items_of(c.wo_b, c.threads), [&](int64_t item, int64_t) {
    product_item(c.wo_b, c.threads, item, m.out_in, padded(ranks), m.tokens, c.y, c.dim,
                 c.added ? c.x.data : nullptr);
  });
}

bool compressed_attention(const CompressedAttentionCall& c) { return with_memory<CompressedBuffers>(c, step); }

bool fits(const CompressedAttentionCall& c, const CompressorWeights& w, const BlockRows& rows) {
  if (w.numbers == 0) return w.wkv.none() && w.wgate.none();
  const int64_t side = c.series * w.numbers;
  if (w.wkv.type != WEIGHT_FP32 || w.wgate.type != WEIGHT_FP32 || w.numbers < c.rope || rows.raw_places < 1) return false;
  for (int64_t i = 0; i < c.b; ++i) {  // no row that an entry reads may be overwritten, and each entry has a place
    const int64_t end = c.starts[i] + c.counts[i];
    if (rows.raw_places < least(c.series * c.ratio + c.s - 1, end) || entries_of(c, i) > rows.made.count) return false;
  }
  return w.wkv.fits(side, c.dim) && w.wgate.fits(side, c.dim) && within(w.bias, 4, c.ratio, side) && within(w.weight, 4, w.numbers) &&
         key_rows_fit(rows.made, c.b, w.numbers) && within(rows.raw, 4, c.b, rows.raw_places, 2 * side);
}

int64_t check(const CompressedAttentionCall& c) {
  if (!sizes({c.b, c.s, c.dim, c.heads, c.width, c.rope, c.q_rank, c.groups, c.rank, c.window, c.ratio, c.index_heads, c.topk}) ||
      !sizes({c.compressor.numbers, c.key_compressor.numbers, c.positions, c.entries.raw_places, c.keys.raw_places, c.tile, c.key_tile}))
    return BAD_SHAPE;
  if (c.b < 1 || c.s < 1 || c.b * c.s > MOST_TOKENS || c.dim < 1 || c.heads < 1 || c.heads > MOST_STACK || c.width < 1 ||
      c.width > MOST_WIDTH || c.rope % 2 != 0 || c.rope > c.width || c.q_rank < 1 || c.groups < 1 || c.heads % c.groups != 0 ||
      c.rank < 1 || c.window < 1 || c.latest.count < 1)
    return BAD_SHAPE;
  const int64_t keys = c.key_compressor.numbers;
  if (c.series < 1 || c.series > 2 || c.bf16 < 0 || c.bf16 > 1 || c.added < 0 || c.added > 1 || c.key_tile % 2 ||
      c.compressor.numbers != (c.ratio ? c.width : 0) || (c.index_heads > 0) != (keys > 0) || (c.index_heads && !c.ratio))
    return BAD_CALL;
  if (c.index_heads && (c.topk < 1 || keys > MOST_WIDTH || keys < 2 || (keys & (keys - 1)) != 0 || c.index_heads > MOST_STACK ||
                        c.index_wq.type != c.wq_b.type || c.index_weights.type != WEIGHT_FP32))
    return BAD_SHAPE;
  if (!within(c.starts, 8, c.b) || !within(c.counts, 8, c.b)) return OUT_OF_BOUNDS;
  for (int64_t i = 0; i < c.b; ++i)
    if (c.starts[i] < 0 || c.counts[i] < 0 || c.counts[i] > c.s || c.starts[i] > c.positions - c.s || c.positions > INT32_MAX ||
        c.latest.count < least(c.window + c.s - 1, c.starts[i] + c.counts[i]))
      return OUT_OF_BOUNDS;
  const int64_t queries = c.heads * c.width, ranks = c.groups * c.rank;
  if (!c.wq_a.fits(c.q_rank, c.dim) || !c.wq_b.fits(queries, c.q_rank) || !c.wkv.fits(c.width, c.dim) ||
      !c.wo_a.fits(ranks, queries / c.groups) || !c.wo_b.fits(c.dim, ranks) ||
      !(c.index_heads ? c.index_wq.fits(c.index_heads * keys, c.q_rank) && c.index_weights.fits(c.index_heads, c.dim)
                      : c.index_wq.none() && c.index_weights.none()))
    return OUT_OF_BOUNDS;
  if (!within(c.x, 4, c.b, c.s, c.dim) || !within(c.y, 4, c.b, c.s, c.dim) || !within(c.norm, 4, c.dim) ||
      !within(c.q_norm, 4, c.q_rank) || !within(c.kv_norm, 4, c.width) || !within(c.sink, 4, c.heads) ||
      !within(c.cos, 4, c.positions, c.rope / 2) || !within(c.sin, 4, c.positions, c.rope / 2) ||
      !key_rows_fit(c.latest, c.b, c.width) || !fits(c, c.compressor, c.entries) || !fits(c, c.key_compressor, c.keys))
    return OUT_OF_BOUNDS;
  return FINE;
}

}  // namespace

ENTRY(compressed_attention, CompressedAttentionCall)
