"""Gradients of the CUDA SSD, run on the CPU thread by thread (tests/emulator), against autograd of the definition in float64."""

import math
import os
import re
import shutil
import struct

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hybridzoo.kernels.gpu import launch_plans, nvrtc
from hybridzoo.kernels.gpu.operands import RESET, TYPES, UNALIGNED
from hybridzoo.kernels.ssd import chunked, cuda, cuda_backward, reference
from hybridzoo.kernels.ssd.backward_plans import GATED, ChunkShape, Look, SsdBackwardParams, chunk_shape, plan
from hybridzoo.kernels.ssd.inputs import SsdInputs, SsdOptions

exhaustive = pytest.mark.skipif(
    "HYBRIDZOO_EXHAUSTIVE" not in os.environ, reason="minutes of g++ or NVRTC; HYBRIDZOO_EXHAUSTIVE=1 runs it"
)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROOM = 227 << 10
NAMES = SsdInputs._fields[:9]
PER_TOKEN = ("x", "dt", "B", "C", "z")
EPS = torch.finfo(F32).eps
USUAL = SsdOptions(True)


@pytest.fixture(autouse=True)
def one_processor(emulated, monkeypatch):
    """As few blocks as there can be, each with as many heads."""
    for module in (cuda, cuda_backward):
        monkeypatch.setattr(module, "processors", lambda device: 1)


def operands(b=1, l=70, h=2, p=32, n=32, g=1, dtype=BF16, gate=False, skip=1, wide_dt=False, scale=1.0):
    torch.manual_seed(l + h + p + n)
    x, z = torch.randn(2, b, l, h, p).mul(scale).to(dtype)
    B, C = torch.randn(2, b, l, g, n).to(dtype)
    dt, A = torch.randn(b, l, h) - 1, -4 * torch.rand(h) - 0.1
    D = (None, torch.randn(h), torch.randn(h, p))[skip]
    dt = dt if wide_dt else dt.to(dtype)
    return SsdInputs(x, dt, A, B, C, D, z if gate else None, torch.randn(h) - 1, torch.randn(b, h, p, n))


def marked(i):
    """With documents, one of which starts with a chunk, and padding."""
    b, l = i.x.shape[:2]
    reset = torch.rand(b, l) < 0.03
    reset[0, 64 % l] = True
    return i._replace(reset=reset, valid=torch.arange(l) < torch.randint(l // 2, l + 1, (b, 1)))


def derived(run, i, options, gout, glast, dtype=None):
    """Outputs, last state and the gradients of all inputs by name, the inputs converted to ``dtype``."""
    leaves = [m if m is None else (m if dtype is None else m.to(dtype)).detach().requires_grad_() for m in i[:9]]
    out, last = run(SsdInputs(*leaves, *i[9:]), options)
    loss = (out.double() * gout.double()).sum() + (last.double() * glast.double()).sum()
    names, given = zip(*((name, m) for name, m in zip(NAMES, leaves, strict=True) if m is not None), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, given), strict=True))


def relative(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def compare(i, options=USUAL):
    """Errors of at most twice those of the chunked backend; of what is float32 beside 16-bit operands, of their largest rounding error."""
    exact, last = reference.ssd(
        SsdInputs(*(m if m is None or m.dtype == torch.bool else m.double() for m in i)), options
    )
    # gradients that are those of the squares of outputs, so that sums over tokens do not cancel
    real = torch.ones(()) if i.valid is None else i.valid[..., None, None]
    gout, glast = (exact * real).to(i.x.dtype), last.float()
    want = derived(reference.ssd, i, options, gout, glast, torch.float64)
    theirs, ours = (derived(run, i, options, gout, glast) for run in (chunked.ssd, cuda_backward.ssd))
    for name, exactly in want.items():
        assert ours[name].dtype == getattr(i, name).dtype and ours[name].shape == exactly.shape
        got, other, narrow = ours[name].double(), theirs[name].double(), ours[name].dtype == i.x.dtype
        if i.valid is not None and name in PER_TOKEN:
            there = i.valid.view(*i.valid.shape, *[1] * (exactly.dim() - 2))
            got, other, exactly = (m.masked_fill(~there, 0.0) for m in (got, other, exactly))
        error = relative(got, exactly)
        allowed = 2 * relative(other, exactly) + 4 * EPS if narrow else torch.finfo(i.x.dtype).eps
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"


CASES = {
    "more heads than are finished together": dict(l=70, h=9),
    "gated, packed, padded, unaligned": dict(b=2, l=70, h=4, p=20, n=27, g=2, gate=True, skip=2, pack=True),
    "float32": dict(l=70, h=2, g=2, dtype=F32),
}
MORE = {
    "float32, packed": dict(l=70, h=2, p=40, g=2, dtype=F32, pack=True),
    "Mamba-2": dict(h=4, p=64, n=128),
    "Mamba-2, gated": dict(l=150, h=9, p=64, n=128, gate=True),
    "groups of warps, tiles of a head, unaligned": dict(b=2, h=4, p=75, n=99, g=2, gate=True, skip=2),
    "small values in float16": dict(dtype=F16, gate=True, scale=2**-9),
    "float16, tiles of a head": dict(l=130, h=3, p=80, n=80, dtype=F16, gate=True, pack=True),
    "256 states": dict(h=2, p=64, n=256),
    "256 states, narrow heads": dict(h=2, p=32, n=256),
    "float32 steps": dict(p=64, n=64, wide_dt=True, skip=0),
    "float32, 256 states": dict(l=40, p=64, n=256, dtype=F32, gate=True),
    "wide heads": dict(p=256, n=16, skip=2),
    "a group for each head": dict(b=2, h=3, g=3, pack=True),
}


@needs_compiler
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=exhaustive) for case in MORE)])
def test_errors_are_at_most_twice_those_of_torch(case):
    sizes = dict((CASES | MORE)[case])
    pack = sizes.pop("pack", False)
    i = operands(**sizes)
    compare(marked(i) if pack else i)


@needs_compiler
@pytest.mark.parametrize(
    "options", [SsdOptions(True, 0.1, 0.6), SsdOptions(False), SsdOptions(False, 0.3, math.inf)], ids=str
)
def test_limits_and_steps_as_they_are(options):
    i = operands(l=70, h=2)
    compare(i._replace(dt=i.dt if options.dt_softplus else i.dt.abs(), dt_bias=i.dt_bias.abs()), options)


@needs_compiler
def test_strides_are_read_where_they_are_and_the_last_state_may_be_all_there_is():
    i = operands(l=70, h=2)
    wide = torch.cat([i.x.flatten(2), i.B.flatten(2), i.C.flatten(2)], 2)
    x, B, C = wide.split([64, 32, 32], 2)
    sliced = i._replace(x=x.unflatten(2, (2, 32)), B=B[:, :, None], C=C[:, :, None])
    gout, glast = torch.randn_like(i.x), torch.randn(i.initial_state.shape)
    for weights in ((gout, glast), (torch.zeros(()).expand_as(gout), glast)):
        a, b = (derived(cuda_backward.ssd, m, USUAL, *weights) for m in (i, sliced))
        assert all(torch.equal(a[name], b[name]) for name in a)
    exact = derived(reference.ssd, i, USUAL, gout * 0, glast, torch.float64)
    assert all(relative(a[name], exact[name]) < 4e-3 for name in exact if name not in ("C", "D"))
    assert not a["C"].any() and not a["D"].any()


@needs_compiler
def test_shares_of_a_group_add_up_and_twice_is_the_same(monkeypatch):
    i = operands(l=130, h=3)
    gout, glast = torch.randn_like(i.x), torch.randn(i.initial_state.shape)
    once, again = (derived(cuda_backward.ssd, i, USUAL, gout, glast) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)
    monkeypatch.setattr(cuda_backward, "processors", lambda device: 132)
    split = derived(cuda_backward.ssd, i, USUAL, gout, glast)
    assert all(torch.equal(once[name], split[name]) for name in ("x", "dt", "A", "D", "dt_bias", "initial_state"))
    assert all(relative(split[name], once[name].double()) < 4e-3 for name in ("B", "C"))


@needs_compiler
def test_a_rate_of_minus_infinity_forgets_all_and_small_steps_keep_their_digits():
    i = operands(l=64, h=2, dtype=F32, wide_dt=True)
    dt = torch.full_like(i.dt, 1e-3)
    dt[:, 3] = 1e5
    compare(i._replace(dt=dt, dt_bias=None, A=torch.tensor([-1.0, -0.3])), SsdOptions())
    forgetful = i._replace(A=torch.tensor([-math.inf, -1.0]))
    grads = derived(cuda_backward.ssd, forgetful, USUAL, torch.randn_like(i.x), torch.randn(i.initial_state.shape))
    assert all(g.isfinite().all() for g in grads.values())
    assert not grads["initial_state"][:, 0].any() and grads["initial_state"][:, 1].any()


@needs_compiler
@pytest.mark.parametrize("hurt", ["dt", "C", "gout", *(pytest.param(m, marks=exhaustive) for m in ("x", "B", "z"))])
def test_what_is_not_finite_stays_in_its_document(hurt):
    i, where = operands(l=130, h=2, p=20, n=27, gate=True), slice(50, 90)
    reset = torch.zeros(1, 130, dtype=torch.bool)
    reset[0, [where.start, 70, where.stop]] = True
    i = i._replace(reset=reset, valid=torch.ones(1, 130, dtype=torch.bool))
    gout, glast = torch.randn_like(i.x), torch.randn(i.initial_state.shape)

    def run(i, gout):
        # the last state that a loss would multiply is finite, and so are the outputs that count
        leaves = [m if m is None else m.detach().requires_grad_() for m in i[:9]]
        out, last = cuda_backward.ssd(SsdInputs(*leaves, *i[9:]), USUAL)
        given = [m for m in leaves if m is not None]
        grads = dict(zip((n for n, m in zip(NAMES, leaves, strict=True) if m is not None),
                         torch.autograd.grad([out, last], given, [gout, glast]), strict=True))  # fmt: skip
        inside = [grads[name][:, where] for name in PER_TOKEN]
        others = [torch.cat([grads[name][:, : where.start], grads[name][:, where.stop :]], 1) for name in PER_TOKEN]
        return [*others, grads["initial_state"]], inside

    want, _ = run(i, gout)
    for value, at in ((math.nan, 75), (math.inf, 52)):
        changed = (gout if hurt == "gout" else getattr(i, hurt)).clone()
        changed[0, at] = value
        got, inside = run(i, changed) if hurt == "gout" else run(i._replace(**{hurt: changed}), gout)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
        assert any(not x.isfinite().all() for x in inside)


@needs_compiler
def test_the_op_has_a_fake_and_gradients_and_no_second_ones():
    i = operands(l=40, h=1)
    leaves = [m if m is None else m.requires_grad_() for m in i[:9]]
    given = (*leaves, None, None, *USUAL, True)
    torch.library.opcheck(torch.ops.hybridzoo.ssd_cuda, given)
    out, *_ = torch.ops.hybridzoo.ssd_cuda(*given)
    eager, _ = cuda_backward.ssd(SsdInputs(*leaves), USUAL)
    weight, given = torch.randn_like(out), [m for m in leaves if m is not None]
    grads, same = (torch.autograd.grad(y, given, weight, create_graph=True) for y in (out, eager))
    assert all(torch.equal(x, y) for x, y in zip(grads, same, strict=True))
    for g in (grads, same):
        with pytest.raises(NotImplementedError, match="backend='reference'"):
            g[0].sum().backward()


def test_nothing_but_the_launches_touches_what_has_a_value_per_token(monkeypatch):
    ran = []
    monkeypatch.setattr(nvrtc, "launch", lambda source, name, *more: ran.append(name.split("<")[0]))

    class Listed(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            ran.append(str(op).split(".")[1])
            return op(*args, **kwargs or {})

    # bfloat16 around parameters of float32, as the benchmark and layers have them
    i = operands(l=70, h=2, gate=True)._replace(initial_state=None)
    leaves = [m if m is None else m.requires_grad_() for m in i[:9]]
    gout = torch.randn_like(i.x)
    with Listed():
        out, _ = cuda_backward.ssd(SsdInputs(*leaves), USUAL)
        torch.autograd.grad(out, [m for m in leaves if m is not None], gout)
    kernels = {"ssd_forward", "ssd_steps", "ssd_backward_states", "ssd_backward_chunks", "ssd_backward_sums"}
    assert kernels < set(ran) <= kernels | {"empty_like", "new_empty", "slice"}


def shifted(m):
    """The same off 16-byte borders."""
    return torch.cat([m.flatten()[:1], m.flatten()])[1:].view(m.shape)


def sliced(m):
    """The same in rows of twice the length."""
    return torch.cat([m, m], 2)[:, :, : m.shape[2]]


ALIKE = {
    "as usual": {},
    "without a gate": dict(i=lambda i: i._replace(z=None)),
    "a skip for every channel": dict(i=lambda i: i._replace(D=torch.randn(2, 32))),
    "no bias, skip or state": dict(i=lambda i: i._replace(D=None, dt_bias=None, initial_state=None)),
    "documents": dict(i=marked),
    "rows of a projection": dict(i=lambda i: i._replace(x=sliced(i.x), dt=sliced(i.dt), z=sliced(i.z))),
    "off 16-byte borders": dict(i=lambda i: i._replace(C=shifted(i.C))),
    "float32 steps": dict(i=lambda i: i._replace(dt=i.dt.float())),
    "gout off 16-byte borders": dict(gout=shifted),
    "gout in rows": dict(gout=sliced),
    "gout across heads": dict(gout=lambda g: g.transpose(1, 2).contiguous().transpose(1, 2)),
    "a fixed x": dict(fixed="x"),
    "another x in the backward": dict(unpack=lambda m: sliced(m) if m.shape[1:3] == (70, 2) else m),
}
CONVERTED = {
    "types that differ": dict(i=lambda i: i._replace(B=i.B.float())),
    "rates in 16 bits": dict(i=lambda i: i._replace(A=i.A.to(BF16))),
    "one gout for all": dict(gout=lambda g: g[:1, :1, :1, :1].expand_as(g)),
}


@pytest.mark.parametrize("case", [*ALIKE, *CONVERTED])
def test_a_backward_like_one_before_is_launched_as_it_was_and_not_looked_at(case, monkeypatch):
    launched, looked, first, change = [], [], SsdBackwardParams.x_b.offset, (ALIKE | CONVERTED)[case]

    def launch(source, name, params, *rest):
        if source.startswith("ssd_backward"):
            pointers = [address and 1 + address % 16 for address in struct.unpack(f"{first // 8}Q", params[:first])]
            launched.append((source, name, pointers, params[first:], *rest))

    def look_of(*operands, look_of=cuda_backward.look_of):
        looked.append(operands)
        return look_of(*operands)

    monkeypatch.setattr(nvrtc, "launch", launch)
    monkeypatch.setattr(cuda_backward, "look_of", look_of)
    i = operands(b=2, l=70, gate=True)
    i, gout = change.get("i", lambda i: i)(i), change.get("gout", lambda g: g)(torch.randn_like(i.x))
    given = [m if m is None else m.detach() for m in i]
    named = dict(zip(NAMES, given, strict=False))
    leaves = [m.requires_grad_() for name, m in named.items() if m is not None and name != change.get("fixed")]

    def run(gout, unpack):
        launched.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda m: m, unpack):
            out, last = cuda_backward.ssd(SsdInputs(*given), USUAL)
        grads = torch.autograd.grad([out, last], leaves, [gout, torch.ones_like(last)])
        assert all(g.shape == m.shape and g.dtype == m.dtype for g, m in zip(grads, leaves, strict=True))
        return list(launched)

    # what comes in is as usual, at first
    run(torch.randn_like(i.x), lambda m: m)
    looked.clear()
    how = gout, change.get("unpack", lambda m: m)
    runs = [run(*how), run(*how)]
    assert len(looked) == (2 if case in CONVERTED else 1 if change.keys() & {"gout", "unpack"} else 0)
    monkeypatch.setattr(launch_plans, "find", lambda *_: None)
    assert runs == [run(*how)] * 2 and len(runs[0]) == 4


def launches(dtype, p, n, flags, room=ROOM, b=8, l=2048, h=24, groups=False):
    look = Look(dtype, False, (b, l, h, p, n, 1), (0,) * 25, flags, 1, USUAL)
    return plan(look, 132, room, groups).launches


def resources(source, name, arch):
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed: pip install 'hybridzoo[cuda]'")
    _, _, log = nvrtc.compile_source(source, name, arch, "--ptxas-options=-v")
    part = next(p for p in log.split("Compiling entry function")[1:] if name.split("<")[0] in p)
    return int(re.search(r"(\d+) bytes spill stores", part)[1])


@pytest.mark.parametrize(
    ("launch", "arch"),
    [
        (launch, arch)
        for arch in ("sm_80", "sm_90a")
        for flags in (0, GATED, RESET)
        for launch in launches(BF16, 64, 128, flags, groups=arch == "sm_90a")
    ],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_usual_kernels_fit_their_registers(launch, arch):
    assert resources(launch.source, launch.name, arch) <= 16


@exhaustive
@pytest.mark.timeout(0)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_instance_compiles(dtype, arch):
    names = {
        launch[:2]
        for flags in range(8)
        if not flags & ~(GATED | RESET | UNALIGNED)
        for p in (32, 64)
        for n in (32, 64, 128, 256)
        for room in (ROOM, 163 << 10)
        for b in (1, 8)
        if chunk_shape(dtype.itemsize, p, n, bool(flags & GATED), room)
        for launch in launches(dtype, p, n, flags, room, b, groups=arch == "sm_90a")
    }
    spilled = {kernel: resources(*kernel, arch) for kernel in sorted(names)}
    # sums over 256 states are all that registers can hold; fp16 has scales beside them (680 and 144 bytes by NVRTC 13.5)
    narrow, wide = (160, 704) if dtype == F16 else (64, 512)
    assert not {kernel: size for kernel, size in spilled.items() if size > (wide if ", 256, " in kernel[1] else narrow)}


def test_shapes_follow_the_room_that_there_is():
    assert chunk_shape(2, 64, 128, False, ROOM) == ChunkShape(64, 128, 2, 4, 2, 8)
    assert chunk_shape(2, 64, 128, True, ROOM, groups=True) == ChunkShape(64, 128, 4, 2, 2, 8)
    assert chunk_shape(2, 64, 128, False, 163 << 10) == ChunkShape(64, 128, 2, 4, 2, 2)
    assert chunk_shape(2, 64, 256, False, 163 << 10) == ChunkShape(32, 256, 4, 2, 2, 2)
    assert chunk_shape(4, 64, 256, True, ROOM).p == 32
    assert chunk_shape(2, 64, 128, True, 99 << 10).stages == 1
    assert chunk_shape(4, 64, 256, True, 99 << 10) is None
    # states: few large blocks rather than many small ones, as long as no multiprocessor has more to do
    for b, l, h, tile in (
        (8, 2048, 64, "64, 128"),
        (8, 2048, 24, "64, 64"),
        (1, 16384, 64, "64, 64"),
        (1, 2048, 24, "32, 64"),
    ):
        assert launches(BF16, 64, 128, 0, b=b, l=l, h=h)[1].name == f"ssd_backward_states<bf16, {tile}, 0>"
    # heads of a group are split where there are few blocks, and not where there are many
    assert plan(Look(BF16, False, (8, 2048, 64, 64, 128, 1), (0,) * 25, 0, 1, SsdOptions()), 132, ROOM).splits == 1
    assert plan(Look(BF16, False, (1, 2048, 24, 64, 128, 1), (0,) * 25, 0, 1, SsdOptions()), 132, ROOM).splits == 4
