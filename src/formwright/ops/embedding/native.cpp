// Rows of embedding tables summed and normalised: one pass over what comes out, nothing written in between.
#include "../native/calls.hpp"

#include <atomic>

namespace {

// A table of `rows` float rows, or of bytes with a step a row; `ids` (tokens) or null for its first row everywhere.
struct Source {
  const void* table;
  const float* steps;
  const int64_t* ids;
  int64_t rows;
  float factor;
};

template <typename From>
void add(const From* row, float factor, bool first, float* y, int64_t width) {
  for (int64_t c = 0; c < width; ++c) {
    const float value = static_cast<float>(row[c]) * factor;
    y[c] = first ? value : y[c] + value;
  }
}

void add(const Source& s, int64_t row, bool first, float* y, int64_t width) {
  if (s.steps == nullptr) return add(static_cast<const float*>(s.table) + row * width, s.factor, first, y, width);
  add(static_cast<const int8_t*>(s.table) + row * width, s.steps[row] * s.factor, first, y, width);
}

}  // namespace

// y (tokens, width) -> the index of a source that was asked for a row it lacks, or -1.
FW_API int64_t fw_embedding(const Source* sources, int64_t count, int64_t tokens, int64_t width, const fw::Norm* norm,
                            float* y, int threads) {
  std::atomic<int64_t> lacking{-1};
  fw::parallel(tokens, 64, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t t = first; t < last; ++t) {
        const int64_t row = sources[i].ids == nullptr ? 0 : sources[i].ids[t];
        if (row < 0 || row >= sources[i].rows) return lacking.store(i);
        add(sources[i], row, i == 0, y + t * width, width);
      }
    fw_layer_norm(norm, y + first * width, last - first, width);
  });
  return lacking.load();
}
