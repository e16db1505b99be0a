"""Sequences for recurrent policies as their users see them, in process and served alike; R2D2's rules by hand."""

import numpy as np
import pytest
import torch

import rl_buffer as rb

pytestmark = pytest.mark.timeout(60)
torch.set_num_threads(1)

L, BURN_IN, OVERLAP, N_STEP, GAMMA, ETA = 4, 2, 2, 2, 0.5, 0.9
T = BURN_IN + L + N_STEP
SPEC = rb.TransitionSpec(
    obs={"at": rb.Field((2,)), "image": rb.Field((2, 2), "uint8")},
    action=rb.Field((), "int64"),
    extras={"log_prob": rb.Field(())},
    recurrent_state={"h": rb.Field((3,)), "c": rb.Field((1,), "float64")},
)
OPTIONS = {"sequence_length": L, "burn_in": BURN_IN, "overlap": OVERLAP, "n_step": N_STEP, "gamma": GAMMA, "eta": ETA}
TABLES = {
    "prioritized": rb.ReplayTable(SPEC, capacity=64, sampler=rb.Prioritized(alpha=1.0), seed=3, **OPTIONS),
    "uniform": rb.ReplayTable(SPEC, capacity=8, seed=3, **OPTIONS),
}


@pytest.fixture(scope="module")
def server():
    with rb.BufferServer(TABLES) as server:
        yield server


@pytest.fixture(params=["in process", "served"])
def make_buffer(request):
    def make(name):
        if request.param == "served":
            return request.getfixturevalue("client").replay_buffer(name, beta=1.0)
        options = dict(OPTIONS)
        eta = options.pop("eta")
        table = TABLES[name]
        options |= {
            "buffer_size": table.capacity,
            "obs_shape": {"at": 2, "image": (2, 2)},
            "obs_dtype": {"at": "float32", "image": "uint8"},
            "action_shape": (),
            "action_dtype": "int64",
            "extras": SPEC.extras,
            "recurrent_state": SPEC.recurrent_state,
            "seed": table.seed,
        }
        if name == "uniform":
            return rb.ReplayBuffer(**options)
        return rb.PrioritizedReplayBuffer(**options, alpha=1.0, beta=1.0, eta=eta)

    return make


def observation(episode, step):
    return {"at": np.array([episode, step], np.float32), "image": np.full((2, 2), 10 * episode + step, np.uint8)}


def add_episode(buffer, episode, length, end="terminated"):
    """Step k of an episode has action 100 * episode + k and reward k; the state carried into it is k everywhere."""
    for step in range(length):
        last = step == length - 1
        buffer.add(
            observation(episode, step),
            100 * episode + step,
            float(step),
            last and end != "open",
            observation(episode, step + 1),
            truncated=last and end == "truncated",
            extras={"log_prob": -float(step)},
            recurrent_state={"h": np.full(3, step), "c": torch.tensor([step + 0.5], dtype=torch.float64)},
        )


def spans(batch):
    """(episode, first stored step, trained steps) of each sequence."""
    first = batch.observations["at"][:, 0].int().tolist()
    trained = [np.flatnonzero(mask) for mask in batch.train_mask.numpy()]
    return [(episode, start, (start + t).tolist()) for (episode, start), t in zip(first, trained, strict=True)]


def unique(batch):
    return sorted({(episode, start, tuple(trained)) for episode, start, trained in spans(batch)})


def test_an_episode_is_cut_into_overlapping_sequences_and_the_last_one_shifts_back(make_buffer):
    buffer = make_buffer("prioritized")
    add_episode(buffer, episode=1, length=9)
    buffer.flush()
    batch = buffer.get(len(buffer))  # stratified draws of equal masses: each once
    assert unique(batch) == [
        (1, 0, (0, 1, 2, 3)),  # nothing before it: the initial state is exact
        (1, 0, (2, 3, 4, 5)),
        (1, 2, (4, 5, 6, 7)),
        (1, 3, (5, 6, 7, 8)),  # shifted back, to end where the episode ends
    ]


def test_short_episodes_are_padded_with_a_mask_and_nothing_crosses_an_end(make_buffer):
    buffer = make_buffer("prioritized")
    add_episode(buffer, episode=1, length=1, end="truncated")
    add_episode(buffer, episode=2, length=3)
    buffer.flush()
    batch = buffer.get(2)
    assert unique(batch) == [(1, 0, (0,)), (2, 0, (0, 1, 2))]
    for i, (episode, _, trained) in enumerate(spans(batch)):
        length = len(trained)
        assert batch.mask[i].tolist() == [True] * length + [False] * (T - length)
        seen = batch.observations["at"][i].tolist()
        assert seen[: length + 1] == [[episode, step] for step in range(length + 1)], "the final observation is there"
        assert not np.any(seen[length + 1 :]), "and then zeros"
        assert batch.observations["image"][i, :, 0, 0].tolist()[: length + 1] == [
            10 * episode + step for step in range(length + 1)
        ]


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_targets_of_trained_steps_are_those_of_the_n_step_transitions(make_buffer, end):
    buffer = make_buffer("prioritized")
    add_episode(buffer, episode=0, length=11, end=end)
    buffer.flush()
    batch = buffer.get(len(buffer))
    values = batch.observations["at"][:, :, 1] + 7.0  # V(obs of step k) = k + 7
    targets = batch.rewards + batch.discounts * values.gather(1, batch.bootstrap_steps)
    for i, (_, start, trained) in enumerate(spans(batch)):
        for step in trained:
            n = min(N_STEP, 11 - step)
            stops = end == "terminated" and step + n == 11
            expected = sum(GAMMA**k * (step + k) for k in range(n)) + (0 if stops else GAMMA**n * (step + n + 7.0))
            t = step - start
            assert targets[i, t].item() == pytest.approx(expected)
            assert batch.n_steps[i, t].item() == n
            assert batch.dones[i, t].item() == stops
            assert batch.step_rewards[i, t].item() == step
            assert batch.actions[i, t].item() == step
            assert batch.extras["log_prob"][i, t].item() == -step
        assert batch.recurrent_states["h"][i].tolist() == [start] * 3
        assert batch.recurrent_states["c"][i].tolist() == [start + 0.5]
        assert batch.observations["image"].dtype == torch.uint8
        assert batch.recurrent_states["c"].dtype == torch.float64


def test_the_priority_is_a_mix_of_largest_and_mean_over_trained_steps(make_buffer):
    buffer = make_buffer("prioritized")
    add_episode(buffer, episode=1, length=2)
    add_episode(buffer, episode=2, length=4)
    buffer.flush()
    batch = buffer.get(2)
    errors = torch.full((2, T), float("nan"))  # outside of the trained steps nothing is looked at
    masses = {}
    for i, (episode, _, trained) in enumerate(spans(batch)):
        errors[i, : len(trained)] = torch.tensor([-2.0, 1.0, 3.0, -8.0])[: len(trained)] * episode
        magnitudes = errors[i, : len(trained)].abs()
        masses[episode] = (ETA * magnitudes.max() + (1 - ETA) * magnitudes.mean()).item()
    assert masses == {1: pytest.approx(0.9 * 2 + 0.1 * 1.5), 2: pytest.approx(0.9 * 16 + 0.1 * 7)}
    buffer.update_priorities(batch, errors.requires_grad_())
    drawn = []
    for _ in range(200):
        batch = buffer.get(2)
        episodes = [episode for episode, _, _ in spans(batch)]
        least = min(masses[episode] for episode in episodes)
        assert batch.weights.tolist() == pytest.approx([least / masses[episode] for episode in episodes], rel=1e-5)
        drawn += episodes
    share = masses[2] / (masses[1] + masses[2])
    assert abs(np.mean(np.array(drawn) == 2) - share) < 5 * (share * (1 - share) / len(drawn)) ** 0.5


def test_td_errors_may_also_be_one_number_for_each_sequence(make_buffer):
    buffer = make_buffer("prioritized")
    add_episode(buffer, episode=1, length=2)
    buffer.flush()
    batch = buffer.get(1)
    buffer.update_priorities(batch, torch.tensor([[3.0]]))
    with pytest.raises(
        rb.InvalidInput, match=rf"td_errors has shape \(1, 2\), expected \(1,\) or \(1, 1\) or \(1, {T}\)"
    ):
        buffer.update_priorities(batch, torch.ones(1, 2))
    errors = torch.ones(1, T)
    errors[0, 1] = float("nan")
    with pytest.raises(rb.InvalidInput, match=r"td_errors\[0, 1\] is nan"):
        buffer.update_priorities(batch, errors)


def test_the_ring_keeps_the_newest_sequences(make_buffer):
    buffer = make_buffer("uniform")
    for episode in range(25):
        add_episode(buffer, episode, length=3, end="truncated")
        buffer.flush()
    assert len(buffer) == 8
    seen = {episode for _ in range(20) for episode, _, _ in spans(buffer.get(8))}
    assert seen == set(range(17, 25))


def test_a_closed_buffer_has_kept_the_unfinished_episode(make_buffer, request):
    buffer = make_buffer("prioritized")
    add_episode(buffer, episode=5, length=3, end="open")
    buffer.flush()
    assert len(buffer) == 0
    buffer.close()
    if "served" in request.node.name:
        buffer = request.getfixturevalue("client").replay_buffer("prioritized")
    batch = buffer.get(1)
    assert spans(batch) == [(5, 0, [0, 1, 2])]
    assert batch.discounts[0, :3].tolist() == [GAMMA**2, GAMMA**2, GAMMA], "cut, but not terminated"


def test_a_sequence_table_asks_for_the_recurrent_state_and_refuses_priority_by_name(make_buffer):
    buffer = make_buffer("prioritized")
    arguments = (observation(0, 0), 0, 0.0, False, observation(0, 1))
    state = {"h": np.zeros(3), "c": np.zeros(1)}
    extras = {"log_prob": 0.0}
    with pytest.raises(rb.InvalidInput, match="recurrent_state= is missing"):
        buffer.add(*arguments, extras=extras)
    with pytest.raises(rb.InvalidInput, match=r"recurrent_state\['h'\] has shape \(4,\), expected \(1, 3\)"):
        buffer.add(*arguments, extras=extras, recurrent_state=state | {"h": np.zeros(4)})
    with pytest.raises(rb.InvalidInput, match="priority"):
        buffer.add(*arguments, extras=extras, recurrent_state=state, priority=1.0)
    buffer.flush()
    assert len(buffer) == 0


@pytest.mark.parametrize("make_buffer", ["in process"], indirect=True)
def test_a_saved_buffer_of_sequences_goes_on_in_the_middle_of_an_episode(tmp_path, make_buffer):
    first, second = make_buffer("prioritized"), make_buffer("prioritized")
    add_episode(first, episode=1, length=7)
    add_episode(first, episode=2, length=3, end="open")
    first.save(tmp_path / "sequences")
    second.load(tmp_path / "sequences")
    for buffer in (first, second):
        for step in range(3, 6):
            buffer.add(
                observation(2, step),
                200 + step,
                float(step),
                step == 5,
                observation(2, step + 1),
                extras={"log_prob": 0.0},
                recurrent_state={"h": np.full(3, step), "c": np.full(1, step)},
            )
    assert len(first) == len(second)
    for _ in range(3):
        one, other = first.get(5), second.get(5)
        assert spans(one) == spans(other)
        assert torch.equal(one.recurrent_states["h"], other.recurrent_states["h"])
        assert torch.equal(one.weights, other.weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 0}, r"sequence_length must be in \[1, \d+\], got 0"),
        ({"sequence_length": 4, "overlap": 4}, r"overlap must be in \[0, 3\], got 4"),
        ({"sequence_length": 4, "burn_in": -1}, "burn_in must be in"),
        ({"burn_in": 3}, r"burn_in must be in \[0, 0\] without sequence_length, got 3"),
        ({"sequence_length": 4, "eta": 1.5}, r"eta must be in \[0.0, 1.0\], got 1.5"),
    ],
)
def test_sequences_that_cannot_be_are_refused(options, message):
    plain = rb.TransitionSpec(obs=rb.Field((1,)), action=rb.Field(()))
    with pytest.raises(rb.InvalidInput, match=message):
        rb.ReplayTable(plain, capacity=10, **options)


def test_a_recurrent_state_without_sequences_is_refused():
    with pytest.raises(rb.InvalidInput, match="only sequences keep; give sequence_length"):
        rb.ReplayTable(SPEC, capacity=10)
    with pytest.raises(rb.InvalidInput, match="need gamma="):
        rb.ReplayBuffer(10, 1, (1,), (1,), sequence_length=4)
