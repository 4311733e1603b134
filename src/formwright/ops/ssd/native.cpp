// The state-space dual in float32, forward and backward, in chunks of up to 64 tokens: a document begins a new one, so
// that nothing in it, finite or not, meets another document.
//
// Each chunk of a group is cut once into a Block: B and C padded to whole vectors, and their scores C B^T. Then every
// head walks its chunks with its state in the second-level cache. With the decays' running products M, X = dt x, and
// `into` and `out` the decays from a chunk's start to a token and from it to the chunk's end:
//
//     Y = (scores M) X + into (C S) + D x,    S <- through S + B^T (out X)
//
// The backward pass goes through the chunks in reverse with the states that the forward pass kept before each, and
// leaves what belongs to groups (of B, C and the scores) summed over a slice of their heads; a last pass over the
// blocks adds slices up. Nothing depends on the number of threads.
#include "../native/calls.hpp"

#include <algorithm>

namespace {

constexpr int64_t CHUNK = 64;

struct Call {
  fw::Tokens x, dt, B, C, dy;            // (rows length, heads width), (heads), (groups size) twice, like x
  const float *A, *D, *start, *dfinal;   // (heads), (heads) or null, (rows, heads, width, size) or null, alike
  const uint8_t* resets;                 // (rows length) or null
  const int64_t *borders, *firsts;       // where chunks begin, in tokens (chunks + 1), and rows, in chunks (rows + 1)
  float *y, *final;                      // (rows length, heads, width), (rows, heads, width, size)
  float *blocks, *states;                // see Block; (chunks, heads, size, width), padded, or null
  float* dblocks;                        // (slices) times the blocks
  float *dx, *ddt, *dA, *dB, *dC, *dD;   // like what they are of, but dA and dD (rows, heads)
  float* dstart;                         // (rows, heads, width, size)
  int64_t rows, length, heads, groups, width, size, slices;

  int64_t chunks() const { return firsts[rows]; }
  int64_t wide() const { return (width + 15) / 16 * 16; }
  int64_t deep() const { return (size + 15) / 16 * 16; }
  int64_t tokens(int64_t chunk) const { return borders[chunk + 1] - borders[chunk]; }
  bool resets_at(int64_t token) const { return resets != nullptr && resets[token]; }
  int64_t block_floats() const { return CHUNK * (2 * deep() + CHUNK); }
  float* state_at(int64_t chunk, int64_t head) const { return states + (chunk * heads + head) * deep() * wide(); }
};

// What a chunk of one group holds, or the gradients of all that: b and c (64, deep), scores (64, 64).
struct Block {
  float *b, *c, *scores;

  Block(const Call& call, float* blocks, int64_t chunk, int64_t group)
      : b(blocks + (chunk * call.groups + group) * call.block_floats()),
        c(b + CHUNK * call.deep()),
        scores(c + CHUNK * call.deep()) {}
};

#define FW_KERNEL "../ssd/kernel.hpp"
#include "../native/levels.hpp"

// run(call, i, j) for every i < first and j < second.
template <typename Run>
void each(const Call& call, int64_t first, int64_t second, int64_t grain, int threads, const Run& run) {
  fw::parallel(first * second, grain, threads, [&](int64_t from, int64_t to) {
    for (int64_t at = from; at < to; ++at) run(call, at / second, at % second);
  });
}

}  // namespace

// Tokens of a chunk at most.
FW_API int64_t fw_ssd_chunk() { return CHUNK; }

// x, dt, A, B, C, D, start and resets -> y and final, blocks, and states where they are wanted. Without blocks the
// length is 1, and one step is taken.
FW_API void fw_ssd(const Call* given, int threads) {
  const Call& call = *given;
  if (call.blocks == nullptr) {
    // Steps are short: a thread takes about a quarter of a megabyte of states at once.
    const int64_t grain = 1 + (1 << 16) / (call.width * call.size);
    each(call, call.rows, call.heads, grain, threads, FW_AT_LEVEL(step));
    return;
  }
  each(call, call.chunks(), call.groups, 1, threads, FW_AT_LEVEL(cut));
  each(call, call.rows, call.heads, 1, threads, FW_AT_LEVEL(forward));
}

// The same with blocks and states, dy and dfinal -> dx, ddt, dA, dB, dC, dD, dstart; uses dblocks.
FW_API void fw_ssd_backward(const Call* given, int threads) {
  const Call& call = *given;
  each(call, call.rows, call.groups * call.slices, 1, threads, FW_AT_LEVEL(backward));
  each(call, call.chunks(), call.groups, 1, threads, FW_AT_LEVEL(join));
}
