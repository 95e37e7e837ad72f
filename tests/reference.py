"""Every operator of csrc/ops.def and both whole transformers in NumPy, float64, as close to the formula as can be.

These are the definitions: test_reference.py holds each backward against finite differences of its forward, test_ops.py
holds every backend against the operators, and the tests of the model use the transformers.

Letters as in ops.def: B batch, T time, N rows, C channels in, OC channels out, F width of the MLP, V vocabulary, NH
query heads, NKV key/value heads, HS head size, P positions.  `starts` (B, T) or None: the first key a query may see.
"""

import math

import numpy as np

erf = np.vectorize(math.erf, otypes=[np.float64])


def bf16(x):
    """`x` rounded to bf16, nearest even, as PREC_BF16 rounds its operands.  Takes finite float32 values."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def positions(B, T, starts=None):  # -> (B, T): where each token stands, counted from its starts
    t = np.broadcast_to(np.arange(T), (B, T))
    return t if starts is None else t - starts


# ---- embedding


def embedding_forward(tokens, wte, wpe=None, starts=None):  # (B, T), (V, C), (P, C) -> (B, T, C)
    out = wte[tokens]
    return out if wpe is None else out + wpe[positions(*tokens.shape, starts)]


def embedding_backward(dout, tokens, V, P=None, starts=None):  # (B, T, C), (B, T) -> (V, C), (P, C)
    dwte = np.zeros((V, dout.shape[-1]), dout.dtype)
    np.add.at(dwte, tokens, dout)
    if P is None:
        return dwte, None
    dwpe = np.zeros((P, dout.shape[-1]), dout.dtype)
    np.add.at(dwpe, positions(*tokens.shape, starts), dout)
    return dwte, dwpe


# ---- norms.  `dres` is the gradient that reaches x by other ways; dbias_in is the column sum of dx.


def layernorm_forward(x, weight, bias=None, eps=1e-5):  # (..., C), (C), (C) -> (..., C), (...), (...)
    mean = x.mean(-1)
    rstd = 1 / np.sqrt(((x - mean[..., None]) ** 2).mean(-1) + eps)
    out = (x - mean[..., None]) * rstd[..., None] * weight
    return (out if bias is None else out + bias), mean, rstd


def layernorm_backward(dout, x, weight, mean, rstd, dres=None):  # -> dx (..., C), dweight, dbias, dbias_in (C)
    rows = tuple(range(x.ndim - 1))
    xhat = (x - mean[..., None]) * rstd[..., None]
    dxhat = dout * weight
    dx = dxhat - dxhat.mean(-1, keepdims=True) - xhat * (dxhat * xhat).mean(-1, keepdims=True)
    dx = dx * rstd[..., None] + (0 if dres is None else dres)
    return dx, (dout * xhat).sum(rows), dout.sum(rows), dx.sum(rows)


def rmsnorm_forward(x, weight, eps=1e-5):  # (..., C), (C) -> (..., C), (...)
    rstd = 1 / np.sqrt((x**2).mean(-1) + eps)
    return x * rstd[..., None] * weight, rstd


def rmsnorm_backward(dout, x, weight, rstd, dres=None):  # -> dx (..., C), dweight, dbias_in (C)
    rows = tuple(range(x.ndim - 1))
    xhat = x * rstd[..., None]
    dxhat = dout * weight
    dx = (dxhat - xhat * (dxhat * xhat).mean(-1, keepdims=True)) * rstd[..., None] + (0 if dres is None else dres)
    return dx, (dout * xhat).sum(rows), dx.sum(rows)


# ---- activations and the linear layer


def gelu_erf(x):  # x times the normal distribution's cumulative function
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def gelu_erf_derivative(x):
    return 0.5 * (1 + erf(x / math.sqrt(2))) + x * np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_tanh_derivative(x):
    t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)


FUNCTIONS = {"none": lambda x: x, "gelu_tanh": gelu_tanh, "gelu_erf": gelu_erf}
DERIVATIVES = {"none": np.ones_like, "gelu_tanh": gelu_tanh_derivative, "gelu_erf": gelu_erf_derivative}


def linear_forward(x, weight, bias=None, residual=None, fn="none"):  # (..., C), (OC, C), (OC) -> out, pre (..., OC)
    pre = x @ weight.T + (0 if bias is None else bias)
    return FUNCTIONS[fn](pre) + (0 if residual is None else residual), pre


def lora_spread(blocks, rows, OC):  # (sum of the groups' rows, r), (J, 2) -> (OC, J r)
    r, at = blocks.shape[1], 0
    dense = np.zeros((OC, len(rows) * r), blocks.dtype)
    for j, (begin, end) in enumerate(rows):
        dense[begin:end, j * r : (j + 1) * r] = blocks[at : at + end - begin]
        at += end - begin
    return dense


def lora_gather(dense, rows, r):  # (OC, J r) -> (sum of the groups' rows, r)
    return np.concatenate([dense[begin:end, j * r : (j + 1) * r] for j, (begin, end) in enumerate(rows)])


def int8(x, group=64):
    """x (N, C) -> q (N, groups, 64) integers, scale (N, groups): a group's scale is its greatest magnitude / 127.  In
    fp32 as the operators compute it, because a last bit decides where q is rounded to."""
    N, C = x.shape
    padded = np.pad(x.astype(np.float32), ((0, 0), (0, -C % group))).reshape(N, -1, group)
    most = np.abs(padded).max(-1)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    return np.rint(padded * inverse[..., None]).astype(np.int64), (most / np.float32(127)).astype(np.float64)


def linear_int8(x, weight):
    """The products of each group times both scales: (N, OC, groups); their sum is x @ weight^T."""
    (q, scale), (qw, scale_w) = int8(x), int8(weight)
    return np.einsum("ngi,ogi->nog", q, qw) * scale[:, None] * scale_w[None]


def linear_backward_input(dout, weight, pre=None, fn="none", dres=None):  # (..., OC), (OC, C), (..., C) -> (..., C)
    dx = dout @ weight
    return (dx if fn == "none" else dx * DERIVATIVES[fn](pre)) + (0 if dres is None else dres)


def linear_backward_weight(dout, x):  # (..., OC), (..., C) -> dweight (OC, C), dbias (OC)
    dout, x = dout.reshape(-1, dout.shape[-1]), x.reshape(-1, x.shape[-1])
    return dout.T @ x, dout.sum(0)


def sigmoid(x):
    e = np.exp(-np.abs(x))  # at most 1: no overflow on either side
    return np.where(x >= 0, 1, e) / (1 + e)


def swiglu_forward(x):  # (..., 2F): gate, up -> (..., F)
    gate, up = np.split(x, 2, -1)
    return gate * sigmoid(gate) * up


def swiglu_backward(dout, x):  # (..., F), (..., 2F) -> (..., 2F): dgate, dup
    gate, up = np.split(x, 2, -1)
    s = sigmoid(gate)
    return np.concatenate([dout * up * s * (1 + gate * (1 - s)), dout * gate * s], -1)


# ---- positions and attention


def rope_tables(P, HS, theta=10000.0):  # -> cos, sin (P, HS/2)
    angles = np.arange(P)[:, None] * theta ** (-2 * np.arange(HS // 2) / HS)
    return np.cos(angles), np.sin(angles)


def rope_forward(qkv, cos, sin, NH, NKV, starts=None):  # (B, T, (NH + 2 NKV) HS), (P, HS/2) -> as qkv
    B, T, _ = qkv.shape
    p = positions(B, T, starts)
    c, s = cos[p][:, :, None], sin[p][:, :, None]
    x = qkv.reshape(B, T, NH + 2 * NKV, -1)
    a, b = np.split(x[:, :, : NH + NKV], 2, -1)
    turned = np.concatenate([a * c - b * s, b * c + a * s], -1)
    return np.concatenate([turned, x[:, :, NH + NKV :]], 2).reshape(qkv.shape)


def rope_backward(dqkv, cos, sin, NH, NKV, starts=None):  # the transpose of a turn is the turn by the opposite angle
    return rope_forward(dqkv, cos, -sin, NH, NKV, starts)


def split_heads(qkv, NH, NKV):  # (B, T, (NH + 2 NKV) HS) -> q (B, NH, T, HS), k, v (B, NKV, T, HS)
    B, T, _ = qkv.shape
    x = qkv.reshape(B, T, NH + 2 * NKV, -1).transpose(0, 2, 1, 3)
    return x[:, :NH], x[:, NH : NH + NKV], x[:, NH + NKV :]


def merge_heads(x):  # (B, H, T, HS) -> (B, T, H HS)
    B, H, T, HS = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, H * HS)


def visible(B, T, starts=None):  # -> (B, 1, T, T) bool: may query t see key j
    first = np.zeros((B, T), int) if starts is None else starts
    j = np.arange(T)
    return ((j <= j[:, None]) & (j >= first[..., None]))[:, None]


def attention_forward(qkv, NH, NKV, starts=None):
    """-> out (B, T, NH HS), lse (B, NH, T), scores and probabilities (B, NH, T, T); an unseen score is -inf."""
    B, T, _ = qkv.shape
    q, k, v = split_heads(qkv, NH, NKV)
    k, v = (np.repeat(x, NH // NKV, 1) for x in (k, v))
    scores = np.where(visible(B, T, starts), q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]), -np.inf)
    top = scores.max(-1, keepdims=True)
    e = np.exp(scores - top)
    total = e.sum(-1, keepdims=True)
    probs = e / total
    return merge_heads(probs @ v), (top + np.log(total))[..., 0], scores, probs


def attention_backward(dout, qkv, NH, NKV, starts=None):  # (B, T, NH HS), (B, T, (NH + 2 NKV) HS) -> as qkv
    B, T, _ = qkv.shape
    G, HS = NH // NKV, dout.shape[-1] // NH
    q, k, v = split_heads(qkv, NH, NKV)
    k, v = (np.repeat(x, G, 1) for x in (k, v))
    probs = attention_forward(qkv, NH, NKV, starts)[3]
    do = dout.reshape(B, T, NH, HS).transpose(0, 2, 1, 3)
    dprobs = do @ v.swapaxes(-1, -2)
    dscores = probs * (dprobs - (probs * dprobs).sum(-1, keepdims=True)) / math.sqrt(HS)
    dq, dk, dv = dscores @ k, dscores.swapaxes(-1, -2) @ q, probs.swapaxes(-1, -2) @ do
    dk, dv = (x.reshape(B, NKV, G, T, HS).sum(2) for x in (dk, dv))  # a key/value head gathers from its queries
    return np.concatenate([merge_heads(x) for x in (dq, dk, dv)], -1)


# ---- head


def logprob_forward(logits, targets, invtemp=1.0):  # (..., V), (...) -> logprobs, lse, entropy (...)
    z = logits * invtemp
    top = z.max(-1, keepdims=True)
    lse = (top + np.log(np.exp(z - top).sum(-1, keepdims=True)))[..., 0]
    picked = np.take_along_axis(z, np.maximum(targets, 0)[..., None], -1)[..., 0]
    logp = z - lse[..., None]
    return np.where(targets < 0, 0.0, picked - lse), lse, -(np.exp(logp) * logp).sum(-1)


def logprob_backward(dlogprobs, logits, targets, invtemp=1.0):  # -> dlogits (..., V)
    _, lse, _ = logprob_forward(logits, targets, invtemp)
    d = np.where(targets < 0, 0.0, dlogprobs)[..., None] * invtemp
    onehot = np.arange(logits.shape[-1]) == targets[..., None]
    return d * (onehot - np.exp(logits * invtemp - lse[..., None]))


def sample_probabilities(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):  # (V) -> (V): what is drawn from
    p = np.exp((logits - logits.max()) / temperature)
    kept = np.argsort(-logits, kind="stable")  # stable: of equals the lower id comes first
    if top_k:
        kept = kept[: int(top_k)]
    if top_p < 1:
        mass = np.cumsum(p[kept])
        kept = kept[: 1 + np.searchsorted(mass, top_p * mass[-1])]
    kept = kept[p[kept] >= min_p]
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


def sample(logits, options, u):  # (N, V), (N, 4), (N) -> tokens, logprobs (N)
    tokens, logprobs = np.full(len(logits), -1), np.full(len(logits), np.nan)
    for n, (x, (temperature, *kept)) in enumerate(zip(logits, options, strict=True)):
        if not np.isfinite(x.max()):
            continue
        if temperature == 0:
            tokens[n], logprobs[n] = x.argmax(), 0
            continue
        p = sample_probabilities(x, temperature, *kept)
        mass = np.cumsum(p)
        token = np.searchsorted(mass, u[n] * mass[-1], side="right")
        tokens[n] = min(token, np.flatnonzero(p)[-1])  # u * mass may round up to mass
        logprobs[n] = math.log(p[tokens[n]])
    return tokens, logprobs


# ---- update


def square_sums(x, offsets):  # (n values), (n + 1) -> (n)
    return np.array([(x[offsets[j] : offsets[j + 1]] ** 2).sum() for j in range(len(offsets) - 1)])


def loss(logprobs, dlogprobs):  # (N), (N)
    return (logprobs * dlogprobs).sum()


def clip_scale(sums, max_norm):  # (n) -> scale, norm
    norm = math.sqrt(sums.sum())
    return (max_norm / norm if norm > max_norm > 0 else 1.0), norm


def adamw(weights, m, v, grads, lr, betas, eps, weight_decay, step, scale=1.0):  # -> weights, m, v
    g = grads * scale
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g**2
    mhat, vhat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    return weights - lr * (mhat / (np.sqrt(vhat) + eps) + weight_decay * weights), m, v


# ---- the two transformers
#
# One text for both families.  Inside, every matrix is (out, in) and one tensor may be several of Hugging Face's, one
# below the other: queries, keys and values; gate and up.  `layout` is the only place that knows the names.


def block_name(config, n):
    return f"h.{n}." if config.norm == "layernorm" else f"layers.{n}."


def layout(config):
    """Yield (own name, [(Hugging Face's name, rows)], columns or None for a vector, whether theirs is [in, out])."""
    c, gpt2 = config, config.norm == "layernorm"
    C, Q, KV, F = c.n_embd, c.n_head * c.head_size, c.n_kv_head * c.head_size, c.n_inner
    gated = 2 if c.act == "swiglu" else 1

    def linear(name, parts, columns):
        yield name + "_w", [(part + ".weight", rows) for part, rows in parts], columns, gpt2
        if c.bias:
            yield name + "_b", [(part + ".bias", rows) for part, rows in parts], None, False

    def norm(name, part):
        yield name + "_w", [(part + ".weight", C)], None, False
        if gpt2 and c.bias:
            yield name + "_b", [(part + ".bias", C)], None, False

    yield "wte", [("wte.weight" if gpt2 else "embed_tokens.weight", c.vocab_size)], C, False
    if c.pos == "learned":
        yield "wpe", [("wpe.weight" if gpt2 else "embed_positions.weight", c.context)], C, False
    for n in range(c.n_layer):
        h = block_name(c, n)
        if gpt2:
            ln1, ln2, qkv = h + "ln_1", h + "ln_2", [(h + "attn.c_attn", Q + 2 * KV)]
            proj, fc, down = h + "attn.c_proj", [(h + "mlp.c_fc", gated * F)], h + "mlp.c_proj"
        else:
            ln1, ln2 = h + "input_layernorm", h + "post_attention_layernorm"
            qkv = [(h + f"self_attn.{x}_proj", rows) for x, rows in zip("qkv", (Q, KV, KV), strict=True)]
            fc = [(h + f"mlp.{x}_proj", F) for x in ("gate", "up")[-gated:]]
            proj, down = h + "self_attn.o_proj", h + "mlp.down_proj"
        yield from norm(f"ln1_{n}", ln1)
        yield from linear(f"qkv_{n}", qkv, C)
        yield from linear(f"proj_{n}", [(proj, C)], Q)
        yield from norm(f"ln2_{n}", ln2)
        yield from linear(f"fc_{n}", fc, C)
        yield from linear(f"down_{n}", [(down, C)], F)
    yield from norm("lnf", "ln_f" if gpt2 else "norm")
    if not c.tied:
        yield "head", [("lm_head.weight", c.vocab_size)], C, False


def param_shapes(config):
    """{Hugging Face's name, without the base model's prefix: its shape there}."""
    shapes = {}
    for _, parts, columns, transposed in layout(config):
        for name, rows in parts:
            shape = (rows,) if columns is None else (rows, columns)
            shapes[name] = shape[::-1] if transposed else shape
    return shapes


def from_huggingface(params, config):
    p = {}
    for own, parts, _, transposed in layout(config):
        arrays = [np.asarray(params[name], np.float64) for name, _ in parts]
        p[own] = np.concatenate([a.T for a in arrays] if transposed else arrays)
    return p


def to_huggingface(grads, config):
    out = {}
    for own, parts, _, transposed in layout(config):
        pieces = np.split(grads[own], np.cumsum([rows for _, rows in parts])[:-1])
        for (name, _), piece in zip(parts, pieces, strict=True):
            out[name] = piece.T if transposed else piece
    return out


def norm_forward(x, p, name, config):  # -> out and what its backward needs
    if config.norm == "layernorm":
        out, *saved = layernorm_forward(x, p[name + "_w"], p.get(name + "_b"), config.norm_eps)
    else:
        out, *saved = rmsnorm_forward(x, p[name + "_w"], config.norm_eps)
    return out, saved


def norm_backward(dout, x, p, g, name, config, dres=None):  # -> dx; adds the parameters' gradients to g
    _, saved = norm_forward(x, p, name, config)
    if config.norm == "layernorm":
        dx, g[name + "_w"], g[name + "_b"], _ = layernorm_backward(dout, x, p[name + "_w"], *saved, dres)
    else:
        dx, g[name + "_w"], _ = rmsnorm_backward(dout, x, p[name + "_w"], *saved, dres)
    return dx


def linear_backward(dout, x, p, g, name):  # -> dx; adds the parameters' gradients to g
    g[name + "_w"], g[name + "_b"] = linear_backward_weight(dout, x)
    return linear_backward_input(dout, p[name + "_w"])


def transformer_forward(params, config, tokens, targets, starts=None, temperature=1.0):
    """GPT-2 (Radford et al. 2019) or Llama (Touvron et al. 2023), as `config` says.

    params: {Hugging Face's name without the base model's prefix: float64 array of its shape there}; targets (B, T), -1
    where there is none.  Returns a dict: logits (B, T, V), before the temperature; logprobs, lse, entropy (B, T);
    residual_final and hidden (B, T, C), before and after the final norm; and of block n, each name under "h.n." for
    GPT-2 and "layers.n." for Llama (the names of csrc/model.def, and four that only the reference can show: *):
      residual, residual_mid (B, T, C)       the residual stream before the block, and after attention has been added
      ln_1, ln_2 (B, T, C)                   the norms
      attn.qkv (B, T, (NH + 2 NKV) HS)       after RoPE; attn.qkv_linear* before it
      attn.scores*, attn.probs* (B, NH, T, T)  before and after the softmax; an unseen score is -inf
      attn.heads (B, T, NH HS)               the heads, side by side; attn.lse* (B, NH, T)
      mlp.fc (B, T, F, or 2F: gate, up), mlp.act (B, T, F)  before and after the function
    """
    p, c, f = from_huggingface(params, config), config, {}
    tables = rope_tables(tokens.shape[1], c.head_size, c.rope_theta) if c.pos == "rope" else None
    x = embedding_forward(tokens, p["wte"], p.get("wpe"), starts)
    for n in range(c.n_layer):
        b = {"residual": x}
        b["ln_1"], _ = norm_forward(x, p, f"ln1_{n}", c)
        b["attn.qkv_linear"], _ = linear_forward(b["ln_1"], p[f"qkv_{n}_w"], p.get(f"qkv_{n}_b"))
        b["attn.qkv"] = b["attn.qkv_linear"]
        if tables:
            b["attn.qkv"] = rope_forward(b["attn.qkv"], *tables, c.n_head, c.n_kv_head, starts)
        attended = attention_forward(b["attn.qkv"], c.n_head, c.n_kv_head, starts)
        b["attn.heads"], b["attn.lse"], b["attn.scores"], b["attn.probs"] = attended
        b["residual_mid"], _ = linear_forward(b["attn.heads"], p[f"proj_{n}_w"], p.get(f"proj_{n}_b"), x)
        b["ln_2"], _ = norm_forward(b["residual_mid"], p, f"ln2_{n}", c)
        b["mlp.fc"], _ = linear_forward(b["ln_2"], p[f"fc_{n}_w"], p.get(f"fc_{n}_b"))
        b["mlp.act"] = swiglu_forward(b["mlp.fc"]) if c.act == "swiglu" else FUNCTIONS[c.act](b["mlp.fc"])
        x, _ = linear_forward(b["mlp.act"], p[f"down_{n}_w"], p.get(f"down_{n}_b"), b["residual_mid"])
        f |= {block_name(c, n) + name: value for name, value in b.items()}
    f["residual_final"] = x
    f["hidden"], _ = norm_forward(x, p, "lnf", c)
    f["logits"] = f["hidden"] @ p["wte" if c.tied else "head"].T
    f["logprobs"], f["lse"], f["entropy"] = logprob_forward(f["logits"], targets, 1 / temperature)
    return f


def transformer_backward(params, config, tokens, targets, dlogprobs, dhidden=None, starts=None, temperature=1.0):
    """Gradient of sum(dlogprobs * logprobs) + sum(dhidden * hidden) in every parameter, under the names of `params`.

    dlogprobs (B, T); dhidden (B, T, C) or None; the rest as in transformer_forward.
    """
    p, c, g = from_huggingface(params, config), config, {}
    f = transformer_forward(params, config, tokens, targets, starts, temperature)
    tables = rope_tables(tokens.shape[1], c.head_size, c.rope_theta) if c.pos == "rope" else None
    dlogits = logprob_backward(dlogprobs, f["logits"], targets, 1 / temperature)
    dhead, _ = linear_backward_weight(dlogits, f["hidden"])
    d = dlogits @ p["wte" if c.tied else "head"] + (0 if dhidden is None else dhidden)
    d = norm_backward(d, f["residual_final"], p, g, "lnf", c)
    for n in reversed(range(c.n_layer)):
        b = {
            name: f[block_name(c, n) + name]
            for name in ("residual", "ln_1", "attn.qkv", "attn.heads", "residual_mid", "ln_2", "mlp.fc", "mlp.act")
        }
        dact = linear_backward(d, b["mlp.act"], p, g, f"down_{n}")
        dfc = swiglu_backward(dact, b["mlp.fc"]) if c.act == "swiglu" else dact * DERIVATIVES[c.act](b["mlp.fc"])
        dln2 = linear_backward(dfc, b["ln_2"], p, g, f"fc_{n}")
        d = norm_backward(dln2, b["residual_mid"], p, g, f"ln2_{n}", c, dres=d)
        dheads = linear_backward(d, b["attn.heads"], p, g, f"proj_{n}")
        dqkv = attention_backward(dheads, b["attn.qkv"], c.n_head, c.n_kv_head, starts)
        if tables:
            dqkv = rope_backward(dqkv, *tables, c.n_head, c.n_kv_head, starts)
        dln1 = linear_backward(dqkv, b["ln_1"], p, g, f"qkv_{n}")
        d = norm_backward(dln1, b["residual"], p, g, f"ln1_{n}", c, dres=d)
    g["wte"], g["wpe"] = embedding_backward(d, tokens, c.vocab_size, c.context if "wpe" in p else None, starts)
    g["wte"], g["head"] = (g["wte"] + dhead if c.tied else g["wte"]), dhead
    return to_huggingface(g, config)
