// Threads, scratch memory and the choice of instruction set; see common.hpp.
#include "common.hpp"

#include <atomic>
#include <cstdlib>
#include <thread>

namespace {

using Entry = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Number = int (*)();
std::atomic<Entry> entry{nullptr};
std::atomic<Number> number{nullptr};
std::atomic<int> ceiling{fw::VNNI};

struct Job {
  fw::Range work;
  void* data;
  int64_t count, grain;
  std::atomic<int64_t> next{0};
};

// Pieces are handed out as threads come: a thread that the machine holds up does not hold up the others.
void drain(void* given) {
  Job& job = *static_cast<Job*>(given);
  for (;;) {
    const int64_t first = job.next.fetch_add(job.grain);
    if (first >= job.count) return;
    const int64_t last = first + job.grain;
    job.work(job.data, first, last < job.count ? last : job.count);
  }
}

// Waits by looking: first at full speed, then so that another thread can have the processor.
struct Wait {
  int looks = 0;
  void again() {
    if (++looks > 20000) return std::this_thread::yield();
#ifdef FW_X86
    _mm_pause();
#endif
  }
};

// A team that is held for many loops. Every member has a share of a loop's pieces, the same one in every call, so that
// what the share reads stays in that core's caches and memory is read in one stream; who is done takes from the others.
// Where a share ends and its next piece are one number, so that whoever takes a piece knows that its loop is still on.
class Team {
 public:
  explicit Team(int members) : shares(members < MOST ? members : MOST) {}

  void loop(int64_t count, int64_t grain, fw::Range work, void* data) {
    if ((count + grain - 1) / grain > PIECES) grain = (count + PIECES - 1) / PIECES;
    const int64_t pieces = (count + grain - 1) / grain;
    job = {work, data, count, grain};
    done.store(0, std::memory_order_relaxed);
    for (int64_t i = 0; i < shares; ++i) {
      const uint64_t first = pieces * i / shares, last = pieces * (i + 1) / shares;
      next[i].piece.store(last << 32 | first, std::memory_order_release);
    }
    round.fetch_add(1, std::memory_order_release);
    help(0);
    for (Wait wait; done.load(std::memory_order_acquire) < pieces;) wait.again();
  }

  void serve(int member) {
    for (int64_t now = after(0); now != OVER; now = after(now)) help(member);
  }

  void end() { round.store(OVER, std::memory_order_release); }

 private:
  static constexpr int MOST = 16;
  static constexpr int64_t PIECES = 1 << 20, OVER = -1;

  struct Loop {
    fw::Range work;
    void* data;
    int64_t count, grain;
  };

  struct alignas(64) Share {
    std::atomic<uint64_t> piece{0};  // the last of the share in the upper half, the next in the lower
  };

  // The round that is on, once it is not the one that was seen.
  int64_t after(int64_t seen) {
    for (Wait wait;; wait.again()) {
      const int64_t now = round.load(std::memory_order_acquire);
      if (now != seen) return now;
    }
  }

  void help(int member) {
    for (int i = 0; i < shares; ++i)
      while (take(next[(member + i) % shares].piece)) {}
  }

  static bool open(uint64_t now) { return (now & 0xffffffffu) < now >> 32; }

  bool take(std::atomic<uint64_t>& piece) {
    if (!open(piece.load(std::memory_order_relaxed))) return false;
    const uint64_t mine = piece.fetch_add(1, std::memory_order_acq_rel);
    if (!open(mine)) return false;
    const int64_t first = static_cast<int64_t>(mine & 0xffffffffu) * job.grain, last = first + job.grain;
    job.work(job.data, first, last < job.count ? last : job.count);
    done.fetch_add(1, std::memory_order_release);
    return true;
  }

  const int shares;
  Loop job{};
  Share next[MOST];
  alignas(64) std::atomic<int64_t> done{0};
  alignas(64) std::atomic<int64_t> round{0};
};

thread_local Team* team = nullptr;

struct Gathering {
  Team& team;
  fw::Plain work;
  void* data;
};

void join(void* given) {
  Gathering& all = *static_cast<Gathering*>(given);
  if (team != &all.team) return all.team.serve(number.load(std::memory_order_relaxed)());
  all.work(all.data);
  all.team.end();
}

struct Store {
  void* at[4] = {};
  size_t size[4] = {};
  ~Store() {
    for (void* held : at) std::free(held);
  }
};

}  // namespace

namespace fw {

int level() {
  static const int best = [] {
#ifdef FW_X86
    __builtin_cpu_init();
    const bool two = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
    return two && wide ? VNNI : two ? TWO : PORTABLE;
#else
    return PORTABLE;
#endif
  }();
  const int most = ceiling.load(std::memory_order_relaxed);
  return best < most ? best : most;
}

bool bfloat16() {
#if defined(FW_X86) && defined(FW_AVX512_BF16)
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has && level() == VNNI;
#else
  return false;
#endif
}

void spread(int64_t count, int64_t grain, int threads, Range work, void* data) {
  if (count <= 0) return;
  if (grain < 1) grain = 1;
  const Entry run = entry.load(std::memory_order_relaxed);
  const int64_t pieces = (count + grain - 1) / grain;
  if (threads > pieces) threads = static_cast<int>(pieces);
  if (threads < 2 || run == nullptr) {
    work(data, 0, count);
    return;
  }
  if (team != nullptr) return team->loop(count, grain, work, data);
  Job job{work, data, count, grain};
  run(drain, &job, static_cast<unsigned>(threads), 0);
}

void gather(int threads, Plain work, void* data) {
  const Entry run = entry.load(std::memory_order_relaxed);
  if (threads < 2 || run == nullptr || team != nullptr) return work(data);
  Team made(threads);
  Gathering all{made, work, data};
  team = &made;
  run(join, &all, static_cast<unsigned>(threads), 0);
  team = nullptr;
}

void* scratch(int slot, size_t bytes) {
  thread_local Store store;
  if (store.size[slot] < bytes) {
    std::free(store.at[slot]);
    const size_t whole = (bytes + 4095) / 4096 * 4096;
    store.at[slot] = std::aligned_alloc(64, whole);
    store.size[slot] = store.at[slot] ? whole : 0;
    if (store.at[slot] == nullptr) std::abort();
  }
  return store.at[slot];
}

}  // namespace fw

// GOMP_parallel and omp_get_thread_num of a loaded OpenMP runtime.
FW_API void fw_use_runtime(void* parallel, void* thread_number) {
  number.store(reinterpret_cast<Number>(thread_number));
  entry.store(reinterpret_cast<Entry>(parallel));
}

// Keeps to instruction sets up to `most` (fw::Level) -> the one in use.
FW_API int fw_level(int most) {
  if (most >= 0) ceiling.store(most);
  return fw::level();
}
