"""What happens around the updates of any algorithm: counts, figures, evaluations, files, and when a run is over.

    Session(agent, address, ...).run(train)      train(agent, session) is the algorithm's own loop:

        for batch in session.batches(sampler):   until the run is over; the crew is tended meanwhile
            loss = agent.update(batch)
            session.updated(loss=loss)           publishes parameters and evaluates when it is time

One thread. Talks to the server through `session.client`, and knows neither networks nor losses.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gymnasium as gym
from torch import Tensor

import rl_buffer as rb
from learner.agent import TABLE, Agent
from learner.display import Display
from learner.evaluation import CONFIRMATION_SEED, FINAL_SEED, PROGRESS_SEED, evaluate
from learner.rates import Rates
from learner.reporters import Reporters
from learner.run_directory import RunDirectory

FINAL_EPISODES = 100
_CONFIRMATION_FACTOR = 9
_TICK_S = 0.25  # between looks at the server's figures, the crew and the clock
_REPORT_EVERY_S = 2.0
_SAMPLE_TIMEOUT_S = 1.0  # a wait is cut into pieces, so that the crew is tended while it lasts
_LAST_STEP_TICK_S = 0.02
_WRITERS_TIMEOUT_S = 30.0


class Session:
    """One learner's time with one server."""

    def __init__(
        self,
        agent: Agent,
        address: str,
        run: RunDirectory,
        display: Display,
        reporters: Reporters,
        *,
        resume: bool = False,
        tend_crew: Callable[[], Sequence[str]] = lambda: (),
        num_actors: int | None = None,
    ) -> None:
        """Wait for the server, and bring back what `resume` asks for.

        Args:
            agent: what learns.
            address: of a server with a table called "replay".
            run: where files go.
            display: shows progress.
            reporters: take the figures, every few seconds and at each evaluation.
            resume: continue from the run directory's learner state.
            tend_crew: called a few times a second; returns news of the actors.
            num_actors: for the summary; None counts the attached writers.
        """
        self.agent = agent
        self.resumed = resume
        self.env_steps = 0
        self._run, self._display, self._tend_crew, self._num_actors = run, display, tend_crew, num_actors
        self._reporters = reporters
        self._threshold = gym.spec(agent.env_id).reward_threshold
        display.say([f"waiting for a server at {address}"])
        self.client = rb.connect(address, timeout_s=60.0, name="learner")
        self.table = self.client.tables[TABLE]
        # Inserts into a table of rollouts are whole fragments; autoreset dummies count as steps.
        is_rollouts = isinstance(self.table, rb.RolloutTable)
        self._steps_per_insert = self.table.num_steps * self.table.num_envs if is_rollouts else 1
        figures = self.client.info()["tables"][TABLE]
        self.samples_before = figures["samples"]
        # Of a server whose samples went to somebody else, only what comes from now on counts; what nobody has learned
        # from yet belongs to this run.
        self._inserts_before = figures["inserts"] if self.samples_before else 0
        wall_s_before = 0.0
        if resume:
            tensors, counters = run.load_learner()
            agent.load(tensors, int(counters["updates"]), int(counters["samples"]))
            self.env_steps, wall_s_before = int(counters["env_steps"]), counters["wall_s"]
        self._steps_before = self.env_steps
        self._started_s = time.monotonic() - wall_s_before
        self._rates = Rates()
        self._measures: dict[str, float | Tensor] = dict.fromkeys(agent.measures, float("nan"))
        self._row: dict[str, float] = {}
        self._stats: dict[str, float] = {}
        self._version = 0
        self._eval_return, self._best_eval_return = float("nan"), float("-inf")
        self._solved, self._stopped_by = False, "max_env_steps"
        self._next_look_s = 0.0
        self._next_report_s = time.monotonic() + _REPORT_EVERY_S
        period = agent.options.eval_period
        self._next_eval = period * (1 + self.env_steps // period)

    @property
    def inserts_at_end(self) -> int:
        """What the table's count of inserts is when this run reaches `max_env_steps`."""
        return self._inserts_before + self.agent.options.max_env_steps - self._steps_before

    def run(self, train: Callable[[Any, "Session"], None]) -> dict[str, Any]:
        """Let `train(agent, session)` learn, evaluate what came of it; return the summary, also in summary.json."""
        try:
            train(self.agent, self)
        except KeyboardInterrupt:
            self._stopped_by = "interrupted"
        return self._finish()

    # ---- for the algorithm's loop --------------------------------------------------------------------------

    def batches(self, sampler: Any, num_batches: int | None = None) -> Iterator[Any]:
        """Batches until the run is over: after `num_batches` of them, or (None) at `max_env_steps`."""
        self._display.say([f"waiting for {self.table.rate_limiter.min_size_to_sample:,} transitions"])
        num_given = 0
        while self.goes_on() if num_batches is None else num_given < num_batches and not self._solved:
            self._tick()
            try:
                batch = sampler.sample(timeout_s=_SAMPLE_TIMEOUT_S)
            except rb.DeadlineExceeded:
                continue
            num_given += 1
            yield batch

    def rollouts(self, reader: Any) -> Iterator[Any]:
        """Rollouts of one update each, until `max_env_steps`."""
        self._display.say(["waiting for the first rollout"])
        while self.goes_on():
            self._tick()
            try:
                rollouts = reader.take(timeout_s=_SAMPLE_TIMEOUT_S)
            except rb.DeadlineExceeded:
                continue
            self.env_steps += rollouts.num_fragments * self._steps_per_insert  # until the next look
            yield rollouts

    def goes_on(self) -> bool:
        """Whether neither `max_env_steps` nor the reward threshold is reached, as of the last look."""
        return not self._solved and self.env_steps < self.agent.options.max_env_steps

    def updated(self, **measures: Tensor) -> None:
        """Say that `agent` made an update, and what it measured: scalars, left on their device until they are shown."""
        self._measures = measures
        options = self.agent.options
        if self.agent.updates % options.publish_period == 0:
            self.publish()
        if self.env_steps >= self._next_eval:
            self._next_eval += options.eval_period
            if self._evaluate() and options.stop:
                self._solved, self._stopped_by = True, "reward threshold"

    def publish(self) -> None:
        """Give the actors the policy as it is now."""
        self._version = self.client.publish_parameters(self.agent.policy.state_dict())

    def wait_for_last_step(self) -> None:
        """Wait until the actors reach `max_env_steps`, unless the run has ended for another reason."""
        while self.goes_on():
            time.sleep(_LAST_STEP_TICK_S)
            self._look()

    def wait_for_writers(self, num_fragments: int) -> None:
        """Wait until so many fragments are begun, or some seconds: actors begin one before they fetch parameters."""
        deadline_s = time.monotonic() + _WRITERS_TIMEOUT_S
        while self.client.info()["tables"][TABLE]["reserved_rows"] < num_fragments and time.monotonic() < deadline_s:
            time.sleep(_LAST_STEP_TICK_S)
            self._tick()

    # ---- in between ----------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if time.monotonic() >= self._next_look_s:
            self._look()
            now_s = time.monotonic()
            self._next_look_s = now_s + _TICK_S
            if now_s >= self._next_report_s:
                self._report(is_evaluated=False)

    def _report(self, *, is_evaluated: bool) -> None:
        """Send what `_look` saw to all places; an evaluation counts once, and not as a curve between two of them."""
        row = self._row if is_evaluated else self._row | {"eval_return": float("nan")}
        self._reporters.report(row, self._stats)
        self._next_report_s = time.monotonic() + _REPORT_EVERY_S

    def _look(self) -> None:
        """Fetch the server's figures, show them, look after the crew."""
        info, stats = self.client.info(), self.client.stats(per_client=True)
        figures = info["tables"][TABLE]
        inserts = figures["inserts"] - self._inserts_before
        self.env_steps = self._steps_before + inserts * self._steps_per_insert
        self._stats = stats
        episodes = _episodes_by_client(stats)
        actors = [
            c | {"version_lag": self._version - c["parameter_version"]} | episodes.get(c["name"], {})
            for c in info["clients"]
            if c["writers"]
        ]
        self._row = {
            "wall_s": time.monotonic() - self._started_s,
            "env_steps": self.env_steps,
            "updates": self.agent.updates,
            "inserts": figures["inserts"],
            "samples": self.agent.samples,
            "samples_per_insert": figures["samples"] / max(1, figures["inserts"]),
            "buffer_fill": figures["size"] / figures["capacity"],
            "mean_return": stats.get("train/rewards_mean", float("nan")),
            "eval_return": self._eval_return,
            "version_lag": max((actor["version_lag"] for actor in actors), default=0),
            "stale_updates": figures.get("stale_updates", 0),
            "overtaken_rows": figures.get("overtaken_rows", 0),
            "num_actors": len(actors),
        }
        self._row |= {name: float(value) for name, value in self._measures.items()}
        self._row |= self._rates.update(self._row)
        self._display.update(self._row, actors, figures["waits"])
        self._display.say(self._tend_crew())

    def _save(self) -> None:
        self._run.save_policy(self.agent.policy.state_dict())
        counters = {key: self._row[key] for key in ("env_steps", "updates", "samples", "wall_s")}
        self._run.save_learner(self.agent.state(), counters)

    def _evaluate(self) -> bool:
        """Evaluate greedily; True if the threshold is reached, and confirmed on more episodes."""
        agent, num_seeds = self.agent, self.agent.options.eval_episodes
        returns = evaluate(agent.act, agent.env_id, range(PROGRESS_SEED, PROGRESS_SEED + num_seeds))
        reached = self._threshold is not None and returns.mean() >= self._threshold
        if reached:
            # The best of many noisy evaluations flatters: believe it only if other seeds put the mean two standard
            # errors above the threshold.
            num_seeds *= _CONFIRMATION_FACTOR
            returns = evaluate(agent.act, agent.env_id, range(CONFIRMATION_SEED, CONFIRMATION_SEED + num_seeds))
            reached = returns.mean() - 2 * returns.std() / num_seeds**0.5 >= self._threshold
        self._eval_return = float(returns.mean())
        self._best_eval_return = max(self._best_eval_return, self._eval_return)
        self._look()
        self._report(is_evaluated=True)
        self._save()
        self._display.say(
            [f"{self.env_steps:,} env steps: greedy return {self._eval_return:.1f} over {num_seeds} episodes"]
        )
        return reached

    def _finish(self) -> dict[str, Any]:
        agent = self.agent
        self._look()
        self._save()
        final_returns: list[float] = []
        if self._stopped_by != "interrupted":
            self._display.say([f"evaluating the final policy on {FINAL_EPISODES} episodes"])
            seeds = range(FINAL_SEED, FINAL_SEED + FINAL_EPISODES)
            final_returns = evaluate(agent.act, agent.env_id, seeds).tolist()
            self._eval_return = self._row["eval_return"] = float(sum(final_returns) / len(final_returns))
        row = self._row
        self._report(is_evaluated=bool(final_returns))
        summary = {
            "algo": agent.name,
            "env": agent.env_id,
            "seed": agent.seed,
            "num_actors": int(row["num_actors"] if self._num_actors is None else self._num_actors),
            "env_steps": int(row["env_steps"]),
            "updates": agent.updates,
            "inserts": int(row["inserts"]),
            "samples": agent.samples,
            "wall_s": row["wall_s"],
            "mean_return": row["mean_return"],
            "eval_return": self._eval_return,
            "eval_episodes": len(final_returns),
            "best_progress_return": self._best_eval_return,
            "solved": self._solved,
            "stopped_by": self._stopped_by,
            "stale_updates": int(row["stale_updates"]),
            "overtaken_rows": int(row["overtaken_rows"]),
            "stats": self._stats,
        }
        self._reporters.finish(summary)
        self.client.close()
        return summary

    def draw_curve(self) -> None:
        """Draw curve.png: seconds of work, for when the actors have ended and whoever pressed Ctrl-C need not wait."""
        agent = self.agent
        self._run.draw_curve(f"{agent.title}, {agent.env_id}, seed {agent.seed}", self._threshold)


def _episodes_by_client(stats: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Each client's part of the statistics by its name, without the prefix."""
    by_client: dict[str, dict[str, float]] = {}
    for path, value in stats.items():
        prefix, _, key = path.rpartition("/")
        _, is_of_client, name = prefix.partition("/clients/")
        if is_of_client:
            by_client.setdefault(name, {})[key] = value
    return by_client


def describe(summary: dict[str, Any]) -> str:
    """One line about a finished run."""
    end = f"{summary['env_steps']:,} env steps, {summary['updates']:,} updates, {summary['wall_s']:.0f} s"
    if summary["stopped_by"] == "interrupted":
        return f"interrupted after {end}; --resume goes on"
    return f"{summary['stopped_by']} reached after {end}: greedy return {summary['eval_return']:.1f}"
