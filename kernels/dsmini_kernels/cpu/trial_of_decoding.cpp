// The trial of the library for decoding.

#include "trial_of_experts.h"

extern "C" int64_t dsmini_linear(const LinearCall*, int64_t);
extern "C" int64_t dsmini_norms(const NormsCall*, int64_t);
extern "C" int64_t dsmini_attention(const AttentionCall*, int64_t);
extern "C" int64_t dsmini_grouped_attention(const GroupedAttentionCall*, int64_t);
extern "C" int64_t dsmini_compressed_attention(const CompressedAttentionCall*, int64_t);
extern "C" int64_t dsmini_stream_step(const StreamStepCall*, int64_t);
extern "C" int64_t dsmini_feed_forward(const FeedForwardCall*, int64_t);
extern "C" int64_t dsmini_blocks(const char*, int64_t);

namespace {

constexpr int64_t DIM = 45, ROOM = 150;

// Runs a call of a step alone, and twice as a step of many blocks.
template <class Call>
void run_step(Trial& trial, const char* name, int64_t kind, int64_t (*function)(const Call*, int64_t), const Call& call) {
  trial.run(name, function, call);
  char calls[2 * (sizeof(StepHeader) + sizeof(Call))];
  for (char* at = calls; at < calls + sizeof calls; at += sizeof(StepHeader) + sizeof(Call)) {
    const StepHeader header{kind, sizeof(Call)};
    memcpy(at, &header, sizeof header), memcpy(at + sizeof header, &call, sizeof call);
  }
  if (trial.failed == nullptr && dsmini_blocks(calls, sizeof calls) != FINE) trial.failed = "blocks";
}

void try_linear(Trial& trial, int64_t n, int64_t type, int64_t bf16) {
  const int64_t o = 37, i = 131, size = bf16 ? 2 : 4;
  Memory memory;
  LinearCall c{};
  c.threads = 1, c.n = n, c.bf16 = bf16;
  c.x = memory.bytes(n * i * size), c.y = memory.bytes(n * o * size), c.w = memory.matrix(o, i, type);
  trial.run("linear", dsmini_linear, c);
}

void try_norms(Trial& trial, int64_t n) {
  Memory memory;
  NormsCall c{};
  c.threads = 1, c.n = n, c.dim = 131, c.eps = 1e-6;
  c.x = memory.bytes(n * c.dim * 4), c.weight = memory.bytes(c.dim * 4), c.y = memory.bytes(n * c.dim * 4);
  trial.run("norms", dsmini_norms, c);
}

void fill_step(AttentionStep& c, Memory& memory, int64_t b, int64_t s, int64_t pairs, int64_t type, int64_t row) {
  c.threads = 1, c.b = b, c.s = s, c.dim = DIM;
  c.x = memory.bytes(b * s * DIM * 4), c.y = memory.bytes(b * s * DIM * 4);
  c.cos = memory.bytes(s * pairs * 4), c.sin = memory.bytes(s * pairs * 4), c.cos_sin_batch = 1;
  c.cache = memory.bytes(b * ROOM * row), c.cache_type = type, c.cache_row = row, c.room = ROOM;
  const Lent starts = memory.bytes(b * 8);
  for (int64_t i = 0; i < b; ++i) static_cast<int64_t*>(starts.data)[i] = ROOM - s - 40 * i;
  c.starts = starts;
}

void try_attention(Trial& trial, int64_t b, int64_t s, int64_t type, int64_t cache, int64_t q_rank, int64_t topk) {
  const int64_t heads = 3, nope = 21, rope = 6, latent = 133, value = 13, q_in = q_rank ? q_rank : DIM;
  const int64_t rows[] = {(latent + rope) * 4, (latent + rope) * 2, latent + 8 + 2 * rope};
  Memory memory;
  AttentionCall c{};
  fill_step(c, memory, b, s, rope / 2, cache, rows[cache]);
  c.heads = heads, c.nope = nope, c.rope = rope, c.latent = latent, c.value = value, c.q_rank = q_rank;
  c.norm = memory.bytes(DIM * 4), c.q_norm = memory.bytes(q_rank * 4), c.kv_norm = memory.bytes(latent * 4);
  if (q_rank) c.wq_a = memory.matrix(q_rank, DIM, type);
  c.wq_b = memory.matrix(heads * (nope + rope), q_in, type), c.wkv_a = memory.matrix(latent + rope, DIM, type);
  c.wkv_b = memory.matrix(heads * (nope + value), latent, type), c.wo = memory.matrix(DIM, heads * value, type);
  c.scale = 0.1, c.eps = c.q_eps = c.kv_eps = 1e-6;
  if (topk) {
    Indexer& index = c.index;
    index.heads = 3, index.width = 16, index.topk = topk, index.halves = cache % 2, index.eps = 1e-6;
    index.norm = memory.bytes(index.width * 4), index.bias = memory.bytes(index.width * 4);
    index.wq = memory.matrix(index.heads * index.width, q_in, type), index.wk = memory.matrix(index.width, DIM, type);
    index.weights = memory.matrix(index.heads, DIM, WEIGHT_FP32);
    c.index_cache_type = cache % 2, c.index_cache_row = index.width * NUMBER_BYTES[cache % 2];
    c.index_cache = memory.bytes(b * ROOM * c.index_cache_row);
  }
  run_step(trial, "attention", ATTENTION, dsmini_attention, c);
}

void try_grouped_attention(Trial& trial, int64_t b, int64_t s, int64_t type, int64_t cache, int64_t group) {
  const int64_t key_heads = 2, heads = key_heads * group, width = 22, value = 13;
  Memory memory;
  GroupedAttentionCall c{};
  fill_step(c, memory, b, s, width / 2, cache, key_heads * (width + value) * NUMBER_BYTES[cache]);
  c.key_heads = key_heads, c.group = group, c.width = width, c.value = value;
  c.norm = memory.bytes(DIM * 4), c.scale = 0.1, c.eps = 1e-6;
  c.wq = memory.matrix(heads * width, DIM, type), c.wk = memory.matrix(key_heads * width, DIM, type);
  c.wv = memory.matrix(key_heads * value, DIM, type), c.wo = memory.matrix(DIM, heads * value, type);
  run_step(trial, "grouped_attention", GROUPED_ATTENTION, dsmini_grouped_attention, c);
}

KeyRows key_rows(Memory& memory, int64_t b, int64_t count, int64_t type, int64_t width) {
  const bool fp4 = type == KEYS_FP4, fp8 = type == KEYS_FP8;
  const int64_t codes = fp4 ? width : fp8 ? width - 6 : 0, tile = fp4 ? 8 : fp8 ? 64 : 0, scales = tile ? divide_up(codes, tile) : 0;
  const int64_t rows[] = {4 * width, 2 * width, codes + scales + 2 * (width - codes), codes / 2 + scales};
  return {memory.bytes(b * count * rows[type]), type, count, count * rows[type], rows[type], codes, tile};
}

void try_compressed_attention(Trial& trial, int64_t b, int64_t s, int64_t weight, int64_t type, int64_t ratio, int64_t topk) {
  const int64_t heads = 6, width = type == KEYS_FP8 ? 96 : 37, rope = 6, rank = 13, q_rank = 19, places = 60, series = ratio == 4 ? 2 : 1;
  Memory memory;
  CompressedAttentionCall c{};
  c.threads = 1, c.b = b, c.s = s, c.dim = DIM, c.bf16 = type != KEYS_FP32, c.added = s % 2;
  c.x = memory.bytes(b * s * DIM * 4), c.y = memory.bytes(b * s * DIM * 4);
  c.positions = ROOM, c.cos = memory.bytes(ROOM * rope / 2 * 4), c.sin = memory.bytes(ROOM * rope / 2 * 4);
  const Lent starts = memory.bytes(b * 8), counts = memory.bytes(b * 8);
  for (int64_t i = 0; i < b; ++i)
    static_cast<int64_t*>(starts.data)[i] = ROOM - s - 40 * i, static_cast<int64_t*>(counts.data)[i] = s > i ? s - i : 1;
  c.starts = starts, c.counts = counts;
  c.heads = heads, c.width = width, c.rope = rope, c.q_rank = q_rank, c.groups = 2, c.rank = rank, c.window = 50;
  c.ratio = ratio, c.series = series, c.tile = type == KEYS_FP8 ? 64 : 0, c.key_tile = c.tile / 2, c.scale = 0.1, c.eps = c.q_eps = c.kv_eps = c.head_eps = 1e-6;
  c.norm = memory.bytes(DIM * 4), c.q_norm = memory.bytes(q_rank * 4), c.kv_norm = memory.bytes(width * 4), c.sink = memory.bytes(heads * 4);
  c.wq_a = memory.matrix(q_rank, DIM, weight), c.wq_b = memory.matrix(heads * width, q_rank, weight);
  c.wkv = memory.matrix(width, DIM, weight), c.wo_a = memory.matrix(2 * rank, heads / 2 * width, weight);
  c.wo_b = memory.matrix(DIM, 2 * rank, weight), c.latest = key_rows(memory, b, places, type, width);
  const auto fill = [&](CompressorWeights& w, BlockRows& rows, int64_t numbers, int64_t of_rows) {
    w.numbers = numbers, w.epsilon = 1e-6, w.weight = memory.bytes(numbers * 4), w.bias = memory.bytes(ratio * series * numbers * 4);
    w.wkv = memory.matrix(series * numbers, DIM, WEIGHT_FP32), w.wgate = memory.matrix(series * numbers, DIM, WEIGHT_FP32);
    rows.raw_places = series * ratio + 5, rows.raw = memory.bytes(b * rows.raw_places * 2 * series * numbers * 4);
    rows.made = key_rows(memory, b, ROOM / ratio, of_rows, numbers);
  };
  if (ratio) fill(c.compressor, c.entries, width, type);
  if (topk) {
    fill(c.key_compressor, c.keys, 16, type == KEYS_FP8 ? KEYS_FP4 : type);
    c.index_heads = 3, c.topk = topk, c.index_wq = memory.matrix(3 * 16, q_rank, weight), c.index_weights = memory.matrix(3, DIM, WEIGHT_FP32);
  }
  run_step(trial, "compressed_attention", COMPRESSED_ATTENTION, dsmini_compressed_attention, c);
}

void try_feed_forward(Trial& trial, int64_t n, int64_t type, int64_t experts) {
  const int64_t inter = experts && n == 2 ? 0 : 131, f = experts ? 19 : 0, k = experts ? 3 : 0, shared = type < WEIGHT_E2M1 ? type : WEIGHT_E4M3;
  Memory memory;
  FeedForwardCall c{};
  c.threads = 1, c.n = n, c.dim = DIM, c.inter = inter, c.experts = experts, c.expert_inter = f, c.k = k;
  c.groups = c.kept_groups = 2, c.score = n % SCORES, c.added = n % 2, c.limit = 10, c.normed = 1, c.eps = 1e-6, c.route_scale = 1;
  c.x = memory.bytes(n * DIM * 4), c.y = memory.bytes(n * DIM * 4), c.norm = memory.bytes(DIM * 4);
  c.gate = memory.bytes(experts * DIM * 4), c.bias = memory.bytes(experts * 4);
  c.indices = memory.bytes(n * k * 8), c.weights = memory.bytes(n * k * 4);
  c.scores = memory.bytes(n * experts * 4), c.counts = memory.bytes(experts * 8);
  if (inter) c.w1 = memory.matrix(inter, DIM, shared), c.w2 = memory.matrix(DIM, inter, shared), c.w3 = memory.matrix(inter, DIM, shared);
  if (experts && n == 7) {
    c.vocabulary = 2, c.tokens = memory.bytes(n * 8);
    c.table = memory.bytes(2 * k * 4);
  }
  if (experts) {
    c.e1 = memory.matrix(f, DIM, type, experts), c.e3 = memory.matrix(f, DIM, type, experts);
    c.e2 = memory.matrix(DIM, f, type, experts);
  }
  run_step(trial, "feed_forward", FEED_FORWARD, dsmini_feed_forward, c);
}

void try_streams(Trial& trial, int64_t n, int64_t streams, int64_t iterations) {
  const int64_t rows = streams * (iterations ? 2 + streams : 2);
  Memory memory;
  StreamStepCall c{};
  c.threads = 1, c.n = n, c.dim = DIM, c.streams = streams, c.iterations = iterations, c.eps = c.norm_eps = 1e-6;
  c.x = memory.bytes(n * streams * DIM * 4), c.y = memory.bytes(n * DIM * 4), c.post = memory.bytes(n * streams * 4);
  c.comb = memory.bytes(n * streams * streams * 4), c.fn = memory.bytes(rows * streams * DIM * 4);
  c.base = memory.bytes(rows * 4), c.scale = memory.bytes(12);
  for (const int64_t write : {0, 1}) c.write = write, run_step(trial, "stream_step", STREAM_STEP, dsmini_stream_step, c);
}

}  // namespace

const char* dsmini_try() {
  Trial trial;
  constexpr int64_t TOKENS[][2] = {{1, 1}, {2, 3}};
  for (int64_t type = 0; type < WEIGHT_TYPES; ++type) {
    for (const int64_t n : {1, 2, 7}) {
      for (const int64_t bf16 : {0, 1}) try_linear(trial, n, type, bf16), try_linear(trial, 40 * n, type, bf16);
      for (const int64_t experts : {0, 6}) try_feed_forward(trial, n, type, experts);
    }
    if (type >= WEIGHT_E2M1) continue;  // of experts and linear alone
    for (const auto& [b, s] : TOKENS) {
      for (const int64_t cache : {0, 1, 2})
        for (const int64_t q_rank : {0, 19})
          for (const int64_t topk : {0, 50, 150}) try_attention(trial, b, s, type, cache, q_rank, topk);
      for (const int64_t rows : {KEYS_FP32, KEYS_BF16, KEYS_FP8}) {
        for (const int64_t ratio : {0, 4, 20}) try_compressed_attention(trial, b, s, type, rows, ratio, 0);
        for (const int64_t topk : {7, 90}) try_compressed_attention(trial, b, s, type, rows, 4, topk);
      }
      for (const int64_t cache : {0, 1})
        for (const int64_t group : {1, 3}) try_grouped_attention(trial, b, s, type, cache, group);
    }
  }
  try_all_experts(trial);
  for (const int64_t n : {1, 2, 7}) {
    try_norms(trial, n);
    for (const int64_t iterations : {0, 3}) try_streams(trial, n, 4, iterations), try_streams(trial, n, MOST_STEP_STREAMS, iterations);
  }
  return trial.failed;
}
