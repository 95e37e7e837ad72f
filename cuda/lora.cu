/* lora.cu -- an adapter's B's as one matrix with zeros between them, and the gradient of that matrix back to theirs.  A
 * thread for each value: small, and bound by memory. */
#include "ops.cuh"

namespace {

enum { THREADS = 256 };

/* Which group row o belongs to, and where it lies among the rows of all groups; -1: to none. */
__device__ int group_of(const int32_t *rows, int J, int o, int64_t &place) {
    int64_t before = 0;
    for (int j = 0; j < J; before += rows[2 * j + 1] - rows[2 * j], j++)
        if (o >= rows[2 * j] && o < rows[2 * j + 1]) {
            place = before + o - rows[2 * j];
            return j;
        }
    return -1;
}

__global__ void __launch_bounds__(THREADS)
    spread(float *dense, const float *blocks, const int32_t *rows, float scale, int J, int r, int64_t values) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    launch_next(), wait_earlier();
    if (at >= values) return;
    const int width = J * r, o = (int)(at / width), k = (int)(at % width);
    int64_t place = 0;
    const bool mine = group_of(rows, J, o, place) == k / r;
    dense[at] = mine ? scale * blocks[place * r + k % r] : 0.0f;
}

__global__ void __launch_bounds__(THREADS) gather(float *dblocks, const float *ddense, const int32_t *rows, float scale,
                                                  int accumulate, int J, int r, int64_t values) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    launch_next(), wait_earlier();
    if (at >= values) return;
    const int width = J * r, o = (int)(at / width), k = (int)(at % width);
    int64_t place = 0;
    if (group_of(rows, J, o, place) != k / r) return;
    const float x = scale * ddense[at];
    float *d = dblocks + place * r + k % r;
    *d = accumulate ? *d + x : x;
}

}  // namespace

void OPERATOR(lora_spread)(float *dense, const float *blocks, const int32_t *rows, float scale, int J, int r, int OC) {
    const int64_t values = (int64_t)OC * J * r;
    launch_early(Grid(divide_up(values, THREADS), THREADS), spread, dense, blocks, rows, scale, J, r, values);
}

void OPERATOR(lora_gather)(float *dblocks, const float *ddense, const int32_t *rows, float scale, int accumulate, int J,
                           int r, int OC) {
    const int64_t values = (int64_t)OC * J * r;
    launch_early(Grid(divide_up(values, THREADS), THREADS), gather, dblocks, ddense, rows, scale, accumulate, J, r,
                 values);
}
