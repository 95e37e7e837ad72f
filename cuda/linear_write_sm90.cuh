/* linear_write_sm90.cuh -- how a tile's sums leave a block of linear_sm90.cu.
 *
 * Activations go by TMA, in boxes of 64 by 64 values, or by 32 where the tile is no multiple of 64, and so does one
 * thing that they are made of besides the sums: it lies where they will be, so that each thread reads a pair of values
 * and writes another in its place.  Without it a consumer uses its boxes in turns.  Where rows do not lie on 16 bytes,
 * and for what else is read, threads go to memory themselves, pair by pair. */
#pragma once

namespace {

/* What comes by TMA. */
enum Comes { NOTHING, ADD, GIVEN };

struct Boxes {
    TensorMap out, pre, in;
    int come; /* of Comes */
    bool go;  /* out and pre, by TMA */
};

template <class S>
__device__ void sync_consumer(int consumer) {
    if (consumer == 0) sync_group<1>(WARPGROUP);
    else sync_group<2>(WARPGROUP);
}

/* What a thread has of a box that begins at (m0, n0) of (M, N), as its sums have it: pair i stands in row
 * row + i % 2 * 8, column column + i / 2 * 8. */
template <class S>
struct Spot {
    static constexpr int PAIRS = S::BOX / 2 / WARPGROUP; /* of neighbours in a row, of each thread */
    int m0, n0, M, N, row, column;
    __device__ Spot(int m0_, int n0_, int M_, int N_) : m0(m0_), n0(n0_), M(M_), N(N_) {
        const int t = from_here((int)threadIdx.x);
        row = t % WARPGROUP / WARP * 16 + t % WARP / 4, column = t % 4 * 2;
    }
    __device__ int m(int i) const { return m0 + row + i % 2 * 8; }
    __device__ int n(int i) const { return n0 + column + i / 2 * 8; }
    __device__ bool has(int i, int e) const { return m(i) < M && n(i) + e < N; }
    __device__ int64_t at(int i, int e) const { return (int64_t)m(i) * N + n(i) + e; }
    __device__ Shared<uint32_t> pair(Shared<bf16> box, int i) const {
        return shared_cast<uint32_t>(box + (tile_place<S::BOX_WIDTH>(row + i % 2 * 8, i / 2 * 8) + column));
    }
};

template <class S, Product = S::product>
struct Writer {
    static constexpr int PAIRS = Spot<S>::PAIRS;
    const Places<S> &places;
    const Output &o;
    const Boxes &boxes;
    const Work &work;

    __device__ Writer(const Places<S> &places_, const Output &o_, const Boxes &boxes_, const Work &work_)
        : places(places_), o(o_), boxes(boxes_), work(work_) {}

    __device__ static int consumer() { return from_here((int)threadIdx.x) / WARPGROUP - 1; } /* registers are few */

    __device__ static bool first() { return threadIdx.x % WARPGROUP == 0; }
    __device__ Shared<bf16> box(int i) const { return places.room(consumer(), i % S::BOXES); }

    /* Pair i of `from`, or of the box where that came by TMA. */
    __device__ void read(float (&x)[2], const act *from, int comes, Shared<bf16> box, const Spot<S> &spot,
                         int i) const {
        if (boxes.come == comes) {
            const uint32_t two = spot.pair(box, i)[0];
            x[0] = float_of_bits(two << 16), x[1] = float_of_bits(two & 0xffff0000u);
            return;
        }
        for (int e = 0; e < 2; e++) x[e] = spot.has(i, e) ? to_float(from[spot.at(i, e)]) : 0.0f;
    }

    /* Into the box; where boxes do not leave, to memory. */
    __device__ void put(act *to, Shared<bf16> box, const float (&x)[2 * PAIRS], const Spot<S> &spot) const {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            if (boxes.go) spot.pair(box, i)[0] = pack_bf16(x[2 * i], x[2 * i + 1]);
            else
                for (int e = 0; e < 2; e++)
                    if (spot.has(i, e)) from_float(to[spot.at(i, e)], x[2 * i + e]);
        }
    }

    __device__ void add_bias(float (&x)[2 * PAIRS], const Spot<S> &spot) const {
#pragma unroll
        for (int i = 0; i < 2 * PAIRS; i += 4) { /* two pairs of the same columns */
            const int n = spot.n(i / 2);
            const float one = n < spot.N ? o.bias[n] : 0.0f, other = n + 1 < spot.N ? o.bias[n + 1] : 0.0f;
            x[i] += one, x[i + 1] += other, x[i + 2] += one, x[i + 3] += other;
        }
    }

    __device__ void scale_by_slope(float (&x)[2 * PAIRS], Shared<bf16> box, const Spot<S> &spot) const {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            float two[2];
            read(two, o.given, GIVEN, box, spot, i);
            x[2 * i] *= gelu_slope(o.fn, two[0]), x[2 * i + 1] *= gelu_slope(o.fn, two[1]);
        }
    }

    __device__ void add(float (&x)[2 * PAIRS], Shared<bf16> box, const Spot<S> &spot) const {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            float two[2];
            read(two, o.add, ADD, box, spot, i);
            x[2 * i] += two[0], x[2 * i + 1] += two[1];
        }
    }

    /* Of sums the same as `write` of linear.cuh. */
    __device__ void put_finished(float (&x)[2 * PAIRS], Shared<bf16> pre, Shared<bf16> out, const Spot<S> &spot) const {
        if (S::product == FORWARD) {
            if (o.bias) add_bias(x, spot);
            if (o.pre) put(o.pre, pre, x, spot);
#pragma unroll
            for (int i = 0; i < 2 * PAIRS; i++) x[i] = gelu(o.fn, x[i]);
        } else if (o.fn != FN_NONE) {
            scale_by_slope(x, out, spot);
        }
        if (o.add) add(x, out, spot);
        put(o.out, out, x, spot);
    }

    /* Until box b can be written: what comes has come; what left from there before, has been read. */
    __device__ void wait_for_box(int tile, int b, bool two) const {
        if (boxes.come != NOTHING) {
            if (b == 0) barrier_wait(places.room_full(consumer()), (uint32_t)tile & 1);
            return;
        }
        if (!boxes.go || (b > 0 && !two)) return;
        if (b > 0 && first()) tile_store_wait_read<0>();
        sync_consumer<S>(consumer()); /* for b = 0 hand_back has waited */
    }

    /* Box b, at_least or more, of the consumer's part of the block's tile of that number, from (m0, n0) on. */
    template <int at_least>
    __device__ void write_box(const Total<S> &total, int m0, int n0, int tile, int b) const {
        const bool two = S::product == FORWARD && o.pre; /* boxes leave, from places that are used again */
        wait_for_box(tile, b, two);
        const Spot<S> spot(m0 + b / S::ROW_BOXES * SLICE, n0 + b % S::ROW_BOXES * S::BOX_WIDTH, work.M, work.N);
        if (spot.m0 >= work.M || spot.n0 >= work.N) return;
        const Shared<bf16> out = box(two ? 2 * b : b), pre = box(2 * b + 1);
        float x[2 * PAIRS];
#pragma unroll
        for (int j = at_least; j < S::BOXES; j++) {
            if (j != b) continue; /* registers have no index */
#pragma unroll
            for (int k = 0; k < 2 * PAIRS; k++) x[k] = total.read(j * 2 * PAIRS + k);
        }
        put_finished(x, pre, out, spot);
        if (!boxes.go) return;
        fence_async();
        sync_consumer<S>(consumer());
        if (!first()) return;
        tile_store(boxes.out, out, spot.m0, spot.n0);
        if (two) tile_store(boxes.pre, pre, spot.m0, spot.n0);
        tile_store_commit();
    }

    /* The first boxes. */
    __device__ void write(const Total<S> &total, int m0, int n0, int tile, int count) const {
#pragma unroll 1 /* the code is there once */
        for (int b = 0; b < count; b++) write_box<0>(total, m0, n0, tile, b);
    }

    /* When all of a tile has left its room is free.  Each warp says so for itself: one that has not yet looked for what
     * came must not find the next. */
    __device__ void hand_back() const {
        if (!boxes.go) return;
        if (first()) tile_store_wait_read<0>();
        if (boxes.come != NOTHING && lane_index() == 0) barrier_arrive(places.room_empty(consumer()));
    }

    __device__ void finish() const {
        if (first()) tile_store_wait_read<0>();
    }
};

/* Gradients of weights: floats, through shared memory so that a row is written by neighbours. */
template <class S>
struct Writer<S, WEIGHT> {
    const Places<S> &places;
    const Output &o;
    const Work &work;
    const int consumer;

    __device__ Writer(const Places<S> &places_, const Output &o_, const Work &work_, int consumer_)
        : places(places_), o(o_), work(work_), consumer(consumer_) {}

    /* Where value (r, c) of a chunk lies: groups of 4 change places by row, so that lanes of a row or column of an
     * mma's result meet different banks; 8 values from a multiple of 8 on stay together. */
    __device__ static int staged(int r, int c) { return r * STRIP + ((c / 4 ^ r % 4 * 2) * 4) + c % 4; }

    __device__ void write(const Total<S> &total, const Item &it, int m0) const {
        Output mine = o;
        mine.grad += (int64_t)it.part * work.M * work.N;
        for (int i = 0; i < S::SLICES; i++) write_slice(mine, total, i, m0 + i * SLICE, it.n0);
    }

    /* A slice of 64 rows, from m0. */
    __device__ void write_slice(const Output &mine, const Total<S> &total, int slice, int m0, int n0) const {
        const Shared<float> staging = shared_cast<float>(places.room(consumer, 0));
        const int t = (int)threadIdx.x % WARPGROUP, row = t / WARP * 16 + lane_index() / 4;
        const int column = lane_index() % 4 * 2;
#pragma unroll 1
        for (int chunk = 0; chunk < S::BN / STRIP; chunk++) {
            if (n0 + chunk * STRIP >= work.N || m0 >= work.M) return;
            sync_consumer<S>(consumer); /* the chunk before has been read */
#pragma unroll
            for (int c = 0; c < S::BN / STRIP; c++) {
                if (c != chunk) continue;
#pragma unroll
                for (int i = 0; i < STRIP / 2; i++)
                    staging[staged(row + i % 4 / 2 * 8, i / 4 * 8 + column + i % 2)] =
                        total.read(slice * S::BN / 2 + c * (STRIP / 2) + i);
            }
            sync_consumer<S>(consumer);
            write_chunk(mine, staging, m0, n0 + chunk * STRIP);
        }
    }

    __device__ void write_chunk(const Output &mine, Shared<float> staging, int m0, int n0) const {
#pragma unroll 1
        for (int i = (int)threadIdx.x % WARPGROUP; i < STAGING / VEC; i += WARPGROUP) {
            const int r = i / (STRIP / VEC), c = i % (STRIP / VEC) * VEC, n = n0 + c;
            if (m0 + r >= work.M || n >= work.N) continue;
            float x[VEC];
#pragma unroll
            for (int j = 0; j < VEC; j += 4) {
                const uint4 four = shared_cast<uint4>(staging + (staged(r, c) + j))[0];
                x[j] = float_of_bits(four.x), x[j + 1] = float_of_bits(four.y);
                x[j + 2] = float_of_bits(four.z), x[j + 3] = float_of_bits(four.w);
            }
            ::write<WEIGHT>(mine, x, m0 + r, n, work.N, work.N - n);
        }
    }

    /* What the tile will be added to, into the L2, half a row a thread: when the sums are there, nobody multiplies
     * until they are written. */
    __device__ void prefetch(const Item &it, int m0) const {
        const int t = from_here((int)threadIdx.x) % WARPGROUP, m = m0 + t / 2, n = it.n0 + t % 2 * (S::BN / 2);
        static_assert((int)S::SLICES * SLICE * 2 == (int)WARPGROUP, "a thread for each half of a row");
        if (!work.adds || m >= work.M || n >= work.N) return;
        const int columns = work.N - n < S::BN / 2 ? work.N - n : S::BN / 2;
        prefetch_l2(o.grad + (int64_t)m * work.N + n, (size_t)columns * sizeof(float));
    }
};

}  // namespace
