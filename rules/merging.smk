# The adapter merged into its unquantized base, and the proof that it was done right.
#   results/<run>/merged/                   a complete model folder; merged.json lists its files
#   results/<run>/merged-verification.json  which checks ran, which did not and why


rule merge_adapter:
    input:
        base=path_of(f"{BASE}/weights"),
        adapter="results/{run}/adapter/adapter_model.safetensors",
        settings="results/{run}/adapter/adapter_config.json",
        training="results/{run}/training.json",
    output:
        # A folder, since the number of shards is unknown until the base is there.
        merged=directory("results/{run}/merged"),
        manifest="results/{run}/merged.json",
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
        **code("merging/merge.py"),
        merge=from_settings(lambda chosen: {"dtype": chosen["merging"]["dtype"]}),
    message:
        "Merging the adapter {wildcards.run} into its base"
    script:
        "../scripts/merging/merge.py"


rule verify_merge:
    input:
        base=path_of(f"{BASE}/weights"),
        adapter="results/{run}/adapter/adapter_model.safetensors",
        settings="results/{run}/adapter/adapter_config.json",
        training="results/{run}/training.json",
        merged="results/{run}/merged",
        prompts=path_of(f"{DATASET}/splits/test.jsonl"),
        split=path_of(f"{DATASET}/splits/split.json"),
        weights=path_of(f"{BASE}/weights.json"),
        manifest="results/{run}/merged.json",
    output:
        report="results/{run}/merged-verification.json",
    log:
        "logs/{run}/verify_merge.log",
    benchmark:
        "benchmarks/{run}/verify_merge.tsv"
    conda:
        "../envs/torch.yaml"
    threads: THREADS
    resources:
        gpu=one_gpu,
        gpu_model=on_cluster("gres", needed_by_evaluation),
        slurm_partition=on_cluster("partition", needed_by_evaluation),
        mem_mb=8000,
        runtime=240,
    params:
        **code("merging/verify.py"),
        verify=from_settings(
            lambda chosen: {**chosen["merging"]["verify"], "system": chosen["prompt"]["system"]}
        ),
    message:
        "Comparing the merged model {wildcards.run} with base plus adapter"
    script:
        "../scripts/merging/verify.py"
