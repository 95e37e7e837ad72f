"""GPT-2 in plain PyTorch, the peer of tests and benchmarks: fused attention, one cross entropy, nothing around it.

Parameters have Hugging Face's names; Linear weights are [out, in] here, so those that the names call Conv1D are turned
when barelm's are loaded.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        q, k, v = (a.view(B, T, self.n_head, -1).transpose(1, 2) for a in self.c_attn(x).split(C, dim=2))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(heads.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.approximate = {"gelu_tanh": "tanh", "gelu_erf": "none"}[config.act]

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """The tied GPT-2 that a barelm.Config describes."""

    def __init__(self, config):
        super().__init__()
        assert config.norm == "layernorm" and config.pos == "learned" and config.tied
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)

    def forward(self, tokens, targets, reduction="mean"):  # (B, T), (B, T) -> loss, targets of -1 left out
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)

    @torch.no_grad()
    def load(self, params):
        """Take barelm's parameters, {name: array}; none may be missing or left over."""
        own = dict(self.named_parameters())
        assert set(own) == set(params), sorted(set(own) ^ set(params))
        for name, p in own.items():
            value = torch.tensor(params[name])
            p.copy_(value.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else value)
        return self


def adamw(model, lr, betas, eps, weight_decay, **options):
    """torch.optim.AdamW with barelm's groups: decay on tensors of two dimensions."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() == 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, **options)
