// bindings_model.cpp -- what python/barelm/model.py stands on: every argument is checked here, once, before a kernel
// runs.
#include "bindings.h"
extern "C" {
#include "adapter.h"
#include "gpu.h"
}

std::vector<Tensor> tensors_of(const Config &c) {
    std::vector<Tensor> all((size_t)model_tensors(&c, nullptr));
    model_tensors(&c, all.data());
    return all;
}

static std::vector<std::string> modules_of(const Config &c) {
    Module all[MOST_MODULES];
    int n = model_modules(&c, all);
    std::vector<std::string> names;
    for (int i = 0; i < n; i++) names.emplace_back(all[i].name);
    return names;
}

// An adapter that is asked for: rank, scale and the names of modules_of that have one.
struct Asked {
    Asked(const Config &c, int rank, double scale, const std::vector<std::string> &names) {
        const int most = 1 << 16;
        if (rank < 1 || rank > most)
            throw py::value_error("rank: is " + str(rank) + ", must be in [1, " + str(most) + "]");
        if (!std::isfinite((float)scale)) throw py::value_error("scale: must be finite");
        std::vector<std::string> all = modules_of(c);
        chosen.assign(all.size(), 0);
        for (const std::string &name : names) chosen[(size_t)choice("targets", name, all)] = 1;
        if (names.empty()) throw py::value_error("targets: there is none");
        lora = {rank, (float)scale, chosen.data()};
    }
    Asked(const Asked &) = delete;
    std::vector<char> chosen;
    Lora lora;
};

static int precision_as(const std::string &precision) { return choice("precision", precision, {"fp32", "bf16"}); }
static int held_as(const std::string &weights) { return choice("weights", weights, {"fp32", "bf16", "int8"}); }

// Hugging Face's.
std::vector<int64_t> shape_of(const Tensor &t) {
    if (!t.columns) return {t.rows};
    if (t.transposed) return {t.columns, t.rows};
    return {t.rows, t.columns};
}

class PyModel {
  public:
    // No seed: the weights are zero, to be written.
    PyModel(const Config &config, const std::string &precision, const std::optional<uint64_t> &seed,
            const std::string &weights, const std::string &device)
        : ops_(ops_on(device, precision)), gate_(ops_) {
        const int prec = precision_as(precision), held = held_as(weights);
        char error[512];
        gate_.run(
            [&] {
                model_ = model_create(&config, &ops_, prec, held, seed ? &*seed : nullptr, error, sizeof error);
                return model_ ? OK : NO_MEMORY;
            },
            [&] { return error; });
        model_set_poll(model_, signal_pending);
        tensors_ = tensors_of(*model_config(model_));
    }
    PyModel(const PyModel &) = delete;
    ~PyModel() {
        gate_.end([this] { model_free(model_); });
    }

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

    void accumulate(const py::array &tokens, const py::array &targets, const py::array &weights, double temperature,
                    const std::optional<py::array> &starts) {
        Batch b = batch(tokens, &targets, temperature, starts);
        const std::vector<float> d = negative(weights, b);
        run([&] {
            return model_accumulate(model_, d.data(), b.tokens, b.targets, b.starts, (float)temperature, (int)b.B,
                                    (int)b.T);
        });
    }

    py::tuple forward_backward(const py::array &tokens, const py::array &targets, const py::array &weights,
                               double temperature, const std::optional<py::array> &starts) {
        Batch b = batch(tokens, &targets, temperature, starts);
        Floats logprobs({b.B, b.T});
        const std::vector<float> d = negative(weights, b);
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
                  double skip_above, double loss_above) {
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
        in("skip_above", skip_above, 0, INFINITY), in("loss_above", loss_above, -INFINITY, INFINITY);
        double norm = 0;
        run([&] {
            const Update u = {(float)lr,           (float)beta1, (float)beta2, (float)eps,
                              (float)weight_decay, (float)clip,  loss_above,   skip_above};
            Status s = model_update(model_, &norm, &u);
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

    // From here on the adapter alone is trained.
    void adapt(int rank, double scale, const std::vector<std::string> &targets, uint64_t seed) {
        const Config &c = *model_config(model_);
        Asked asked(c, rank, scale, targets);
        run([&] {
            if (model_adapter(model_)) throw std::runtime_error("the model has an adapter already");
            return model_adapt(model_, &asked.lora, seed);
        });
        added_.resize((size_t)adapter_tensors(&c, model_adapter(model_), nullptr));
        adapter_tensors(&c, model_adapter(model_), added_.data());
    }

    // Rows of a tensor of a block, however it is held: written from (rows, columns) or (rows), or read.  `row` and rows
    // count in the parameter, of which a transposed tensor of Hugging Face's shows the columns.
    void put(const std::string &block, const std::string &name, int64_t row, const py::array &values) {
        const Tensor &t = tensor(block, name);
        int64_t rows = values.ndim() ? values.shape(0) : 0;
        const float *p = t.columns ? checked<float>(values, name.c_str(), "N, C", {rows, t.columns}, "it")
                                   : checked<float>(values, name.c_str(), "N", {rows}, "it");
        check_rows(t, row, rows);
        run([&] { return model_put(model_, block_of(block), &t, row, p, rows); });
    }
    Floats get(const std::string &block, const std::string &name, int64_t row, int64_t rows) {
        const Tensor &t = tensor(block, name);
        check_rows(t, row, rows);
        Floats out = t.columns ? Floats({rows, t.columns}) : Floats(rows);
        float *p = out.mutable_data();
        run([&] { return model_get(model_, block_of(block), &t, row, p, rows); });
        return out;
    }
    // {name: (shape, transposed)} of the tensors of a block
    py::dict shapes(const std::string &block) const {
        py::dict out;
        for (const Tensor &t : tensors(block))
            out[t.name] = py::make_tuple(py::tuple(py::cast(shape_of(t))), !!t.transposed);
        return out;
    }
    bool on_host() const { return model_ops(model_)->on_host; }

    // One view per name; each keeps the model, and so the block, alive.
    static py::dict views(const py::object &self, const std::vector<Tensor> &tensors, float *block) {
        py::dict out;
        for (const Tensor &t : tensors) {
            std::vector<int64_t> strides = {4};
            if (t.columns) strides = {4 * t.columns, 4};
            if (t.transposed) std::swap(strides[0], strides[1]);
            out[t.name] = Floats(shape_of(t), strides, block + t.offset, self);
        }
        return out;
    }
    const std::vector<Tensor> &trained() const { return added_.empty() ? tensors_ : added_; }
    static py::dict params(const py::object &self) {
        auto &me = self.cast<PyModel &>();
        me.need_views(model_held(me.model_) == PREC_FP32);
        return views(self, me.tensors_, model_weights(me.model_));
    }
    static py::dict added(const py::object &self) {
        auto &me = self.cast<PyModel &>();
        me.need_views(true);
        return views(self, me.added_, model_added(me.model_));
    }
    static py::dict grads(const py::object &self) {
        auto &me = self.cast<PyModel &>();
        me.need_views(true);
        float *g = nullptr;
        me.run([&] { return model_grads(me.model_, &g); });
        me.grads_seen_ = true;
        return views(self, me.trained(), g);
    }
    static py::tuple moments(const py::object &self) {
        auto &me = self.cast<PyModel &>();
        me.need_views(true);
        float *mv[2];
        me.run([&] { return model_moments(me.model_, mv); });
        return py::make_tuple(views(self, me.trained(), mv[0]), views(self, me.trained(), mv[1]));
    }

    bool has_moments() const { return model_has_moments(model_); }
    int64_t step() const { return model_step(model_); }
    double loss() const { return model_loss(model_); }
    void set_step(int64_t step) {
        if (step < 0) throw py::value_error("step: is " + str(step) + ", must not be negative");
        model_set_step(model_, step);
    }
    std::vector<std::string> decays() const {
        std::vector<std::string> names;
        for (const Tensor &t : trained())
            if (t.decay) names.push_back(t.name);
        return names;
    }
    Held held() { return {model_, gate_}; }

  private:
    struct Batch {
        int64_t B, T;
        const int32_t *tokens, *targets, *starts;
    };

    // d loss / d logprobs
    static std::vector<float> negative(const py::array &weights, const Batch &b) {
        const float *w = checked<float>(weights, "weights", "B, T", {b.B, b.T}, "tokens");
        std::vector<float> d((size_t)(b.B * b.T));
        for (size_t i = 0; i < d.size(); i++) d[i] = -w[i];
        return d;
    }

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
        check_temperature(temperature);
        return b;
    }

    static int block_of(const std::string &name) {
        return choice("block", name, {"weights", "adapter", "gradients", "first moment", "second moment"});
    }
    const std::vector<Tensor> &tensors(const std::string &block) const {
        int b = block_of(block);
        return b == WEIGHTS ? tensors_ : b == ADAPTER ? added_ : trained();
    }
    const Tensor &tensor(const std::string &block, const std::string &name) const {
        for (const Tensor &t : tensors(block))
            if (name == t.name) return t;
        throw py::key_error(name);
    }
    void need_views(bool floats) const {
        if (!floats || !on_host())
            throw std::runtime_error("there are no views of what is no float of the host's memory");
    }
    static void check_rows(const Tensor &t, int64_t row, int64_t rows) {
        if (row < 0 || rows < 1 || row > t.rows - rows)
            throw py::value_error(std::string(t.name) + ": has " + str(t.rows) + " rows, " + str(rows) + " from " +
                                  str(row) + " on are asked for");
    }

    template <class F>
    void run(F f) {
        gate_.run(f, [this] { return model_error(model_); });
    }

    const Ops &ops_;
    Model *model_ = nullptr;
    Gate gate_;
    std::vector<Tensor> tensors_, added_;  // the weights, those of the adapter
    bool grads_seen_ = false;
};

Held held_by(const py::object &model) { return model.cast<PyModel &>().held(); }

void bind_model(py::module_ &m) {
    m.def(
        "model_memory",
        [](const py::object &config, int B, int T, bool training, const std::string &weights, int rank,
           const std::vector<std::string> &targets, const std::string &precision, const std::string &device) {
            Config c = config_of(config);
            std::optional<Asked> asked;
            if (rank) asked.emplace(c, rank, 1.0, targets);
            const int prec = precision_as(precision);
            const Ops *sizes = device == "cpu" ? &ops_on(device, precision) : gpu_sizes(prec);
            Memory b = model_memory(&c, sizes, prec, B, T, training, held_as(weights), asked ? &asked->lora : nullptr);
            py::dict d;
            d["weights"] = b.weights, d["gradients"] = b.gradients, d["moments"] = b.moments;
            d["activations"] = b.activations, d["head"] = b.head, d["tables"] = b.tables;
            return d;
        },
        py::arg("config"), py::arg("B"), py::arg("T"), py::arg("training"), py::arg("weights"), py::arg("rank"),
        py::arg("targets"), py::arg("precision"), py::arg("device"));

    m.def(  // what an adapter's targets may be
        "model_modules", [](const py::object &config) { return modules_of(config_of(config)); }, py::arg("config"));

    m.def(
        "model_tensors",  // {name: shape}, as Model.params would show them
        [](const py::object &config) {
            py::dict out;
            for (const Tensor &t : tensors_of(config_of(config))) out[t.name] = py::tuple(py::cast(shape_of(t)));
            return out;
        },
        py::arg("config"));

    py::class_<PyModel>(m, "Model")
        .def(py::init([](const py::object &config, const std::string &precision, const std::optional<uint64_t> &seed,
                         const std::string &weights, const std::string &device) {
                 return std::make_unique<PyModel>(config_of(config), precision, seed, weights, device);
             }),
             py::arg("config"), py::arg("precision"), py::arg("seed"), py::arg("weights"), py::arg("device"))
        .def("adapt", &PyModel::adapt, py::arg("rank"), py::arg("scale"), py::arg("targets"), py::arg("seed"))
        .def("put", &PyModel::put, py::arg("block"), py::arg("name"), py::arg("row"), py::arg("values"))
        .def("get", &PyModel::get, py::arg("block"), py::arg("name"), py::arg("row"), py::arg("rows"))
        .def("shapes", &PyModel::shapes, py::arg("block"))
        .def_property_readonly("on_host", &PyModel::on_host)
        .def_property_readonly("added", [](const py::object &self) { return PyModel::added(self); })
        .def("forward", &PyModel::forward, py::arg("tokens"), py::arg("targets"), py::arg("hidden"), py::arg("entropy"),
             py::arg("temperature"), py::arg("starts"))
        .def("backward", &PyModel::backward, py::arg("dlogprobs"), py::arg("dhidden"))
        .def("accumulate", &PyModel::accumulate, py::arg("tokens"), py::arg("targets"), py::arg("weights"),
             py::arg("temperature"), py::arg("starts"))
        .def("forward_backward", &PyModel::forward_backward, py::arg("tokens"), py::arg("targets"), py::arg("weights"),
             py::arg("temperature"), py::arg("starts"))
        .def("update", &PyModel::update, py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
             py::arg("weight_decay"), py::arg("clip"), py::arg("skip_above"), py::arg("loss_above"))
        .def("logits", &PyModel::logits, py::arg("tokens"), py::arg("last"), py::arg("starts"))
        .def("trace", &PyModel::trace, py::arg("tokens"), py::arg("starts"))
        .def_property_readonly("params", [](const py::object &self) { return PyModel::params(self); })
        .def_property_readonly("grads", [](const py::object &self) { return PyModel::grads(self); })
        .def_property_readonly("moments", [](const py::object &self) { return PyModel::moments(self); })
        .def_property_readonly("has_moments", &PyModel::has_moments)
        .def_property_readonly("loss", &PyModel::loss)
        .def_property_readonly("decays", &PyModel::decays)
        .def_property("step", &PyModel::step, &PyModel::set_step);
}
