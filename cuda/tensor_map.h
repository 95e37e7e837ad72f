/* tensor_map.h -- how a tile is cut from a matrix of bf16 in memory: what TMA, which copies tiles by itself, is told.
 */
#pragma once
#include "prim.cuh"
#ifdef __CUDACC__
#include <cuda.h>
using TensorMap = CUtensorMap;
#else
struct TensorMap {
    char *p;
    int rows, cols;
    int64_t ld;
    int box_rows, box_cols, count; /* 0: one, and tiles have no third coordinate */
};
#define __grid_constant__
#endif

/* The map of a matrix (rows, cols), row r at p + r * ld, of which tiles of box_rows by box_cols are copied: at most 256
 * by 64, or by 32.  In shared memory a tile's row has 128 bytes, and chunk j of 16 bytes of row r lies at j ^ r % 8; or
 * 64 bytes, and it lies at j ^ r / 2 % 4.  p lies on 16 bytes, and so does every row.  With `count` of so many
 * matrices, each rows * ld behind the one before: a tile is then one of theirs, and tile_load is told whose.  What is
 * kept: the same matrix again costs a look. */
const TensorMap &tensor_map(const bf16 *p, int rows, int cols, int64_t ld, int box_rows, int box_cols, int count = 0);
