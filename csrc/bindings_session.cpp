// bindings_session.cpp -- what python/barelm/session.py stands on: every argument is checked here, once.
#include <algorithm>
#include <memory>
#include <tuple>
#include <unordered_map>
#include "bindings.h"
extern "C" {
#include "session.h"
}

// All of it happens under its model's lock, so that no update comes between; a session that stands alone has a lock of
// its own.  Ids are given once: that of a row which was freed names no other.
class PySession {
  public:
    // Takes the weights of a model, and again when they move.
    PySession(const py::object &model, int64_t max_tokens, const std::optional<std::string> &weights)
        : model_(model), m_(held_by(model).model), gate_(held_by(model).gate), config_(*model_config(m_)) {
        create(model_ops(m_), max_tokens, weights ? precision(*weights) : model_precision(m_));
    }
    // Stands alone: its weights come in parts, see put.
    PySession(const Config &config, int64_t max_tokens, const std::string &weights, const std::string &device)
        : m_(nullptr),
          own_gate_(std::in_place, ops_of(device, weights)),
          gate_(*own_gate_),
          config_(config),
          parts_(tensors_of(config)) {
        create(&ops_of(device, weights), max_tokens, precision(weights));
        std::sort(parts_.begin(), parts_.end(), [](auto &a, auto &b) { return a.offset < b.offset; });
    }
    PySession(const PySession &) = delete;
    ~PySession() {
        gate_.end([this] { held_.reset(); });
    }

    // The tensors that put wants, in order: name, and whether its rows are columns in Hugging Face's shape.
    std::vector<std::tuple<std::string, bool>> order() const {
        std::vector<std::tuple<std::string, bool>> out;
        for (const Tensor &t : parts_) out.emplace_back(t.name, t.transposed);
        return out;
    }

    // The next rows of a tensor: (rows, columns), or (rows) of a vector.
    void put(const std::string &name, const py::array &values) {
        if (!missing()) throw py::value_error(name + ": all weights are there");
        const Tensor &t = parts_[part_];
        if (name != t.name) throw py::value_error(name + ": comes out of order, " + t.name + " is not whole yet");
        int64_t rows = values.ndim() ? values.shape(0) : 0, columns = t.columns ? t.columns : 1;
        const float *p = t.columns ? checked<float>(values, name.c_str(), "N, C", {rows, t.columns}, "it")
                                   : checked<float>(values, name.c_str(), "N", {rows}, "it");
        if (rows > t.rows - row_)
            throw py::value_error(name + ": has " + str(t.rows) + " rows, " + str(row_ + rows) + " came");
        run([&] {
            session_put(session_, t.offset + row_ * columns, p, rows * columns);
            row_ += rows;
            if (row_ == t.rows) part_++, row_ = 0;
            if (!missing()) session_end(session_, loads_++);
            return OK;
        });
    }

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

    // tokens: the chunks of all rows, one behind the other.  The logits, or none where they are not to be read: with
    // the step in one piece, for another thread's step may follow.
    Floats step(const std::vector<int64_t> &rows, const std::vector<int> &counts, const Ids &tokens, bool read) {
        const Config &c = config_;
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
        Floats logits({read ? R : 0, (int64_t)c.vocab_size});
        float *p = logits.mutable_data();
        run([&] {
            std::vector<int> slots = slots_of(rows);
            if (missing()) throw std::runtime_error("the session has not got all of its weights yet");
            if (Status s = m_ && model_version(m_) != version_ ? load() : OK) return s;
            for (size_t i = 0; i < slots.size(); i++) {
                int length = session_length(session_, slots[i]);
                if (length > c.context - counts[i])
                    throw py::value_error("chunks[" + str((int64_t)i) + "]: " + str(counts[i]) +
                                          " tokens behind a row of " + str(length) +
                                          " are more than the model's context of " + str(c.context));
            }
            Status s = session_step(session_, slots.data(), counts.data(), ids, (int)R);
            return s || !read ? s : session_logits(session_, p, (int)R);
        });
        return logits;
    }

    Floats logits() {
        int R = 0;
        run([&] { return R = session_rows(session_), OK; });
        Floats out({(int64_t)R, (int64_t)config_.vocab_size});
        float *p = out.mutable_data();
        run([&] { return session_logits(session_, p, R); });
        return out;
    }

    // options (R, 4), u (R): as the operator `sample` has them; of the first V logits
    std::tuple<Ids, Floats, Floats> draw(const py::array &options, const py::array &u, int V) {
        const int64_t R = u.ndim() ? u.shape(0) : 0;
        const double *numbers = checked<double>(u, "u", "R", {R}, "it");
        const float *o = checked<float>(options, "options", "R, 4", {R, SAMPLE_COUNT}, "the draw");
        if (V < 1 || V > config_.vocab_size)
            throw py::value_error("vocab: is " + str(V) + ", must be in [1, " + str(config_.vocab_size) + "]");
        Ids tokens(R);
        Floats logprobs(R), sampled(R);
        int32_t *t = tokens.mutable_data();
        float *l = logprobs.mutable_data(), *s = sampled.mutable_data();
        run([&] { return session_draw(session_, t, l, s, o, numbers, V, (int)R); });
        return {tokens, logprobs, sampled};
    }

    Floats logprobs(const Ids &tokens, double temperature) {
        if (tokens.ndim() != 1) throw py::value_error("tokens: has " + str(tokens.ndim()) + " dimensions, must have 1");
        check_temperature(temperature);
        const int32_t *ids = tokens.data();
        int64_t R = tokens.shape(0);
        check_range(ids, "tokens", 1, R, 0, config_.vocab_size);
        Floats out(R);
        float *p = out.mutable_data();
        run([&] { return session_logprobs(session_, p, ids, (float)temperature, (int)R); });
        return out;
    }

    // After weights were written by hand, through model.params: no version tells of that.
    void refresh() {
        if (!m_) throw std::runtime_error("refresh: the session has no model whose weights it could take");
        run([&] { return version_ = -1, OK; });
    }

    py::dict memory() const {
        SessionMemory b = session_memory(&config_, ops_, prec_, session_pages(session_));
        py::dict d;
        d["weights"] = b.packed + (m_ ? 0 : b.plain), d["cache"] = b.cache;
        return d;
    }

  private:
    static int precision(const std::string &weights) { return choice("weights", weights, {"fp32", "bf16", "int8"}); }

    static const Ops &ops_of(const std::string &device, const std::string &weights) {
        precision(weights);  // a word that is none is told first
        return ops_on(device, weights);
    }

    void create(const Ops *ops, int64_t max_tokens, int prec) {
        const int64_t most = (int64_t)1 << 30;
        if (max_tokens < 1 || max_tokens > most)
            throw py::value_error("max_tokens: is " + str(max_tokens) + ", must be in [1, " + str(most) + "]");
        ops_ = ops, prec_ = prec;
        int pages = (int)((max_tokens + KEY_BLOCK - 1) / KEY_BLOCK);
        std::string error(512, 0);
        gate_.run(
            [&] {
                held_.reset(session_create(&config_, ops, prec, pages, error.data(), (int)error.size()));
                return held_ ? OK : NO_MEMORY;
            },
            [&] { return error.c_str(); });
        session_ = held_.get();
        session_set_poll(session_, signal_pending);
        run([&] { return m_ ? load() : session_begin(session_); });
    }

    template <class F>
    void run(F f) {
        gate_.run(f, [this] { return session_error(session_); });
    }
    Status load() {
        Status s = session_load(session_, m_, loads_++);
        if (!s) version_ = model_version(m_);
        return s;
    }
    bool missing() const { return part_ < parts_.size(); }
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

    py::object model_;              // kept alive: the session reads its weights
    Model *m_;                      // null: the session stands alone
    std::optional<Gate> own_gate_;  // of one that stands alone
    Gate &gate_;
    Config config_;
    const Ops *ops_ = nullptr;
    int prec_ = PREC_FP32;
    std::unique_ptr<Session, void (*)(Session *)> held_{nullptr, session_free};
    Session *session_ = nullptr;
    int64_t version_ = 0, loads_ = 0, next_ = 0;  // the model's version that was loaded; how often; the next id
    std::vector<Tensor> parts_;                   // what put wants
    size_t part_ = 0;                             // the one that comes next,
    int64_t row_ = 0;                             // and its first row that is not there yet
    std::unordered_map<int64_t, int> slots_;
};

void bind_session(py::module_ &m) {
    m.attr("PAGE") = (int)KEY_BLOCK;  // tokens

    py::class_<PySession>(m, "Session")
        .def(py::init<const py::object &, int64_t, const std::optional<std::string> &>(), py::arg("model"),
             py::arg("max_tokens"), py::arg("weights"))
        .def(py::init([](const py::object &config, int64_t max_tokens, const std::string &weights,
                         const std::string &device) {
                 return std::make_unique<PySession>(config_of(config), max_tokens, weights, device);
             }),
             py::kw_only(), py::arg("config"), py::arg("max_tokens"), py::arg("weights"), py::arg("device"))
        .def("order", &PySession::order)
        .def("put", &PySession::put, py::arg("name"), py::arg("values"))
        .def("add", &PySession::add)
        .def("fork", &PySession::fork, py::arg("row"), py::arg("n"))
        .def("free", &PySession::free, py::arg("row"))
        .def("length", &PySession::length, py::arg("row"))
        .def("pages_needed", &PySession::pages_needed, py::arg("rows"), py::arg("counts"))
        .def("step", &PySession::step, py::arg("rows"), py::arg("counts"), py::arg("tokens"), py::arg("read") = true)
        .def("logits", &PySession::logits)
        .def("draw", &PySession::draw, py::arg("options"), py::arg("u"), py::arg("vocab"))
        .def("logprobs", &PySession::logprobs, py::arg("tokens"), py::arg("temperature"))
        .def("refresh", &PySession::refresh)
        .def_property_readonly("memory", &PySession::memory)
        .def_property_readonly("pages", &PySession::pages)
        .def_property_readonly("room", &PySession::room);
}
