// Threads that work through a job's phases together.
//
// A phase consists of pieces. Each running member takes the next one, and the phase is over when all pieces are done, not
// when all members have taken part. So a member that the operating system has suspended delays the others by one piece at
// most, and steps stay fast beside another busy process. It later runs through phases that are over, or gives up when the
// next job has begun; until then, what a job's argument points to must stay alive (`settle` waits for that). Nothing in a
// job may throw: memory is reserved before it runs.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <sched.h>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int MAX_THREADS = 1024;

class Team {
 public:
  // Of the threads asked for, those that the operating system grants; never more than MAX_THREADS.
  explicit Team(int asked) : members_(new Member[std::clamp(asked, 1, MAX_THREADS)]) {
    const int size = std::clamp(asked, 1, MAX_THREADS);
    workers_.reserve(size);
    for (int i = 1; i < size; ++i) {
      try {
        workers_.emplace_back([this, i] { work(i); });
      } catch (const std::system_error &) {
        break;
      }
    }
    size_ = int(workers_.size()) + 1;
  }
  ~Team() {
    stop_ = true;
    job_.fetch_add(1);
    job_.notify_all();
    for (auto &w : workers_) w.join();
  }
  Team(const Team &) = delete;
  Team &operator=(const Team &) = delete;
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
    open_.store(false);
  }

  // Waits until no member is inside a job any more.
  void settle() const {
    while (inside_.load()) sched_yield();
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
    for (int spins = 0; c.done.load(std::memory_order_acquire) < pieces; spins += spins < FEW) pause(spins);
  }

 private:
  static constexpr int FEW = 2000;  // spins before another process may have the core
  struct alignas(64) Counter {
    std::atomic<int> next{0}, done{0};
  };
  struct alignas(64) Member {
    int phase = 0;
  };

  static void pause(int spins) {
    if (spins < FEW) {
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
      for (int spins = 0; job_.load(std::memory_order_acquire) == seen && spins < 2 * FEW; ++spins) pause(spins % FEW);
      job_.wait(seen, std::memory_order_acquire);
      seen = job_.load(std::memory_order_acquire);
      if (stop_) return;
      // Sequentially consistent, as is `settle`: either it sees this member inside, or this member sees the job closed.
      inside_.fetch_add(1);
      if (open_.load()) {
        members_[member].phase = 0;
        task_(arg_, member);
      }
      inside_.fetch_sub(1);
    }
  }

  std::unique_ptr<Member[]> members_;
  std::vector<std::thread> workers_;
  int size_ = 1;
  std::unique_ptr<Counter[]> counters_;
  int capacity_ = 0;
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

// Pieces that a product over `blocks` blocks of 16 columns is cut into; even block counts keep the two-block tiles.
inline int pieces(const Team &team, int blocks) { return std::max(1, std::min(4 * team.size(), blocks / 2)); }
inline Range blocks_of(int blocks, int piece, int count) {
  const Range halves = share((blocks + 1) / 2, piece, count);
  return {halves.begin * 2, std::min(halves.end * 2, blocks)};
}

}  // namespace
