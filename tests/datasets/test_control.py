"""Environments and replay of the control domain: dynamics, images, n-step returns, stacks, resume."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import TimeLimit
from moezoo.datasets.control import ControlData
from moezoo.datasets.control_envs import (
    ActionRepeat,
    Frame,
    NoBlackFrames,
    PixelPendulum,
    open_env,
    pendulum_frames,
    prepare,
)
from moezoo.datasets.control_replay import Replay
from moezoo.datasets.control_rollout import Collector, play
from moezoo.errors import UserError

GENERATOR = np.random.default_rng(0)


def episode(length, size=4):
    """Frames, actions and rewards of a made-up episode."""
    frames = GENERATOR.integers(0, 256, (length + 1, 1, size, size), dtype=np.uint8)
    return frames, torch.rand(length, 2), GENERATOR.normal(size=length)


def fill(replay, frames, actions, rewards, terminated=False):
    replay.begin(Frame(frames[0], None))
    for t, (action, reward) in enumerate(zip(actions, rewards, strict=True)):
        last = t == len(actions) - 1
        replay.add(action, float(reward), terminated and last, not terminated and last, Frame(frames[t + 1], None))


def random_policy(seed, actions=1):
    generator = torch.Generator().manual_seed(seed)
    return lambda seen: torch.rand(len(seen.pixels), actions, generator=generator) * 2 - 1


def test_pixel_pendulum_has_gymnasiums_dynamics():
    ours, theirs = PixelPendulum(size=32), gym.make("Pendulum-v1")
    seen, _ = ours.reset(seed=7)
    theirs.reset(seed=7)
    assert seen.shape == (1, 32, 32) and seen.dtype == np.uint8
    for _ in range(150):
        action = GENERATOR.uniform(-1, 1, 1).astype(np.float32)
        seen, reward, terminated, truncated, _ = ours.step(action)
        _, expected, *_ = theirs.step(2 * action)
        assert reward == pytest.approx(float(expected)) and not terminated and not truncated
        assert ours.observation_space.contains(seen)
    np.testing.assert_array_equal(ours.pendulum.state, theirs.unwrapped.state)


def test_the_rod_points_where_the_angle_says():
    frames = pendulum_frames(40, 360).astype(float)[:, 0]
    place = np.arange(40) - 19.5
    weight = frames.sum((1, 2))
    right, up = (frames * place).sum((1, 2)) / weight, -(frames * place[:, None]).sum((1, 2)) / weight
    angle = np.arange(360) * 2 * np.pi / 360
    turned = np.angle((up - 1j * right) * np.exp(-1j * angle))  # up is 0, counter-clockwise is positive
    assert np.abs(turned).max() < 0.02
    assert weight.std() / weight.mean() < 0.02, "as bright in any direction"
    env = PixelPendulum(40)
    env.reset(seed=0)
    env.pendulum.state = np.array([np.pi / 2 + 2 * np.pi, 0.0])
    np.testing.assert_array_equal(env._frame(), env.table[180])


def test_n_step_returns_by_hand():
    for n, gamma in ((1, 0.9), (3, 0.9), (5, 0.5)):
        frames, actions, rewards = episode(9)
        replay = Replay(64, (1, 4, 4), 0, 2, 3, n, gamma)
        fill(replay, frames, actions, rewards)
        starts = torch.arange(9 - n + 1)
        batch = replay.at(torch.zeros_like(starts), starts, torch.full_like(starts, n))
        for t in starts.tolist():
            expected = sum(gamma**i * rewards[t + i] for i in range(n))
            assert float(batch.reward[t]) == pytest.approx(expected, rel=1e-5)
            np.testing.assert_array_equal(batch.next_observation.pixels[t, -1], frames[t + n, 0])
        torch.testing.assert_close(batch.discount, torch.full((len(starts),), gamma**n))
        torch.testing.assert_close(batch.action, actions[: len(starts)])


def test_termination_ends_the_return_and_truncation_does_not():
    for terminated, factor in ((True, 0.0), (False, 0.9**3)):
        frames, actions, rewards = episode(5)
        replay = Replay(64, (1, 4, 4), 0, 2, n_step=3, gamma=0.9)
        fill(replay, frames, actions, rewards, terminated)
        drawn = replay.sample(200)
        at_end = (drawn.next_observation.pixels[:, -1] == torch.from_numpy(frames[-1, 0])).flatten(1).all(1)
        assert at_end.any() and not at_end.all()
        torch.testing.assert_close(drawn.discount[at_end], torch.full((int(at_end.sum()),), factor))
        torch.testing.assert_close(drawn.discount[~at_end], torch.full((int((~at_end).sum()),), 0.9**3))


def test_an_episode_shorter_than_n_is_one_window():
    frames, actions, rewards = episode(2)
    replay = Replay(64, (1, 4, 4), 0, 2, n_step=10, gamma=0.9)
    fill(replay, frames, actions, rewards)
    drawn = replay.sample(8)
    torch.testing.assert_close(drawn.discount, torch.full((8,), 0.81))
    torch.testing.assert_close(drawn.reward, torch.full((8,), float(rewards[0] + 0.9 * rewards[1])))
    np.testing.assert_array_equal(drawn.next_observation.pixels[0, -1], frames[2, 0])


def naive(episodes, stack):
    """Every stacked observation of every episode, frames repeated at the start."""
    rows = []
    for frames, *_ in episodes:
        padded = np.concatenate([np.repeat(frames[:1], stack - 1, 0), frames])
        rows.append(np.stack([padded[t : t + stack, 0] for t in range(len(frames))]))
    return rows


def test_stacks_equal_naive_ones_and_frames_are_kept_once():
    episodes = [episode(length) for length in (7, 4, 11)]
    replay = Replay(40, (1, 4, 4), 0, 2, frame_stack=3, n_step=3)
    for each in episodes:
        fill(replay, *each)
    assert replay.nbytes == 40 * 4 * 4 and replay.written == 8 + 5 + 12 and replay.steps == 22
    rows, start = naive(episodes, 3), 0
    for (frames, *_), expected in zip(episodes, rows, strict=True):
        first = torch.arange(start, start + len(frames) - 3)
        batch = replay.at(torch.full_like(first, start), first, torch.full_like(first, 3))
        np.testing.assert_array_equal(batch.observation.pixels, expected[:-3])
        np.testing.assert_array_equal(batch.next_observation.pixels, expected[3:])
        start += len(frames)
    everything = {row.tobytes() for episode_rows in rows for row in episode_rows}
    drawn = replay.sample(300)
    assert all(row.numpy().tobytes() in everything for row in drawn.observation.pixels), "no stack leaks over a reset"
    assert {row.numpy().tobytes() for row in drawn.observation.pixels} == {
        row.tobytes() for episode_rows in rows for row in episode_rows[:-3]
    }


def test_the_ring_forgets_whole_episodes():
    replay = Replay(30, (1, 4, 4), 0, 2, frame_stack=3, n_step=2)
    kept = []
    for _ in range(12):
        kept.append(episode(6))
        fill(replay, *kept[-1])
        whole = kept[-4:]  # 4 episodes of 7 frames fit into 30
        assert replay.steps == 6 * len(whole)
        known = {row.tobytes() for rows in naive(whole, 3) for row in rows}
        drawn = replay.sample(64)
        for seen in (drawn.observation, drawn.next_observation):
            assert all(row.numpy().tobytes() in known for row in seen.pixels)
    with pytest.raises(UserError, match="an episode is longer"):
        fill(replay, *episode(30))


def test_state_and_pixels_together():
    replay = Replay(20, (3, 2, 2), 5, 1, frame_stack=2, n_step=1)
    frames = [Frame(np.full((3, 2, 2), t, np.uint8), np.full(5, t, np.float32)) for t in range(4)]
    replay.begin(frames[0])
    for t in range(3):
        replay.add(torch.zeros(1), 0.0, False, t == 2, frames[t + 1])
    drawn = replay.sample(16)
    assert drawn.observation.pixels.shape == (16, 6, 2, 2)
    newest = drawn.observation.pixels[:, -1, 0, 0].float()
    torch.testing.assert_close(drawn.observation.state, newest[:, None].expand(-1, 5))
    torch.testing.assert_close(drawn.next_observation.state, newest[:, None].expand(-1, 5) + 1)


class Countdown(gym.Env):
    """Terminates after `length` steps, calls every third step a success; shows one colour if `black`."""

    def __init__(self, length=7, black=False):
        self.length, self.black = length, black
        self.observation_space = gym.spaces.Box(0, 255, (1, 8, 8), np.uint8)
        self.action_space = gym.spaces.Box(-2.0, 6.0, (1,), np.float32)

    def _see(self):
        image = np.zeros((1, 8, 8), np.uint8)
        image[0, 0, 0] = 0 if self.black else 1 + self.t
        return image

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.felt = 0, []
        return self._see(), {}

    def step(self, action):
        self.t += 1
        self.felt.append(float(action[0]))
        return self._see(), 1.0, self.t == self.length, False, {"success": self.t % 3 == 0}


def test_actions_are_repeated_scaled_and_stop_at_the_end():
    env = prepare(Countdown(7), action_repeat=3)
    env.reset(seed=0)
    rewards, flags, successes = [], [], []
    for action in (-1.0, 1.0, 0.0):
        _, reward, terminated, truncated, info = env.step(np.array([action], np.float32))
        rewards, flags = [*rewards, reward], [*flags, (terminated, truncated)]
        successes.append(info["success_steps"])
    assert rewards == [3.0, 3.0, 1.0] and flags[-1] == (True, False) and not any(flags[0]) and successes == [1, 1, 0]
    assert env.unwrapped.felt == [-2.0] * 3 + [6.0] * 3 + [2.0]
    limited = ActionRepeat(TimeLimit(Countdown(100), 4), 3)
    limited.reset(seed=0)
    limited.step(np.zeros(1))
    assert limited.step(np.zeros(1))[1:4] == (1.0, False, True), "a time limit truncates"


def test_black_frames_are_refused():
    with pytest.raises(UserError, match=r"frame of one colour \(0\).*MUJOCO_GL"):
        NoBlackFrames(Countdown(black=True)).reset(seed=0)
    env = NoBlackFrames(Countdown())
    env.reset(seed=0)
    env.unwrapped.black = True
    with pytest.raises(UserError, match="keep every environment open"):
        env.step(np.zeros(1))


def collector(seed=3, frame_stack=3):
    env = prepare(TimeLimit(PixelPendulum(16), 20), 2)
    return Collector(env, Replay(500, (1, 16, 16), 0, 1, frame_stack, seed=seed), 2, 12, 0.5, None, seed)


def test_the_collector_counts_frames_and_returns():
    playing, ended = collector(), []
    for step in range(1, 36):
        found = playing.step(random_policy(0))
        assert playing.frame == 2 * step
        ended += [found] if found else []
    assert [e.length for e in ended] == [10, 10, 10] and [e.seed for e in ended] == [3, 4, 5]
    stored = playing.replay.records[:10, -2].sum()
    assert float(stored) == pytest.approx(0.5 * ended[0].episode_return, rel=1e-5), "only learning sees the scale"
    assert len({e.episode_return for e in ended}) == 3
    assert [e.random for e in ended] == [True, False, False], "frames 0 to 12 had random actions"


@pytest.mark.parametrize("with_replay", [True, False])
def test_a_collector_goes_on_where_it_stopped(with_replay):
    one = collector()
    for _ in range(14):
        one.step(random_policy(1))
    state = one.state_dict(with_replay)
    other = collector(seed=99)
    other.load_state_dict(state)
    assert other.frame == 28
    if not with_replay:
        assert not other.replay.episodes
        other.step(random_policy(5))
        assert other.taken and len(other.taken) == 1, "the episode begins again, with its own seed"
        return
    policies = random_policy(5), random_policy(5)
    for _ in range(30):
        first, second = one.step(policies[0]), other.step(policies[1])
        assert (first is None) == (second is None)
        if first:
            assert (first.episode_return, first.seed) == (second.episode_return, second.seed)
    a, b = one.replay.sample(32), other.replay.sample(32)
    assert all(torch.equal(x, y) for x, y in zip((a.action, a.reward), (b.action, b.reward), strict=True))
    assert torch.equal(a.next_observation.pixels, b.next_observation.pixels)


def test_playing_side_by_side_changes_nothing():
    def policy(seen):
        return (seen.pixels.float().mean((1, 2, 3))[:, None] / 20).sin()

    envs = [prepare(TimeLimit(PixelPendulum(16), 30), 2) for _ in range(3)]
    together = list(play(envs, range(5), policy, 3, None, record=True))
    alone = [e for seed in range(5) for e in play(envs[:1], [seed], policy, 3, None, record=True)]
    assert [e.episode_return for e in together] == [e.episode_return for e in alone]
    assert len(together[0].frames) == 16 and len(together[0].actions) == len(together[0].rewards) == 15
    assert sum(together[0].rewards) == pytest.approx(together[0].episode_return)


def test_success_is_counted_in_simulator_steps():
    envs = [prepare(Countdown(7), 2)]
    for after, expected in ((1, True), (2, True), (3, False)):
        (found,) = play(envs, [0], lambda seen: torch.zeros(1, 1), 1, after)
        assert found.success is expected and found.length == 4 and found.episode_return == 7.0


def test_the_datamodule_collects_before_it_hands_out_batches():
    torch.manual_seed(0)
    data = ControlData(size=16, batch_size=8, seed_frames=440, eval_every=600, frames=1200, capacity=2000)
    assert data.schema["pixels"] == [3, 16, 16] and data.schema["dataset"] == "pixel_pendulum"
    with pytest.raises(UserError, match="set `policy`"):
        data.interact()
    data.setup("fit")
    data.policy = random_policy(0)
    loader = data.train_dataloader()
    steps = list(loader)
    assert len(loader) == len(steps) == 150 and steps[-1].frame == data.frame == 600
    assert next(s.frame for s in steps if s.batch is not None) == 440
    assert sum(len(s.episodes) for s in steps) == 3 and steps[-1].batch.reward.shape == (8,)
    seeds = torch.cat([batch.seed for batch in data.val_dataloader()])
    assert len(seeds) == 10 and not set(seeds.tolist()) & {
        int(s) for batch in data.test_dataloader() for s in batch.seed
    }


def test_the_fingerprint_follows_what_is_measured():
    base = ControlData().schema["fingerprint"]
    assert ControlData(batch_size=7, n_step=1).schema["fingerprint"] == base, "how one learns is no part of it"
    others = [
        ControlData(size=32),
        ControlData(action_repeat=4, frames=16_000, eval_every=1600),
        ControlData(test_episodes=3),
    ]
    assert len({base, *(other.schema["fingerprint"] for other in others)}) == 4


def test_any_gymnasium_environment_with_continuous_actions():
    data = ControlData("gym:Pendulum-v1", action_repeat=1, frame_stack=1, eval_every=100, frames=200, seed_frames=200)
    assert data.schema["pixels"] is None and data.schema["state"] == 3 and data.schema["dataset"] == "pendulum-v1"
    found = data.play([5, 6], lambda seen: seen.state[:, :1])
    assert [e.length for e in found] == [200, 200]


def test_random_policy_scores_what_is_known_of_pendulum():
    data = ControlData(size=16)
    returns = np.array([e.episode_return for e in data.play(range(60), random_policy(0))])
    assert -1400 < returns.mean() < -1050 and 150 < returns.std() < 400  # the spec: -1235 +- 273


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "atari"}, "expected pixel_pendulum, gym:<id>"),
        ({"env": "gym:Nothing-v0"}, "Gymnasium has no such environment"),
        ({"env": "gym:CartPole-v1"}, "expected bounded continuous actions"),
        ({"options": {"colour": 1}}, "data.options=.*colour"),
        ({"size": 4}, "expected at least 8"),
        ({"frames": 2500}, "multiple of eval_every"),
        ({"eval_every": 1001, "frames": 1001}, "action_repeat \\* update_every = 4"),
        ({"gamma": 0.0}, "data.gamma=0.0"),
        ({"batch_size": 0}, "data.batch_size=0"),
    ],
)
def test_mistakes_are_told_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        _ = ControlData(**changes).schema
    assert "\n" not in str(caught.value)


def test_nothing_is_drawn_from_an_empty_replay():
    with pytest.raises(UserError, match="no finished episode yet"):
        Replay(10, (1, 4, 4), 0, 1).sample(2)


def test_the_environment_is_what_its_name_says():
    opened = open_env("pixel_pendulum", 24, 2, "fast", {"angles": 90})
    env = opened.make()
    seen, _ = env.reset(seed=0)
    assert seen.shape == (1, 24, 24) and opened.success_after is None
    length = 0
    while True:
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        length += 1
        if terminated or truncated:
            break
    assert length == 100 and truncated and not terminated
