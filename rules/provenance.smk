# What each stage of a run reported, in one file for its documents; and where the run came from: what went in and what
# came out with digests, configuration, versions, machine, commit.
#   results/<run>/record.json . summary.txt
#   results/<run>/provenance.json . bill-of-materials.cdx.json (CycloneDX)


rule record_provenance:
    input:
        # Carries the scenarios of the profile.
        drawn="results/{run}/figures/memory.json",
        plan="results/{run}/memory/plan.json",
        training_memory="results/{run}/memory/training/compare.json",
        gate="results/{run}/memory/training/gate.json",
        # Carries what was said of the data and the base model.
        resources="results/{run}/memory/run.json",
        # Carries what was said of the weights, the training and the merge.
        verification="results/{run}/merged-verification.json",
        comparison="results/{run}/evaluation/comparison.json",
        merging=from_job(JobPaths.merging_comparison),
        execution=from_job(JobPaths.by_execution, EXECUTE, PREFIXED),
        executed=from_job(JobPaths.more_evaluations, EXECUTE, PREFIXED),
        base_metrics=path_of(f"{BASE_EVALUATION}/metrics.json"),
        tuned_metrics="results/{run}/evaluation/metrics.json",
        base_answers=path_of(f"{BASE_EVALUATION}/answers.jsonl"),
        tuned_answers="results/{run}/evaluation/answers.jsonl",
        # Asked for here so that it is made again when it is missing; nobody else reads it.
        unread="results/{run}/memory/training/estimate.json",
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
