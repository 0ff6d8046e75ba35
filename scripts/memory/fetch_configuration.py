"""Rule ``fetch_configuration``: the config.json of a model on the Hub, for a memory profile; no weight and no code."""

from typing import Any

from dryfit.common.files import read_json, write_json, write_report
from dryfit.common.terminal import log
from dryfit.scenario.hub import HubId, fetch_config
from dryfit.scenario.model import read_model
from scripts.common.job import job

WHERE = "memory.model in the configuration"


def main(model: str, config: str, fetched: str) -> None:
    """Fetch it, refuse what is no language model, and write down which commit it is of."""
    hub = HubId.read(model)
    path = fetch_config(hub, WHERE)
    content: Any = read_json(path)
    read_model(content, WHERE)
    write_json(config, content)
    commit = path.parent.name  # huggingface_hub's cache keeps a snapshot for each
    write_report(
        fetched,
        {"commit": commit, "repository": hub.name, "revision": hub.revision or "main"},
        config,
    )
    log.info("%s at %s", hub.name, commit)


if __name__ == "__main__":
    with job(snakemake):
        main(snakemake.params.model, snakemake.output.config, snakemake.output.fetched)
