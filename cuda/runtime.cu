/* runtime.cu -- runtime.h on a GPU: the stream, memory, and the first failure. */
#include "runtime.h"
#include "tensor_map.h"
#include <stdio.h>
#include <string.h>
#include <map>
#include <set>
#include <tuple>

namespace {

char message[256]; /* empty: nothing failed */
cudaStream_t the_stream;
char *memory;
size_t memory_bytes;
bool recording;
int opened = -1; /* the GPU that is ours */

void fail(const char *op, const char *what) {
    if (!message[0]) snprintf(message, sizeof message, "%s: %s", op, what);
}

bool worked(cudaError_t e, const char *op) {
    if (e != cudaSuccess) fail(op, cudaGetErrorString(e));
    return e == cudaSuccess;
}

__global__ void nothing() {}

/* More than the 48 KB that every kernel may have must be asked for. */
enum { WITHOUT_ASKING = 48 << 10 };
enum { REGISTERS = 64 << 10, MOST_REGISTERS = 255 }; /* of an SM, and of a thread */

}  // namespace

extern "C" const char *cuda_error(void) { return message[0] ? message : NULL; }

int barelm_cuda_recover(void) {
    message[0] = 0;
    cudaGetLastError();
    worked(cudaStreamSynchronize(cuda_stream()), "the GPU is lost to this process, another can go on");
    return !message[0];
}

cudaStream_t cuda_stream() {
    if (!the_stream) worked(cudaStreamCreateWithFlags(&the_stream, cudaStreamNonBlocking), "cuda_stream");
    return the_stream;
}

void *scratch(size_t bytes) {
    if (message[0]) return NULL;
    if (bytes <= memory_bytes) return memory;
    if (recording) {
        fail("scratch", "a recording asks for more working memory than the same work did before");
        return NULL;
    }
    worked(cudaStreamSynchronize(cuda_stream()), "scratch"); /* what still runs may use the old one */
    worked(cudaFree(memory), "scratch");
    memory = NULL, memory_bytes = 0;
    if (worked(cudaMalloc((void **)&memory, bytes), "scratch")) memory_bytes = bytes;
    return memory;
}

/* A kernel may have what its greatest launch so far asked for: a smaller one takes nothing from a recording. */
static void allow_shared(const Grid &g, const void *kernel) {
    static std::map<const void *, size_t> allowed;
    if (g.shared <= WITHOUT_ASKING) return;
    size_t &most = allowed[kernel];
    if (g.shared <= most) return;
    if (worked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)g.shared), g.op))
        most = g.shared;
}

/* Warpgroups that give and take registers share out all that a block can have (prim_sm90.cuh): had the compiler asked
 * for fewer, the last to take would wait for ever.  At most two warpgroups share nothing out: there is as much for each
 * thread as one can have. */
static void check_registers(const Grid &g, const void *kernel) {
    static std::set<const void *> checked;
    const int share = REGISTERS / g.threads / 8 * 8;
    if (!g.sm90 || share > MOST_REGISTERS || checked.count(kernel)) return;
    cudaFuncAttributes of = {};
    if (!worked(cudaFuncGetAttributes(&of, kernel), g.op)) return;
    if (of.numRegs < share) fail(g.op, "was compiled to fewer registers than its warps take");
    else checked.insert(kernel);
}

bool may_launch(const Grid &g, const void *kernel) {
    if (message[0] || g.blocks <= 0) return false;
    if (g.blocks > INT32_MAX) fail(g.op, "more blocks than a launch can have");
    else allow_shared(g, kernel), check_registers(g, kernel);
    return !message[0];
}

void after_launch(const Grid &g) { worked(cudaGetLastError(), g.op); }

/* Not the GPU decides but what the code was made for: PTX of sm_80 does not wait on any. */
bool can_wait(void) {
    static int can = -1;
    if (can >= 0) return can;
    cudaFuncAttributes of = {};
    if (worked(cudaFuncGetAttributes(&of, (const void *)nothing), "can_wait")) can = of.ptxVersion >= 90;
    return can == 1;
}

const char *barelm_cuda_open(int device) {
    static char why[256];
    if (opened >= 0 && opened != device) {
        snprintf(why, sizeof why, "this process has opened GPU %d, it cannot use %d too", opened, device);
        return why;
    }
    int count = 0;
    cudaError_t e = cudaGetDeviceCount(&count);
    if (e == cudaSuccess && device >= count) {
        snprintf(why, sizeof why, "there is no GPU %d, but %d from 0 on", device, count);
        return why;
    }
    if (e == cudaSuccess) e = cudaSetDevice(device);
    if (e != cudaSuccess) {
        snprintf(why, sizeof why, "no NVIDIA GPU that can be used: %s", cudaGetErrorString(e));
        return why;
    }
    opened = device;
    return NULL;
}

/* What kernels are chosen by; all 0 where the device cannot be asked. */
struct Device {
    int number, major, minor, sms;
};

static Device device_now(void) {
    static Device kept = {-1, 0, 0, 0};
    Device now = {0, 0, 0, 0};
    auto ask = [&](int *value, cudaDeviceAttr what) {
        return worked(cudaDeviceGetAttribute(value, what, now.number), "device_now");
    };
    if (!worked(cudaGetDevice(&now.number), "device_now")) return now;
    if (now.number == kept.number) return kept;
    if (!ask(&now.major, cudaDevAttrComputeCapabilityMajor) || !ask(&now.minor, cudaDevAttrComputeCapabilityMinor) ||
        !ask(&now.sms, cudaDevAttrMultiProcessorCount))
        return {};
    return kept = now;
}

bool is_sm90(void) {
    const Device device = device_now();
    return device.major == 9 && device.minor == 0;
}

int sm_count(void) {
    const int sms = device_now().sms;
    return sms > 0 ? sms : 1;
}

/* The driver's own function: the library is not linked with it. */
static decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
    static void *encode;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    if (!encode)
        worked(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found),
               "tensor_map");
    if (!encode) fail("tensor_map", "the driver has no cuTensorMapEncodeTiled");
    return (decltype(&cuTensorMapEncodeTiled))encode;
}

/* A map is a few words and costs about a microsecond of the host to make; a run has a few hundred.  Those that could
 * not be made are not kept. */
const TensorMap &tensor_map(const bf16 *p, int rows, int cols, int64_t ld, int box_rows, int box_cols, int count) {
    static std::map<std::tuple<const void *, int, int, int64_t, int, int, int>, TensorMap> maps;
    static const TensorMap none = {};
    enum { MOST = 1 << 14 };
    if (maps.size() >= MOST) maps.clear();
    const auto key = std::make_tuple((const void *)p, rows, cols, ld, box_rows, box_cols, count);
    const auto found = maps.find(key);
    if (found != maps.end()) return found->second;
    const auto encode = tensor_map_encoder();
    if (message[0]) return none;
    TensorMap map;
    const cuuint64_t row = (cuuint64_t)ld * sizeof(bf16), strides[2] = {row, row * (cuuint64_t)rows};
    const cuuint64_t sizes[3] = {(cuuint64_t)cols, (cuuint64_t)rows, (cuuint64_t)count};
    const cuuint32_t box[3] = {(cuuint32_t)box_cols, (cuuint32_t)box_rows, 1}, each[3] = {1, 1, 1};
    if (encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, count ? 3 : 2, const_cast<bf16 *>(p), sizes, strides, box, each,
               CU_TENSOR_MAP_INTERLEAVE_NONE, box_cols == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
        fail("tensor_map", "not what TMA can copy");
        return none;
    }
    return maps[key] = map;
}

void cuda_enter(void) { worked(cudaSetDevice(opened), "cuda_enter"); }

int64_t cuda_memory_free(void) {
    size_t there = 0, all = 0;
    worked(cudaMemGetInfo(&there, &all), "cuda_memory_free");
    return (int64_t)there;
}

void *cuda_alloc(size_t bytes) {
    void *p = NULL;
    const cudaError_t e = cudaMalloc(&p, bytes ? bytes : 1);
    if (e == cudaErrorMemoryAllocation) {
        cudaGetLastError(); /* no failure: the caller says what it was for */
        return NULL;
    }
    if (!worked(e, "cuda_alloc")) return NULL;
    cuda_zero(p, bytes);
    return p;
}

/* cudaFree may wait for what still runs, and may not: kernels and recordings under way may use these bytes. */
void cuda_free(void *p, size_t) {
    worked(cudaStreamSynchronize(cuda_stream()), "cuda_free");
    worked(cudaFree(p), "cuda_free");
}

static void move(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind, const char *op) {
    if (bytes) worked(cudaMemcpyAsync(dst, src, bytes, kind, cuda_stream()), op);
}

/* A place in pinned memory for at most HALF bytes on their way to the device or from there: any other the driver would
 * copy by itself, and wait for the stream.  The halves take turns, and one is used again when all that left it has
 * arrived. */
static const size_t HALF = 4 << 20;
static char *pinned_place(size_t bytes) {
    static char *pinned;
    static cudaEvent_t left[2];
    static int half;
    static size_t used;
    for (cudaEvent_t &event : left)
        if (!event) worked(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "pinned memory");
    if (!pinned) worked(cudaMallocHost((void **)&pinned, 2 * HALF), "pinned memory");
    if (message[0]) return NULL;
    if (used + bytes > HALF) {
        worked(cudaEventRecord(left[half], cuda_stream()), "pinned memory");
        half = !half, used = 0;
        worked(cudaEventSynchronize(left[half]), "pinned memory");
    }
    char *place = pinned + (size_t)half * HALF + used;
    used += (bytes + 15) / 16 * 16;
    return place;
}

/* The host's part of a step, which is never recorded. */
static bool of_host(const char *op) {
    if (recording) fail(op, "in the middle of a recording");
    return !message[0];
}

void cuda_copy_in(void *dst, const void *src, size_t bytes) {
    if (!of_host("cuda_copy_in")) return;
    for (size_t at = 0; at < bytes; at += HALF) {
        const size_t n = bytes - at < HALF ? bytes - at : HALF;
        char *place = pinned_place(n);
        if (!place) return;
        memcpy(place, (const char *)src + at, n);
        move((char *)dst + at, place, n, cudaMemcpyHostToDevice, "cuda_copy_in");
    }
}

void cuda_copy_out(void *dst, const void *src, size_t bytes) {
    if (!of_host("cuda_copy_out")) return;
    char *place = bytes <= HALF ? pinned_place(bytes) : NULL;
    move(place ? place : dst, src, bytes, cudaMemcpyDeviceToHost, "cuda_copy_out");
    if (worked(cudaStreamSynchronize(cuda_stream()), "cuda_copy_out") && place) memcpy(dst, place, bytes);
}

void cuda_copy(void *dst, const void *src, size_t bytes) {
    move(dst, src, bytes, cudaMemcpyDeviceToDevice, "cuda_copy");
}

void cuda_zero(void *p, size_t bytes) {
    if (bytes) worked(cudaMemsetAsync(p, 0, bytes, cuda_stream()), "cuda_zero");
}

/* ---- recordings ---- */

namespace {
struct Recording {
    cudaGraphExec_t graph;
    const char *memory; /* the working memory that its launches use */
};
}  // namespace

void cuda_record(void) {
    if (!message[0])
        recording = worked(cudaStreamBeginCapture(cuda_stream(), cudaStreamCaptureModeThreadLocal), "record");
}

void *cuda_recorded(void) {
    if (!recording) return NULL;
    recording = false;
    cudaGraph_t graph = NULL;
    Recording *r = new Recording{NULL, memory};
    if (worked(cudaStreamEndCapture(cuda_stream(), &graph), "recorded") && !message[0])
        worked(cudaGraphInstantiate(&r->graph, graph, 0), "recorded");
    if (graph) cudaGraphDestroy(graph);
    if (r->graph) return r;
    delete r;
    return NULL;
}

int cuda_replay(const void *recording_) {
    const Recording *r = (const Recording *)recording_;
    if (r->memory != memory) return 0;
    if (!message[0]) worked(cudaGraphLaunch(r->graph, cuda_stream()), "replay");
    return 1;
}

void cuda_forget(void *recording_) {
    Recording *r = (Recording *)recording_;
    cudaGraphExecDestroy(r->graph); /* one that is at work is destroyed when it is done */
    delete r;
}
