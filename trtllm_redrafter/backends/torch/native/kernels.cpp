// Base-model forward pass for one decoding step on a CPU, in bfloat16 with float32 accumulation.
//
// Why it exists. At batch 1 a step is one read of all weights: 269 MB for a 135M model. Through separate operators most
// of the time goes to dispatch and to waking the second thread (about 120 matrix products a step), and a
// row's last bits depend on how many rows are computed beside it. Here one call runs all layers; threads
// take pieces of each phase and never wait for one that the operating system has put aside.
//
// Batch invariance. Every number of a row is computed by the same sequence of operations whatever else is
// in the call: a matrix product is one accumulator per output over k in order; attention walks the row's own
// path in blocks of 16 absolute positions, wherever the tree put the keys. So drafting and
// autoregression agree bit for bit.
//
// Layouts (bf16 as uint16_t):
//   packed matrix [N/16][K/2][16][2]   K even, N padded with zero rows
//   key cache     [S/16][D/2][16][2]   per layer, request slot and KV head
//   value cache   [S/2][D][2]          the same
//
// Plain C interface, no PyTorch headers: compiles in seconds and is loaded with ctypes.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <sched.h>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

using bf16 = uint16_t;

namespace {

constexpr int LANES = 16;

inline float to_float(bf16 v) {
  uint32_t u = uint32_t(v) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline bf16 to_bf16(float f) {  // round to nearest even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16((u >> 16) | 0x40);
  return bf16((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

// ---------------------------------------------------------------- sixteen float32 lanes

#if defined(__AVX512BF16__) && defined(__AVX512F__) && !defined(REDRAFTER_PORTABLE)
#define REDRAFTER_ISA "avx512-bf16"
struct Vec {
  __m512 v;
};
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline void dot_pair(Vec &acc, const bf16 *pairs, uint32_t x) {
  acc.v = _mm512_dpbf16_ps(acc.v, (__m512bh)_mm512_loadu_si512(pairs), (__m512bh)_mm512_set1_epi32(int(x)));
}
inline void store(float *p, const Vec &a) { _mm512_storeu_ps(p, a.v); }
#else
#define REDRAFTER_ISA "portable"
struct Vec {
  float v[LANES];
};
inline Vec zero() { return Vec{}; }
inline void dot_pair(Vec &acc, const bf16 *pairs, uint32_t x) {
  const float lo = to_float(bf16(x)), hi = to_float(bf16(x >> 16));
  for (int i = 0; i < LANES; ++i) {
    uint32_t both;
    std::memcpy(&both, pairs + 2 * i, 4);
    const uint32_t a = both << 16, b = both & 0xffff0000u;
    float fa, fb;
    std::memcpy(&fa, &a, 4);
    std::memcpy(&fb, &b, 4);
    acc.v[i] += fa * lo + fb * hi;
  }
}
inline void store(float *p, const Vec &a) { std::memcpy(p, a.v, sizeof a.v); }
#endif

inline void prefetch(const void *p) {
#if defined(__x86_64__)
  _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T1);
#else
  (void)p;
#endif
}

inline float exp_approx(float x) {  // 2 ulp for x <= 0; vectorizes, unlike libm's
  x = std::max(x, -87.0f);
  const float n = std::nearbyintf(x * 1.44269504f);
  const float r = std::fmaf(n, -0.693145751953125f, x) - n * 1.42860677e-6f;
  float p = 1.9875691e-4f;
  p = std::fmaf(p, r, 1.3981999e-3f);
  p = std::fmaf(p, r, 8.3334519e-3f);
  p = std::fmaf(p, r, 4.1665796e-2f);
  p = std::fmaf(p, r, 1.6666666e-1f);
  p = std::fmaf(p, r, 5.0000000e-1f);
  p = std::fmaf(p, r * r, r) + 1.0f;
  const uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

inline float silu(float x) {  // both branches of the exponential stay in range
  const float e = exp_approx(-std::fabs(x));
  return x >= 0.0f ? x / (1.0f + e) : x * e / (1.0f + e);
}

// ---------------------------------------------------------------- threads

// A fixed team that works through a job's phases together. A phase is a number of pieces; whoever is running takes
// the next one, and the phase is over when all pieces are done, not when all members have come by. A member that
// the operating system has put aside holds up the others by one piece at most, which is what keeps a step's time
// sane beside another busy process; it runs after them through phases that are over, or gives up when the
// next job has begun. So what a job's argument points to must live on until then (`settle` waits for it).
class Team {
 public:
  explicit Team(int size) : size_(std::max(1, size)) {
    for (int i = 1; i < size_; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  ~Team() {
    stop_ = true;
    job_.fetch_add(1);
    job_.notify_all();
    for (auto &w : workers_) w.join();
  }
  int size() const { return size_; }

  // Runs `task(arg, member)` on every member; it must call `phase` equally often on each. `phases` bounds how often.
  void run(void (*task)(void *, int), void *arg, int phases) {
    if (size_ > 1) {
      settle();
      if (phases > capacity_) {
        counters_.reset(new Counter[phases]);
        capacity_ = phases;
      }
      for (int i = 0; i < phases; ++i) {
        counters_[i].next.store(0, std::memory_order_relaxed);
        counters_[i].done.store(0, std::memory_order_relaxed);
      }
      task_ = task;
      arg_ = arg;
      open_.store(true, std::memory_order_release);
      job_.fetch_add(1, std::memory_order_release);
      job_.notify_all();
    }
    members_[0].phase = 0;
    task(arg, 0);
    open_.store(false, std::memory_order_release);
  }

  // Waits until no member is inside a job any more.
  void settle() const {
    while (inside_.load(std::memory_order_acquire)) sched_yield();
  }

  // Does `work(piece)` for all `pieces`, shared with the other members; returns when all are done.
  template <class Work>
  void phase(int member, int pieces, Work work) {
    if (size_ == 1) {
      for (int i = 0; i < pieces; ++i) work(i);
      return;
    }
    Counter &c = counters_[members_[member].phase++];
    int finished = 0;
    for (int i; c.next.load(std::memory_order_relaxed) < pieces &&
                (i = c.next.fetch_add(1, std::memory_order_acq_rel)) < pieces;
         ++finished)
      work(i);
    if (finished) c.done.fetch_add(finished, std::memory_order_acq_rel);
    for (int spins = 0; c.done.load(std::memory_order_acquire) < pieces; ++spins) pause(spins);
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int> next{0}, done{0};
  };
  struct alignas(64) Member {
    int phase = 0;
  };

  static void pause(int spins) {  // spin while the wait is short, then let another process have the core
    if (spins < 2000) {
#if defined(__x86_64__)
      _mm_pause();
#endif
    } else {
      sched_yield();
    }
  }
  void work(int member) {
    uint32_t seen = 0;
    for (;;) {
      for (int spins = 0; job_.load(std::memory_order_acquire) == seen && spins < 4000; ++spins) pause(spins % 2000);
      job_.wait(seen, std::memory_order_acquire);
      seen = job_.load(std::memory_order_acquire);
      if (stop_) return;
      inside_.fetch_add(1, std::memory_order_acq_rel);
      if (open_.load(std::memory_order_acquire)) {  // too late for this job otherwise
        members_[member].phase = 0;
        task_(arg_, member);
      }
      inside_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  const int size_;
  std::vector<std::thread> workers_;
  std::unique_ptr<Counter[]> counters_;
  int capacity_ = 0;
  Member members_[256];
  std::atomic<uint32_t> job_{0};
  std::atomic<int> inside_{0};
  std::atomic<bool> open_{false}, stop_{false};
  void (*task_)(void *, int) = nullptr;
  void *arg_ = nullptr;
};

struct Range {
  int begin, end;
};
inline Range share(int total, int piece, int pieces) {
  return {int(int64_t(total) * piece / pieces), int(int64_t(total) * (piece + 1) / pieces)};
}

// ---------------------------------------------------------------- matrix product

struct Packed {
  const bf16 *data = nullptr;
  int n = 0, k = 0;
  int blocks() const { return (n + LANES - 1) / LANES; }
  const bf16 *block(int b) const { return data + size_t(b) * k * LANES; }
};

constexpr int AHEAD = 2;  // blocks: with many rows the arithmetic hides the reads only if they are asked for early

// out[m][b][0..15] for M rows and B neighbouring blocks: one accumulator each, over k in order.
template <int M, int B>
inline void tile(const bf16 *x, int x_stride, const bf16 *w, size_t block_stride, int k, float *out, int out_stride) {
  Vec acc[M][B];
  for (int m = 0; m < M; ++m)
    for (int b = 0; b < B; ++b) acc[m][b] = zero();
  for (int p = 0; p < k / 2; ++p) {
    for (int b = 0; b < B; ++b) prefetch(w + (AHEAD + b) * block_stride + size_t(p) * 2 * LANES);
    for (int m = 0; m < M; ++m) {
      uint32_t pair;
      std::memcpy(&pair, x + size_t(m) * x_stride + 2 * p, 4);
      for (int b = 0; b < B; ++b) dot_pair(acc[m][b], w + b * block_stride + size_t(p) * 2 * LANES, pair);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int b = 0; b < B; ++b) store(out + size_t(m) * out_stride + b * LANES, acc[m][b]);
}

template <int B>
inline void tiles(const bf16 *x, int x_stride, int rows, const bf16 *w, size_t block_stride, int k, float *out,
                  int out_stride) {
  int m = 0;
  for (; m + 8 <= rows; m += 8)
    tile<8, B>(x + size_t(m) * x_stride, x_stride, w, block_stride, k, out + size_t(m) * out_stride, out_stride);
  const bf16 *rest = x + size_t(m) * x_stride;
  float *o = out + size_t(m) * out_stride;
  switch (rows - m) {
    case 7: tile<7, B>(rest, x_stride, w, block_stride, k, o, out_stride); break;
    case 6: tile<6, B>(rest, x_stride, w, block_stride, k, o, out_stride); break;
    case 5: tile<5, B>(rest, x_stride, w, block_stride, k, o, out_stride); break;
    case 4: tile<4, B>(rest, x_stride, w, block_stride, k, o, out_stride); break;
    case 3: tile<3, B>(rest, x_stride, w, block_stride, k, o, out_stride); break;
    case 2: tile<2, B>(rest, x_stride, w, block_stride, k, o, out_stride); break;
    case 1: tile<1, B>(rest, x_stride, w, block_stride, k, o, out_stride); break;
    default: break;
  }
}

// out (row-major, out_stride >= 16 * blocks) for the blocks of `range`.
void product(const bf16 *x, int x_stride, int rows, const Packed &w, Range range, float *out, int out_stride) {
  const size_t stride = size_t(w.k) * LANES;
  int b = range.begin;
  for (; b + 2 <= range.end; b += 2)
    tiles<2>(x, x_stride, rows, w.block(b), stride, w.k, out + b * LANES, out_stride);
  if (b < range.end) tiles<1>(x, x_stride, rows, w.block(b), stride, w.k, out + b * LANES, out_stride);
}

inline int padded(int n) { return (n + LANES - 1) / LANES * LANES; }

// ---------------------------------------------------------------- the model

struct Layer {
  Packed qkv, dense, gate, up, down;
  const bf16 *input_norm, *post_norm, *q_norm, *k_norm;  // q_norm, k_norm: null without
  const float *qkv_bias, *dense_bias;                    // null without
};

}  // namespace

extern "C" {

struct RedrafterConfig {
  int32_t hidden, heads, kv_heads, head_size, intermediate, layers, vocab, max_slots, max_seq, max_rows, threads;
  float epsilon;
};

// One row of a step. Its key and value go to cache position `base + node`; it attends the request's positions
// below `base`, then the nodes path[0..depth] (its own last). `path` may be null when path[j] == j.
struct RedrafterRow {
  int32_t token, slot, base, depth, node;
  const int32_t *path;
};
}

namespace {

struct Step {
  struct Model *m;
  const RedrafterRow *rows;
  int count;
  bf16 *hidden;               // [count, hidden], after the final norm
  const int32_t *logit_rows;  // which rows get logits
  int logit_count;
  float *logits;  // [logit_count, vocab], or null when only the largest is wanted
  int64_t *best;  // [logit_count] token of the largest logit, the lowest of equals
};

struct Best {
  float value = -INFINITY;
  int token = 0;
  void offer(float v, int t) {
    if (v > value) {
      value = v;
      token = t;
    }
  }
};

struct Model {
  RedrafterConfig c;
  Team team;
  std::vector<Layer> layers;
  const bf16 *embedding = nullptr, *final_norm = nullptr;
  const float *cosine = nullptr, *sine = nullptr;  // [max_seq, head_size / 2]
  Packed head;
  bf16 *keys = nullptr, *values = nullptr;
  Step step{};                             // of the last call; a straggler may still look at it
  std::vector<float> residual, wide;       // [rows, hidden], [rows, widest output]
  std::vector<bf16> normed, mixed;         // [rows, hidden], [rows, max(heads * head_size, intermediate)]
  std::vector<Best> best;                  // [pieces of the head, rows]
  std::vector<std::vector<float>> scores;  // per thread: [group, positions]
  std::vector<std::vector<bf16>> scratch;  // per thread: gathered tail keys and values, queries, probabilities

  explicit Model(const RedrafterConfig &config) : c(config), team(config.threads), layers(config.layers) {}
  ~Model() {
    std::free(keys);
    std::free(values);
  }
  int qkv_width() const { return padded((c.heads + 2 * c.kv_heads) * c.head_size); }
  int wide_stride() const { return std::max(qkv_width(), padded(std::max(c.hidden, c.intermediate))); }
  int mixed_stride() const { return std::max(c.heads * c.head_size, padded(c.intermediate)); }
  size_t lane_size() const { return size_t(c.max_seq) * c.head_size; }
  size_t lane(int layer, int slot, int kv_head) const {
    return ((size_t(layer) * c.max_slots + slot) * c.kv_heads + kv_head) * lane_size();
  }
};

void rms_norm(const float *x, const bf16 *weight, int n, float epsilon, bf16 *out) {
  float sums[LANES] = {};
  for (int i = 0; i < n; i += LANES)
    for (int j = 0; j < LANES && i + j < n; ++j) sums[j] += x[i + j] * x[i + j];
  float total = 0.0f;
  for (float s : sums) total += s;
  const float scale = 1.0f / std::sqrt(total / float(n) + epsilon);
  for (int i = 0; i < n; ++i) out[i] = to_bf16(to_float(to_bf16(x[i] * scale)) * to_float(weight[i]));
}

inline void put_key(bf16 *lane, int head_size, int position, int d, bf16 v) {
  lane[(size_t(position / LANES) * head_size / 2 + d / 2) * 2 * LANES + (position % LANES) * 2 + d % 2] = v;
}
inline void put_value(bf16 *lane, int head_size, int position, int d, bf16 v) {
  lane[(size_t(position / 2) * head_size + d) * 2 + position % 2] = v;
}
void copy_position(bf16 *to_keys, bf16 *to_values, int to, const bf16 *keys, const bf16 *values, int from, int d_all) {
  const bf16 *k = keys + size_t(from / LANES) * d_all * LANES + (from % LANES) * 2;
  bf16 *tk = to_keys + size_t(to / LANES) * d_all * LANES + (to % LANES) * 2;
  for (int p = 0; p < d_all / 2; ++p) std::memcpy(tk + p * 2 * LANES, k + p * 2 * LANES, 4);
  const bf16 *v = values + size_t(from / 2) * d_all * 2 + from % 2;
  bf16 *tv = to_values + size_t(to / 2) * d_all * 2 + to % 2;
  for (int d = 0; d < d_all; ++d) tv[2 * d] = v[2 * d];
}

// Rotates one head in place (halves paired, as Hugging Face lays them out) after its optional norm.
void rotate(const Model &m, float *x, const bf16 *norm, int position) {
  const int d = m.c.head_size, half = d / 2;
  if (norm) {
    float total = 0.0f;
    for (int i = 0; i < d; ++i) total += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(total / float(d) + m.c.epsilon);
    for (int i = 0; i < d; ++i) x[i] = to_float(to_bf16(x[i] * scale)) * to_float(norm[i]);
  }
  const float *c = m.cosine + size_t(position) * half, *s = m.sine + size_t(position) * half;
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * c[i] - b * s[i];
    x[i + half] = b * c[i] + a * s[i];
  }
}

// Softmax numerators of `length` scores as bf16, zeros up to `stride`; returns their sum.
float soften(float *scores, int length, int stride, float scale, bf16 *weights) {
  float top = -INFINITY;
  for (int p = 0; p < length; ++p) top = std::max(top, scores[p] *= scale);
  for (int p = 0; p < length; ++p) scores[p] = to_float(to_bf16(exp_approx(scores[p] - top)));
  for (int p = length; p < stride; ++p) scores[p] = 0.0f;
  float lanes[LANES] = {}, total = 0.0f;
  for (int p = 0; p < stride; p += LANES)
    for (int j = 0; j < LANES; ++j) lanes[j] += scores[p + j];
  for (float lane : lanes) total += lane;
  for (int p = 0; p < stride; ++p) weights[p] = to_bf16(scores[p]);
  return total;
}

// Queries of one KV head over one row's path. Position order and block borders are absolute, so the result does
// not depend on where the tree stored the keys.
void attend(Model &m, int layer, const RedrafterRow &row, int kv_head, const float *qkv, bf16 *out, int member) {
  const int d = m.c.head_size, group = m.c.heads / m.c.kv_heads;
  const int length = row.base + row.depth + 1, blocks = (length + LANES - 1) / LANES;
  const bf16 *keys = m.keys + m.lane(layer, row.slot, kv_head);
  const bf16 *values = m.values + m.lane(layer, row.slot, kv_head);
  const int shared = row.path ? row.base / LANES : blocks;  // blocks read in place
  const int tail = blocks - shared, stride = blocks * LANES;
  std::vector<bf16> &scratch = m.scratch[member];
  scratch.resize(size_t(2 * tail) * LANES * d + size_t(group) * d + stride);
  bf16 *tail_keys = scratch.data(), *tail_values = tail_keys + size_t(tail) * LANES * d;
  bf16 *query = tail_values + size_t(tail) * LANES * d, *weights = query + size_t(group) * d;
  if (tail) {
    std::memset(tail_keys, 0, size_t(2 * tail) * LANES * d * sizeof(bf16));
    for (int p = shared * LANES; p < length; ++p)
      copy_position(tail_keys, tail_values, p - shared * LANES, keys, values,
                    p < row.base ? p : row.base + row.path[p - row.base], d);
  }
  const float scale = 1.0f / std::sqrt(float(d));
  const float *q = qkv + size_t(kv_head) * group * d;
  for (int i = 0; i < group * d; ++i) query[i] = to_bf16(q[i]);

  std::vector<float> &all = m.scores[member];
  all.resize(size_t(group) * stride);
  for (int b = 0; b < blocks; ++b) {
    const bf16 *block = b < shared ? keys + size_t(b) * d * LANES : tail_keys + size_t(b - shared) * d * LANES;
    tiles<1>(query, d, group, block, 0, d, all.data() + b * LANES, stride);
  }
  for (int g = 0; g < group; ++g) {
    const float total = soften(all.data() + size_t(g) * stride, length, stride, scale, weights);
    bf16 *o = out + size_t(kv_head * group + g) * d;
    constexpr int WIDTH = 8;  // value columns in flight, in blocks of 16
    for (int first = 0; first < d; first += WIDTH * LANES) {
      const int width = std::min(WIDTH, (d - first) / LANES);
      Vec acc[WIDTH];
      for (int w = 0; w < width; ++w) acc[w] = zero();
      for (int p = 0; p < stride; p += 2) {
        uint32_t pair;
        std::memcpy(&pair, weights + p, 4);
        const bf16 *v = (p < shared * LANES ? values + size_t(p) * d : tail_values + size_t(p - shared * LANES) * d) +
                        2 * first;
        for (int w = 0; w < width; ++w) dot_pair(acc[w], v + w * 2 * LANES, pair);
      }
      float result[WIDTH * LANES];
      for (int w = 0; w < width; ++w) store(result + w * LANES, acc[w]);
      for (int i = 0; i < width * LANES; ++i) o[first + i] = to_bf16(result[i] / total);
    }
  }
}

void split_heads(Model &m, int layer, const RedrafterRow &row, float *qkv, int heads) {
  const Layer &l = m.layers[layer];
  const int d = m.c.head_size, position = row.base + row.depth, to = row.base + row.node;
  for (int h = 0; h < heads; ++h) {
    float *x = qkv + size_t(h) * d;
    if (l.qkv_bias)
      for (int i = 0; i < d; ++i) x[i] += l.qkv_bias[size_t(h) * d + i];
    if (h < m.c.heads) {
      rotate(m, x, l.q_norm, position);
    } else if (h < m.c.heads + m.c.kv_heads) {
      rotate(m, x, l.k_norm, position);
      bf16 *lane = m.keys + m.lane(layer, row.slot, h - m.c.heads);
      for (int i = 0; i < d; ++i) put_key(lane, d, to, i, to_bf16(x[i]));
    } else {
      bf16 *lane = m.values + m.lane(layer, row.slot, h - m.c.heads - m.c.kv_heads);
      for (int i = 0; i < d; ++i) put_value(lane, d, to, i, to_bf16(x[i]));
    }
  }
}

// Pieces that a product over `blocks` blocks of 16 columns is cut into; even block counts keep the two-block tiles.
inline int pieces(const Model &m, int blocks) { return std::max(1, std::min(4 * m.team.size(), blocks / 2)); }
inline Range blocks_of(int blocks, int piece, int count) {
  const Range halves = share((blocks + 1) / 2, piece, count);
  return {halves.begin * 2, std::min(halves.end * 2, blocks)};
}

void norm_rows(Model &m, const bf16 *weight, int count, int member, bf16 *out) {
  const int h = m.c.hidden;
  m.team.phase(member, count, [&](int i) {
    rms_norm(m.residual.data() + size_t(i) * h, weight, h, m.c.epsilon, out + size_t(i) * h);
  });
}

// residual += x W^T + bias
void add_product(Model &m, const bf16 *x, int x_stride, int count, const Packed &w, const float *bias, int member) {
  const int stride = m.wide_stride(), n = pieces(m, w.blocks());
  m.team.phase(member, n, [&](int piece) {
    const Range blocks = blocks_of(w.blocks(), piece, n);
    product(x, x_stride, count, w, blocks, m.wide.data(), stride);
    const int from = blocks.begin * LANES, to = std::min(blocks.end * LANES, w.n);
    for (int i = 0; i < count; ++i) {
      float *r = m.residual.data() + size_t(i) * m.c.hidden;
      const float *y = m.wide.data() + size_t(i) * stride;
      for (int j = from; j < to; ++j) r[j] += y[j] + (bias ? bias[j] : 0.0f);
    }
  });
}

// SiLU(x A^T) * (x B^T) for one block of columns of both.
void gated_block(Model &m, const Layer &l, int count, int block) {
  const int h = m.c.hidden, mixed = m.mixed_stride();
  float gate[LANES * 8], up[LANES * 8];
  for (int i = 0; i < count; i += 8) {
    const int n = std::min(8, count - i);
    const bf16 *x = m.normed.data() + size_t(i) * h;
    tiles<1>(x, h, n, l.gate.block(block), size_t(h) * LANES, h, gate, LANES);
    tiles<1>(x, h, n, l.up.block(block), size_t(h) * LANES, h, up, LANES);
    for (int r = 0; r < n; ++r) {
      bf16 *out = m.mixed.data() + size_t(i + r) * mixed + block * LANES;
      for (int j = 0; j < LANES; ++j) out[j] = to_bf16(silu(gate[r * LANES + j]) * up[r * LANES + j]);
    }
  }
}

constexpr int LAYER_PHASES = 8;

void run_layer(Step &s, int layer, int member) {
  Model &m = *s.m;
  const Layer &l = m.layers[layer];
  Team &team = m.team;
  const int stride = m.wide_stride(), mixed = m.mixed_stride(), h = m.c.hidden;
  norm_rows(m, l.input_norm, s.count, member, m.normed.data());
  const int n = pieces(m, l.qkv.blocks());
  team.phase(member, n, [&](int piece) {
    product(m.normed.data(), h, s.count, l.qkv, blocks_of(l.qkv.blocks(), piece, n), m.wide.data(), stride);
  });
  const int heads = m.c.heads + 2 * m.c.kv_heads;
  team.phase(member, s.count, [&](int i) { split_heads(m, layer, s.rows[i], m.wide.data() + size_t(i) * stride, heads); });
  team.phase(member, s.count * m.c.kv_heads, [&](int unit) {
    const int i = unit / m.c.kv_heads;
    attend(m, layer, s.rows[i], unit % m.c.kv_heads, m.wide.data() + size_t(i) * stride,
           m.mixed.data() + size_t(i) * mixed, member);
  });
  add_product(m, m.mixed.data(), mixed, s.count, l.dense, l.dense_bias, member);
  norm_rows(m, l.post_norm, s.count, member, m.normed.data());
  const int blocks = l.gate.blocks(), parts = pieces(m, blocks);
  team.phase(member, parts, [&](int piece) {
    const Range mine = share(blocks, piece, parts);
    for (int b = mine.begin; b < mine.end; ++b) gated_block(m, l, s.count, b);
  });
  add_product(m, m.mixed.data(), mixed, s.count, l.down, nullptr, member);
}

// Largest of 32 neighbouring logits. NaN is never larger, so a broken row gives token 0, not a crash.
inline void scan(const float *x, int count, int first, Best &best) {
  bool any = false;
  for (int j = 0; j < count; ++j) any |= x[j] > best.value;
  if (any)
    for (int j = 0; j < count; ++j) best.offer(x[j], first + j);
}

void head_block_pair(Step &s, int b, int end, Best *best) {
  Model &m = *s.m;
  const int h = m.c.hidden, vocab = m.c.vocab;
  const int wide = std::min(2, end - b), from = b * LANES, to = std::min(from + wide * LANES, vocab);
  for (int i = 0; i < s.logit_count; i += 8) {
    const int n = std::min(8, s.logit_count - i);
    const bf16 *x = m.normed.data() + size_t(i) * h;
    float out[8 * 2 * LANES];
    if (wide == 2)
      tiles<2>(x, h, n, m.head.block(b), size_t(h) * LANES, h, out, 2 * LANES);
    else
      tiles<1>(x, h, n, m.head.block(b), size_t(h) * LANES, h, out, 2 * LANES);
    for (int r = 0; r < n; ++r) {
      const float *row = out + size_t(r) * 2 * LANES;
      if (s.logits) std::memcpy(s.logits + size_t(i + r) * vocab + from, row, size_t(to - from) * 4);
      scan(row, to - from, from, best[i + r]);
    }
  }
}

int head_pieces(const Model &m) { return std::min(16 * m.team.size(), std::max(1, m.head.blocks() / 2)); }

void run_head(Step &s, int member) {
  Model &m = *s.m;
  const int count = head_pieces(m), blocks = m.head.blocks();
  m.team.phase(member, count, [&](int piece) {
    const Range mine = blocks_of(blocks, piece, count);
    Best *best = m.best.data() + size_t(piece) * m.c.max_rows;
    std::fill_n(best, s.logit_count, Best{});
    for (int b = mine.begin; b < mine.end; b += 2) head_block_pair(s, b, mine.end, best);
  });
  m.team.phase(member, 1, [&](int) {
    for (int i = 0; i < s.logit_count; ++i) {  // pieces hold rising token ranges: the lowest of equals stays
      Best all;
      for (int piece = 0; piece < count; ++piece) {
        const Best &part = m.best[size_t(piece) * m.c.max_rows + i];
        all.offer(part.value, part.token);
      }
      s.best[i] = all.token;
    }
  });
}

int step_phases(const Model &m) { return LAYER_PHASES * m.c.layers + 5; }

void run_step(void *arg, int member) {
  Step &s = *static_cast<Step *>(arg);
  Model &m = *s.m;
  const int h = m.c.hidden;
  m.team.phase(member, s.count, [&](int i) {
    const bf16 *embedded = m.embedding + size_t(s.rows[i].token) * h;
    for (int j = 0; j < h; ++j) m.residual[size_t(i) * h + j] = to_float(embedded[j]);
  });
  for (int layer = 0; layer < m.c.layers; ++layer) run_layer(s, layer, member);
  norm_rows(m, m.final_norm, s.count, member, s.hidden);
  m.team.phase(member, s.logit_count, [&](int i) {
    std::memcpy(m.normed.data() + size_t(i) * h, s.hidden + size_t(s.logit_rows[i]) * h, size_t(h) * sizeof(bf16));
  });
  run_head(s, member);
}

// ---------------------------------------------------------------- the drafter

struct Candidate {
  float score;
  int flat;  // row * head rows + column: the lower one wins a tie
};

struct Search {  // B sequences, R rows each (1 before the beams differ, then K), K beams of L drafted tokens
  Model *m;
  struct Drafter *d;
  const bf16 *context;   // [B, H]
  const int64_t *first;  // [B]
  int batch, beams, length, per_sequence;
  int64_t *tokens;  // [B, K, L + 1]
  float *paths;     // [B, K, L + 1]
  int rows() const { return batch * per_sequence; }
};

struct Drafter {
  int hidden, width, layers;  // H, exit_dim
  Packed rnn_u, rnn_w, input_proj;
  Packed factor, head;  // LM head [R, exit_dim], or [R, H] behind a factor [H, exit_dim]
  const float *rnn_bias = nullptr, *input_bias = nullptr;
  const int64_t *token_of_column = nullptr;  // null: column i is token i
  Search search{};  // of the last call; a straggler may still look at it
  std::vector<Packed> blocks;
  std::vector<const float *> biases;
  std::vector<float> wide, x, logits, scores;
  std::vector<bf16> narrow, spare, joined, states, next_states;
  std::vector<int64_t> last;                      // token each row ends in
  std::vector<std::vector<Candidate>> survivors;  // per row
  std::vector<std::vector<Candidate>> merged;     // per thread
};

// next state = SiLU(W e(token) + U state + u), or e(token) + state without an RNN
void next_states(Search &s, int member) {
  Model &m = *s.m;
  Drafter &d = *s.d;
  const int h = d.hidden, hs = padded(h), rows = s.rows(), blocks = hs / LANES, n = pieces(m, blocks);
  float *wide = d.wide.data(), *second = wide + size_t(rows) * hs;
  bf16 *embedded = d.narrow.data();
  m.team.phase(member, rows, [&](int i) {
    std::memcpy(embedded + size_t(i) * h, m.embedding + size_t(d.last[i]) * h, size_t(h) * sizeof(bf16));
  });
  m.team.phase(member, n, [&](int piece) {
    const Range part = blocks_of(blocks, piece, n);
    const int from = part.begin * LANES, to = std::min(part.end * LANES, h);
    if (d.rnn_w.data) {
      product(embedded, h, rows, d.rnn_w, part, wide, hs);
      product(d.states.data(), h, rows, d.rnn_u, part, second, hs);
    }
    for (int i = 0; i < rows; ++i)
      for (int j = from; j < to; ++j) {
        const size_t at = size_t(i) * hs + j, plain = size_t(i) * h + j;
        d.next_states[plain] = to_bf16(d.rnn_w.data ? silu(wide[at] + second[at] + d.rnn_bias[j])
                                                    : to_float(embedded[plain]) + to_float(d.states[plain]));
      }
  });
}

// [context ; state] -> input_proj -> residual blocks -> LM head. `x` holds the residual stream, `narrow` and `spare` its
// bfloat16 copies in turn: a block reads one while the next one's input is written to the other.
void draft_logits(Search &s, int member) {
  Model &m = *s.m;
  Drafter &d = *s.d;
  const int h = d.hidden, e = d.width, es = padded(e), hs = padded(h), rows = s.rows();
  const int blocks = es / LANES, n = pieces(m, blocks);
  float *wide = d.wide.data();
  m.team.phase(member, rows, [&](int i) {
    bf16 *joined = d.joined.data() + size_t(i) * 2 * h;
    std::memcpy(joined, s.context + size_t(i / s.per_sequence) * h, size_t(h) * sizeof(bf16));
    std::memcpy(joined + h, d.next_states.data() + size_t(i) * h, size_t(h) * sizeof(bf16));
  });
  m.team.phase(member, n, [&](int piece) {
    const Range part = blocks_of(blocks, piece, n);
    if (d.input_proj.data) product(d.joined.data(), 2 * h, rows, d.input_proj, part, wide, es);
    for (int i = 0; i < rows; ++i)
      for (int j = part.begin * LANES; j < std::min(part.end * LANES, e); ++j) {
        const size_t at = size_t(i) * e + j;
        d.x[at] = d.input_proj.data ? wide[size_t(i) * es + j] + d.input_bias[j] : to_float(d.joined[at]);
        d.narrow[at] = to_bf16(d.x[at]);
      }
  });
  const bf16 *features = d.narrow.data();
  for (int layer = 0; layer < d.layers; ++layer) {
    bf16 *next = layer % 2 ? d.narrow.data() : d.spare.data();
    m.team.phase(member, n, [&](int piece) {
      const Range part = blocks_of(blocks, piece, n);
      product(features, e, rows, d.blocks[layer], part, wide, es);
      for (int i = 0; i < rows; ++i)
        for (int j = part.begin * LANES; j < std::min(part.end * LANES, e); ++j) {
          const size_t at = size_t(i) * e + j;
          d.x[at] += silu(wide[size_t(i) * es + j] + d.biases[layer][j]);
          next[at] = to_bf16(d.x[at]);
        }
    });
    features = next;
  }
  if (d.factor.data) {
    const int parts = pieces(m, hs / LANES);
    m.team.phase(member, parts, [&](int piece) {
      const Range part = blocks_of(hs / LANES, piece, parts);
      product(features, e, rows, d.factor, part, wide, hs);
      for (int i = 0; i < rows; ++i)
        for (int j = part.begin * LANES; j < std::min(part.end * LANES, h); ++j)
          d.joined[size_t(i) * h + j] = to_bf16(wide[size_t(i) * hs + j]);
    });
    features = d.joined.data();
  }
  const int head = d.head.blocks(), parts = std::min(16 * m.team.size(), std::max(1, head / 2));
  m.team.phase(member, parts, [&](int piece) {
    product(features, d.head.k, rows, d.head, blocks_of(head, piece, parts), d.logits.data(), padded(d.head.n));
  });
}

constexpr int TOP = 50;

// The columns of one row that survive the cut (the 50 largest and all that tie with the 50th), scored
// running score + log-softmax over the survivors.
void survive(const float *logits, int count, float running, int row, std::vector<Candidate> &out) {
  float top[TOP];  // min-heap: top[0] is the smallest of the 50 largest so far
  std::copy(logits, logits + TOP, top);
  std::make_heap(top, top + TOP, std::greater<float>());
  for (int c = TOP; c < count; c += LANES) {
    const int n = std::min(LANES, count - c);
    bool any = false;
    for (int j = 0; j < n; ++j) any |= logits[c + j] > top[0];
    if (!any) continue;
    for (int j = 0; j < n; ++j) {
      if (!(logits[c + j] > top[0])) continue;
      std::pop_heap(top, top + TOP, std::greater<float>());
      top[TOP - 1] = logits[c + j];
      std::push_heap(top, top + TOP, std::greater<float>());
    }
  }
  const float border = top[0], best = *std::max_element(top, top + TOP);
  out.clear();
  float mass = 0.0f;
  for (int c = 0; c < count; ++c)
    if (logits[c] >= border) {
      out.push_back({logits[c] - best, row * count + c});
      mass += std::exp(logits[c] - best);
    }
  const float offset = running - std::log(mass);
  for (Candidate &candidate : out) candidate.score += offset;
}

// The K best continuations of one sequence become its beams.
void choose(Search &s, int sequence, int round, int member) {
  Drafter &d = *s.d;
  std::vector<Candidate> &all = d.merged[member];
  all.clear();
  for (int r = 0; r < s.per_sequence; ++r) {
    const auto &row = d.survivors[sequence * s.per_sequence + r];
    all.insert(all.end(), row.begin(), row.end());
  }
  std::partial_sort(all.begin(), all.begin() + s.beams, all.end(), [](const Candidate &a, const Candidate &b) {
    return a.score != b.score ? a.score > b.score : a.flat < b.flat;
  });
  const int width = s.length + 1, h = d.hidden;
  int64_t *tokens = s.tokens + size_t(sequence) * s.beams * width;
  float *paths = s.paths + size_t(sequence) * s.beams * width;
  std::vector<int64_t> old_tokens(tokens, tokens + size_t(s.beams) * width);
  std::vector<float> old_paths(paths, paths + size_t(s.beams) * width);
  for (int k = 0; k < s.beams; ++k) {
    const int parent = all[k].flat / d.head.n, column = all[k].flat % d.head.n;
    std::copy_n(old_tokens.data() + size_t(parent) * width, round + 1, tokens + size_t(k) * width);
    std::copy_n(old_paths.data() + size_t(parent) * width, round + 1, paths + size_t(k) * width);
    const int64_t token = d.token_of_column ? d.token_of_column[column] : column;
    tokens[size_t(k) * width + round + 1] = token;
    paths[size_t(k) * width + round + 1] = all[k].score;
    const size_t row = size_t(sequence) * s.beams + k;
    d.last[row] = token;
    d.scores[row] = all[k].score;
    std::memcpy(d.states.data() + row * h, d.next_states.data() + (size_t(sequence) * s.per_sequence + parent) * h,
                size_t(h) * sizeof(bf16));
  }
}

int search_phases(const Drafter &d, int length) { return length * (d.layers + 8); }

void run_search(void *arg, int member) {
  Search s = *static_cast<Search *>(arg);  // every member counts its own rounds
  Drafter &d = *s.d;
  Team &team = s.m->team;
  for (int round = 0; round < s.length; ++round) {
    next_states(s, member);
    draft_logits(s, member);
    team.phase(member, s.rows(), [&](int i) {
      survive(d.logits.data() + size_t(i) * padded(d.head.n), d.head.n, d.scores[i], i % s.per_sequence, d.survivors[i]);
    });
    team.phase(member, s.batch, [&](int sequence) { choose(s, sequence, round, member); });
    s.per_sequence = s.beams;
  }
}

}  // namespace

extern "C" {
const char *redrafter_isa() { return REDRAFTER_ISA; }

// [n, k] row-major -> packed; `to` holds padded(n) * k values.
void redrafter_pack(const bf16 *from, int32_t n, int32_t k, bf16 *to) {
  for (int b = 0; b < (n + LANES - 1) / LANES; ++b)
    for (int p = 0; p < k / 2; ++p)
      for (int j = 0; j < LANES; ++j) {
        const int row = b * LANES + j;
        uint32_t pair = 0;
        if (row < n) std::memcpy(&pair, from + size_t(row) * k + 2 * p, 4);
        std::memcpy(to + (size_t(b) * k / 2 + p) * 2 * LANES + 2 * j, &pair, 4);
      }
}

Model *redrafter_create(const RedrafterConfig *config) {
  Model *m = new (std::nothrow) Model(*config);
  if (!m) return nullptr;
  const size_t cache = size_t(config->layers) * config->max_slots * config->kv_heads * m->lane_size();
  // calloc: pages are touched only when used
  m->keys = static_cast<bf16 *>(std::calloc(cache + 64, sizeof(bf16)));
  m->values = static_cast<bf16 *>(std::calloc(cache + 64, sizeof(bf16)));
  if (!m->keys || !m->values) {
    delete m;
    return nullptr;
  }
  m->residual.resize(size_t(config->max_rows) * config->hidden);
  m->normed.resize(size_t(config->max_rows) * config->hidden);
  m->wide.resize(size_t(config->max_rows) * m->wide_stride());
  m->mixed.resize(size_t(config->max_rows) * m->mixed_stride());
  m->scores.resize(m->team.size());
  m->scratch.resize(m->team.size());
  return m;
}

void redrafter_destroy(Model *m) { delete m; }

void redrafter_set_layer(Model *m, int32_t layer, const bf16 *qkv, const bf16 *dense, const bf16 *gate, const bf16 *up,
                         const bf16 *down, const bf16 *input_norm, const bf16 *post_norm, const bf16 *q_norm,
                         const bf16 *k_norm, const float *qkv_bias, const float *dense_bias) {
  const RedrafterConfig &c = m->c;
  const int wide = (c.heads + 2 * c.kv_heads) * c.head_size;
  m->layers[layer] = {{qkv, wide, c.hidden},
                      {dense, c.hidden, c.heads * c.head_size},
                      {gate, c.intermediate, c.hidden},
                      {up, c.intermediate, c.hidden},
                      {down, c.hidden, c.intermediate},
                      input_norm,
                      post_norm,
                      q_norm,
                      k_norm,
                      qkv_bias,
                      dense_bias};
}

void redrafter_set_ends(Model *m, const bf16 *embedding, const bf16 *final_norm, const bf16 *head, const float *cosine,
                        const float *sine) {
  m->embedding = embedding;
  m->final_norm = final_norm;
  m->head = {head, m->c.vocab, m->c.hidden};
  m->best.resize(size_t(head_pieces(*m)) * m->c.max_rows);
  m->cosine = cosine;
  m->sine = sine;
}

void redrafter_forward(Model *m, const RedrafterRow *rows, int32_t count, bf16 *hidden, const int32_t *logit_rows,
                       int32_t logit_count, float *logits, int64_t *best) {
  m->team.settle();
  m->step = {m, rows, count, hidden, logit_rows, logit_count, logits, best};
  m->team.run(run_step, &m->step, step_phases(*m));
}

// Moves the keys and values of accepted nodes (increasing, path[j] >= j) behind `base`, in order.
void redrafter_commit(Model *m, int32_t slot, int32_t base, const int32_t *path, int32_t count) {
  for (int layer = 0; layer < m->c.layers; ++layer)
    for (int h = 0; h < m->c.kv_heads; ++h) {
      bf16 *keys = m->keys + m->lane(layer, slot, h), *values = m->values + m->lane(layer, slot, h);
      for (int j = 0; j < count; ++j)
        if (path[j] != j) copy_position(keys, values, base + j, keys, values, base + path[j], m->c.head_size);
    }
}

// Biases float32; `input_proj`, `rnn_u`, `rnn_w` and `factor` may be null. `head` has head_rows rows.
Drafter *redrafter_drafter_create(int32_t hidden, int32_t width, int32_t layers, int32_t max_rows, const bf16 *rnn_u,
                                  const float *rnn_bias, const bf16 *rnn_w, const bf16 *input_proj,
                                  const float *input_bias, const bf16 *factor, const bf16 *head,
                                  int32_t head_rows, const int64_t *token_of_column) {
  Drafter *d = new (std::nothrow) Drafter;
  if (!d) return nullptr;
  d->hidden = hidden;
  d->width = width;
  d->layers = layers;
  d->rnn_u = {rnn_u, hidden, hidden};
  d->rnn_w = {rnn_w, hidden, hidden};
  d->input_proj = {input_proj, width, 2 * hidden};
  d->factor = {factor, hidden, width};
  d->head = {head, head_rows, factor ? hidden : width};
  d->rnn_bias = rnn_bias;
  d->input_bias = input_bias;
  d->blocks.resize(layers);
  d->biases.resize(layers);
  const size_t widest = size_t(std::max(padded(hidden), padded(width)));
  d->token_of_column = token_of_column;
  d->wide.resize(2 * max_rows * widest);
  d->x.resize(max_rows * widest);
  d->narrow.resize(max_rows * widest);
  d->spare.resize(max_rows * widest);
  d->joined.resize(max_rows * widest * 2);
  d->states.resize(max_rows * widest);
  d->next_states.resize(max_rows * widest);
  d->logits.resize(size_t(max_rows) * padded(head_rows));
  d->scores.resize(max_rows);
  d->last.resize(max_rows);
  d->survivors.resize(max_rows);
  return d;
}

void redrafter_drafter_set_layer(Drafter *d, int32_t layer, const bf16 *weight, const float *bias) {
  d->blocks[layer] = {weight, d->width, d->width};
  d->biases[layer] = bias;
}

// `m` may be null when it was destroyed before.
void redrafter_drafter_destroy(Model *m, Drafter *d) {
  if (m) m->team.settle();
  delete d;
}

// Beam search for `batch` sequences: context [B, H], first [B] -> tokens and path scores [B, K, L + 1].
void redrafter_draft(Model *m, Drafter *d, const bf16 *context, const int64_t *first, int32_t batch, int32_t beams,
                     int32_t length, int64_t *tokens, float *paths) {
  m->team.settle();
  d->merged.resize(m->team.size());
  std::fill_n(d->states.begin(), size_t(batch) * d->hidden, bf16(0));
  std::fill_n(d->scores.begin(), batch, 0.0f);
  std::copy_n(first, batch, d->last.begin());
  for (int i = 0; i < batch * beams; ++i) {
    tokens[size_t(i) * (length + 1)] = first[i / beams];
    paths[size_t(i) * (length + 1)] = 0.0f;
  }
  d->search = {m, d, context, first, batch, beams, length, 1, tokens, paths};
  m->team.run(run_search, &d->search, search_phases(*d, length));
}
}
