// Threads, scratch memory and the choice of instruction set; see common.hpp.
#include "common.hpp"

#include <atomic>
#include <cstdlib>
#include <thread>

namespace {

using Entry = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<Entry> entry{nullptr};
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

// A team that is held for many loops. A loop is a round; its number of pieces and the next of them are one number, so
// that whoever takes a piece knows that the loop it belongs to is still on.
class Team {
 public:
  void loop(int64_t count, int64_t grain, fw::Range work, void* data) {
    if ((count + grain - 1) / grain > MOST) grain = (count + MOST - 1) / MOST;
    const int64_t pieces = (count + grain - 1) / grain;
    job = {work, data, count, grain};
    done.store(0, std::memory_order_relaxed);
    ticket.store(static_cast<uint64_t>(pieces) << 32, std::memory_order_release);
    while (take()) {}
    for (Wait wait; done.load(std::memory_order_acquire) < pieces;) wait.again();
  }

  void serve() {
    for (Wait wait; !over.load(std::memory_order_acquire);) {
      if (take()) wait = Wait();
      else wait.again();
    }
  }

  void end() { over.store(true, std::memory_order_release); }

 private:
  static constexpr int64_t MOST = 1 << 20;

  struct Loop {
    fw::Range work;
    void* data;
    int64_t count, grain;
  };

  static bool open(uint64_t now) { return (now & 0xffffffffu) < now >> 32; }

  bool take() {
    if (!open(ticket.load(std::memory_order_relaxed))) return false;
    const uint64_t mine = ticket.fetch_add(1, std::memory_order_acq_rel);
    if (!open(mine)) return false;
    const int64_t first = static_cast<int64_t>(mine & 0xffffffffu) * job.grain, last = first + job.grain;
    job.work(job.data, first, last < job.count ? last : job.count);
    done.fetch_add(1, std::memory_order_release);
    return true;
  }

  Loop job{};
  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<int64_t> done{0};
  std::atomic<bool> over{false};
};

thread_local Team* team = nullptr;

struct Gathering {
  Team& team;
  fw::Plain work;
  void* data;
};

void join(void* given) {
  Gathering& all = *static_cast<Gathering*>(given);
  if (team != &all.team) return all.team.serve();
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
  Team made;
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

// `parallel` is GOMP_parallel of a loaded OpenMP runtime, or null.
FW_API void fw_use_runtime(void* parallel) { entry.store(reinterpret_cast<Entry>(parallel)); }

// Keeps to instruction sets up to `most` (fw::Level) -> the one in use.
FW_API int fw_level(int most) {
  if (most >= 0) ceiling.store(most);
  return fw::level();
}
