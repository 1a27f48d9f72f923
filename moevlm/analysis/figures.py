"""The three routing figures, for any number of layers and experts.

Each function takes `RoutingStatistics` and returns a matplotlib Figure that belongs to no global state; `save_figures`
writes all of them. Colours: Okabe-Ito up to eight experts (safe for colour-blind readers), cividis beyond.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from moevlm.analysis.pathways import pca_curves, top_pathways
from moevlm.analysis.statistics import MODALITIES, RoutingStatistics
from moevlm.batch import Segment

DPI = 150
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#4D4D4D")
SEGMENT_COLOURS = {"image": "#E69F00", "system": "#C6DBEF", "question": "#6BAED6", "answer": "#08519C"}
PATH_COLOURS = (
    "#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499", "#888888",
)  # fmt: skip
GREY = "#555555"


def save_figures(statistics: RoutingStatistics, folder: str | Path, *, title: str = "") -> list[Path]:
    """Draw the three figures into `folder` as PNG and return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "expert_load": expert_load(statistics, title=title),
        "modality_distribution": modality_distribution(statistics, title=title),
        "token_pathways": token_pathways(statistics, title=title),
    }
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI)
    return paths


def expert_load(statistics: RoutingStatistics, *, title: str = "") -> Figure:
    """Share of choices each expert gets in each MoE layer: all tokens, image tokens, text tokens."""
    layers = statistics.layers
    panels = {
        "All tokens": [layer.load for layer in layers.values()],
        "Image tokens": [layer.load_by_modality["image"] for layer in layers.values()],
        "Text tokens": [layer.load_by_modality["text"] for layer in layers.values()],
    }
    stacked = len(layers) > 8
    rows, columns = (3, 1) if stacked else (1, 3)
    width = min(max(7.5, 0.55 * len(layers) + 2.5), 24) if stacked else 3 * max(2.4, 0.62 * len(layers) + 1) + 1.4
    figure = Figure(figsize=(width, 3.1 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axis, (name, loads) in zip(axes, panels.items()):
        _draw_load(axis, loads, list(layers))
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("decoder layer")
    for axis in axes if stacked else axes[:1]:
        axis.set_ylabel("share of expert choices")
    _experts_legend(figure, axes, max(layer.num_experts for layer in layers.values()), "even load")
    figure.suptitle(_with_title("Expert load per layer", title), fontsize=12)
    return figure


def modality_distribution(statistics: RoutingStatistics, *, title: str = "", max_panels: int = 8) -> Figure:
    """What each expert is fed: its choices by segment; beyond `max_panels` experts a heat map of the image share."""
    layers = statistics.layers
    num_experts = max(layer.num_experts for layer in layers.values())
    choices = np.sum([layer.choices.sum(axis=0) for layer in layers.values()], axis=0)
    image_share = choices[Segment.IMAGE] / max(choices.sum(), 1)
    if num_experts > max_panels:
        return _image_share_map(statistics, num_experts, float(image_share), title)
    columns = min(num_experts, 4)
    rows = -(-num_experts // columns)
    width = min(columns * max(2.2, 0.42 * len(layers) + 0.8) + 1.6, 24)
    figure = Figure(figsize=(width, 2.8 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    ticks = np.arange(len(layers))
    for expert, axis in enumerate(axes):
        if expert >= num_experts:
            axis.set_visible(False)
            continue
        shares = np.array([_row(layer.segments_of_expert, expert) for layer in layers.values()])
        bottom = np.zeros(len(layers))
        for segment, colour in zip(Segment, SEGMENT_COLOURS.values()):
            axis.bar(ticks, shares[:, segment], bottom=bottom, color=colour, width=0.8, edgecolor="white", lw=0.4)
            bottom += shares[:, segment]
        axis.axhline(image_share, color="black", ls="--", lw=1)
        axis.set_title(f"Expert {expert}", fontsize=10)
        _layer_axis(axis, list(layers))
        _percent_axis(axis)
    for index in range(0, rows * columns, columns):
        axes[index].set_ylabel("share of the expert's choices")
    figure.supxlabel("decoder layer", fontsize=10)
    patches = [Patch(color=colour, label=name) for name, colour in SEGMENT_COLOURS.items()]
    handles = [*patches, _dashes(f"image share\nof all choices\n({image_share:.0%})")]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(_with_title("Modalities per expert", title), fontsize=12)
    return figure


def token_pathways(statistics: RoutingStatistics, *, title: str = "", num_paths: int = 10) -> Figure:
    """The most travelled top-1 paths, counted (left), and the PCA view of the MoE-LLaVA paper (right), by modality."""
    layers = statistics.layers
    num_experts = [layer.num_experts for layer in layers.values()]
    width, height = min(max(4.2, 0.5 * len(layers) + 1.5), 11), min(max(3.0, 0.3 * max(num_experts) + 2.0), 7.5)
    figure = Figure(figsize=(2 * width + 3.0, 2 * height + 0.9), layout="constrained")
    axes = figure.subplots(2, 2, squeeze=False)
    for row, modality in enumerate(MODALITIES):
        counts = statistics.pathways[modality]
        total = sum(counts.values())
        top = top_pathways(counts, num_paths)
        shares = [count / total for _, count in top]
        labels = [_path_label(path, share) for (path, _), share in zip(top, shares)]
        _draw_paths(axes[row, 0], [path for path, _ in top], shares, labels, num_experts, list(layers))
        axes[row, 0].set_title(
            f"{modality.capitalize()}: top {len(top)} of {len(counts):,} paths\n"
            f"carry {sum(shares):.0%} of {total:,} tokens", fontsize=10,
        )  # fmt: skip
        curves = pca_curves(statistics.top1(modality), num_experts, num_paths)
        components = [f"component {index + 1}" for index in range(len(curves))]
        _draw_paths(axes[row, 1], curves, [0.1] * len(curves), components, num_experts, list(layers))
        axes[row, 1].set_title(
            f"{modality.capitalize()}: PCA of top-1 expert ids\n(ids as ordinals; no token need follow a curve)",
            fontsize=10,
        )
    figure.suptitle(_with_title("Token pathways", title), fontsize=12)
    return figure


def _draw_load(axis: Axes, loads: Sequence[np.ndarray], indices: Sequence[int]) -> None:
    """Stacked bars, one a layer; short dashes where the borders would be if every expert got the same."""
    width = 0.8
    num_colours = max(map(len, loads))
    for position, load in enumerate(loads):
        bottom = 0.0
        for expert, share in enumerate(load):
            colour = _expert_colour(expert, num_colours)
            axis.bar(position, share, bottom=bottom, color=colour, width=width, edgecolor="white", lw=0.4)
            if share >= 0.08 and len(loads) <= 16:
                box = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}  # over the dashes
                number = axis.text(position, bottom + share / 2, f"{share * 100:.0f}", ha="center", va="center")
                number.set(fontsize=7, color=_text_colour(colour), bbox=box)
            bottom += share
        borders = np.arange(1, len(load) if len(load) <= 16 else 1) / len(load)
        axis.hlines(borders, position - width / 2, position + width / 2, colors="black", ls="--", lw=0.9)
    _layer_axis(axis, indices)
    _percent_axis(axis)


def _image_share_map(statistics: RoutingStatistics, num_experts: int, expected: float, title: str) -> Figure:
    layers = statistics.layers
    grid = np.full((len(layers), num_experts), np.nan)
    for row, layer in enumerate(layers.values()):
        used = layer.choices.sum(axis=1) > 0
        grid[row, : layer.num_experts][used] = layer.segments_of_expert[used, Segment.IMAGE]
    size = (min(max(7.0, 0.22 * num_experts + 2), 24), max(3.0, 0.3 * len(layers) + 1.6))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    axis.set_facecolor("#DDDDDD")
    norm = matplotlib.colors.TwoSlopeNorm(vcenter=min(max(expected, 0.01), 0.99), vmin=0, vmax=1)
    picture = axis.imshow(grid, aspect="auto", cmap="PuOr_r", norm=norm, interpolation="nearest")
    axis.set_yticks(range(len(layers)), [str(index) for index in layers])
    axis.set(xlabel="expert (grey: never chosen, or not there)", ylabel="decoder layer")
    bar = figure.colorbar(picture, ax=axis, ticks=[0, expected, 1], shrink=0.9)
    bar.ax.set_yticklabels(["text only", f"as all choices ({expected:.0%})", "image only"], fontsize=8)
    figure.suptitle(_with_title("Image share of each expert's choices", title), fontsize=12)
    return figure


def _draw_paths(
    axis: Axes, paths: Sequence[Sequence[int]] | np.ndarray, weights: Sequence[float], labels: Sequence[str],
    num_experts: Sequence[int], indices: Sequence[int],
) -> None:  # fmt: skip
    """Paths as lines over the grid of (layer, expert), width by weight, side by side where they meet."""
    positions = np.arange(len(num_experts))
    for position, count in zip(positions, num_experts):
        size = 90 if max(num_experts) <= 16 else 15
        axis.scatter([position] * count, range(count), s=size, facecolor="white", edgecolor="#BBBBBB", lw=1, zorder=1)
    offsets = np.linspace(-0.26, 0.26, len(paths)) if len(paths) > 1 else np.zeros(1)
    largest = max(weights, default=1.0)
    for rank in reversed(range(len(paths))):  # the heaviest is drawn last, on top
        colour = PATH_COLOURS[rank % len(PATH_COLOURS)]
        heights = np.asarray(paths[rank]) + offsets[rank]
        width = 1.2 + 5.0 * weights[rank] / max(largest, 0.25)
        (line,) = axis.plot(positions, heights, color=colour, lw=width, alpha=0.85, zorder=3, label=labels[rank])
        line.set(marker="o", ms=3.5 + width / 2, solid_capstyle="round", solid_joinstyle="round")
    axis.set_yticks(range(0, max(num_experts), max(1, max(num_experts) // 16)))
    axis.set_ylim(max(num_experts) - 0.5, -0.5)
    axis.set(xlabel="decoder layer", ylabel="expert")
    _layer_axis(axis, indices)
    axis.grid(axis="y", color="#EEEEEE")
    axis.set_axisbelow(True)
    handles, names = axis.get_legend_handles_labels()
    if handles:
        legend = axis.legend(handles[::-1], names[::-1], frameon=False, fontsize=8)
        legend.set_loc("center left")
        legend.set_bbox_to_anchor((1.01, 0.5))
        for line in legend.get_lines():
            line.set(markersize=5, linewidth=2.5)
    else:
        axis.text(0.5, 0.5, "nothing to show", transform=axis.transAxes, ha="center", color=GREY)


def _path_label(path: Sequence[int], share: float) -> str:
    return f"{share:5.1%}  " + ("-".join(map(str, path)) if len(path) <= 8 else "")


def _layer_axis(axis: Axes, indices: Sequence[int]) -> None:
    step = max(1, -(-len(indices) // 24))
    axis.set_xticks(range(0, len(indices), step), [str(index) for index in indices[::step]])
    axis.set_xlim(-0.6, len(indices) - 0.4)
    axis.spines[["top", "right"]].set_visible(False)


def _percent_axis(axis: Axes) -> None:
    axis.set_ylim(0, 1)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def _experts_legend(figure: Figure, axes: Sequence[Axes] | np.ndarray, num_experts: int, dashes: str) -> None:
    if num_experts <= 16:
        patches = [Patch(color=_expert_colour(e, num_experts), label=f"expert {e}") for e in range(num_experts)]
        handles = [*patches[::-1], _dashes(dashes)]  # the last expert lies on top of its bar
        figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
        return
    norm = matplotlib.colors.Normalize(0, num_experts - 1)
    scale = matplotlib.cm.ScalarMappable(norm, matplotlib.colormaps["cividis"])
    figure.colorbar(scale, ax=list(axes), label=f"expert (dashes: {dashes})", shrink=0.8)


def _dashes(label: str) -> matplotlib.lines.Line2D:
    return matplotlib.lines.Line2D([], [], color="black", ls="--", lw=1, label=label)


def _expert_colour(expert: int, num_experts: int) -> str:
    if num_experts <= len(OKABE_ITO):
        return OKABE_ITO[expert]
    return matplotlib.colors.to_hex(matplotlib.colormaps["cividis"](expert / (num_experts - 1)))


def _text_colour(background: str) -> str:
    red, green, blue = matplotlib.colors.to_rgb(background)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _row(matrix: np.ndarray, index: int) -> np.ndarray:
    """Row `index`, or zeros where this layer has fewer experts."""
    return matrix[index] if index < len(matrix) else np.zeros(matrix.shape[1])


def _with_title(text: str, title: str) -> str:
    return f"{text}: {title}" if title else text
