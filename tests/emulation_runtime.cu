/* emulation_runtime.cu -- calls of cuda/runtime.h that nobody but kernels' files makes, for test_cuda_runtime.py. */
#include "../cuda/runtime.h"
#include "../cuda/tensor_map.h"

namespace {
__global__ void nothing(int) {}
}  // namespace

extern "C" {
void emulation_launch(int threads, int sm90) {
    Grid g(1, threads);
    g.sm90 = sm90;
    launch(g, nothing, 0);
}
void emulation_map(const bf16 *p) { tensor_map(p, 8, 64, 64, 8, 64); }
int emulation_scratch(int bytes) { return scratch((size_t)bytes) != NULL; }
}
