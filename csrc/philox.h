/* philox.h -- the only random numbers: Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
 * 1, 2, 3"), a function of its arguments without any state.  (seed, stream) is the key, (row, position) the counter:
 * stream says what the number is for, so that two uses never share numbers. */
#pragma once
#include <stdint.h>

enum { STREAM_INIT, STREAM_SAMPLE, STREAM_ADAPTER };

void philox(uint32_t out[4], uint64_t seed, uint32_t stream, uint64_t row, uint64_t position);
double philox_uniform(uint64_t seed, uint32_t stream, uint64_t row, uint64_t position); /* in [0, 1), 53 bits */
/* out[i], i < n: normal with mean 0 and the given standard deviation, a function of (seed, stream, row, first + i)
 * alone
 */
void philox_normal(float *out, int64_t first, int64_t n, float std, uint64_t seed, uint32_t stream, uint64_t row);
