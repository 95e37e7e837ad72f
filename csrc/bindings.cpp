// bindings.cpp -- the module barelm._core.  Its files, bindings*.cpp, are the only C++: they check every argument, then
// call barelm.h, session.h and bpe.h.  Here: what they share, what the machine is, and `ops`: every operator of every
// backend straight from ops.def, for tests and benchmarks: types and contiguity are checked, sizes are the caller's
// word.
#include "bindings.h"
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>
extern "C" {
#include "clock.h"
#include "peak.h"
#include "philox.h"
#include "system.h"
#include "threads.h"
}

void ready() {
    const char *threads = getenv("BARELM_THREADS");
    if (threads && *threads && (strspn(threads, "0123456789") != strlen(threads) || atoi(threads) < 1))
        throw std::invalid_argument("BARELM_THREADS: is '" + std::string(threads) +
                                    "', must be a whole number, at least 1");
    if (threads_ready()) {
        PyErr_SetString(PyExc_MemoryError, "the system grants no memory for the working space of a thread");
        throw py::error_already_set();
    }
}

const Ops &backend(const std::string &name) {
    const Ops *ops = ops_select(name.empty() ? nullptr : name.c_str());
    if (ops) return *ops;
    const char *wanted = name.empty() ? getenv("BARELM_ISA") : nullptr;
    std::string all;
    for (auto p = ops_compiled; *p; p++)
        if (ops_usable(*p)) all += std::string(all.empty() ? "" : ", ") + (*p)->name;
    throw std::invalid_argument((wanted ? "BARELM_ISA: is '" + std::string(wanted) : "backend: is '" + name) +
                                "', must be one that this build has and this machine runs: " + all);
}

// A C argument from what Python hands over at place i: a pointer from an array or None, everything else from itself.
// Activations (void *) are float32 on every CPU backend.
template <class T>
struct Arg {
    static T get(const py::args &args, size_t i) { return args[i].cast<T>(); }
};
template <class T>
struct Arg<T *> {
    using element = std::conditional_t<std::is_void_v<std::remove_const_t<T>>, float, std::remove_const_t<T>>;
    using array = py::array_t<element, py::array::c_style>;
    static T *get(const py::args &args, size_t i) {
        py::object a = args[i];
        if (a.is_none()) return nullptr;
        if (!py::isinstance<array>(a))  // never converted: an output that was copied is lost
            throw py::type_error("argument " + str((int64_t)i) + ": must be None or a C-contiguous array of " +
                                 py::str(py::dtype::of<element>()).cast<std::string>());
        if constexpr (std::is_const_v<T>) return py::reinterpret_borrow<array>(a).data();
        else return py::reinterpret_borrow<array>(a).mutable_data();  // raises if the array is read-only
    }
};

template <auto op>
struct Call;
template <class... A, void (*Ops::*op)(A...)>
struct Call<op> {
    static void run(const Ops &ops, const py::args &args) {
        if (args.size() != sizeof...(A))
            throw py::type_error("takes " + str(sizeof...(A)) + " arguments, not " + str((int64_t)args.size()));
        run(ops, args, std::index_sequence_for<A...>());
    }
    template <size_t... i>
    static void run(const Ops &ops, const py::args &args, std::index_sequence<i...>) {
        std::tuple<A...> c{Arg<A>::get(args, i)...};
        py::gil_scoped_release nogil;
        std::apply(ops.*op, c);
    }
};

// One signature for all: what pybind11 makes of each is most of the time that this file takes to compile.
static void bind(py::module_ &m, const char *name, void (*call)(const Ops &, const py::args &)) {
    m.def(name, [call](const std::string &on, const py::args &args) {
        const Ops &ops = backend(on);
        ready();
        call(ops, args);
    });
}

// ---- what the doors share ------------------------------------------------------------------------------------------

void check_range(const int32_t *ids, const char *name, int64_t B, int64_t T, int64_t low, int64_t high) {
    for (int64_t i = 0; i < B * T; i++)
        if (ids[i] < low || ids[i] >= high)
            throw py::value_error(std::string(name) + ": value " + str(ids[i]) + " at [" + str(i / T) + ", " +
                                  str(i % T) + "] is outside [" + str(low) + ", " + str(high) + ")");
}

void check_temperature(double temperature) {
    if (!(temperature > 0) || std::isinf(temperature)) throw py::value_error("temperature: must be finite and above 0");
}

int signal_pending() {
    static thread_local double last = 0;
    if (now() - last < 0.02) return 0;
    last = now();
    py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
}

int choice(const char *field, const std::string &value, std::vector<std::string> names) {
    std::string all;
    for (size_t i = 0; i < names.size(); i++) {
        if (names[i] == value) return (int)i;
        all += (i ? ", '" : "'") + names[i] + "'";
    }
    throw py::value_error(std::string(field) + ": is '" + value + "', must be one of " + all);
}

// barelm.CacheFull and barelm.StaleRow, made with the module.
static PyObject *cache_full, *stale_row;

[[noreturn]] void raise(Status s, const std::string &error) {
    if (s == INTERRUPTED) throw py::error_already_set();  // the signal handler's exception
    PyObject *type = s == BAD_SHAPE    ? PyExc_ValueError
                     : s == NO_MEMORY  ? PyExc_MemoryError
                     : s == NOT_FINITE ? PyExc_FloatingPointError
                     : s == CACHE_FULL ? cache_full
                     : s == STALE      ? stale_row
                                       : PyExc_RuntimeError;
    PyErr_SetString(type, error.c_str());
    throw py::error_already_set();
}

// barelm.Config (checked there) to C.  The lists are in the order of the enums in barelm.h.
Config config_of(const py::object &c) {
    auto i = [&](const char *name) { return c.attr(name).cast<int>(); };
    auto s = [&](const char *name) { return c.attr(name).cast<std::string>(); };
    Config out = {};
    out.n_layer = i("n_layer"), out.n_head = i("n_head"), out.n_kv_head = i("n_kv_head"),
    out.head_size = i("head_size");
    out.n_embd = i("n_embd"), out.n_inner = i("n_inner"), out.vocab_size = i("vocab_size"), out.context = i("context");
    out.norm = choice("norm", s("norm"), {"layernorm", "rmsnorm"});
    out.act = choice("act", s("act"), {"gelu_tanh", "gelu_erf", "swiglu"});
    out.pos = choice("pos", s("pos"), {"learned", "rope"});
    out.bias = c.attr("bias").cast<bool>(), out.tied = c.attr("tied").cast<bool>();
    out.norm_eps = c.attr("norm_eps").cast<float>(), out.rope_theta = c.attr("rope_theta").cast<double>();
    if (!c.attr("rope_scaling").is_none()) {
        py::object r = c.attr("rope_scaling");
        out.rope_factor = r["factor"].cast<double>(), out.rope_low_freq = r["low_freq_factor"].cast<double>();
        out.rope_high_freq = r["high_freq_factor"].cast<double>();
        out.rope_original_context = r["original_max_position_embeddings"].cast<double>();
    }
    return out;
}

PYBIND11_MODULE(_core, m) {
    py::module_ ops =
        m.def_submodule("ops", "Every operator of csrc/ops.def: ops.name(backend, arguments as declared there).");
#define OP(name, args) bind(ops, #name, Call<&Ops::name>::run);
#include "ops.def"
#undef OP

    m.attr("PACK_ROWS") = (int)PACK_ROWS;
    // Bytes of what a backend keeps in its own form: see linear_pack and attention_paged in ops.def.
    m.def("packed_bytes",
          [](const std::string &on, int prec, int C, int OC) { return backend(on).packed_bytes(prec, C, OC); });
    m.def("held_bytes",
          [](const std::string &on, int held, int C, int OC) { return backend(on).held_bytes(held, C, OC); });
    m.def("page_bytes",
          [](const std::string &on, int prec, int NKV, int HS) { return backend(on).page_bytes(prec, NKV, HS); });

    m.def("backends", [] {  // names of the backends that can run here, best first
        py::list names;
        for (auto p = ops_compiled; *p; p++)
            if (ops_usable(*p)) names.append((*p)->name);
        return names;
    });
    m.def("compiled", [] {  // names of the backends that were built, best first
        py::list names;
        for (auto p = ops_compiled; *p; p++) names.append((*p)->name);
        return names;
    });
    m.def("threads_get", threads_get);
    m.def("threads_set", [](int n) {
        if (n < 0)
            throw std::invalid_argument("threads: is " + std::to_string(n) + ", must be at least 1 (0: the default)");
        threads_set(n);
    });
    m.def("system_cpus", system_cpus);
    m.def("memory_available", system_memory_free);
    m.def("philox_uniform", philox_uniform, py::arg("seed"), py::arg("stream"), py::arg("row"), py::arg("position"));
    m.attr("STREAM_SAMPLE") = (int)STREAM_SAMPLE;
    m.def("version", [] { return BARELM_VERSION; });
    m.def("compiler", [] { return __VERSION__; });

    m.def("isa", [] { return backend("").name; });  // the backend that new models use
    m.def(
        "peak_flops",
        [](const std::string &precision, double seconds, const std::string &on) {
            const Ops &ops = backend(on);
            int prec = choice("precision", precision, {"fp32", "bf16"});
            ready();
            py::gil_scoped_release nogil;
            return peak_flops(&ops, prec, seconds);
        },
        py::arg("precision"), py::arg("seconds") = 0.2, py::arg("backend") = "");
    m.def(
        "copy_bandwidth",
        [](double seconds) {
            ready();
            py::gil_scoped_release nogil;
            return peak_copy(seconds);
        },
        py::arg("seconds") = 0.5);
    m.def(
        "copy_past_caches",  // contiguous bytes, a multiple of 64, that begin on 64
        [](py::array_t<uint8_t> dst, py::array_t<uint8_t> src) {
            py::buffer_info to = dst.request(true), from = src.request();
            const bool odd = ((uintptr_t)to.ptr | (uintptr_t)from.ptr | (size_t)to.size) % 64 != 0;
            if (to.size != from.size || odd || !(dst.flags() & src.flags() & py::array::c_style))
                throw py::value_error(
                    "copy_past_caches: dst and src must be as long, contiguous and whole cache lines");
            ready();
            py::gil_scoped_release nogil;
            copy_past_caches(to.ptr, from.ptr, (size_t)to.size);
        },
        py::arg("dst").noconvert(), py::arg("src").noconvert());
    m.def(
        "read_bandwidth",
        [](double seconds) {
            ready();
            py::gil_scoped_release nogil;
            return peak_read(seconds);
        },
        py::arg("seconds") = 0.5);

    cache_full = PyErr_NewException("barelm.CacheFull", PyExc_RuntimeError, nullptr);
    stale_row = PyErr_NewException("barelm.StaleRow", PyExc_RuntimeError, nullptr);
    m.attr("CacheFull") = py::handle(cache_full);
    m.attr("StaleRow") = py::handle(stale_row);
    bind_cuda(m);
    bind_model(m);
    bind_session(m);
    bind_bpe(m);
    bind_profile(m);
}
