// The drafter's beam search: B sequences, K beams of L tokens, all rounds in one call.
//
// A round reads the drafter once: 2 bytes per parameter of RNN, projection and blocks (13 MB for the demo's), and of the
// LM head's rows (8,192 x 576 of the base model's head there, 9 MB). Rounds after the first do so for K rows per
// sequence at the same cost, as long as arithmetic hides behind the reads. The reference is redrafter/beam_search.py.

#pragma once

#include <functional>
#include <limits>

#include "model.h"

namespace {

constexpr int TOP = 50;  // candidates of a row; there are never more beams

struct Candidate {
  float score;
  int flat;  // row * head rows + column: the lower one wins a tie
};

// A row's candidates: at most TOP - 1 above the TOP-th largest logit, and the first TOP that tie with it (of two that tie
// in the end, the lower column wins, so no beam can need another).
struct Candidates {
  Candidate of[2 * TOP];
  int count = 0;
  void add(float score, int flat) {
    if (count < 2 * TOP) of[count++] = {score, flat};
  }
};

struct Drafter {
  Model *m;
  int hidden, width, layers, max_rows;  // H, exit_dim
  Packed rnn_u, rnn_w, input_proj;
  Packed factor, head;  // LM head [R, exit_dim], or [R, H] behind a factor [H, exit_dim]
  const float *rnn_bias = nullptr, *input_bias = nullptr;
  const int64_t *token_of_column = nullptr;  // null: column i is token i
  RedrafterSearch search{};                  // of the last call; a straggler may still look at it
  std::vector<Packed> blocks;
  std::vector<const float *> biases;
  std::vector<float> wide, x, logits, scores;
  std::vector<bf16> narrow, spare, joined, states, next_states;
  std::vector<int64_t> last;           // token each row ends in
  std::vector<char> broken;            // per sequence: its numbers are not finite
  std::vector<Candidates> candidates;  // per row
  std::vector<Candidate> merged;       // per sequence, beams * 2 * TOP
  std::vector<int64_t> parent_tokens;  // copies of a round's beams before they are chosen anew
  std::vector<float> parent_paths;

  int rows(int round) const { return search.batch * per_sequence(round); }
  // Beams are equal until the first round is over.
  int per_sequence(int round) const { return round == 0 ? 1 : search.beams; }
};

// Throws std::bad_alloc.
void reserve(Drafter &d) {
  const size_t rows = d.max_rows, widest = std::max(padded(d.hidden), padded(d.width));
  d.blocks.resize(d.layers);
  d.biases.resize(d.layers);
  d.wide.resize(2 * rows * widest);
  for (auto *buffer : {&d.narrow, &d.spare, &d.states, &d.next_states}) buffer->resize(rows * widest);
  d.x.resize(rows * widest);
  d.joined.resize(rows * widest * 2);
  d.logits.resize(rows * padded(d.head.n));
  d.scores.resize(rows);
  d.last.resize(rows);
  d.broken.resize(rows);
  d.candidates.resize(rows);
  d.merged.resize(rows * 2 * TOP);
}

// next state = SiLU(W e(token) + U state + u), or e(token) + state without an RNN
void next_states(Drafter &d, int rows, int member) {
  Model &m = *d.m;
  const int h = d.hidden, hs = padded(h), blocks = hs / LANES, n = pieces(m.team, blocks);
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
void draft_logits(Drafter &d, int rows, int per_sequence, int member) {
  Model &m = *d.m;
  const int h = d.hidden, e = d.width, es = padded(e), hs = padded(h);
  const int blocks = es / LANES, n = pieces(m.team, blocks);
  float *wide = d.wide.data();
  m.team.phase(member, rows, [&](int i) {
    bf16 *joined = d.joined.data() + size_t(i) * 2 * h;
    std::memcpy(joined, d.search.context + size_t(i / per_sequence) * h, size_t(h) * sizeof(bf16));
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
    const int parts = pieces(m.team, hs / LANES);
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

// The TOP-th largest of `count` logits and the largest; NaN counts as -inf.
void find_cut(const float *logits, int count, float &border, float &best) {
  float top[TOP];  // min-heap: top[0] is the smallest of the TOP largest so far
  for (int c = 0; c < TOP; ++c) top[c] = logits[c] == logits[c] ? logits[c] : -INFINITY;
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
  border = top[0];
  best = *std::max_element(top, top + TOP);
}

// The candidates of one row: the columns of its TOP largest logits and all that tie with the last of them. The score of
// each is the running score plus its log-softmax over the candidates. None if the largest logit is not finite.
void find_candidates(const float *logits, int count, float running, int row, Candidates &out) {
  float border, best;
  find_cut(logits, count, border, best);
  out.count = 0;
  if (!std::isfinite(best)) return;
  float mass = 0.0f;
  int ties = 0;
  for (int c = 0; c < count; ++c)
    if (logits[c] >= border) {
      mass += std::exp(logits[c] - best);
      if (logits[c] > border || ties++ < TOP) out.add(logits[c] - best, row * count + c);
    }
  const float offset = running - std::log(mass);
  for (int i = 0; i < out.count; ++i) out.of[i].score += offset;
}

// The beams of a sequence whose numbers are not finite: its first token everywhere, and NaN scores.
void give_up(Drafter &d, int sequence) {
  const RedrafterSearch &s = d.search;
  const size_t width = s.length + 1, beams = size_t(sequence) * s.beams;
  std::fill_n(s.tokens + beams * width, s.beams * width, s.first[sequence]);
  std::fill_n(s.paths + beams * width, s.beams * width, std::numeric_limits<float>::quiet_NaN());
  std::fill_n(d.last.begin() + beams, s.beams, s.first[sequence]);
  std::fill_n(d.scores.begin() + beams, s.beams, 0.0f);
  std::fill_n(d.states.begin() + beams * d.hidden, size_t(s.beams) * d.hidden, bf16(0));
  d.broken[sequence] = 1;
}

// The K best continuations of one sequence become its beams.
void choose(Drafter &d, int sequence, int round) {
  const RedrafterSearch &s = d.search;
  const int per_sequence = d.per_sequence(round), width = s.length + 1, h = d.hidden;
  Candidate *all = d.merged.data() + size_t(sequence) * s.beams * 2 * TOP, *end = all;
  for (int r = 0; r < per_sequence; ++r) {
    const Candidates &row = d.candidates[sequence * per_sequence + r];
    end = std::copy_n(row.of, row.count, end);
    if (!row.count) d.broken[sequence] = 1;
  }
  if (d.broken[sequence] || end - all < s.beams) return give_up(d, sequence);
  std::partial_sort(all, all + s.beams, end, [](const Candidate &a, const Candidate &b) {
    return a.score != b.score ? a.score > b.score : a.flat < b.flat;
  });
  const size_t beams = size_t(sequence) * s.beams, start = beams * width, size = size_t(s.beams) * width;
  int64_t *tokens = s.tokens + start, *old_tokens = d.parent_tokens.data() + start;
  float *paths = s.paths + start, *old_paths = d.parent_paths.data() + start;
  std::copy_n(tokens, size, old_tokens);
  std::copy_n(paths, size, old_paths);
  for (int k = 0; k < s.beams; ++k) {
    const int parent = all[k].flat / d.head.n, column = all[k].flat % d.head.n;
    std::copy_n(old_tokens + size_t(parent) * width, round + 1, tokens + size_t(k) * width);
    std::copy_n(old_paths + size_t(parent) * width, round + 1, paths + size_t(k) * width);
    const int64_t token = d.token_of_column ? d.token_of_column[column] : column;
    tokens[size_t(k) * width + round + 1] = token;
    paths[size_t(k) * width + round + 1] = all[k].score;
    d.last[beams + k] = token;
    d.scores[beams + k] = all[k].score;
    std::memcpy(d.states.data() + (beams + k) * h,
                d.next_states.data() + (size_t(sequence) * per_sequence + parent) * h, size_t(h) * sizeof(bf16));
  }
}

// What the first round starts from. Throws std::bad_alloc.
void begin_search(Drafter &d) {
  const RedrafterSearch &s = d.search;
  const size_t size = size_t(s.batch) * s.beams * (s.length + 1);
  if (d.parent_tokens.size() < size) d.parent_tokens.resize(size);
  if (d.parent_paths.size() < size) d.parent_paths.resize(size);
  std::fill_n(s.tokens, size, 0);
  std::fill_n(s.paths, size, 0.0f);
  std::fill_n(d.states.begin(), size_t(s.batch) * d.hidden, bf16(0));
  std::fill_n(d.scores.begin(), s.batch, 0.0f);
  std::fill_n(d.broken.begin(), s.batch, 0);
  std::copy_n(s.first, s.batch, d.last.begin());
  for (int i = 0; i < s.batch * s.beams; ++i) s.tokens[size_t(i) * (s.length + 1)] = s.first[i / s.beams];
}

inline int64_t search_phases(const Drafter &d, int length) { return int64_t(length) * (d.layers + 8); }

void run_search(void *arg, int member) {
  Drafter &d = *static_cast<Drafter *>(arg);
  Team &team = d.m->team;
  for (int round = 0; round < d.search.length; ++round) {
    const int rows = d.rows(round), per_sequence = d.per_sequence(round);
    next_states(d, rows, member);
    draft_logits(d, rows, per_sequence, member);
    team.phase(member, rows, [&](int i) {
      const float *logits = d.logits.data() + size_t(i) * padded(d.head.n);
      find_candidates(logits, d.head.n, d.scores[i], i % per_sequence, d.candidates[i]);
    });
    team.phase(member, d.search.batch, [&](int sequence) { choose(d, sequence, round); });
  }
}

}  // namespace
