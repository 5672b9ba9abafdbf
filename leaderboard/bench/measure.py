"""Times contenders side by side: interleaved rounds in random order, each sample long enough for the clock."""

import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .cases import Case, Device
from .ours import leaf, reference
from .problem import Built, Contender, Problem, Unavailable, Unsuited, make_problem
from .results import Measured

Step = Callable[[], None]
_TOLERANCE, _TOLERANCE_TF32, _TOLERANCE_BF16 = 2e-5, 2e-3, 3e-2  # of the largest value
_SLOW = 10  # times the floor: measured in every sixth round only


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    rounds: int = 30
    sample_seconds: float = 5e-3
    seed: int = 0


def measure(case: Case, contenders: Sequence[Contender], device: Device, settings: Settings) -> list[Measured]:
    """Build, check and time the contenders of one case."""
    problem = make_problem(case, device, settings.seed)
    results = {contender.name: Measured(contender.name) for contender in contenders}
    steps: dict[str, Step] = {}
    for contender in contenders:
        result = results[contender.name]
        try:
            result.check = check(contender, problem)
            step = _step(contender.build(problem), problem)
            step()
        except Unavailable as reason:
            result.unavailable, result.unsuited = str(reason), isinstance(reason, Unsuited)
        except Exception as error:  # a peer that fails is a finding, not the end of the run
            result.unavailable = f"{type(error).__name__}: {_first_line(error)}"
        else:
            result.peak_bytes, result.waits = peak_memory(step, device), _waits(step, device)
            steps[contender.name] = step
    _time(case, steps, results, device, settings)
    return list(results.values())


def _time(case: Case, steps: dict[str, Step], results: dict[str, Measured], device: Device, settings: Settings) -> None:
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    once = {name: clock(step, 1) for name, step in steps.items()}
    once = {name: t if t > 0.1 else min(t, clock(steps[name], 1), clock(steps[name], 1)) for name, t in once.items()}
    for name, seconds in once.items():
        results[name].inner = max(1, math.ceil(settings.sample_seconds / max(seconds, 1e-7)))
    floor = once.get("floor", math.inf)
    slow = {name for name, seconds in once.items() if seconds > _SLOW * floor and seconds > 0.02}
    order, shuffler = list(steps), random.Random(f"{settings.seed} {case.name}")
    with _no_garbage_collection():
        for round_number in range(settings.rounds):
            shuffler.shuffle(order)
            for name in order:
                if name in slow and round_number % 6:
                    continue
                result = results[name]
                result.samples[round_number] = clock(steps[name], result.inner) / result.inner
            gc.collect()


def _step(built: Built, problem: Problem) -> Step:
    if problem.case.mode == "infer":
        x = problem.x

        def infer() -> None:
            with torch.no_grad():
                built.forward(x)

        return infer
    x = leaf(problem.x)
    inputs = [x, *built.parameters]
    grads = [torch.randn_like(y) if y.dim() else torch.ones_like(y) for y in built.forward(x)]

    def train() -> None:
        torch.autograd.grad(list(built.forward(x)), inputs, grads, allow_unused=True)

    return train


def check(contender: Contender, problem: Problem) -> str:
    """Compare a contender that has the problem's weights with the plain loop over experts.

    In fp32; in bf16 too where the routing is given.

    Raises:
        Unavailable: it cannot run, or it computes something else although its weights are the same.
    """
    built = contender.build(problem)
    if contender.role == "floor":
        return ""
    with torch.set_grad_enabled(problem.case.mode == "train"):
        y = built.forward(problem.x)[0]
    if y.shape != problem.x.shape:
        raise Unavailable(f"gives shape {tuple(y.shape)} for {tuple(problem.x.shape)}")
    if not built.exact:
        return "shape"
    exact = problem.float()
    expected = _outcome(lambda x: reference(exact, x), exact)
    tensor_cores = contender.role == "peer" and problem.x.is_cuda  # kernels that take TF32 unasked
    _compare(contender.build(exact), exact, expected, _TOLERANCE_TF32 if tensor_cores else _TOLERANCE)
    if problem.x.dtype != torch.float32 and problem.case.part == "ffn":  # rounding may route a token elsewhere
        _compare(built, problem, expected, _TOLERANCE_BF16)
    return "equal"


def _compare(built: Built, problem: Problem, expected: Sequence[Tensor], tolerance: float) -> None:
    found = _outcome(lambda x: built.forward(x)[0], problem)
    for name, one, other in zip(("output", "gradient"), found, expected, strict=False):
        error = float((one - other).abs().max() / other.abs().max())
        if not error <= tolerance:
            raise Unavailable(f"its {name} in {one.dtype} is off by {error:.1e} of the largest value")


def _outcome(function: Callable[[Tensor], Tensor], problem: Problem) -> tuple[Tensor, ...]:
    """The output; in training also the gradient of x."""
    if problem.case.mode == "infer":
        with torch.no_grad():
            return (function(problem.x),)
    x = leaf(problem.x)
    y = function(x)
    (grad,) = torch.autograd.grad(y, x, problem.grad)
    return y.detach(), grad


def _cpu_seconds(step: Step, inner: int) -> float:
    # Processor time leaves other programs out, but would count every thread.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(inner):
        step()
    return clock() - start


def _cuda_seconds(step: Step, inner: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(inner):
        torch.compiler.cudagraph_mark_step_begin()
        step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def peak_memory(step: Step, device: Device) -> int:
    """Most bytes that torch's allocator held at once during a step, beyond what it held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    with (
        _quiet_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _waits(step: Step, device: Device) -> str:
    if device != "cuda":
        return ""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return _first_line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "never"


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's C++ side writes notes about itself, past Python."""
    saved = os.dup(2)
    with Path(os.devnull).open("w") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else "no message"


def interleaved(steps: Mapping[str, Step], rounds: int, device: Device, inner: int = 1) -> dict[str, dict[int, float]]:
    """Seconds a step by name and round; every round has all steps, in random order."""
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    samples: dict[str, dict[int, float]] = {name: {} for name in steps}
    order, shuffler = list(steps), random.Random(0)
    with _no_garbage_collection():
        for number in range(rounds):
            shuffler.shuffle(order)
            for name in order:
                samples[name][number] = clock(steps[name], inner) / inner
    return samples
