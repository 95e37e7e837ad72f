/* prim_sm90.cuh -- the words of Hopper (sm_90a) alone, beside those of prim.cuh.
 *
 * Three units work beside the threads: TMA copies tiles between global and shared memory, the tensor cores read both
 * operands from shared memory, and an mbarrier counts who has come and which bytes have.  To them shared memory is
 * another way in (the asynchronous proxy): what threads wrote there is theirs to see after fence_async and a barrier.
 *
 * A tile has rows of 64 values, 128 bytes, or, where no product reads it, of 32; it begins on 1024 bytes, and its
 * chunks of 16 bytes lie as tensor_map.h says.
 */
#pragma once
#include "tensor_map.h"

enum { WARPGROUP = 4 * WARP, TILE_WIDTH = 64, TILE_ALIGNMENT = 1024 };

#ifdef __CUDACC__
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "words of sm_90a: CMakeLists.txt compiles their files for 90a alone"
#endif

/* As SHARED_DYNAMIC, from 1024 bytes on.  The kernel has no other shared memory. */
#define SHARED_TILES(T, name)                                        \
    extern __shared__ __align__(1024) unsigned char dynamic_tiles[]; \
    Shared<T> name = reinterpret_cast<T *>(dynamic_tiles)

/* ---- mbarriers: 8 bytes of shared memory; a phase ends when all arrivals and all bytes it waits for have come ---- */

/* By one thread; then, by the same one, barrier_init_fence, and a barrier of the block before anybody uses it. */
__device__ inline void barrier_init(Shared<uint64_t> b, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_arrive(Shared<uint64_t> b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
/* Arrive, and let the phase wait for so many bytes of tile_load besides. */
__device__ inline void barrier_expect(Shared<uint64_t> b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
                 : "memory");
}
/* Until the phase of that parity has ended: of a new barrier that of parity 1 has, that of parity 0 is the first. */
__device__ inline void barrier_wait(Shared<uint64_t> b, uint32_t parity) {
    uint32_t done = 0;
    while (!done)
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(shared_address(b)), "r"(parity)
            : "memory");
}

/* ---- clusters: blocks whose launch has Grid.cluster ---- */

/* Of this block in its cluster. */
__device__ inline int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
/* A barrier of all threads of all its blocks, as __syncthreads is of one; none of them may return while others still
 * arrive at its mbarriers or load its tiles. */
__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
/* At that block's mbarrier which lies where `b` does in this one.  It says that what was read there may be overwritten;
 * of ordinary stores that the other block is to see it says nothing: in the scope of a cluster the word waits for all
 * stores of the thread, a fence of the whole GPU, hundreds of clocks each time. */
__device__ inline void barrier_arrive_at(Shared<uint64_t> b, int rank) {
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(b)),
        "r"(rank)
        : "memory");
}

/* x to the place of block `rank` where `to` is in this one; its bytes count at the mbarrier that lies there as `b` does
 * here.  So another block is told of numbers without a word that waits for all stores of the thread; who receives them
 * waits for them before it returns. */
__device__ inline void store_async(Shared<float> to, float x, Shared<uint64_t> b, int rank) {
    asm volatile(
        "{\n.reg .b32 there, counts;\n"
        "mapa.shared::cluster.u32 there, %0, %3;\n"
        "mapa.shared::cluster.u32 counts, %2, %3;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %1, [counts];\n}" ::"r"(shared_address(to)),
        "f"(x), "r"(shared_address(b)), "r"(rank)
        : "memory");
}
/* Two neighbours, on 8 bytes. */
__device__ inline void store_async(Shared<float> to, float x, float y, Shared<uint64_t> b, int rank) {
    asm volatile(
        "{\n.reg .b32 there, counts;\n"
        "mapa.shared::cluster.u32 there, %0, %4;\n"
        "mapa.shared::cluster.u32 counts, %3, %4;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%1, %2}, [counts];\n}" ::"r"(
            shared_address(to)),
        "f"(x), "f"(y), "r"(shared_address(b)), "r"(rank)
        : "memory");
}

/* ---- tiles by TMA; each word by one thread ---- */

/* The tile that begins at (row, column), zeros where the matrix has ended; its bytes, all of them, count at `b`. */
__device__ inline void tile_load(Shared<bf16> to, const TensorMap &map, Shared<uint64_t> b, int row, int column) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared_address(to)),
        "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(b)), "r"(column), "r"(row)
        : "memory");
}
/* The same before wait_earlier, of what was written before the host last told something by a copy: see told. */
__device__ inline void tile_load_told(Shared<bf16> to, const TensorMap &map, Shared<uint64_t> b, int row, int column) {
    tile_load(to, map, b, row, column);
}
/* The same of matrix `which` of several. */
__device__ inline void tile_load(Shared<bf16> to, const TensorMap &map, Shared<uint64_t> b, int row, int column,
                                 int which) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
            "r"(shared_address(to)),
        "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(b)), "r"(column), "r"(row), "r"(which)
        : "memory");
}
/* The same to the same place of all blocks of the cluster, two; in each the bytes count at its own `b`. */
__device__ inline void tile_load_all(Shared<bf16> to, const TensorMap &map, Shared<uint64_t> b, int row, int column) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
        "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(b)), "r"(column), "r"(row), "h"((uint16_t)3)
        : "memory");
}
/* The other way; what lies outside the matrix is not written. */
__device__ inline void tile_store(const TensorMap &map, Shared<bf16> from, int row, int column) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
                     reinterpret_cast<uint64_t>(&map)),
                 "r"(shared_address(from)), "r"(column), "r"(row)
                 : "memory");
}
__device__ inline void tile_store(const TensorMap &map, Shared<bf16> from, int row, int column, int which) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
                     reinterpret_cast<uint64_t>(&map)),
                 "r"(shared_address(from)), "r"(column), "r"(row), "r"(which)
                 : "memory");
}
/* Those since the last commit are one group of this thread. */
__device__ inline void tile_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/* Until all but the last `groups` of this thread's have been read from shared memory; before it returns, all must. */
template <int groups>
__device__ inline void tile_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(groups) : "memory");
}
/* What this thread wrote in shared memory, TMA and the tensor cores see from now on. */
__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* ---- one of a warp, registers ---- */

/* True in one lane of the warp, of which all take part. */
__device__ inline bool elected() {
    uint32_t mine;
    asm volatile(
        "{\n.reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(mine));
    return mine != 0;
}
/* A warpgroup gives registers back, or takes more, to have `count` a thread from now on: a multiple of 8. */
template <int count>
__device__ inline void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ inline void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

/* The same number, which the compiler knows nothing of before this place: what follows from it is computed here, and
 * not kept in registers from the beginning of the kernel. */
__device__ inline int from_here(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

/* ---- tensor cores ---- */

/* load_matrices the other way: lane l brings the address of row l % 8 of matrix l / 8. */
__device__ inline void store_matrices(Shared<bf16> row, const uint32_t (&m)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
                 : "memory");
}

/* A warpgroup's sums, 64 rows by N: with w = warp of the group, g = lane / 4 and q = 2 (lane % 4), [4 n + e] is row
 * 16 w + g + 8 (e / 2), column 8 n + q + e % 2.  Index by constants alone. */
template <int N>
struct Sums {
    float x[N / 2];
    __device__ float &operator[](int i) { return x[i]; }
};

/* An operand's part in shared memory, from `p` on.  With rows of 64 values of k (row m or n): 8 rows are `stride`
 * bytes, and `leading` does not count.  With rows of 64 values of m or n (row k): 8 rows are `stride` bytes, and the
 * next 64 values of m or n are `leading` bytes on. */
__device__ inline uint64_t operand(Shared<bf16> p, int leading, int stride) {
    return (uint64_t)((shared_address(p) & 0x3ffff) >> 4) | (uint64_t)(leading >> 4) << 16 |
           (uint64_t)(stride >> 4) << 32 | (uint64_t)1 << 62;
}

/* Before the first product, and wherever the sums were touched. */
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/* Products since the last commit are one group. */
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/* Until at most `groups` are under way: what those before read may be written over, and their sums be touched. */
template <int groups>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
}

#define SUMS_8 "%0, %1, %2, %3"
#define SUMS_0                                                                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define SUMS_1                                                                                                       \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
    "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HALF_SUMS_2 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define SUMS_2                                                                                                       \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
    "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SUM_(how, i) how(d.x[i])
#define SUM4_(how, i) SUM_(how, i), SUM_(how, i + 1), SUM_(how, i + 2), SUM_(how, i + 3)
#define SUM8_(how, i) SUM4_(how, i), SUM4_(how, i + 4)
#define SUM32_(how, i) SUM8_(how, i), SUM8_(how, i + 8), SUM8_(how, i + 16), SUM8_(how, i + 24)
#define WGMMA_(N, sums, a_at, b_at, add_at, a_by_k_at, b_by_k_at, add, ...)                               \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" add_at                                              \
                 ", 0;\n"                                                                                 \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" sums "}, %" a_at ", %" b_at \
                 ", p, 1, 1, %" a_by_k_at ", %" b_by_k_at ";\n}"                                          \
                 : __VA_ARGS__                                                                            \
                 : "l"(a), "l"(b), "n"(add), "n"((int)a_by_k), "n"((int)b_by_k))
/* d = or, with `add`, += a (64, 16) b (16, N); by_k: a row of that operand's tile is one k.  Asynchronous, by a whole
 * warpgroup.  What begins anew does not keep the registers of old sums alive. */
template <bool a_by_k, bool b_by_k, bool add, int N>
__device__ inline void wgmma(Sums<N> &d, uint64_t a, uint64_t b) {
    static_assert(N == 8 || N == 64 || N == 128 || N == 160 || N == 192, "those there are");
    if constexpr (N == 8 && add) WGMMA_(8, SUMS_8, "4", "5", "6", "7", "8", 1, SUM4_("+f", 0));
    if constexpr (N == 8 && !add) WGMMA_(8, SUMS_8, "4", "5", "6", "7", "8", 0, SUM4_("=f", 0));
    if constexpr (N == 64 && add) WGMMA_(64, SUMS_0, "32", "33", "34", "35", "36", 1, SUM32_("+f", 0));
    if constexpr (N == 64 && !add) WGMMA_(64, SUMS_0, "32", "33", "34", "35", "36", 0, SUM32_("=f", 0));
    if constexpr (N == 128 && add)
        WGMMA_(128, SUMS_0 ", " SUMS_1, "64", "65", "66", "67", "68", 1, SUM32_("+f", 0), SUM32_("+f", 32));
    if constexpr (N == 128 && !add)
        WGMMA_(128, SUMS_0 ", " SUMS_1, "64", "65", "66", "67", "68", 0, SUM32_("=f", 0), SUM32_("=f", 32));
    if constexpr (N == 160 && add)
        WGMMA_(160, SUMS_0 ", " SUMS_1 ", " HALF_SUMS_2, "80", "81", "82", "83", "84", 1, SUM32_("+f", 0),
               SUM32_("+f", 32), SUM8_("+f", 64), SUM8_("+f", 72));
    if constexpr (N == 160 && !add)
        WGMMA_(160, SUMS_0 ", " SUMS_1 ", " HALF_SUMS_2, "80", "81", "82", "83", "84", 0, SUM32_("=f", 0),
               SUM32_("=f", 32), SUM8_("=f", 64), SUM8_("=f", 72));
    if constexpr (N == 192 && add)
        WGMMA_(192, SUMS_0 ", " SUMS_1 ", " SUMS_2, "96", "97", "98", "99", "100", 1, SUM32_("+f", 0), SUM32_("+f", 32),
               SUM32_("+f", 64));
    if constexpr (N == 192 && !add)
        WGMMA_(192, SUMS_0 ", " SUMS_1 ", " SUMS_2, "96", "97", "98", "99", "100", 0, SUM32_("=f", 0), SUM32_("=f", 32),
               SUM32_("=f", 64));
}
/* The same with a (64, 16) in registers, of each warp 16 rows as multiply_add has them: they must stay until the
 * product is waited for, and a fence comes behind what wrote them. */
template <bool b_by_k, bool add>
__device__ inline void wgmma_rows(Sums<64> &d, const uint32_t (&a)[4], uint64_t b) {
#define WGMMA_ROWS_(how)                                                \
    asm volatile(                                                       \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                    \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" SUMS_0 \
        "}, {%32, %33, %34, %35}, %36, p, "                             \
        "1, 1, %38;\n}"                                                 \
        : SUM32_(how, 0)                                                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"((int)add), "n"((int)b_by_k))
    if constexpr (add) WGMMA_ROWS_("+f");
    else WGMMA_ROWS_("=f");
#undef WGMMA_ROWS_
}

#else
#include "emulate/sm90.h"
#endif

/* The same operand, so many bytes on: a multiple of 16. */
__device__ inline uint64_t operand_behind(uint64_t operand, int bytes) { return operand + (uint64_t)(bytes >> 4); }

/* Where chunk c / 8 of row r of a tile lies, which has `width` values in a row, 64 or 32. */
template <int width = TILE_WIDTH>
__device__ inline int tile_place(int r, int c) {
    static_assert(width == 64 || width == 32, "those there are");
    return r * width + ((c / 8 ^ (width == 64 ? r % 8 : r / 2 % 4)) * 8);
}

/* Of stages that are filled and freed in turns the one that is next, and the parity of the phase in which it is filled.
 */
template <int STAGES>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    __device__ void advance() {
        if (++stage < STAGES) return;
        stage = 0, parity ^= 1;
    }
};
