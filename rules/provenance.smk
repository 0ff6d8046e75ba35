# What each stage of a run reported, in one file for its documents; and where the run came from: what went in and what
# came out with digests, configuration, versions, machine, commit.
#   results/<run>/record.json . summary.txt
#   results/<run>/provenance.json . bill-of-materials.cdx.json (CycloneDX)


rule record_provenance:
    input:
        raw=path_of(f"{DATASET}/raw.jsonl"),
        acquire=path_of(f"{DATASET}/acquire.json"),
        clean=path_of(f"{DATASET}/clean.json"),
        screen=path_of(f"{DATASET}/screen.json"),
        split=path_of(f"{DATASET}/splits/split.json"),
        splits_check=path_of(f"{DATASET}/splits/check.json"),
        encode=path_of(f"{ENCODED}/encode.json"),
        description=path_of(f"{BASE}/description.json"),
        weights=path_of(f"{BASE}/weights.json"),
        profile=from_job(JobPaths.profile_comparisons),
        plan="results/{run}/memory/plan.json",
        training_memory="results/{run}/memory/training/compare.json",
        gate="results/{run}/memory/training/gate.json",
        resources="results/{run}/memory/run.json",
        adapter="results/{run}/adapter/adapter_model.safetensors",
        adapter_settings="results/{run}/adapter/adapter_config.json",
        curve="results/{run}/training.jsonl",
        training="results/{run}/training.json",
        manifest="results/{run}/merged.json",
        verification="results/{run}/merged-verification.json",
        comparison="results/{run}/evaluation/comparison.json",
        merging=from_job(JobPaths.merging_comparison),
        execution=from_job(JobPaths.by_execution, EXECUTE, PREFIXED),
        executed=from_job(JobPaths.more_evaluations, EXECUTE, PREFIXED),
        base_metrics=path_of(f"{BASE_EVALUATION}/metrics.json"),
        tuned_metrics="results/{run}/evaluation/metrics.json",
        base_answers=path_of(f"{BASE_EVALUATION}/answers.jsonl"),
        tuned_answers="results/{run}/evaluation/answers.jsonl",
        # Asked for here so that they are made again when they are missing; nobody else reads them.
        unread=from_job(JobPaths.unread_answers),
    output:
        record="results/{run}/record.json",
        summary=report(
            "results/{run}/summary.txt",
            caption="report/summary.rst",
            category="Result",
            subcategory="{run}",
            labels={"figure": "In a few lines"},
        ),
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
