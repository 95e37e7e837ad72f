"""Plant faults in the library, one at a time, and see whether the tests notice: `python tests/faults.py [words]`.

Each fault is a change of one place, of a kind that is easily made.  The tree is copied, the change applied,
built, and the quick tests run until one fails.  A fault that no test catches is a hole in the tests, and makes the
exit code 1.  `words` choose the faults whose description holds one of them.

Those of cuda/ need no more than a compiler, so tests/test_cuda*.py plant each of them in every run.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ("csrc", "cuda", "python", "tests", "CMakeLists.txt", "pyproject.toml")
INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2")
ALL = tuple(
    f"tests/test_{name}.py"
    for name in (
        "ops",
        "model",
        "threads",
        "checkpoint",
        "input",
        "documents",
        "shards",
        "bpe",
        "guard",
        "train",
        "trust",
        "ngram",
        "loop",
        "draws",
        "session",
        "packed",
        "session_load",
        "engine",
        "folders",
        "sentencepiece",
        "formats",
        "fuzz_readers",
        "import_export",
        "held",
        "lora",
        "init",
        "cuda",
        "emulate",
        "cuda_attention",
        "cuda_model",
        "emulate_sm90",
        "cuda_sm90",
        "cuda_attention_sm90",
    )
)
(OPS, MODEL, THREADS, CHECKPOINT, INPUT, DOCUMENTS, SHARDS, BPE, GUARD) = ALL[:9]
(TRAIN, TRUST, NGRAM, LOOP, DRAWS, SESSION, PACKED, LOAD, ENGINE) = ALL[9:18]
(FOLDERS, PIECES, FORMATS, FUZZ, IMPORT, HELD, LORA, INIT, CUDA, EMULATE, CUDA_ATTENTION, DEVICE) = ALL[18:30]
(EMULATE_SM90, SM90, ATTENTION_SM90) = ALL[30:]


@dataclass
class Fault:
    what: str
    file: str
    old: str  # must be there exactly once
    new: str
    first: str = OPS  # the tests that run first
    isa: str = "avx2"  # the instruction set that is built, beside the plain backend


FAULTS = [
    Fault(
        "tail mask one lane too wide",
        "csrc/simd.h",
        "_mm256_cmpgt_epi32(_mm256_set1_epi32(k),",
        "_mm256_cmpgt_epi32(_mm256_set1_epi32(k + 1),",
    ),
    Fault(
        "tail mask one lane too wide (512 bits)",
        "csrc/simd.h",
        "{ return (__mmask16)((1u << k) - 1); }",
        "{ return (__mmask16)((2u << k) - 1); }",
        isa="avx512_bf16",
    ),
    Fault(
        "norm: lanes behind the end take part in the variance",
        "csrc/norm.c",
        "vf d = vfirst(vload(x + c, k) - m, vset(0.0f), k);",
        "vf d = vload(x + c, k) - m;",
    ),
    Fault(
        "norm: partial sums follow the number of threads",
        "csrc/norm.c",
        "int rows = (int)(((int64_t)b->N + MAX_CHUNKS - 1) / MAX_CHUNKS);",
        "int rows = (int)(((int64_t)b->N + threads_get() - 1) / threads_get());",
    ),
    Fault(
        "norm: epsilon outside the root",
        "csrc/norm.c",
        "1.0f / sqrtf(row_sum(x, mean, C, 1) / (float)C + f->eps)",
        "1.0f / (sqrtf(row_sum(x, mean, C, 1) / (float)C) + f->eps)",
    ),
    Fault("norm: residual gradient dropped", "csrc/norm.c", "if (dres) din = din + vload(dres + c, k);", ""),
    Fault("linear: bias of the wrong column", "csrc/linear.h", "at + j, j0 + j, W);", "at + j, j, W);"),
    Fault("linear: = instead of +=", "csrc/linear.h", "if (e->accumulate) x = vload(e->c + at, k) + x;", ""),
    Fault(
        "linear: K blocks of 512 fp32",
        "csrc/linear.c",
        "return units * (g->prec == PREC_BF16 ? 2 : 1);",
        "return units * 2;",
    ),
    Fault(
        "linear: first K block not started from zero",
        "csrc/linear.c",
        "if (n < 2 && (last || !n)) {",
        "if (n < 2 && last) {",
    ),
    Fault(
        "linear: a piece of K starts its sums anew",
        "csrc/linear.c",
        "n = k / values_a_block(g);\n    if (packs_a",
        "n = (k - w->k0) / values_a_block(g);\n    if (packs_a",
    ),
    Fault(
        "linear: all columns wait in one place",
        "csrc/linear.c",
        "(whole ? 0 : (int64_t)(j - j0) / NR * rows * NR)",
        "0 * whole",
    ),
    Fault(
        "linear: pieces of A lie where the first does",
        "csrc/linear.c",
        "(int64_t)(k - w->k0) / per_unit * MR;",
        "(int64_t)k / per_unit * MR;",
    ),
    Fault(
        "linear: a gradient's chain is the whole block",
        "csrc/linear.c",
        "HAVE_PAIRS ? ROW_CHAIN : 2 * ROW_CHAIN",
        "ROW_BLOCK",
    ),
    Fault(
        "linear: a gradient's block is as long as any other",
        "csrc/linear.c",
        "g->over_rows ? ROW_BLOCK : K_BLOCK",
        "K_BLOCK",
    ),
    Fault(
        "linear: bias gradient misses every second row of pairs",
        "csrc/linear.c",
        "if (next) sum = sum + vload(next, columns);",
        "",
        isa="avx512_bf16",
    ),
    Fault(
        "linear: bias gradient forgets its last, short chain",
        "csrc/linear.c",
        "        flush_sum(sum, &low, &high);\n        vdstore",
        "        vdstore",
    ),
    Fault(
        "linear: two panels of A in one place",
        "csrc/linear.c",
        "vstore_halves(at, at + panel, x)",
        "vstore_halves(at, at, x)",
        isa="avx512",
    ),
    Fault(
        "linear: a tile is finished with its first block",
        "csrc/linear.c",
        "last = k + values == g->K;\n    const int tiles",
        "last = k == 0;\n    const int tiles",
    ),
    Fault(
        "linear: bias gradient once for every column part",
        "csrc/linear.c",
        "g->row_sums && j0 == 0",
        "g->row_sums != 0",
    ),
    Fault(
        "linear: few rows: of two rows only one is multiplied",
        "csrc/linear.c",
        "tile(2, NV, pairs",
        "tile(1, NV, pairs",
        first=PACKED,
    ),
    Fault(
        "linear: a packed block is always the first",
        "csrc/linear.c",
        "return (const float *)panel + (int64_t)(k / values_a_unit(g)) * NR;",
        "return (const float *)panel;",
        first=PACKED,
    ),
    Fault(
        "int8: too little is taken away again",
        "csrc/linear_int8.c",
        "p->begins[at] = -128 * sum;",
        "p->begins[at] = -127 * sum;",
        first=PACKED,
    ),
    Fault(
        "paged attention: a query does not see its own key",
        "csrc/attention_paged.c",
        "int nk = min_int(KEY_BLOCK, t + 1 - k0), d = 0;",
        "int nk = min_int(KEY_BLOCK, t - k0), d = 0;",
        first=PACKED,
    ),
    Fault(
        "paged attention: the old maximum is forgotten",
        "csrc/attention_paged.c",
        "s->max = block_max > old_max ? block_max : old_max;",
        "s->max = block_max;",
        first=PACKED,
    ),
    Fault(
        "session: a shared page is written",
        "csrc/session.c",
        "if (tail >= 0 && s->owners[tail] > 1) copy_tail(s, r);",
        "",
        first=SESSION,
    ),
    Fault(
        "session: the pages of a row that leaves are lost",
        "csrc/session.c",
        "for (int i = 0; i < r->n_pages; i++) leave_page(s, r->pages[i]);",
        "",
        first=SESSION,
    ),
    Fault(
        "session: a fork is no owner",
        "csrc/session.c",
        "s->owners[to->pages[i]]++;",
        "",
        first=SESSION,
    ),
    Fault(
        "session: a copied page holds the first layer alone",
        "csrc/session.c",
        "for (int l = 0; l < s->c.n_layer; l++) {\n        char *layer",
        "for (int l = 0; l < 1; l++) {\n        char *layer",
        first=SESSION,
    ),
    Fault(
        "session: rows of older weights go on",
        "csrc/session.c",
        "s->rows[row].version != s->version",
        "0",
        first=SESSION,
    ),
    Fault(
        "session: positions begin anew with each slice",
        "csrc/session.c",
        "starts[n] = first[i] - p->past[i];",
        "starts[n] = first[i];",
        first=SESSION,
    ),
    Fault(
        "engine: draws are keyed without the row",
        "python/barelm/engine.py",
        "_core.STREAM_SAMPLE, self.key, len(self.tokens))",
        "_core.STREAM_SAMPLE, 0, len(self.tokens))",
        first=ENGINE,
    ),
    Fault(
        "engine: a row that was put back goes on behind what it had read",
        "python/barelm/engine.py",
        "lane.id, lane.read = None, lane.start",
        "lane.id = None",
        first=ENGINE,
    ),
    Fault(
        "engine: a stop string across tokens is missed",
        "python/barelm/engine.py",
        "self._release(len(self._held) - _overlap(self._held, self._stops))",
        "self._release(len(self._held))",
        first=ENGINE,
    ),
    Fault(
        "engine: the pages of a row that has ended are kept",
        "python/barelm/engine.py",
        "self._lanes.remove(lane)\n            if lane.id is not None:\n                self.session.free(lane.id)",
        "self._lanes.remove(lane)",
        first=ENGINE,
    ),
    Fault(
        "drawing: the penalty makes negative logits likelier",
        "python/barelm/drawing.py",
        "out[seen] / penalty, out[seen] * penalty",
        "out[seen] / penalty, out[seen] / penalty",
        first=ENGINE,
    ),
    Fault(
        "model: a step above the limit is made",
        "csrc/update.c",
        "if (bad || *norm > (double)hyper[HYPER_NORM_LIMIT] ||",
        "if (bad ||",
    ),
    Fault(
        "linear: derivative of the function left out",
        "csrc/linear.c",
        ".dpre = fn == FN_NONE ? NULL : pre",
        ".dpre = NULL",
    ),
    Fault(
        "rope: turned the wrong way",
        "csrc/rope.c",
        "vstore(x + i, vnfma(y_i, s, x_i * c), k);",
        "vstore(x + i, vfma(y_i, s, x_i * c), k);",
    ),
    Fault(
        "rope: starts ignored", "csrc/rope.c", "p = n % job->T - (job->starts ? job->starts[n] : 0);", "p = n % job->T;"
    ),
    Fault(
        "swiglu: gradient of up without the sigmoid",
        "csrc/swiglu.c",
        "vstore(dup + f, dy * g * s, k);",
        "vstore(dup + f, dy * g, k);",
    ),
    Fault(
        "attention: a query sees the key behind it",
        "csrc/attention.h",
        "rows = rows_seen(nk, i, ahead), hidden = ahead - i;",
        "rows = rows_seen(nk, i, ahead), hidden = ahead - i - 1;",
    ),
    Fault(
        "attention: keys before the start are seen",
        "csrc/attention.h",
        "for (int k0 = f->start; k0 < end;",
        "for (int k0 = f->start / KEY_BLOCK * KEY_BLOCK; k0 < end;",
    ),
    Fault(
        "attention: old sum not rescaled",
        "csrc/attention.h",
        "vload_all(sum) * k + added",
        "vload_all(sum) + added",
    ),
    Fault("attention: keys taken for values", "csrc/attention.h", "return a->NH + a->NKV + kv;", "return a->NH + kv;"),
    Fault(
        "attention: last query block of a run forgotten backward",
        "csrc/attention.c",
        "if (queries[i].t0 + queries[i].nq > k0)",
        "if (queries[i].t0 + queries[i].nq > k0 + 1)",
    ),
    Fault(
        "attention: a row of keys that not all queries see is taken for one that they do",
        "csrc/attention.h",
        "max_int(0, 1 - hidden)) & ~1; }",
        "max_int(0, 3 - hidden)) & ~1; }",
    ),
    Fault(
        "attention: the logarithm of the sum a term short",
        "csrc/attention.h",
        "series = vfma(t, vset(-0.25f), vset(1 / 3.0f));",
        "series = vset(0.0f);",
    ),
    Fault(
        "attention: queries of a task's second block take the keys of its first",
        "csrc/attention.h",
        "int nk = min_int(KEY_BLOCK, q[i].t0 + q[i].nq - k0);",
        "int nk = min_int(KEY_BLOCK, q[0].t0 + q[0].nq - k0);",
    ),
    Fault(
        "attention: gradients of keys are added over the next rows",
        "csrc/attention.c",
        "(a->HS != a->width || k.nk % STRIP)",
        "a->HS != a->width",
    ),
    Fault(
        "attention in pairs: keys swapped in the weights alone",
        "csrc/attention.h",
        "pairs ? vpairs(p, next) : round",
        "pairs ? vpairs(next, p) : round",
        isa="avx512_bf16",
    ),
    Fault(
        "attention in pairs: keys swapped in dS alone",
        "csrc/attention.c",
        "vpairs(before, dscore)",
        "vpairs(dscore, before)",
        isa="avx512_bf16",
    ),
    Fault(
        "attention in pairs: an odd last key's dS is left to chance",
        "csrc/attention.c",
        "else if (j == rows - 1) vstore_all(across, vpairs(dscore, vset(0.0f)));",
        "",
        isa="avx512_bf16",
    ),
    Fault(
        "attention in pairs: an odd last key has the weight of its partner too",
        "csrc/attention.h",
        "vf p = weight(S, i, scale, minus_max, masked, hidden), next = vset(0.0f);",
        "vf p = weight(S, i, scale, minus_max, masked, hidden), next = p;",
        PACKED,
        "avx512_bf16",
    ),
    Fault(
        "attention in pairs: an odd last row is paired with the row behind it",
        "csrc/attention.c",
        "vf next = i + 1 < n ? load_left(x + ld + d, HS - d) : vset(0.0f);",
        "vf next = load_left(x + ld + d, HS - d);",
        isa="avx512_bf16",
    ),
    Fault(
        "attention in pairs: an odd head is paired with what lies behind it",
        "csrc/attention.c",
        "vpairs_along(load_left(x + d, HS - d),",
        "vpairs_along(load_left(x + d, HS - d + 1),",
        isa="avx512_bf16",
    ),
    Fault(
        "attention in pairs: an odd first query is left out of a strip",
        "csrc/attention.c",
        "first = max_int(0, ahead + i) / per_unit, ld",
        "first = (max_int(0, ahead + i) + per_unit - 1) / per_unit, ld",
        isa="avx512_bf16",
    ),
    Fault(
        "attention in pairs: the page keeps a stale value behind an odd last key",
        "csrc/attention_paged.c",
        "unit_of(a, x, zero);",
        "unit_of(a, x, load_cached(V, row + d, a->prec));",
        PACKED,
        "avx512_bf16",
    ),
    Fault(
        "attention in pairs: a second key's value wipes out the first's",
        "csrc/attention_paged.c",
        "unit_of(a, vlow(load_cached(V, row + d, a->prec)), x)",
        "unit_of(a, zero, x)",
        PACKED,
        "avx512_bf16",
    ),
    Fault(
        "embedding: starts ignored",
        "csrc/embedding.c",
        "return n % T - (starts ? starts[n] : 0);",
        "return (void)starts, n % T;",
    ),
    Fault(
        "embedding: of a packed weight, always the first row",
        "csrc/embedding.c",
        "f->packed, f->prec, C, f->tokens[n]);",
        "f->packed, f->prec, C, 0);",
        PACKED,
    ),
    Fault(
        "session: parts are packed over each other",
        "csrc/session.c",
        "s->ops->packed_bytes(s->prec, (int)C, (int)first)",
        "s->ops->packed_bytes(s->prec, (int)C, 0)",
        LOAD,
    ),
    Fault(
        "session: a part's last rows are lost",
        "csrc/session.c",
        "if (row < stop) break;",
        "if (row < first + PACK_ROWS) break;",
        LOAD,
    ),
    Fault(
        "embedding: = instead of +=",
        "csrc/embedding.c",
        "vload(d + j * W, k) + vdround(low[j], high[j]), k);",
        "vdround(low[j], high[j]), k);",
    ),
    Fault(
        "logprob: temperature ignored backward",
        "csrc/logprob.c",
        "const float d = job->invtemp * job->dlogprobs[n];",
        "const float d = job->dlogprobs[n];",
    ),
    Fault(
        "logprob: padding not zeroed", "csrc/logprob.c", "memset(dx + V, 0, (size_t)(job->Vp - V) * sizeof *dx);", ""
    ),
    Fault(
        "logprob: rows without a target have a gradient", "csrc/logprob.c", "if (target < 0) {", "if (target < -1) {"
    ),
    Fault("adamw: epsilon inside the root", "csrc/update.c", "(vsqrt(v * inv_c2) + eps)", "vsqrt(v * inv_c2 + eps)"),
    Fault(
        "adamw: second moment not corrected",
        "csrc/model.c",
        "[HYPER_C2] = (float)(1 - pow((double)u->beta2, t))",
        "[HYPER_C2] = 1",
        MODEL,
    ),
    Fault(
        "adamw: step counted from 0",
        "csrc/model.c",
        "const double t = (double)m->step + 1;",
        "const double t = (double)m->step + 2;",
        MODEL,
    ),
    Fault("update: clip ignored", "csrc/model.c", "[HYPER_CLIP] = u->clip", "[HYPER_CLIP] = 0 * u->clip", MODEL),
    Fault("update: biases decay", "csrc/block.c", "b->hyper, b->decays[i], n);", "b->hyper, 1, n);", MODEL),
    Fault(
        "update: gradients not forgotten",
        "csrc/model.c",
        "    b->live = 0;\n    if ((s = checked_device",
        "    if ((s = checked_device",
        MODEL,
    ),
    Fault(
        "update: a bad gradient is used",
        "csrc/update.c",
        "const int bad = !isfinite(*norm) || !isfinite(*loss);",
        "const int bad = 0;",
    ),
    Fault(
        "update: the limit of the loss ignored",
        "csrc/update.c",
        "|| *loss > (double)hyper[HYPER_LOSS_LIMIT])",
        ")",
    ),
    Fault(
        "update: a step above its limit is counted",
        "csrc/model.c",
        "if (*norm > (double)float_above(u->norm_limit) ||",
        "if (0 ||",
        GUARD,
    ),
    Fault(
        "loss: that of the step before is added",
        "csrc/block.c",
        "    if (b->live) return;\n    b->ops->zero(block_loss(b), sizeof(double));\n",
        "    if (b->live) return;\n",
        LOOP,
    ),
    # what only a device has: recordings, and weights in bf16
    *(
        Fault(f"repeat: {what} ignored", "csrc/repeat.c", f"a->{what} == b->{what}", "1", DEVICE)
        for what in ("B", "T", "has_starts", "live", "invtemp")
    ),
    Fault(
        "repeat: recorded, but not done",
        "csrc/repeat.c",
        "    if (r->kept[i].recording) r->ops->replay",
        "    if (0) r->ops->replay",
        DEVICE,
    ),
    Fault(
        "bf16 weights: what is written is not rounded",
        "csrc/model.c",
        "if (block == WEIGHTS) m->low_stale = 1;",
        "",
        DEVICE,
    ),
    Fault(
        "bf16 weights: not rounded by the update",
        "csrc/model.c",
        "if (m->trained == &m->base) round_weights(m);",
        "",
        DEVICE,
    ),
    Fault(
        "names: a transposed matrix taken straight",
        "csrc/model.def",
        '"mlp.c_fc.weight",    1)',
        '"mlp.c_fc.weight",    0)',
        MODEL,
    ),
    Fault(
        "names: keys and values swapped",
        "csrc/model.def",
        '(QKV + AO) / 2, (QKV - AO) / 2, "self_attn.v_proj.weight"',
        'AO, (QKV - AO) / 2, "self_attn.v_proj.weight"',
        MODEL,
    ),
    Fault(
        "model: norm weights decay",
        "csrc/model.def",
        "PARAM(lnf_w,  2, C,                   0,  0, ONE)",
        "PARAM(lnf_w,  2, C,                   0,  1, ONE)",
        MODEL,
    ),
    Fault(
        "model: residual of the MLP missing",
        "csrc/model.c",
        "linear(m, P_fc2_w, P_fc2_b, l, out, NULL, AT(fch), AT(mid), FN_NONE)",
        "linear(m, P_fc2_w, P_fc2_b, l, out, NULL, AT(fch), NULL, FN_NONE)",
        MODEL,
    ),
    Fault(
        "model: bias of the MLP left out",
        "csrc/model.c",
        "linear(m, P_fc_w, P_fc_b, l, AT(fch), AT(fc),",
        "linear(m, P_fc_w, P_lnf_b, l, AT(fch), AT(fc),",
        MODEL,
    ),
    Fault(
        "model: bias gradient of the wrong layer",
        "csrc/model.c",
        "layout_at(&m->base.layout, m->base.grads, P_fc2_b, l - 1)",
        "layout_at(&m->base.layout, m->base.grads, P_fc2_b, l)",
        MODEL,
    ),
    Fault(
        "model: a second chunk of the head overwrites",
        "csrc/model.c",
        "add = m->trained->live || k->row > 0",
        "add = m->trained->live",
        MODEL,
    ),
    Fault(
        "model: stale head where only hidden has a gradient",
        "csrc/model.c",
        "head_is_written && m->trained == &m->base ?",
        "m->trained == &m->base ?",
        MODEL,
    ),
    Fault(
        "model: gradients of hidden forgotten",
        "csrc/model.c",
        "has_dhidden ? k->dhidden : NULL",
        "has_dhidden && 0 ? k->dhidden : NULL",
        MODEL,
    ),
    Fault(
        "model: starts of an older forward used",
        "csrc/model.c",
        "m->has_starts = starts != NULL;",
        "m->has_starts |= starts != NULL;",
        MODEL,
    ),
    Fault(
        "model: an update keeps the older forward",
        "csrc/model.c",
        "m->step++;\n    m->version++;\n    m->kept = 0;\n    return OK;",
        "m->step++;\n    m->version++;\n    return OK;",
        MODEL,
    ),
    Fault(
        "model: half a gradient is kept",
        "csrc/model.c",
        "m->trained->live = s == OK;",
        "m->trained->live = 1;",
        THREADS,
    ),
    Fault(
        "model: Ctrl-C is not asked for",
        "csrc/model.c",
        "return m->ops->on_host && m->poll && m->poll();",
        "return 0 && m->poll();",
        THREADS,
    ),
    Fault(
        "model: memory is not looked at before it is taken",
        "csrc/status.c",
        "*p = bytes <= there ?",
        "*p = there >= 0 ?",
        MODEL,
    ),
    Fault(
        "model: blend of wavelengths the wrong way round",
        "csrc/layout.c",
        "(keep + (1 - keep) / c->rope_factor)",
        "(1 - keep + keep / c->rope_factor)",
        MODEL,
    ),
    Fault("threads: workers take signals", "csrc/threads.c", "sigfillset(&all);", "sigemptyset(&all);", THREADS),
    Fault(
        "threads: nobody helps with another's tasks",
        "csrc/threads.c",
        "int run = (me + i) % pool.runs, end",
        "int run = me, end",
        THREADS,
    ),
    Fault(
        "attention over pages: the last query of a row is not written",
        "csrc/attention_paged.c",
        "for (int n = p->first[r]; n < p->first[r + 1]; n++) write_token(p, r, kv, n);\n    for (int h",
        "for (int n = p->first[r]; n < p->first[r + 1] - 1; n++) write_token(p, r, kv, n);\n    for (int h",
        PACKED,
    ),
    Fault(
        "threads: a task may be done twice",
        "csrc/threads.c",
        "(task = atomic_fetch_add_explicit(&pool.run[run].next, 1, memory_order_relaxed)) < end)",
        "(task = atomic_load(&pool.run[run].next)) < end && (atomic_store(&pool.run[run].next, task + 1), 1))",
        THREADS,
    ),
    Fault(
        "threads: the caller does not wait for the last task",
        "csrc/threads.c",
        "atomic_load_explicit(&pool.ticket, memory_order_acquire) & INSIDE; i++)",
        "0; i++)",
        THREADS,
    ),
    Fault("binding: a token of V is taken", "csrc/bindings.cpp", "ids[i] >= high", "ids[i] > high", INPUT),
    Fault(
        "binding: an older view of the gradients is stale",
        "csrc/bindings_model.cpp",
        "me.grads_seen_ = true;",
        "",
        MODEL,
    ),
    Fault(
        "binding: a view does not keep its block",
        "csrc/bindings_model.cpp",
        "Floats(shape_of(t), strides, block + t.offset, self)",
        "Floats(shape_of(t), strides, block + t.offset, py::none())",
        MODEL,
    ),
    Fault(
        "checkpoint: checksum not looked at",
        "python/barelm/checkpoint.py",
        'if have["sha256"] != want.get("sha256"):',
        "if False:",
        CHECKPOINT,
    ),
    Fault(
        "checkpoint: moments under each other's names",
        "python/barelm/checkpoint.py",
        '_MOMENTS = ("exp_avg.", "exp_avg_sq.")',
        '_MOMENTS = ("exp_avg_sq.", "exp_avg.")',
        CHECKPOINT,
    ),
    Fault(
        "checkpoint: step not restored",
        "python/barelm/checkpoint.py",
        'model.step = state.get("step", 0)',
        "pass",
        CHECKPOINT,
    ),
    Fault(
        "checkpoint: missing tensors are no error",
        "python/barelm/convert/source.py",
        "    if missing:\n",
        "    if False:\n",
        CHECKPOINT,
    ),
    Fault(
        "source: the last part of a tensor is too long",
        "python/barelm/convert/source.py",
        "where = slice(at, min(at + step, shape[axis]))",
        "where = slice(at, at + step)",
        FOLDERS,
    ),
    Fault(
        "source: rotary pairs stay side by side",
        "python/barelm/convert/source.py",
        "return pairs.transpose(0, 2, 1).reshape(-1)",
        "return pairs.reshape(-1)",
        FORMATS,
    ),
    Fault(
        "numbers: bf16 cut off instead of rounded",
        "python/barelm/convert/numbers.py",
        "rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16",
        "rounded = bits >> 16",
        FOLDERS,
    ),
    Fault(
        "numbers: too large for F16 becomes infinite",
        "python/barelm/convert/numbers.py",
        '    if kind in ("F16", "Q8_0"):\n',
        "    if False:\n",
        FOLDERS,
    ),
    Fault(
        "safetensors: gaps between tensors are passed over",
        "python/barelm/convert/safetensors_file.py",
        "if place.begin != at or place.end < place.begin:",
        "if place.end < place.begin:",
        FOLDERS,
    ),
    Fault(
        "safetensors: an index may name files elsewhere",
        "python/barelm/convert/safetensors_file.py",
        'if not name.endswith(".safetensors") or os.path.basename(name) != name or len(name) > MAX_NAME:',
        "if False:",
        FOLDERS,
    ),
    Fault(
        "gguf: tensors may lie behind the end",
        "python/barelm/convert/gguf_file.py",
        "if math.prod(shape) < 1 or offset + n_bytes(shape, kind) > file.size:",
        "if math.prod(shape) < 1:",
        FORMATS,
    ),
    Fault(
        "gguf: a float32's digits are taken as a double's",
        "python/barelm/convert/gguf_file.py",
        "return float(str(np.float32(number)))",
        "return float(number)",
        FORMATS,
    ),
    Fault(
        "gguf: GPT-2's linear layers not transposed",
        "python/barelm/convert/gguf.py",
        'TRANSPOSED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")',
        'TRANSPOSED = ("attn_qkv", "ffn_up", "ffn_down")',
        FORMATS,
    ),
    Fault(
        "llm.c: zero rows of the embedding not passed over",
        "python/barelm/convert/llmc.py",
        "            at += size * (padded - config.vocab_size) * config.n_embd\n",
        "            at += 0\n",
        FORMATS,
    ),
    Fault(
        "llama2.c: the tables of angles are not passed over",
        "python/barelm/convert/llama2c.py",
        '        ("", (2, c.context, c.head_size // 2)),\n        *head,\n',
        '        *head,\n        ("", (2, c.context, c.head_size // 2)),\n',
        FORMATS,
    ),
    Fault(
        "binary: counts are believed",
        "python/barelm/convert/binary.py",
        "if not 0 <= n <= self.left:",
        "if not 0 <= n:",
        FORMATS,
    ),
    Fault(
        "convert: an unfinished file is left",
        "python/barelm/convert/output.py",
        "part.unlink(missing_ok=True)",
        "pass",
        FORMATS,
    ),
    Fault(
        "sentencepiece: the worst score merges first",
        "python/barelm/sentencepiece.py",
        "key=lambda piece: (-float(self.scores[ids[piece]]), ids[piece]))",
        "key=lambda piece: (float(self.scores[ids[piece]]), ids[piece]))",
        PIECES,
    ),
    Fault(
        "sentencepiece: a whole text that is a piece is that piece",
        "python/barelm/sentencepiece.py",
        "self._encoder.encode_to_numpy(text + END, disallowed_special=())[:-1]",
        "self._encoder.encode_to_numpy(text, disallowed_special=())",
        PIECES,
    ),
    Fault(
        "sentencepiece: long texts are cut inside pieces",
        "python/barelm/sentencepiece.py",
        'self._may_cut = not any(CUT.search(piece.replace(SPACE, " ")) for piece in pieces)',
        "self._may_cut = True",
        PIECES,
    ),
    Fault(
        "bos: a text goes on past the beginning of the next one",
        "python/barelm/engine.py",
        "drawn.id in tok.ends",
        "drawn.id == tok.eot",
        ENGINE,
    ),
    Fault(
        "bos: a prompt is read without it",
        "python/barelm/engine.py",
        "return tok.encode_prompt(prompt)",
        "return tok.encode(prompt) or [tok.bos]",
        ENGINE,
    ),
    Fault(
        "bos: documents begin with the end-of-text token",
        "python/barelm/data/tokens.py",
        "np.array([tok.bos], np.int32)",
        "np.array([tok.eot], np.int32)",
        SHARDS,
    ),
    Fault(
        "bos: GGUF says that every text begins with it",
        "python/barelm/convert/gguf.py",
        '"add_bos_token": tok.adds_bos',
        '"add_bos_token": True',
        FORMATS,
    ),
    Fault(
        "init: the weights stay random",
        "python/barelm/initial.py",
        "    source.fill_model(model)\n",
        "",
        INIT,
    ),
    Fault(
        "init: a run that begins again takes whatever lies there now",
        "python/barelm/train.py",
        "    if init and before:\n",
        "    if False:\n",
        INIT,
    ),
    Fault(
        "init: a resumed run forgets what it fine-tunes",
        "python/barelm/train.py",
        "_open(merged, folder, model, dataset, state, init)",
        "_open(merged, folder, model, dataset, state)",
        INIT,
    ),
    Fault(
        "init: the learning rate of a new model",
        "python/barelm/recipe.py",
        "FineTuning(lr=0.1",
        "FineTuning(lr=1.0",
        INIT,
    ),
    Fault(
        "import: a checkpoint may be replaced by its copy",
        "python/barelm/importing.py",
        "    if os.path.exists(out) and os.path.samefile(out, source.path):\n",
        "    if False:\n",
        IMPORT,
    ),
    Fault(
        "checkpoint: written in place",
        "python/barelm/files.py",
        '    part = folder.parent / f".{folder.name}.{os.getpid()}.part"',
        "    part = folder",
        CHECKPOINT,
    ),
    Fault(
        "checkpoint: an unfinished folder is left",
        "python/barelm/files.py",
        "    finally:\n        shutil.rmtree(part, ignore_errors=True)",
        "    finally:\n        pass",
        CHECKPOINT,
    ),
    Fault(
        "documents: a separator across two blocks is not seen",
        "python/barelm/data/documents.py",
        "while len(rest) - len(split_at) > PART:",
        "while len(rest) >= PART:",
        DOCUMENTS,
    ),
    Fault(
        "documents: a part ends inside a character",
        "python/barelm/data/documents.py",
        "at = character_start(data, PART)",
        "at = PART",
        DOCUMENTS,
    ),
    Fault(
        "documents: a line that is too long leaves its end as a line",
        "python/barelm/data/documents.py",
        r'while line and not line.endswith(b"\n"):',
        "while False:",
        DOCUMENTS,
    ),
    Fault(
        "documents: bytes that are no UTF-8 are replaced",
        "python/barelm/data/documents.py",
        'line.decode("utf-8", "surrogateescape")',
        'line.decode("utf-8", "replace")',
        DOCUMENTS,
    ),
    Fault(
        "documents: the hash does not see where one ends",
        "python/barelm/data/documents.py",
        "self._hash.update(bytes([document.begins]) + hashlib.sha256(document.data).digest())",
        "self._hash.update(document.data)",
        DOCUMENTS,
    ),
    Fault(
        "documents: hidden files are read",
        "python/barelm/data/documents.py",
        'skip=lambda name: name.startswith(".")',
        "skip=lambda name: False",
        DOCUMENTS,
    ),
    Fault(
        "tokens: a window across two shards",
        "python/barelm/data/tokens.py",
        "i + (end == self._ends[i])",
        "i + 1",
        SHARDS,
    ),
    Fault(
        "tokens: a changed file is read on",
        "python/barelm/data/tokens.py",
        "changed = _stamp(os.fstat(file)) != self.stamp",
        "changed = False",
        SHARDS,
    ),
    Fault(
        "tokens: the last window is never drawn",
        "python/barelm/data/tokens.py",
        "places = len(self) - T  #",
        "places = len(self) - T - 1  #",
        SHARDS,
    ),
    Fault(
        "tokens: a window in sequence ends at the last token",
        "python/barelm/data/tokens.py",
        "starts = [(first + b) * T % len(self)",
        "starts = [(first + b) * T % (len(self) - T)",
        SHARDS,
    ),
    Fault(
        "tokens: threads give back in any order",
        "python/barelm/data/tokens.py",
        "yield from ahead.popleft().result()\n        while",
        "yield from ahead.pop().result()\n        while",
        SHARDS,
    ),
    Fault(
        "shards: equal texts on both sides",
        "python/barelm/data/shards.py",
        'hashlib.sha256(seed.to_bytes(8, "little") + hashlib.sha256(data).digest()).digest()',
        'hashlib.sha256(seed.to_bytes(8, "little") + os.urandom(8)).digest()',
        SHARDS,
    ),
    Fault(
        "shards: nothing may be left to train on",
        "python/barelm/data/shards.py",
        "held_out=bool(met[False]) and (number < fraction or not met[True])",
        "held_out=number < fraction or not met[True]",
        SHARDS,
    ),
    Fault(
        "shards: the header says what a full shard has",
        "python/barelm/data/shards.py",
        'header[:3] = *self._form, self.shards[-1]["tokens"]',
        "header[:3] = *self._form, self._limit",
        SHARDS,
    ),
    Fault(
        "shards: checksum not looked at",
        "python/barelm/data/shards.py",
        'if (shard.n, have["bytes"], have["sha256"]) != want:',
        "if False:",
        SHARDS,
    ),
    Fault(
        "shards: ids of others not looked at",
        "python/barelm/data/shards.py",
        "        if len(bad):",
        "        if False:",
        SHARDS,
    ),
    Fault(
        "split: contractions in capitals with GPT-2",
        "csrc/split.c",
        "contraction(p + 1, end, 0)",
        "contraction(p + 1, end, 1)",
        BPE,
    ),
    Fault(
        "split: a line end before letters",
        "csrc/split.c",
        "second.class == LETTER && !is_newline(*p)",
        "second.class == LETTER",
        BPE,
    ),
    Fault(
        "split: line ends do not belong to others", "csrc/split.c", "while (p < end && is_newline(*p)) p++;", "", BPE
    ),
    Fault(
        "split: cut before white space beyond ASCII",
        "csrc/split.c",
        "if (after != 0xC2 && after != 0xE1 && after != 0xE2 && after != 0xE3) return p;",
        "return p;",
        BPE,
    ),
    Fault(
        "split: cut behind any line end",
        "csrc/split.c",
        "if (before != '\\n' || (after < 0x80 && unicode_ascii[after] == SPACE)) continue;",
        "if (before != '\\n') continue;",
        BPE,
    ),
    Fault(
        "pieces: equal keys are equal pieces",
        "csrc/pieces.c",
        " && (a->size <= 8 || !memcmp(a->bytes, b->bytes, a->size))",
        "",
        BPE,
    ),
    Fault(
        "pieces: workers' counts stay for the next round",
        "csrc/pieces.c",
        "if (t->slots) memset(t->slot, 0, t->slots * sizeof *t->slot);",
        "",
        BPE,
    ),
    Fault(
        "pieces: bytes are not kept",
        "csrc/pieces.c",
        "!(s->bytes = keep(",
        "!(keep(",
        BPE,
    ),
    Fault(
        "bpe: smaller of equals",
        "csrc/bpe.c",
        "compare_tokens(b, p->right, q->right)) > 0",
        "compare_tokens(b, p->right, q->right)) < 0",
        BPE,
    ),
    Fault(
        "bpe: right tokens do not count",
        "csrc/bpe.c",
        "return (order ? order : compare_tokens(b, p->right, q->right)) > 0;",
        "return order > 0;",
        BPE,
    ),
    Fault(
        "bpe: a beginning is equal",
        "csrc/bpe.c",
        "return order ? order : (x->size > y->size) - (x->size < y->size);",
        "return order;",
        BPE,
    ),
    Fault(
        "bpe: outdated counts win",
        "csrc/bpe.c",
        "else b->heap[0].count = count;",
        "else return b->heap[0] = b->heap[--b->heap_size], sift_down(b), top.pair;",
        BPE,
    ),
    Fault(
        "bpe: the new token's own pair is not taken back",
        "csrc/bpe.c",
        "add_side(b, &m, new, RIGHT) || add_side(b, &m, new, LEFT)",
        "add_side(b, &m, new, LEFT) || add_side(b, &m, new, RIGHT)",
        BPE,
    ),
    Fault(
        "bpe: min_count is one too many",
        "csrc/bpe.c",
        "n->listed = n->count >= b->min_count;",
        "n->listed = n->count > b->min_count;",
        BPE,
    ),
    Fault(
        "guard: a step on a bad weight is only skipped",
        "python/barelm/loop.py",
        'if not str(error).startswith("update: "):',
        "if False:",
        LOOP,
    ),
    Fault("guard: a skipped step enters the window", "python/barelm/loop.py", "if why:", "if False:", GUARD),
    Fault(
        "train: the guard forgets on resume",
        "python/barelm/train.py",
        'run.guard.restore(state["guard"])',
        "pass",
        TRAIN,
    ),
    Fault(
        "train: a checkpoint before its log", "python/barelm/report.py", 'records[: mark["lines"]]', "records", TRUST
    ),
    Fault(
        "runs: an altered run.json is believed",
        "python/barelm/runs.py",
        'if description.get("sha256") != digest_of(description):',
        "if False:",
        TRUST,
    ),
    Fault(
        "ngram: the discount is lost",
        "python/barelm/ngram.py",
        "self._discount * kinds * lower",
        "0.0 * kinds * lower",
        NGRAM,
    ),
    Fault(
        "sample: what is no number is dropped by the maximum",
        "csrc/sample.c",
        "return vsum(bad) == 0.0f ? vhmax(vmax(a, b)) : NAN;",
        "return vhmax(vmax(a, b));",
        DRAWS,
    ),
    Fault(
        "sample: the greater id of equals comes too",
        "csrc/sample.c",
        "int end = 1 + find_border(",
        "int end = l->n + 0 * find_border(",
        DRAWS,
    ),
    Fault(
        "sample: the border of a half is counted twice",
        "csrc/sample.c",
        "high = nextafterf(middle, -INFINITY), above = weight;",
        "high = middle, above = weight;",
        DRAWS,
    ),
    Fault(
        "sample: the float below zero has the next bits",
        "csrc/sample.c",
        "high = nextafterf(middle, -INFINITY), above = weight;",
        "high = of_key(key_of(middle) - 1), above = weight;",
        DRAWS,
    ),
    Fault(
        "sample: both zeros are not equal",
        "csrc/sample.c",
        "    x += 0.0f;\n",
        "",
        DRAWS,
    ),
    Fault(
        "sample: top_p counts what top_k dropped",
        "csrc/sample.c",
        "    keep_top_k(&l, option[SAMPLE_TOP_K]);\n    keep_top_p(&l, option[SAMPLE_TOP_P]);\n",
        "    keep_top_p(&l, option[SAMPLE_TOP_P]);\n    keep_top_k(&l, option[SAMPLE_TOP_K]);\n",
        DRAWS,
    ),
    Fault(
        "sample: min_p without the temperature",
        "csrc/sample.c",
        "l->max + log(p) * l->temperature, -FLT_MAX",
        "l->max + log(p), -FLT_MAX",
        DRAWS,
    ),
    Fault(
        "sample: a block without a token is not passed over",
        "csrc/sample.c",
        "running + l->sums[block] <= goal; block++",
        "running + l->sums[block] < goal; block++",
        DRAWS,
    ),
    Fault(
        "sample: the temperature's inverse may be infinite",
        "csrc/sample.c",
        "fminf(1.0f / l->temperature, FLT_MAX)",
        "1.0f / l->temperature",
        DRAWS,
    ),
    Fault(
        "sample: rows share the options of the first",
        "csrc/ops_ref.c",
        "options + (int64_t)n * SAMPLE_COUNT",
        "options",
    ),
    Fault("recipe: the batch grows with the square root", "python/barelm/recipe.py", "** 0.383", "** 0.5", LOOP),
    Fault(
        "held: int8's scale of the group before",
        "csrc/held.c",
        "read_group(out + i, row + (c + i) / INT8_GROUP, in_group, count);",
        "read_group(out + i, row + c / INT8_GROUP, in_group, count);",
        first=HELD,
    ),
    Fault(
        "held: the last values of a row of bf16 are not rounded",
        "csrc/held.c",
        "vstore_bf16(last, vbf16(vload(x + i, n - i)));",
        "vstore_bf16(last, vload(x + i, n - i));",
        first=HELD,
    ),
    Fault(
        "linear: a block of a held weight begins at the wrong column",
        "csrc/linear.c",
        "(g->k_along ? j : k) + r, g->k_along ? k : j,",
        "(g->k_along ? j : k) + r, g->k_along ? k : 0,",
        first=HELD,
    ),
    Fault(
        "embedding: a held row of the wrong token",
        "csrc/embedding.c",
        "else CAT(held_part, ISA)(out, f->wte, f->prec, C, f->tokens[n], 0, C);",
        "else CAT(held_part, ISA)(out, f->wte, f->prec, C, f->tokens[0], 0, C);",
        first=HELD,
    ),
    Fault(
        "norm: a weight that is not trained gets a gradient",
        "csrc/norm.c",
        "b->grads[i] && c < end; c++)",
        "c < end; c++)",
        first=OPS,
    ),
    Fault(
        "gelu: backward takes the derivative of its own output",
        "csrc/gelu.c",
        "vf x = vload(job->in + begin + i, k);",
        "vf x = vload(job->out + begin + i, k);",
        first=OPS,
    ),
    Fault(
        "lora: blocks of one group placed in another's columns",
        "csrc/lora.c",
        "s->dense[o * width + j * s->r + i] = s->scale *",
        "s->dense[o * width + i] = s->scale *",
        first=OPS,
    ),
    Fault(
        "lora: gradients of B are not added up",
        "csrc/lora.c",
        "*d = g->accumulate ? *d + x : x;",
        "*d = x;",
        first=OPS,
    ),
    Fault(
        "adapter: gradients of A are not added up",
        "csrc/model.c",
        "NULL, dlow, in, add, m->prec, N, C,",
        "NULL, dlow, in, 0, m->prec, N, C,",
        first=LORA,
    ),
    Fault(
        "adapter: what reaches the input through it is lost",
        "csrc/model.c",
        "if (din) m->ops->linear_backward_input(din, dlow, din, A,",
        "if (!m) m->ops->linear_backward_input(din, dlow, din, A,",
        first=LORA,
    ),
    Fault(
        "adapter: it comes behind the function",
        "csrc/model.c",
        "if (adapted) adapter_forward(m, w, l, sum, in);\n    if (apart) m->ops->gelu_forward(out, pre,",
        "if (apart) m->ops->gelu_forward(out, pre, fn, N, OC);\n    if (adapted) adapter_forward(m, w, l, out, in);\n"
        "    if (!m) m->ops->gelu_forward(out, pre,",
        first=LORA,
    ),
    Fault(
        "adapter: what was trained before goes on being trained",
        "csrc/model.c",
        "m->base.grads = m->base.m = m->base.v = NULL, m->base.live = 0;\n    if (base.grads)",
        "if (!m)",
        first=LORA,
    ),
    Fault(
        "adapter: drawn alike in every layer",
        "csrc/model.c",
        "philox_uniform(seed, STREAM_ADAPTER, (uint64_t)i, (uint64_t)j)",
        "philox_uniform(0, STREAM_ADAPTER, 0, (uint64_t)j)",
        first=LORA,
    ),
    Fault(
        "session: an adapter of the wrong layer",
        "csrc/session.c",
        "return s->added.packed + l * s->added.layer + s->added.at[slot][part];",
        "return s->added.packed + 0 * l + s->added.at[slot][part];",
        first=LORA,
    ),
    Fault(
        "session: an adapter that moved is not taken anew",
        "csrc/session.c",
        "Status status = s->added.of.rank ? OK : place_added(s, a);\n",
        "if (s->added.of.rank) return OK;\n    Status status = place_added(s, a);\n",
        first=LORA,
    ),
    Fault(
        "model: initial weights begin anew in every part of a tensor",
        "csrc/model.c",
        "philox_normal(host, row * columns, n,",
        "philox_normal(host, 0, n,",
        first=MODEL,
    ),
    Fault(
        "peft: merged, the scale is left out",
        "python/barelm/convert/peft.py",
        "(np.float32(self.scale) * B) @ A",
        "B @ A",
        first=LORA,
    ),
    Fault(
        "peft: merged, a part takes the first rows of B",
        "python/barelm/convert/peft.py",
        "            B = B[where]\n",
        "            B = B[: where.stop - where.start]\n",
        first=LORA,
    ),
    Fault(
        "peft: an option that changes the arithmetic is passed over",
        "python/barelm/convert/peft.py",
        "if described.get(name) not in (plain, None):",
        "if False:",
        first=LORA,
    ),
    Fault(
        "checkpoint: an adapter's moments are not read",
        "python/barelm/checkpoint.py",
        "        _fill_moments(model, folder, adapter.tensors.shapes)\n",
        "",
        first=LORA,
    ),
    Fault(
        "cuda attention: keys are multiplied before all have come",
        "cuda/attention.cuh",
        "        __syncthreads(); /* the keys are there; nobody reads the values of before */\n",
        "",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda attention: the values are not waited for",
        "cuda/attention.cuh",
        "        copy_async_wait<0>();\n        __syncthreads(); /* the values are there",
        "        __syncthreads(); /* the values are there",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda attention: the next keys overwrite those that are read",
        "cuda/attention.cuh",
        "        __syncthreads(); /* the values are there; nobody reads the keys */\n",
        "",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda attention: a query sees the key behind it",
        "cuda/attention.cuh",
        "row <= last ? x.first + row + 1 - k0 : 0;",
        "row <= last ? x.first + row + 2 - k0 : 0;",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda attention: a block that only the last query sees all of is not masked",
        "cuda/attention.cuh",
        "x.first + first + 1 - k0 < KEY_BLOCK) hide",
        "x.first + last + 1 - k0 < KEY_BLOCK) hide",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda attention: what came before is not rescaled",
        "cuda/attention.cuh",
        "keep[m][r] = exp2_fast(so_far.max[m][r] - from);",
        "keep[m][r] = 1.0f;",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda attention: every run begins at the first key",
        "cuda/attention.cuh",
        "return {first, end - 1, start};",
        "return {first, end - 1, 0};",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda attention: rows of another run take part",
        "cuda/attention.cuh",
        "row >= first && row <= last ?",
        "row <= last ?",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda attention: keys behind the end are fetched",
        "cuda/attention.cuh",
        "const bool there = row < count && c < width;",
        "const bool there = c < width;",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda attention: the heads of a group use another group's keys",
        "cuda/attention.cu",
        "return NH + h / (NH / NKV);",
        "return NH + h % NKV;",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda attention: a query gets no gradient from its own key",
        "cuda/attention.cu",
        "const bool seen = key <= t && key >= start[m][j / 2];",
        "const bool seen = key < t && key >= start[m][j / 2];",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda attention: the stage that is read is overwritten",
        "cuda/attention.cu",
        "fetch(k0 + STAGE, stage ^ 1);",
        "fetch(k0 + STAGE, stage);",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda attention: gradients of keys from the first head of a group alone",
        "cuda/attention.cu",
        "for (; head < heads; head++, t0 = first)",
        "for (; head < 1; head++, t0 = first)",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda attention: a tile of keys is left out by queries that start at its end",
        "cuda/attention.cu",
        "<= last_key) return true;",
        "< last_key) return true;",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda attention: weights are measured from a maximum that is one page old",
        "cuda/attention_paged.cu",
        "there && page < pages; page += 4",
        "there && page < pages - 1; page += 4",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda attention: a warp overwrites the values that it reads",
        "cuda/attention_paged.cu",
        "        __syncwarp(); /* the tile is free */\n",
        "",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda attention: the first new token is looked for in its page",
        "cuda/attention_paged.cu",
        "if (there && t < past)",
        "if (there && t <= past)",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda sample: no barrier before the sums of warps are added",
        "cuda/sample.cu",
        "counts[warp_index() * PIECES + i] = n;\n    }\n    __syncthreads();",
        "counts[warp_index() * PIECES + i] = n;\n    }",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda sample: a piece that just reaches the target is passed",
        "cuda/sample.cu",
        "above + p.weight[i] < target",
        "above + p.weight[i] <= target",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda sample: min_p brings back what top_p dropped",
        "cuda/sample.cu",
        "row.from = least > row.from ? least : row.from;",
        "row.from = least;",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda sample: both zeros are not equal",
        "cuda/sample.cu",
        "bits_of_float(x + 0.0f)",
        "bits_of_float(x)",
        CUDA_ATTENTION,
    ),
    Fault(
        "cuda norm: no barrier before the warps' sums are read",
        "cuda/norm.cu",
        "b[warp_index()] = x.b;\n    __syncthreads();",
        "b[warp_index()] = x.b;",
        CUDA,
    ),
    Fault(
        "cuda norm: the sums of a row overwrite those of the row before",
        "cuda/norm.cu",
        "p, n, (int)(n - begin) % 2, sums);",
        "p, n, 0, sums);",
        CUDA,
    ),
    Fault(
        "cuda norm: values behind the end take part in the variance",
        "cuda/norm.cu",
        "if (c + i < C) sum += square ? d * d : d;",
        "sum += square ? d * d : d;",
        CUDA,
    ),
    Fault("cuda norm: warps without a row work too", "cuda/norm.cu", "    if (n >= N) return;\n", "", CUDA),
    Fault(
        "cuda norm: chunks of rows overlap",
        "cuda/norm.cu",
        "begin + p.rows < p.N ? begin + p.rows : p.N",
        "begin + p.rows < p.N ? begin + p.rows + 1 : p.N",
        CUDA,
    ),
    Fault(
        "cuda norm: the chunks of the last warp are not added",
        "cuda/norm.cu",
        "for (int g = 1; g < GROUPS; g++)",
        "for (int g = 1; g < GROUPS - 1; g++)",
        CUDA,
    ),
    Fault(
        "cuda embedding: digits are read before all are there",
        "cuda/embedding.cu",
        "        digits[i] = k.key[n] >> k.shift & (DIGITS - 1);\n    }\n    __syncthreads();",
        "        digits[i] = k.key[n] >> k.shift & (DIGITS - 1);\n    }",
        CUDA,
    ),
    Fault(
        "cuda embedding: a sort by the lowest digit alone",
        "cuda/embedding.cu",
        "(keys - 1) >> shift > 0;",
        "shift < DIGIT_BITS;",
        CUDA,
    ),
    Fault(
        "cuda embedding: sums of earlier warps are left out",
        "cuda/embedding.cu",
        "for (int w = 0; w < warp_index(); w++) before += sums[w];",
        "",
        CUDA,
    ),
    Fault(
        "cuda embedding: a run is added by each of its rows",
        "cuda/embedding.cu",
        "    if (first > 0 && key[order[first - 1]] == row) return;\n",
        "",
        CUDA,
    ),
    Fault(
        "cuda loss: only the first values of each thread",
        "cuda/update.cu",
        "for (int n = (int)threadIdx.x; n < N; n += THREADS) sum = fma(",
        "for (int n = (int)threadIdx.x; n < N && n < THREADS; n += THREADS) sum = fma(",
        CUDA,
    ),
    Fault("cuda loss: that of before is lost", "cuda/update.cu", "*loss += sum;", "*loss = sum;", CUDA),
    Fault(
        "cuda update: the limits are not looked at",
        "cuda/update.cu",
        "if (bad || all > ",
        "if (bad || 0 * all > ",
        CUDA,
    ),
    Fault(
        "cuda update: a loss without end is used",
        "cuda/update.cu",
        "!isfinite(all) || !isfinite(*loss)",
        "!isfinite(all)",
        CUDA,
    ),
    Fault(
        "cuda adamw: made where none may be",
        "cuda/update.cu",
        " || isnan(hyper[HYPER_SCALE])) return;",
        ") return;",
        CUDA,
    ),
    Fault(
        "cuda rope: the tail of a half head is turned with what follows",
        "cuda/rope.cu",
        "i = k % vectors * VEC, count = half - i;",
        "i = k % vectors * VEC, count = VEC;",
        CUDA,
    ),
    Fault(
        "cuda swiglu: gate and up change places",
        "cuda/swiglu.cu",
        "store(dgate + f, dg, F - f);\n        store(dup + f, du, F - f);",
        "store(dgate + f, du, F - f);\n        store(dup + f, dg, F - f);",
        CUDA,
    ),
    Fault(
        "cuda logprob: padding takes part",
        "cuda/logprob.cu",
        "v + i < V ? pack[i] * invtemp : -INFINITY;",
        "pack[i] * invtemp;",
        CUDA,
    ),
    Fault(
        "cuda logprob: the sum is not scaled down when the maximum grows",
        "cuda/logprob.cu",
        "if (max > t.max) t = seen_from(t, max);",
        "t.max = max;",
        CUDA,
    ),
    Fault(
        "cuda logprob: no barrier before the warps' tallies are read",
        "cuda/logprob.cu",
        "    __syncthreads();\n",
        "",
        CUDA,
    ),
    Fault(
        "cuda update: a share begins with the tensor",
        "cuda/update.cu",
        "offsets[j] > begin ? offsets[j] : begin",
        "offsets[j]",
        CUDA,
    ),
    Fault(
        "cuda update: the sum of a tensor overwrites that of the one before",
        "cuda/update.cu",
        "squares(x, from, to), j % 2)",
        "squares(x, from, to), 0)",
        CUDA,
    ),
    Fault(
        "cuda update: the tail is as long as the rest",
        "cuda/update.cu",
        "+ threadIdx.x) * FLOATS, count = n - at;",
        "+ threadIdx.x) * FLOATS, count = n - at < 0 ? 0 : FLOATS;",
        CUDA,
    ),
    Fault(
        "cuda linear: a stage is multiplied before it has come",
        "cuda/linear.cu",
        "copy_async_wait<STAGES - 2>();",
        "copy_async_wait<STAGES - 1>();",
        CUDA,
    ),
    Fault(
        "cuda linear: a stage is fetched over before all have read it",
        "cuda/linear.cu",
        "        copy_async_wait<STAGES - 2>();\n        __syncthreads();",
        "        copy_async_wait<STAGES - 2>();\n        if (step % 2 == 0) __syncthreads();",
        CUDA,
    ),
    Fault(
        "cuda linear: stages are fetched in another order than they are read",
        "cuda/linear.cu",
        "stages + step % STAGES * S::STAGE;\n    const int k0",
        "stages + (step + 1) % STAGES * S::STAGE;\n    const int k0",
        CUDA,
    ),
    Fault(
        "cuda linear: rows behind the end of a matrix are read",
        "cuda/linear.cu",
        "there = r0 + r < x.rows && c0 + c < x.cols;",
        "there = c0 + c < x.cols;",
        CUDA,
    ),
    Fault(
        "cuda linear: matrices of the operand change places",
        "cuda/linear.cu",
        "load_matrices(part, tile + S::A::place(m + lane % 16, k + lane / 16 * 8));",
        "load_matrices(part, tile + S::A::place(m + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));",
        CUDA,
    ),
    Fault(
        "cuda linear: what is left of the last chain is not added",
        "cuda/linear.cu",
        "if ((step + 1) % BLOCK > 0 && step + 1 < steps) continue;",
        "if ((step + 1) % BLOCK > 0) continue;",
        CUDA,
    ),
    Fault(
        "cuda linear: a chain goes on where its sum was added",
        "cuda/linear.cu",
        "add_to(total[i][j][e], sum[i][j][e]), sum[i][j][e] = 0.0f;",
        "add_to(total[i][j][e], sum[i][j][e]);",
        CUDA,
    ),
    Fault(
        "cuda linear: the sums of columns leave out the last warp",
        "cuda/linear.cu",
        "for (int w = 0; w < WARPS; w++) all +=",
        "for (int w = 0; w < WARPS - 1; w++) all +=",
        CUDA,
    ),
    Fault(
        "cuda linear: the bias is that of the row",
        "cuda/linear.cuh",
        "load<VEC>(o.bias + n, count);",
        "load<VEC>(o.bias + m, count);",
        CUDA,
    ),
    Fault(
        "emulate: two threads may write one place",
        "cuda/emulate/emulate.cpp",
        "if (u.written == epoch && !ordered(u.write))",
        "if (false)",
        EMULATE,
    ),
    Fault(
        "emulate: a shuffle orders memory",
        "cuda/emulate/emulate.cpp",
        "if (arrive(warp.barrier, WARP, word, nullptr, 0)) release(warp.barrier);",
        "if (arrive(warp.barrier, WARP, word, nullptr, 0)) join(warp.barrier.waiting), release(warp.barrier);",
        EMULATE,
    ),
    Fault(
        "emulate: a barrier of the warp orders nothing",
        "cuda/emulate/emulate.cpp",
        'if (!arrive(b, WARP, "__syncwarp", nullptr, 0)) return wait(b);\n    join(b.waiting);',
        'if (!arrive(b, WARP, "__syncwarp", nullptr, 0)) return wait(b);',
        EMULATE,
    ),
    Fault("emulate: reads are forgotten", "cuda/emulate/emulate.cpp", "if (!ordered(read))", "if (false)", EMULATE),
    Fault(
        "emulate: a copy is there before it is waited for",
        "cuda/emulate/emulate.cpp",
        "units[i.at].pending = current;",
        ";",
        EMULATE,
    ),
    Fault(
        "emulate: what a block before wrote is there",
        "cuda/emulate/emulate.cpp",
        "if (u.written < block.first_epoch)",
        "if (u.written == 0)",
        EMULATE,
    ),
    Fault(
        "emulate: threads may leave while others wait",
        "cuda/emulate/emulate.cpp",
        "if (!block.barriers[0].waiting.empty())",
        "if (false)",
        EMULATE,
    ),
    Fault(
        "emulate: any barrier will do",
        "cuda/emulate/emulate.cpp",
        "if (b.line != line || (file && strcmp(b.file, file)))",
        "if (false)",
        EMULATE,
    ),
    Fault(
        "emulate: all schedules are in order",
        "cuda/emulate/emulate.cpp",
        "if (seed) shuffle_order(order);\n    for (int64_t number",
        "for (int64_t number",
        EMULATE,
    ),
    Fault(
        "emulate: a place behind the array",
        "cuda/emulate/emulate.h",
        "offset + (int64_t)bytes > (int64_t)region.bytes",
        "false",
        EMULATE,
    ),
    Fault(
        "emulate: matrices are never transposed",
        "cuda/emulate/emulate.h",
        "int r = transposed ? q + j : g, c = transposed ? g : q + j;",
        "int r = (void(transposed), g), c = q + j;",
        EMULATE,
    ),
    Fault(
        "emulate: the zeros behind a copy's end are not written",
        "cuda/emulate/emulate.cpp",
        "memset(c.to, 0, 16);",
        "",
        EMULATE,
    ),
    Fault(
        "cuda linear: sums are written over stages that are still read",
        "cuda/linear.cu",
        "    __syncthreads(); /* the stages have been read: their place is free */\n",
        "",
        CUDA,
    ),
    Fault(
        "cuda linear: the tile is written before all sums are in it",
        "cuda/linear.cu",
        "    __syncthreads();\n    write_tile<product, S::BM",
        "    write_tile<product, S::BM",
        CUDA,
    ),
    Fault(
        "cuda sm90: a stage is multiplied in the phase before its bytes come",
        "cuda/linear_sm90.cu",
        "barrier_wait(at.full + ring.stage, ring.parity);",
        "barrier_wait(at.full + ring.stage, ring.parity ^ 1);",
        SM90,
    ),
    Fault(
        "cuda sm90: a stage is filled that is still multiplied",
        "cuda/linear_sm90.cu",
        "            barrier_wait(at.empty + ring.stage, ring.parity ^ 1);\n",
        "",
        SM90,
    ),
    Fault(
        "cuda sm90: a stage is free before its products have read it",
        "cuda/linear_sm90.cu",
        "        wgmma_wait<1>(); /* the stage before has been read */\n        release<S>(at, before);",
        "        release<S>(at, before);\n        wgmma_wait<1>();",
        SM90,
    ),
    Fault(
        "cuda sm90: the last product of a chain is not waited for",
        "cuda/linear_sm90.cu",
        "    wgmma_wait<0>();\n    release<S>(at, before);",
        "    wgmma_wait<1>();\n    release<S>(at, before);",
        SM90,
    ),
    Fault(
        "cuda sm90: the two strides of an operand change places",
        "cuda/linear_sm90.cu",
        "operand(tile + mn * BK, BK * TILE_WIDTH * 2, 8 * TILE_WIDTH * 2)",
        "operand(tile + mn * BK, 8 * TILE_WIDTH * 2, BK * TILE_WIDTH * 2)",
        SM90,
    ),
    Fault(
        "cuda sm90: rows of k go on as rows of m do",
        "cuda/linear_sm90.cu",
        "by_k ? k * TILE_WIDTH * 2 : k * 2",
        "k * 2",
        SM90,
    ),
    Fault(
        "cuda sm90: bytes of one operand alone are expected",
        "cuda/linear_sm90.cu",
        "barrier_expect(full, S::STAGE * (int)sizeof(bf16));",
        "barrier_expect(full, S::BM * BK * (int)sizeof(bf16));",
        SM90,
    ),
    Fault(
        "cuda sm90: staged values do not stay together",
        "cuda/linear_sm90.cu",
        "((c / 4 ^ r % 4 * 2) * 4)",
        "((c / 4 ^ r % 4) * 4)",
        SM90,
    ),
    Fault(
        "cuda sm90: a chain goes on from the one before",
        "cuda/linear_sm90.cu",
        "if (fresh && k == 0) wgmma",
        "if (false && fresh) wgmma",
        SM90,
    ),
    Fault(
        "cuda sm90: a stage begins its sums anew with each product",
        "cuda/linear_sm90.cu",
        "if (fresh && k == 0) wgmma",
        "if (fresh) wgmma",
        SM90,
    ),
    Fault(
        "cuda sm90: mbarriers are used before they are made",
        "cuda/linear_sm90.cu",
        "    __syncthreads();\n    if (threadIdx.x < WARPGROUP) {",
        "    if (threadIdx.x < WARPGROUP) {",
        SM90,
    ),
    Fault(
        "cuda sm90: TMA does not see the mbarriers",
        "cuda/linear_sm90.cu",
        "        barrier_init_fence();\n",
        "",
        SM90,
    ),
    Fault(
        "cuda sm90: a chunk is staged over one that is still read",
        "cuda/linear_sm90.cu",
        "        sync_consumer<S>(consumer); /* the chunk before has been read */\n",
        "",
        SM90,
    ),
    Fault(
        "cuda sm90: a chunk is written before it is staged",
        "cuda/linear_sm90.cu",
        "        sync_consumer<S>(consumer);\n#pragma unroll 1",
        "#pragma unroll 1",
        SM90,
    ),
    Fault(
        "cuda sm90: one warp of each consumer frees a stage",
        "cuda/linear_sm90.cu",
        "barrier_init(at.empty + i, CONSUMERS * WARPGROUP / WARP);",
        "barrier_init(at.empty + i, CONSUMERS);",
        SM90,
    ),
    Fault(
        "cuda sm90: rows and columns of a fragment change places",
        "cuda/linear_sm90.cu",
        "row + i % 4 / 2 * 8, i / 4 * 8 + column + i % 2",
        "row + i % 2 * 8, i / 4 * 8 + column + i % 4 / 2",
        SM90,
    ),
    Fault(
        "cuda sm90: rows behind the last are written",
        "cuda/linear_sm90.cu",
        "if (m0 + r >= M || n >= N) continue;",
        "if (n >= N) continue;",
        SM90,
    ),
    Fault(
        "cuda sm90: both consumers wait at one barrier",
        "cuda/linear_sm90.cu",
        "else sync_group<2>(WARPGROUP);",
        "else sync_group<1>(WARPGROUP);",
        SM90,
    ),
    Fault(
        "cuda sm90: chains before the last are lost",
        "cuda/linear_sm90.cu",
        "step == it.first",
        "true",
        SM90,
    ),
    Fault(
        "cuda sm90: the sums are touched without a fence",
        "cuda/linear_sm90.cu",
        "    wgmma_fence();\n",
        "",
        SM90,
    ),
    Fault(
        "cuda sm90: the parity never turns",
        "cuda/prim_sm90.cuh",
        "stage = 0, parity ^= 1;",
        "stage = 0;",
        SM90,
    ),
    Fault(
        "cuda sm90: tiles of the last group are left out",
        "cuda/linear_sm90.cu",
        "rest / height * S::BN",
        "rest / GROUP * S::BN",
        SM90,
    ),
    Fault(
        "cuda sm90: parts of rows lie at one place",
        "cuda/linear_sm90.cu",
        "        if (S::product == WEIGHT) mine.grad += (int64_t)it.part * work.M * work.N;\n",
        "",
        SM90,
    ),
    Fault(
        "cuda sm90: the last part of the rows is left out",
        "cuda/linear_sm90.cu",
        "p < parts; p++) sum +=",
        "p < parts - 1; p++) sum +=",
        SM90,
    ),
    Fault(
        "cuda sm90: consumers share the place of their totals",
        "cuda/linear_sm90.cu",
        "more(at.totals + t) {}",
        "more(at.totals + t % WARPGROUP) {}",
        SM90,
    ),
    Fault(
        "cuda sm90: tiles of rows of k lie one row apart",
        "cuda/linear_sm90.cu",
        "tile_load(to + i * BK, map,",
        "tile_load(to + i, map,",
        SM90,
    ),
    Fault(
        "cuda sm90: working memory for all parts but one",
        "cuda/linear_sm90.cu",
        "(size_t)parts * (size_t)M",
        "(size_t)(parts - 1) * (size_t)M",
        SM90,
    ),
    Fault(
        "cuda attention sm90: the queries are not waited for",
        "cuda/attention_sm90.cu",
        "        barrier_wait(at.queries_full + place.stage, place.parity);\n",
        "",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: the keys are not waited for",
        "cuda/attention_sm90.cu",
        "        if (!block.seen) return;\n        barrier_wait(at.keys_full + block.at.stage, block.at.parity);\n",
        "        if (!block.seen) return;\n",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: the values are not waited for",
        "cuda/attention_sm90.cu",
        "        barrier_wait(at.values_full + block.at.stage, block.at.parity);\n",
        "",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: a block that is not seen is let go before it comes",
        "cuda/attention_sm90.cu",
        "            blocks.wait_for_keys(block);\n",
        "",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: a stage is free before its values are multiplied",
        "cuda/attention_sm90.cu",
        "            slice.add_block(at, queries, s, block, s_next, next, x);\n            blocks.release(block);\n",
        "            blocks.release(block);\n            slice.add_block(at, queries, s, block, s_next, next, x);\n",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: a stage is filled that is still multiplied",
        "cuda/attention_sm90.cu",
        "                barrier_wait(at.empty + stage, ring.parity ^ 1);\n",
        "",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: a stage is free when one consumer has done with it",
        "cuda/attention_sm90.cu",
        "barrier_init(at.empty + i, CONSUMERS * WARPGROUP / WARP);",
        "barrier_init(at.empty + i, WARPGROUP / WARP);",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: queries come where outputs are still stored",
        "cuda/attention_sm90.cu",
        "            tile_store_wait_read<0>();\n            barrier_arrive(at.queries_empty + place.stage);\n",
        "            barrier_arrive(at.queries_empty + place.stage);\n            tile_store_wait_read<0>();\n",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: the place of queries is filled a phase too early",
        "cuda/attention_sm90.cu",
        "barrier_wait(at.queries_empty + place.stage, place.parity ^ 1);",
        "barrier_wait(at.queries_empty + place.stage, 1);",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: outputs are stored before TMA sees them",
        "cuda/attention_sm90.cu",
        "        fence_async();\n        sync_consumer(consumer);\n        if",
        "        sync_consumer(consumer);\n        if",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: outputs are stored before all are there",
        "cuda/attention_sm90.cu",
        "        fence_async();\n        sync_consumer(consumer);\n        if",
        "        fence_async();\n        if",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: a value behind the last key is not cleared",
        "cuda/attention_sm90.cu",
        "clear_rows<W>(at.values(stage), here);",
        "clear_rows<W>(at.values(stage), here + 1);",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: cleared values are not seen by the tensor cores",
        "cuda/attention_sm90.cu",
        "                fence_async();\n                __syncwarp();\n",
        "                __syncwarp();\n",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: values are cleared before they have come",
        "cuda/attention_sm90.cu",
        "                barrier_wait(at.landed, landed);\n",
        "",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: values that are cleared are waited for once",
        "cuda/attention_sm90.cu",
        "                landed ^= 1;\n",
        "",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: factors of the other row",
        "cuda/attention_sm90.cu",
        "sum = fmaf(sum, keep[0][i % 4 / 2], c[i]);",
        "sum = fmaf(sum, keep[0][i % 2], c[i]);",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: values 8 keys on",
        "cuda/attention_sm90.cuh",
        "operand_behind(b, k * 2 * LINES)",
        "operand_behind(b, k * LINES)",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: the first half of a head twice",
        "cuda/attention_sm90.cuh",
        "const int tile = k / TILE_WIDTH * TILE, bytes",
        "const int tile = 0, bytes",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: keys behind a query are seen",
        "cuda/attention_sm90.cu",
        "x.first + row + 1 - block.k0 >= KEY_BLOCK;",
        "x.first + row + 16 - block.k0 >= KEY_BLOCK;",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: blocks that the first queries do not see are not let go",
        "cuda/attention_sm90.cu",
        "        while (block.there) skip();\n",
        "",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: another head's keys",
        "cuda/attention_sm90.cu",
        "work.NH + h / (work.NH / work.NKV)",
        "work.NH + h % work.NKV",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: matrices of an output change places",
        "cuda/attention_sm90.cuh",
        "lane / 8 % 2 * 8 + lane % 8",
        "lane / 16 % 2 * 8 + lane % 8",
        ATTENTION_SM90,
    ),
    Fault(
        "cuda attention sm90: outputs go to the first row of a batch",
        "cuda/attention_sm90.cuh",
        "tile_store(map, from + c * SLICE, t, h * W + c, b)",
        "tile_store(map, from + c * SLICE, t, h * W + c, 0)",
        ATTENTION_SM90,
    ),
    Fault(
        "emulate sm90: what a product reads may be written over",
        "cuda/emulate/async.h",
        "        u.readers++, u.reader = current;\n",
        "        u.readers++, u.readers = 0;\n",
        EMULATE_SM90,
    ),
    Fault(
        "emulate sm90: a product needs no wgmma_fence",
        "cuda/emulate/async.h",
        "if (!sums.under_way && sums.touched_after == async_me().fences)",
        "if (false)",
        EMULATE_SM90,
    ),
    Fault(
        "emulate sm90: sums may be touched at any time",
        "cuda/emulate/async.h",
        'if (under_way) fail("sums are touched before wgmma_wait");',
        "",
        EMULATE_SM90,
    ),
    Fault(
        "emulate sm90: what threads wrote TMA sees at once",
        "cuda/emulate/async.h",
        "        if (u.unfenced)\n",
        "        if (false)\n",
        EMULATE_SM90,
    ),
    Fault(
        "emulate sm90: mbarriers order nothing",
        "cuda/emulate/async.h",
        "    merge(block.threads[(size_t)current].seen, b.released);\n",
        "",
        EMULATE_SM90,
    ),
    Fault(
        "emulate sm90: an mbarrier's phase does not wait for bytes",
        "cuda/emulate/async.h",
        "if (b.missing > 0 || b.bytes != 0) return;",
        "if (b.missing > 0) return;",
        EMULATE_SM90,
    ),
    Fault(
        "emulate sm90: rows behind the end of a matrix come with other values",
        "cuda/emulate/async.h",
        "i >= 0 && i < map.rows && j >= 0 && j < map.cols &&",
        "i >= 0 && i < map.rows && j >= 0 &&",
        EMULATE_SM90,
    ),
    Fault(
        "emulate sm90: the swizzle turns other bits",
        "cuda/emulate/async.h",
        "(offset ^ (offset >> 7 & 7) << 4)",
        "(offset ^ (offset >> 7 & 3) << 4)",
        EMULATE_SM90,
    ),
]


class Tree:
    """A copy of the project, with a build folder for each instruction set."""

    def __init__(self, folder):
        self.folder = folder
        for name in TREE:
            copy_changed(ROOT / name, folder / name)
        self.environment = os.environ | {
            "PYTHONPATH": str(folder / "python"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "BARELM_TEST_DATA": os.environ.get("BARELM_TEST_DATA", ""),
        }
        if not self.environment["BARELM_TEST_DATA"]:
            del self.environment["BARELM_TEST_DATA"]

    def build(self, isa):
        """Compile what changed; the text of the errors, or None."""
        build = self.folder / f"build_{isa}"
        others = [f"-DBARELM_CAN_BUILD_{name}=0" for name in INSTRUCTION_SETS if name != isa]
        configure = [
            "cmake",
            "-S",
            self.folder,
            "-B",
            build,
            "-Wno-dev",
            "-DBARELM_WERROR=OFF",
            f"-DPython_EXECUTABLE={sys.executable}",
            *others,
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        for command in ([] if (build / "CMakeCache.txt").exists() else [configure]) + [
            ["cmake", "--build", build, "-j", "2"]
        ]:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return done.stdout + done.stderr
        package = self.folder / "python" / "barelm"
        for old in package.glob("_core*.so"):
            old.unlink()
        for new in build.glob("_core*.so"):
            shutil.copy(new, package)
        return None

    def test(self, isa, *files):
        """(whether all passed, the first that failed or how it ended)"""
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow and not peers",
            *files,
        ]
        try:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env=self.environment | {"BARELM_ISA": isa},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=400,
            )
        except subprocess.TimeoutExpired:
            return False, "the tests never end"
        failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
        crashed = re.search(r"line \d+ in (test_\w+)", done.stdout)
        where = crashed[1] if crashed else done.stdout[-200:]
        said = failed[1] if failed else f"exit code {done.returncode} in {where}"
        return done.returncode == 0, said


def copy_changed(source, target):
    """Copy what is new: files that are left alone keep their time, and are not built again."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for entry in source.iterdir():
            if entry.name not in ("__pycache__", "build") and entry.suffix != ".so":
                copy_changed(entry, target / entry.name)
    elif source.exists() and not (target.exists() and target.read_bytes() == source.read_bytes()):
        shutil.copy(source, target)


def plant(tree, fault):
    """(caught, how)"""
    path = tree.folder / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        return False, f"the text to change is there {text.count(fault.old)} times, must be once"
    path.write_text(text.replace(fault.old, fault.new))
    try:
        errors = tree.build(fault.isa)
        if errors:
            return False, "does not compile: " + errors[-500:]
        for files in ([fault.first], sorted(set(ALL) - {fault.first})):
            passed, said = tree.test(fault.isa, *files)
            if not passed:
                return True, said
        return False, "all tests pass"
    finally:
        path.write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only faults whose description holds one of these")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    parser.add_argument("--skip-clean", action="store_true", help="do not run the tests without a fault first")
    args = parser.parse_args()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    faults = [f for f in FAULTS if not args.words or any(word in f.what for word in args.words)]
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        tree = Tree((args.keep or Path(folder)).resolve())
        if not args.skip_clean:
            errors = tree.build("avx2")
            passed, said = (False, errors) if errors else tree.test("avx2", *ALL)
            if not passed:
                sys.exit(f"without any fault: {said}")
        missed = []
        for fault in faults:
            if fault.isa not in flags:
                print(f"left out    {fault.what}: this machine has no {fault.isa}", flush=True)
                continue
            start = time.monotonic()
            caught, how = plant(tree, fault)
            print(
                f"{'caught' if caught else 'NOT CAUGHT':11} {fault.what} [{time.monotonic() - start:.0f} s]: {how}",
                flush=True,
            )
            if not caught:
                missed.append(fault.what)
    print(f"{len(faults) - len(missed)} of {len(faults)} faults caught")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
