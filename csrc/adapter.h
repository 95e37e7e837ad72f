/* adapter.h -- LoRA (Hu et al. 2021, arXiv:2106.09685) on the linear layers of a model whose own weights stay as they
 * are: which layers have one, where its A's and B's lie, and what they add to a product, forward and backward.
 *
 * A linear layer of ours may be several modules of Hugging Face's (queries, keys and values); each that is adapted has
 * an A (r, C) and a B (rows, r) of its own.  Their A's lie one below the other, so that one product serves all:
 *
 *   low = in @ A^T  (N, J r)        out += low @ dense^T        dense: the B's times scale, zeros between (lora_spread)
 */
#pragma once
#include "layout.h"

/* The linear layers of a block, which follow each other in model.def, and of each an A and a B. */
enum { LINEARS = P_fc2_w - P_qkv_w + 1, ADAPTER_A = 0, ADAPTER_B = 1 };
enum { MOST_GROUPS = 3 };

struct Adapter {
    int rank;
    float scale;
    int J[LINEARS]; /* groups of a linear layer; 0: it is not adapted */
    int32_t rows[LINEARS][MOST_GROUPS][2];
    int module[LINEARS][MOST_GROUPS]; /* of model_modules */
    Layout layout;                    /* p[2 i + ADAPTER_A], p[2 i + ADAPTER_B] of linear layer i */
};

/* `chosen`: of each module of model_modules whether it is adapted. */
Adapter adapter_of(const Config *c, int rank, float scale, const char *chosen);
/* As model_tensors, in order of memory: layer by layer, module by module, A then B. */
int adapter_tensors(const Config *c, const Adapter *a, Tensor *out);

/* J r of linear layer i (P_qkv_w ... P_fc2_w), and of all layers of a block together; the most that one has */
int adapter_width(const Adapter *a, int i);
int adapter_total(const Adapter *a);
int adapter_most(const Adapter *a);
/* Where `low` of linear layer i begins, in rows of adapter_total values cut by layer: N * this values. */
int adapter_before(const Adapter *a, int i);
/* floats of the largest dense B, of rows (OC) as in the base model */
int64_t adapter_dense(const Adapter *a, const Layout *base);
