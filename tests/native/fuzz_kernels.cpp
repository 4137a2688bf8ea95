// Seeded fuzzing of the kernels' C interface, to be built with -fsanitize=address,undefined (see test_sanitizers.py).
//
//   fuzz_kernels ROUNDS SEED
//
// A round makes a model and a drafter of random sizes (1 to 300 threads; weights with NaN, infinity and ties among them),
// runs prompts, trees, commits and searches on them up to the limits, and calls every entry point with arguments that
// are wrong in one place: those must be refused. What is allocated here has exactly the documented sizes.

#include "kernels.cpp"

#include <cstdio>
#include <random>
#include <utility>

namespace {

std::mt19937_64 generator;
int below(int n) { return int(generator() % uint64_t(n)); }
int pick(std::initializer_list<int> of) { return of.begin()[below(int(of.size()))]; }

#define EXPECT(condition)                                                            \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "line %d: %s does not hold\n", __LINE__, #condition);     \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (false)

void accepted(const char *message) {
  if (!message) return;
  std::fprintf(stderr, "refused: %s\n", message);
  std::exit(1);
}

enum Kind { NORMAL, TIES, DAMAGED };

float number(Kind kind) {
  if (kind == TIES) return 0.125f;
  if (kind == DAMAGED && below(50) == 0) {
    const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-40f};
    return odd[below(6)];
  }
  return float(int(generator() % 2001) - 1000) * 2e-4f;
}

std::vector<bf16> halves(size_t n, Kind kind) {
  std::vector<bf16> made(n);
  for (auto &v : made) v = to_bf16(number(kind));
  return made;
}
std::vector<float> floats(size_t n, Kind kind) {
  std::vector<float> made(n);
  for (auto &v : made) v = number(kind);
  return made;
}

// Owns what it hands out.
struct Store {
  std::vector<std::vector<bf16>> half;
  std::vector<std::vector<float>> full;
  std::vector<std::vector<int64_t>> whole;
  RedrafterTensor vector(size_t n, Kind kind) {
    half.push_back(halves(n, kind));
    return {half.back().data(), int64_t(n)};
  }
  RedrafterTensor bias(size_t n, Kind kind) {
    full.push_back(floats(n, kind));
    return {full.back().data(), int64_t(n)};
  }
  RedrafterTensor matrix(int n, int k, Kind kind) {
    const std::vector<bf16> plain = halves(size_t(n) * k, kind);
    half.emplace_back(size_t(padded(n)) * k);
    const RedrafterTensor from{plain.data(), int64_t(plain.size())}, to{half.back().data(), int64_t(half.back().size())};
    accepted(redrafter_pack(&from, n, k, &to));
    EXPECT(redrafter_pack(&from, n + 1, k, &to));
    EXPECT(redrafter_pack(&from, n, k + 1, &to));
    return to;
  }
};

const RedrafterTensor NONE{nullptr, 0};

struct Machine {
  RedrafterConfig c;
  Store store;
  Model *model = nullptr;
  Kind kind;

  Machine(Kind k, int threads) : kind(k) {
    const int kv = pick({1, 1, 2, 3});
    c = {16 * pick({1, 2, 4}), kv * pick({1, 2, 5}), kv, 16 * pick({1, 2, 9}), 16 * pick({1, 3}), pick({1, 2}),
         pick({1, 15, 16, 17, 51, 200}), pick({1, 3}), 16 * pick({1, 2, 5}), pick({1, 7, 40}), threads, 1e-5f};
    refuse_configs();
    accepted(redrafter_create(&c, &model));
    EXPECT(redrafter_threads(model) >= 1 && redrafter_threads(model) <= MAX_THREADS);
    refuse_unready();
    for (int layer = 0; layer < c.layers; ++layer) set_layer(layer);
    set_ends();
  }
  ~Machine() { redrafter_destroy(model); }

  void refuse_configs() {
    Model *none = nullptr;
    for (int field = 0; field < 11; ++field)
      for (int32_t value : {0, -1, INT32_MIN, INT32_MAX}) {
        RedrafterConfig wrong = c;
        (&wrong.hidden)[field] = value;
        if (field == 10 && value > 0) continue;  // threads are as many as there can be
        EXPECT(redrafter_create(&wrong, &none) && !none);
      }
    RedrafterConfig wrong = c;
    wrong.epsilon = NAN;
    EXPECT(redrafter_create(&wrong, &none) && redrafter_create(nullptr, &none) && redrafter_create(&c, nullptr));
  }

  void refuse_unready() {
    RedrafterRow row{0, 0, 0, 0, 0, -1};
    std::vector<bf16> hidden(c.hidden);
    RedrafterStep step{&row, nullptr, nullptr, hidden.data(), nullptr, nullptr, 1, 0, 0, 0};
    EXPECT(redrafter_forward(model, &step));
  }

  void set_layer(int layer) {
    const int d = c.head_size, heads = (c.heads + 2 * c.kv_heads) * d;
    const bool norms = below(2), biases = below(2);
    RedrafterLayer l{store.matrix(heads, c.hidden, kind), store.matrix(c.hidden, c.heads * d, kind),
                     store.matrix(c.intermediate, c.hidden, kind), store.matrix(c.intermediate, c.hidden, kind),
                     store.matrix(c.hidden, c.intermediate, kind), store.vector(c.hidden, kind),
                     store.vector(c.hidden, kind), norms ? store.vector(d, kind) : NONE,
                     norms ? store.vector(d, kind) : NONE, biases ? store.bias(heads, kind) : NONE,
                     biases ? store.bias(c.hidden, kind) : NONE};
    for (int field = 0; field < 11; ++field) {
      RedrafterLayer wrong = l;
      (&wrong.qkv)[field].count += below(2) ? 1 : -1;
      EXPECT(redrafter_set_layer(model, layer, &wrong));
      if (field < 7) {
        (&wrong.qkv)[field] = NONE;
        EXPECT(redrafter_set_layer(model, layer, &wrong));
      }
    }
    EXPECT(redrafter_set_layer(model, c.layers, &l) && redrafter_set_layer(model, -1, &l));
    EXPECT(redrafter_set_layer(nullptr, layer, &l) && redrafter_set_layer(model, layer, nullptr));
    accepted(redrafter_set_layer(model, layer, &l));
  }

  void set_ends() {
    const size_t rotary = size_t(c.max_seq) * (c.head_size / 2);
    RedrafterEnds e{store.vector(size_t(c.vocab) * c.hidden, kind), store.vector(c.hidden, kind),
                    store.matrix(c.vocab, c.hidden, kind), store.bias(rotary, NORMAL), store.bias(rotary, NORMAL)};
    for (int field = 0; field < 5; ++field) {
      RedrafterEnds wrong = e;
      (&wrong.embedding)[field].count -= 1;
      EXPECT(redrafter_set_ends(model, &wrong));
      (&wrong.embedding)[field] = NONE;
      EXPECT(redrafter_set_ends(model, &wrong));
    }
    EXPECT(redrafter_set_ends(nullptr, &e) && redrafter_set_ends(model, nullptr));
    accepted(redrafter_set_ends(model, &e));
  }
};

struct Rows {
  std::vector<RedrafterRow> rows;
  std::vector<int32_t> paths;
  int width = 0;
};

// A chain of `count` tokens from position `base` on, or a random tree.
Rows grow(const Machine &m, int slot, int base, int count, bool tree) {
  Rows made;
  std::vector<std::vector<int32_t>> paths;
  for (int node = 0; node < count; ++node) {
    std::vector<int32_t> path;
    if (node) path = paths[tree ? below(node) : node - 1];
    path.push_back(node);
    paths.push_back(path);
    made.width = std::max(made.width, int(path.size()));
    const int depth = int(path.size()) - 1;
    const bool in_place = depth == node && below(4);
    made.rows.push_back({below(m.c.vocab), slot, base, depth, node, in_place ? -1 : node});
  }
  for (auto &path : paths) {
    path.resize(made.width, -1);
    made.paths.insert(made.paths.end(), path.begin(), path.end());
  }
  return made;
}

struct Output {
  std::vector<bf16> hidden;
  std::vector<float> logits;
  std::vector<int64_t> best;
};

RedrafterStep step_of(const Machine &m, const Rows &r, const std::vector<int32_t> &wanted, Output &out, bool logits) {
  const int count = int(r.rows.size());
  out.hidden.assign(size_t(count) * m.c.hidden, 0);
  out.logits.assign(logits ? wanted.size() * m.c.vocab : 0, 0.0f);
  out.best.assign(wanted.size(), -7);
  return {r.rows.data(), r.paths.data(), wanted.data(), out.hidden.data(), logits ? out.logits.data() : nullptr,
          out.best.data(), count, int(r.rows.size()), r.width, int(wanted.size())};
}

void check_best(const Machine &m, const Output &out) {
  for (size_t i = 0; i < out.best.size(); ++i) {
    const float *row = out.logits.data() + i * m.c.vocab;
    int best = 0;
    bool nan = false;
    for (int t = 0; t < m.c.vocab; ++t) {
      nan |= std::isnan(row[t]);
      if (row[t] > row[best] || std::isnan(row[best])) best = t;
    }
    EXPECT(out.best[i] == (nan || !std::isfinite(row[best]) ? -1 : best));
  }
}

void refuse_steps(Machine &m, const Rows &r, RedrafterStep step) {
  for (int field = 0; field < 6; ++field)
    for (int32_t value : {INT32_MIN, INT32_MAX, -2}) {
      Rows wrong = r;
      const int row = below(int(r.rows.size()));
      if (field == 5 && value < 0) continue;  // no path: a row where its depth says is right
      (&wrong.rows[row].token)[field] = value;
      RedrafterStep bad = step;
      bad.rows = wrong.rows.data();
      EXPECT(redrafter_forward(m.model, &bad));
    }
  for (int32_t value : {0, -1, m.c.max_rows + 1, INT32_MAX}) {
    RedrafterStep bad = step;
    bad.count = value;
    EXPECT(redrafter_forward(m.model, &bad));
  }
  RedrafterStep bad = step;
  bad.logit_count = -1;
  EXPECT(redrafter_forward(m.model, &bad));
  bad.logit_count = m.c.max_rows + 1;
  EXPECT(redrafter_forward(m.model, &bad));
  const int32_t beyond[] = {step.count}, before[] = {-1};
  bad.logit_count = 1;
  bad.logit_rows = beyond;
  EXPECT(redrafter_forward(m.model, &bad));
  bad.logit_rows = before;
  EXPECT(redrafter_forward(m.model, &bad));
  EXPECT(redrafter_forward(nullptr, &step) && redrafter_forward(m.model, nullptr));
}

void run_steps(Machine &m) {
  for (int turn = 0; turn < 4; ++turn) {
    const int slot = below(m.c.max_slots), most = std::min(m.c.max_rows, m.c.max_seq);
    const int count = turn == 0 ? most : 1 + below(most);  // up to the limit of rows, and to the cache's last position
    const int base = turn < 2 ? m.c.max_seq - count : below(m.c.max_seq - count + 1);
    const Rows rows = grow(m, slot, base, count, turn % 2);
    std::vector<int32_t> wanted;
    for (int i = 0; i < count; ++i)
      if (below(3)) wanted.push_back(i);
    Output out, lean;
    RedrafterStep step = step_of(m, rows, wanted, out, true);
    refuse_steps(m, rows, step);
    accepted(redrafter_forward(m.model, &step));
    check_best(m, out);
    step = step_of(m, rows, wanted, lean, false);
    accepted(redrafter_forward(m.model, &step));
    EXPECT(lean.best == out.best && lean.hidden == out.hidden);
    std::vector<int32_t> path;
    for (int node = 0; node < count; ++node)
      if (node == 0 || below(2)) path.push_back(node);
    RedrafterCommit commit{path.data(), slot, base, int(path.size())};
    accepted(redrafter_commit(m.model, &commit));
    accepted(redrafter_clear(m.model, slot, base, m.c.max_seq));
  }
}

void refuse_commits(Machine &m) {
  const int32_t up[] = {0, 1}, flat[] = {0, 0}, low[] = {-1, 1};
  for (const RedrafterCommit &bad :
       {RedrafterCommit{up, -1, 0, 2}, RedrafterCommit{up, m.c.max_slots, 0, 2}, RedrafterCommit{up, 0, -1, 2},
        RedrafterCommit{up, 0, m.c.max_seq - 1, 2}, RedrafterCommit{up, 0, INT32_MAX, 2}, RedrafterCommit{flat, 0, 0, 2},
        RedrafterCommit{low, 0, 0, 2}, RedrafterCommit{up, 0, 0, -1}, RedrafterCommit{nullptr, 0, 0, 1}})
    EXPECT(redrafter_commit(m.model, &bad));
  EXPECT(redrafter_clear(m.model, -1, 0, 1) && redrafter_clear(m.model, m.c.max_slots, 0, 1));
  EXPECT(redrafter_clear(m.model, 0, -1, 1) && redrafter_clear(m.model, 0, 0, m.c.max_seq + 1));
  EXPECT(redrafter_clear(m.model, 0, 2, 1) && redrafter_clear(nullptr, 0, 0, 1));
}

void run_searches(Machine &m) {
  const int h = m.c.hidden, max_rows = pick({1, 6, 50, 100});
  const bool rnn = below(2), factored = below(2), cut = m.c.vocab <= TOP || below(2);
  const int e = below(2) ? 2 * h : pick({2, 18, 48}), layers = below(3), head_rows = cut ? 51 + below(60) : m.c.vocab;
  Store &s = m.store;
  const Kind kind = m.kind;
  const bool projected = e != 2 * h;
  std::vector<int64_t> columns(head_rows);
  for (auto &token : columns) token = below(m.c.vocab);
  RedrafterDrafter w{h, e, layers, max_rows, head_rows,
                     rnn ? s.matrix(h, h, kind) : NONE, rnn ? s.bias(h, kind) : NONE, rnn ? s.matrix(h, h, kind) : NONE,
                     projected ? s.matrix(e, 2 * h, kind) : NONE, projected ? s.bias(e, kind) : NONE,
                     factored ? s.matrix(h, e, kind) : NONE, s.matrix(head_rows, factored ? h : e, kind),
                     cut ? RedrafterTensor{columns.data(), head_rows} : NONE};
  Drafter *d = nullptr;
  for (int field = 0; field < 5; ++field)
    for (int32_t value : {-1, INT32_MIN, INT32_MAX}) {
      RedrafterDrafter wrong = w;
      (&wrong.hidden)[field] = value;
      EXPECT(redrafter_drafter_create(m.model, &wrong, &d) && !d);
    }
  for (int field = 0; field < 8; ++field) {
    RedrafterDrafter wrong = w;
    (&wrong.rnn_u)[field].count += 1;
    EXPECT(redrafter_drafter_create(m.model, &wrong, &d) && !d);
  }
  if (cut) {
    const int64_t was = std::exchange(columns[below(head_rows)], int64_t(m.c.vocab));
    EXPECT(redrafter_drafter_create(m.model, &w, &d) && !d);
    std::replace(columns.begin(), columns.end(), int64_t(m.c.vocab), was);
  }
  accepted(redrafter_drafter_create(m.model, &w, &d));
  for (int layer = 0; layer < layers; ++layer) {
    RedrafterBlock block{s.matrix(e, e, kind), s.bias(e, kind)};
    EXPECT(redrafter_drafter_set_layer(d, layers, &block) && redrafter_drafter_set_layer(d, -1, &block));
    accepted(redrafter_drafter_set_layer(d, layer, &block));
  }
  for (int turn = 0; turn < 3; ++turn) {
    const int beams = turn == 0 ? std::min(TOP, max_rows) : 1 + below(std::min(TOP, max_rows));
    const int batch = turn == 0 ? max_rows / beams : 1 + below(max_rows / beams), length = 1 + below(4);
    const std::vector<bf16> context = halves(size_t(batch) * h, kind);
    std::vector<int64_t> first(batch);
    for (auto &token : first) token = below(m.c.vocab);
    const size_t size = size_t(batch) * beams * (length + 1);
    std::vector<int64_t> tokens(size, -7);
    std::vector<float> paths(size);
    RedrafterSearch search{context.data(), first.data(), tokens.data(), paths.data(), batch, beams, length};
    accepted(redrafter_draft(m.model, d, &search));
    for (size_t i = 0; i < size; ++i) EXPECT(tokens[i] >= 0 && tokens[i] < m.c.vocab);
    for (int b = 0; b < batch; ++b) {
      const bool nan = std::any_of(&context[size_t(b) * h], &context[size_t(b) * h] + h,
                                   [](bf16 v) { return std::isnan(to_float(v)); });
      for (int k = 0; k < beams; ++k) {
        const float *path = paths.data() + (size_t(b) * beams + k) * (length + 1);
        EXPECT(std::isnan(path[0]) == std::isnan(path[length]) && (!nan || std::isnan(path[0])));
        if (m.kind != DAMAGED) EXPECT(std::isfinite(path[length]));
        if (k && !std::isnan(path[0])) EXPECT(path[length] <= path[length - (length + 1)]);
      }
    }
    for (int field = 0; field < 3; ++field)
      for (int32_t value : {0, -1, INT32_MIN, INT32_MAX}) {
        RedrafterSearch wrong = search;
        (&wrong.batch)[field] = value;
        EXPECT(redrafter_draft(m.model, d, &wrong));
      }
    first[below(batch)] = pick({-1, m.c.vocab});
    EXPECT(redrafter_draft(m.model, d, &search));
    EXPECT(redrafter_draft(nullptr, d, &search) && redrafter_draft(m.model, nullptr, &search));
  }
  redrafter_drafter_destroy(m.model, d);
}

}  // namespace

int main(int argc, char **argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  for (int round = 0; round < rounds; ++round) {
    generator.seed(seed * 1000003 + round);
    Machine m(Kind(round % 3), round % 10 == 9 ? pick({257, 300}) : pick({1, 2, 3, 8}));
    run_steps(m);
    refuse_commits(m);
    run_searches(m);
  }
  std::printf("%d rounds, seed %llu: nothing found\n", rounds, static_cast<unsigned long long>(seed));
}
