"""Batched decoding: texts that are written side by side by one model, joining and leaving at any step; generate().

The engine knows tokens; a Row makes them text.  What a row says depends on its prompt, its Sampling and its key alone,
never on what runs beside it or on how much memory there is: draw number i of a row comes from Philox keyed by
(seed, stream, key, i), and a session's logits do not depend on the batch.  So a row whose pages are wanted elsewhere
can be put back and read again later.
"""

import codecs
import operator
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from . import _core
from .drawing import Drawn, Sampling, draw, penalised
from .session import CacheFull, Session, StaleRow

__all__ = ["Drawn", "Engine", "Row", "Sampling", "generate"]


def generate(model, tok, prompt: "str | bytes | Sequence[int]" = "", *, row: int = 0, **sampling) -> Iterator[str]:
    """Continue a prompt; yields pieces of valid text as they come, without the prompt.

    prompt    text, or ids; an empty one begins a new document.  A text begins with bos where the tokenizer adds it
              (Tokenizer.encode_prompt), ids are taken as they are
    row       samples of one seed with other rows are independent, and each is the same whatever runs beside it
    sampling  the fields of Sampling: max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop ...

    Ends after max_tokens, at one of the tokenizer's `ends` or of stop_ids, or before the first of the `stop` strings.
    Of a prompt longer than the context its last `context` tokens are read.  Where the context is full the text goes on
    from its last context // 2 tokens, read anew as a prompt: one reading every context / 2 tokens, instead of one a
    token.

    ValueError, TypeError, before anything runs: an argument out of its range, or a prompt with an id that the model
    lacks.
    """
    wanted = Sampling(**sampling)
    ids = _prompt_ids(prompt, tok)
    session = Session(model, max_tokens=row_tokens(model.config.context, len(ids), wanted.max_tokens))
    engine = Engine(session, tok)
    return _pieces(engine, engine.add(ids, wanted, row=row))


def _pieces(engine: "Engine", row: "Row") -> Iterator[str]:
    try:
        while row.finish is None:
            engine.step()
            if piece := row.take():
                yield piece
    finally:
        row.cancel()  # where the reader stops early: the cache goes now


def row_tokens(context: int, prompt: int, max_tokens: int) -> int:
    """Tokens that a row of a prompt of so many ids holds in the cache at most: the last one drawn is never read."""
    return min(context, max(prompt, 1) + max(max_tokens - 1, 0))


class Row:
    """One text that is being written.  Engine.add makes it.

    prompt    its ids, bos with them
    tokens    list of Drawn: what was written, with the token that ended it, if one did
    finish    None while it is written; "stop" (the end-of-text token, bos, a stop id, a stop string), "length"
              (max_tokens) or "cancelled"
    key       the row of its random numbers
    sampling  its Sampling
    """

    def __init__(self, engine: "Engine", prompt: list[int], sampling: Sampling, key: int):
        self.prompt, self.sampling, self.key = prompt, sampling, key
        self.tokens: list[Drawn] = []
        self.finish: str | None = None
        self._engine = engine
        self._ids = list(prompt)  # with those of the tokens
        self._start = max(0, len(prompt) - engine.session.config.context)  # the first id that the model sees
        self._forced: deque[int] = deque()
        self._paused = False
        self._text = _Text(sampling.stop)
        self._lane: _Lane | None = None
        self._age = 0

    def text(self) -> str:
        """All of the text that is certain: without a character whose last bytes are still to come, and without what may
        yet begin a stop string."""
        return "".join(self._text.pieces)

    def take(self) -> str:
        """What text() has more than at the last take; "" where there is nothing."""
        return self._text.take()

    @property
    def paused(self) -> bool:
        return self._paused

    def pause(self) -> None:
        """Take no step until resume().  The row keeps its pages, unless no other row could go on without them."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def cancel(self) -> None:
        """End the text here; nothing happens where it has ended already."""
        if self.finish is None:
            self._end("cancelled")
            self._engine._leave(self)

    def force(self, ids: "str | bytes | Sequence[int]") -> None:
        """Tokens that come next, before anything is drawn, such as a tool's answer.

        They count as tokens of the text, and their log-probabilities are kept; but it is the model that ends a text, so
        neither an end-of-text token nor a stop string among them does.

        ValueError: the row has ended, or an id has no token.
        """
        if self.finish is not None:
            raise ValueError(f"force: the row has ended ({self.finish})")
        ids, tok = _ids("force", ids, self._engine.tok), self._engine.tok
        _check_ids("force", ids, tok.n_vocab)
        self._forced.extend(ids)

    def __repr__(self) -> str:
        return f"<Row {self.key}: {len(self.prompt)} ids of prompt, {len(self.tokens)} written, finish={self.finish!r}>"

    @property
    def _penalised(self) -> bool:
        return self.sampling.repetition_penalty != 1

    def _next_logits(self, logits: np.ndarray) -> np.ndarray:
        """(V): what the next token is drawn from where there is a penalty, before its Sampling."""
        return penalised(logits, self._ids, self.sampling.repetition_penalty)

    def _uniform(self) -> float:
        return _core.philox_uniform(self.sampling.seed, _core.STREAM_SAMPLE, self.key, len(self.tokens))

    def _append(self, drawn: Drawn) -> None:
        if drawn.forced:
            self._forced.popleft()
        tok, sampling = self._engine.tok, self.sampling
        data = _bytes_after(tok, self._ids[-1], drawn.id)
        self.tokens.append(drawn)
        self._ids.append(drawn.id)
        ends = drawn.id in sampling.stop_ids or (drawn.id in tok.ends and not sampling.ignore_eot)
        if not drawn.forced and (ends or self._text.feed(data)):
            self._end("stop")
            return
        if drawn.forced:
            self._text.pass_by(data)
        if len(self.tokens) == sampling.max_tokens:
            self._end("length")
        elif len(self._ids) - self._start > self._engine.session.config.context:
            self._start = len(self._ids) - max(1, self._engine.session.config.context // 2)

    def _end(self, finish: str) -> None:
        self.finish = finish
        self._text.close()


class _Lane:
    """A row of the session, or one that waits for pages, and the Rows that draw when it is read.

    Rows that share a prompt share a lane until each has drawn its first token.
    """

    def __init__(self, rows: list[Row], id: int | None = None, start: int | None = None, read: int | None = None):
        self.rows = rows
        self.id = id  # the session's; None: it waits
        self.start = rows[0]._start if start is None else start  # of the rows' ids: the first that is read
        self.read = self.start if read is None else read  # and where reading goes on
        for row in rows:
            row._lane = self

    @property
    def unread(self) -> int:
        return len(self.rows[0]._ids) - self.read

    @property
    def paused(self) -> bool:
        return all(row._paused for row in self.rows)

    def chunk(self, count: int) -> list[int]:
        return self.rows[0]._ids[self.read : self.read + count]


class Engine:
    """Writes any number of texts with one Session.

    session  a Session; its free pages are the engine's, and other rows in it are left alone
    tok      Tokenizer
    chunk    tokens of prompts that a step reads at most, beside one token of every row that is written: long prompts
             do not hold up the others

    Rows are served oldest first.  One waits until there are pages for its prompt and one more; where rows that are
    written want pages that are not there, the youngest is put back to wait, and reads its tokens again later: with much
    memory or little, each text is the same.  Rows that Model.update() made stale are read anew with the new weights, so
    that no step uses old ones.  An engine serves one thread at a time.
    """

    def __init__(self, session, tok, chunk: int = 256):
        V = session.config.vocab_size
        if tok.n_vocab > V:
            raise ValueError(f"tok: its ids go up to {tok.n_vocab - 1}, the model's vocabulary has {V}")
        if chunk < 1:
            raise ValueError(f"chunk: must be 1 or more, got {chunk}")
        self.session, self.tok, self.chunk = session, tok, chunk
        self._lanes: list[_Lane] = []
        self._added = 0

    def add(
        self,
        prompt: "str | bytes | Sequence[int]" = "",
        sampling: Sampling | None = None,
        row: int = 0,
        n: int | None = None,
    ) -> "Row | list[Row]":
        """A text to write.  An empty prompt begins a new document, a text with bos where the tokenizer adds it.

        With `n` a list of n rows with the keys row .. row + n - 1, which share the pages of the prompt.  It is read
        once, or once more for those for which there is no page at first.

        ValueError: a bad prompt, key, n, or stop id.  CacheFull: the whole cache has no room for such a row.
        """
        sampling = sampling or Sampling()
        ids = _prompt_ids(prompt, self.tok)
        _check_ids("prompt", ids, self.session.config.vocab_size)
        _check_ids("stop_ids", sampling.stop_ids, self.tok.n_vocab)
        if n is not None and n < 1:
            raise ValueError(f"n: must be 1 or more, got {n}")
        if not 0 <= row <= 2**64 - (n or 1):
            raise ValueError(f"row: must be in [0, 2^64), got {row}{f' with n {n}' if n else ''}")
        self._check_room(len(ids), sampling.max_tokens)
        rows = [Row(self, list(ids), sampling, row + i) for i in range(n or 1)]
        for one in rows:
            one._age = self._added
            self._added += 1
        if sampling.max_tokens:
            self._lanes.append(_Lane(list(rows)))
        else:
            for one in rows:
                one._end("length")
        return rows[0] if n is None else rows

    @property
    def rows(self) -> list[Row]:
        """The rows that are not finished, oldest first."""
        return sorted((row for lane in self._lanes for row in lane.rows), key=lambda row: row._age)

    @property
    def idle(self) -> bool:
        """Whether no row could go on: all are finished or paused."""
        return all(lane.paused for lane in self._lanes)

    def run(self) -> None:
        """Step until idle."""
        while not self.idle:
            self.step()

    def step(self) -> list[Row]:
        """One step of the session: the next token of every row that is written, and beside it up to `chunk` tokens of
        prompts.  Returns the rows that have a token more.

        An exception, Ctrl-C too, costs no row more than reading its tokens once more: the engine can go on.
        CacheFull: other rows of the session hold the pages without which not even the oldest row can go on.
        """
        plan = self._plan()
        if not plan:
            return []
        try:
            try:
                self._read(plan)
            except StaleRow:
                for lane in self._admitted():
                    self._put_back(lane)
                plan = self._plan()
                self._read(plan)
            return self._write(plan)
        except BaseException:
            self._read_anew()
            raise

    # ---- pages ----------------------------------------------------------------------------------------------------

    def _check_room(self, prompt: int, max_tokens: int) -> None:
        longest = row_tokens(self.session.config.context, prompt, max_tokens)
        id = self.session.add()
        pages = self.session.pages_needed([id], [longest])
        self.session.free(id)
        if pages > self.session.pages:
            raise CacheFull(f"a row of up to {longest} tokens takes {pages} pages, the cache has {self.session.pages}")

    def _admitted(self, paused: bool | None = None) -> list[_Lane]:
        """The lanes that are in the session, oldest first; only the paused ones, or the others, where that is said."""
        return [lane for lane in self._lanes if lane.id is not None and paused in (None, lane.paused)]

    def _needed(self, parts: Iterable[tuple[_Lane, int]]) -> int:
        parts = list(parts)
        return self.session.pages_needed([lane.id for lane, _ in parts], [count for _, count in parts])

    def _admit(self) -> None:
        """Let waiting lanes in, oldest first and none before one that is older."""
        self._lanes.sort(key=lambda lane: lane.rows[0]._age)
        for lane in [lane for lane in self._lanes if lane.id is None and not lane.paused]:
            going = self._admitted(paused=False)
            lane.id = self.session.add()
            spare = self._spare([*going, lane])
            while not going and spare < 0 and (paused := self._admitted(paused=True)):
                self._put_back(paused[-1])
                spare = self._spare([lane])
            if spare == 0 and not going:
                spare = 1  # alone it may try
            if spare < 1:
                self._put_back(lane)
                if not going:
                    raise self._too_full(lane, lane.unread)
                return
            if spare < len(lane.rows):  # the others read the prompt later, once, and not each after it was put back
                self._lanes.append(_Lane(lane.rows[spare:]))
                del lane.rows[spare:]
                return

    def _spare(self, lanes: list[_Lane]) -> int:
        """Pages that are left when these have read all they have to read, less one for each row that is to come out of
        a prompt of all but the last."""
        ahead = sum(len(lane.rows) for lane in lanes[:-1] if lane.unread > 1)
        return self.session.room - self._needed((lane, lane.unread) for lane in lanes) - ahead

    def _plan(self) -> list[tuple[_Lane, int]]:
        """What each lane reads in this step, in pages that are there."""
        self._admit()
        plan, left = [], self.chunk
        for lane in self._admitted(paused=False):
            count = 1 if lane.unread == 1 else min(lane.unread, left)
            if count:
                plan.append((lane, count))
            if lane.unread > 1:
                left -= count
        while plan and self._needed(plan) > self.session.room:
            going, paused = self._admitted(paused=False), self._admitted(paused=True)
            if len(going) == 1 and not paused:
                raise self._too_full(*plan[0])
            victim = going[-1] if len(going) > 1 else paused[-1]
            self._put_back(victim)
            plan = [part for part in plan if part[0] is not victim]
        return plan

    def _too_full(self, lane: _Lane, count: int) -> CacheFull:
        tokens = lane.read - lane.start + count
        return CacheFull(f"a row of {tokens} tokens needs more than the {self.session.room} pages that are left for it")

    def _put_back(self, lane: _Lane) -> None:
        """Free a lane's pages; its tokens are read again when there is room."""
        if lane.id is not None:
            self.session.free(lane.id)
        lane.id, lane.read = None, lane.start

    def _leave(self, row: Row) -> None:
        """Forget a row that has ended."""
        lane, row._lane = row._lane, None
        lane.rows.remove(row)
        if not lane.rows:
            self._lanes.remove(lane)
            if lane.id is not None:
                self.session.free(lane.id)

    def _read_anew(self) -> None:
        """Put every row back, each for itself: where a step broke off, rows of one lane may differ."""
        rows = [row for lane in self._lanes for row in lane.rows]
        for lane in self._admitted():
            self._put_back(lane)
        self._lanes = [_Lane([row]) for row in rows if row.finish is None]

    # ---- tokens ---------------------------------------------------------------------------------------------------

    def _read(self, plan: list[tuple[_Lane, int]]) -> None:
        self.session.advance([lane.id for lane, _ in plan], [lane.chunk(count) for lane, count in plan])
        for lane, count in plan:
            lane.read += count

    def _write(self, plan: list[tuple[_Lane, int]]) -> list[Row]:
        """The next token of every row whose tokens are all read."""
        slots = [slot for slot, (lane, _) in enumerate(plan) if lane.unread == 0]
        rows = [(slot, row) for slot in slots for row in plan[slot][0].rows if not row._paused]
        for (_, row), drawn in zip(rows, self._draw(rows, len(plan)), strict=True):
            row._append(drawn)
        for slot in slots:
            self._part(plan[slot][0])
        return [row for _, row in rows]

    def _draw(self, rows: list[tuple[int, Row]], n: int) -> list[Drawn]:
        """What comes next in each row; its logits are those of its slot, of n in the last step.

        They stay in the session, except where a penalty changes them or alternatives are looked for.
        """
        looks = any(row.sampling.alternatives or (row._penalised and not row._forced) for _, row in rows)
        logits = self.session.logits()[:, : self.tok.n_vocab] if looks else None  # a model's vocabulary may be padded
        chosen = self._choose(rows, logits, n)
        likeliest = [_likeliest(logits, slot, row.sampling.alternatives) for slot, row in rows]
        asked = [ids if known else [id, *ids] for (id, _, known), ids in zip(chosen, likeliest, strict=True)]
        said = self._logprobs([slot for slot, _ in rows], asked, n)
        out = []
        for (_, row), (id, sampled, known), ids, logprobs in zip(rows, chosen, likeliest, said, strict=True):
            logprob, *others = [*known, *logprobs]
            out.append(Drawn(id, logprob, sampled, tuple(zip(ids, others, strict=True)), bool(row._forced)))
        return out

    def _choose(
        self, rows: list[tuple[int, Row]], logits: np.ndarray | None, n: int
    ) -> list[tuple[int, float, list[float]]]:
        """(id, sampled_logprob, [logprob] or nothing where it is not known) of each row."""
        free = [(slot, row) for slot, row in rows if not row._forced]
        drawn = self._draw_in_session([(slot, row) for slot, row in free if not row._penalised], n)
        drawn_here = _draw_penalised([(slot, row) for slot, row in free if row._penalised], logits)
        chosen: list[tuple[int, float, list[float]]] = []
        for _, row in rows:
            if row._forced:
                chosen.append((row._forced[0], 0.0, []))
            elif row._penalised:
                chosen.append((*next(drawn_here), []))
            else:
                id, logprob, sampled_logprob = next(drawn)
                chosen.append((id, sampled_logprob, [logprob]))
        return chosen

    def _draw_in_session(self, rows: list[tuple[int, Row]], n: int) -> Iterator[tuple[int, float, float]]:
        """(id, logprob, sampled_logprob) of each row."""
        found: list[tuple[int, float, float]] = [(0, 0.0, 0.0)] * len(rows)
        for turn in _turns([slot for slot, _ in rows], n):
            due = [None if i is None else rows[i][1] for i in turn]
            drawn = self.session.draw(
                [row and row.sampling for row in due],
                [row._uniform() if row else 0.0 for row in due],
                self.tok.n_vocab,
            )
            for i, one in zip(turn, zip(*(a.tolist() for a in drawn), strict=True), strict=True):
                if i is not None:
                    found[i] = one
        return iter(found)

    def _logprobs(self, slots: list[int], asked: list[list[int]], n: int) -> list[list[float]]:
        """Log-probabilities of the tokens asked about, each list under the last step's logits of its slot."""
        questions = [(which, id) for which, ids in enumerate(asked) for id in ids]
        said: list[list[float]] = [[] for _ in asked]
        for turn in _turns([slots[which] for which, _ in questions], n):
            logprobs = self.session.logprobs([0 if i is None else questions[i][1] for i in turn])
            for i, logprob in zip(turn, logprobs.tolist(), strict=True):
                if i is not None:
                    said[questions[i][0]].append(logprob)
        return said

    def _part(self, lane: _Lane) -> None:
        """After a draw: rows that have ended leave, and each other one goes on in a lane of its own."""
        for row in [row for row in lane.rows if row.finish]:
            self._leave(row)
        drawn = [row for row in lane.rows if len(row._ids) > lane.read]
        kept = [row for row in drawn if row._start == lane.start]
        if not lane.rows or len(kept) == len(lane.rows) == 1:
            return
        ids = [lane.id, *self.session.fork(lane.id, len(kept) - 1)] if len(kept) > 1 else [lane.id] * len(kept)
        parts = [_Lane([row], id, lane.start, lane.read) for row, id in zip(kept, ids, strict=True)]
        parts += [_Lane([row]) for row in drawn if row._start != lane.start]  # its context was full
        if paused := [row for row in lane.rows if len(row._ids) == lane.read]:  # since before the prompt was read
            parts.append(_Lane(paused))
        self._lanes = [other for other in self._lanes if other is not lane] + parts
        if not kept:
            self.session.free(lane.id)


def _draw_penalised(rows: list[tuple[int, Row]], logits: np.ndarray | None) -> Iterator[tuple[int, float]]:
    """(id, sampled_logprob) of each row, from logits of its slot that its penalty has changed."""
    if logits is None or not rows:
        return iter(())
    ids, sampled = draw(
        [row._next_logits(logits[slot]) for slot, row in rows],
        [row.sampling for _, row in rows],
        [row._uniform() for _, row in rows],
    )
    return iter(zip(ids.tolist(), sampled.tolist(), strict=True))


def _turns(slots: Sequence[int], n: int) -> Iterator[list[int | None]]:
    """A session answers for one token of each of n slots at a time: which question each slot answers, turn by turn."""
    queues: list[list[int]] = [[] for _ in range(n)]
    for i, slot in enumerate(slots):
        queues[slot].append(i)
    for turn in range(max(map(len, queues), default=0)):
        yield [queue[turn] if turn < len(queue) else None for queue in queues]


def _likeliest(rows: np.ndarray | None, slot: int, n: int) -> list[int]:
    """The ids of the n largest logits of a row, the largest first; of equals the lower id first."""
    if n == 0 or rows is None:
        return []
    logits = rows[slot]
    n = min(n, len(logits))
    those = np.flatnonzero(logits >= np.partition(logits, -n)[-n])
    return those[np.argsort(-logits[those], kind="stable")][:n].tolist()


# ---- text and ids -------------------------------------------------------------------------------------------------


class _Text:
    """Tokens to text: bytes wait until they are whole characters, characters while they may begin a stop string."""

    def __init__(self, stops: Sequence[str]):
        self.pieces: list[str] = []
        self._stops, self._held, self._taken = stops, "", 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._closed = False

    def feed(self, data: bytes) -> bool:
        """Bytes that were drawn.  True: they complete a stop string, and the text ends before it."""
        self._held += self._decoder.decode(data)
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._release(min(found))
            self._held, self._closed = "", True
            return True
        self._release(len(self._held) - _overlap(self._held, self._stops))
        return False

    def pass_by(self, data: bytes) -> None:
        """Bytes in which no stop string is looked for."""
        self._held += self._decoder.decode(data)
        self._release(len(self._held))

    def close(self) -> None:
        """What waited for more is text after all."""
        if not self._closed:
            self._held += self._decoder.decode(b"", final=True)
            self._release(len(self._held))
            self._closed = True

    def take(self) -> str:
        taken = "".join(self.pieces[self._taken :])
        self._taken = len(self.pieces)
        return taken

    def _release(self, n: int) -> None:
        if n:
            self.pieces.append(self._held[:n])
            self._held = self._held[n:]


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of text that begins a stop string."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for n in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-n:]) for stop in stops):
            return n
    return 0


def _prompt_ids(prompt: "str | bytes | Sequence[int]", tok) -> list[int]:
    """The ids of a prompt; ids themselves are taken as they are, but none at all begin a document."""
    if isinstance(prompt, str | bytes):
        return tok.encode_prompt(prompt)
    return _ids("prompt", prompt, tok) or [tok.bos]


def _ids(name: str, text: "str | bytes | Sequence[int]", tok) -> list[int]:
    try:
        return tok.encode(text) if isinstance(text, str | bytes) else [operator.index(id) for id in text]
    except TypeError:
        raise TypeError(f"{name}: must be text or token ids, got {text!r}") from None


def _check_ids(name: str, ids: Sequence[int], V: int) -> None:
    bad = next((id for id in ids if not 0 <= id < V), None)
    if bad is not None:
        raise ValueError(f"{name}: the id {bad} is not in [0, {V})")


def _bytes_after(tok, before: int, id: int) -> bytes:
    """What a token adds to a text; nothing for an id that the vocabulary leaves out but the model may draw."""
    try:
        return tok.bytes_after(before, id)
    except ValueError:
        return b""
