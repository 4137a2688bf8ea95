// The C interface of the kernels, and every check that keeps them inside their arrays. One file is compiled.
//
//   lanes.h      sixteen float32 lanes, bfloat16, exponential
//   team.h       threads that share a job's phases
//   product.h    matrix products of a few rows
//   model.h      a base model's weights, KV cache and buffers
//   attention.h  rotation, cache, attention along a tree's paths
//   forward.h    one step of the base model
//   search.h     the drafter's beam search
//
// Sizes are checked at creation, and each row, node, slot and token of a call; the other files do not check them again.
// No PyTorch headers: it compiles in seconds and is loaded with ctypes.

#include "forward.h"
#include "search.h"

#define REQUIRE(condition, message) \
  do {                              \
    if (!(condition)) return message; \
  } while (false)

namespace {

// No exception crosses the interface.
template <class Call>
const char *guarded(Call call) {
  try {
    return call();
  } catch (const std::bad_alloc &) {
    return "not enough memory";
  } catch (const std::exception &) {
    return "not enough memory or threads";  // std::length_error, std::system_error
  }
}

bool holds(const RedrafterTensor &t, int64_t count) { return t.data && t.count == count; }
bool absent(const RedrafterTensor &t) { return !t.data && t.count == 0; }
bool may_hold(const RedrafterTensor &t, int64_t count) { return absent(t) || holds(t, count); }
bool holds_packed(const RedrafterTensor &t, int n, int k) { return holds(t, int64_t(padded(n)) * k); }
bool may_hold_packed(const RedrafterTensor &t, int n, int k) { return absent(t) || holds_packed(t, n, k); }

const bf16 *half(const RedrafterTensor &t) { return static_cast<const bf16 *>(t.data); }
const float *full(const RedrafterTensor &t) { return static_cast<const float *>(t.data); }

constexpr int64_t MAX_WIDTH = 1 << 24, MAX_VOCAB = 1 << 28, MAX_ROWS = 1 << 20, MAX_POSITIONS = 1 << 28;
constexpr int64_t MAX_PHASES = 1 << 24, MAX_CACHE = int64_t(1) << 60;

bool within(int64_t value, int64_t low, int64_t high) { return value >= low && value <= high; }

const char *check(const RedrafterConfig &c) {
  REQUIRE(within(c.hidden, LANES, MAX_WIDTH) && c.hidden % LANES == 0, "hidden must be a multiple of 16");
  REQUIRE(within(c.head_size, LANES, MAX_WIDTH) && c.head_size % LANES == 0, "head_size must be a multiple of 16");
  REQUIRE(within(c.intermediate, LANES, MAX_WIDTH) && c.intermediate % LANES == 0,
          "intermediate must be a multiple of 16");
  REQUIRE(within(c.heads, 1, MAX_WIDTH) && within(c.kv_heads, 1, c.heads) && c.heads % c.kv_heads == 0,
          "heads must be a multiple of kv_heads");
  REQUIRE(int64_t(c.heads + 2 * c.kv_heads) * c.head_size <= MAX_WIDTH, "too many heads");
  REQUIRE(within(c.layers, 1, 1 << 16), "layers are out of range");
  REQUIRE(within(c.vocab, 1, MAX_VOCAB), "vocab is out of range");
  REQUIRE(within(c.max_slots, 1, MAX_ROWS), "max_slots is out of range");
  REQUIRE(within(c.max_rows, 1, MAX_ROWS) && int64_t(c.max_rows) * c.kv_heads < INT32_MAX, "max_rows is out of range");
  REQUIRE(within(c.max_seq, LANES, MAX_POSITIONS) && c.max_seq % LANES == 0, "max_seq must be a multiple of 16");
  REQUIRE(c.threads >= 1, "threads must be at least 1");
  REQUIRE(std::isfinite(c.epsilon) && c.epsilon >= 0.0f, "epsilon must be a number from 0 on");
  const __int128 cache = __int128(c.layers) * c.max_slots * c.kv_heads * c.max_seq * c.head_size;
  REQUIRE(cache < MAX_CACHE, "not enough memory for the cache");
  return nullptr;
}

const char *check(const RedrafterConfig &c, const RedrafterLayer &l) {
  const int heads = (c.heads + 2 * c.kv_heads) * c.head_size, inner = c.heads * c.head_size;
  REQUIRE(holds_packed(l.qkv, heads, c.hidden), "qkv has another size");
  REQUIRE(holds_packed(l.dense, c.hidden, inner), "dense has another size");
  REQUIRE(holds_packed(l.gate, c.intermediate, c.hidden), "gate has another size");
  REQUIRE(holds_packed(l.up, c.intermediate, c.hidden), "up has another size");
  REQUIRE(holds_packed(l.down, c.hidden, c.intermediate), "down has another size");
  REQUIRE(holds(l.input_norm, c.hidden) && holds(l.post_norm, c.hidden), "a norm has another size");
  REQUIRE(may_hold(l.q_norm, c.head_size) && may_hold(l.k_norm, c.head_size), "q_norm or k_norm has another size");
  REQUIRE(absent(l.q_norm) == absent(l.k_norm), "q_norm and k_norm come together");
  REQUIRE(may_hold(l.qkv_bias, heads) && may_hold(l.dense_bias, c.hidden), "a bias has another size");
  return nullptr;
}

const char *check(const RedrafterConfig &c, const RedrafterEnds &e) {
  REQUIRE(holds(e.embedding, int64_t(c.vocab) * c.hidden), "the embedding has another size");
  REQUIRE(holds(e.final_norm, c.hidden), "the final norm has another size");
  REQUIRE(holds_packed(e.head, c.vocab, c.hidden), "the head has another size");
  const int64_t rotary = int64_t(c.max_seq) * (c.head_size / 2);
  REQUIRE(holds(e.cosine, rotary) && holds(e.sine, rotary), "a rotary table has another size");
  return nullptr;
}

const char *check(const RedrafterConfig &c, const RedrafterStep &s, const RedrafterRow &row) {
  REQUIRE(within(row.token, 0, c.vocab - 1), "a token is outside the vocabulary");
  REQUIRE(within(row.slot, 0, c.max_slots - 1), "a slot does not exist");
  REQUIRE(row.base >= 0 && row.depth >= 0 && row.node >= row.depth, "a row stands nowhere");
  REQUIRE(int64_t(row.base) + row.node < c.max_seq, "a row stands behind the cache's end");
  if (row.path < 0) {
    REQUIRE(row.depth == row.node, "a row without a path is not where its depth says");
    return nullptr;
  }
  REQUIRE(row.path < s.path_count && row.depth < s.path_width, "a path does not exist");
  const int32_t *path = s.paths + size_t(row.path) * s.path_width;
  for (int j = 0; j < row.depth; ++j) REQUIRE(within(path[j], 0, row.node), "a path leads behind its node");
  REQUIRE(path[row.depth] == row.node, "a path does not end in its node");
  return nullptr;
}

const char *check(const Model &m, const RedrafterStep &s) {
  REQUIRE(m.ends_set && std::all_of(m.layer_set.begin(), m.layer_set.end(), [](char set) { return set; }),
          "weights are missing");
  REQUIRE(within(s.count, 1, m.c.max_rows) && s.rows && s.hidden, "the number of rows is out of range");
  REQUIRE(s.path_count >= 0 && s.path_width >= 0 && (s.path_count == 0 || s.paths), "paths are missing");
  REQUIRE(within(s.logit_count, 0, m.c.max_rows) && (s.logit_count == 0 || (s.logit_rows && s.best)),
          "the number of logits is out of range");
  for (int i = 0; i < s.count; ++i)
    if (const char *wrong = check(m.c, s, s.rows[i])) return wrong;
  for (int i = 0; i < s.logit_count; ++i)
    REQUIRE(within(s.logit_rows[i], 0, s.count - 1), "logits are asked for a row that does not exist");
  return nullptr;
}

const char *check(const RedrafterConfig &c, const RedrafterDrafter &d) {
  REQUIRE(d.hidden == c.hidden, "the drafter has another hidden size");
  REQUIRE(within(d.width, 2, MAX_WIDTH) && d.width % 2 == 0, "exit_dim must be even");
  REQUIRE(within(d.layers, 0, 1 << 16), "layers are out of range");
  REQUIRE(within(d.max_rows, 1, MAX_ROWS), "max_rows is out of range");
  REQUIRE(d.head_rows > TOP && d.head_rows <= MAX_VOCAB, "the head must have more than 50 rows");
  const int h = d.hidden, e = d.width;
  REQUIRE(may_hold_packed(d.rnn_u, h, h) && may_hold_packed(d.rnn_w, h, h) && may_hold(d.rnn_bias, h),
          "a matrix of the RNN has another size");
  REQUIRE(absent(d.rnn_u) == absent(d.rnn_w) && absent(d.rnn_u) == absent(d.rnn_bias), "the RNN is incomplete");
  REQUIRE(may_hold_packed(d.input_proj, e, 2 * h) && may_hold(d.input_bias, e), "input_proj has another size");
  REQUIRE(absent(d.input_proj) == absent(d.input_bias), "input_proj needs its bias");
  REQUIRE(!absent(d.input_proj) || e == 2 * h, "without input_proj, exit_dim is twice the hidden size");
  REQUIRE(may_hold_packed(d.factor, h, e), "the factor has another size");
  REQUIRE(holds_packed(d.head, d.head_rows, absent(d.factor) ? e : h), "the drafter's head has another size");
  REQUIRE(may_hold(d.token_of_column, d.head_rows), "the draft vocabulary has another size");
  if (absent(d.token_of_column)) {
    REQUIRE(d.head_rows <= c.vocab, "the drafter's head has more rows than the vocabulary");
    return nullptr;
  }
  const auto *tokens = static_cast<const int64_t *>(d.token_of_column.data);
  for (int i = 0; i < d.head_rows; ++i)
    REQUIRE(within(tokens[i], 0, c.vocab - 1), "the draft vocabulary has a token outside the vocabulary");
  return nullptr;
}

const char *check(const Drafter &d, const RedrafterSearch &s) {
  REQUIRE(d.m->ends_set, "weights are missing");
  for (int layer = 0; layer < d.layers; ++layer) REQUIRE(d.biases[layer], "weights are missing");
  REQUIRE(s.context && s.first && s.tokens && s.paths, "an array is missing");
  REQUIRE(within(s.beams, 1, TOP), "the number of beams is out of range");
  REQUIRE(s.batch >= 1 && int64_t(s.batch) * s.beams <= d.max_rows, "the number of sequences is out of range");
  REQUIRE(int64_t(s.beams) * d.head.n < INT32_MAX, "too many beams for so large a head");
  REQUIRE(s.length >= 1 && search_phases(d, s.length) <= MAX_PHASES, "the draft length is out of range");
  for (int i = 0; i < s.batch; ++i)
    REQUIRE(within(s.first[i], 0, d.m->c.vocab - 1), "a token is outside the vocabulary");
  return nullptr;
}

}  // namespace

extern "C" {

const char *redrafter_isa() { return REDRAFTER_ISA; }

// [n, k] bfloat16, row-major -> packed.
const char *redrafter_pack(const RedrafterTensor *from, int32_t n, int32_t k, const RedrafterTensor *to) {
  REQUIRE(from && to && n >= 1 && k >= 2 && k % 2 == 0 && n < INT32_MAX - LANES, "a matrix has an odd or empty side");
  REQUIRE(holds(*from, int64_t(n) * k) && holds_packed(*to, n, k), "a matrix has another size");
  pack(half(*from), n, k, static_cast<bf16 *>(const_cast<void *>(to->data)));
  return nullptr;
}

const char *redrafter_create(const RedrafterConfig *config, Model **made) {
  return guarded([&]() -> const char * {
    REQUIRE(config && made, "an argument is missing");
    if (const char *wrong = check(*config)) return wrong;
    auto m = std::make_unique<Model>(*config);
    reserve(*m);
    *made = m.release();
    return nullptr;
  });
}

void redrafter_destroy(Model *m) { delete m; }

int32_t redrafter_threads(const Model *m) { return m ? m->team.size() : 0; }

const char *redrafter_set_layer(Model *m, int32_t layer, const RedrafterLayer *weights) {
  REQUIRE(m && weights && within(layer, 0, m->c.layers - 1), "there is no such layer");
  const RedrafterConfig &c = m->c;
  const RedrafterLayer &w = *weights;
  if (const char *wrong = check(c, w)) return wrong;
  m->team.settle();
  m->layers[layer] = {{half(w.qkv), (c.heads + 2 * c.kv_heads) * c.head_size, c.hidden},
                      {half(w.dense), c.hidden, c.heads * c.head_size},
                      {half(w.gate), c.intermediate, c.hidden},
                      {half(w.up), c.intermediate, c.hidden},
                      {half(w.down), c.hidden, c.intermediate},
                      half(w.input_norm),
                      half(w.post_norm),
                      half(w.q_norm),
                      half(w.k_norm),
                      full(w.qkv_bias),
                      full(w.dense_bias)};
  m->layer_set[layer] = 1;
  return nullptr;
}

const char *redrafter_set_ends(Model *m, const RedrafterEnds *ends) {
  REQUIRE(m && ends, "an argument is missing");
  if (const char *wrong = check(m->c, *ends)) return wrong;
  m->team.settle();
  m->embedding = half(ends->embedding);
  m->final_norm = half(ends->final_norm);
  m->head.data = half(ends->head);
  m->cosine = full(ends->cosine);
  m->sine = full(ends->sine);
  m->ends_set = true;
  return nullptr;
}

const char *redrafter_forward(Model *m, const RedrafterStep *step) {
  return guarded([&]() -> const char * {
    REQUIRE(m && step, "an argument is missing");
    if (const char *wrong = check(*m, *step)) return wrong;
    m->team.settle();
    reserve_attention(*m, *step);
    m->step = *step;
    m->team.run(run_step, m, step_phases(*m));
    return nullptr;
  });
}

const char *redrafter_commit(Model *m, const RedrafterCommit *commit) {
  REQUIRE(m && commit, "an argument is missing");
  const RedrafterCommit &c = *commit;
  REQUIRE(within(c.slot, 0, m->c.max_slots - 1), "a slot does not exist");
  REQUIRE(c.base >= 0 && c.count >= 0 && (c.count == 0 || c.path), "a path is missing");
  for (int j = 0; j < c.count; ++j) {
    REQUIRE(c.path[j] >= j && (j == 0 || c.path[j] > c.path[j - 1]), "a path does not rise");
    REQUIRE(int64_t(c.base) + c.path[j] < m->c.max_seq, "a path leads behind the cache's end");
  }
  each_lane(*m, c.slot, [&](bf16 *keys, bf16 *values) {
    for (int j = 0; j < c.count; ++j)
      if (c.path[j] != j) copy_position(keys, values, c.base + j, keys, values, c.base + c.path[j], m->c.head_size);
  });
  return nullptr;
}

// Zeros at positions first .. last - 1 of a slot: a NaN left there would reach later sums with weight zero, as NaN.
const char *redrafter_clear(Model *m, int32_t slot, int32_t first, int32_t last) {
  REQUIRE(m && within(slot, 0, m->c.max_slots - 1), "a slot does not exist");
  REQUIRE(first >= 0 && first <= last && last <= m->c.max_seq, "positions are out of range");
  each_lane(*m, slot, [&](bf16 *keys, bf16 *values) {
    for (int position = first; position < last; ++position)
      for (int i = 0; i < m->c.head_size; ++i) {
        put_key(keys, m->c.head_size, position, i, 0);
        put_value(values, m->c.head_size, position, i, 0);
      }
  });
  return nullptr;
}

const char *redrafter_drafter_create(Model *m, const RedrafterDrafter *weights, Drafter **made) {
  return guarded([&]() -> const char * {
    REQUIRE(m && weights && made, "an argument is missing");
    const RedrafterDrafter &w = *weights;
    if (const char *wrong = check(m->c, w)) return wrong;
    auto d = std::make_unique<Drafter>();
    d->m = m;
    d->hidden = w.hidden;
    d->width = w.width;
    d->layers = w.layers;
    d->max_rows = w.max_rows;
    d->rnn_u = {half(w.rnn_u), w.hidden, w.hidden};
    d->rnn_w = {half(w.rnn_w), w.hidden, w.hidden};
    d->input_proj = {half(w.input_proj), w.width, 2 * w.hidden};
    d->factor = {half(w.factor), w.hidden, w.width};
    d->head = {half(w.head), w.head_rows, absent(w.factor) ? w.width : w.hidden};
    d->rnn_bias = full(w.rnn_bias);
    d->input_bias = full(w.input_bias);
    d->token_of_column = static_cast<const int64_t *>(w.token_of_column.data);
    reserve(*d);
    *made = d.release();
    return nullptr;
  });
}

const char *redrafter_drafter_set_layer(Drafter *d, int32_t layer, const RedrafterBlock *block) {
  REQUIRE(d && block && within(layer, 0, d->layers - 1), "there is no such layer");
  REQUIRE(holds_packed(block->weight, d->width, d->width) && holds(block->bias, d->width), "a block has another size");
  d->blocks[layer] = {half(block->weight), d->width, d->width};
  d->biases[layer] = full(block->bias);
  return nullptr;
}

// `m` is null when it was destroyed before.
void redrafter_drafter_destroy(Model *m, Drafter *d) {
  if (m) m->team.settle();
  delete d;
}

const char *redrafter_draft(Model *m, Drafter *d, const RedrafterSearch *search) {
  return guarded([&]() -> const char * {
    REQUIRE(m && d && search && d->m == m, "an argument is missing");
    if (const char *wrong = check(*d, *search)) return wrong;
    m->team.settle();
    d->search = *search;
    begin_search(*d);
    m->team.run(run_search, d, int(search_phases(*d, search->length)));
    return nullptr;
  });
}
}
