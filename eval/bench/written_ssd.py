"""Results of ``zoo bench ssd`` as the pages show them: a sentence and a table."""

from ..markdown import table
from ..result_file import Result, Row
from .show import peer_name
from .workloads import title

__all__ = ["of_goal", "pieces"]


def of_goal(row: Row) -> str:
    """Say how much of its goal a row reaches."""
    return f"{100 * row['ratio'] / row['goal_ratio']:.0f} % of {row['goal_ratio']:g}x"


def pieces(result: Result, source: str, versions: str) -> list[str]:
    """Return the section: what was measured, and one line per case, pass and peer."""
    return [
        f"Mamba-2's scan (SSD) on one {result['device']} ({versions}), bf16, gate and softplus fused, measured as the selective scan "
        f"({source}). Host: what launching alone takes; where that is as long as the whole, a GPU waits, and a ratio is one of hosts.",
        table(
            [
                "case", "pass", "beside", "ratio", "of the goal", "ours, ms", "theirs, ms", "host, ms (theirs)", "saved, MB (theirs)",
                "b x l x h x p x n",
            ],
            [
                [
                    title(row["name"]), row["op"], peer_name(row["peer"]), f"{row['ratio']:.2f}x",
                    of_goal(row) if row["goal_ratio"] else "", f"{row['ours_ms']:.3f}", f"{row['peer_ms']:.3f}",
                    f"{row['ours_host_ms']:.2f} ({row['peer_host_ms']:.2f})" if "ours_host_ms" in row else "",
                    f"{row['ours_saved_MB']:.0f} ({row['peer_saved_MB']:.0f})" if "ours_saved_MB" in row else "",
                    " x ".join(str(row["shape"][k]) for k in "blhpn"),
                ]
                for row in result["cases"]
            ],
        ),
    ]  # fmt: skip
