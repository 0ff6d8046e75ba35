# Figures and documents: from JSON, by templates, and nothing else.
#   results/<run>/figures/               drawn from the JSON of the stages before; memory.json carries the profile
#   results/<run>/MODEL_CARD.md          the card, at the run's top
#   results/<run>/planner.html           what fits which GPU, as the plan traced it
#   results/<run>/docs/                  the memory profile (needs no weight and no training), the card's details, the article
#   results/<run>/report.html            all of it on one page
#   results/<run>/documents.json         each number in them, with the files and keys that it came from

# The trace's errors against published measurements (python -m validation.measurements --json), once they are there.
VALIDATION = [
    path for path in [project_file("validation/data/validation.json")] if os.path.exists(path)
]


rule draw_memory:
    input:
        profile=from_job(JobPaths.profile_comparisons),
        step=from_job(JobPaths.step_comparison),
        # Asked for here so that they are made again when they are missing; nobody else reads them.
        unread=from_job(JobPaths.unread_answers),
    output:
        drawn="results/{run}/figures/memory.json",
        memory=report(
            "results/{run}/figures/memory.png",
            caption="report/memory.rst",
            subcategory="{run}",
            category="Memory",
            labels={"figure": "Peak by component"},
        ),
        timeline=report(
            "results/{run}/figures/timeline.png",
            caption="report/timeline.rst",
            subcategory="{run}",
            category="Memory",
            labels={"figure": "One training step"},
        ),
    log:
        "logs/{run}/draw_memory.log",
    conda:
        "../envs/light.yaml"
    params:
        **code("documents/draw.py"),
        figures=from_job(lambda paths: {"scenarios": list(paths.profile())}),
    message:
        "Drawing the memory of {wildcards.run}"
    script:
        "../scripts/documents/draw.py"


FIGURES_OF_MEMORY = [rules.draw_memory.output.memory, rules.draw_memory.output.timeline]


use rule draw_memory as draw_figures with:
    input:
        curve="results/{run}/training.jsonl",
        training="results/{run}/training.json",
        comparison="results/{run}/evaluation/comparison.json",
    output:
        training_curve=report(
            "results/{run}/figures/training_curve.png",
            caption="report/training_curve.rst",
            subcategory="{run}",
            category="Training",
            labels={"figure": "Loss"},
        ),
        evaluation=report(
            "results/{run}/figures/evaluation.png",
            caption="report/evaluation.rst",
            subcategory="{run}",
            category="Evaluation",
            labels={"figure": "Base and tuned"},
        ),
    log:
        "logs/{run}/draw_figures.log",
    message:
        "Drawing training and evaluation of {wildcards.run}"


rule render_memory_profile:
    input:
        templates=[
            project_file(f"config/templates/{name}.j2")
            for name in ("memory-profile.md", "planner.html")
        ],
        macros=project_file("config/templates/macros.j2"),
        styles=project_file("dryfit/data/site/drawing.css"),
        collected="results/{run}/figures/memory.json",
        plan="results/{run}/memory/plan.json",
        validation=VALIDATION,
        figures=FIGURES_OF_MEMORY,
    output:
        "results/{run}/docs/memory-profile.md",
        report(
            "results/{run}/planner.html",
            caption="report/planner.rst",
            category="Memory",
            subcategory="{run}",
            labels={"figure": "What fits which GPU"},
        ),
        "results/{run}/docs/memory-profile.json",
    log:
        "logs/{run}/render_memory_profile.log",
    conda:
        "../envs/light.yaml"
    params:
        **code("documents/render.py"),
        settings=from_job(lambda paths: {"scenarios": list(paths.profile())}),
    message:
        "Writing the memory profile of {wildcards.run}, and what fits which GPU"
    script:
        "../scripts/documents/render.py"


use rule render_memory_profile as render_documents with:
    input:
        templates=[
            project_file(f"config/templates/{name}.j2")
            for name in ("MODEL_CARD.md", "details.md", "publication.md", "report.html")
        ],
        macros=project_file("config/templates/macros.j2"),
        others=rules.render_memory_profile.output,
        collected="results/{run}/record.json",
        validation=VALIDATION,
        record="results/{run}/provenance.json",
        figures=[*FIGURES_OF_MEMORY, *rules.draw_figures.output],
        # Asked for here so that they are made again when they are missing; nobody else reads them.
        unread=["results/{run}/summary.txt", "results/{run}/bill-of-materials.cdx.json"],
    output:
        report(
            "results/{run}/MODEL_CARD.md",
            caption="report/card.rst",
            category="Documents",
            subcategory="{run}",
            labels={"figure": "Model card"},
        ),
        "results/{run}/docs/details.md",
        "results/{run}/docs/publication.md",
        report(
            "results/{run}/report.html",
            caption="report/page.rst",
            category="Documents",
            subcategory="{run}",
            labels={"figure": "All on one page"},
        ),
        "results/{run}/documents.json",
    log:
        "logs/{run}/render_documents.log",
    params:
        **code("documents/render.py"),
        task=task_part("words"),
        settings=from_job(
            lambda paths: {
                "configuration": paths.settings,
                "dataset": paths.settings["dataset"]["name"],
                "run": paths.names["run"],
                "scenarios": list(paths.profile()),
            }
        ),
    message:
        "Writing the model card of {wildcards.run}, the article and the page"
