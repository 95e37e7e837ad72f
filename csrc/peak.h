/* peak.h -- the ceilings of this machine, measured: what speeds are a share of. */
#pragma once
#include "ops.h"

/* Multiply-adds per second, counted as two, of all threads together, out of registers. */
double peak_flops(const Ops *ops, int prec, double seconds);
/* Bytes read and written per second by all threads copying with non-temporal stores, between arrays over four times the
 * last cache; 0 where there is no memory for them. */
double peak_copy(double seconds);
/* One such copy, of a multiple of 64 bytes between arrays that begin on 64. */
void copy_past_caches(void *dst, const void *src, size_t bytes);
/* Bytes read per second by all threads together, of an array beyond the caches: on the average of these seconds, as
 * decoding is measured; 0 where there is no memory for it. */
double peak_read(double seconds);
