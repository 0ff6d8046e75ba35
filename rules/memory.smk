# What the training step needs, known before it runs. Four answers for each scenario, then the gate.
#   results/memory/<model>/                config.json of a profiled model that is on the Hub and not in config/models/
#   results/memory/<model>/<scenario>/     full fine-tuning of the profiled model: no rank in it
#   results/<run>/memory/<scenario>/       scenarios with adapters of this rank
#   results/<run>/memory/training/         the run's own training step: also measured, and gated
# in each: trace.json . [measure.json] -> estimate.json . compare.json (-> gate.json)
#   results/<run>/memory/run.json          the whole run: every stage, what it needs and what there is


rule fetch_configuration:
    output:
        config="results/memory/{profiled}/config.json",
        fetched="results/memory/{profiled}/fetched.json",
    log:
        "logs/memory/{profiled}/fetch_configuration.log",
    wildcard_constraints:
        profiled=FOLDER_NAME,
    priority: FIRST
    conda:
        "../envs/light.yaml"
    resources:
        before_gate=1,
    params:
        **code("memory/fetch_configuration.py"),
        model=from_settings(lambda chosen: chosen["memory"]["model"]),
    message:
        "Fetching the config.json of {params.model} from the Hub"
    script:
        "../scripts/memory/fetch_configuration.py"


# One job makes all scenarios of the profile that have a rank, and another all that have none. A job for each would spend
# most of its time on importing PyTorch and transformers. The gate waits for neither.
if WITH_RANK:

    rule profile_adapters:
        input:
            config=from_job(JobPaths.profiled_config),
            description=from_job(JobPaths.profiled_description),
            gpus=project_file("config/gpus.yaml"),
        output:
            **profile_outputs("results/{run}/memory", WITH_RANK),
        log:
            "logs/{run}/memory/profile_adapters.log",
        benchmark:
            "benchmarks/{run}/memory/profile_adapters.tsv"
        conda:
            "../envs/torch.yaml"
        params:
            **code("memory/profile.py"),
            scenarios=from_job(JobPaths.scenarios_of_profile, True),
        message:
            "Profiling steps of {wildcards.run}: estimated, traced and compared"
        script:
            "../scripts/memory/profile.py"


if WITHOUT_RANK:

    rule profile_full:
        input:
            config=from_job(JobPaths.profiled_config),
            description=from_job(JobPaths.profiled_description),
            gpus=project_file("config/gpus.yaml"),
        output:
            **profile_outputs("results/memory/{profiled}", WITHOUT_RANK),
        log:
            "logs/memory/{profiled}/profile_full.log",
        benchmark:
            "benchmarks/memory/{profiled}/profile_full.tsv"
        wildcard_constraints:
            profiled=FOLDER_NAME,
        conda:
            "../envs/torch.yaml"
        params:
            **code("memory/profile.py"),
            scenarios=from_job(JobPaths.scenarios_of_profile, False),
        message:
            "Profiling full fine-tuning of {wildcards.profiled}: estimated, traced and compared"
        script:
            "../scripts/memory/profile.py"


# The scenario is training, the run's own step. For any other name that the profile lacks, the input function says so.
rule trace_memory:
    input:
        config=from_job(JobPaths.step_config),
        description=path_of(f"{BASE}/description.json"),
        gpus=project_file("config/gpus.yaml"),
    output:
        trace="results/{run}/memory/{scenario}/trace.json",
    log:
        "logs/{run}/memory/{scenario}/trace_memory.log",
    priority: FIRST
    conda:
        "../envs/torch.yaml"
    resources:
        before_gate=1,
    params:
        **code("memory/trace.py"),
        scenario=from_settings(run_scenarios.training_step_as_gated),
    message:
        "Tracing the training step of {wildcards.run} on the meta device"
    script:
        "../scripts/memory/trace.py"


rule measure_memory:
    input:
        trace="results/{run}/memory/training/trace.json",
    output:
        measure="results/{run}/memory/training/measure.json",
    log:
        "logs/{run}/memory/training/measure_memory.log",
    benchmark:
        "benchmarks/{run}/memory/training/measure_memory.tsv"
    conda:
        "../envs/torch.yaml"
    threads: THREADS
    resources:
        gpu=one_gpu,
        gpu_model=on_cluster("gres", needed_by_step),
        slurm_partition=on_cluster("partition", needed_by_step),
        runtime=30,
    params:
        **code("memory/measure.py"),
        scenario=from_settings(run_scenarios.measured_step),
        device=from_settings(lambda chosen: {"device": chosen["training"]["device"]}),
    message:
        "Measuring the training step of {wildcards.run} on this machine"
    script:
        "../scripts/memory/measure.py"


rule compare_memory:
    input:
        measure=of_one_process("results/{run}/memory/training/measure.json"),
        trace="results/{run}/memory/training/trace.json",
        gpus=project_file("config/gpus.yaml"),
    output:
        estimate="results/{run}/memory/training/estimate.json",
        comparison="results/{run}/memory/training/compare.json",
    log:
        "logs/{run}/memory/training/compare_memory.log",
    conda:
        "../envs/torch.yaml"
    params:
        **code("memory/compare.py"),
    message:
        "Comparing the answers for the training step of {wildcards.run}"
    script:
        "../scripts/memory/compare.py"


rule gate_memory:
    input:
        trace="results/{run}/memory/training/trace.json",
        encoded=path_of(f"{ENCODED}/encode.json"),
        train=path_of(f"{ENCODED}/train.parquet"),
        gpus=project_file("config/gpus.yaml"),
    output:
        gate="results/{run}/memory/training/gate.json",
    log:
        "logs/{run}/memory/training/gate_memory.log",
    # It may stop the run. After check_resources, which says the same of every stage.
    priority: FIRST - 1
    conda:
        "../envs/torch.yaml"
    resources:
        gpu=gpus_of_this_machine,
        before_gate=1,
    params:
        **code("gate/gate_memory.py"),
        gate=settings_section("memory", "gate"),
        loop=from_settings(run_scenarios.step_grouping),
        cluster=gpus_of_cluster,
    message:
        "Asking whether the training step of {wildcards.run} fits the GPU"
    script:
        "../scripts/gate/gate_memory.py"


# Not an input of training, or another batch size of the evaluation would train again. Still it comes before training:
# its inputs are ready as early, its priority is higher, and on one machine both wait for the same GPU.
rule check_resources:
    input:
        trace="results/{run}/memory/training/trace.json",
        config=path_of(f"{BASE}/config.json"),
        description=path_of(f"{BASE}/description.json"),
        tokenizer=path_of(f"{BASE}/tokenizer.json"),
        encoded=path_of(f"{ENCODED}/encode.json"),
        train=path_of(f"{ENCODED}/train.parquet"),
        split=path_of(f"{DATASET}/splits/split.json"),
        check=path_of(f"{DATASET}/splits/check.json"),
        test=path_of(f"{DATASET}/splits/test.jsonl"),
        trained=path_of(f"{DATASET}/splits/train.jsonl"),
        harmful=path_of(f"{DATASET}/splits/harmful.jsonl"),
        benchmark=path_of(f"{DATASET}/splits/benchmark.jsonl"),
        gpus=project_file("config/gpus.yaml"),
    output:
        resources="results/{run}/memory/run.json",
    log:
        "logs/{run}/memory/check_resources.log",
    benchmark:
        "benchmarks/{run}/memory/check_resources.tsv"
    priority: FIRST
    conda:
        "../envs/torch.yaml"
    resources:
        gpu=gpus_of_this_machine,
        before_gate=1,
    params:
        **code("gate/check_resources.py"),
        settings=from_settings(run_scenarios.resource_settings),
        cluster=gpus_of_cluster,
    message:
        "Checking every stage of {wildcards.run}: memory of GPU and host, disk"
    script:
        "../scripts/gate/check_resources.py"


rule plan_memory:
    input:
        config=from_job(JobPaths.profiled_config),
        description=from_job(JobPaths.profiled_description),
        gpus=project_file("config/gpus.yaml"),
    output:
        plan="results/{run}/memory/plan.json",
    log:
        "logs/{run}/memory/plan_memory.log",
    benchmark:
        "benchmarks/{run}/memory/plan_memory.tsv"
    conda:
        "../envs/torch.yaml"
    params:
        **code("memory/plan.py"),
        scenario=from_settings(run_scenarios.planned_step),
        several_gpus=from_settings(run_scenarios.sharded_scenarios),
    message:
        "Planning: what fits which GPU"
    script:
        "../scripts/memory/plan.py"
