/* runtime.h -- what host code asks of the device: a launch, memory, and what went wrong.
 *
 * One stream and one piece of working memory serve the whole backend.  Operators follow each other on the stream, so
 * each may use all of the working memory and none has to wait on the host.  runtime.cu has the bodies for a GPU,
 * emulate/emulate.cpp those of the emulation. */
#pragma once
#include "prim.cuh"

/* Working memory, on 256 bytes; its content is arbitrary.  Every call gives the same memory: what is in it is lost to
 * kernels launched behind the next call.  It grows to the most that was ever asked for; growing waits for the device,
 * so what a run does for the first time is not recorded, and may be from then on.  NULL where there is none, or
 * something failed before: then launches do nothing. */
void *scratch(size_t bytes);

/* Of a launch: blocks, threads a block (whole warps), bytes of dynamic shared memory; and the operator, for messages.
 */
struct Grid {
    int64_t blocks;
    int threads;
    size_t shared;
    const char *op;
    bool sm90 = false;  /* the kernel uses words of prim_sm90.cuh; more than two warpgroups share out all registers */
    bool early = false; /* it may begin before the one in front of it has ended: see launch_early */
    int cluster =
        1; /* of Hopper: so many blocks, neighbours by number, run at once and reach each other's shared memory */
    Grid(int64_t blocks_, int threads_, size_t shared_ = 0, const char *op_ = __builtin_FUNCTION())
        : blocks(blocks_), threads(threads_), shared(shared_), op(op_) {}
};

/* The first failure of any operator, in words; NULL: none.  It stays, and later launches do nothing: operators return
 * nothing, so whoever called some asks once behind them.  Tests and benchmarks go on after barelm_cuda_recover. */
extern "C" const char *cuda_error(void);

/* Memory of the backend, as `Ops` has it.  copy_in returns when the source may be changed, without waiting for the
 * stream; copy_out when the bytes are there; all else only takes its place on the stream. */
extern "C" {
void *cuda_alloc(size_t bytes); /* zero-filled; NULL where there is not enough */
void cuda_free(void *p, size_t bytes);
void cuda_copy_in(void *dst, const void *src, size_t bytes);
void cuda_copy_out(void *dst, const void *src, size_t bytes);
void cuda_copy(void *dst, const void *src, size_t bytes);
void cuda_zero(void *p, size_t bytes);
int64_t cuda_memory_free(void);
/* Have the calling thread use our GPU: which one it is, is told to each thread. */
void cuda_enter(void);
/* Recordings, as `Ops` has them: launches, cuda_copy and cuda_zero; nothing that waits or allocates. */
void cuda_record(void);
void *cuda_recorded(void);
int cuda_replay(const void *recording);
void cuda_forget(void *recording);
/* Make the GPU of that number ours, before anything else; what is missing, in words, or NULL. */
__attribute__((visibility("default"))) const char *barelm_cuda_open(int device);
}

#ifdef __CUDACC__
/* Forget the first failure, so that other work can go on: of a launch, say, that asked for too much.  0: a kernel went
 * wrong while it ran, and the GPU answers nothing more to this process; that is the failure from then on. */
extern "C" __attribute__((visibility("default"))) int barelm_cuda_recover(void);
cudaStream_t cuda_stream();
/* Whether a launch of g may go ahead: not after a failure, and not of nothing. */
bool may_launch(const Grid &g, const void *kernel);
void after_launch(const Grid &g);
/* Whether kernels were compiled for sm_90 or newer, with words that wait. */
bool can_wait(void);

template <class... P, class... A>
inline void launch(const Grid &g, void (*kernel)(P...), A... args) {
    if (!may_launch(g, (const void *)kernel)) return;
    cudaLaunchAttribute attributes[2] = {};
    unsigned count = 0;
    if (g.early && can_wait()) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (g.cluster > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count++].val.clusterDim = {(unsigned)g.cluster, 1, 1};
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)g.blocks), config.blockDim = dim3((unsigned)g.threads);
    config.dynamicSmemBytes = g.shared, config.stream = cuda_stream();
    config.attrs = attributes, config.numAttrs = count;
    cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
    after_launch(g);
}
#else
template <class... P, class... A>
inline void launch(const Grid &g, void (*kernel)(P...), A... args) {
    auto thread = [=] { kernel(static_cast<P>(args)...); };
    static_assert(__is_trivially_copyable(decltype(thread)), "a recording keeps its bytes");
    emulate::launch({g.blocks, g.threads, g.shared, g.op, [](const void *f) { (*(const decltype(thread) *)f)(); },
                     g.sm90, g.early, g.cluster},
                    &thread, sizeof thread);
}
#endif

/* A kernel whose threads all wait_earlier: its blocks may begin, and ask for what they will read, while the kernel
 * before still runs.  A copy before it, and on an older GPU a kernel, is complete as always.  A recording keeps the
 * launch so. */
template <class... P, class... A>
inline void launch_early(Grid g, void (*kernel)(P...), A... args) {
    g.early = true;
    launch(g, kernel, args...);
}

/* Whether the GPU runs code for sm_90a: Hopper. */
bool is_sm90(void);
/* Its multiprocessors; what kernels that stay have blocks for.  1 where it cannot be asked. */
int sm_count(void);

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
/* Threads for `work` pieces: whole warps, at most `most`. */
inline int threads_for(int64_t work, int most) {
    int64_t threads = divide_up(work, WARP) * WARP;
    return threads < WARP ? WARP : threads > most ? most : (int)threads;
}
