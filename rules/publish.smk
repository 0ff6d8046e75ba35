# What is published on the Hub, and never part of the default target.
#   results/<run>/publish/plan.json        every file of each repository with its size; cards/ beside it
#   results/<run>/publish/published.json   the commits that they became


rule prepare_publication:
    input:
        templates=[
            project_file(f"config/templates/{name}_CARD.md.j2") for name in ("ADAPTER", "DATASET")
        ],
        card="results/{run}/MODEL_CARD.md",
        documents="results/{run}/documents.json",
        acquire=path_of(f"{DATASET}/acquire.json"),
        description=path_of(f"{BASE}/description.json"),
        split=path_of(f"{DATASET}/splits/split.json"),
        splits=path_of(
            *(f"{DATASET}/splits/{name}.jsonl" for name in ("train", "validation", "test"))
        ),
        adapter="results/{run}/adapter/adapter_model.safetensors",
        settings="results/{run}/adapter/adapter_config.json",
        training="results/{run}/training.json",
        merged="results/{run}/merged",
        verification="results/{run}/merged-verification.json",
        comparison="results/{run}/evaluation/comparison.json",
    output:
        plan="results/{run}/publish/plan.json",
    log:
        "logs/{run}/prepare_publication.log",
    conda:
        "../envs/light.yaml"
    params:
        **code("publish/prepare.py"),
        task=task_part("words"),
        settings=from_job(
            lambda paths: {
                "about": {
                    "dataset": paths.settings["dataset"]["name"],
                    "model": {key: paths.settings["model"][key] for key in ("license", "title")},
                    "run": paths.names["run"],
                    "task": paths.settings["task"],
                },
                "publish": {key: value for key, value in PUBLISH.items() if key != "upload"},
            }
        ),
    message:
        "Listing what would be published of {wildcards.run}"
    script:
        "../scripts/publish/prepare.py"


rule upload_publication:
    input:
        plan="results/{run}/publish/plan.json",
    output:
        published="results/{run}/publish/published.json",
    log:
        "logs/{run}/upload_publication.log",
    conda:
        "../envs/light.yaml"
    params:
        **code("publish/upload.py"),
    message:
        "Publishing {wildcards.run}"
    script:
        "../scripts/publish/upload.py"
