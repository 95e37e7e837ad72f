"""The engine: each text is what it would be alone, whatever runs beside it and however little memory there is."""

import numpy as np
import pytest
from barelm import Tokenizer, _core
from barelm.drawing import draw
from barelm.engine import Engine, Sampling, _Text, generate
from barelm.session import CacheFull, Session
from conftest import GPT2, LLAMA
from hypothesis import given, settings
from hypothesis import strategies as st
from models import assert_same_bits, random_model
from sessions import PlainSession
from test_sampling import exact_logprob, near

TOK = Tokenizer.bytes()
V = TOK.n_vocab
BEGINS = Tokenizer({bytes([b]): b for b in range(256)}, [], {"<|endoftext|>": 256, "<|begin|>": 257}, bos=257)
CONTEXT = 40
ENDS = tuple(range(0, 256, 20))  # stop ids: one token in twenty ends a text of random bytes


class Remembering:
    """A model that is asked about the same ids again and again; like one, it must not be told new weights."""

    def __init__(self, model):
        self.model, self.config, self.known = model, model.config, {}

    def logits(self, tokens, last=True):
        return self._once("logits", tokens)

    def forward(self, tokens, targets):
        return self._once("forward", tokens, targets)

    def _once(self, name, *arrays):
        key = (name, *(a.tobytes() for a in arrays))
        if key not in self.known:
            self.known[key] = getattr(self.model, name)(*arrays)
        return self.known[key]


def small_model(family, context):
    return random_model(family | dict(vocab_size=V + 3, context=context))  # three ids of padding


SMALL = Remembering(small_model(GPT2, CONTEXT))
LONG = {name: Remembering(small_model(family, 150)) for name, family in (("gpt2", GPT2), ("llama", LLAMA))}


def open_session(kind, model, max_tokens):
    """kind: "plain", or "cached", the real one."""
    return PlainSession(model, max_tokens) if kind == "plain" else Session(model.model, max_tokens)


@pytest.fixture(params=["plain", "cached"])
def kind(request):
    return request.param


class Spy:
    """A session that tells what was read in each step."""

    def __init__(self, session):
        self._session, self.steps = session, []

    def __getattr__(self, name):
        return getattr(self._session, name)

    def advance(self, rows, chunks):
        self._session.advance(rows, chunks)
        self.steps.append([len(chunk) for chunk in chunks])

    @property
    def read(self):
        return sum(map(sum, self.steps))


def prompt_of(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, n).tolist()


def forward_logprob(model, seen, id):
    targets = np.full((1, len(seen)), -1, np.int32)
    targets[0, -1] = id
    return model.forward(np.array([seen], np.int32), targets)[0, -1]


def alone(model, prompt, s, key=0, forced=None):
    """(tokens, finish) of a text by itself, from the definitions: [(id, logprob)].  forced: {position: id}."""
    prompt, forced, context = list(prompt) or [TOK.eot], forced or {}, model.config.context
    seen, tokens, drawn = prompt[-context:], [], b""
    while len(tokens) < s.max_tokens:
        logits = model.logits(np.array([seen], np.int32))[0]
        position = len(tokens)
        id = forced[position] if position in forced else draw_alone(logits, s, key, position, prompt, tokens)
        tokens.append((id, forward_logprob(model, seen, id)))
        if position not in forced:
            if id in s.stop_ids or (id == TOK.eot and not s.ignore_eot):
                return tokens, "stop"
            drawn += TOK.token_bytes(id)
            if any(stop.encode() in drawn for stop in s.stop):
                return tokens, "stop"
        else:
            drawn = b""
        seen = [*seen, id]
        if len(seen) > context:
            seen = (prompt + [id for id, _ in tokens])[-(context // 2) :]
    return tokens, "length"


def draw_alone(logits, s, key, position, prompt, tokens):
    p = logits[:V].astype(np.float64)
    if s.repetition_penalty != 1:
        for id in {*prompt, *(id for id, _ in tokens)}:
            p[id] = p[id] / s.repetition_penalty if p[id] > 0 else p[id] * s.repetition_penalty
    (id,), _ = draw([p], [s], [_core.philox_uniform(s.seed, _core.STREAM_SAMPLE, key, position)])
    return int(id)


def said(row):
    return [(token.id, np.float32(token.logprob)) for token in row.tokens], row.finish


def finished(engine, rows):
    engine.run()
    assert engine.idle and engine.rows == [] and engine.step() == []
    return [said(row) for row in rows]


# ---- the same text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LONG)
def test_a_row_says_in_a_batch_of_sixteen_what_it_says_alone(kind, family):
    """Rows join and leave at every step; prompts are read in parts beside them."""
    model = LONG[family]
    session = open_session(kind, model, 64 * 40)
    room = session.room
    engine = Engine(session, TOK, chunk=60)
    asked = [(prompt_of(1 + 7 * i, i), Sampling(max_tokens=3 + 2 * i, seed=i % 3, stop_ids=ENDS), i) for i in range(16)]
    rows, most = [], 0
    for prompt, sampling, key in asked:
        rows.append(engine.add(prompt, sampling, row=key))
        most = max(most, len(engine.step()))
    while not engine.idle:
        most = max(most, len(engine.step()))
    assert most >= 6  # they did run side by side
    assert finished(engine, rows) == [alone(model, *one) for one in asked]
    assert session.room == room
    assert len({row.finish for row in rows}) == 2


def test_a_prompt_is_read_once_for_all_rows_that_share_it(kind):
    model, sampling = LONG["gpt2"], Sampling(max_tokens=12, seed=3)
    session = Spy(open_session(kind, model, 64 * 16))
    engine, prompt, room = Engine(session, TOK, chunk=32), prompt_of(100), session.room
    rows = engine.add(prompt, sampling, row=5, n=4)
    assert [row.key for row in rows] == [5, 6, 7, 8]
    while not rows[0].tokens:
        engine.step()
    assert session.read == 100 and session.steps[0] == [32]
    engine.step()
    assert session.room == room - 1 - 4  # one whole page for all, and one for each that they write on
    texts = finished(engine, rows)
    assert session.read == 100 + 4 * 11
    assert texts == [alone(model, prompt, sampling, key) for key in (5, 6, 7, 8)]
    assert len({tuple(ids) for ids, _ in texts}) == 4 and session.room == room


@pytest.mark.parametrize("pages", [3, 4, 5, 7])
def test_rows_that_are_put_back_say_the_same(kind, pages):
    model, room = LONG["llama"], 64 * pages
    session = Spy(open_session(kind, model, room))
    engine = Engine(session, TOK, chunk=50)
    asked = [(prompt_of(50 + i, i), Sampling(max_tokens=90, seed=i, ignore_eot=True), 0) for i in range(4)]
    rows = [engine.add(*one) for one in asked]
    ended = []
    while not engine.idle:
        ended += [row for row in engine.step() if row.finish]
    assert session.read > sum(len(row.prompt) + 89 for row in rows)  # some were read again
    assert [said(row) for row in rows] == [alone(model, *one) for one in asked]
    assert ended[0] is rows[0] and session.room == pages  # the oldest is never the one that waits


def test_the_youngest_is_put_back_and_goes_on_when_there_is_room_again():
    engine = Engine(PlainSession(SMALL, 10 * 4, page=4), TOK)
    sampling = Sampling(max_tokens=20, ignore_eot=True)
    rows = [*engine.add("abcd", sampling, n=2), engine.add("efgh", sampling)]
    while len(changed := engine.step()) == 3:
        pass
    assert changed == rows[:2] and rows[0].finish is None
    finishes = []
    while not engine.idle:
        finishes += [row for row in engine.step() if row.finish]
    assert finishes == rows  # oldest first
    assert [said(row) for row in rows] == [alone(SMALL, row.prompt, sampling, row.key) for row in rows]


def test_more_rows_than_there_is_room_for_do_not_read_their_prompt_each():
    session = Spy(PlainSession(SMALL, 10 * 4, page=4))
    engine = Engine(session, TOK)
    sampling, prompt = Sampling(max_tokens=5), prompt_of(20)
    rows = engine.add(prompt, sampling, n=20)
    assert finished(engine, rows) == [alone(SMALL, prompt, sampling, key) for key in range(20)]
    assert session.read < 20 * 20


@pytest.mark.parametrize("length", [1, 100, 149, 150, 151, 400])
def test_a_context_that_fills_goes_on_from_its_last_half(kind, length):
    model, sampling = LONG["gpt2"], Sampling(max_tokens=90, seed=1)
    engine = Engine(open_session(kind, model, 64 * 8), TOK, chunk=64)
    rows = [engine.add(prompt_of(length), sampling), engine.add("x", sampling)]
    wanted = [alone(model, prompt_of(length), sampling), alone(model, b"x", sampling)]
    assert finished(engine, rows) == wanted


OPTIONS = [
    Sampling(max_tokens=25, stop_ids=ENDS),
    Sampling(max_tokens=9, seed=7, temperature=0.7, top_k=40, top_p=0.9, min_p=0.01),
    Sampling(max_tokens=14, temperature=0, repetition_penalty=1.3),
    Sampling(max_tokens=12, repetition_penalty=0.8, temperature=2.0, alternatives=3),
    Sampling(max_tokens=30, stop=("e", "\x10", "zz"), ignore_eot=True),
    Sampling(max_tokens=1),
]
ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 60), st.integers(0, len(OPTIONS) - 1), st.integers(1, 4)),
    st.tuples(st.sampled_from(["cancel", "pause", "resume", "resume"]), st.integers(0, 20)),
    st.tuples(st.just("force"), st.integers(0, 20), st.lists(st.integers(0, V - 1), min_size=1, max_size=4)),
    st.tuples(st.just("step"), st.integers(1, 6)),
)


class Play:
    """A schedule's actions on an engine, and what each row was asked."""

    def __init__(self, session, chunk):
        self.engine, self.rows, self.asked = Engine(session, TOK, chunk=chunk), [], {}

    def add(self, length, option, n):
        prompt, key = prompt_of(length, len(self.rows)), len(self.rows)
        rows = self.engine.add(prompt, OPTIONS[option], row=key, n=n)
        self.asked |= {row: (prompt, OPTIONS[option], row.key, {}) for row in rows}
        self.rows += rows

    def step(self, n):
        for _ in range(n):
            before = {row: len(row.tokens) for row in self.rows}
            changed = self.engine.step()
            for row in self.rows:
                assert len(row.tokens) == before[row] + (row in changed)
                assert not (row.paused and row in changed)

    def force(self, which, ids):
        row = self._row(which)
        if row and row.finish is None:
            at = max([len(row.tokens) - 1, *self.asked[row][3]]) + 1
            self.asked[row][3].update(enumerate(ids, at))
            row.force(ids)

    def pause(self, which):
        if row := self._row(which):
            row.pause()

    def resume(self, which):
        if row := self._row(which):
            row.resume()

    def cancel(self, which):
        if row := self._row(which):
            row.cancel()
            assert row.finish

    def _row(self, which):
        return self.rows[which % len(self.rows)] if self.rows else None

    def check(self, model):
        for row in self.rows:
            row.resume()
        self.engine.run()
        for row in self.rows:
            tokens, finish = alone(model, *self.asked[row])
            if row.finish == "cancelled":
                assert said(row)[0] == tokens[: len(row.tokens)]
            else:
                assert said(row) == (tokens, finish)


@settings(max_examples=250, deadline=None)
@given(st.integers(10, 40), st.integers(1, 30), st.lists(ACTIONS, max_size=25))
def test_any_schedule_in_any_memory_gives_each_row_its_own_text(pages, chunk, actions):
    session = PlainSession(SMALL, pages * 4, page=4)
    play = Play(session, chunk)
    for name, *arguments in actions:
        getattr(play, name)(*arguments)
    play.check(SMALL)
    assert session.room == pages and not session.rows


@settings(max_examples=10, deadline=None)
@given(st.integers(3, 6), st.integers(1, 99), st.lists(ACTIONS, max_size=15))
def test_any_schedule_of_the_real_session_too(pages, chunk, actions):
    session = Session(LONG["gpt2"].model, pages * 64)
    play = Play(session, chunk)
    for name, *arguments in actions:
        getattr(play, name)(*arguments)
    play.check(LONG["gpt2"])
    assert session.room == pages


# ---- what is said of each token -----------------------------------------------------------------------------------


def test_logprobs_are_forwards_to_the_bit_and_sampled_ones_those_drawn_from(kind):
    model = LONG["llama"]
    engine = Engine(open_session(kind, model, 64 * 8), TOK, chunk=30)
    options = dict(max_tokens=40, top_k=30, top_p=0.95, min_p=0.02, temperature=1.3)
    row, beside = engine.add(prompt_of(70), Sampling(**options)), engine.add("beside", Sampling(max_tokens=60))
    engine.run()
    ids = np.array([row.prompt + [token.id for token in row.tokens]], np.int32)
    inputs, targets = np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])
    want = model.model.forward(inputs, targets)[0, 69:]
    assert_same_bits(np.array([token.logprob for token in row.tokens], np.float32), want)
    assert all(isinstance(token.logprob, float) for token in row.tokens + beside.tokens)
    for i, token in enumerate(row.tokens):
        logits = model.logits(np.ascontiguousarray(ids[:, : 70 + i]))[0, :V]
        assert token.sampled_logprob == near(exact_logprob(logits, token.id, row.sampling))


def test_a_penalty_counts_in_sampled_logprob_only():
    engine = Engine(PlainSession(SMALL), TOK)
    row = engine.add("abc", Sampling(max_tokens=1, repetition_penalty=3.0))
    engine.run()
    logits = SMALL.logits(np.array([list(b"abc")], np.int32))[0, :V].astype(np.float64)
    (token,) = row.tokens
    assert np.float32(token.logprob) == forward_logprob(SMALL, list(b"abc"), token.id)
    for id in b"abc":
        logits[id] *= 3.0 if logits[id] < 0 else 1 / 3.0
    assert token.sampled_logprob == near(exact_logprob(logits.astype(np.float32), token.id, Sampling()))


def test_alternatives_are_the_likeliest_tokens_as_forward_sees_them(kind):
    model = LONG["gpt2"]
    engine = Engine(open_session(kind, model, 64 * 8), TOK)
    greedy = engine.add("one", Sampling(max_tokens=5, temperature=0, alternatives=4))
    every = engine.add("two", Sampling(max_tokens=2, alternatives=999))
    engine.add("three", Sampling(max_tokens=9))
    engine.run()
    seen = list(greedy.prompt)
    for token in greedy.tokens:
        assert token.alternatives[0] == (token.id, token.logprob) and len(token.alternatives) == 4
        logits = model.logits(np.array([seen], np.int32))[0, :V]
        assert [id for id, _ in token.alternatives] == np.argsort(-logits, kind="stable")[:4].tolist()
        assert [np.float32(lp) for _, lp in token.alternatives] == [
            forward_logprob(model, seen, id) for id, _ in token.alternatives
        ]
        seen.append(token.id)
    assert sorted(id for id, _ in every.tokens[0].alternatives) == list(range(V))  # never the padding
    assert (every.tokens[0].id, every.tokens[0].logprob) in every.tokens[0].alternatives


# ---- rows from outside --------------------------------------------------------------------------------------------


def test_forced_tokens_come_next_and_drawing_goes_on_after_them(kind):
    model, sampling = LONG["gpt2"], Sampling(max_tokens=20, stop=("\n",), seed=4)
    engine = Engine(open_session(kind, model, 64 * 8), TOK)
    row = engine.add("tool?", sampling)
    while len(row.tokens) < 3:
        engine.step()
    row.force("4\n2")
    row.force([TOK.eot])  # the model ends a text, not what it is told
    engine.run()
    forced = dict(enumerate([*b"4\n2", TOK.eot], 3))
    assert said(row) == alone(model, b"tool?", sampling, forced=forced)
    assert [i for i, token in enumerate(row.tokens) if token.forced] == [3, 4, 5, 6]
    assert all(token.sampled_logprob == 0 for token in row.tokens if token.forced)
    assert len(row.tokens) > 7 and "4\n2<|endoftext|>" in row.text()


def test_forced_tokens_end_a_text_that_is_long_enough_and_no_other():
    engine = Engine(PlainSession(SMALL), TOK)
    row = engine.add("x", Sampling(max_tokens=3))
    row.force("abcdef")
    engine.run()
    assert (row.text(), row.finish) == ("abc", "length")
    with pytest.raises(ValueError, match="force"):
        row.force("x")


def test_a_stop_string_is_not_begun_by_what_is_forced_and_ended_by_the_model():
    text = _Text(("ab", "xyz"))
    assert not text.feed(b"x")
    text.pass_by(b"ya")
    assert not text.feed(b"b") and not text.feed(b"z a")
    assert text.feed(b"b") and "".join(text.pieces) == "xyabz "


def test_a_paused_row_keeps_its_pages_and_takes_no_step():
    session = PlainSession(SMALL, 64, page=4)
    engine = Engine(session, TOK)
    paused, other = (engine.add(p, Sampling(max_tokens=20, ignore_eot=True)) for p in ("one", "two"))
    engine.step()
    engine.step()
    paused.pause()
    for _ in range(5):
        assert engine.step() == [other]
    assert len(paused.tokens) == 2 and not engine.idle
    engine.run()
    assert other.finish and engine.idle and engine.rows == [paused] and engine.step() == []
    assert [len(row.ids) for row in session.rows.values()] == [4]  # it was not put back
    paused.resume()
    finished(engine, [paused])
    assert said(paused) == alone(SMALL, b"one", paused.sampling)


def test_a_paused_row_gives_its_pages_where_nothing_could_go_on_without_them():
    session = PlainSession(SMALL, 6 * 4, page=4)
    engine = Engine(session, TOK)
    first, second = (engine.add(p, Sampling(max_tokens=20, ignore_eot=True)) for p in ("0123", "abcd"))
    engine.step()
    first.pause()
    engine.run()
    assert second.finish == "length" and len(session.rows) == 0 and len(first.tokens) == 1
    first.resume()
    while len(first.tokens) < 12:
        engine.step()
    first.pause()
    assert session.room == 2
    third = engine.add("efghefghefgh", Sampling(max_tokens=2, ignore_eot=True))
    engine.run()
    assert third.finish and len(session.rows) == 0
    first.resume()
    finished(engine, [first])
    for row in (first, second, third):
        assert said(row) == alone(SMALL, row.prompt, row.sampling)


def test_a_paused_row_keeps_its_pages_while_a_younger_one_can_give_its_own():
    session = PlainSession(SMALL, 8 * 4, page=4)
    engine = Engine(session, TOK)
    rows = [engine.add(p, Sampling(max_tokens=16, ignore_eot=True)) for p in ("0123", "abcd", "efgh")]
    while len(rows[0].tokens) < 5:
        engine.step()
    rows[0].pause()
    while rows[1].finish is None:
        engine.step()
        assert max(len(row.ids) for row in session.rows.values()) >= 8 and len(rows[2].tokens) < 16
    rows[0].resume()
    engine.run()
    assert [said(row) for row in rows] == [alone(SMALL, row.prompt, row.sampling) for row in rows]


def test_rows_that_share_a_prompt_go_on_when_one_is_paused_or_cancelled_before_it_is_read():
    session = Spy(PlainSession(SMALL, 400, page=4))
    engine, sampling = Engine(session, TOK, chunk=5), Sampling(max_tokens=6)
    rows = engine.add(prompt_of(30), sampling, n=4)
    engine.step()
    rows[0].cancel()
    engine.step()
    rows[1].pause()
    engine.run()
    assert session.read == 30 + 2 * 5 and rows[1].tokens == []
    rows[1].resume()
    engine.run()
    for row in rows[1:]:
        assert said(row) == alone(SMALL, prompt_of(30), sampling, row.key)
    assert rows[0].finish == "cancelled" and session.room == 100


def test_a_cancelled_row_leaves_at_once():
    session = PlainSession(SMALL)
    room, engine = session.room, Engine(session, TOK)
    rows = engine.add("abc", Sampling(max_tokens=20), n=3)
    engine.step()
    for row in rows:
        row.cancel()
        assert row.finish == "cancelled" and row not in engine.rows
    assert session.room == room and engine.idle and engine.step() == []
    rows[0].cancel()
    assert rows[0].finish == "cancelled" and len(rows[0].tokens) == 1


# ---- prompts, memory, weights -------------------------------------------------------------------------------------


def test_long_prompts_are_read_beside_rows_that_are_written():
    session = Spy(PlainSession(LONG["gpt2"], 64 * 20))
    engine = Engine(session, TOK, chunk=16)
    writing = engine.add("x", Sampling(max_tokens=40, ignore_eot=True))
    engine.step()
    engine.add(prompt_of(100), Sampling(max_tokens=1))
    engine.add(prompt_of(10), Sampling(max_tokens=1))
    for tokens in range(2, 9):
        assert writing in engine.step() and len(writing.tokens) == tokens
    assert session.steps[1:8] == [[1, 16]] * 6 + [[1, 4, 10]]
    engine.run()
    engine.add(prompt_of(100), Sampling(max_tokens=1))
    younger = engine.add("x", Sampling(max_tokens=40, ignore_eot=True))
    for tokens in range(1, 6):
        assert engine.step() == [younger] and len(younger.tokens) == tokens


def test_a_row_waits_for_pages_for_its_prompt_and_one_more():
    session = PlainSession(SMALL, 8 * 4, page=4)
    engine = Engine(session, TOK)
    first = engine.add(prompt_of(12), Sampling(max_tokens=4, ignore_eot=True))
    second = engine.add(prompt_of(16), Sampling(max_tokens=1, ignore_eot=True))
    third = engine.add("x", Sampling(max_tokens=1))
    assert engine.step() == [first]  # 3 pages and 1 ahead leave 4, it wants 5; and nobody overtakes
    assert first.tokens and not (second.tokens or third.tokens)
    engine.run()
    assert [row.finish for row in (first, second)] == ["length"] * 2


def test_a_prompt_that_fills_the_cache_may_try_when_it_is_alone():
    engine = Engine(PlainSession(SMALL, 5 * 4, page=4), TOK)
    rows = engine.add(prompt_of(20), Sampling(max_tokens=1), n=3)
    assert finished(engine, rows) == [alone(SMALL, prompt_of(20), Sampling(max_tokens=1), key) for key in range(3)]


def test_a_row_that_can_never_fit_is_refused_with_numbers(kind):
    engine = Engine(open_session(kind, LONG["gpt2"], 64), TOK)
    with pytest.raises(CacheFull, match=r"65 tokens takes 2 pages, the cache has 1"):
        engine.add(prompt_of(30), Sampling(max_tokens=36))
    row = engine.add(prompt_of(30), Sampling(max_tokens=35, ignore_eot=True))
    engine.run()
    assert row.finish == "length" and engine.idle


def test_pages_that_others_hold_are_named_and_the_row_goes_on_when_they_are_free():
    session = PlainSession(SMALL, 6 * 4, page=4)
    engine = Engine(session, TOK)
    row, sampling = engine.add("abcd", Sampling(max_tokens=16, ignore_eot=True)), Sampling(max_tokens=16)
    engine.step()
    other = session.add()
    session.step([other], [[1] * 16])
    with pytest.raises(CacheFull, match=r"9 tokens needs more than the 0 pages"):
        engine.run()
    waiting = engine.add("efgh", sampling)
    with pytest.raises(CacheFull):
        engine.run()
    session.free(other)
    engine.run()
    assert said(row) == alone(SMALL, b"abcd", row.sampling) and said(waiting) == alone(SMALL, b"efgh", sampling)


def test_after_an_update_every_token_comes_from_the_new_weights(kind):
    model = random_model(GPT2 | dict(vocab_size=V, context=100))
    session = PlainSession(model, 4096) if kind == "plain" else Session(model, 4096)
    engine, room = Engine(session, TOK, chunk=20), session.room
    rows = [engine.add(prompt_of(9 * i + 1, i), Sampling(max_tokens=12, ignore_eot=True)) for i in range(4)]
    for _ in range(4):
        engine.step()
    rows[1].pause()
    before = [len(row.tokens) for row in rows]
    assert before[0] == 4 and min(before) < 4
    batch = np.array([prompt_of(20)], np.int32)
    model.forward_backward(batch, batch, np.full((1, 20), 0.05, np.float32))
    model.update(lr=0.1)
    rows.append(engine.add("late", Sampling(max_tokens=12, ignore_eot=True)))
    engine.step()
    rows[1].resume()
    engine.run()
    for row, old in zip(rows, [*before, 0], strict=True):
        ids = row.prompt + [token.id for token in row.tokens]
        for i in range(old, 12):
            assert np.float32(row.tokens[i].logprob) == forward_logprob(
                model, ids[: len(row.prompt) + i], ids[len(row.prompt) + i]
            )
    stale = rows[0].tokens[3]  # the weights did change
    assert np.float32(stale.logprob) != forward_logprob(
        model, rows[0].prompt + [t.id for t in rows[0].tokens[:3]], stale.id
    )
    assert session.room == room


@pytest.mark.parametrize("where", ["advance", "draw", "fork"])
@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_breaks_off_loses_nothing(monkeypatch, where, late):
    session = PlainSession(SMALL, 400, page=4)
    engine, real = Engine(session, TOK, chunk=10), getattr(session, where)
    broken = iter([False, False, True] if where != "fork" else [True])

    def breaks(*arguments):
        if not next(broken, False):
            return real(*arguments)
        if late and where == "advance":
            real(*arguments)  # the session has gone on, the engine does not know
        raise KeyboardInterrupt

    monkeypatch.setattr(session, where, breaks)
    rows = [engine.add("one", Sampling(max_tokens=9)), *engine.add(prompt_of(25), Sampling(max_tokens=5), n=3)]
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    engine.run()
    for row in rows:
        assert said(row) == alone(SMALL, row.prompt, row.sampling, row.key)
    assert session.room == 100


# ---- text ---------------------------------------------------------------------------------------------------------


@given(st.text("abñ🦙", max_size=12), st.lists(st.text("abñ🦙", min_size=1, max_size=4), max_size=3), st.data())
def test_text_is_cut_before_the_first_stop_string_wherever_tokens_end(whole, stops, data):
    text, left, taken, stopped = _Text(stops), whole.encode(), "", False
    while left and not stopped:
        n = data.draw(st.integers(1, len(left)))
        stopped, left = text.feed(left[:n]), left[n:]
        piece = text.take()
        assert not any(stop in taken + piece for stop in stops)
        taken += piece
    text.close()
    taken += text.take()
    found = {whole.find(stop) for stop in stops} - {-1}
    assert stopped == bool(found)
    assert taken == "".join(text.pieces) and whole.startswith(taken)
    if not found:
        assert taken == whole
    else:
        assert not any(stop in taken for stop in stops)
        assert any(whole[len(taken) :].startswith(stop) for stop in stops)


def test_take_gives_what_is_new():
    engine = Engine(PlainSession(SMALL), TOK)
    row = engine.add("x", Sampling(max_tokens=6))
    row.force("aé🦙")
    taken = []
    while row.finish is None:
        engine.step()
        taken.append(row.take())
    assert taken == ["a", "", "é", "", "", "\ufffd"] and row.text() == "aé\ufffd" and row.take() == ""


def test_what_ends_a_text_is_kept_as_a_token_and_not_as_text():
    engine = Engine(PlainSession(SMALL), TOK)
    rows = engine.add("", Sampling(max_tokens=99, stop_ids=range(100), ignore_eot=True), n=5)
    assert rows[0].prompt == [TOK.eot]
    engine.run()
    for row in rows:
        *text, last = [token.id for token in row.tokens]
        assert row.finish == "stop" and last < 100 and all(id >= 100 for id in text)
        assert row.text() == TOK.decode(text)


def test_the_end_of_text_ends_unless_it_is_ignored():
    class EndsAtOnce(Remembering):
        def logits(self, tokens, last=True):
            return np.where(np.arange(V + 3) == TOK.eot, 9.0, 0.0).astype(np.float32)[None]

    engine = Engine(PlainSession(EndsAtOnce(SMALL.model)), TOK)
    ends, on, by_id = (
        engine.add("x", Sampling(max_tokens=2, temperature=0, **options))
        for options in ({}, {"ignore_eot": True}, {"ignore_eot": True, "stop_ids": [TOK.eot]})
    )
    engine.run()
    assert (ends.finish, ends.text(), len(ends.tokens)) == ("stop", "", 1)
    assert (on.finish, on.text()) == ("length", "<|endoftext|>" * 2)
    assert (by_id.finish, len(by_id.tokens)) == ("stop", 1)


class AlwaysSays(Remembering):
    """A model that draws one token, whatever it has read."""

    def __init__(self, id):
        super().__init__(SMALL.model)
        self.id = id

    def logits(self, tokens, last=True):
        return np.where(np.arange(V + 3) == self.id, 9.0, 0.0).astype(np.float32)[None]


@pytest.mark.parametrize("id", [BEGINS.bos, BEGINS.eot])
def test_a_text_ends_where_the_next_one_would_begin(id):
    engine = Engine(PlainSession(AlwaysSays(id)), BEGINS)
    ends, on = (engine.add("x", Sampling(max_tokens=2, temperature=0, ignore_eot=ignore)) for ignore in (False, True))
    engine.run()
    assert (ends.finish, ends.text(), [token.id for token in ends.tokens]) == ("stop", "", [id])
    assert (on.finish, len(on.tokens)) == ("length", 2)


def test_a_text_begins_with_bos_where_the_tokenizer_adds_it_and_ids_are_as_they_are():
    engine = Engine(PlainSession(SMALL), BEGINS)
    none = Sampling(max_tokens=0)
    for prompt in ("ab", b"ab"):
        assert engine.add(prompt, none).prompt == [257, 97, 98]
    for prompt in ("", b"", []):
        assert engine.add(prompt, none).prompt == [257]
    assert engine.add([97, 98], none).prompt == [97, 98]
    assert Engine(PlainSession(SMALL), TOK).add("ab", none).prompt == [97, 98]
    row = engine.add([97], Sampling(max_tokens=3))
    row.force("xyz")  # goes on
    engine.run()
    assert [token.id for token in row.tokens] == [*b"xyz"]
    same = dict(max_tokens=8, temperature=0)
    texts = ["".join(generate(SMALL.model, BEGINS, prompt, **same)) for prompt in ("ab", [257, 97, 98], [97, 98])]
    assert texts[0] == texts[1] != texts[2]


def test_generate_is_an_engine_of_one_row_and_leaves_nothing(monkeypatch):
    model, sessions = LONG["gpt2"], []

    def opened(model, max_tokens):
        sessions.append(open_session("plain", model, max_tokens))
        return sessions[-1]

    monkeypatch.setattr("barelm.engine.Session", opened)
    options = dict(max_tokens=30, seed=5, top_p=0.9)
    text = "".join(generate(model, TOK, "Once", row=2, **options))
    tokens, _ = alone(model, b"Once", Sampling(**options), key=2)
    assert text == TOK.decode([id for id, _ in tokens])
    pieces = generate(model, TOK, "Once", max_tokens=400)
    next(pieces)
    assert sessions[1].rows
    pieces.close()  # its reader has enough
    assert sessions[0].pages == 1 and sessions[1].pages == 3  # as much as the text can need
    assert not (sessions[0].rows or sessions[1].rows)


# ---- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("prompt", dict(prompt=[V + 3])),
        ("prompt", dict(prompt=[-1])),
        ("row", dict(row=-1)),
        ("row", dict(row=2**64)),
        ("row", dict(row=2**64 - 3, n=4)),
        ("n", dict(n=0)),
        ("stop_ids", dict(sampling=Sampling(stop_ids=[V]))),
    ],
)
def test_a_bad_argument_is_named_and_changes_nothing(name, arguments):
    session = PlainSession(SMALL)
    engine = Engine(session, TOK)
    with pytest.raises(ValueError, match=f"^{name}:"):
        engine.add(**({"prompt": "x"} | arguments))
    assert engine.idle and engine.rows == [] and not session.rows


def test_an_engine_of_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"^chunk:"):
        Engine(PlainSession(SMALL), TOK, chunk=0)
    with pytest.raises(ValueError, match=r"^tok:"):
        Engine(PlainSession(random_model(GPT2)), TOK)


def test_forcing_what_is_no_token_is_refused():
    row = Engine(PlainSession(SMALL), TOK).add("x")
    with pytest.raises(ValueError, match=r"^force: the id 257"):
        row.force([65, V])  # the model has it, the text cannot
    with pytest.raises(TypeError, match=r"^force:"):
        row.force([1.5])
    assert not row._forced


def test_no_tokens_asked_for_is_a_text_that_has_ended():
    engine = Engine(PlainSession(SMALL), TOK)
    row = engine.add("x", Sampling(max_tokens=0))
    assert (row.finish, row.text(), engine.idle, engine.step()) == ("length", "", True, [])
