// bindings_bpe.cpp -- what python/barelm/tokenizer.py trains a vocabulary with.
#include <memory>
#include <string_view>
#include "bindings.h"
extern "C" {
#include "bpe.h"
#include "threads.h"
}

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

void bind_bpe(py::module_ &m) {
    m.def("split", split, py::arg("pattern"), py::arg("text"));  // the pieces; bytes that are not UTF-8 are in none

    m.def("piece_counts", piece_counts, py::arg("pattern"), py::arg("documents"));

    py::class_<PyBpe>(m, "Bpe")
        .def(py::init<const std::string &, int64_t>(), py::arg("pattern"), py::arg("min_count"))
        .def("add", &PyBpe::add, py::arg("document"))
        .def("merge", &PyBpe::merge, py::arg("n"))
        .def_property_readonly("merges", &PyBpe::merges);  // (n, 2) uint32: the tokens of each pair
}
