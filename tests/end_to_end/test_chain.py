"""From raw data to the model card in this environment, and what each rule leaves behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dryfit.common.files import sha256_file
from tests.end_to_end import chain
from tests.end_to_end.chain import RUN, read


def test_every_job_left_its_outputs_and_a_log(finished: tuple[Path, str]) -> None:
    folder, output = finished
    rows = chain.summary(folder)
    assert {"train_adapter", "merge_adapter", "evaluate_base", "evaluate_tuned"} <= {
        row["rule"] for row in rows
    }
    assert {row["rule"] for row in rows} == chain.finished_rules(output)
    for row in rows:
        left = folder / row["output_file"]
        # Rows that were rejected, say, may be none; everything else has something in it.
        assert left.stat().st_size or left.suffix == ".jsonl", f"{row['rule']} left {left} empty"
        if left.suffix == ".json":
            json.loads(left.read_text(encoding="utf-8"))
        for path in row["log-file(s)"].split(","):
            text = (folder / path).read_text(encoding="utf-8")
            assert (
                f"rule {row['rule']}: python" in text and f"rule {row['rule']}: done in" in text
            ), f"{path}: {text}"


def test_a_second_run_does_nothing(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert chain.NOTHING in chain.snakemake(folder)


def test_the_base_was_trained_in_four_bits(finished: tuple[Path, str]) -> None:
    from safetensors.numpy import load_file

    folder, _ = finished
    report = read(folder, "training.json")
    assert report["steps"] == chain.SETTINGS["training"]["max_steps"]
    assert report["quantized"], report
    adapter = load_file(folder / RUN / "adapter" / "adapter_model.safetensors")
    # B starts as zeros: what is in it was learned.
    learned = {name: tensor for name, tensor in adapter.items() if "lora_B" in name}
    assert learned and all(tensor.any() for tensor in learned.values())
    assert {tensor.shape[1] for tensor in learned.values()} == {chain.SETTINGS["lora"]["rank"]}


def test_the_merged_model_loads_and_is_another(finished: tuple[Path, str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = finished
    (base,) = (folder / "results" / "models").glob("*/weights")
    merged = folder / RUN / "merged"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    request = [{"role": "user", "content": "List the files here."}]
    tokens = tokenizer.apply_chat_template(
        request, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(path)(**tokens).logits for path in (base, merged)
        ]
    assert logits[0].dtype == logits[1].dtype and logits[1].isfinite().all()
    assert not torch.equal(*logits)


def test_the_model_of_the_last_run_can_be_asked(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    command = [sys.executable, "-m", "scripts.try_model"]
    requests = "list the files here\n\nls \x07\n" + "x" * 10_000 + "\n"
    done = subprocess.run(
        command, cwd=folder, input=requests, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2  # for the two requests that can't be asked
    assert f"Asking {RUN}" in done.stderr
    assert done.stderr.count("This can't be asked") == 2
    assert len(done.stdout.splitlines()) >= 2
    assert "Traceback" not in done.stderr


def test_the_card_says_what_the_files_say(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    text = (folder / RUN / "MODEL_CARD.md").read_text(encoding="utf-8")
    _, metadata, body = text.split("---\n", 2)
    for name in ("details.md", "memory-profile.md"):
        body += (folder / RUN / "docs" / name).read_text(encoding="utf-8")
    assert {"license", "library_name", "pipeline_tag"} <= yaml.safe_load(metadata).keys()

    training, comparison = read(folder, "training.json"), read(folder, "evaluation/comparison.json")
    splits = read(folder, f"../dataset/{chain.SETTINGS['dataset']['name']}/splits/split.json")
    expected = {
        "requests compared": f"{comparison['n']} held-out requests",
        "loss of the base": f"{comparison['base']['loss']:.3f}",
        "loss of the tuned model": f"{comparison['tuned']['loss']:.3f}",
        "trainable parameters": f"{training['trainable_parameters']:,}",
        "validation loss": f"{training['validation_loss']:.3f}",
        "rows of that loss": f"on {chain.SETTINGS['training']['validation_rows']} validation rows",
        "rows to train on": f"{splits['sizes']['train']:,} for training",
        "digest of the adapter": sha256_file(
            folder / RUN / "adapter" / "adapter_model.safetensors"
        ),
    }
    compared = sorted((folder / RUN / "memory").glob("*/compare.json"))
    assert compared
    for path in compared:
        peak = json.loads(path.read_text(encoding="utf-8"))["trace"]["peak_allocated_bytes"]
        expected[f"traced peak of {path.parent.name}"] = f"{peak / 2**30:,.2f} GiB"
    missing = {what: figure for what, figure in expected.items() if figure not in body}
    assert not missing


def test_an_evaluation_was_priced_with_all_that_it_asks_at_once(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    priced = {row["stage"]: row["detail"] for row in read(folder, "memory/run.json")["stages"]}
    answers = (folder / RUN / "evaluation" / "answers.jsonl").read_text(
        encoding="utf-8"
    )  # tests, benchmark
    at_once = answers.count("\n") + read(folder, "evaluation/metrics.json")["refused_harmful"]["n"]
    assert priced["evaluation of base and tuned"].startswith(f"{at_once} requests at once")


def test_the_disk_was_computed_to_a_hundredth(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    needed_by = {
        row["stage"]: row
        for row in read(folder, "memory/run.json")["stages"]
        if row["place"] == "disk"
    }
    needed = sum(
        needed_by[name]["needs_bytes"] for name in ("merged model", "evaluation and documents")
    )
    files = [path for path in (folder / RUN).rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in files if "kept" not in path.parts)
    adapter = (folder / RUN / "adapter" / "adapter_model.safetensors").stat().st_size
    # Of the documents there is a bound; weights and tokenizer are what they are computed as.
    assert 0 <= needed + adapter - written < needed_by["evaluation and documents"]["needs_bytes"]
    merged = sum(path.stat().st_size for path in (folder / RUN / "merged").iterdir())
    assert needed_by["merged model"]["needs_bytes"] == pytest.approx(merged, rel=0.01)
    # What training takes at most: two checkpoints, each with the adapter, two states for each of its weights, and the
    # best adapter so far.
    assert needed_by["training"]["needs_bytes"] == pytest.approx(8 * adapter, rel=0.02)
