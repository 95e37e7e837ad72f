/* sm90.h -- the words of prim_sm90.cuh for g++, of which async.h has the bodies.
 *
 * TMA copies, products and stores land as late as what waits for them allows, in an order that the schedule draws.
 * What is read too early or written over too early, and sums that are touched before their product is done, are errors
 * whatever the schedule. */
#pragma once

namespace emulate {

/* A Sums<N>, whatever its N. */
struct SumsState {
    float *x;
    int under_way = 0;          /* products that are to add to it */
    unsigned touched_after = 0; /* so many fences of its thread */
    SumsState(float *x_, int n);
    void touch();
};

/* One product, as every lane of four warps brings it. */
struct Product {
    uint64_t a, b;
    int N;
    bool a_by_k, b_by_k, add;
    const uint32_t *rows; /* of this lane, in the place of a; NULL: there are none */
};

void barrier_init(const Region &region, void *b, int arrivals);
void barrier_init_fence();
void barrier_arrive(const Region &region, void *b, int bytes);
void barrier_wait(const Region &region, void *b, uint32_t parity);
void tile_load(const Region &to_region, void *to, const TensorMap &map, const Region &region, void *b, int row,
               int column, int which, bool told);
void store_async(const Region &to_region, const void *to, const float *x, int count, const Region &region,
                 const void *b, int part);
void tile_load_all(const Region &to_region, void *to, const TensorMap &map, const Region &region, void *b, int row,
                   int column);
int cluster_rank();
void cluster_sync();
void barrier_arrive_at(const Region &region, void *b, int part);
void tile_store(const TensorMap &map, const Region &from_region, const void *from, int row, int column, int which);
void tile_store_commit();
void tile_store_wait_read(int groups);
void fence_async();
void set_registers(int count, bool more);
uint64_t operand(const void *p, int leading, int stride);
void wgmma(const Product &product, SumsState &sums);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups);

}  // namespace emulate

#define SHARED_TILES(T, name) SHARED_DYNAMIC(T, name)

inline void barrier_init(Shared<uint64_t> b, int arrivals) { emulate::barrier_init(b.region, b.at(0, 8), arrivals); }
inline void barrier_init_fence() { emulate::barrier_init_fence(); }
inline void barrier_arrive(Shared<uint64_t> b) { emulate::barrier_arrive(b.region, b.at(0, 8), 0); }
inline void barrier_expect(Shared<uint64_t> b, int bytes) { emulate::barrier_arrive(b.region, b.at(0, 8), bytes); }
inline void barrier_wait(Shared<uint64_t> b, uint32_t parity) { emulate::barrier_wait(b.region, b.at(0, 8), parity); }

inline size_t bytes_of_box(const TensorMap &map) { return (size_t)map.box_rows * (size_t)map.box_cols * sizeof(bf16); }
inline void tile_load(Shared<bf16> to, const TensorMap &map, Shared<uint64_t> b, int row, int column, int which = -1,
                      bool told = false) {
    void *first = to.at(0, 16);
    to.at((int64_t)bytes_of_box(map) / 2 - 8, 16);
    emulate::tile_load(to.region, first, map, b.region, b.at(0, 8), row, column, which, told);
}
inline void tile_load_told(Shared<bf16> to, const TensorMap &map, Shared<uint64_t> b, int row, int column) {
    tile_load(to, map, b, row, column, -1, true);
}
inline void tile_load_all(Shared<bf16> to, const TensorMap &map, Shared<uint64_t> b, int row, int column) {
    void *first = to.at(0, 16);
    to.at((int64_t)bytes_of_box(map) / 2 - 8, 16);
    emulate::tile_load_all(to.region, first, map, b.region, b.at(0, 8), row, column);
}
inline int cluster_rank() { return emulate::cluster_rank(); }
inline void cluster_sync() { emulate::cluster_sync(); }
inline void barrier_arrive_at(Shared<uint64_t> b, int rank) { emulate::barrier_arrive_at(b.region, b.at(0, 8), rank); }
inline void store_async(Shared<float> to, float x, Shared<uint64_t> b, int rank) {
    emulate::store_async(to.region, to.at(0, 4), &x, 1, b.region, b.at(0, 8), rank);
}
inline void store_async(Shared<float> to, float x, float y, Shared<uint64_t> b, int rank) {
    const float two[2] = {x, y};
    emulate::store_async(to.region, to.at(0, 8), two, 2, b.region, b.at(0, 8), rank);
}
inline void tile_store(const TensorMap &map, Shared<bf16> from, int row, int column, int which = -1) {
    const void *first = from.at(0, 16);
    from.at((int64_t)bytes_of_box(map) / 2 - 8, 16);
    emulate::tile_store(map, from.region, first, row, column, which);
}
inline void tile_store_commit() { emulate::tile_store_commit(); }
template <int groups>
void tile_store_wait_read() {
    emulate::tile_store_wait_read(groups);
}
inline void fence_async() { emulate::fence_async(); }

inline bool elected() {
    const char nothing = 0;
    emulate::exchange("elect", &nothing, 1);
    return lane_index() == 0;
}
template <int count>
void registers_give() {
    static_assert(count >= 24 && count <= 256 && count % 8 == 0, "24, 32 .. 256");
    emulate::set_registers(count, false);
}
template <int count>
void registers_take() {
    static_assert(count >= 24 && count <= 256 && count % 8 == 0, "24, 32 .. 256");
    emulate::set_registers(count, true);
}

inline int from_here(int x) { return x; }

inline void store_matrices(Shared<bf16> row, const uint32_t (&m)[4]) {
    bf16 *mine = row.at(0, 16);
    const char *all = emulate::exchange("stmatrix", m, sizeof m);
    emulate::check_access(row.region, mine, 16, true);
    for (int q = 0; q < 4; q++)
        memcpy((char *)mine + 4 * q, all + (4 * (lane_index() % 8) + q) * emulate::LANE_BYTES + lane_index() / 8 * 4,
               4);
}

template <int N>
struct Sums {
    float x[N / 2];
    emulate::SumsState state{x, N / 2};
    float &operator[](int i) {
        state.touch();
        return x[i];
    }
};

inline uint64_t operand(Shared<bf16> p, int leading, int stride) {
    return emulate::operand(p.at(0, 16), leading, stride);
}
inline void wgmma_fence() { emulate::wgmma_fence(); }
inline void wgmma_commit() { emulate::wgmma_commit(); }
template <int groups>
void wgmma_wait() {
    emulate::wgmma_wait(groups);
}
template <bool a_by_k, bool b_by_k, bool add, int N>
void wgmma(Sums<N> &d, uint64_t a, uint64_t b) {
    static_assert(N % 8 == 0 && N <= 256, "8, 16 .. 256");
    emulate::wgmma({a, b, N, a_by_k, b_by_k, add, nullptr}, d.state);
}
template <bool b_by_k, bool add>
void wgmma_rows(Sums<64> &d, const uint32_t (&a)[4], uint64_t b) {
    emulate::wgmma({0, b, 64, false, b_by_k, add, a}, d.state);
}
