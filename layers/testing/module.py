"""The promises about a module: its numbers, its memory, its life cycle, its compilation."""

import contextlib
import copy
import dataclasses
import operator
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..base import Mixer, Seq
from .case import Case, decode, ensure, promise, state_at, trained


@promise
def shapes_and_dtypes(case: Case) -> None:
    """(b, l, d) to (b, l, d) in x's dtype, finite, for any l >= 1 and any strides."""
    for dtype in (case.dtype, torch.float32, torch.bfloat16):
        mixer = case.build(dtype)
        for b, length in ((1, 1), (2, 3), (3, 17)):
            x = case.x(b, length, dtype=dtype)
            y = mixer(x)
            what = f"forward of {tuple(x.shape)} {dtype}"
            ensure(isinstance(y, Tensor), f"{what} returned {type(y).__name__}, not a tensor")
            ensure(y.shape == x.shape and y.dtype == dtype, f"{what} gave {tuple(y.shape)} {y.dtype}")
            ensure(bool(y.isfinite().all()), f"{what} is not finite")
    mixer, x = case.build(), case.x(2, 7)
    strided = torch.stack([x, -x], dim=-1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1)
    case.close(mixer(strided), mixer(x), "non-contiguous input")


@promise
def flops_cover_matmuls(case: Case) -> None:
    """flops(seq_len) is a whole number, and at least what PyTorch counts in a forward."""
    mixer, length = case.build(torch.float32), 13
    counted = sum(counted_flops(mixer, case.x(1, length, dtype=torch.float32)).values())
    stated = mixer.flops(length)
    ensure(isinstance(stated, int), f"flops({length}) is a {type(stated).__name__}")
    ensure(stated * length >= counted, f"flops({length}) * {length} = {stated * length}, PyTorch counts {counted}")


def counted_flops(mixer: Mixer, x: Tensor) -> dict[Any, int]:
    """Count a forward as PyTorch does, by operator; without scaled_dot_product_attention, where it counts what a mask hides."""
    from torch.utils.flop_counter import FlopCounterMode

    def no_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return torch.zeros_like(q)

    with (
        unittest.mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", no_attention),
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
    ):
        mixer(x)
    return dict(counter.get_flop_counts().get("Global", {}))


@promise
def initialisation(case: Case) -> None:
    """reset_parameters draws every parameter; building is reproducible; the names of special parameters exist."""
    with torch.random.fork_rng(devices=[]):
        drawn = []
        for _ in range(2):
            torch.manual_seed(case.seed)
            drawn.append(case.new())
        for (name, a), b in zip(drawn[0].named_parameters(), drawn[1].parameters(), strict=True):
            ensure(torch.equal(a, b), f"{name} differs between two builds from one seed")
        mixer = drawn[0]
        with torch.no_grad():
            for p in mixer.parameters():
                p.fill_(float("nan"))
        mixer.reset_parameters(0, 1)
    names = dict(mixer.named_parameters())
    for name, p in names.items():
        ensure(bool(p.isfinite().all()), f"reset_parameters left {name} unset")
    for name in (*mixer.fp32_parameters, *mixer.no_decay_parameters):
        try:
            operator.attrgetter(name)(mixer)  # None where an option leaves it out
        except AttributeError as e:
            raise AssertionError(f"{name!r} is declared special, but does not exist. Known: {', '.join(names)}") from e


@promise
def copies(case: Case) -> None:
    """Saving and loading, and deepcopy, give the same layer, and draw no random numbers."""
    mixer, x = case.build(), case.x(2, 7)
    want = mixer(x)
    fresh = case.build(seed=case.seed + 1)
    rng = torch.get_rng_state()
    fresh.load_state_dict(mixer.state_dict())
    twin = copy.deepcopy(mixer)
    ensure(torch.equal(rng, torch.get_rng_state()), "loading or copying drew random numbers")
    case.close(fresh(x), want, "after load_state_dict")
    with torch.no_grad():
        for p in mixer.parameters():
            p.zero_()
    case.close(twin(x), want, "deepcopy")


@promise
def meta_device(case: Case) -> None:
    """Built on the meta device, no memory is taken; after to_empty and load_state_dict it is the same layer."""
    mixer, x = case.build(), case.x(2, 7)
    with torch.device("meta"):
        ghost = case.new()
    for name, t in (*ghost.named_parameters(), *ghost.named_buffers()):
        ensure(t.is_meta, f"{name} was allocated on {t.device}")
    ensure(ghost.flops(64) > 0, "flops on the meta device")
    ensure(ghost.state_bytes(64) >= 0, "state_bytes on the meta device")
    ghost.to(case.dtype).to_empty(device=case.device).load_state_dict(mixer.state_dict())
    case.close(ghost(x), mixer(x), "built on meta, then loaded")


@promise
def poisoned_memory(case: Case) -> None:
    """No uninitialised memory reaches a result: building and running with NaN in every torch.empty changes nothing."""
    want, x = case.build(), case.x(2, 7).requires_grad_()
    with _poison():
        mixer = case.build()
        y = mixer(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        if mixer.can("state"):
            steps = decode(mixer, x.detach(), mixer.init_state(2, 7))
            case.close(steps, y.detach(), "steps")
    case.close(y.detach(), want(x).detach(), "forward")
    ensure(bool(grad.isfinite().all()), "the gradient is not finite")


@contextlib.contextmanager
def _poison() -> Iterator[None]:
    def poisoned(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            out = fn(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() and not out.is_meta else out

        return wrapper

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
            stack.enter_context(unittest.mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield


@promise
def half_precision(case: Case) -> None:
    """In bfloat16, pinned parameters stay float32, and the error is at most twice the unavoidable one.

    The unavoidable error is that of exact arithmetic in which every input and output of a leaf module, or of the experts'
    grouped matmul, is rounded to bfloat16, since that much is stored in bfloat16 by any implementation. Both are root mean
    squares against float64.
    """
    mixer, x = case.build(torch.bfloat16), case.x(4, 33, dtype=torch.bfloat16)
    for name, p in mixer.named_parameters():
        want = torch.float32 if name in mixer.fp32_parameters else torch.bfloat16
        ensure(p.dtype == want, f"{name} is {p.dtype} in a bfloat16 model, expected {want}")
    exact = case.build()
    exact.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        y, truth = mixer(x).to(case.dtype), exact(x.to(case.dtype))
        for module in exact.modules():
            if not list(module.children()):
                module.register_forward_pre_hook(lambda _, args: _rounded(args))
                module.register_forward_hook(lambda _, args, out: _rounded(out))
        with _RoundedExperts():
            rounded = _rounded(exact(x.to(case.dtype)))
    error, unavoidable = (y - truth).square().mean().sqrt().item(), (rounded - truth).square().mean().sqrt().item()
    ensure(error <= 2 * unavoidable, f"error {error:.2e}, twice the unavoidable one is {2 * unavoidable:.2e}")


class _RoundedExperts(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not torch.ops.hybridzoo.grouped_linear.default:
            return func(*args, **(kwargs or {}))
        return _rounded(func(*_rounded(args), **(kwargs or {})))


def _rounded(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.bfloat16).to(value.dtype)
    return tuple(_rounded(v) for v in value) if isinstance(value, tuple) else value


@promise
def autocast(case: Case) -> None:
    """Under autocast, forward, backward, prefill and steps work and are near the float32 results; ``rounds_input`` is true."""
    mixer, x = case.build(torch.float32), case.x(2, 9, dtype=torch.float32)
    want = mixer(x)
    with torch.autocast(case.device, dtype=torch.bfloat16):
        y = mixer(x)
        ys = [("forward", y)]
        if mixer.can("state"):
            ys.append(("steps", decode(mixer, x, mixer.init_state(2, 9))))
            state = state_at(mixer, x[:, :4])
            ys.append(("steps after a prefill", torch.cat([y[:, :4], decode(mixer, x[:, 4:], state)], 1)))
        if mixer.rounds_input:
            ensure(torch.equal(mixer(x.bfloat16()), y), "rounds_input: a rounded input gives another output")
    y.float().square().sum().backward()
    for what, got in ys:
        error = ((got.float() - want).norm() / want.norm()).item()
        ensure(error < 0.05, f"{what}: relative error {error:.2e}")
    for name, p in trained(mixer).items():
        ensure(p.grad is not None and bool(p.grad.isfinite().all()), f"{name} has no finite gradient")


@promise
def auxiliary(case: Case) -> None:
    """Scalar losses and dicts of statistics go into aux, and do not change the output."""
    mixer, x = case.build(), case.x(2, 5)
    aux: dict[str, list] = {}
    case.close(mixer(x, aux=aux), mixer(x), "with aux")
    ensure(set(aux) <= {"loss", "router"}, f"aux has the keys {sorted(aux)}")
    for loss in aux.get("loss", []):
        ok = loss.dim() == 0 and loss.requires_grad
        ensure(ok, "aux['loss'] holds something that is not a differentiable scalar")


@promise
def compiles(case: Case) -> None:
    """torch.compile(fullgraph=True) gives eager's outputs and gradients, also with a state and padding."""
    mixer, x = case.build(torch.float32), case.x(2, 9, dtype=torch.float32).requires_grad_()
    torch.compiler.reset()  # what was compiled before counts towards the limit of recompilations
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    weight = case.x(2, 9, seed=1, dtype=torch.float32)
    grads = [torch.autograd.grad((run(x) * weight).sum(), x)[0] for run in (mixer, compiled)]
    single = dataclasses.replace(case, dtype=torch.float32)
    single.close(compiled(x), mixer(x), "compiled forward")
    single.close(grads[1], grads[0], "gradient of the compiled forward")
    if not {"state", "padding"} <= mixer.capabilities:
        return
    seq = Seq.from_mask(torch.tensor([[1] * 9, [0] * 4 + [1] * 5], device=case.device))
    with torch.no_grad():
        (y, state), (want, _) = (run(x, state_at(mixer, weight), seq, return_state=True) for run in (compiled, mixer))
        single.close(y[:, :5], want[:, :5], "compiled forward with a state and padding")
        single.close(compiled(x, state), mixer(x, state), "compiled forward from the state of a compiled one")
