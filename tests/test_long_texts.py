"""Texts longer than memory would hold at once: prompts read in chunks, and streams of single tokens; what is held does not grow."""

import os
import subprocess
import sys

import pytest

# what a process holds at most, in KiB, after a text of some length and after one of many times that
PROGRAM = """
import resource, sys
import torch
import hybridzoo as zoo

torch.set_num_threads(1)
how, name, short, long = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.manual_seed(0)
model = zoo.build(name).eval()


@torch.no_grad()
def read(length):
    if how == "prompt":
        out = model.generate(torch.randint(1, 256, (1, length)), 4, prefill_chunk=512)
        assert out.shape == (1, length + 4)
    else:
        state, token = model.init_state(1), torch.tensor([1])
        for _ in range(length):
            token = model.step(token, state).argmax(-1)
        assert int(state.tokens) == length
        print(state.nbytes)


for length in (short, long):
    read(length)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
exhaustive = pytest.mark.skipif(
    "HYBRIDZOO_EXHAUSTIVE" not in os.environ, reason="minutes; HYBRIDZOO_EXHAUSTIVE=1 runs it"
)


@pytest.mark.parametrize(
    ("how", "name", "short", "long"),
    [
        ("stream", "mamba-tiny", 200, 2_000),
        ("prompt", "mamba2-tiny", 2_048, 32_768),
        pytest.param("stream", "mamba-tiny", 2_000, 100_000, marks=exhaustive),
        pytest.param("stream", "mamba2-tiny", 2_000, 100_000, marks=exhaustive),
        pytest.param("prompt", "mamba-tiny", 16_384, 1_000_000, marks=exhaustive),
    ],
)
def test_what_is_held_does_not_grow_with_the_text(how, name, short, long):
    arguments = [sys.executable, "-P", "-c", PROGRAM, how, name, str(short), str(long)]
    ran = subprocess.run(arguments, capture_output=True, text=True, check=True)
    numbers = [int(line) for line in ran.stdout.split()]
    if how == "stream":
        first, few, second, many = numbers
        assert first == second
    else:
        few, many = numbers
        # prompt and answer themselves, a few times over
        many -= 4 * 8 * long >> 10
    assert many - few < 8 << 10, f"{few:,} KiB after {short:,} tokens, {many:,} after {long:,}"
