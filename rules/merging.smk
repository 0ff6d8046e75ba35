# The adapter merged into its unquantized base, and the proof that it was done right.
#   results/<run>/merged/                   a complete model folder; its manifest.json stands for all of it
#   results/<run>/merged-verification.json  which checks ran, which did not and why


rule merge_adapter:
    input:
        base=path_of(f"{BASE}/config.json"),
        description=path_of(f"{BASE}/description.json"),
        tokenizer=path_of(f"{BASE}/tokenizer.json"),
        weights=path_of(f"{BASE}/weights.json"),
        adapter="results/{run}/adapter/adapter_model.safetensors",
        settings="results/{run}/adapter/adapter_config.json",
        training="results/{run}/training.json",
    output:
        # The number of shards is unknown until the base is there, and directory() would leave Snakemake's own
        # time stamp inside the model. The manifest names every other file with its digest, and appears with them.
        manifest="results/{run}/merged/manifest.json",
        config="results/{run}/merged/config.json",
    log:
        "logs/{run}/merge_adapter.log",
    benchmark:
        "benchmarks/{run}/merge_adapter.tsv"
    priority: LONGEST
    conda:
        "../envs/torch.yaml"
    threads: THREADS
    resources:
        mem_mb=2000,
    params:
        code=code("merging/merge.py"),
        merge=from_settings(lambda chosen: {"dtype": chosen["merging"]["dtype"]}),
    message:
        "Merging the adapter {wildcards.run} into its base"
    script:
        "../scripts/merging/merge.py"


rule verify_merge:
    input:
        base=path_of(f"{BASE}/config.json"),
        description=path_of(f"{BASE}/description.json"),
        weights=path_of(f"{BASE}/weights.json"),
        adapter="results/{run}/adapter/adapter_model.safetensors",
        settings="results/{run}/adapter/adapter_config.json",
        training="results/{run}/training.json",
        manifest="results/{run}/merged/manifest.json",
        config="results/{run}/merged/config.json",
        prompts=path_of(f"{DATASET}/splits/test.jsonl"),
        split=path_of(f"{DATASET}/splits/split.json"),
    output:
        report="results/{run}/merged-verification.json",
    log:
        "logs/{run}/verify_merge.log",
    benchmark:
        "benchmarks/{run}/verify_merge.tsv"
    conda:
        "../envs/torch.yaml"
    threads: THREADS
    params:
        code=code("merging/verify.py"),
        verify=from_settings(lambda chosen: {**chosen["merging"]["verify"], "system": chosen["prompt"]["system"]}),
    message:
        "Comparing the merged model {wildcards.run} with base plus adapter"
    script:
        "../scripts/merging/verify.py"
