"""Rule render_planner: the planner as a page, one file that works without a network.

A person picks model, method and GPU and drags length and micro-batch; will_it_fit/data/page/planner.js computes what is
shown from the data of :mod:`will_it_fit.planner.page_data`, and drawing.js, which the site's calculator has too, draws
it.
"""

import json
from collections.abc import Mapping
from typing import Any

from will_it_fit.data import data_path
from will_it_fit.engine.components import COLOURS

TEMPLATES = data_path("page")
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


def page(data: Mapping[str, Any]) -> str:
    """The page of some data, as one HTML file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    shown = {
        **data,
        "above": dict(zip(("title", "colour"), ABOVE, strict=True)),
        "groups": [{"name": name, "title": title, "colour": COLOURS[name]} for name, title in TITLES.items()],
    }
    made = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=False)
    return made.get_template("planner.html.j2").render(
        chosen=data["chosen"],
        data=_inside_script(shown),
        drawing=_template("drawing.js"),
        script=_template("planner.js"),
        styles=_template("drawing.css"),
    )


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _inside_script(value: Any) -> str:
    """JSON that can stand in an HTML script: nothing in it ends the element or begins a comment."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
