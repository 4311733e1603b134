// One token of a Mamba layer for a few rows in float32: four passes over its weights, each shared among threads.
// Inputs are few, so time is that of reading the weights once.
#include "../native/common.hpp"

namespace {

struct Call {
  const float* x;                                            // (rows, width)
  const float *in_weight, *in_bias;                          // (2 inner, width), (2 inner) or null
  const float *taps_of, *conv_bias;                          // (inner, taps), (inner) or null
  const float *x_weight, *dt_weight, *dt_bias, *A_log, *D;   // (rank + 2 states, inner), (inner, rank), (inner, states)
  const float *out_weight, *out_bias;                        // (width, inner), (width) or null
  const float *window, *h;                                   // (rows, taps - 1, inner), (rows, inner, states)
  float *y, *next_window, *next_h;                           // (rows, width), like window, like h
  float *mixed, *values, *chosen;                            // of the rows: 2 inner, inner, rank + 2 states
  int64_t rows, width, inner, states, taps, rank;
};

namespace portable {
#include "../native/lanes.hpp"
#include "kernel.hpp"
}  // namespace portable

#ifdef FW_X86
FW_PUSH(FW_AVX2)
namespace two {
#include "../native/lanes.hpp"
#include "kernel.hpp"
}  // namespace two
FW_END
FW_PUSH(FW_AVX512)
#define FW_WIDE
namespace wide {
#include "../native/lanes.hpp"
#include "kernel.hpp"
}  // namespace wide
#undef FW_WIDE
FW_END
#endif

using Pass = void (*)(const Call& call, int64_t first, int64_t last);

struct Passes {
  Pass enter, select, scan, leave;
};

Passes passes() {
#ifdef FW_X86
  if (fw::level() == fw::VNNI) return {wide::enter, wide::select, wide::scan, wide::leave};
  if (fw::level() == fw::TWO) return {two::enter, two::select, two::scan, two::leave};
#endif
  return {portable::enter, portable::select, portable::scan, portable::leave};
}

}  // namespace

FW_API void fw_mamba_step(const Call* call, int threads) {
  const Passes run = passes();
  const auto each = [&](int64_t count, int64_t grain, Pass pass) {
    fw::parallel(count, grain, threads, [&](int64_t first, int64_t last) { pass(*call, first, last); });
  };
  each(2 * call->inner, 128, run.enter);
  each(call->rank + 2 * call->states, 16, run.select);
  each(call->inner, 128, run.scan);
  each(call->width, 64, run.leave);
}
