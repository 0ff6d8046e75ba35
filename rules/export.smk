# The merged model for llama.cpp and Ollama; never part of the default target.
#   results/<run>/export/<type>/   model.gguf and its Modelfile; <type>: f32, f16, bf16, q8_0


rule export_gguf:
    input:
        merged="results/{run}/merged",
        # A model that did not pass is not handed on.
        verification="results/{run}/merged-verification.json",
    output:
        gguf="results/{run}/export/{type}/model.gguf",
        modelfile="results/{run}/export/{type}/Modelfile",
        report="results/{run}/export/{type}/export.json",
    log:
        "logs/{run}/export_gguf-{type}.log",
    benchmark:
        "benchmarks/{run}/export_gguf-{type}.tsv"
    wildcard_constraints:
        type="f32|f16|bf16|q8_0",
    conda:
        "../envs/torch.yaml"
    params:
        **code("export/export_gguf.py"),
        prompt=settings_section("prompt"),
    message:
        "Writing the merged model {wildcards.run} as GGUF, {wildcards.type}"
    script:
        "../scripts/export/export_gguf.py"
