# Base and tuned model answer the same requests, asked in the same way: held-out ones of the data, and those of a test
# set from elsewhere.
#   results/evaluation/<dataset>/<model>/   the base model's answers and the baselines': no rank in them
#   results/<run>/evaluation/               the tuned model's, and the comparison; what merging changed


rule evaluate_base:
    input:
        weights="results/models/{model}/weights",
        split="results/dataset/{dataset}/splits/split.json",
        test="results/dataset/{dataset}/splits/test.jsonl",
        train="results/dataset/{dataset}/splits/train.jsonl",
        harmful="results/dataset/{dataset}/splits/harmful.jsonl",
        benchmark="results/dataset/{dataset}/splits/benchmark.jsonl",
        policy=from_job(JobPaths.policy, "scores"),
    output:
        answers="results/evaluation/{dataset}/{model}/answers.jsonl",
        nearest_row="results/evaluation/{dataset}/{model}/nearest_row.jsonl",
        few_shot="results/evaluation/{dataset}/{model}/few_shot.jsonl",
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
        **code("evaluation/evaluate.py"),
        task=task_part("scores"),
        evaluation=from_settings(run_scenarios.answer_settings),
        prompt=settings_section("prompt"),
        device=from_settings(lambda chosen: {"device": chosen["training"]["device"]}),
    message:
        "Evaluating the base model {wildcards.model} and the baselines"
    script:
        "../scripts/evaluation/evaluate.py"


use rule evaluate_base as evaluate_tuned with:
    input:
        weights="results/{run}/merged",
        split=path_of(f"{DATASET}/splits/split.json"),
        test=path_of(f"{DATASET}/splits/test.jsonl"),
        train=path_of(f"{DATASET}/splits/train.jsonl"),
        harmful=path_of(f"{DATASET}/splits/harmful.jsonl"),
        benchmark=path_of(f"{DATASET}/splits/benchmark.jsonl"),
        policy=from_job(JobPaths.policy, "scores"),
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
        nearest_row=path_of(f"{BASE_EVALUATION}/nearest_row.jsonl"),
        few_shot=path_of(f"{BASE_EVALUATION}/few_shot.jsonl"),
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
        **code("evaluation/compare.py"),
        task=task_part("scores"),
    message:
        "Comparing the tuned model with the base and the baselines on the same requests"
    script:
        "../scripts/evaluation/compare.py"


rule compare_merged:
    input:
        base=path_of(f"{BASE}/weights"),
        adapter="results/{run}/adapter/adapter_model.safetensors",
        settings="results/{run}/adapter/adapter_config.json",
        training="results/{run}/training.json",
        answers="results/{run}/evaluation/answers.jsonl",
        metrics="results/{run}/evaluation/metrics.json",
        policy=from_job(JobPaths.policy, "scores"),
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
        **code("evaluation/compare_merged.py"),
        task=task_part("scores"),
        asked=from_settings(lambda chosen: {"requests": chosen["merging"]["compare_requests"]}),
        device=from_settings(lambda chosen: {"device": chosen["training"]["device"]}),
    message:
        "Asking {wildcards.run} as it was trained, to see what merging changed"
    script:
        "../scripts/evaluation/compare_merged.py"
