# The answers to the benchmark's requests are run and judged: only where the command or the configuration asks for it.
# Any other command does not know this rule; a score that is there is then a file like any other, which no job makes.
#   results/<run>/evaluation/execution.json . execution.jsonl   how many did what was asked; what each did


rule execute_answers:
    input:
        **rules.compare_models.input,
        benchmark=path_of(f"{BENCHMARK}/benchmark.json"),
        tasks=path_of(f"{BENCHMARK}/tasks.jsonl"),
        states=path_of(f"{BENCHMARK}/states.json"),
        policy=from_job(JobPaths.policy),
    output:
        answers="results/{run}/evaluation/execution.jsonl",
        summary="results/{run}/evaluation/execution.json",
    log:
        "logs/{run}/execute_answers.log",
    benchmark:
        "benchmarks/{run}/execute_answers.tsv"
    conda:
        "../envs/light.yaml"
    threads: 5
    params:
        **code("tasks/shell/execution/execute.py"),
    message:
        "Running the answers of {wildcards.run} and of its base, sealed off"
    script:
        "../scripts/tasks/shell/execution/execute.py"
