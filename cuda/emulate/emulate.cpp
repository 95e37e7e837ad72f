/* emulate.cpp -- the scheduler of the emulation: fibers, barriers, checked shared memory; and runtime.h for it.
 *
 * One block, or cluster of blocks, runs at a time and one of its threads at a time, until it waits.  Schedule 0 takes
 * blocks and threads in order and lets cp.async land at once.  Any other number seeds an unfair schedule: blocks and
 * threads in random order, half of the warps standing still for a while, copies landing as late as they may. */
#include "../runtime.h"
#include "../prim_sm90.cuh"
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <algorithm>
#include <functional>
#include <map>
#include <thread>
#include <utility>
#include <vector>

namespace emulate {

Index thread_index, block_index, block_size, grid_size;

namespace {

/* What every GPU from sm_80 on gives a block (sm_86 and sm_89 the least). */
enum { MOST_THREADS = 1024, MOST_STATIC = 48 << 10, MOST_SHARED = 99 << 10, STACK = 128 << 10, PAGE = 4096 };
enum { MOST_SM90 = 227 << 10, AGENTS = 64 }; /* what Hopper gives a block; its mbarriers, see async.h */
enum { MOST_CLUSTER = 8 };                   /* blocks */
enum { MOST_READS = 4 * MOST_THREADS };

/* ---- the state of a block ---- */

struct Barrier {
    const char *word = nullptr, *file = nullptr;
    int line = 0;
    unsigned generation = 0;
    std::vector<int> waiting;
};

struct Copy {
    char *to;
    const char *from;
    int valid;
    size_t element;
};

struct Thread {
    bool left, landing;   /* has returned; a copy of this thread lands early */
    bool waited;          /* for earlier kernels */
    const Barrier *waits; /* until its generation is another one */
    unsigned generation;
    uint32_t clock;             /* counts what others may be ordered after */
    std::vector<uint32_t> seen; /* of each thread: up to which clock it is ordered before this one; empty: 0 */
    unsigned exchanges;
    std::vector<std::vector<Copy>> groups; /* of cp.async, the oldest first; the last is open */
};

struct Warp {
    Barrier barrier;
    int left;
    char lanes[2][WARP][LANE_BYTES]; /* two: a lane may be one exchange ahead */
};

/* What a thread did when its clock stood there. */
struct Access {
    int thread;
    uint32_t clock;
};

/* What was done to one element of shared memory; it stands where the element's first byte does. */
struct Unit {
    uint64_t written = 0, used = 0; /* in which epoch: see below; used: read or added to */
    Access write{-1, 0};
    int pending = -1;             /* the thread whose cp.async is still to write here */
    bool loading = false;         /* TMA is still to write here */
    int readers = 0, reader = -1; /* what reads here beside the threads, and the thread that asked for the last */
    int unfenced = 0;             /* the thread that wrote here without fence_async since, and 1 */
    std::vector<Access> reads;
    std::vector<Access> sums; /* who added to it since it was written */
};

struct Array {
    const void *declaration;
    Region region;
};

/* What each block of a cluster has for itself; its shared memory lies at part * MOST_SM90. */
struct Part {
    Barrier barriers[16];
    int left;
    size_t used;
    std::vector<Array> arrays;
};

/* That runs, or the cluster: then threads and warps are those of one block behind those of the other. */
struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Part parts[MOST_CLUSTER];
    Barrier cluster;
    bool met, reached; /* in cluster_sync, so far; and since then one block reached for another's memory */
    int size, blocks;  /* threads of a block; blocks of the cluster */
    int64_t number;    /* of the first */
    int left;
    uint64_t first_epoch;
    size_t dynamic, element; /* of the dynamic shared memory */
    bool sm90;
    bool early, passed; /* launched so; and whether earlier kernels are complete by now */
    Barrier earlier;
} block;

uint64_t epoch = 1; /* block barriers so far, over all blocks: what was done in another one comes before */
int current;        /* the thread that runs */
alignas(1024) char memory[MOST_CLUSTER * MOST_SM90];
std::vector<Unit> units; /* of as many blocks as a cluster has had so far */

int part_of_thread(int thread) { return thread / block.size; }
Part &my_part() { return block.parts[part_of_thread(current)]; }
char *memory_of(int part) { return memory + part * MOST_SM90; }
char *my_memory() { return memory_of(part_of_thread(current)); }

/* ---- failures ---- */

char message[512];
bool failed;
const char *op_now = "";
void (*body)(const void *);
const void *context;
jmp_buf scheduler;

/* ---- the schedule ---- */

uint64_t seed, state;

uint32_t draw(uint32_t below) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 32) % below;
}

template <class T>
void shuffle_order(std::vector<T> &order) {
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[draw((uint32_t)i)]);
}

/* ---- fibers: made once, then each runs the same thread of block after block ---- */

struct Fiber {
    ucontext_t start;
    jmp_buf at;
    bool begun;
};
Fiber fibers[MOST_THREADS];
char *stacks;

/* Each stack with its unreadable page is two mappings, of which a process may have some 65,000: a library that is
 * closed gives them back. */
struct Closing {
    ~Closing() {
        if (stacks) munmap(stacks, (size_t)MOST_THREADS * STACK);
    }
} closing;

void suspend() {
    if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}

void leave();

void fiber_main() {
    for (;;) {
        body(context);
        leave();
        suspend();
    }
}

void make_fibers() {
    if (!stacks) {
        stacks = (char *)mmap(nullptr, (size_t)MOST_THREADS * STACK, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED) abort();
        for (int i = 0; i < MOST_THREADS; i++) mprotect(stacks + (size_t)i * STACK, PAGE, PROT_NONE);
    }
    for (Fiber &f : fibers) f.begun = false;
}

void resume(int thread) {
    Fiber &f = fibers[thread];
    current = thread;
    thread_index = {(unsigned)(thread % block.size), 0, 0};
    block_index = {(unsigned)block.number + (unsigned)part_of_thread(thread), 0, 0};
    if (_setjmp(scheduler)) return;
    if (f.begun) _longjmp(f.at, 1);
    f.begun = true;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = stacks + (size_t)thread * STACK;
    f.start.uc_stack.ss_size = STACK;
    f.start.uc_link = nullptr;
    makecontext(&f.start, fiber_main, 0);
    setcontext(&f.start);
}

bool in_an_array(const void *p, size_t bytes);
void shut_arrays(bool shut);
void keep_told();

/* An access outside an array, where its memory ends; or a stack that was too small; or too early. */
void on_fault(int, siginfo_t *info, void *) {
    if (in_an_array(info->si_addr, 1)) fail("access to global memory before wait_earlier, at %p", info->si_addr);
    fail("access to memory outside an array, at %p", info->si_addr);
}

/* ---- what is ordered before what ---- */

/* Whether it comes before what this thread does now; both are of one epoch. */
bool ordered(const Access &before) {
    if (before.thread == current) return true;
    const std::vector<uint32_t> &seen = block.threads[(size_t)current].seen;
    return (size_t)before.thread < seen.size() && seen[(size_t)before.thread] >= before.clock;
}

/* What each of these did comes before what any of them does from now on. */
void join(const std::vector<int> &threads) {
    std::vector<uint32_t> all(block.threads.size() + (block.sm90 ? (size_t)(AGENTS * block.blocks) : 0), 0);
    for (int t : threads) {
        Thread &thread = block.threads[(size_t)t];
        for (size_t i = 0; i < thread.seen.size(); i++) all[i] = std::max(all[i], thread.seen[i]);
        all[(size_t)t] = std::max(all[(size_t)t], thread.clock);
    }
    for (int t : threads) block.threads[(size_t)t].seen = all, block.threads[(size_t)t].clock++;
}

/* ---- barriers ---- */

/* Wait until `count` threads have come; true in the one that came last, while the others still wait. */
bool arrive(Barrier &b, int count, const char *word, const char *file, int line) {
    if (b.waiting.empty()) b.word = word, b.file = file, b.line = line;
    if (b.word != word && strcmp(b.word, word)) fail("%s, where other threads of the warp are in %s", word, b.word);
    if (b.line != line || (file && strcmp(b.file, file)))
        fail("%s of %s:%d, where other threads wait at that of %s:%d", word, file, line, b.file, b.line);
    b.waiting.push_back(current);
    return (int)b.waiting.size() == count;
}

void wait(const Barrier &b) {
    Thread &me = block.threads[(size_t)current];
    me.waits = &b, me.generation = b.generation;
    suspend();
}

void release(Barrier &b) {
    b.waiting.clear();
    b.generation++;
    if (seed && draw(2)) suspend();
}

Warp &my_warp() { return block.warps[(size_t)current / WARP]; }

void leave_async();

void leave() {
    Thread &me = block.threads[(size_t)current];
    for (const auto &group : me.groups)
        if (!group.empty()) fail("returns with cp.async under way");
    if (block.early && !me.waited) fail("returns without wait_earlier");
    if (block.sm90) leave_async();
    me.left = true;
    block.left++, my_part().left++, my_warp().left++;
    const Barrier &all = my_part().barriers[0];
    if (!all.waiting.empty()) fail("returns, where other threads wait at __syncthreads of %s:%d", all.file, all.line);
    if (!block.cluster.waiting.empty()) fail("returns, where other threads of the cluster wait in cluster_sync");
    if (block.reached) fail("returns, where blocks of the cluster reached for each other since the last cluster_sync");
    if (!my_warp().barrier.waiting.empty())
        fail("returns, where other lanes of the warp wait in %s", my_warp().barrier.word);
}

/* ---- cp.async ---- */

void land(const Copy &c) {
    memset(c.to, 0, 16);
    memcpy(c.to, c.from, (size_t)c.valid);
}

/* Those of the elements that these bytes touch. */
struct Units {
    size_t at, end, step;
    Units(const void *p, size_t bytes, size_t element) {
        const size_t offset = (size_t)((const char *)p - memory);
        at = offset / element * element, end = offset + bytes, step = element;
    }
};

void finish(const std::vector<Copy> &group) {
    const Thread &me = block.threads[(size_t)current];
    for (const Copy &c : group) {
        if (!me.landing) land(c);
        for (Units i(c.to, 16, c.element); i.at < i.end; i.at += i.step) {
            Unit &u = units[i.at];
            u.pending = -1;
            u.write = {current, me.clock}, u.written = epoch;
            u.reads.clear();
        }
    }
}

/* ---- running ---- */

void begin_async();
bool land_one();
void end_async();
void describe_wait(const Thread &t, char *to, size_t room);

/* Or the cluster of that number. */
void begin_block(int64_t number, size_t shared) {
    const size_t threads = (size_t)(block.size * block.blocks);
    block.number = number * block.blocks;
    block.threads.resize(threads);
    block.warps.resize(threads / WARP);
    for (Thread &t : block.threads) {
        t.left = t.waited = false, t.waits = nullptr, t.clock = 1, t.exchanges = 0;
        t.landing = !seed;
        t.seen.clear();
        t.groups.resize(1);
        t.groups[0].clear();
    }
    for (Warp &w : block.warps) w.left = 0, w.barrier.waiting.clear();
    block.cluster.waiting.clear();
    block.met = block.reached = false;
    block.left = 0, block.passed = false;
    block.first_epoch = ++epoch;
    block.dynamic = shared;
    for (int i = 0; i < block.blocks; i++) {
        Part &part = block.parts[i];
        for (Barrier &b : part.barriers) b.waiting.clear();
        part.left = 0, part.used = (shared + 15) / 16 * 16;
        part.arrays.clear();
        memset(memory_of(i), 0xff, part.used);
    }
    if (block.sm90) begin_async();
}

bool may_run(const Thread &t) { return !t.left && !(t.waits && t.waits->generation == t.generation); }

/* Earlier kernels take as long as they can: until no thread goes on without them. */
bool complete_earlier() {
    if (!block.early || block.passed) return false;
    shut_arrays(false);
    block.passed = true, block.earlier.generation++;
    return true;
}

void say_deadlock() {
    for (size_t i = 0; i < block.threads.size(); i++)
        if (!block.threads[i].left) {
            current = (int)i;
            break;
        }
    const Thread &t = block.threads[(size_t)current];
    char more[128] = "";
    if (block.sm90) describe_wait(t, more, sizeof more);
    snprintf(message, sizeof message,
             "%s: block %lld: no thread can go on; thread %d waits in %s%s, %d of %zu have left", op_now,
             (long long)block.number + part_of_thread(current), current % block.size,
             t.waits ? t.waits->word : "nothing", more, block.left, block.threads.size());
    failed = true;
}

void run_block() {
    std::vector<int> order(block.threads.size());
    std::vector<char> stands(block.warps.size(), 0);
    for (size_t i = 0; i < order.size(); i++) order[i] = (int)i;
    while (block.left < (int)order.size()) {
        if (seed) {
            shuffle_order(order);
            if (draw(16) == 0)
                for (char &s : stands) s = (char)draw(2);
        }
        bool went_on = false;
        if (block.sm90 && seed && draw(2)) land_one();
        if (failed) return;
        for (int t : order) {
            Thread &thread = block.threads[(size_t)t];
            if (stands[(size_t)t / WARP] || !may_run(thread)) continue;
            thread.waits = nullptr;
            went_on = true;
            resume(t);
            if (failed) return;
        }
        if (went_on || (block.sm90 && land_one())) continue;
        if (std::count(stands.begin(), stands.end(), 0) == (long)stands.size()) {
            if (complete_earlier()) continue;
            return say_deadlock();
        }
        std::fill(stands.begin(), stands.end(), 0);
    }
    if (block.sm90) end_async();
}

void run_blocks(int64_t blocks, size_t shared) {
    shut_arrays(block.early); /* for the first block: for all it would take too long */
    std::vector<int64_t> order((size_t)(blocks / block.blocks));
    for (size_t i = 0; i < order.size(); i++) order[i] = (int64_t)i;
    if (seed) shuffle_order(order);
    for (int64_t number : order) {
        begin_block(number, shared);
        run_block();
        if (failed) break;
    }
}

}  // namespace

void fail(const char *format, ...) {
    int n = snprintf(message, sizeof message, "%s: block %u, thread %d: ", op_now, block_index.x, current % block.size);
    va_list args;
    va_start(args, format);
    vsnprintf(message + n, sizeof message - (size_t)n, format, args);
    va_end(args);
    failed = true;
    _longjmp(scheduler, 1);
}

void sync_block(const char *file, int line) {
    Part &part = my_part();
    Barrier &b = part.barriers[0];
    if (part.left) fail("__syncthreads of %s:%d, where %d threads have returned", file, line, part.left);
    if (!arrive(b, block.size, "__syncthreads", file, line)) return wait(b);
    if (block.blocks == 1) epoch++; /* the same for all threads, and quicker */
    else join(b.waiting);
    release(b);
}

void sync_group(int id, int threads) {
    Barrier &b = my_part().barriers[id];
    if (threads % WARP) fail("a barrier of %d threads: no whole warps", threads);
    if (!arrive(b, threads, "sync_group", nullptr, threads)) return wait(b);
    join(b.waiting);
    release(b);
}

void sync_warp() {
    Barrier &b = my_warp().barrier;
    if (my_warp().left) fail("__syncwarp, where lanes of the warp have returned");
    if (!arrive(b, WARP, "__syncwarp", nullptr, 0)) return wait(b);
    join(b.waiting);
    release(b);
}

/* It orders nothing among the threads of the block. */
void wait_earlier() {
    Thread &me = block.threads[(size_t)current];
    if (!block.early) fail("wait_earlier in a kernel that is not launched early");
    if (me.waited) fail("wait_earlier a second time");
    me.waited = true;
    block.earlier.word = "wait_earlier";
    if (!block.passed) wait(block.earlier);
}

void prefetch_l2(const void *p, size_t bytes) {
    if ((uintptr_t)p % 16 || bytes % 16 || bytes == 0) fail("prefetch_l2 of %zu bytes at %p: no words of 16", bytes, p);
    if (!in_an_array(p, bytes)) fail("prefetch_l2 of %zu bytes at %p: outside an array", bytes, p);
}

/* Lanes are together in it, but it orders no memory. */
const char *exchange(const char *word, const void *mine, size_t bytes) {
    Warp &warp = my_warp();
    if (warp.left) fail("%s, where lanes of the warp have returned", word);
    char(*lanes)[LANE_BYTES] = warp.lanes[block.threads[(size_t)current].exchanges++ % 2];
    memcpy(lanes[current % WARP], mine, bytes);
    if (arrive(warp.barrier, WARP, word, nullptr, 0)) release(warp.barrier);
    else wait(warp.barrier);
    return lanes[0];
}

Region shared_array(const void *declaration, size_t count, size_t element) {
    Part &part = my_part();
    for (const Array &a : part.arrays)
        if (a.declaration == declaration) return a.region;
    const Region region = {my_memory() + part.used, count * element, element};
    if (region.bytes > MOST_STATIC || part.used + region.bytes > MOST_SHARED)
        fail("%zu bytes of shared memory behind %zu: too many", region.bytes, part.used);
    memset(region.begin, 0xff, region.bytes);
    part.used += (region.bytes + 15) / 16 * 16;
    part.arrays.push_back({declaration, region});
    return region;
}

Region shared_dynamic(size_t element) {
    block.element = element;
    return {my_memory(), block.dynamic, element};
}

/* Of each thread the last: its others come before it. */
static void keep_last(std::vector<Access> &list) {
    std::stable_sort(list.begin(), list.end(), [](const Access &a, const Access &b) { return a.thread < b.thread; });
    auto same = [](const Access &a, const Access &b) { return a.thread == b.thread; };
    std::reverse(list.begin(), list.end()); /* unique keeps the first of equals */
    list.erase(std::unique(list.begin(), list.end(), same), list.end());
}

static void note(std::vector<Access> &list, Access now) {
    if (list.empty() || list.back().thread != now.thread) list.push_back(now);
    else list.back() = now;
    if (list.size() >= MOST_READS) keep_last(list);
}

static void begin_epoch(Unit &u) {
    if (u.used == epoch) return;
    u.reads.clear(), u.sums.clear();
    u.used = epoch;
}

static void unfenced_write(size_t at);

/* That all of these come before what this thread does; `at` is for the message. */
static void check_order(const std::vector<Access> &before, const char *what, long long at) {
    for (const Access &a : before)
        if (!ordered(a)) fail("byte %lld of a shared array: a race with the %s of thread %d", at, what, a.thread);
}

/* A read, a write, or a sum, which only others of its kind may overlap. */
enum Use { READ, WRITE, SUM };

static void check_use(const Region &region, const void *p, size_t bytes, Use use) {
    const Access now = {current, block.threads[(size_t)current].clock};
    const long long at = (const char *)p - region.begin;
    for (Units i(p, bytes, region.element); i.at < i.end; i.at += i.step) {
        Unit &u = units[i.at];
        if (u.pending >= 0) fail("byte %lld of a shared array: cp.async of thread %d is under way", at, u.pending);
        if (u.loading) fail("byte %lld of a shared array: a tile is being loaded there", at);
        if (use != READ && u.readers)
            fail("byte %lld of a shared array: what thread %d asked for still reads it", at, u.reader);
        if (use != WRITE && u.written < block.first_epoch) fail("byte %lld of a shared array: nobody wrote it", at);
        if (u.written == epoch && !ordered(u.write))
            fail("byte %lld of a shared array: a race with the write of thread %d", at, u.write.thread);
        begin_epoch(u);
        if (use != SUM) check_order(u.sums, "sum", at);
        if (use != READ) check_order(u.reads, "read", at);
        if (use == READ) note(u.reads, now);
        if (use == SUM) note(u.sums, now);
        if (use == WRITE) {
            u.reads.clear(), u.sums.clear();
            u.write = now, u.written = epoch;
        }
        if (use != READ && block.sm90 && u.unfenced != current + 1) unfenced_write(i.at);
    }
}

void check_access(const Region &region, const void *p, size_t bytes, bool write) {
    check_use(region, p, bytes, write ? WRITE : READ);
}
void check_sum(const Region &region, const void *p, size_t bytes) { check_use(region, p, bytes, SUM); }

void copy_async(const Region &region, void *to, const void *from, int valid, bool told) {
    if (valid < 0 || valid > 16) fail("cp.async of %d bytes", valid);
    Thread &me = block.threads[(size_t)current];
    if (block.early && !me.waited && !told) fail("cp.async before wait_earlier");
    if (told && valid) from = as_told(from, (size_t)valid);
    const Copy copy = {(char *)to, (const char *)from, valid, region.element};
    check_access(region, to, 16, true); /* who read what it will write over is done */
    for (Units i(to, 16, region.element); i.at < i.end; i.at += i.step) units[i.at].pending = current;
    if (me.landing) land(copy);
    me.groups.back().push_back(copy);
}

void copy_async_commit() { block.threads[(size_t)current].groups.emplace_back(); }

void copy_async_wait(int groups) {
    Thread &me = block.threads[(size_t)current];
    while ((int)me.groups.size() - 1 > groups) {
        finish(me.groups.front());
        me.groups.erase(me.groups.begin());
    }
}

}  // namespace emulate

#include "async.h"

namespace emulate {

static void run(const Launch &l, const void *context_) {
    if (failed || l.blocks <= 0) return;
    op_now = l.op, body = l.body, context = context_;
    const bool clusters = l.cluster == 1 || (l.cluster <= MOST_CLUSTER && l.sm90 && l.blocks % l.cluster == 0);
    if (l.blocks > INT32_MAX || l.threads <= 0 || !clusters || l.threads * l.cluster > MOST_THREADS ||
        l.threads % WARP || l.shared > (l.sm90 ? (size_t)MOST_SM90 : (size_t)MOST_SHARED)) {
        snprintf(message, sizeof message,
                 "%s: cannot launch %lld blocks of %d threads with %zu bytes of shared memory%s, in clusters of %d",
                 l.op, (long long)l.blocks, l.threads, l.shared, l.early ? " early" : "", l.cluster);
        failed = true;
        return;
    }
    if (!stacks) make_fibers();
    if (units.size() < (size_t)(l.cluster * MOST_SM90)) units.resize((size_t)(l.cluster * MOST_SM90));
    keep_told();
    block.sm90 = l.sm90, block.early = l.early, block.size = l.threads, block.blocks = l.cluster;
    block_size = {(unsigned)l.threads, 1, 1}, grid_size = {(unsigned)l.blocks, 1, 1};

    static char stack[64 << 10]; /* of the handler: the fiber's own may be what ran out */
    stack_t mine = {}, old_stack;
    mine.ss_sp = stack, mine.ss_size = sizeof stack;
    struct sigaction action = {}, old_segv, old_bus;
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaltstack(&mine, &old_stack);
    sigaction(SIGSEGV, &action, &old_segv), sigaction(SIGBUS, &action, &old_bus);
    run_blocks(l.blocks, l.shared);
    shut_arrays(false);
    sigaction(SIGSEGV, &old_segv, nullptr), sigaction(SIGBUS, &old_bus, nullptr);
    sigaltstack(&old_stack, nullptr);
    if (!failed) return;
    make_fibers(); /* they were left in the middle of it */
    units.clear();
}

/* What a host asked of the stream, in order: the calls of a recording are done again with the very arguments they had.
 */
using Call = std::function<void()>;
static std::vector<Call> *recorded_calls; /* NULL: nothing is recorded */

static void submit(Call call) {
    if (recorded_calls) recorded_calls->push_back(std::move(call));
    else call();
}

void launch(const Launch &l, const void *context_, size_t bytes) {
    const std::vector<char> kept((const char *)context_, (const char *)context_ + bytes);
    submit([l, kept] { run(l, kept.data()); });
}

}  // namespace emulate

/* ---- runtime.h ---- */

namespace {

/* Memory whose end is followed by an unreadable page: at once under schedule 0, and under the others, where it begins
 * on 256 bytes as that of a GPU does, with the bytes between.  What is around it is 0xff, and must stay so. */
struct Guarded {
    char *map, *begin;
    size_t mapped, bytes;
};
std::vector<Guarded> arrays; /* all that there are */

Guarded guard(size_t bytes, int fill, size_t alignment) {
    using emulate::PAGE;
    const size_t room = (bytes + PAGE) / PAGE * PAGE;
    Guarded g = {nullptr, nullptr, room + PAGE, bytes};
    g.map = (char *)mmap(nullptr, g.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (g.map == MAP_FAILED) abort();
    memset(g.map, 0xff, room);
    mprotect(g.map + room, PAGE, PROT_NONE);
    g.begin = g.map + (room - bytes) / alignment * alignment;
    memset(g.begin, fill, bytes);
    arrays.push_back(g);
    return g;
}

void unguard(std::vector<Guarded>::iterator g) {
    munmap(g->map, g->mapped);
    arrays.erase(g);
}
std::vector<Guarded>::iterator array_at(const void *begin) {
    return std::find_if(arrays.begin(), arrays.end(), [begin](const Guarded &a) { return a.begin == begin; });
}

bool untouched_around(const Guarded &g) {
    auto is_full = [](char c) { return c == (char)0xff; };
    return std::all_of(g.map, g.begin, is_full) &&
           std::all_of(g.begin + g.bytes, g.map + g.mapped - emulate::PAGE, is_full);
}

}  // namespace

namespace emulate {
namespace {

bool in_an_array(const void *p, size_t bytes) {
    auto holds = [p, bytes](const Guarded &a) { return p >= a.begin && (const char *)p + bytes <= a.begin + a.bytes; };
    return std::any_of(arrays.begin(), arrays.end(), holds);
}

/* Or open again. */
void shut_arrays(bool shut) {
    static bool are_shut;
    if (shut == are_shut) return;
    are_shut = shut;
    for (const Guarded &a : arrays) mprotect(a.map, a.mapped - PAGE, shut ? PROT_NONE : PROT_READ | PROT_WRITE);
}

/* What the arrays held when the host had copied something in, as long as no kernel ran since. */
struct Told {
    const char *begin;
    std::vector<char> bytes;
};
std::vector<Told> told;
bool copied;

void keep_told() {
    if (!copied) return;
    copied = false;
    told.clear();
    for (const Guarded &a : arrays) told.push_back({a.begin, {a.begin, a.begin + a.bytes}});
}

}  // namespace

const char *as_told(const void *p_, size_t bytes) {
    const char *p = (const char *)p_;
    for (const Told &t : told)
        if (p >= t.begin && p + bytes <= t.begin + t.bytes.size()) return t.bytes.data() + (p - t.begin);
    fail("%zu bytes at %p: the host told nothing there", bytes, p_);
}

}  // namespace emulate

namespace {

struct Recording {
    std::vector<emulate::Call> calls;
    std::vector<Guarded> working;
    unsigned place; /* of the working memory, see emulate_move_scratch */
} *recording;
unsigned scratch_place;

void say_failure(const char *what) {
    if (emulate::failed) return;
    snprintf(emulate::message, sizeof emulate::message, "%s", what);
    emulate::failed = true;
}

}  // namespace

/* Who entered last; nobody, where tests call operators by themselves. */
static std::thread::id entered;
void cuda_enter(void) { entered = std::this_thread::get_id(); }
static void check_entered(void) {
    if (entered != std::thread::id() && entered != std::this_thread::get_id())
        say_failure("a thread works that was not the last to enter");
}

/* New each time, and full of NaN; in a recording it stays, and is full of NaN again each time. */
void *scratch(size_t bytes) {
    static Guarded block;
    check_entered();
    if (recording) {
        const Guarded g = guard(bytes, 0xff, 16);
        recording->working.push_back(g);
        emulate::submit([g] { memset(g.begin, 0xff, g.bytes); });
        return g.begin;
    }
    if (block.map) unguard(array_at(block.begin));
    block = guard(bytes, 0xff, 16);
    return block.begin;
}

void *cuda_alloc(size_t bytes) {
    check_entered();
    return guard(bytes, 0, emulate::seed ? 256 : 1).begin;
}

void cuda_free(void *p, size_t bytes) {
    check_entered();
    const auto g = array_at(p);
    if (g == arrays.end() || g->bytes != bytes) abort();
    if (!emulate::failed && !untouched_around(*g)) {
        snprintf(emulate::message, sizeof emulate::message, "%s: memory around an array was written", emulate::op_now);
        emulate::failed = true;
    }
    unguard(g);
}

/* The host's part of a step, which is never recorded. */
static void copy_at_once(void *dst, const void *src, size_t bytes, const char *op) {
    check_entered();
    if (recording) return say_failure(op);
    if (!bytes) return;
    memcpy(dst, src, bytes);
    emulate::copied = true;
}
void cuda_copy_in(void *dst, const void *src, size_t bytes) {
    copy_at_once(dst, src, bytes, "cuda_copy_in: in the middle of a recording");
}
void cuda_copy_out(void *dst, const void *src, size_t bytes) {
    copy_at_once(dst, src, bytes, "cuda_copy_out: in the middle of a recording");
}
void cuda_copy(void *dst, const void *src, size_t bytes) {
    if (bytes) emulate::submit([=] { memcpy(dst, src, bytes); });
}
void cuda_zero(void *p, size_t bytes) {
    emulate::submit([=] { memset(p, 0, bytes); });
}

void cuda_record(void) {
    recording = new Recording{{}, {}, scratch_place};
    emulate::recorded_calls = &recording->calls;
}

void *cuda_recorded(void) {
    Recording *r = recording;
    recording = nullptr, emulate::recorded_calls = nullptr;
    return r;
}

int cuda_replay(const void *recording_) {
    const Recording *r = (const Recording *)recording_;
    if (r->place != scratch_place) return 0;
    for (const emulate::Call &call : r->calls) call();
    return 1;
}

void cuda_forget(void *recording_) {
    Recording *r = (Recording *)recording_;
    for (const Guarded &g : r->working) unguard(array_at(g.begin));
    delete r;
}

const TensorMap &tensor_map(const bf16 *p, int rows, int cols, int64_t ld, int box_rows, int box_cols, int count) {
    static TensorMap map;
    if (!on_16_bytes(p) || ld * (int64_t)sizeof(bf16) % 16 || rows <= 0 || cols <= 0 || cols > ld || count < 0 ||
        box_rows <= 0 || box_rows > 256 || (box_cols != TILE_WIDTH && box_cols != TILE_WIDTH / 2))
        say_failure("tensor_map: not what TMA can copy");
    map = {(char *)const_cast<bf16 *>(p), rows, cols, ld, box_rows, box_cols, count};
    return map;
}

/* For the tests: whether the emulated GPU is a Hopper. */
static bool emulated_sm90;
extern "C" void emulate_sm90(int on) { emulated_sm90 = on; }
bool is_sm90(void) { return emulated_sm90; }
int sm_count(void) { return 132; }

int64_t cuda_memory_free(void) { return (int64_t)1 << 30; }
const char *barelm_cuda_open(int device) { return device ? "only one GPU is emulated" : nullptr; }

extern "C" const char *cuda_error(void) { return emulate::failed ? emulate::message : nullptr; }

/* For the tests: as if somebody else's work had needed more working memory, which then lies elsewhere. */
extern "C" void emulate_move_scratch(void) { scratch_place++; }

/* For the tests: the schedule of the launches that follow; also forgets a failure. */
extern "C" void emulate_schedule(uint64_t seed) {
    emulate::seed = seed;
    emulate::state = seed * 0x9e3779b97f4a7c15u + 1;
    emulate::failed = false;
}
