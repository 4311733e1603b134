// Selective scan in float32, forward and backward. Only chunk-first states are kept between the two passes: the
// backward pass runs each chunk forward again from there. Work is handed out by row and slice of channels; sums over
// channels (the gradients of B and C) are left per slice, so that they do not depend on the number of threads.
#include "../native/calls.hpp"

namespace {

struct Call {
  fw::Tokens x, delta, B, C, z, grad_y;                     // z may be null
  const float *A, *D, *initial, *grad_final;                // (E, N), (E) or null, (rows, E, N) or null, alike
  float *y, *final, *kept;                                  // kept: (chunks, N, padded channels) or null
  float *grad_x, *grad_delta, *grad_z;                      // (tokens, E)
  float *grad_A, *grad_B, *grad_C, *grad_D, *grad_initial;  // (rows, E, N), (slices, tokens, N) twice, (rows, E)
  const int64_t *starts, *lengths, *chunks;                 // (rows): first token, tokens, first chunk
  int64_t rows, tokens, channels, states, slices;
  int softplus;

  const float* initial_of(int64_t row) const { return of(initial, row); }
  const float* grad_final_of(int64_t row) const { return of(grad_final, row); }
  float* final_of(int64_t row) const { return final + row * channels * states; }
  float* kept_at(int64_t chunk, int64_t n) const { return kept + (chunk * states + n) * ((channels + 15) / 16 * 16); }

 private:
  const float* of(const float* from, int64_t row) const {
    return from == nullptr ? nullptr : from + row * channels * states;
  }
};

#define FW_KERNEL "../selective_scan/kernel.hpp"
#include "../native/levels.hpp"

// run(row, slice, first group, last group) for every row and slice of channels.
template <typename Run>
void each(const Call& call, int threads, const Run& run) {
  const int64_t groups = (call.channels + 15) / 16, per = (groups + call.slices - 1) / call.slices;
  fw::parallel(call.rows * call.slices, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) {
      const int64_t slice = at % call.slices, from = slice * per, to = from + per < groups ? from + per : groups;
      run(at / call.slices, slice, from, to);
    }
  });
}

}  // namespace

// Tokens between kept states.
FW_API int64_t fw_selective_scan_chunk() { return portable::CHUNK; }

FW_API void fw_selective_scan(const Call* call, int threads) {
  const auto run = FW_AT_LEVEL(forward_row);
  each(*call, threads,
       [&](int64_t row, int64_t, int64_t first, int64_t last) { run(*call, row, first, last); });
}

FW_API void fw_selective_scan_backward(const Call* call, int threads) {
  const auto run = FW_AT_LEVEL(backward_row);
  each(*call, threads,
       [&](int64_t row, int64_t slice, int64_t first, int64_t last) { run(*call, row, slice, first, last); });
}
