"""PlainSession: what barelm.Session says, found by running every row whole, with pages counted as real ones would be.

It is the test double of what stands on a session, and the oracle for the session itself.
"""

import functools
from types import SimpleNamespace

import numpy as np
from barelm.drawing import draw
from barelm.session import CacheFull, StaleRow

PAGE = 64


class PlainSession:
    """barelm.Session without a cache: see there.  `page`: tokens of a page."""

    def __init__(self, model, max_tokens=4096, weights=None, page=PAGE):
        self.model, self.config, self.page = model, model.config, page
        self.holders = {}  # of each page in use: how many rows share it
        self.pages = -(-max_tokens // page)
        self.rows = {}
        self.made = self.pages_made = 0
        self.last = []  # the rows of the last step, as they were after it
        # one text is asked about again and again: a model is a function of its tokens as long as its weights stay
        self._logits = functools.lru_cache(None)(lambda version, ids: model.logits(np.array([ids], np.int32))[0])

    @property
    def room(self):
        return self.pages - len(self.holders)

    @property
    def version(self):
        return getattr(self.model, "version", getattr(self.model, "step", 0))

    def add(self):
        return self._row([], [], self.version)

    def fork(self, row, n=1):
        source = self._known(row)
        for page in source.pages:
            self.holders[page] += n
        return [self._row(source.ids, source.pages, source.version) for _ in range(n)]

    def length(self, row):
        return len(self._known(row).ids)

    def free(self, row):
        for page in self._known(row).pages:
            self._let_go(page)
        del self.rows[row]

    def pages_needed(self, rows, counts):
        self._check_rows(rows)
        holders, needed = dict(self.holders), 0
        for row, count in zip(map(self._known, rows), counts, strict=True):
            if len(row.ids) + count > self.config.context:
                raise ValueError(f"a row of {len(row.ids) + count} tokens, the context is {self.config.context}")
            needed += -(-(len(row.ids) + count) // self.page) - len(row.pages)
            if count and len(row.ids) % self.page and holders[row.pages[-1]] > 1:  # the first to write copies
                holders[row.pages[-1]] -= 1
                needed += 1
        return needed

    def step(self, rows, chunks):
        self.advance(rows, chunks)
        return self.logits()

    def advance(self, rows, chunks):
        self._check_rows(rows)
        if not rows or not all(map(len, chunks)):
            raise ValueError("an empty step or chunk")
        bad = [id for chunk in chunks for id in chunk if not 0 <= id < self.config.vocab_size]
        if bad:
            raise ValueError(f"token {bad[0]}")
        needed = self.pages_needed(rows, list(map(len, chunks)))
        if any(row.version != self.version for row in map(self._known, rows) if row.ids):
            raise StaleRow("weights have changed")
        if needed > self.room:
            raise CacheFull(f"{needed} pages, {self.room} free")
        for row, chunk in zip(map(self._known, rows), chunks, strict=True):
            self._write(row, chunk)
        assert len(self.holders) <= self.pages
        self.last = [(self.version, tuple(self._known(row).ids)) for row in rows]

    def logits(self):
        return np.stack([self._logits(*one) for one in self.last])

    def draw(self, samplings, u, vocab=None):
        asked = [i for i, sampling in enumerate(samplings) if sampling]
        ids, sampled = np.zeros(len(u), np.int32), np.zeros(len(u), np.float32)
        rows = [self._logits(*self.last[i])[:vocab] for i in asked]
        ids[asked], sampled[asked] = draw(rows, [samplings[i] for i in asked], [u[i] for i in asked])
        return ids, self.logprobs(ids), sampled

    def logprobs(self, tokens):
        assert len(tokens) == len(self.last)
        return np.array([self._logprob(ids, id) for (_, ids), id in zip(self.last, tokens, strict=True)], np.float32)

    def _logprob(self, ids, id):
        targets = np.full((1, len(ids)), -1, np.int32)
        targets[0, -1] = id
        return self.model.forward(np.array([ids], np.int32), targets)[0, -1]

    def _row(self, ids, pages, version):
        self.made += 1
        self.rows[self.made] = SimpleNamespace(ids=list(ids), pages=list(pages), version=version)
        return self.made

    def _known(self, row):
        if row not in self.rows:
            raise ValueError(f"row {row}")
        return self.rows[row]

    def _check_rows(self, rows):
        if len(set(rows)) < len(rows):
            raise ValueError("a row twice")

    def _write(self, row, chunk):
        if not row.ids:
            row.version = self.version
        if len(row.ids) % self.page and self.holders[row.pages[-1]] > 1:
            self._let_go(row.pages.pop())
            row.pages.append(self._page())
        row.ids += map(int, chunk)
        row.pages += [self._page() for _ in range(-(-len(row.ids) // self.page) - len(row.pages))]

    def _page(self):
        self.pages_made += 1
        self.holders[self.pages_made] = 1
        return self.pages_made

    def _let_go(self, page):
        self.holders[page] -= 1
        if not self.holders[page]:
            del self.holders[page]
