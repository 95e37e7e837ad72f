// bindings.cpp -- the only C++ file.  Two doors:
//   Model   what python/barelm/model.py stands on: every argument is checked here, once, before a kernel runs
//   Session likewise, for python/barelm/session.py
//   ops     every operator of every backend straight from ops.def, for tests and benchmarks: types and contiguity are
//           checked, sizes are the caller's word
// and Bpe, what python/barelm/tokenizer.py trains a vocabulary with.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <vector>
extern "C" {
#include "barelm.h"
#include "bpe.h"
#include "clock.h"
#include "ops.h"
#include "peak.h"
#include "philox.h"
#include "session.h"
#include "system.h"
#include "threads.h"
}
namespace py = pybind11;

static void ready() {
    const char *threads = getenv("BARELM_THREADS");
    if (threads && *threads && (strspn(threads, "0123456789") != strlen(threads) || atoi(threads) < 1))
        throw std::invalid_argument("BARELM_THREADS: is '" + std::string(threads) +
                                    "', must be a whole number, at least 1");
    if (threads_ready()) {
        PyErr_SetString(PyExc_MemoryError, "the system grants no memory for the working space of a thread");
        throw py::error_already_set();
    }
}

static const Ops &backend(const std::string &name) {
    const Ops *ops = ops_select(name.empty() ? nullptr : name.c_str());
    if (ops) return *ops;
    const char *wanted = name.empty() ? getenv("BARELM_ISA") : nullptr;
    std::string all;
    for (auto p = ops_compiled; *p; p++)
        if (ops_usable(*p)) all += std::string(all.empty() ? "" : ", ") + (*p)->name;
    throw std::invalid_argument((wanted ? "BARELM_ISA: is '" + std::string(wanted) : "backend: is '" + name) +
                                "', must be one that this build has and this machine runs: " + all);
}

// How a C argument looks from Python: a pointer is an array or None, everything else is itself.  Activations (void *)
// are float32 on every CPU backend.
template <class T>
struct Arg {
    using type = T;
    static T get(T x) { return x; }
};
template <class T>
struct Arg<T *> {
    using element = std::conditional_t<std::is_void_v<std::remove_const_t<T>>, float, std::remove_const_t<T>>;
    using type = std::optional<py::array_t<element, py::array::c_style>>;
    static T *get(type &a) {
        if (!a) return nullptr;
        if constexpr (std::is_const_v<T>) return a->data();
        else return a->mutable_data();  // raises if the array is read-only
    }
};

template <class... A>
void bind(py::module_ &m, const char *name, void (*Ops::*op)(A...)) {
    m.def(
        name,
        [op](const std::string &on, typename Arg<A>::type... args) {
            const Ops &ops = backend(on);
            ready();
            auto c = std::make_tuple(Arg<A>::get(args)...);
            py::gil_scoped_release nogil;
            std::apply(ops.*op, c);
        },
        py::arg(), ((void)sizeof(A), py::arg().noconvert())...);  // noconvert: an output that was copied is lost
}

// ---- what a caller may hand over -----------------------------------------------------------------------------------

using Ids = py::array_t<int32_t>;
using Floats = py::array_t<float>;

static std::string str(int64_t n) { return std::to_string(n); }

// An array of exactly this element type, C-contiguous, of this shape; letters name the sizes in messages.
template <class E>
static const E *checked(const py::array &a, const char *name, const char *letters, std::vector<int64_t> shape,
                        const char *whose) {
    if (!py::isinstance<py::array_t<E>>(a))
        throw py::type_error(std::string(name) + ": dtype is " + py::str(a.dtype()).cast<std::string>() + ", must be " +
                             py::str(py::dtype::of<E>()).cast<std::string>());
    if (a.ndim() != (int64_t)shape.size())
        throw py::value_error(std::string(name) + ": has " + str(a.ndim()) + " dimensions, must have " +
                              str((int64_t)shape.size()) + " (" + letters + ")");
    for (size_t i = 0; i < shape.size(); i++)
        if (a.shape((int)i) != shape[i])
            throw py::value_error(std::string(name) + ": " + letters[3 * i] + " is " + str(a.shape((int)i)) + ", " +
                                  whose + " has " + str(shape[i]));
    if (!(a.flags() & py::array::c_style))
        throw py::value_error(std::string(name) + ": must be C-contiguous (numpy.ascontiguousarray)");
    return static_cast<const E *>(a.data());
}

static void check_range(const int32_t *ids, const char *name, int64_t B, int64_t T, int64_t low, int64_t high) {
    for (int64_t i = 0; i < B * T; i++)
        if (ids[i] < low || ids[i] >= high)
            throw py::value_error(std::string(name) + ": value " + str(ids[i]) + " at [" + str(i / T) + ", " +
                                  str(i % T) + "] is outside [" + str(low) + ", " + str(high) + ")");
}

// Python's signals (Ctrl-C) while kernels run: asked for every 20 ms, because it takes the interpreter's lock.
static int signal_pending() {
    static thread_local double last = 0;
    if (now() - last < 0.02) return 0;
    last = now();
    py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
}

static int choice(const char *field, const std::string &value, std::vector<std::string> names) {
    std::string all;
    for (size_t i = 0; i < names.size(); i++) {
        if (names[i] == value) return (int)i;
        all += (i ? ", '" : "'") + names[i] + "'";
    }
    throw py::value_error(std::string(field) + ": is '" + value + "', must be one of " + all);
}

// barelm.CacheFull and barelm.StaleRow, made with the module.
static PyObject *cache_full, *stale_row;

[[noreturn]] static void raise(Status s, const std::string &error) {
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

// ---- Model ---------------------------------------------------------------------------------------------------------

static std::vector<Tensor> tensors_of(const Config &c) {
    std::vector<Tensor> all((size_t)model_tensors(&c, nullptr));
    model_tensors(&c, all.data());
    return all;
}

// Hugging Face's.
static std::vector<int64_t> shape_of(const Tensor &t) {
    if (!t.columns) return {t.rows};
    if (t.transposed) return {t.columns, t.rows};
    return {t.rows, t.columns};
}

class PyModel {
  public:
    PyModel(const Config &config, const std::string &precision, uint64_t seed) {
        if (precision != "fp32" && precision != "bf16")
            throw py::value_error("precision: is '" + precision + "', must be 'fp32' or 'bf16'");
        const Ops &ops = backend("");
        ready();
        char error[512];
        {
            py::gil_scoped_release nogil;  // a large model takes seconds to initialise
            model_ =
                model_create(&config, &ops, precision == "bf16" ? PREC_BF16 : PREC_FP32, seed, error, sizeof error);
        }
        if (!model_) raise(NO_MEMORY, error);
        model_set_poll(model_, signal_pending);
        tensors_ = tensors_of(*model_config(model_));
    }
    PyModel(const PyModel &) = delete;
    ~PyModel() { model_free(model_); }

    py::object forward(const py::array &tokens, const py::array &targets, bool hidden, bool entropy, double temperature,
                       const std::optional<py::array> &starts) {
        Batch b = batch(tokens, &targets, temperature, starts);
        Floats logprobs({b.B, b.T}), h, e;
        if (hidden) h = Floats({b.B, b.T, (int64_t)model_config(model_)->n_embd});
        if (entropy) e = Floats({b.B, b.T});
        float *hp = hidden ? h.mutable_data() : nullptr, *ep = entropy ? e.mutable_data() : nullptr,
              *lp = logprobs.mutable_data();
        run([&] {
            return model_forward(model_, lp, hp, ep, b.tokens, b.targets, b.starts, (float)temperature, (int)b.B,
                                 (int)b.T);
        });
        if (!hidden && !entropy) return logprobs;
        py::list out;
        out.append(logprobs);
        if (hidden) out.append(h);
        if (entropy) out.append(e);
        return py::tuple(out);
    }

    // Their B and T are held against the last forward in model_backward, under the lock.
    void backward(const std::optional<py::array> &dlogprobs, const std::optional<py::array> &dhidden) {
        if (!dlogprobs && !dhidden) throw py::value_error("dlogprobs and dhidden: one of them must be given");
        const py::array &first = dlogprobs ? *dlogprobs : *dhidden;
        int64_t B = first.ndim() > 0 ? first.shape(0) : 0, T = first.ndim() > 1 ? first.shape(1) : 0;
        const float *dl = nullptr, *dh = nullptr;
        if (dlogprobs) dl = checked<float>(*dlogprobs, "dlogprobs", "B, T", {B, T}, "");
        if (dhidden)
            dh = checked<float>(*dhidden, "dhidden", "B, T, C", {B, T, model_config(model_)->n_embd},
                                "the last forward");
        run([&] { return model_backward(model_, dl, dh, B, T); });
    }

    py::tuple forward_backward(const py::array &tokens, const py::array &targets, const py::array &weights,
                               double temperature, const std::optional<py::array> &starts) {
        Batch b = batch(tokens, &targets, temperature, starts);
        const float *w = checked<float>(weights, "weights", "B, T", {b.B, b.T}, "tokens");
        Floats logprobs({b.B, b.T});
        std::vector<float> d((size_t)(b.B * b.T));
        for (size_t i = 0; i < d.size(); i++) d[i] = -w[i];
        float *lp = logprobs.mutable_data();
        run([&] {
            return model_forward_backward(model_, lp, d.data(), b.tokens, b.targets, b.starts, (float)temperature,
                                          (int)b.B, (int)b.T);
        });
        double loss = 0;
        for (size_t i = 0; i < d.size(); i++) loss += (double)d[i] * lp[i];
        return py::make_tuple(loss, logprobs);
    }

    double update(double lr, double beta1, double beta2, double eps, double weight_decay, double clip,
                  double skip_above) {
        auto in = [](const char *name, double x, double low, double high) {
            if (!(x >= low && x <= high))
                throw py::value_error(std::string(name) + ": is " + py::repr(py::float_(x)).cast<std::string>() +
                                      ", must be in [" + py::repr(py::float_(low)).cast<std::string>() + ", " +
                                      py::repr(py::float_(high)).cast<std::string>() + "]");
        };
        // the kernel computes in fp32: eps = 0 would divide 0 by 0 wherever a gradient has always been 0
        in("lr", lr, 0, 1e30), in("betas[0]", beta1, 0, 0.9999999), in("betas[1]", beta2, 0, 0.9999999);
        in("eps", eps, 1e-30, 1e30), in("weight_decay", weight_decay, 0, 1e30), in("clip", clip, 0, 1e30);
        if (clip > 0) in("clip", clip, 1e-30, 1e30);  // not 0 in fp32: that would turn clipping off
        in("skip_above", skip_above, 0, INFINITY);
        double norm = 0;
        run([&] {
            Status s = model_update(model_, &norm, (float)lr, (float)beta1, (float)beta2, (float)eps,
                                    (float)weight_decay, (float)clip, skip_above);
            float *g;
            if (grads_seen_) model_grads(model_, &g);  // views of it are about: they must read as zero
            return s;
        });
        return norm;
    }

    Floats logits(const py::array &tokens, bool last, const std::optional<py::array> &starts) {
        Batch b = batch(tokens, nullptr, 1, starts);
        int64_t V = model_config(model_)->vocab_size;
        Floats out = last ? Floats({b.B, V}) : Floats({b.B, b.T, V});
        float *p = out.mutable_data();
        run([&] { return model_logits(model_, p, b.tokens, b.starts, last, (int)b.B, (int)b.T); });
        return out;
    }

    // The forward pass and the copies are one computation: no other thread's forward comes between.
    py::list trace(const py::array &tokens, const std::optional<py::array> &starts) {
        Batch b = batch(tokens, nullptr, 1, starts);
        std::vector<TraceEntry> all((size_t)model_trace_entries(model_, nullptr));
        model_trace_entries(model_, all.data());
        struct Copy {
            int entry, layer;
            float *p;
        };
        std::vector<Copy> copies;
        py::list out;
        for (size_t i = 0; i < all.size(); i++)
            for (int l = 0; all[i].columns && l < (all[i].layered ? model_config(model_)->n_layer : 1); l++) {
                Floats a({b.B, b.T, (int64_t)all[i].columns});
                copies.push_back({(int)i, l, a.mutable_data()});
                py::object layer = all[i].layered ? py::object(py::int_(l)) : py::object(py::none());
                out.append(py::make_tuple(all[i].name, layer, a));
            }
        std::vector<float> logprobs((size_t)(b.B * b.T));
        std::vector<int32_t> targets(logprobs.size(), -1);
        run([&] {
            Status s = model_forward(model_, logprobs.data(), nullptr, nullptr, b.tokens, targets.data(), b.starts, 1,
                                     (int)b.B, (int)b.T);
            for (size_t i = 0; i < copies.size() && !s; i++)
                s = model_trace(model_, copies[i].p, copies[i].entry, copies[i].layer);
            return s;
        });
        return out;
    }

    // One view per name; each keeps the model, and so the block, alive.
    static py::dict views(const py::object &self, float *block) {
        auto &me = self.cast<PyModel &>();
        py::dict out;
        for (const Tensor &t : me.tensors_) {
            std::vector<int64_t> strides = {4};
            if (t.columns) strides = {4 * t.columns, 4};
            if (t.transposed) std::swap(strides[0], strides[1]);
            out[t.name] = Floats(shape_of(t), strides, block + t.offset, self);
        }
        return out;
    }
    static py::dict params(const py::object &self) { return views(self, model_weights(self.cast<PyModel &>().model_)); }
    static py::dict grads(const py::object &self) {
        auto &me = self.cast<PyModel &>();
        float *g = nullptr;
        me.run([&] { return model_grads(me.model_, &g); });
        me.grads_seen_ = true;
        return views(self, g);
    }
    static py::tuple moments(const py::object &self) {
        auto &me = self.cast<PyModel &>();
        float *mv[2];
        me.run([&] { return model_moments(me.model_, mv); });
        return py::make_tuple(views(self, mv[0]), views(self, mv[1]));
    }

    bool has_moments() const { return model_has_moments(model_); }
    int64_t step() const { return model_step(model_); }
    void set_step(int64_t step) {
        if (step < 0) throw py::value_error("step: is " + str(step) + ", must not be negative");
        model_set_step(model_, step);
    }
    std::vector<std::string> decays() const {
        std::vector<std::string> names;
        for (const Tensor &t : tensors_)
            if (t.decay) names.push_back(t.name);
        return names;
    }

  private:
    struct Batch {
        int64_t B, T;
        const int32_t *tokens, *targets, *starts;
    };

    Batch batch(const py::array &tokens, const py::array *targets, double temperature,
                const std::optional<py::array> &starts) {
        const Config &c = *model_config(model_);
        if (tokens.ndim() != 2)
            throw py::value_error("tokens: has " + str(tokens.ndim()) + " dimensions, must have 2 (B, T)");
        Batch b = {tokens.shape(0), tokens.shape(1), nullptr, nullptr, nullptr};
        b.tokens = checked<int32_t>(tokens, "tokens", "B, T", {b.B, b.T}, "");
        if (b.B < 1 || b.T < 1) throw py::value_error("tokens: shape (" + str(b.B) + ", " + str(b.T) + ") is empty");
        if (b.T > c.context)
            throw py::value_error("tokens: T is " + str(b.T) + ", the model's context is " + str(c.context));
        if (b.B * b.T > 1 << 24)
            throw py::value_error("tokens: B * T is " + str(b.B * b.T) + ", must not be above " + str(1 << 24));
        check_range(b.tokens, "tokens", b.B, b.T, 0, c.vocab_size);
        if (targets) {
            b.targets = checked<int32_t>(*targets, "targets", "B, T", {b.B, b.T}, "tokens");
            check_range(b.targets, "targets", b.B, b.T, -1, c.vocab_size);
        }
        if (starts) {
            b.starts = checked<int32_t>(*starts, "starts", "B, T", {b.B, b.T}, "tokens");
            for (int64_t i = 0; i < b.B * b.T; i++)
                if (b.starts[i] < 0 || b.starts[i] > i % b.T)
                    throw py::value_error("starts: value " + str(b.starts[i]) + " at [" + str(i / b.T) + ", " +
                                          str(i % b.T) + "] is outside [0, t]");
        }
        if (!(temperature > 0) || std::isinf(temperature))
            throw py::value_error("temperature: must be finite and above 0");
        return b;
    }

    template <class F>
    void run(F f) {
        run(f, [this] { return model_error(model_); });
    }

    Model *model_ = nullptr;
    std::mutex lock_;
    std::atomic<std::thread::id> owner_;  // who computes
    std::vector<Tensor> tensors_;
    bool grads_seen_ = false;

    struct Owner {
        explicit Owner(std::atomic<std::thread::id> &id) : id(id) { id = std::this_thread::get_id(); }
        Owner(const Owner &) = delete;
        ~Owner() { id = std::thread::id(); }
        std::atomic<std::thread::id> &id;
    };

  public:
    Model *model() { return model_; }

    // Run a computation without the interpreter's lock, one at a time, and turn its status into an exception.  A signal
    // handler runs inside the call that it interrupts, on the same thread: it is refused, since it would wait for
    // itself.
    template <class F, class E>
    void run(F f, E why) {
        ready();
        if (owner_ == std::this_thread::get_id())
            throw std::runtime_error("the model is computing: a signal handler cannot use it");
        Status s;
        std::string error;
        {
            py::gil_scoped_release nogil;
            std::lock_guard<std::mutex> one(lock_);
            Owner me(owner_);
            s = f();
            if (s) error = why();
        }
        if (s) raise(s, error);
    }
};

// ---- Session -------------------------------------------------------------------------------------------------------

// All of it happens under its model's lock, so that no update comes between.  Ids are given once: that of a row which
// was freed names no other.
class PySession {
  public:
    PySession(const py::object &model, int64_t max_tokens, const std::optional<std::string> &weights)
        : model_(model), m_(model.cast<PyModel &>()), prec_(model_precision(m_.model())) {
        if (weights) prec_ = choice("weights", *weights, {"fp32", "bf16", "int8"});
        const Config &c = *model_config(m_.model());
        const int64_t most = (int64_t)1 << 30;
        if (max_tokens < 1 || max_tokens > most)
            throw py::value_error("max_tokens: is " + str(max_tokens) + ", must be in [1, " + str(most) + "]");
        int pages = (int)((max_tokens + KEY_BLOCK - 1) / KEY_BLOCK);
        std::string error(512, 0);
        m_.run(
            [&] {
                const Ops *ops = model_ops(m_.model());
                session_ = session_create(&c, ops, prec_, pages, error.data(), (int)error.size());
                if (!session_) return NO_MEMORY;
                load();
                return OK;
            },
            [&] { return error.c_str(); });
        session_set_poll(session_, signal_pending);
    }
    PySession(const PySession &) = delete;
    ~PySession() { session_free(session_); }

    int64_t add() {
        int64_t row = 0;
        run([&] { return named(session_add(session_), &row); });
        return row;
    }

    std::vector<int64_t> fork(int64_t row, int n) {
        if (n < 0) throw py::value_error("n: is " + str(n) + ", must not be negative");
        std::vector<int64_t> out((size_t)n);
        run([&] {
            int from = slot_of(row, "row");
            Status s = OK;
            for (size_t i = 0; i < out.size() && !s; i++) s = named(session_fork(session_, from), &out[i]);
            return s;
        });
        return out;
    }

    void free(int64_t row) {
        run([&] {
            session_drop(session_, slot_of(row, "row"));
            slots_.erase(row);
            return OK;
        });
    }

    int length(int64_t row) {
        int n = 0;
        run([&] { return n = session_length(session_, slot_of(row, "row")), OK; });
        return n;
    }

    int room() {
        int n = 0;
        run([&] { return n = session_pages_free(session_), OK; });
        return n;
    }
    int pages() const { return session_pages(session_); }

    int pages_needed(const std::vector<int64_t> &rows, const std::vector<int> &counts) {
        if (counts.size() != rows.size())
            throw py::value_error("counts: there are " + str((int64_t)counts.size()) + ", rows has " +
                                  str((int64_t)rows.size()));
        for (size_t i = 0; i < counts.size(); i++)
            if (counts[i] < 0)
                throw py::value_error("counts[" + str((int64_t)i) + "]: is " + str(counts[i]) +
                                      ", must not be negative");
        int n = 0;
        run([&] {
            std::vector<int> slots = slots_of(rows);
            n = session_pages_needed(session_, slots.data(), counts.data(), (int)slots.size());
            return OK;
        });
        return n;
    }

    // tokens: the chunks of all rows, one behind the other
    Floats step(const std::vector<int64_t> &rows, const std::vector<int> &counts, const Ids &tokens) {
        const Config &c = *model_config(m_.model());
        const int32_t *ids = tokens.data();
        int64_t at = 0, R = (int64_t)rows.size();
        for (int64_t i = 0; i < R; i++) {
            std::string chunk = "chunks[" + str(i) + "]";
            if (counts[i] < 1) throw py::value_error(chunk + ": is empty");
            for (int k = 0; k < counts[i]; k++, at++)
                if (ids[at] < 0 || ids[at] >= c.vocab_size)
                    throw py::value_error(chunk + ": value " + str(ids[at]) + " at [" + str(k) + "] is outside [0, " +
                                          str(c.vocab_size) + ")");
        }
        Floats logits({R, (int64_t)c.vocab_size});
        float *p = logits.mutable_data();
        run([&] {
            std::vector<int> slots = slots_of(rows);
            if (model_version(m_.model()) != version_) load();
            for (size_t i = 0; i < slots.size(); i++) {
                int length = session_length(session_, slots[i]);
                if (length > c.context - counts[i])
                    throw py::value_error("chunks[" + str((int64_t)i) + "]: " + str(counts[i]) +
                                          " tokens behind a row of " + str(length) +
                                          " are more than the model's context of " + str(c.context));
            }
            return session_step(session_, p, slots.data(), counts.data(), ids, (int)R);
        });
        return logits;
    }

    Floats logprobs(const Ids &tokens, double temperature) {
        const Config &c = *model_config(m_.model());
        if (tokens.ndim() != 1) throw py::value_error("tokens: has " + str(tokens.ndim()) + " dimensions, must have 1");
        if (!(temperature > 0) || std::isinf(temperature))
            throw py::value_error("temperature: must be finite and above 0");
        const int32_t *ids = tokens.data();
        int64_t R = tokens.shape(0);
        check_range(ids, "tokens", 1, R, 0, c.vocab_size);
        Floats out(R);
        float *p = out.mutable_data();
        run([&] { return session_logprobs(session_, p, ids, (float)temperature, (int)R); });
        return out;
    }

    // After weights were written by hand, through model.params: no version tells of that.
    void refresh() {
        run([&] { return version_ = -1, OK; });
    }

    py::dict memory() const {
        const Config &c = *model_config(m_.model());
        SessionMemory b = session_memory(&c, model_ops(m_.model()), prec_, session_pages(session_));
        py::dict d;
        d["weights"] = b.weights, d["cache"] = b.cache;
        return d;
    }

  private:
    template <class F>
    void run(F f) {
        m_.run(f, [this] { return session_error(session_); });
    }
    void load() {
        version_ = model_version(m_.model());
        session_load(session_, model_weights(m_.model()), loads_++);
    }
    Status named(int slot, int64_t *row) {
        if (slot < 0) return NO_MEMORY;
        *row = next_++;
        slots_[*row] = slot;
        return OK;
    }
    int slot_of(int64_t row, const std::string &name) const {
        auto found = slots_.find(row);
        if (found == slots_.end()) throw py::value_error(name + ": there is no row " + str(row));
        return found->second;
    }
    std::vector<int> slots_of(const std::vector<int64_t> &rows) const {
        std::vector<int> slots;
        std::unordered_map<int, size_t> seen;
        for (size_t i = 0; i < rows.size(); i++) {
            std::string name = "rows[" + str((int64_t)i) + "]";
            slots.push_back(slot_of(rows[i], name));
            if (!seen.emplace(slots.back(), i).second)
                throw py::value_error(name + ": row " + str(rows[i]) + " is there twice");
        }
        return slots;
    }

    py::object model_;  // kept alive: the session reads its weights
    PyModel &m_;
    int prec_;
    Session *session_ = nullptr;
    int64_t version_ = 0, loads_ = 0, next_ = 0;  // the model's version that was loaded; how often; the next id
    std::unordered_map<int64_t, int> slots_;
};

// ---- Bpe -----------------------------------------------------------------------------------------------------------

static Split split_of(const std::string &pattern) { return (Split)choice("pattern", pattern, {"gpt2", "gpt4"}); }

static py::list split(const std::string &pattern, const py::bytes &text) {
    Split split = split_of(pattern);
    std::string_view all = text;
    auto p = reinterpret_cast<const uint8_t *>(all.data()), end = p + all.size();
    py::list pieces;
    while (p < end) {
        const uint8_t *next = split_next(split, p, end);
        if (next > p) pieces.append(py::bytes(reinterpret_cast<const char *>(p), (size_t)(next - p)));
        p = next > p ? next : p + 1;
    }
    return pieces;
}

[[noreturn]] static void raise(BpeStatus s) {
    if (s == BPE_INTERRUPTED && PyErr_Occurred()) throw py::error_already_set();  // the signal handler's exception
    if (s == BPE_INTERRUPTED) throw std::runtime_error("the training was interrupted");
    if (s == BPE_TOO_LARGE) throw py::value_error("documents: their distinct pieces have 4 GiB or more");
    PyErr_SetString(PyExc_MemoryError, "documents: no memory for their distinct pieces");
    throw py::error_already_set();
}

// {piece: how often it occurs in the documents}, for tests
static py::dict piece_counts(const std::string &pattern, const std::vector<py::bytes> &documents) {
    ready();
    std::unique_ptr<Pieces, void (*)(Pieces *)> pieces(pieces_create(split_of(pattern)), pieces_free);
    BpeStatus s = pieces ? BPE_OK : BPE_NO_MEMORY;
    for (size_t i = 0; i < documents.size() && !s; i++) {
        std::string_view text = documents[i];
        s = pieces_add(pieces.get(), reinterpret_cast<const uint8_t *>(text.data()), text.size(), signal_pending);
    }
    if (!s) s = pieces_flush(pieces.get(), signal_pending);
    if (s) raise(s);
    std::vector<Piece> all;
    auto take = [](void *out, const Piece *piece) { static_cast<std::vector<Piece> *>(out)->push_back(*piece); };
    pieces_visit(pieces.get(), take, &all);
    py::dict out;
    for (const Piece &p : all) out[py::bytes(reinterpret_cast<const char *>(p.bytes), p.size)] = p.count;
    return out;
}

class PyBpe {
  public:
    PyBpe(const std::string &pattern, int64_t min_count) {
        if (min_count < 1) throw py::value_error("min_count: is " + str(min_count) + ", must be at least 1");
        ready();
        bpe_ = bpe_create(split_of(pattern), min_count);
        if (!bpe_) raise(BPE_NO_MEMORY);
    }
    PyBpe(const PyBpe &) = delete;
    ~PyBpe() { bpe_free(bpe_); }

    void add(const py::bytes &document) {
        Turn mine(busy_);
        std::string_view text = document;
        if (bpe_has_begun(bpe_)) throw std::runtime_error("merging has begun: no document can be added");
        run([&] { return bpe_add(bpe_, reinterpret_cast<const uint8_t *>(text.data()), text.size(), signal_pending); });
    }

    // Up to n merges more; how many there are now.
    size_t merge(int n) {
        Turn mine(busy_);
        if (n < 0) throw py::value_error("n: is " + str(n) + ", must not be negative");
        run([&] { return bpe_merge(bpe_, n, signal_pending); });
        const Merge *first;
        return bpe_merges(bpe_, &first);
    }

    py::array_t<uint32_t> merges() {
        Turn mine(busy_);
        const Merge *first;
        size_t n = bpe_merges(bpe_, &first);
        py::array_t<uint32_t> out({(int64_t)n, (int64_t)2});
        if (n) memcpy(out.mutable_data(), first, n * sizeof *first);
        return out;
    }

  private:
    struct Turn {  // one call at a time; a signal handler, or another thread, is refused
        explicit Turn(std::atomic_flag &flag) : busy(flag) {
            if (busy.test_and_set()) throw std::runtime_error("the trainer is at work in another call");
        }
        Turn(const Turn &) = delete;
        ~Turn() { busy.clear(); }
        std::atomic_flag &busy;
    };

    template <class F>
    static void run(F f) {
        ready();
        BpeStatus s;
        {
            py::gil_scoped_release nogil;
            s = f();
        }
        if (s) raise(s);
    }

    Bpe *bpe_ = nullptr;
    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
};

// barelm.Config (checked there) to C.  The lists are in the order of the enums in barelm.h.
static Config config_of(const py::object &c) {
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
#define OP(name, args) bind(ops, #name, &Ops::name);
#include "ops.def"
#undef OP

    // Bytes of what a backend keeps in its own form: see linear_pack and attention_paged in ops.def.
    m.def("packed_bytes",
          [](const std::string &on, int prec, int C, int OC) { return backend(on).packed_bytes(prec, C, OC); });
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
        "read_bandwidth",
        [](double seconds) {
            ready();
            py::gil_scoped_release nogil;
            return peak_read(seconds);
        },
        py::arg("seconds") = 0.5);
    m.def(
        "model_memory",
        [](const py::object &config, int B, int T, bool training) {
            Config c = config_of(config);
            Memory b = model_memory(&c, &backend(""), B, T, training);
            py::dict d;
            d["weights"] = b.weights, d["gradients"] = b.gradients, d["moments"] = b.moments;
            d["activations"] = b.activations, d["head"] = b.head, d["tables"] = b.tables;
            return d;
        },
        py::arg("config"), py::arg("B"), py::arg("T"), py::arg("training"));

    m.def("split", split, py::arg("pattern"), py::arg("text"));  // the pieces; bytes that are not UTF-8 are in none

    m.def("piece_counts", piece_counts, py::arg("pattern"), py::arg("documents"));

    py::class_<PyBpe>(m, "Bpe")
        .def(py::init<const std::string &, int64_t>(), py::arg("pattern"), py::arg("min_count"))
        .def("add", &PyBpe::add, py::arg("document"))
        .def("merge", &PyBpe::merge, py::arg("n"))
        .def_property_readonly("merges", &PyBpe::merges);  // (n, 2) uint32: the tokens of each pair

    m.def(
        "model_tensors",  // {name: shape}, as Model.params would show them
        [](const py::object &config) {
            py::dict out;
            for (const Tensor &t : tensors_of(config_of(config))) out[t.name] = py::tuple(py::cast(shape_of(t)));
            return out;
        },
        py::arg("config"));

    cache_full = PyErr_NewException("barelm.CacheFull", PyExc_RuntimeError, nullptr);
    stale_row = PyErr_NewException("barelm.StaleRow", PyExc_RuntimeError, nullptr);
    m.attr("CacheFull") = py::handle(cache_full);
    m.attr("StaleRow") = py::handle(stale_row);
    m.attr("PAGE") = (int)KEY_BLOCK;  // tokens

    py::class_<PySession>(m, "Session")
        .def(py::init<const py::object &, int64_t, const std::optional<std::string> &>(), py::arg("model"),
             py::arg("max_tokens"), py::arg("weights"))
        .def("add", &PySession::add)
        .def("fork", &PySession::fork, py::arg("row"), py::arg("n"))
        .def("free", &PySession::free, py::arg("row"))
        .def("length", &PySession::length, py::arg("row"))
        .def("pages_needed", &PySession::pages_needed, py::arg("rows"), py::arg("counts"))
        .def("step", &PySession::step, py::arg("rows"), py::arg("counts"), py::arg("tokens"))
        .def("logprobs", &PySession::logprobs, py::arg("tokens"), py::arg("temperature"))
        .def("refresh", &PySession::refresh)
        .def_property_readonly("memory", &PySession::memory)
        .def_property_readonly("pages", &PySession::pages)
        .def_property_readonly("room", &PySession::room);

    py::class_<PyModel>(m, "Model")
        .def(py::init([](const py::object &config, const std::string &precision, uint64_t seed) {
                 return std::make_unique<PyModel>(config_of(config), precision, seed);
             }),
             py::arg("config"), py::arg("precision"), py::arg("seed"))
        .def("forward", &PyModel::forward, py::arg("tokens"), py::arg("targets"), py::arg("hidden"), py::arg("entropy"),
             py::arg("temperature"), py::arg("starts"))
        .def("backward", &PyModel::backward, py::arg("dlogprobs"), py::arg("dhidden"))
        .def("forward_backward", &PyModel::forward_backward, py::arg("tokens"), py::arg("targets"), py::arg("weights"),
             py::arg("temperature"), py::arg("starts"))
        .def("update", &PyModel::update, py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
             py::arg("weight_decay"), py::arg("clip"), py::arg("skip_above"))
        .def("logits", &PyModel::logits, py::arg("tokens"), py::arg("last"), py::arg("starts"))
        .def("trace", &PyModel::trace, py::arg("tokens"), py::arg("starts"))
        .def_property_readonly("params", [](const py::object &self) { return PyModel::params(self); })
        .def_property_readonly("grads", [](const py::object &self) { return PyModel::grads(self); })
        .def_property_readonly("moments", [](const py::object &self) { return PyModel::moments(self); })
        .def_property_readonly("has_moments", &PyModel::has_moments)
        .def_property_readonly("decays", &PyModel::decays)
        .def_property("step", &PyModel::step, &PyModel::set_step);
}
