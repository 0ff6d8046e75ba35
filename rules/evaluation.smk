# Base and tuned model answer the same held-out requests, with the same prompt and the same decoding.
#   results/evaluation/<dataset>/<model>/   the base model's answers: no rank in them
#   results/<run>/evaluation/               the tuned model's, and the comparison


rule evaluate_base:
    input:
        weights="results/models/{model}/weights.json",
        tokenizer="results/models/{model}/tokenizer.json",
        description="results/models/{model}/description.json",
        split="results/dataset/{dataset}/splits/split.json",
        test="results/dataset/{dataset}/splits/test.jsonl",
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
    threads: 8
    resources:
        gpu=1,
        gpu_model=on_cluster("gres", needed_by_evaluation),
        slurm_partition=on_cluster("partition", needed_by_evaluation),
        mem_mb=8000,
        runtime=240,
    params:
        code=code("evaluation/evaluate.py"),
        evaluation=section("evaluation"),
        prompt=section("prompt"),
        device=of(lambda chosen: {"device": chosen["training"]["device"]}),
    message:
        "Evaluating the base model {wildcards.model}"
    script:
        "../scripts/evaluation/evaluate.py"


use rule evaluate_base as evaluate_tuned with:
    input:
        weights="results/{run}/merged/manifest.json",
        tokenizer=place(f"{BASE}/tokenizer.json"),
        description=place(f"{BASE}/description.json"),
        split=place(f"{DATASET}/splits/split.json"),
        test=place(f"{DATASET}/splits/test.jsonl"),
        policy=POLICY,
    output:
        answers="results/{run}/evaluation/answers.jsonl",
        metrics="results/{run}/evaluation/metrics.json",
    log:
        "logs/{run}/evaluate_tuned.log",
    benchmark:
        "benchmarks/{run}/evaluate_tuned.tsv"
    message:
        "Evaluating the tuned model {wildcards.run}"


rule compare_models:
    input:
        base=place(f"{BASE_EVALUATION}/answers.jsonl"),
        tuned="results/{run}/evaluation/answers.jsonl",
        base_metrics=place(f"{BASE_EVALUATION}/metrics.json"),
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
