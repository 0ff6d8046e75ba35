"""Rule render_planner: the planner as a page, one file that works without a network.

A person picks model, method and GPU and drags length and micro-batch; config/templates/planner.js computes what is
shown from the data of :mod:`scripts.planner.page_data`. The charts are described here, with Vega-Altair; their
scripts and all data are part of the file.
"""

import json
from collections.abc import Mapping
from typing import Any

from scripts.common.digests import ROOT
from scripts.common.files import read_report, write_text
from scripts.common.job import job, log
from scripts.engine.components import COLOURS

TEMPLATES = ROOT / "config" / "templates"
# Groups of components as the page calls them.
TITLES = {
    "parameters": "weights",
    "adapters": "adapters and their states",
    "gradients": "gradients",
    "optimizer_states": "optimizer states",
    "activations": "activations",
    "logits": "logits and loss",
    "several_gpus": "gathered weights, collectives",
    "temporaries": "temporaries",
    "overhead": "workspaces",
}
ABOVE = ("room the allocator needs", "#C9CED3")
FITS, FITS_NOT, INK = "#007A5A", "#D5551E", "#1D2730"
# Of a GPU: to half, to all of it, and beyond.
SHARES = ["#E6F4EF", "#8CCBB5", "#1F8F6F", "#F8DFD3", "#ECBDA8", "#DDA48B"]
LENGTH_TICKS = [2**n for n in range(6, 18)]
ROW_TICKS = [2**n for n in range(11)]


def charts() -> dict[str, dict[str, Any]]:
    """The charts as Vega-Lite, by the element that they go to; the page's script fills in their data."""
    return {name: chart.to_dict() for name, chart in (("parts", _parts()), ("border", _border()), ("cards", _cards()))}


def _finished(chart: Any) -> Any:
    return (
        chart.properties(width="container", autosize={"type": "fit-x", "contains": "padding"})
        .configure_view(stroke=None)
        .configure(font="system-ui, sans-serif", background="transparent")
        .configure_axis(labelColor="#66727D", titleColor="#66727D", titleFontWeight="normal", gridColor="#EEF1F4")
        .configure_legend(labelColor=INK, titleColor="#66727D", titleFontWeight="normal")
    )


def _parts() -> Any:
    """For one and for several GPUs a bar of what is alive at the peak on each, and a line where the GPU ends."""
    import altair as alt

    titles = [*((title, COLOURS[group]) for group, title in TITLES.items()), ABOVE]
    colour = alt.Scale(domain=[title for title, _ in titles], range=[hue for _, hue in titles])
    bar = (
        alt.Chart(alt.NamedData("parts"))
        .mark_bar(cursor="pointer", height=24, stroke="white", strokeWidth=0.5)
        .encode(
            x=alt.X("from:Q", title="GiB", axis=alt.Axis(tickCount=8), scale=alt.Scale(zero=True, nice=False)),
            x2="to:Q",
            y=alt.Y(
                "layout:N",
                title=None,
                sort=alt.EncodingSortField("row"),
                axis=alt.Axis(labelLimit=330, labelColor=INK),
            ),
            opacity=alt.condition("datum.chosen", alt.value(1), alt.value(0.45)),
            color=alt.Color("part:N", title=None, scale=colour, legend=alt.Legend(orient="bottom", columns=4)),
            tooltip=[
                alt.Tooltip("layout:N", title="GPUs"),
                alt.Tooltip("part:N", title="for"),
                alt.Tooltip("gib:Q", title="GiB", format=".2f"),
            ],
        )
    )
    limit = alt.Chart(alt.NamedData("limit")).encode(x="gib:Q")
    rule = limit.mark_rule(color=INK, strokeWidth=2, strokeDash=[5, 3])
    text = limit.mark_text(align="right", dx=-6, color=INK, fontWeight=600, fontSize=12)
    text = text.encode(text="text:N", y=alt.value(-8))
    return _finished(alt.layer(bar, rule, text).properties(height={"step": 34}))


def _border() -> Any:
    """Length against micro-batch, coloured by the share of the GPU; the border, and where the choice lies."""
    import altair as alt

    log2 = {"type": "log", "base": 2, "nice": False}
    x = alt.X(
        "length_from:Q",
        title="sequence length, tokens",
        scale=alt.Scale(**log2),
        axis=alt.Axis(values=LENGTH_TICKS, format=",d", grid=False),
    )
    y = alt.Y(
        "rows_from:Q",
        title="micro-batch, rows",
        scale=alt.Scale(**log2),
        axis=alt.Axis(values=ROW_TICKS, format=",d", grid=False),
    )
    share = alt.Color(
        "share:Q",
        title="share of the GPU",
        scale=alt.Scale(domain=[0.01, 0.5, 0.999, 1.001, 2, 4], range=SHARES, clamp=True),
        legend=alt.Legend(format="%", values=[0.01, 1, 2, 4], gradientLength=200),
    )
    cells = (
        alt.Chart(alt.NamedData("cells"))
        .mark_rect(cursor="pointer")
        .encode(
            x=x,
            x2="length_to:Q",
            y=y,
            y2="rows_to:Q",
            color=share,
            tooltip=[
                alt.Tooltip("length:Q", title="sequence length", format=",d"),
                alt.Tooltip("rows:Q", title="micro-batch", format=",d"),
                alt.Tooltip("gib:Q", title="GiB needed", format=".2f"),
                alt.Tooltip("verdict:N", title="on this GPU"),
            ],
        )
    )
    line = (
        alt.Chart(alt.NamedData("line"))
        .mark_line(color="black", strokeWidth=2.5, interpolate="step", clip=True)
        .encode(x="length:Q", y="rows:Q")
    )
    here = (
        alt.Chart(alt.NamedData("here"))
        .mark_point(shape="circle", size=170, filled=True, fill="white", stroke="black", strokeWidth=3, opacity=1)
        .encode(x="length:Q", y="rows:Q")
    )
    return _finished(alt.layer(cells, line, here).properties(height=360))


def _cards() -> Any:
    """A bar for each GPU, and a mark at what the step needs there."""
    import altair as alt

    y = alt.Y("title:N", sort=None, title=None, axis=alt.Axis(labelLimit=330, labelColor=INK))
    colour = alt.Color(
        "verdict:N",
        title=None,
        scale=alt.Scale(domain=["fits", "does not fit"], range=[FITS, FITS_NOT]),
        legend=alt.Legend(orient="top"),
    )
    base = alt.Chart(alt.NamedData("cards"))
    tooltip = [
        alt.Tooltip("title:N", title="GPU"),
        alt.Tooltip("usable:Q", title="GiB for the step", format=".2f"),
        alt.Tooltip("required:Q", title="GiB needed", format=".2f"),
        alt.Tooltip("headroom:Q", title="GiB to spare", format="+.2f"),
    ]
    bars = base.mark_bar(cursor="pointer", height=12).encode(
        x=alt.X("usable:Q", title="GiB"),
        y=y,
        color=colour,
        opacity=alt.condition("datum.chosen", alt.value(1), alt.value(0.42)),
        tooltip=tooltip,
    )
    marks = base.mark_tick(color=INK, thickness=2.5, size=17).encode(x="required:Q", y=y, tooltip=tooltip)
    texts = base.mark_text(align="left", dx=7, color="#66727D", fontSize=10.5).encode(x="end:Q", y=y, text="text:N")
    texts = texts.transform_calculate(end="max(datum.usable, datum.required)")
    return _finished(alt.layer(bars, marks, texts).properties(height={"step": 20}))


def page(data: Mapping[str, Any]) -> str:
    """The page of some data, as one HTML file."""
    import vl_convert
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    shown = {
        **data,
        "above_title": ABOVE[0],
        "groups": [{"name": name, "title": title} for name, title in TITLES.items()],
    }
    made = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=False)
    return made.get_template("planner.html.j2").render(
        bundle_version=vl_convert.__version__,
        charts=_inside_script(charts()),
        chosen=data["chosen"],
        data=_inside_script(shown),
        script=(TEMPLATES / "planner.js").read_text(encoding="utf-8"),
        vega=vl_convert.javascript_bundle(),
    )


def _inside_script(value: Any) -> str:
    """JSON that can stand in an HTML script: nothing in it ends the element or begins a comment."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def main(data: str, output: str) -> None:
    text = page(read_report(data))
    write_text(output, text)
    log.info("%s: %.1f MB", output, len(text) / 1e6)


if __name__ == "__main__":
    with job(snakemake):
        main(snakemake.input.planner, snakemake.output[0])
