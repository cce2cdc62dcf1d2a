"""The tables and the picture of a calibration, as a person sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nextlat_dist.calibration.observations import Observations
from nextlat_dist.inference.speculative.calibration import Calibration
from nextlat_dist.reporting.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def tables(calibration: Calibration, observed: Mapping[float, Observations], rows: list[dict[str, Any]]) -> str:
    """Costs by batch size, acceptance by position, and how well the predicted acceptance holds."""
    widths = sorted(next(iter(calibration.costs.verify.values())))
    kinds = {"greedy": calibration.costs}
    if calibration.sampled_costs is not None:
        kinds["sampled"] = calibration.sampled_costs
    elif all(entry.temperature for entry in calibration.acceptance):
        kinds = {"sampled": calibration.costs}
    lines = [
        {"kind": kind, "size": size, "plain": line[1]}
        | {"first": costs.begin[size] / line[1], "draft": costs.draft[size] / line[1]}
        | {f"v{width}": line[width] / line[1] for width in widths}
        for kind, costs in kinds.items()
        for size, line in costs.verify.items()
    ]
    columns = {
        "cycles": "{kind}",
        "batch": "{size}",
        "plain step": "{plain:.2f}",
        "draft c": "{draft:.3f}",
        "first +": "{first:.3f}",
    }
    cost_table = table(columns | {f"v({width})": f"{{v{width}:.2f}}" for width in widths if width > 1}, lines)
    sentences = []
    for entry in calibration.acceptance:
        shares = " ".join(f"{share:.2f}" for share in entry.by_position)
        w0, w1, w2 = entry.confidence
        sentences.append(
            f"temperature {entry.temperature:g}: {shares}; logit P = {w0:.2f} + {w1:.2f} logit(confidence) "
            f"{w2:+.2f} log(position), from {len(observed[entry.temperature].positions)} drafts"
        )
    columns = {
        "temperature": "{temperature:g}",
        "predicted": "{predicted:.3f}",
        "observed": "{observed:.3f}",
        "drafts": "{count}",
    }
    return "\n".join(
        [
            "Costs: the plain step in units of that at batch 1, the others in plain steps of the same batch",
            cost_table,
            "\nAcceptance by position, given that all before were accepted",
            *sentences,
            "\nReliability of P(accept) given the confidence",
            table(columns, rows),
        ]
    )


def draw_picture(calibration: Calibration, rows: list[dict[str, Any]]) -> Figure:
    """Acceptance by position, and predicted against observed acceptance; a line per temperature."""
    from nextlat_dist.reporting import pictures

    figure, (by_position, reliable) = pictures.panels(2, "Calibration of adaptive drafting")
    reliable.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle=":")
    for color, entry in zip(pictures.COLORS * len(calibration.acceptance), calibration.acceptance, strict=False):
        style: dict[str, Any] = {"color": color, "marker": "o", "markersize": 3.5, "linewidth": 1.3}
        label = f"temperature {entry.temperature:g}"
        by_position.plot(range(1, len(entry.by_position) + 1), entry.by_position, label=label, **style)
        groups = [row for row in rows if row["temperature"] == entry.temperature]
        reliable.plot([row["predicted"] for row in groups], [row["observed"] for row in groups], label=label, **style)
    by_position.set(xlabel="position of the draft", ylabel="accepted, given all before", ylim=(0, 1.03))
    reliable.set(xlabel="predicted P(accept)", ylabel="observed share", xlim=(0, 1.03), ylim=(0, 1.03))
    reliable.legend(fontsize=8)
    return figure
