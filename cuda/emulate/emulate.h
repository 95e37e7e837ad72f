/* emulate.h -- the words of prim.cuh for g++: a kernel runs on the CPU, block after block, each thread a fiber.
 *
 * It checks what a GPU does not say.  Every access to shared memory goes through Shared<T>, which knows the bounds of
 * its array, who wrote and read each place last, and what orders two accesses: a race, a read of what nobody wrote and
 * a read of what cp.async has not finished are errors whatever the schedule, and so are barriers that not all threads
 * reach.  emulate.cpp has the scheduler; README.md says what this can and cannot find. */
#pragma once
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __syncthreads() emulate::sync_block(__FILE__, __LINE__)
#define __syncwarp() emulate::sync_warp()
#define threadIdx (emulate::thread_index)
#define blockIdx (emulate::block_index)
#define blockDim (emulate::block_size)
#define gridDim (emulate::grid_size)

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

namespace emulate {

struct Index {
    unsigned x, y, z;
};
extern Index thread_index, block_index, block_size, grid_size;

/* Call body(context) once for each thread of each block, or record that; context has so many bytes.  After a failure it
 * does nothing. */
struct Launch {
    int64_t blocks;
    int threads;
    size_t shared;
    const char *op;
    void (*body)(const void *);
    bool sm90;   /* of prim_sm90.cuh's words: more shared memory, and what works beside the threads */
    bool early;  /* begins before the kernel in front of it has ended */
    int cluster; /* blocks that run together */
};
void launch(const Launch &l, const void *context, size_t bytes);

/* Ends the kernel; cuda_error() then says what, in which operator, block and thread. */
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

void sync_block(const char *file, int line);
void sync_group(int id, int threads);
void sync_warp();
void wait_earlier();
void prefetch_l2(const void *p, size_t bytes);
/* Where what lay at p when the host last copied something in is kept. */
const char *as_told(const void *p, size_t bytes);

/* Each lane of the warp gives `bytes`, at most LANE_BYTES; the result are those of all lanes, LANE_BYTES apart, to be
 * read before this lane's next exchange.  All lanes must call it with the same word. */
enum { LANE_BYTES = 32 };
const char *exchange(const char *word, const void *mine, size_t bytes);

/* A part of the block's shared memory, and the size of its elements: what is watched one by one. */
struct Region {
    char *begin;
    size_t bytes, element;
};
Region shared_array(const void *declaration, size_t count, size_t element);
Region shared_dynamic(size_t element);
void check_access(const Region &region, const void *p, size_t bytes, bool write);
void check_sum(const Region &region, const void *p, size_t bytes);

void copy_async(const Region &region, void *to, const void *from, int valid, bool told);
void copy_async_commit();
void copy_async_wait(int groups);

/* What stands for an element of shared memory. */
template <class T>
struct Element {
    T *p;
    const Region &region;
    operator T() const {
        check_access(region, p, sizeof(T), false);
        return *p;
    }
    const Element &operator=(T x) const {
        check_access(region, p, sizeof(T), true);
        *p = x;
        return *this;
    }
    const Element &operator=(const Element &other) const { return *this = T(other); }
    const Element &operator+=(T x) const { return *this = T(*this) + x; }
};

}  // namespace emulate

template <class T>
struct Shared {
    T *p;
    emulate::Region region;
    emulate::Element<T> operator[](int64_t i) const { return {at(i, sizeof(T)), region}; }
    Shared operator+(int64_t n) const { return {p + n, region}; }
    Shared operator-(int64_t n) const { return {p - n, region}; }
    T *at(int64_t i, size_t bytes) const {
        int64_t offset = (char *)p - region.begin + i * (int64_t)sizeof(T);
        if (offset < 0 || offset + (int64_t)bytes > (int64_t)region.bytes)
            emulate::fail("byte %lld of a shared array of %zu", (long long)offset, region.bytes);
        if (offset % (int64_t)(bytes < 16 ? bytes : 16))
            emulate::fail("byte %lld of a shared array is not aligned for %zu bytes", (long long)offset, bytes);
        return (T *)(region.begin + offset);
    }
};

#define SHARED(T, name, count)                \
    static const char name##_declaration = 0; \
    const Shared<T> name = shared_of<T>(emulate::shared_array(&name##_declaration, count, sizeof(T)))
#define SHARED_DYNAMIC(T, name) const Shared<T> name = shared_of<T>(emulate::shared_dynamic(sizeof(T)))
template <class T>
Shared<T> shared_of(emulate::Region region) {
    return {(T *)region.begin, region};
}
template <class T, class U>
Shared<T> shared_cast(Shared<U> p) {
    return {(T *)p.p, p.region};
}

/* ---- numbers ---- */

inline float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline uint32_t bf16_bits(float x) {
    uint32_t bits = bits_of_float(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline float exp2_fast(float x) { return exp2f(x); }
inline float divide_fast(float x, float y) { return x / y; }

/* ---- warps ---- */

inline int lane_index() { return (int)(threadIdx.x % WARP); }
inline int warp_index() { return (int)(threadIdx.x / WARP); }

template <class T>
T shuffle(T x, int lane) {
    memcpy(&x, emulate::exchange("shuffle", &x, sizeof x) + lane % WARP * emulate::LANE_BYTES, sizeof x);
    return x;
}
template <class T>
T shuffle_xor(T x, int lanes) {
    return shuffle(x, lane_index() ^ lanes);
}
template <class T>
T shuffle_up(T x, int lanes) {
    return shuffle(x, lane_index() < lanes ? lane_index() : lane_index() - lanes);
}

template <int id>
void sync_group(int threads) {
    static_assert(id >= 1 && id <= 15, "barrier 0 is __syncthreads");
    emulate::sync_group(id, threads);
}

/* ---- sums to which threads add while others do ---- */

inline uint32_t add_shared(Shared<uint32_t> to, uint32_t x) {
    uint32_t *sum = to.at(0, sizeof x);
    emulate::check_sum(to.region, sum, sizeof x);
    const uint32_t before = *sum;
    *sum += x;
    return before;
}
/* One thread runs at a time. */
inline void add_global(uint32_t *to, uint32_t x) { *to += x; }
inline void add_global(uint64_t *to, uint64_t x) { *to += x; }

/* ---- asynchronous copies ---- */

template <class T>
void copy_async(Shared<T> to, const T *from, int valid = 16) {
    if ((uintptr_t)from % 16) emulate::fail("cp.async from an address that is not aligned");
    emulate::copy_async(to.region, to.at(0, 16), from, valid, false);
}
inline void copy_async_commit() { emulate::copy_async_commit(); }
template <int groups>
void copy_async_wait() {
    emulate::copy_async_wait(groups);
}

/* ---- kernels that begin before those in front of them have ended ---- */

inline void launch_next() {}
inline void wait_earlier() { emulate::wait_earlier(); }
inline void prefetch_l2(const void *p, size_t bytes) { emulate::prefetch_l2(p, bytes); }
template <class T>
void copy_async_told(Shared<T> to, const T *from, int valid = 16) {
    emulate::copy_async(to.region, to.at(0, 16), from, valid, true);
}
template <class T>
T told(const T *p) {
    T x;
    memcpy(&x, emulate::as_told(p, sizeof x), sizeof x);
    return x;
}

/* ---- tensor cores ---- */

inline void load_matrices_(uint32_t (&m)[4], Shared<bf16> row, bool transposed) {
    const bf16 *mine = row.at(0, 16);
    emulate::check_access(row.region, mine, 16, false);
    const char *rows = emulate::exchange("ldmatrix", mine, 16);
    const int g = lane_index() / 4, q = 2 * (lane_index() % 4);
    for (int i = 0; i < 4; i++) {
        uint16_t pair[2];
        for (int j = 0; j < 2; j++) {
            int r = transposed ? q + j : g, c = transposed ? g : q + j;
            memcpy(&pair[j], rows + (8 * i + r) * emulate::LANE_BYTES + 2 * c, 2);
        }
        m[i] = pair[0] | (uint32_t)pair[1] << 16;
    }
}
inline void load_matrices(uint32_t (&m)[4], Shared<bf16> row) { load_matrices_(m, row, false); }
inline void load_matrices_transposed(uint32_t (&m)[4], Shared<bf16> row) { load_matrices_(m, row, true); }

/* One chain in order of k; the order on a GPU is its own. */
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const char *all = emulate::exchange("mma", mine, sizeof mine);
    float rows[2][16], columns[2][16]; /* rows g and g + 8 of a, columns q and q + 1 of b */
    auto unpack = [all](float *to, int lane,
                        int word) { /* two values of each of four lanes */
                                    for (int i = 0; i < 4; i++) {
                                        uint32_t pair;
                                        memcpy(&pair, all + (lane + i) * emulate::LANE_BYTES + 4 * word, 4);
                                        to[2 * i] = float_of_bits(pair << 16),
                                               to[2 * i + 1] = float_of_bits(pair & 0xffff0000u);
                                    }
    };
    const int g = lane_index() / 4, q = 2 * (lane_index() % 4);
    for (int upper = 0; upper < 2; upper++)
        for (int i = 0; i < 2; i++) {
            unpack(rows[i] + 8 * upper, 4 * g, i + 2 * upper);
            unpack(columns[i] + 8 * upper, 4 * (q + i), 4 + upper);
        }
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) d[i] += rows[i / 2][k] * columns[i % 2][k];
}

inline void multiply_bytes(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const char *all = emulate::exchange("mma", mine, sizeof mine);
    /* Value k of a row or column, whose lanes begin at `lane`: words `word` and `word + step` of each. */
    auto value = [all](int lane, int word, int step, int k) {
        const char *words = all + (lane + k % 16 / 4) * emulate::LANE_BYTES + 4 * (word + k / 16 * step);
        return (int)(int8_t)words[k % 4];
    };
    const int g = lane_index() / 4, q = 2 * (lane_index() % 4);
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 32; k++) d[i] += value(4 * g, i / 2, 2, k) * value(4 * (q + i % 2), 4, 1, k);
}
