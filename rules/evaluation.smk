# Base and tuned model answer the same held-out requests, with the same prompt and the same decoding.
#   results/evaluation/<dataset>/<model>/   the base model's answers: no rank in them
#   results/<run>/evaluation/               the tuned model's, and the comparison


rule evaluate_base:
    input:
        weights="results/models/{model}/weights.json",
        tokenizer="results/models/{model}/tokenizer.json",
        test="results/dataset/{dataset}/splits/test.jsonl",
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
    params:
        code=code("evaluation/evaluate.py"),
        evaluation=SETTINGS["evaluation"],
        prompt=SETTINGS["prompt"],
        device={"device": SETTINGS["training"]["device"]},
    message:
        "Evaluating the base model {wildcards.model}"
    script:
        "../scripts/evaluation/evaluate.py"


use rule evaluate_base as evaluate_tuned with:
    input:
        weights="results/{run}/merged/manifest.json",
        tokenizer=f"results/models/{MODEL}/tokenizer.json",
        test=f"results/dataset/{DATASET}/splits/test.jsonl",
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
        base=f"results/evaluation/{DATASET}/{MODEL}/answers.jsonl",
        tuned="results/{run}/evaluation/answers.jsonl",
        base_metrics=f"results/evaluation/{DATASET}/{MODEL}/metrics.json",
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
