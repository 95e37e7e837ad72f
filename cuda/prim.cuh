/* prim.cuh -- the words that kernels are written in.
 *
 * Whatever a kernel asks of the hardware beyond arithmetic on its own values is here, and nowhere else.  Each word has
 * two bodies: this file's, for nvcc, and that of emulate/emulate.h, with which g++ compiles the same kernels to run and
 * be checked on a CPU.  So a kernel holds no `__shared__`, no `asm` and no `<<< >>>`; README.md says how it is written.
 *
 * Words of CUDA itself that both know: __global__, __device__, __launch_bounds__, threadIdx, blockIdx, blockDim,
 * gridDim, __syncthreads, __syncwarp, uint4. */
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>

enum { WARP = 32 };

/* A brain float: the upper half of a float.  Storage alone: arithmetic is done in float. */
struct bf16 {
    uint16_t bits;
};

#ifdef __CUDACC__
#include <cuda_runtime.h>

/* ---- numbers ---- */

__device__ inline float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t bits_of_float(float x) { return __float_as_uint(x); }

/* Two floats to the nearest bf16, ties to even; `low` is the one at the lower address. */
__device__ inline uint32_t pack_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

/* 2^x, within 2 units in the last place; what is below the normal numbers may be 0. */
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* x / y, within 2 units in the last place; 0 where y is 2^126 or more. */
__device__ inline float divide_fast(float x, float y) { return __fdividef(x, y); }

/* ---- shared memory ---- */

/* A pointer into it.  SHARED(float, sums, 32): an array of 32 floats, in scope like a variable of that name;
 * SHARED_DYNAMIC(float, row): what the launch asked for.  shared_cast takes a part of it for another type. */
template <class T>
using Shared = T *;
#define SHARED(T, name, count)                        \
    __shared__ __align__(16) T name##_storage[count]; \
    Shared<T> name = name##_storage
#define SHARED_DYNAMIC(T, name)                                     \
    extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
    Shared<T> name = reinterpret_cast<T *>(dynamic_shared)
template <class T, class U>
__device__ inline Shared<T> shared_cast(Shared<U> p) {
    return reinterpret_cast<T *>(p);
}
__device__ inline uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* ---- warps: every lane of the warp takes part ---- */

__device__ inline int lane_index() { return (int)(threadIdx.x % WARP); }
__device__ inline int warp_index() { return (int)(threadIdx.x / WARP); }

template <class T>
__device__ inline T shuffle_xor(T x, int lanes) {
    return __shfl_xor_sync(0xffffffffu, x, lanes);
}
template <class T>
__device__ inline T shuffle_up(T x, int lanes) { /* a lane with none below keeps its own */
    return __shfl_up_sync(0xffffffffu, x, lanes);
}
template <class T>
__device__ inline T shuffle(T x, int lane) {
    return __shfl_sync(0xffffffffu, x, lane);
}

/* A barrier of `threads` threads, whole warps, of the block; id 1 to 15, a constant. */
template <int id>
__device__ inline void sync_group(int threads) {
    static_assert(id >= 1 && id <= 15, "barrier 0 is __syncthreads");
    asm volatile("bar.sync %0, %1;" ::"n"(id), "r"(threads) : "memory");
}

/* ---- sums to which threads add while others do: of whole numbers, whose order nobody sees ---- */

/* What was there before. */
__device__ inline uint32_t add_shared(Shared<uint32_t> to, uint32_t x) { return atomicAdd(to, x); }
__device__ inline void add_global(uint32_t *to, uint32_t x) { atomicAdd(to, x); }
__device__ inline void add_global(uint64_t *to, uint64_t x) {
    static_assert(sizeof(unsigned long long) == sizeof x, "CUDA's name for 64 bits");
    atomicAdd((unsigned long long *)to, (unsigned long long)x);
}

/* ---- asynchronous copies, global to shared ---- */

/* 16 bytes, both ends on 16 bytes; bytes from `valid` on come as zeros and are not read. */
template <class T>
__device__ inline void copy_async(Shared<T> to, const T *from, int valid = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
}
/* Those since the last commit are one group of this thread. */
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Until at most `groups` of this thread's are under way.  Other threads see what has come after a barrier. */
template <int groups>
__device__ inline void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

/* ---- tensor cores ---- */

/* Four 8x8 matrices of 16-bit values: lane l brings the address of row l % 8 of matrix l / 8 (16 bytes, aligned), and
 * gets of each matrix columns 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; transposed: of the transpose. */
__device__ inline void load_matrices(uint32_t (&m)[4], Shared<bf16> row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&m)[4], Shared<bf16> row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/* d (16, 8) += a (16, 16) b (16, 8) on bf16, sums in float.  Lane l holds, with g = l / 4 and q = 2 (l % 4):
 *   d  (g, q) (g, q + 1) (g + 8, q) (g + 8, q + 1)
 *   a  pairs of columns: (g, q..) (g + 8, q..) (g, q + 8..) (g + 8, q + 8..)      b  pairs of rows: (q.., g) (q + 8..,
 * g) */
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* d (16, 8) += a (16, 32) b (32, 8) on signed bytes, exactly.  Lane l holds, with g = l / 4 and q = 4 (l % 4), d as
 * above and words of four values of k: a  (g, q..) (g + 8, q..) (g, q + 16..) (g + 8, q + 16..)      b  (q.., g) (q
 * + 16.., g) */
__device__ inline void multiply_bytes(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* ---- kernels that begin before those in front of them have ended: launch_early in runtime.h ---- */

/* The next kernel's blocks may begin where there is room, as soon as each block of this one has said so or has ended.
 * All of this one are then at work or done, and so are all of those before it: what has begun early waits for blocks
 * that have their place, never for some that it keeps out.  It tells nothing of what was written. */
__device__ inline void launch_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/* Until the kernel before is complete; from then on all that it wrote is seen.  Each thread says it once, before it
 * touches global memory: the kernel waits for no more than that one, and has those before it behind it only because
 * that one waited too.  On GPUs before sm_90 no kernel begins early, and there is nothing to wait for. */
__device__ inline void wait_earlier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/* Bytes that will be read, whole words of 16, to the L2 cache: by one thread, and without waiting.  It may come before
 * wait_earlier, for it reads nothing: all SMs share the L2, and what is written later is written there. */
__device__ inline void prefetch_l2(const void *p, size_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"((uint32_t)bytes)
                 : "memory");
#endif
}

/* A value that the host told by a copy and no kernel has written since: it may be read before wait_earlier too, for no
 * kernel behind a copy begins before that is complete. */
template <class T>
__device__ inline T told(const T *p) {
    return *p;
}
/* copy_async before wait_earlier, of what was written before the host last told something by a copy. */
template <class T>
__device__ inline void copy_async_told(Shared<T> to, const T *from, int valid = 16) {
    copy_async(to, from, valid);
}

#else
#include "emulate/emulate.h"
#endif

/* ---- one text for both ---- */

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return float_of_bits((uint32_t)x.bits << 16); }
__device__ inline void from_float(float &to, float x) { to = x; }
__device__ inline void from_float(bf16 &to, float x) { to.bits = (uint16_t)pack_bf16(x, 0.0f); }

/* Over the lanes of a warp, in a tree: every lane gets the same bits. */
template <class T>
__device__ inline T warp_sum(T x) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
    return x;
}
__device__ inline float warp_max(float x) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x = fmaxf(x, shuffle_xor(x, lanes));
    return x;
}

/* ---- access to memory, 16 bytes at a time ---- */

/* N values that lie one behind the other, 16 bytes or a multiple.  [] gives a float. */
template <class T, int N>
struct alignas(16) Pack {
    static_assert(N * sizeof(T) % 16 == 0, "whole words of 16 bytes");
    T x[N];
    __device__ float operator[](int i) const { return to_float(x[i]); }
    __device__ T get(int i) const { return x[i]; }
    __device__ void gather(const T *p, int64_t count) { /* those behind `count` are 0, and not read */
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = i < count ? p[i] : T{};
    }
};

/* In words of two: a float is one instruction away, where a variable of 16 bits is first cut out of its word. */
template <int N>
struct alignas(16) Pack<bf16, N> {
    static_assert(N % 8 == 0, "whole words of 16 bytes");
    uint32_t words[N / 2];
    __device__ float operator[](int i) const {
        return float_of_bits(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    }
    __device__ bf16 get(int i) const { return {(uint16_t)(words[i / 2] >> i % 2 * 16)}; }
    __device__ void gather(const bf16 *p, int64_t count) {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            const uint32_t low = i < count ? p[i].bits : 0u, high = i + 1 < count ? p[i + 1].bits : 0u;
            words[i / 2] = low | high << 16;
        }
    }
};

template <class T>
__host__ __device__ inline bool on_16_bytes(const T *p) {
    return ((uintptr_t)p & 15) == 0;
}

/* N values at p, which lies on 16 bytes. */
template <int N, class T>
__device__ inline Pack<T, N> load_all(const T *p) {
    Pack<T, N> pack;
    uint4 *words = reinterpret_cast<uint4 *>(&pack);
#pragma unroll
    for (int i = 0; i < (int)(N * sizeof(T) / 16); i++) words[i] = reinterpret_cast<const uint4 *>(p)[i];
    return pack;
}
template <int N, class T>
__device__ inline void store_all(T *p, const Pack<T, N> &pack) {
    const uint4 *words = reinterpret_cast<const uint4 *>(&pack);
#pragma unroll
    for (int i = 0; i < (int)(N * sizeof(T) / 16); i++) reinterpret_cast<uint4 *>(p)[i] = words[i];
}

/* The first `count` of N values at p; the others are 0, and are not read.  16 bytes at once where p lies so. */
template <int N, class T>
__device__ inline Pack<T, N> load(const T *p, int64_t count) {
    if (count >= N && on_16_bytes(p)) return load_all<N>(p);
    Pack<T, N> pack;
    pack.gather(p, count);
    return pack;
}

/* The first `count` of the N values to p; nothing behind them is touched. */
template <int N, class T>
__device__ inline void store(T *p, const Pack<T, N> &pack, int64_t count) {
    if (count >= N && on_16_bytes(p)) {
        store_all(p, pack);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++)
            if (i < count) p[i] = pack.get(i);
    }
}

template <int N>
__device__ inline Pack<float, N> pack_of(float, const float (&x)[N]) {
    Pack<float, N> pack;
#pragma unroll
    for (int i = 0; i < N; i++) pack.x[i] = x[i];
    return pack;
}
template <int N>
__device__ inline Pack<bf16, N> pack_of(bf16, const float (&x)[N]) {
    Pack<bf16, N> pack;
#pragma unroll
    for (int i = 0; i < N; i += 2) pack.words[i / 2] = pack_bf16(x[i], x[i + 1]);
    return pack;
}

/* The same from floats, rounded to the type of the array. */
template <int N, class T>
__device__ inline void store(T *p, const float (&x)[N], int64_t count) {
    store(p, pack_of(T{}, x), count);
}
