"""The report of ``make bench``: headlines, tables and plots of all measured parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from tools.bench import analyzer, engine, sampling, scaling, server, stream
from tools.evaluation.measuring import machine_line

mpl.use("Agg")
import matplotlib.pyplot as plt

LABELS = {"idle": "idle server", "saturated": "under load"}
COLOURS = ("#8d99ae", "#30638e", "#d1495b", "#edae49", "#66a182", "#003d5b", "#b5838d")
# TorchServe's own explainer, from its source and not measured: pytorch/serve, ts/torch_handler/vision_handler.py and
# base_handler.py at 05c4c63.
TORCHSERVE = (
    "TorchServe's `explain` (`ts/torch_handler/vision_handler.py` at 05c4c63, from its source, not measured): "
    "`attribute(n_steps=15)` from the zero baseline, no other number possible; one target for the whole batch, that of "
    "its first request; JSON lists back."
)


def headlines(report: dict[str, Any]) -> Iterator[str]:
    """The main results, a sentence each."""
    if rows := report.get("throughput"):
        clients = max(row["clients"] for row in rows if row["clients"] in (4, 8, 32))
        base = next(row for row in rows if row["contender"] == server.PEER and row["clients"] == clients)
        for row, times in zip(rows, server.times_peer(rows)):
            if row["clients"] == clients and row is not base:
                yield (
                    f"`{row['contender']}`, {clients} clients: {times:.2f} times the explanations a second of "
                    f"{server.PEER}, with {row['bytes'] / base['bytes']:.0%} of the bytes on the wire."
                )
        if profile := report.get("engine", {}).get("profile"):
            most = profile["achieved_gflop_per_second"] / profile["gflop_per_row"] / server.N_STEPS
            yield (
                f"The engine alone, in one process, makes {most / base['per_second']:.2f} times as many explanations "
                f"of {server.N_STEPS} steps a second as the peer at {clients} clients."
            )
    if accuracy := report.get("accuracy"):
        errors_by_name = (f"{name} {np.median(errors):.4f}" for name, errors in accuracy.items())
        yield f"Their relative errors, medians of {len(accuracy[server.PEER])} images: {'; '.join(errors_by_name)}."
    for name, seconds in report.get("isolation", {}).items():
        idle, loaded = (1e3 * np.percentile(seconds[key], 95) for key in ("idle", "saturated"))
        yield f"p95 of {name}: {loaded:.0f} ms, {loaded / idle:.2f} times its idle {idle:.0f} ms."
    if shares := report.get("shares"):
        outside = shares["outside_networks_ms"]
        yield (
            f"Outside the two networks (decoding, transfers, queues, heatmap, PNG, wire) an explanation takes "
            f"{outside:.1f} ms; the classifier's forward pass {shares['shares_ms']['classifier']:.1f} ms."
        )
    if photographs := report.get("photographs"):
        typical = photographs["accurate"]["median_seconds"]
        yield (
            f"EfficientNet-Lite0 and photographs: `calibrated` with 20 steps is "
            f"{typical['captum'] / typical['calibrated, 20 steps']:.2f} times as fast as Captum's "
            f"{engine.ACCURATE_STEPS} steps as its examples call it."
        )
    if accurate := report.get("engine", {}).get("accurate"):
        typical = accurate["median_seconds"]
        yield (
            "Shapes: `calibrated` with 16 steps is "
            f"{typical['captum'] / typical['calibrated, 16 steps']:.2f} times as fast as Captum's "
            f"{engine.ACCURATE_STEPS} steps as its examples call it, which are less accurate."
        )
    if " beside " not in report["machine"]["hardware"]:
        yield "No figure here was measured on a GPU."


def cost_table(measured: dict[str, Any]) -> str:
    """A Markdown table of an explanation's arithmetic."""
    row = measured["profile"]["gflop_per_row"]
    lines = ["| steps | GFLOP | seconds | GFLOP/s |", "|---|---|---|---|"]
    for cell in measured["rows"]:
        seconds = cell["median_seconds"]["engine"]
        work = cell["n_steps"] * cell["batch"] * row
        lines.append(f"| {cell['n_steps']} | {work:.0f} | {seconds:.2f} | {work / seconds:.0f} |")
    lines += ["", f"A gradient, forward and backward, is {row:.2f} GFLOP."]
    return "\n".join(lines)


Section = tuple[str, str, Callable[[Any], str]]
SECTIONS: tuple[Section, ...] = (
    ("throughput", "Against FastAPI and Captum", lambda rows: f"{server.throughput_table(rows)}\n\n{TORCHSERVE}"),
    ("accuracy", "How exact these answers are", server.accuracy_table),
    ("isolation", "Beside saturated explanations", server.isolation_table),
    ("shares", "Where the time goes", scaling.shares_table),
    ("scaling", "Steps, batches, image sizes", scaling.scaling_table),
    ("photographs", "A real network and photographs: the engine against Captum", engine.table),
    (
        "engine",
        "The engine against Captum",
        lambda measured: f"{engine.table(measured)}\n\n{cost_table(measured)}",
    ),
    ("sampling", "Gradients against sampling", sampling.table),
    ("analyzer", "perf_analyzer", analyzer.table),
    ("stream", "A stream's first response", stream.table),
)


def markdown(report: dict[str, Any], pictures: dict[str, str]) -> str:
    """The whole report; ``pictures`` are files by the section they belong to."""
    lines = ["# Benchmarks", "", f"{_origin(report)}.", ""]
    lines += [f"- {line}" for line in headlines(report)]
    for name, title, table in SECTIONS:
        if name in report:
            lines += ["", f"## {title}", ""]
            origin = report["measured"][name]
            if origin["command"] != report["command"] or origin["machine"] != report["machine"]:
                lines += [f"*By {_origin(origin)}.*", ""]
            if name in pictures:
                lines += [f"![{title}]({pictures[name]})", ""]
            lines.append(table(report[name]))
    return "\n".join(lines) + "\n"


def _origin(measured: dict[str, Any]) -> str:
    """Command, duration and machine of a measurement."""
    return f"`{measured['command']}`, {measured['minutes']:.0f} minutes: {machine_line(measured['machine'])}"


def draw(report: dict[str, Any], folder: Path) -> dict[str, str]:
    """Draw the plots of the measured sections; returns section -> name of its file."""
    files = {}
    for name, plot in PLOTS.items():
        if name in report:
            figure = plot(report[name])
            figure.tight_layout()
            files[name] = f"{name}.png"
            figure.savefig(folder / files[name], dpi=110)
            plt.close(figure)
    return files


def _plot_throughput(rows: list[dict[str, Any]]) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    measured = {row["contender"] for row in rows}
    contenders = [name for name in (server.PEER, *server.CONTENDERS) if name in measured]
    counts = list(dict.fromkeys(row["clients"] for row in rows))
    width = 0.8 / len(contenders)
    for number, (contender, colour) in enumerate(zip(contenders, COLOURS)):
        bars = [row for row in rows if row["contender"] == contender]
        places = np.array([counts.index(row["clients"]) for row in bars]) + number * width
        axes[0].bar(places, [row["per_second"] for row in bars], width, color=colour, label=contender)
        medians = [np.median(row["seconds"]) for row in bars]
        highs = [np.percentile(row["seconds"], 95) for row in bars]
        axes[1].bar(places, medians, width, color=colour)
        axes[1].vlines(places, medians, highs, color="#333333", linewidth=1)
    axes[0].set(ylabel="explanations a second", xlabel="clients")
    axes[1].set(ylabel="seconds, median to 95 %", xlabel="clients", yscale="log")
    for axis in axes:
        axis.set_xticks(np.arange(len(counts)) + 0.4 - width / 2, map(str, counts))
        axis.grid(axis="y", alpha=0.3)
    axes[1].yaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
    axes[1].yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    axes[0].set_ylim(top=1.5 * max(row["per_second"] for row in rows))
    axes[0].legend(frameon=False, fontsize=7, loc="upper left")
    return figure


def _plot_isolation(isolation: dict[str, dict[str, list[float]]]) -> Figure:
    figure, axis = plt.subplots(figsize=(9, 0.9 + 0.8 * len(isolation)))
    for place, seconds in enumerate(isolation.values()):
        for offset, (key, colour) in enumerate((("idle", COLOURS[1]), ("saturated", COLOURS[2]))):
            value = 1e3 * np.percentile(seconds[key], 95)
            axis.barh(place + 0.35 * offset, value, 0.33, color=colour, label=LABELS[key] if not place else None)
            axis.annotate(
                f"{value:.0f} ms", (value, place + 0.35 * offset), (4, -3), textcoords="offset points", fontsize=8
            )
    axis.set(xscale="log", xlabel="p95, ms")
    axis.set_yticks(np.arange(len(isolation)) + 0.17, [name.replace("; ", ";\n") for name in isolation], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.legend(frameon=False, fontsize=8)
    return figure


def _plot_shares(measured: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(2, 1, figsize=(9, 2.6))
    shares = measured["shares_ms"]
    outside = {name: value for name, value in shares.items() if name != "gradients"}
    for axis, values, title in ((axes[0], shares, "all"), (axes[1], outside, "outside the gradients")):
        left = 0.0
        for name, colour in zip(shares, COLOURS):
            if name in values:
                axis.barh(0, values[name], left=left, color=colour, label=f"{name} {values[name]:.1f} ms")
                left += values[name]
        axis.set(yticks=[], xlim=(0, left), ylabel=title)
        axis.yaxis.label.set(rotation=0, ha="right", fontsize=8)
    axes[1].set_xlabel("ms")
    axes[0].legend(frameon=False, fontsize=7, ncol=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def _plot_scaling(seconds: dict[str, dict[Any, list[float]]]) -> Figure:
    figure, axes = plt.subplots(1, len(seconds), figsize=(11, 3.2))
    titles = {"steps": "steps", "batch": "images in a request", "side": "side of the image, pixels"}
    for axis, (kind, values) in zip(axes, seconds.items()):
        places = [int(value) for value in values]
        axis.plot(places, [1e3 * np.median(times) for times in values.values()], "o-", color=COLOURS[1])
        axis.set(xlabel=titles[kind], ylabel="ms, median", ylim=0)
        axis.grid(alpha=0.3)
    return figure


def _plot_sampling(measured: dict[str, Any]) -> Figure:
    maps = {name: values for name, values in measured["maps"].items() if name != "random"}
    random_area = np.mean(measured["maps"]["random"]["deletion"])
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.8 + 0.35 * len(maps)), sharey=True)
    colours = [COLOURS[2] if name.startswith("Integrated") else COLOURS[1] for name in maps]
    axes[0].barh(list(maps), [float(np.median(values["seconds"])) for values in maps.values()], color=colours)
    axes[0].set(xlabel="seconds an image")
    axes[1].barh(list(maps), [float(np.mean(values["deletion"])) for values in maps.values()], color=colours)
    axes[1].axvline(random_area, color="#666666", linestyle=":", label="random pixels")
    axes[1].set(xlabel="deletion area: lower is better")
    axes[1].legend(frameon=False, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].tick_params(axis="y", labelsize=8)
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
    return figure


PLOTS: dict[str, Callable[[Any], Figure]] = {
    "throughput": _plot_throughput,
    "isolation": _plot_isolation,
    "shares": _plot_shares,
    "scaling": _plot_scaling,
    "sampling": _plot_sampling,
}
