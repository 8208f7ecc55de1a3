"""Print the results of benchmarks/gpu.py as a Markdown table, and write a figure of the speeds.

python benchmarks/gpu_table.py gpu-results/gpu.json    # also writes gpu-results/gpu.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

UNITS = ("copy GB/s", "bfloat16 TFLOP/s")
MEDIAN = "median tokens per second"
SECOND_SEED = "training large-32-true-2"
SEEDS = (
    "validation loss of small at 10 million tokens, largest difference of two seeds, nats",
    "0.015", "CPUs, 2026-11-25 (docs/LOG.md)",
)  # fmt: skip


def table(content: dict[str, Any]) -> str:
    """Return a Markdown table of the measures, each with the device that it was measured on."""
    rows = [("measure", "value", "measured on"), ("---", "---", "---")]
    rows += [(name, value, device(content)) for name, value in measures(content)]
    rows += [SEEDS] if needs_spread(content["results"]) else []
    rows += [(name, "not run", "") for name in content.get("not_run", [])]
    rows += [("stopped", content["stopped"], "")] if "stopped" in content else []
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def device(content: dict[str, Any]) -> str:
    """Return the name of the device, with its measured copy bandwidth and bfloat16 product."""
    results: dict[str, Any] = content["results"]
    speeds = {**results.get("machine", {}), **results.get("machine again", {})}
    names = [(measure, *measure.split()) for measure in UNITS]
    figures = [
        f"{name} {speeds[measure]:,.0f} {unit}" if measure in speeds else f"{name} not measured"
        for measure, name, unit in names
    ]
    return ", ".join([content["measured_on"], *figures])


def measures(content: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the name and the value of each measure."""
    results: dict[str, Any] = content["results"]
    rows = [row for part, values in results.items() for row in rows_of(part, values)]
    rows += [(name, f"{ratio:.2f}×") for name, ratio in ratios(results)]
    alone = results.get("sharing 1", {}).get("tokens per second")
    for values in results.values():
        if alone and values.get("runs", 1) > 1:
            ratio = values["tokens per second"] / alone
            rows.append((f"{values['runs']} runs at once, relative to one", f"{ratio:.2f}×"))
    rows += [(name, f"{ratio:.3f}") for name, ratio in against_bare_step(results)]
    rows += against_float32(results)
    return rows


def rows_of(part: str, values: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the name and the value of each measure of a part."""
    if "error" in values:
        return [(part, values["error"])]
    if "ok" in values:
        return [(part, "holds" if values["ok"] else "does not hold")]
    rows: list[tuple[str, str]] = []
    if part in ("machine", "machine again"):
        rows += [(unit, f"{values[unit]:,.0f}") for unit in UNITS]
    elif part.startswith(("speed", "generation")):
        rows.append((f"{part}, tokens/s", f"{values['tokens per second']:,.0f}"))
    elif part.startswith("training"):
        goal = f"{part}: seconds from the shell to perplexity {values['perplexity to reach']:g}"
        rows += [
            (f"{part}: seconds from the shell", f"{values['seconds from the shell']:.1f}"),
            (goal, crossing(values)),
            (f"{part}: tokens/s", f"{values['tokens_per_second']:,.0f}"),
            (f"{part}: validation perplexity", f"{values['val/perplexity']:.3f}"),
        ]
        if MEDIAN in values:  # not in files of older versions
            rows.append((f"{part}: tokens/s, median", f"{values[MEDIAN]:,.0f}"))
    elif part.startswith("kernels"):
        names = ("kernels per step", "launches per step", "ms per step", "ms in kernels per step")
        rows += [(f"{part}: {name}", f"{values[name]:,.2f}") for name in names]
    elif part.startswith("sharing"):
        rows.append((f"{part}: tokens/s in all", f"{values['tokens per second']:,.0f}"))
    return rows


def crossing(values: dict[str, Any]) -> str:
    """Return the seconds to the perplexity, with those of the last validation above it."""
    seconds = values["seconds to perplexity"]
    if seconds is None:
        return "not reached"
    earlier = [v["seconds"] for v in values.get("validations", []) if v["seconds"] < seconds]
    if not earlier:
        return f"at most {seconds:.1f}"
    return f"at most {seconds:.1f}, more than {earlier[-1]:.1f}"


def rates(results: dict[str, Any], kind: str) -> dict[str, dict[str, float]]:
    """Return tokens per second by part, such as "speed medium 128", and by name.

    Args:
        results: results by part.
        kind: "speed" or "generation".
    """
    values: dict[str, dict[str, float]] = {}
    for part, result in results.items():
        group, separator, name = part.partition(": ")
        if part.startswith(kind) and separator and "tokens per second" in result:
            values.setdefault(group, {})[name] = result["tokens per second"]
    return values


def ratios(results: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the speed of our best program relative to that of the best peer of each kind."""
    pairs = []
    for group, by_name in {**rates(results, "speed"), **rates(results, "generation")}.items():
        ours = [name for name in by_name if name.startswith("ours")]
        for kind in ("eager", "compiled"):
            peers = [name for name in by_name if not name.startswith("ours") and kind in name]
            if ours and peers:
                best, peer = (max(names, key=by_name.__getitem__) for names in (ours, peers))
                name = f"{group}: {best}, relative to the best {kind} peer, {peer}"
                pairs.append((name, by_name[best] / by_name[peer]))
    return pairs


def against_bare_step(results: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the speed of `train.py` relative to a step alone with the same batch, if known.

    The first ratio is of medians; the second is of the whole run, with start-up and checkpoints.
    """
    run = results.get("training medium", {})
    steps = rates(results, "speed").get(f"speed medium {run.get('windows')}", {})
    if "ours" not in steps:
        return []
    speeds = {"medium": run[MEDIAN], "medium, whole run": run["tokens_per_second"]}
    return [
        (f"train.py, {name}, relative to the bare step", speed / steps["ours"])
        for name, speed in speeds.items()
    ]


def against_float32(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return speed and validation loss of large in each precision, relative to 32-true."""
    prefix, rows = "training large-", []
    runs = {
        name: values for name, values in results.items()
        if name.startswith(prefix) and {MEDIAN, "val/loss"} <= values.keys()
    }  # fmt: skip
    if (exact := runs.pop(f"{prefix}32-true", None)) is None:
        return []
    for name, run in runs.items():
        difference = run["val/loss"] - exact["val/loss"]
        rows += [
            (f"{name}: speed relative to 32-true", f"{run[MEDIAN] / exact[MEDIAN]:.2f}×"),
            (f"{name}: validation loss minus that of 32-true, nats", f"{difference:+.4f}"),
        ]
    return rows


def needs_spread(results: dict[str, Any]) -> bool:
    """Return whether precisions are compared without the difference of two seeds on this device."""
    return bool(against_float32(results)) and "val/loss" not in results.get(SECOND_SEED, {})


def figure(content: dict[str, Any]) -> Any:
    """Return a figure with the training speed of each candidate, one panel per batch size."""
    from minigpt.core.plots import COLOURS, INK, REFERENCE_COLOUR, new_figure

    groups = rates(content["results"], "speed")
    result = new_figure(8, 3.2, columns=max(1, len(groups)))
    for axes, (group, by_name) in zip(result.axes, groups.items(), strict=False):
        names = list(by_name)[::-1]
        ours = [COLOURS[0] if name.startswith("ours") else REFERENCE_COLOUR for name in names]
        axes.barh(names, [by_name[name] / 1e6 for name in names], color=ours)
        axes.set(xlabel=f"million tokens per second, {group.rpartition(' ')[2]} windows")
        axes.tick_params(labelsize=7)
    title = f"Training the medium model on {device(content)}"
    result.suptitle(title[:120], x=0.01, ha="left", fontsize=10, color=INK)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print the results of benchmarks/gpu.py.")
    parser.add_argument("json", type=Path, help="gpu.json of benchmarks/gpu.py")
    path = parser.parse_args(arguments).json
    content = json.loads(path.read_text(encoding="utf-8"))
    print(table(content))
    figure(content).savefig(path.with_suffix(".png"), dpi=160)


if __name__ == "__main__":
    main()
