// bindings_profile.cpp -- where the time goes: a table whose operators call those of another and keep the time of each,
// apart for every size.
#include <map>
#include <utility>
#include "bindings.h"
extern "C" {
#include "clock.h"
}

namespace {
struct Tally {
    int64_t calls;
    double seconds;
};
using Sizes = std::vector<int64_t>;  // what an operator's whole-number arguments were

std::mutex lock;
std::map<std::pair<std::string, Sizes>, Tally> tallies;
std::map<std::string, std::vector<std::string>> size_names;
const Ops *plain;  // what is timed; null: nothing is
Ops timed;

template <class T>
void add_size(Sizes &sizes, T x) {
    if constexpr (std::is_integral_v<T>) sizes.push_back(x);
}

template <auto op>
struct Timed;
template <class... A, void (*Ops::*op)(A...)>
struct Timed<op> {
    static inline std::string name;
    static void call(A... arguments) {
        Sizes sizes;
        (add_size(sizes, arguments), ...);
        double start = now();
        (plain->*op)(arguments...);
        double seconds = now() - start;
        std::lock_guard<std::mutex> one(lock);
        Tally &tally = tallies[{name, sizes}];
        tally.calls++, tally.seconds += seconds;
    }
};

// The whole-number arguments of a declaration of ops.def, by name.
std::vector<std::string> names_of_sizes(const std::string &declaration) {
    std::vector<std::string> names;
    for (size_t begin = 1, end; begin < declaration.size(); begin = end + 1) {
        end = declaration.find_first_of(",)", begin);
        std::string one = declaration.substr(begin, end - begin);
        bool whole = one.find("int ") != one.npos || one.find("int64_t ") != one.npos;
        if (whole && one.find('*') == one.npos) names.push_back(one.substr(one.rfind(' ') + 1));
    }
    return names;
}
}  // namespace

const Ops &profiled(const Ops &ops) {
    std::lock_guard<std::mutex> one(lock);
    return plain == &ops ? timed : ops;
}

// From here on new models and sessions are timed.
static void begin() {
    const Ops &ops = backend("");
    std::lock_guard<std::mutex> one(lock);
    if (plain) return;
    timed = ops;
#define OP(op, arguments)             \
    Timed<&Ops::op>::name = #op;      \
    timed.op = Timed<&Ops::op>::call; \
    size_names[#op] = names_of_sizes(#arguments);
#include "ops.def"
#undef OP
    plain = &ops;
}

// [(operator, {argument: value}, calls, seconds)] since the last time, and forget it.
static py::list take() {
    std::lock_guard<std::mutex> one(lock);
    py::list out;
    for (auto &[key, tally] : tallies) {
        py::dict sizes;
        for (size_t i = 0; i < key.second.size(); i++) sizes[py::str(size_names[key.first][i])] = key.second[i];
        out.append(py::make_tuple(key.first, sizes, tally.calls, tally.seconds));
    }
    tallies.clear();
    return out;
}

void bind_profile(py::module_ &m) {
    m.def("profile_begin", begin);
    m.def("profile_take", take);
}
