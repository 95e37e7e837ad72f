/* linear.cuh -- what the products of a linear layer share: what becomes of their sums; and the seam to Hopper's. */
#pragma once
#include "gelu.cuh"

namespace {

enum Product { FORWARD, INPUT, WEIGHT };

enum { CHUNK = 8 }; /* values of 16 bytes in bf16 */

/* A matrix (rows, cols) in memory; row r begins at p + r * ld.  Of whole chunks: p lies on 16 bytes, and ld is a
 * multiple of CHUNK; between cols and ld are zeros. */
template <class T>
struct Matrix {
    const T *p;
    int rows, cols;
    int64_t ld;
};

/* What becomes of the sums x (M, N), by product:
 *   FORWARD  x += bias; pre = x; out = fn(x) + add        INPUT  out = add + x * fn'(given)        WEIGHT  grad =, += x
 * dbias (M) of WEIGHT is Hopper's alone: += the sums over k of the left operand, or NULL. */
struct Output {
    act *out, *pre;
    const act *add, *given;
    const float *bias;
    float *grad, *dbias;
    int fn, accumulate;
};

/* What memory has for the sums (m, n ..) to meet; it may be asked for before they are made. */
template <Product product>
struct Beside {
    Pack<float, VEC> bias = {}, old = {};
    Pack<act, VEC> add = {}, given = {};

    __device__ Beside() {}
    __device__ Beside(const Output &o, int m, int n, int N, int count) {
        const int64_t at = (int64_t)m * N + n;
        if (product == WEIGHT) {
            if (o.accumulate) old = load<VEC>(o.grad + at, count);
            return;
        }
        if (product == FORWARD && o.bias) bias = load<VEC>(o.bias + n, count);
        if (product == INPUT && o.fn != FN_NONE) given = load<VEC>(o.given + at, count);
        if (o.add) add = load<VEC>(o.add + at, count);
    }
};

template <Product product>
__device__ void write(const Output &o, float (&x)[VEC], const Beside<product> &beside, int m, int n, int N, int count) {
    const int64_t at = (int64_t)m * N + n;
    if (product == WEIGHT) {
#pragma unroll
        for (int i = 0; i < VEC; i++) x[i] = o.accumulate ? beside.old[i] + x[i] : x[i];
        store(o.grad + at, x, count);
        return;
    }
    if (product == FORWARD) {
#pragma unroll
        for (int i = 0; i < VEC; i++) x[i] = o.bias ? x[i] + beside.bias[i] : x[i];
        if (o.pre) store(o.pre + at, x, count);
#pragma unroll
        for (int i = 0; i < VEC; i++) x[i] = gelu(o.fn, x[i]);
    } else if (o.fn != FN_NONE) {
#pragma unroll
        for (int i = 0; i < VEC; i++) x[i] *= gelu_slope(o.fn, beside.given[i]);
    }
#pragma unroll
    for (int i = 0; i < VEC; i++) x[i] = o.add ? x[i] + beside.add[i] : x[i];
    store(o.out + at, x, count);
}
template <Product product>
__device__ void write(const Output &o, float (&x)[VEC], int m, int n, int N, int count) {
    write(o, x, Beside<product>(o, m, n, N, count), m, n, N, count);
}

/* A sum that gives each addition's error to the next (Kahan 1965, doi:10.1145/363707.363723): off by two units in the
 * last place of the sum of magnitudes, for any number of terms. */
struct Kahan {
    float sum, excess;
    __device__ void add(float x) {
        const float term = x - excess, next = sum + term;
        excess = (next - sum) - term;
        sum = next;
    }
    __device__ float value() const { return sum - excess; }
};

}  // namespace

/* ---- the seam to linear_sm90.cu, which may not be there: then these are NULL ---- */

/* A product of operands that TMA can copy: rows on 16 bytes.  M, N and K are not 0. */
struct ProductSm90 {
    int product;
    const bf16 *a, *b;
    int a_rows, a_cols, b_rows, b_cols;
    int64_t a_ld, b_ld;
    void *out, *pre; /* of act, as in Output */
    const void *add, *given;
    const float *bias;
    float *grad, *dbias;
    int fn, accumulate;
    float *parts; /* so much working memory as linear_sm90_room says */
    int M, N, K;
    const char *op;
};
extern "C" {
__attribute__((weak)) size_t OPERATOR(linear_sm90_room)(int product, int M, int N, int K);
__attribute__((weak)) void OPERATOR(linear_sm90)(const ProductSm90 &p);
}
