// What every native op shares: work split over threads, and vector arithmetic for AVX-512.
//
// Threads are not made here. Python hands over the entry point of the OpenMP runtime that PyTorch has loaded
// (`fw_use_runtime`), so that both share one pool and one budget; without it work runs on the calling thread.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FW_X86 1
#include <immintrin.h>
#endif

#define FW_API extern "C" __attribute__((visibility("default")))
#define FW_INLINE inline __attribute__((always_inline))

// Functions between FW_PUSH(...) and FW_END are compiled for an instruction set and only called where it exists.
#define FW_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"
#define FW_AVX2 "avx2,fma"
#if (defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 10)
#define FW_AVX512_BF16 "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma"
#endif
#define FW_DO(text) _Pragma(#text)
#if defined(__clang__)
#define FW_PUSH(name) FW_DO(clang attribute push(__attribute__((target(name))), apply_to = function))
#define FW_END FW_DO(clang attribute pop)
#else
#define FW_PUSH(name) FW_DO(GCC push_options) FW_DO(GCC target(name))
#define FW_END FW_DO(GCC pop_options)
#endif

// The one of two functions that suits the instruction set in use: where an op has its own for AVX-512 and one for all.
#ifdef FW_X86
#define FW_PICK(plain, wide) (fw::level() == fw::VNNI ? (wide) : (plain))
#else
#define FW_PICK(plain, wide) (plain)
#endif

namespace fw {

enum Level { PORTABLE = 0, TWO = 1, VNNI = 2 };  // AVX2; AVX-512 with VNNI

// The best instruction set of this processor, or a lower one that was asked for (tests run every path).
int level();

// Whether, at the level in use, products of bfloat16 can be had.
bool bfloat16();

// Calls work(first, last) so that the ranges cover 0 .. count; at most `threads` at once, `grain` indices at least.
using Range = void (*)(void* data, int64_t first, int64_t last);
void spread(int64_t count, int64_t grain, int threads, Range work, void* data);

template <typename Work>
inline void parallel(int64_t count, int64_t grain, int threads, const Work& work) {
  spread(
      count, grain, threads,
      [](void* data, int64_t first, int64_t last) { (*static_cast<const Work*>(data))(first, last); },
      const_cast<Work*>(&work));
}

// Scratch memory of the calling thread, kept between calls; aligned to a cache line.
void* scratch(int slot, size_t bytes);

}  // namespace fw
