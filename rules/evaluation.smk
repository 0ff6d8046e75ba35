# Base and tuned model answer the same requests, asked in the same way: held-out ones of the data, and in the folder
# benchmark/ those of a test set from elsewhere.
#   results/evaluation/<dataset>/<model>/   the base model's answers: no rank in them
#   results/<run>/evaluation/               the tuned model's, and the comparison; what merging changed


rule evaluate_base:
    input:
        weights="results/models/{model}/weights.json",
        tokenizer="results/models/{model}/tokenizer.json",
        description="results/models/{model}/description.json",
        split="results/dataset/{dataset}/splits/split.json",
        test="results/dataset/{dataset}/splits/test.jsonl",
        acquire="results/dataset/{dataset}/acquire.json",
        harmful="results/dataset/{dataset}/harmful.jsonl",
        policy=POLICY,
    output:
        answers="results/evaluation/{dataset}/{model}/answers.jsonl",
        metrics="results/evaluation/{dataset}/{model}/metrics.json",
    log:
        "logs/evaluation/{dataset}/{model}/evaluate_base.log",
    benchmark:
        "benchmarks/evaluation/{dataset}/{model}/evaluate_base.tsv"
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
        code=code("evaluation/evaluate.py"),
        evaluation=from_settings(answer_settings),
        prompt=settings_section("prompt"),
        device=from_settings(lambda chosen: {"device": chosen["training"]["device"]}),
    message:
        "Evaluating the base model {wildcards.model}"
    script:
        "../scripts/evaluation/evaluate.py"


use rule evaluate_base as evaluate_tuned with:
    input:
        weights="results/{run}/merged/manifest.json",
        tokenizer=path_of(f"{BASE}/tokenizer.json"),
        description=path_of(f"{BASE}/description.json"),
        split=path_of(f"{DATASET}/splits/split.json"),
        test=path_of(f"{DATASET}/splits/test.jsonl"),
        acquire=path_of(f"{DATASET}/acquire.json"),
        harmful=path_of(f"{DATASET}/harmful.jsonl"),
        policy=POLICY,
    output:
        answers="results/{run}/evaluation/answers.jsonl",
        metrics="results/{run}/evaluation/metrics.json",
    log:
        "logs/{run}/evaluate_tuned.log",
    benchmark:
        "benchmarks/{run}/evaluate_tuned.tsv"
    priority: LONGEST
    message:
        "Evaluating the tuned model {wildcards.run}"


rule compare_models:
    input:
        base=path_of(f"{BASE_EVALUATION}/answers.jsonl"),
        tuned="results/{run}/evaluation/answers.jsonl",
        base_metrics=path_of(f"{BASE_EVALUATION}/metrics.json"),
        tuned_metrics="results/{run}/evaluation/metrics.json",
    output:
        comparison="results/{run}/evaluation/comparison.json",
    log:
        "logs/{run}/compare_models.log",
    conda:
        "../envs/light.yaml"
    params:
        code=code("evaluation/compare.py"),
    message:
        "Comparing base and tuned model on the same requests"
    script:
        "../scripts/evaluation/compare.py"


use rule evaluate_base as evaluate_base_on_benchmark with:
    input:
        weights="results/models/{model}/weights.json",
        tokenizer="results/models/{model}/tokenizer.json",
        description="results/models/{model}/description.json",
        split=f"{BENCHMARK}/benchmark.json",
        test=f"{BENCHMARK}/tasks.jsonl",
        acquire="results/dataset/{dataset}/acquire.json",
        harmful="results/dataset/{dataset}/harmful.jsonl",
        policy=POLICY,
    output:
        answers="results/evaluation/{dataset}/{model}/benchmark/answers.jsonl",
        metrics="results/evaluation/{dataset}/{model}/benchmark/metrics.json",
    log:
        "logs/evaluation/{dataset}/{model}/evaluate_base_on_benchmark.log",
    benchmark:
        "benchmarks/evaluation/{dataset}/{model}/evaluate_base_on_benchmark.tsv"
    params:
        code=code("evaluation/evaluate.py"),
        evaluation=from_settings(lambda chosen: answer_settings(chosen, benchmark=True)),
        prompt=settings_section("prompt"),
        device=from_settings(lambda chosen: {"device": chosen["training"]["device"]}),
    message:
        "Evaluating the base model {wildcards.model} on the benchmark"


use rule evaluate_base_on_benchmark as evaluate_tuned_on_benchmark with:
    input:
        weights="results/{run}/merged/manifest.json",
        tokenizer=path_of(f"{BASE}/tokenizer.json"),
        description=path_of(f"{BASE}/description.json"),
        split=path_of(f"{BENCHMARK}/benchmark.json"),
        test=path_of(f"{BENCHMARK}/tasks.jsonl"),
        acquire=path_of(f"{DATASET}/acquire.json"),
        harmful=path_of(f"{DATASET}/harmful.jsonl"),
        policy=POLICY,
    output:
        answers="results/{run}/evaluation/benchmark/answers.jsonl",
        metrics="results/{run}/evaluation/benchmark/metrics.json",
    log:
        "logs/{run}/evaluate_tuned_on_benchmark.log",
    benchmark:
        "benchmarks/{run}/evaluate_tuned_on_benchmark.tsv"
    message:
        "Evaluating the tuned model {wildcards.run} on the benchmark"


use rule compare_models as compare_on_benchmark with:
    input:
        base=path_of(f"{BASE_EVALUATION}/benchmark/answers.jsonl"),
        tuned="results/{run}/evaluation/benchmark/answers.jsonl",
        base_metrics=path_of(f"{BASE_EVALUATION}/benchmark/metrics.json"),
        tuned_metrics="results/{run}/evaluation/benchmark/metrics.json",
    output:
        comparison="results/{run}/evaluation/benchmark/comparison.json",
    log:
        "logs/{run}/compare_on_benchmark.log",
    message:
        "Comparing base and tuned model on the benchmark"


rule compare_merged:
    input:
        description=path_of(f"{BASE}/description.json"),
        tokenizer=path_of(f"{BASE}/tokenizer.json"),
        weights=path_of(f"{BASE}/weights.json"),
        adapter="results/{run}/adapter/adapter_model.safetensors",
        settings="results/{run}/adapter/adapter_config.json",
        training="results/{run}/training.json",
        answers="results/{run}/evaluation/answers.jsonl",
        metrics="results/{run}/evaluation/metrics.json",
        policy=POLICY,
    output:
        answers="results/{run}/evaluation/as-trained.jsonl",
        comparison="results/{run}/evaluation/merging.json",
    log:
        "logs/{run}/compare_merged.log",
    benchmark:
        "benchmarks/{run}/compare_merged.tsv"
    priority: LONGEST
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
        code=code("evaluation/compare_merged.py"),
        asked=from_settings(lambda chosen: {"requests": chosen["merging"]["compare_requests"]}),
        device=from_settings(lambda chosen: {"device": chosen["training"]["device"]}),
    message:
        "Asking {wildcards.run} as it was trained, to see what merging changed"
    script:
        "../scripts/evaluation/compare_merged.py"
