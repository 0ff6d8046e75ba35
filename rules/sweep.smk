# The runs of a sweep side by side. Every other rule makes one run, or what runs share.
#   results/<name>-sweep/sweep.json       a row for each run, the runs that no other beats, a recommendation if there is one
#   results/<name>-sweep/SWEEP.md . sweep.html . figures/ . documents.json (where each number came from)

SWEEP = f"results/{RUNS.name}-sweep"


rule summarize_sweep:
    input:
        metrics=each_run("results/{run}/evaluation/metrics.json"),
        answers=each_run("results/{run}/evaluation/answers.jsonl"),
        comparison=each_run("results/{run}/evaluation/comparison.json"),
        training=each_run("results/{run}/training.json"),
        adapter=each_run("results/{run}/adapter/adapter_model.safetensors"),
        memory=each_run("results/{run}/memory/training/compare.json"),
        gate=each_run("results/{run}/memory/training/gate.json"),
    output:
        summary=f"{SWEEP}/sweep.json",
    log:
        f"logs/{RUNS.name}-sweep/summarize_sweep.log",
    conda:
        "../envs/light.yaml"
    params:
        **code("sweep/summarize.py"),
        runs=RUNS.varied,
        base={"title": next(iter(RUNS.named.values()))["model"]["title"]},
    message:
        "Comparing the runs of the sweep"
    script:
        "../scripts/sweep/summarize.py"


rule draw_sweep:
    input:
        summary=f"{SWEEP}/sweep.json",
    output:
        **{
            name: report(f"{SWEEP}/figures/{name}.png", category="Sweep", labels={"figure": name})
            for name in ("loss", "exact", "memory", "time", "size", "trade")
        },
    log:
        f"logs/{RUNS.name}-sweep/draw_sweep.log",
    conda:
        "../envs/light.yaml"
    params:
        **code("sweep/draw.py"),
    message:
        "Drawing the runs of the sweep"
    script:
        "../scripts/sweep/draw.py"


rule render_sweep:
    input:
        templates=[
            project_file(f"config/templates/{name}.j2") for name in ("SWEEP.md", "sweep.html")
        ],
        summary=f"{SWEEP}/sweep.json",
        figures=rules.draw_sweep.output,
    output:
        f"{SWEEP}/SWEEP.md",
        report(f"{SWEEP}/sweep.html", category="Sweep", labels={"figure": "All on one page"}),
        f"{SWEEP}/documents.json",
    log:
        f"logs/{RUNS.name}-sweep/render_sweep.log",
    conda:
        "../envs/light.yaml"
    params:
        **code("sweep/render.py"),
    message:
        "Writing what the sweep came to"
    script:
        "../scripts/sweep/render.py"
