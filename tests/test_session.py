"""Sessions: rows that join, grow, fork and leave have the bits of one forward pass; pages are shared, bounded and given
back; older weights are never sampled from."""

import signal
import threading

import barelm
import numpy as np
import pytest
from barelm import CacheFull, Session, StaleRow
from barelm.drawing import Sampling, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MIDDLE, assert_same_bits, random_batch, random_model, threads

V, CONTEXT, PRECISIONS = 301, 300, ("fp32", "bf16")
models = {}


def model_of(family, precision):
    """Made once: no test here changes it."""
    if (family, precision) not in models:
        models[family, precision] = random_model(MIDDLE[family], precision)
    return models[family, precision]


@pytest.fixture
def model():
    return model_of("gpt2", "fp32")


def ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, V, n).tolist()


def full_logits(model, tokens):
    return model.logits(np.array([tokens], np.int32))[0]


def full_logprob(model, tokens, target):
    targets = np.full((1, len(tokens)), -1, np.int32)
    targets[0, -1] = target
    return model.forward(np.array([tokens], np.int32), targets)[0, -1]


# ---- the bits


class Twin:
    """A session, and beside it what its rows and pages must be."""

    def __init__(self, model, max_tokens):
        self.model, self.session, self.rows = model, Session(model, max_tokens), {}

    def add(self, which):
        self.rows[self.session.add()] = []

    def fork(self, which):
        for row in self.pick(which, 1):
            for fork in self.session.fork(row, 2):
                self.rows[fork] = list(self.rows[row])

    def free(self, which):
        for row in self.pick(which, 1):
            self.session.free(row)
            del self.rows[row]

    def step(self, which, sizes=(1,)):
        rows = self.pick(which, 4)
        chunks = [ids(sizes[i % len(sizes)], which + i) for i in range(len(rows))]
        good = [i for i in range(len(rows)) if len(self.rows[rows[i]]) + len(chunks[i]) <= CONTEXT]
        rows, chunks = [rows[i] for i in good], [chunks[i] for i in good]
        needed, room = self.session.pages_needed(rows, [len(c) for c in chunks]), self.session.room
        if needed > room:
            with pytest.raises(CacheFull, match=f"{needed} more pages of 64 tokens needed, {room} of"):
                self.session.step(rows, chunks)
            assert self.session.room == room
            return
        logits = self.session.step(rows, chunks)
        assert logits.shape == (len(rows), V) and self.session.room == room - needed
        logprobs = self.session.logprobs([7] * len(rows)) if rows else []
        for i, (row, chunk) in enumerate(zip(rows, chunks, strict=True)):
            self.rows[row] += chunk
            assert_same_bits(logits[i], full_logits(self.model, self.rows[row]))
            assert_same_bits(logprobs[i], full_logprob(self.model, self.rows[row], 7))
        if rows:
            self.draw(logits, which)

    def draw(self, logits, which):
        """As from the logits themselves; of a row that nothing is wanted of, nothing is said."""
        rng, n = np.random.default_rng(which), len(logits)
        asked = [Sampling(temperature=float(rng.choice([0, 1])), top_k=int(rng.integers(1, V))) for _ in range(n)]
        u, vocab = rng.random(n), V - which % 9
        ids, logprobs, sampled = self.session.draw([None, *asked[1:]], u, vocab)
        want = draw(logits[1:, :vocab], asked[1:], u[1:])
        assert_same_bits(ids[1:], want[0])
        assert_same_bits(sampled[1:], want[1])
        assert_same_bits(logprobs[1:], self.session.logprobs(ids)[1:])

    def pick(self, which, most):
        order = np.random.default_rng(which).permutation(sorted(self.rows))
        return [int(row) for row in order[: 1 + which % most]]

    def end(self):
        for row, tokens in self.rows.items():
            assert self.session.length(row) == len(tokens)
            self.session.free(row)
        assert self.session.room == self.session.pages


actions = st.tuples(
    st.sampled_from(["add", "step", "step", "step", "fork", "free"]),
    st.integers(0, 2**20),
    st.lists(st.sampled_from([1, 1, 1, 2, 5, 63, 64, 65, 130]), min_size=1, max_size=4),
)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", MIDDLE)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_schedule_has_the_bits_of_one_forward_pass(family, precision, data):
    twin = Twin(model_of(family, precision), data.draw(st.integers(1, 1500), "max_tokens"))
    twin.add(0)
    with threads(data.draw(st.integers(1, 3), "threads")):
        for action, which, sizes in data.draw(st.lists(actions, min_size=4, max_size=25), "actions"):
            if action == "step":
                twin.step(which, sizes)
            else:
                getattr(twin, action)(which)
    twin.end()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_prompt_longer_than_what_goes_through_the_layers_at_once(precision):
    config = MIDDLE["llama"] | dict(context=1100)
    model = random_model(config, precision)
    session = Session(model, 4000)
    prompts = [ids(1100, 1), ids(3, 2), ids(700, 3), ids(600, 4)]
    rows = [session.add() for _ in prompts]
    for i, logits in enumerate(session.step(rows, prompts)):
        assert_same_bits(logits, full_logits(model, prompts[i]))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_backend(backend, precision, monkeypatch):
    monkeypatch.setenv("BARELM_ISA", backend)
    model = random_model(MIDDLE["llama"], precision)
    session = Session(model, 500)
    row, tokens = session.add(), []
    for n in (70, 1, 1, 3, 60, 1):
        chunk = ids(n, n)
        tokens += chunk
        (logits,) = session.step([row], [chunk])
        assert_same_bits(logits, full_logits(model, tokens))


def test_steps_of_several_threads_have_the_logits_of_their_own_rows(model):
    session, wrong = Session(model, 1000), []

    def go_on(first):
        row, tokens = session.add(), [first]
        for token in ids(60, first):
            (logits,) = session.step([row], [tokens[-1:]])
            if not np.array_equal(logits, full_logits(model, tokens)):
                wrong.append((first, len(tokens)))
            tokens.append(token)

    working = [threading.Thread(target=go_on, args=(first,)) for first in (3, 4, 5)]
    for thread in working:
        thread.start()
    for thread in working:
        thread.join()
    assert not wrong


def test_the_logprobs_of_a_step_at_another_temperature(model):
    session = Session(model, 100)
    row, tokens = session.add(), ids(9)
    session.step([row], [tokens])
    targets = np.full((1, 9), -1, np.int32)
    targets[0, -1] = 4
    want = model.forward(np.array([tokens], np.int32), targets, temperature=0.7)[0, -1]
    assert_same_bits(session.logprobs([4], temperature=0.7)[0], want)


@pytest.mark.parametrize("family", MIDDLE)
def test_weights_of_another_precision(family):
    """bf16 weights under a model of fp32: the bits of the model in bf16."""
    session, tokens = Session(model_of(family, "fp32"), 300, weights="bf16"), ids(70)
    (logits,) = session.step([session.add()], [tokens])
    assert_same_bits(logits, full_logits(model_of(family, "bf16"), tokens))


@pytest.mark.parametrize("family", MIDDLE)
def test_int8_is_close_and_does_not_depend_on_chunks(family):
    model, tokens = model_of(family, "fp32"), ids(90)
    session = Session(model, 1000, weights="int8")
    whole, parts, other = session.add(), session.add(), session.add()
    (want,) = session.step([whole], [tokens])
    for at in range(0, 60, 3):
        session.step([parts, other], [tokens[at : at + 3], [at]])
    for token in tokens[60:]:
        (got,) = session.step([parts], [[token]])
    assert_same_bits(got, want)
    exact = full_logits(model, tokens)
    assert np.sqrt(np.mean((want - exact) ** 2)) < 0.05 * exact.std()


# ---- pages


def test_a_row_costs_a_page_for_every_64_tokens(model):
    session = Session(model, 1000)
    assert session.pages == session.room == 16
    row = session.add()
    assert session.room == 16
    for n, free in ((1, 15), (63, 15), (1, 14), (64, 13), (63, 13)):
        session.step([row], [ids(n)])
        assert session.room == free
    session.free(row)
    assert session.room == 16


def test_forks_share_pages_and_copy_the_last_one_when_they_write(model):
    session = Session(model, 1000)
    row = session.add()
    session.step([row], [ids(100)])
    forks = session.fork(row, 3)
    assert session.room == 14
    assert session.pages_needed([row], [1]) == 1 and session.pages_needed([row, *forks], [1] * 4) == 3
    session.step(forks[:1], [[1]])
    assert session.room == 13  # it wrote to a copy
    session.free(row)
    assert session.room == 13  # two others have its pages still
    session.step(forks[1:], [[2], [3]])
    assert session.room == 12  # one copies, the last one keeps the page
    for fork in forks:
        session.free(fork)
    assert session.room == 16


def test_a_fork_of_whole_pages_costs_nothing_until_it_goes_on(model):
    session = Session(model, 1000)
    row = session.add()
    session.step([row], [ids(128)])
    (fork,) = session.fork(row)
    assert session.room == 14 and session.pages_needed([row, fork], [1, 1]) == 2


def test_a_full_cache_says_so_and_changes_nothing(model):
    session = Session(model, 130)
    rows = [session.add(), session.add()]
    session.step(rows, [ids(64), ids(65)])
    with pytest.raises(CacheFull, match="1 more pages of 64 tokens needed, 0 of 3 free"):
        session.step(rows, [[1], [2]])
    assert [session.length(row) for row in rows] == [64, 65]
    (logits,) = session.step(rows[1:], [[2]])
    assert_same_bits(logits, full_logits(model, [*ids(65), 2]))


def test_memory_does_not_grow_over_thousands_of_rows(model):
    session = Session(model, 2000)
    rng, rows = np.random.default_rng(0), []
    resident = None
    for i in range(10_000):
        action = rng.integers(0, 4)
        if action == 0 and len(rows) < 12:
            rows.append(session.add())
        elif action == 1 and rows and len(rows) < 12:
            rows += session.fork(rows[rng.integers(len(rows))])
        elif action == 2 and len(rows) > 6:
            session.free(rows.pop(rng.integers(len(rows))))
        elif rows:
            row = rows[rng.integers(len(rows))]
            if session.length(row) < 200 and session.pages_needed([row], [9]) <= session.room:
                session.step([row], [ids(9)])
        if i == 2_000:
            resident = resident_bytes()
    assert resident_bytes() < resident + (4 << 20)
    for row in rows:
        session.free(row)
    assert session.room == session.pages == 32


def resident_bytes():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


class Stop(Exception):
    pass


def test_a_signal_ends_a_long_step_and_leaves_the_rows_as_they_were(monkeypatch):
    """On the plain backend, where this step takes seconds."""
    monkeypatch.setenv("BARELM_ISA", "ref")
    config = MIDDLE["gpt2"] | dict(n_layer=12, n_embd=96, n_inner=384, context=1000)
    model = random_model(config)
    session = Session(model, 3000)
    rows = [session.add(), session.add()]
    session.step(rows, [ids(70), ids(3)])

    def stop(*_):
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Stop):
            session.step(rows, [ids(900), ids(900)])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert [session.length(row) for row in rows] == [70, 3]
    (logits,) = session.step(rows[:1], [[5]])
    assert_same_bits(logits, full_logits(model, [*ids(70), 5]))


# ---- weights that change


def trained(model):
    batch = random_batch(MIDDLE["gpt2"], 2, 20)
    model.forward_backward(*batch, np.full((2, 20), 1 / 40, np.float32))
    model.update(lr=0.01)


def test_after_an_update_new_rows_use_the_new_weights_and_old_ones_are_refused():
    model = random_model(MIDDLE["gpt2"])
    session = Session(model, 500)
    old, empty = session.add(), session.add()
    before = session.step([old], [ids(5)])[0]
    trained(model)
    with pytest.raises(StaleRow, match=r"rows\[1\].*older weights"):
        session.step([empty, old], [[1], [2]])
    assert session.length(empty) == 0 and session.length(old) == 5
    (after,) = session.step([empty], [ids(5)])
    assert_same_bits(after, full_logits(model, ids(5)))
    assert (after != before).any()
    with pytest.raises(StaleRow):
        session.step(session.fork(old), [[1]])


def test_refresh_takes_weights_that_were_written_by_hand():
    model = random_model(MIDDLE["gpt2"])
    session = Session(model, 500)
    row = session.add()
    session.step([row], [ids(3)])
    model.params["h.0.attn.c_attn.weight"][...] *= 0.5
    session.refresh()
    with pytest.raises(StaleRow):
        session.step([row], [[1]])
    (logits,) = session.step([session.add()], [ids(3)])
    assert_same_bits(logits, full_logits(model, ids(3)))


def test_a_session_keeps_its_model_alive():
    session = Session(random_model(MIDDLE["gpt2"]), 100)
    session.model = None
    (logits,) = session.step([session.add()], [ids(3)])
    assert_same_bits(logits, full_logits(random_model(MIDDLE["gpt2"]), ids(3)))


def test_threads_that_share_a_model_take_turns(model):
    session = Session(model, 4000)
    tokens, failed = ids(40), []
    want = full_logits(model, tokens)

    def work():
        for _ in range(10):
            row = session.add()
            if (session.step([row], [tokens])[0] != want).any() or (full_logits(model, tokens) != want).any():
                failed.append(row)
            session.free(row)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed and session.room == session.pages


# ---- what cannot be


@pytest.mark.parametrize(
    "rows, chunks, says",
    [
        ([0], [[]], r"chunks\[0\]: is empty"),
        ([0, 1], [[1], [2, 301]], r"chunks\[1\]: value 301 at \[1\] is outside \[0, 301\)"),
        ([0], [[-1]], r"chunks\[0\]: value -1 at \[0\]"),
        ([0], [[2**40]], r"chunks\[0\]: value 2147483647 at \[0\]"),
        ([0], [[1], [2]], "chunks: there are 2, rows has 1"),
        ([0, 9], [[1], [2]], r"rows\[1\]: there is no row 9"),
        ([0, 0], [[1], [2]], r"rows\[1\]: row 0 is there twice"),
        ([0], [ids(301)], r"chunks\[0\]: 301 tokens behind a row of 0 are more than the model's context of 300"),
        ([0], [[[1, 2]]], r"chunks\[0\]: has 2 dimensions"),
    ],
)
def test_a_wrong_step_names_what_is_wrong_and_changes_nothing(model, rows, chunks, says):
    session = Session(model, 500)
    assert [session.add(), session.add()] == [0, 1]
    with pytest.raises(ValueError, match=says):
        session.step(rows, chunks)
    assert session.length(0) == session.length(1) == 0 and session.room == session.pages


def test_other_mistakes(model):
    session = Session(model, 500)
    row = session.add()
    with pytest.raises(TypeError, match=r"chunks\[0\]: dtype is float64"):
        session.step([row], [[1.5]])
    with pytest.raises(RuntimeError, match="tokens: there are 1, the last step had 0 rows"):
        session.logprobs([1])
    assert session.logits().shape == (0, V)
    session.step([row], [[1]])
    with pytest.raises(RuntimeError, match="tokens: there are 2, the last step had 1 rows"):
        session.logprobs([1, 2])
    with pytest.raises(ValueError, match="value 301"):
        session.logprobs([301])
    with pytest.raises(RuntimeError, match="u: there are 2, the last step had 1 rows"):
        session.draw([Sampling()] * 2, [0.5] * 2)
    with pytest.raises(ValueError, match="options: R is 2, the draw has 1"):
        session.draw([Sampling()] * 2, [0.5])
    for u in -0.1, 1.0, float("nan"):
        with pytest.raises(ValueError, match=rf"u: must be in \[0, 1\), got {u}"):
            session.draw([Sampling()], [u])
    for vocab in 0, 302:
        with pytest.raises(ValueError, match=rf"vocab: is {vocab}, must be in \[1, 301\]"):
            session.draw([Sampling()], [0.5], vocab)
    with pytest.raises(ValueError, match="temperature"):
        session.logprobs([1], temperature=0)
    with pytest.raises(ValueError, match="n: is -1"):
        session.fork(row, -1)
    session.free(row)
    for call in (session.free, session.fork, session.length):
        with pytest.raises(ValueError, match=f"row: there is no row {row}"):
            call(row)
    with pytest.raises(ValueError, match="weights: is 'int4', must be one of 'fp32', 'bf16', 'int8'"):
        Session(model, 100, weights="int4")
    for max_tokens in (0, -1, 2**31):
        with pytest.raises(ValueError, match="max_tokens"):
            Session(model, max_tokens)
    with pytest.raises(MemoryError, match=r"KV cache: .* GiB needed, .* GiB free"):
        Session(barelm.Model(barelm.Config(**MIDDLE["gpt2"])), 2**30)


def test_an_id_is_never_given_twice(model):
    session = Session(model, 500)
    first = session.add()
    session.free(first)
    assert session.add() != first
