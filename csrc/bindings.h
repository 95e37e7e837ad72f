// bindings.h -- what the doors to Python share: words for arguments that are wrong, and who may compute.
#pragma once
#include <atomic>
#include <cmath>
#include <mutex>
#include <optional>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>
extern "C" {
#include "barelm.h"
}
namespace py = pybind11;

// Each makes the Python classes and functions of its file.
void bind_model(py::module_ &m);
void bind_session(py::module_ &m);
void bind_bpe(py::module_ &m);
void bind_profile(py::module_ &m);
void bind_cuda(py::module_ &m);

// Threads and their working memory exist.
void ready();
// By its name, or with "" the one that new models use.
const Ops &backend(const std::string &name);
// The same as backend, timed where a profile was begun.
const Ops &profiled(const Ops &ops);
// What computes on "cpu" or "cuda".  On a GPU activations are fp32 with that precision, else bf16.
const Ops &ops_on(const std::string &device, const std::string &precision);

// ---- what a caller may hand over -----------------------------------------------------------------------------------

using Ids = py::array_t<int32_t>;
using Floats = py::array_t<float>;

inline std::string str(int64_t n) { return std::to_string(n); }

// An array of exactly this element type, C-contiguous, of this shape; letters name the sizes in messages.
template <class E>
const E *checked(const py::array &a, const char *name, const char *letters, std::vector<int64_t> shape,
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

void check_range(const int32_t *ids, const char *name, int64_t B, int64_t T, int64_t low, int64_t high);
void check_temperature(double temperature);
// The place of a word in a list of those that are known.
int choice(const char *field, const std::string &value, std::vector<std::string> names);
// barelm.Config (checked there) to C.
Config config_of(const py::object &c);

// ---- tensors under Hugging Face's names ----------------------------------------------------------------------------

std::vector<Tensor> tensors_of(const Config &c);
std::vector<int64_t> shape_of(const Tensor &t);

// ---- computing -----------------------------------------------------------------------------------------------------

// Python's signals (Ctrl-C) while kernels run: asked for every 20 ms, because it takes the interpreter's lock.
int signal_pending();

[[noreturn]] void raise(Status s, const std::string &error);

// One computation at a time: of a model, or of all models of a backend that wants it so.
class Gate {
  public:
    explicit Gate(const Ops &ops) : enter_(ops.enter), line_(ops.enter ? everybody() : own_) {}
    Gate(const Gate &) = delete;

    // Run without the interpreter's lock, and turn a status into an exception; why() is then the sentence.  A signal
    // handler runs inside the call that it interrupts, on the same thread: it is refused, since it would wait for
    // itself.
    template <class F, class E>
    void run(F f, E why) {
        ready();
        if (line_.owner == std::this_thread::get_id())
            throw std::runtime_error("the model is computing: a signal handler cannot use it");
        Status s;
        std::string error;
        {
            py::gil_scoped_release nogil;
            Turn mine(*this);
            s = f();
            if (s) error = why();
        }
        if (s) raise(s, error);
    }

    // For what is freed: it can be so in the midst of a computation, by a signal handler.
    template <class F>
    void end(F f) {
        if (line_.owner == std::this_thread::get_id()) return f();
        py::gil_scoped_release nogil;
        Turn mine(*this);
        f();
    }

  private:
    struct Line {
        std::mutex lock;
        std::atomic<std::thread::id> owner;  // who computes
    };
    static Line &everybody() {
        static Line line;
        return line;
    }

    struct Turn {
        explicit Turn(const Gate &gate) : one(gate.line_.lock), owner(gate.line_.owner) {
            owner = std::this_thread::get_id();
            if (gate.enter_) gate.enter_();
        }
        Turn(const Turn &) = delete;
        ~Turn() { owner = std::thread::id(); }
        std::lock_guard<std::mutex> one;
        std::atomic<std::thread::id> &owner;
    };

    void (*const enter_)(void);
    Line own_, &line_;
};

// What a Python object of type Model holds.
struct Held {
    Model *model;
    Gate &gate;
};
Held held_by(const py::object &model);
