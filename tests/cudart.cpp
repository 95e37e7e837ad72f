/* cudart.cpp -- what cuda/runtime.cu asks of CUDA, without a GPU: linked in place of CUDA's own run time, so that the
 * host's side can be tested.  Copies are made when somebody waits for them, as late as can be; kernels do nothing. */
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>
#include <functional>
#include <vector>

/* What a test sets and asks. */
extern "C" {
int fake_registers = 22; /* that kernels were compiled to */
int fake_refused;        /* the next so many launches and maps are */
int fake_lost;           /* the GPU is: a kernel read what is not there */
int fake_room = 1 << 30; /* bytes that can be had at once */
int fake_launches, fake_asked, fake_maps;
}

namespace {

std::vector<std::function<void()>> stream;
size_t done; /* so many of them */
bool capturing;
cudaError_t last;

/* What a call returns. */
cudaError_t answer(cudaError_t e = cudaSuccess) {
    if (fake_lost) e = cudaErrorIllegalAddress;
    if (e != cudaSuccess) last = e;
    return e;
}

bool refused() { return fake_refused > 0 && fake_refused--; }

void run_to(size_t end) {
    for (; done < end && !fake_lost; done++) stream[done]();
}

cudaError_t allocate(void **p, size_t bytes) {
    if (bytes > (size_t)fake_room) return answer(cudaErrorMemoryAllocation);
    *p = malloc(bytes);
    return answer();
}

CUresult encode(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *,
                const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    fake_maps++;
    return refused() ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

}  // namespace

extern "C" {

/* ---- CUDA's ---- */

cudaError_t cudaGetLastError(void) {
    const cudaError_t e = fake_lost ? cudaErrorIllegalAddress : last;
    last = cudaSuccess;
    return e;
}
const char *cudaGetErrorString(cudaError_t e) { return e == cudaErrorIllegalAddress ? "illegal address" : "refused"; }
cudaError_t cudaGetDeviceCount(int *n) { return *n = 1, answer(); }
cudaError_t cudaGetDevice(int *device) { return *device = 0, answer(); }
cudaError_t cudaSetDevice(int) { return answer(); }
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) { return *value = 9, answer(); }
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return answer(); }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *of, const void *) {
    fake_asked++;
    of->numRegs = fake_registers;
    return answer();
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *, void **p, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult *) {
    return *p = (void *)encode, answer();
}

cudaError_t cudaMalloc(void **p, size_t bytes) { return allocate(p, bytes); }
cudaError_t cudaMallocHost(void **p, size_t bytes) { return allocate(p, bytes); }
cudaError_t cudaMemGetInfo(size_t *there, size_t *all) { return *there = *all = (size_t)fake_room, answer(); }
cudaError_t cudaFree(void *p) { return free(p), answer(); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) { return *s = (cudaStream_t)&stream, answer(); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return run_to(stream.size()), answer(); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    *event = (cudaEvent_t) new size_t(0);
    return answer();
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) { return *(size_t *)event = stream.size(), answer(); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return run_to(*(size_t *)event), answer(); }
cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    if (!capturing) stream.push_back([=] { memcpy(dst, src, bytes); });
    return answer();
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t) {
    if (!capturing) stream.push_back([=] { memset(p, value, bytes); });
    return answer();
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *, const void *, void **) {
    if (refused()) return answer(cudaErrorInvalidConfiguration);
    return fake_launches++, answer();
}

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return capturing = true, answer(); }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *) { return capturing = false, answer(); }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *graph, cudaGraph_t, unsigned long long) {
    *graph = (cudaGraphExec_t) new char;
    return answer();
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return answer(); }
cudaError_t cudaGraphDestroy(cudaGraph_t) { return answer(); }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete (char *)graph, answer(); }

/* ---- and what nvcc puts into every file ---- */

void **__cudaRegisterFatBinary(void *) { return NULL; }
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
char __cudaInitModule(void **) { return 0; }
void __cudaRegisterFunction(void **, const char *, char *, const char *, int, uint3 *, uint3 *, dim3 *, dim3 *, int *) {
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, CUstream_st *) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3 *, dim3 *, size_t *, void *) { return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t *, const void *) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void **, size_t, cudaStream_t) { return cudaSuccess; }
}
