# Where a run came from: what went in and what came out with digests, configuration, versions, machine, commit.
#   results/<run>/provenance.json . bill-of-materials.cdx.json (CycloneDX)


rule record_provenance:
    input:
        sources=path_of(
            f"{DATASET}/acquire.json",
            f"{DATASET}/raw.jsonl",
            f"{BASE}/description.json",
            f"{BASE}/weights.json",
        ),
        results=path_of(
            f"{DATASET}/splits/check.json",
            f"{ENCODED}/encode.json",
            f"{BASE_EVALUATION}/metrics.json",
            "results/{run}/memory/training/compare.json",
            "results/{run}/memory/training/gate.json",
            "results/{run}/adapter/adapter_config.json",
            "results/{run}/adapter/adapter_model.safetensors",
            "results/{run}/training.json",
            "results/{run}/training.jsonl",
            "results/{run}/merged.json",
            "results/{run}/merged-verification.json",
            "results/{run}/evaluation/answers.jsonl",
            "results/{run}/evaluation/comparison.json",
            "results/{run}/evaluation/metrics.json",
        ),
        on_request=from_job(JobPaths.more_evaluations, EXECUTE, PREFIXED),
        # Asked for here so that they are made again when they are missing; nobody else reads them.
        unread=from_job(JobPaths.unread_answers),
    output:
        provenance=report(
            "results/{run}/provenance.json",
            caption="report/provenance.rst",
            category="Documents",
            subcategory="{run}",
            labels={"figure": "Provenance"},
        ),
        materials="results/{run}/bill-of-materials.cdx.json",
    log:
        "logs/{run}/record_provenance.log",
    conda:
        "../envs/light.yaml"
    params:
        **code("provenance/record.py"),
        configuration=settings_of,
    message:
        "Recording where {wildcards.run} came from"
    script:
        "../scripts/provenance/record.py"
