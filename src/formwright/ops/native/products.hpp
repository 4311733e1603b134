// Small matrix products, for kernels whose chunks stay in a core's caches; written once for every instruction set.
//
// Include behind lanes.hpp, in the same namespace. Matrices are padded with zeros to 16 columns and blocks of 4 rows,
// so no product has ragged edges; `gather` and `scatter` go between them and rows of any width.

#ifdef FW_WIDE
#include "vector512.hpp"
#endif

constexpr int64_t ROWS = 4;

// Vectors of columns of a tile: as many as stay in registers with ROWS rows.
#ifdef FW_WIDE
constexpr int64_t ACROSS = 4;
#else
constexpr int64_t ACROSS = 1;
#endif

// Which entries of a product are needed: all; those of a lower triangle; or all, from a left factor that is itself a
// lower or an upper triangle. Triangles are made of blocks of ROWS: what such a block holds beyond the diagonal counts.
enum Reach { ALL, LOWER, FROM_LOWER, FROM_UPPER };

struct Left {
  const float* at;
  int64_t row, column;
};

static FW_INLINE int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

// ROWS rows and 16 V columns: c = sign a b, or added to what is there; inner indices from `first` to `last`.
template <int V>
static FW_INLINE void tile(float* c, int64_t c_row, Left a, const float* b, int64_t b_row, int64_t first, int64_t last,
                           float sign, bool add) {
  Lanes acc[ROWS][V] = {};
  for (int64_t i = first; i < last; ++i) {
    Lanes right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = load(b + i * b_row + WIDTH * v);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Lanes left = all(a.at[r * a.row + i * a.column]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = fma(left, right[v], acc[r][v]);
    }
  }
  const Lanes factor = all(sign);
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* y = c + r * c_row + WIDTH * v;
      store(y, add ? fma(factor, acc[r][v], load(y)) : factor * acc[r][v]);
    }
}

// 16 V columns of all rows that reach as far as `column`.
template <int V>
static FW_INLINE void panel(float* c, int64_t c_row, Left a, const float* b, int64_t b_row, int64_t rows,
                            int64_t column, int64_t inner, float sign, bool add, Reach reach) {
  for (int64_t r = reach == LOWER ? column / ROWS * ROWS : 0; r < rows; r += ROWS) {
    const int64_t first = reach == FROM_UPPER ? r : 0;
    const int64_t last = reach == FROM_LOWER && r + ROWS < inner ? r + ROWS : inner;
    tile<V>(c + r * c_row + column, c_row, {a.at + r * a.row, a.row, a.column}, b + column, b_row, first, last, sign,
            add);
  }
}

// c (rows, columns) = sign * a b, or added to what is there; see Reach.
static void product(float* c, int64_t c_row, Left a, const float* b, int64_t b_row, int64_t rows, int64_t columns,
                    int64_t inner, float sign, bool add, Reach reach) {
  // Of a triangle, wide tiles would make much that nobody reads.
  const int64_t across = reach == LOWER && ACROSS > 2 ? 2 : ACROSS;
  int64_t j = 0;
  if (across == 4)
    for (; j + 64 <= columns; j += 64) panel<4>(c, c_row, a, b, b_row, rows, j, inner, sign, add, reach);
  if (across >= 2)
    for (; j + 32 <= columns; j += 32) panel<2>(c, c_row, a, b, b_row, rows, j, inner, sign, add, reach);
  for (; j < columns; j += 16) panel<1>(c, c_row, a, b, b_row, rows, j, inner, sign, add, reach);
}

// from (rows, columns) -> to (columns, to_row), zeros beyond the rows; all but `rows` in whole vectors.
static void transpose(const float* from, int64_t rows, int64_t columns, float* to, int64_t to_row) {
#ifdef FW_WIDE
  for (int64_t i = 0; i < to_row; i += WIDTH)
    for (int64_t j = 0; j < columns; j += WIDTH)
      transpose16(from + i * columns + j, columns, rows - i, to + j * to_row + i, to_row);
#else
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < to_row; ++i) to[j * to_row + i] = i < rows ? from[i * columns + j] : 0.0f;
#endif
}

// rows of `width` floats every `stride`, times `factor` -> contiguous rows of `wide`; `padded` rows in all.
static void gather(const float* from, int64_t stride, int64_t rows, int64_t width, float factor, float* to,
                   int64_t padded, int64_t wide) {
  for (int64_t i = 0; i < padded; ++i) {
    float* row = to + i * wide;
    const int64_t filled = i < rows ? width : 0;
    for (int64_t j = 0; j < filled; ++j) row[j] = factor * from[i * stride + j];
    for (int64_t j = filled; j < wide; ++j) row[j] = 0.0f;
  }
}

static void scatter(const float* from, int64_t wide, int64_t rows, int64_t width, float factor, float* to,
                    int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j) to[i * stride + j] = factor * from[i * wide + j];
}

// Clears what a product of reach LOWER made above the diagonal within blocks of ROWS, and the diagonal unless `keep`.
static void clear_above(float* square, int64_t row, int64_t rows, bool keep) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = keep ? i + 1 : i; j < whole(i + 1, ROWS); ++j) square[i * row + j] = 0.0f;
}
