// bindings_cuda.cpp -- the library of kernels for GPUs: found by Python, opened when a model asks for it, so that this
// extension needs no driver.
#include <dlfcn.h>
#include "bindings.h"
extern "C" {
#include "gpu.h"
}

namespace {
struct Cuda {
    const Ops *fp32 = nullptr, *bf16 = nullptr;
} cuda;

// Every operator with its arguments, in order: a library that was built for another contract has other words.
const char CONTRACT[] =
#define OP(name, args) #name #args
#include "ops.def"
#undef OP
    ;

template <class F>
F symbol(void *library, const std::string &path, const char *name) {
    void *p = dlsym(library, name);
    if (!p) throw std::runtime_error(path + ": is no library of barelm's CUDA kernels: it has no " + name);
    return reinterpret_cast<F>(p);
}
}  // namespace

const Ops &ops_on(const std::string &device, const std::string &precision) {
    if (device == "cpu") return profiled(backend(""));
    const Ops *ops = precision == "fp32" ? cuda.fp32 : cuda.bf16;
    if (!ops) throw std::runtime_error("device: the CUDA library is not open");
    return *ops;
}

// What plans count on is what the library does.
static bool as_planned(const Ops &ops, int prec) {
    const Ops &sizes = *gpu_sizes(prec);
    return ops.act_bytes == sizes.act_bytes && ops.head_rows == sizes.head_rows &&
           ops.rounds_weights == sizes.rounds_weights && ops.recompute_above == sizes.recompute_above;
}

// Open the library, and the GPU of that number.  RuntimeError says what is missing.
static void open(const std::string &path, int device) {
    void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) throw std::runtime_error(std::string("device: ") + dlerror());
    auto contract = symbol<const char *(*)()>(library, path, "barelm_cuda_contract");
    auto table_bytes = symbol<size_t (*)()>(library, path, "barelm_cuda_table_bytes");
    auto ops = symbol<const Ops *(*)(int)>(library, path, "barelm_cuda_ops");
    if (std::string(contract()) != CONTRACT || table_bytes() != sizeof(Ops) ||
        !as_planned(*ops(PREC_FP32), PREC_FP32) || !as_planned(*ops(PREC_BF16), PREC_BF16))
        throw std::runtime_error(path + ": was built for another version of barelm; build it again");
    auto begin = symbol<const char *(*)(int)>(library, path, "barelm_cuda_open");
    if (const char *what = begin(device)) throw std::runtime_error(std::string("device: ") + what);
    cuda = {ops(PREC_FP32), ops(PREC_BF16)};
}

void bind_cuda(py::module_ &m) { m.def("cuda_open", open, py::arg("path"), py::arg("device")); }
