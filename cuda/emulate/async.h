/* async.h -- the part of emulate.cpp on what works beside the threads of Hopper: mbarriers, TMA, wgmma.
 *
 * What TMA writes for an mbarrier counts as the write of one more thread, which those hear of who wait for the phase.
 * A product reads when its warp waits for it, and until then nobody may write there; so does a store. */
#pragma once

namespace emulate {

namespace {

struct Mbarrier {
    Barrier phase; /* its generation: how many have ended */
    int arrivals, missing;
    long bytes; /* that are still to come; less than 0: more came than were expected so far */
    bool fenced;
    int agent;      /* the thread that what TMA writes for it counts as */
    uint32_t clock; /* of that thread */
    std::vector<uint32_t> gathered, released;
};

/* A tile of a map's matrix or of one of its matrices. */
struct Tile {
    TensorMap map;
    int row, column, which; /* -1: there is but one */

    /* Value (r, c) of the tile; NULL outside the matrix. */
    char *at(int r, int c) const {
        const int64_t i = (int64_t)row + r, j = (int64_t)column + c, k = which < 0 ? 0 : which;
        const bool there = i >= 0 && i < map.rows && j >= 0 && j < map.cols && k < std::max(map.count, 1);
        return there ? map.p + ((k * map.rows + i) * map.ld + j) * 2 : nullptr;
    }
};

/* That is under way to shared memory: of a tile, or, where it has none, of numbers. */
struct Load {
    Tile tile;
    bool told; /* as it was when the host last copied something in */
    std::vector<char> numbers;
    size_t element;
    char *to;
    Mbarrier *b;
    unsigned phase;
    int thread;

    size_t bytes() const { return numbers.empty() ? bytes_of_box(tile.map) : numbers.size(); }
};

struct Store {
    Tile tile;
    Region region;
    const char *from;
};

/* A store whose bytes have been read. */
struct Written {
    Tile tile;
    std::vector<char> bytes;
};

struct Multiply {
    Product product;
    SumsState *sums[WARP];
    const uint32_t *rows[WARP];
    uint32_t was[WARP][4]; /* what lay there */
};

struct AsyncThread {
    std::vector<size_t> unfenced; /* places this thread wrote since its last fence_async, and perhaps others */
    std::vector<std::vector<Store>> stores{1};
    std::vector<Written> written;
    unsigned fences = 0, commits = 0;
};

struct AsyncWarp {
    Multiply next;
    std::vector<std::vector<Multiply>> groups{1};
    unsigned commits = 0;
    int registers = 0;
};

struct Async {
    std::map<size_t, Mbarrier> barriers;
    std::vector<Load> loads;
    std::vector<AsyncThread> threads;
    std::vector<AsyncWarp> warps;
} async;

void merge(std::vector<uint32_t> &to, const std::vector<uint32_t> &from) {
    if (to.size() < from.size()) to.resize(from.size(), 0);
    for (size_t i = 0; i < from.size(); i++) to[i] = std::max(to[i], from[i]);
}

AsyncThread &async_me() { return async.threads[(size_t)current]; }
AsyncWarp &async_warp() { return async.warps[(size_t)current / WARP]; }

/* A multiprocessor has 65536 registers; a thread of this kernel begins with its even share, in steps of 8. */
enum { REGISTERS = 65536 };

void begin_async() {
    const int threads = block.size;
    async.barriers.clear();
    async.loads.clear();
    async.threads.assign(block.threads.size(), {});
    async.warps.assign(block.warps.size(), {});
    for (AsyncWarp &w : async.warps) w.registers = std::min(REGISTERS / threads / 8 * 8, 255);
}

void put(const Written &w) {
    const TensorMap &map = w.tile.map;
    for (int r = 0; r < map.box_rows; r++)
        for (int c = 0; c < map.box_cols; c++)
            if (char *to = w.tile.at(r, c)) memcpy(to, &w.bytes[2 * (size_t)(r * map.box_cols + c)], 2);
}

void leave_async() {
    AsyncThread &me = async_me();
    for (const auto &group : me.stores)
        if (!group.empty()) fail("returns with a tile's store under way");
    for (const auto &group : async_warp().groups)
        if (!group.empty()) fail("returns with a product under way");
    for (const Written &w : me.written) put(w);
    me.written.clear();
}

/* ---- what the units touch of shared memory ---- */

/* The block of the cluster that has it. */
int part_at(const char *p) { return (int)((p - memory) / MOST_SM90); }

/* The same places of a Region, element by element, whatever unit reads them. */
void begin_read(const Region &region, const void *p, size_t bytes, const char *what) {
    const long long at = (const char *)p - my_memory();
    for (Units i(p, bytes, region.element); i.at < i.end; i.at += i.step) {
        Unit &u = units[i.at];
        if (u.loading) fail("byte %lld of shared memory: a tile that %s reads is being loaded", at, what);
        if (u.written < block.first_epoch) fail("byte %lld of shared memory: nobody wrote what %s reads", at, what);
        if (u.written == epoch && !ordered(u.write))
            fail("byte %lld of shared memory: %s races with the write of thread %d", at, what, u.write.thread);
        if (u.unfenced)
            fail("byte %lld of shared memory: thread %d wrote it, without fence_async before %s", at, u.unfenced - 1,
                 what);
        begin_epoch(u);
        check_order(u.sums, "sum", at);
        u.readers++, u.reader = current;
    }
}

void end_read(const Region &region, const void *p, size_t bytes) {
    const Access now = {current, block.threads[(size_t)current].clock};
    for (Units i(p, bytes, region.element); i.at < i.end; i.at += i.step) {
        Unit &u = units[i.at];
        u.readers--;
        begin_epoch(u);
        note(u.reads, now);
    }
}

/* Where byte `offset` of a tile lies: bits 4 to 6 of the address are turned by bits 7 to 9, or, of rows of 64 bytes,
 * bits 4 and 5 by 7 and 8.  Offsets count from the first block's memory; each block's begins on 1024 bytes. */
char *swizzled(size_t offset, int columns = TILE_WIDTH) {
    const size_t turned = columns == TILE_WIDTH ? 7 : 3;
    return memory + (offset ^ (offset >> 7 & turned) << 4);
}

/* ---- mbarriers ---- */

void end_phase(Mbarrier &b) {
    if (b.missing > 0 || b.bytes != 0) return;
    b.released = b.gathered;
    b.missing = b.arrivals;
    b.phase.generation++;
    b.clock++;
}

Mbarrier &barrier_at(const Region &region, const void *p) {
    check_access(region, p, 8, false); /* who made it ready comes before */
    const auto found = async.barriers.find((size_t)((const char *)p - memory));
    if (found == async.barriers.end()) fail("an mbarrier that was not made");
    return found->second;
}

/* ---- TMA ---- */

void check_tile(const TensorMap &map, const char *place, int which) {
    if ((place - memory) % TILE_ALIGNMENT) fail("a tile at byte %td: not on 1024 bytes", place - memory);
    if ((which < 0) != (map.count == 0)) fail("a tile of matrix %d, where there are %d", which, map.count);
}

void put_tile(const Load &l) {
    const TensorMap &map = l.tile.map;
    const size_t first = (size_t)(l.to - memory);
    for (int r = 0; r < map.box_rows; r++)
        for (int c = 0; c < map.box_cols; c++) {
            char *to = swizzled(first + 2 * (size_t)(r * map.box_cols + c), map.box_cols);
            const char *from = l.tile.at(r, c);
            if (from) memcpy(to, l.told ? as_told(from, 2) : from, 2);
            else memset(to, 0, 2);
        }
}

void land(const Load &l) {
    const size_t bytes = l.bytes();
    current = l.thread;
    if (block.parts[part_at(l.to)].left == block.size)
        fail("what was under way to block %d: it has returned", part_at(l.to));
    if (l.phase != l.b->phase.generation) fail("an mbarrier's phase ended before all bytes of its tiles had come");
    if (l.numbers.empty()) put_tile(l);
    else memcpy(l.to, l.numbers.data(), bytes);
    for (Units i(l.to, bytes, l.element); i.at < i.end; i.at += i.step) {
        Unit &u = units[i.at];
        u.loading = false, u.unfenced = 0;
        u.write = {l.b->agent, l.b->clock}, u.written = epoch;
        u.reads.clear();
    }
    l.b->gathered.resize((size_t)l.b->agent + 1 > l.b->gathered.size() ? (size_t)l.b->agent + 1 : l.b->gathered.size(),
                         0);
    l.b->gathered[(size_t)l.b->agent] = l.b->clock;
    l.b->bytes -= (long)bytes;
    end_phase(*l.b);
}

/* One of those under way; false: none was. */
bool land_one() {
    if (async.loads.empty() || failed) return false;
    const size_t i = draw((uint32_t)async.loads.size());
    const Load load = async.loads[i];
    async.loads.erase(async.loads.begin() + (long)i);
    if (!_setjmp(scheduler)) land(load);
    return true;
}

/* ---- tensor cores ---- */

/* Value k of row or column `mn` of an operand: its byte in shared memory, before the swizzle. */
size_t operand_at(uint64_t d, int mn, int k, bool by_k) {
    const size_t start = ((d & 0x3fff) << 4) + (size_t)(my_memory() - memory), leading = (d >> 16 & 0x3fff) << 4,
                 stride = (d >> 32 & 0x3fff) << 4;
    if (by_k)
        return start + (size_t)(mn / 64) * leading + (size_t)(k / 8) * stride + (size_t)(k % 8 * 128 + mn % 64 * 2);
    return start + (size_t)(mn / 8) * stride + (size_t)(mn % 8 * 128 + k * 2);
}

Region tiles_region() { return {my_memory(), block.dynamic, 2}; }

/* Calls f(first byte, bytes) for the lines of an operand: rows first .. first + count. */
template <class F>
void lines_of(uint64_t d, int first, int count, bool by_k, F f) {
    if (by_k) {
        for (int mn = first; mn < first + count; mn += 8)
            for (int k = 0; k < 16; k++) f(swizzled(operand_at(d, mn, k, true)), 16);
        return;
    }
    for (int mn = first; mn < first + count; mn++)
        for (int k = 0; k < 16; k += 8) f(swizzled(operand_at(d, mn, k, false)), 16);
}

template <class F>
void lines_of(const Multiply &m, F f) {
    if (!m.product.rows) lines_of(m.product.a, current / WARP % 4 * 16, 16, m.product.a_by_k, f);
    lines_of(m.product.b, 0, m.product.N, m.product.b_by_k, f);
}

void begin_product(const Multiply &m) {
    for (uint64_t d : {m.product.rows ? m.product.b : m.product.a, m.product.b})
        if (d >> 62 != 1 || (d >> 49 & 7)) fail("an operand's descriptor: not the swizzle of 128 bytes");
    Region region = tiles_region();
    region.element = block.element;
    lines_of(m, [&](const char *p, size_t bytes) {
        if (p + bytes > my_memory() + block.dynamic) fail("an operand ends behind the shared memory");
        begin_read(region, p, bytes, "wgmma");
    });
    for (SumsState *s : m.sums) s->under_way++;
}

/* Value k of row r of a warp's 16, which lanes hold as prim.cuh's left operand. */
float value_of_rows(const Multiply &m, int r, int k) {
    const uint32_t two = m.was[r % 8 * 4 + k % 8 / 2][r / 8 + k / 8 * 2];
    return float_of_bits(k % 2 ? two & 0xffff0000 : two << 16);
}

float value_at(size_t offset) {
    uint16_t bits;
    memcpy(&bits, swizzled(offset), 2);
    return float_of_bits((uint32_t)bits << 16);
}

/* One chain in order of k; the order on a GPU is its own. */
void finish_product(const Multiply &m) {
    const Product &p = m.product;
    const int N = p.N, first = current / WARP % 4 * 16;
    static float b[16][256], d[16][256];
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < N; n++) b[k][n] = value_at(operand_at(p.b, n, k, p.b_by_k));
    for (int r = 0; r < 16; r++) {
        for (int n = 0; n < N; n++)
            d[r][n] = p.add ? m.sums[r % 8 * 4 + n % 8 / 2]->x[n / 8 * 4 + r / 8 * 2 + n % 2] : 0.0f;
        for (int k = 0; k < 16; k++) {
            const float a = p.rows ? value_of_rows(m, r, k) : value_at(operand_at(p.a, first + r, k, p.a_by_k));
            for (int n = 0; n < N; n++) d[r][n] += a * b[k][n];
        }
        for (int n = 0; n < N; n++) m.sums[r % 8 * 4 + n % 8 / 2]->x[n / 8 * 4 + r / 8 * 2 + n % 2] = d[r][n];
    }
    Region region = tiles_region();
    region.element = block.element;
    lines_of(m, [&](const char *at, size_t bytes) { end_read(region, at, bytes); });
    for (SumsState *s : m.sums) s->under_way--;
    for (int i = 0; p.rows && i < WARP; i++)
        if (memcmp(m.rows[i], m.was[i], sizeof m.was[i])) fail("wgmma: its rows were changed before wgmma_wait");
}

}  // namespace

void barrier_init(const Region &region, void *p, int arrivals) {
    check_access(region, p, 8, true);
    const int agent = (int)(block.threads.size() + async.barriers.size());
    if ((int)async.barriers.size() >= AGENTS * block.blocks) fail("more than %d mbarriers", AGENTS);
    if (!async.barriers.insert({(size_t)((char *)p - memory), {{}, arrivals, arrivals, 0, false, agent, 1, {}, {}}})
             .second)
        fail("an mbarrier is made twice");
}

void barrier_init_fence() {
    for (auto &b : async.barriers)
        if (part_at(memory + b.first) == part_of_thread(current)) b.second.fenced = true;
    for (size_t i : async_me().unfenced)
        if (async.barriers.count(i)) units[i].unfenced = 0;
}

static void arrive_at(Mbarrier &b, int bytes) {
    Thread &me = block.threads[(size_t)current];
    if (b.missing == 0) fail("an mbarrier: more arrivals than the %d it was made for", b.arrivals);
    merge(b.gathered, me.seen);
    if (b.gathered.size() <= (size_t)current) b.gathered.resize((size_t)current + 1, 0);
    b.gathered[(size_t)current] = me.clock++;
    b.bytes += bytes;
    b.missing--;
    end_phase(b);
    if (seed && draw(4) == 0) suspend();
}

void barrier_arrive(const Region &region, void *p, int bytes) { arrive_at(barrier_at(region, p), bytes); }

void barrier_wait(const Region &region, void *p, uint32_t parity) {
    Mbarrier &b = barrier_at(region, p);
    b.phase.word = "an mbarrier";
    while (b.phase.generation % 2 == parity) wait(b.phase);
    merge(block.threads[(size_t)current].seen, b.released);
}

/* A place in a block of the cluster, where this block has `p`; the region is this block's too. */
static char *place_in(int part, const void *p) {
    return (char *)const_cast<void *>(p) + (memory_of(part) - my_memory());
}
static Region region_in(int part, const Region &r) { return {place_in(part, r.begin), r.bytes, r.element}; }

static void reach(int part) {
    if (part == part_of_thread(current)) return;
    if (!block.met) fail("another block's shared memory, before any cluster_sync");
    block.reached = true;
}

/* `load` to where this block has `to`, in block `part`, for the mbarrier that lies there as p does here. */
static void begin_load(int part, const Region &mine, const void *to, Load load, const Region &region, const void *p) {
    load.b = &barrier_at(region_in(part, region), place_in(part, p));
    if (!load.b->fenced) fail("an mbarrier that TMA does not see: no barrier_init_fence");
    load.to = place_in(part, to), load.element = mine.element;
    load.phase = load.b->phase.generation, load.thread = current;
    if (load.numbers.empty()) check_tile(load.tile.map, load.to, load.tile.which);
    const size_t bytes = load.bytes();
    check_access(region_in(part, mine), load.to, bytes, true); /* who read what it will write over is done */
    for (Units i(load.to, bytes, mine.element); i.at < i.end; i.at += i.step) units[i.at].loading = true;
    if (seed) async.loads.push_back(load);
    else land(load);
}

static void load_to(int part, const Region &mine, const void *to, const Tile &tile, bool told, const Region &region,
                    const void *p) {
    reach(part);
    if (block.early && !told && !block.threads[(size_t)current].waited) fail("a tile's load before wait_earlier");
    begin_load(part, mine, to, {tile, told, {}, 0, nullptr, nullptr, 0, 0}, region, p);
}

void tile_load(const Region &to_region, void *to, const TensorMap &map, const Region &region, void *p, int row,
               int column, int which, bool told) {
    load_to(part_of_thread(current), to_region, to, {map, row, column, which}, told, region, p);
}

/* Who receives numbers waits for them, so nobody else has to wait until they have come. */
void store_async(const Region &to_region, const void *to, const float *x, int count, const Region &region,
                 const void *p, int part) {
    if (part < 0 || part >= block.blocks) fail("numbers for block %d, where the cluster has %d", part, block.blocks);
    if (!block.met) fail("another block's shared memory, before any cluster_sync");
    const char *bytes = (const char *)x;
    begin_load(part, to_region, to, {{}, false, {bytes, bytes + count * sizeof *x}, 0, nullptr, nullptr, 0, 0}, region,
               p);
}

void tile_load_all(const Region &to_region, void *to, const TensorMap &map, const Region &region, void *p, int row,
                   int column) {
    if (block.blocks != 2) fail("a tile for both blocks of a cluster of %d", block.blocks);
    for (int part = 0; part < block.blocks; part++)
        load_to(part, to_region, to, {map, row, column, -1}, false, region, p);
}

int cluster_rank() { return part_of_thread(current); }

void cluster_sync() {
    if (block.left) fail("cluster_sync, where %d threads of the cluster have returned", block.left);
    if (!arrive(block.cluster, (int)block.threads.size(), "cluster_sync", nullptr, 0)) return wait(block.cluster);
    epoch++;
    block.met = true, block.reached = false;
    release(block.cluster);
}

void barrier_arrive_at(const Region &region, void *p, int part) {
    if (part < 0 || part >= block.blocks) fail("an mbarrier of block %d, where the cluster has %d", part, block.blocks);
    reach(part);
    arrive_at(barrier_at(region_in(part, region), place_in(part, p)), 0);
}

void tile_store(const TensorMap &map, const Region &from_region, const void *from, int row, int column, int which) {
    check_tile(map, (const char *)from, which);
    if (block.early && !block.threads[(size_t)current].waited) fail("a tile's store before wait_earlier");
    begin_read(from_region, from, bytes_of_box(map), "a tile's store");
    async_me().stores.back().push_back({{map, row, column, which}, from_region, (const char *)from});
}

void tile_store_commit() { async_me().stores.emplace_back(); }

void tile_store_wait_read(int groups) {
    AsyncThread &me = async_me();
    while ((int)me.stores.size() - 1 > groups) {
        for (const Store &s : me.stores.front()) {
            const size_t bytes = bytes_of_box(s.tile.map);
            Written w = {s.tile, std::vector<char>(bytes)};
            for (size_t i = 0; i < bytes; i += 2)
                memcpy(&w.bytes[i], swizzled((size_t)(s.from - memory) + i, s.tile.map.box_cols), 2);
            end_read(s.region, s.from, bytes);
            if (seed) me.written.push_back(std::move(w));
            else put(w);
        }
        me.stores.erase(me.stores.begin());
    }
}

void fence_async() {
    for (size_t i : async_me().unfenced)
        if (units[i].unfenced == current + 1) units[i].unfenced = 0;
    async_me().unfenced.clear();
}

void set_registers(int count, bool more) {
    AsyncWarp &warp = async_warp();
    if (count != warp.registers && (count > warp.registers) != more)
        fail("setmaxnreg: %d registers, where there are %d", count, warp.registers);
    if (current % WARP < WARP - 1) return; /* the last lane speaks for its warp */
    warp.registers = count;
}

SumsState::SumsState(float *x_, int n) : x(x_), touched_after(async_me().fences) {
    std::fill(x, x + n, float_of_bits(0x7fffffff));
}

void SumsState::touch() {
    if (under_way) fail("sums are touched before wgmma_wait");
    touched_after = async_me().fences;
}

uint64_t operand(const void *p, int leading, int stride) {
    return (uint64_t)((const char *)p - my_memory()) >> 4 | (uint64_t)(leading >> 4) << 16 |
           (uint64_t)(stride >> 4) << 32 | (uint64_t)1 << 62;
}

void wgmma(const Product &product, SumsState &sums) {
    if (!sums.under_way && sums.touched_after == async_me().fences)
        fail("wgmma: no wgmma_fence since the sums were touched");
    Multiply &next = async_warp().next;
    Barrier &b = my_warp().barrier;
    if (b.waiting.empty()) next.product = product;
    const Product &first = next.product;
    if (first.a != product.a || first.b != product.b || first.N != product.N || first.add != product.add)
        fail("wgmma: lanes of a warp bring different operands");
    next.sums[current % WARP] = &sums;
    if (product.rows) {
        next.rows[current % WARP] = product.rows;
        memcpy(next.was[current % WARP], product.rows, sizeof next.was[0]);
    }
    if (!arrive(b, WARP, "wgmma", nullptr, 0)) return wait(b);
    begin_product(next);
    async_warp().groups.back().push_back(next);
    release(b);
}

void wgmma_fence() { async_me().fences++; }

/* The first lane that comes speaks for its warp. */
void wgmma_commit() {
    if (++async_me().commits > async_warp().commits) async_warp().commits++, async_warp().groups.emplace_back();
}

void wgmma_wait(int groups) {
    Barrier &b = my_warp().barrier;
    if (!arrive(b, WARP, "wgmma_wait", nullptr, groups)) return wait(b);
    auto &under_way = async_warp().groups;
    while ((int)under_way.size() - 1 > groups) {
        for (const Multiply &m : under_way.front()) finish_product(m);
        under_way.erase(under_way.begin());
    }
    join(b.waiting);
    release(b);
}

namespace {
void check_end() {
    for (int part = 0, warps = block.size / WARP; part < block.blocks; part++) {
        int registers = 0;
        for (int w = part * warps; w < (part + 1) * warps; w++) registers += async.warps[(size_t)w].registers * WARP;
        if (registers > REGISTERS) fail("setmaxnreg: %d registers, where there are %d", registers, REGISTERS);
    }
    if (!async.loads.empty()) fail("returns with a load under way");
}

/* Of a block whose threads have all returned. */
void end_async() {
    for (const AsyncThread &t : async.threads)
        for (size_t i : t.unfenced) units[i].unfenced = 0;
    if (!_setjmp(scheduler)) check_end();
}

/* What a thread that cannot go on waits for. */
void describe_wait(const Thread &t, char *to, size_t room) {
    for (const auto &b : async.barriers)
        if (t.waits == &b.second.phase) {
            snprintf(to, room, " (byte %zu, phase %u: %d arrivals and %ld bytes are missing)", b.first,
                     b.second.phase.generation, b.second.missing, b.second.bytes);
            return;
        }
}
}  // namespace

static void unfenced_write(size_t at) {
    units[at].unfenced = current + 1;
    async_me().unfenced.push_back(at);
}

}  // namespace emulate
