"""Measuring a program's own updates: a real program on the CPU, a record in a file, a row of the own table."""

import json
import sys
from pathlib import Path

import pytest

from dryfit.ask import measure
from dryfit.ask.command import main
from dryfit.common.errors import UserError
from dryfit.evidence.measured import read

PROGRAM = """
import sys, torch
layer = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(layer.parameters())
for number in range(int(sys.argv[1])):
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
open("ended", "w").write("yes")
sys.exit(int(sys.argv[2]))
"""
# What canifinetune published of a run on an RTX 4080 (validation/data, canifinetune-08), in the recorder's form.
RECORD = {
    "form": 1,
    "platform": "win32",
    "versions": {
        "torch": "2.6.0",
        "transformers": "5.8.1",
        "peft": "0.19.1",
        "bitsandbytes": "0.49.2",
    },
    "device": {
        "name": "NVIDIA GeForce RTX 4080",
        "total_bytes": 17170956288,
        "capability": [8, 9],
        "beside_allocator_bytes": 400000000,
        "gpus": 1,
    },
    "updates": [
        {"seconds": seconds, "allocated_bytes": 3000347525, "reserved_bytes": 3120507453}
        for seconds in (None, 0.3419, 0.3419)
    ],
}
STEP = (
    "qwen2.5-coder-1.5b",
    "--method",
    "qlora",
    "-s",
    "512",
    "--set",
    "loop=manual",
    "--set",
    "platform=windows",
    "--set",
    "kbit_preparation=peft",
    "--set",
    "optimizer=paged_adamw_8bit",
    "--set",
    "keeps_outputs=true",
    "--set",
    "lora.target_modules=[q_proj, k_proj, v_proj, o_proj]",
)


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(PROGRAM)
    monkeypatch.setenv("DRYFIT_MEASURED", str(tmp_path / "own.csv"))
    return tmp_path / "own.csv"


def kept(record: object) -> str:
    Path("run.json").write_text(json.dumps(record))
    return "run.json"


@pytest.mark.thorough
def test_a_program_is_recorded_until_its_third_update_and_its_own_sitecustomize_still_runs(
    monkeypatch,
) -> None:
    Path("site").mkdir()
    Path("site/sitecustomize.py").write_text("open('custom', 'w').write('yes')")
    monkeypatch.setenv("PYTHONPATH", "site")
    record = measure.run([sys.executable, "train.py", "50", "0"])
    assert Path("custom").exists()
    assert len(record["updates"]) == 3 and not Path("ended").exists()
    assert record["updates"][0]["seconds"] is None and record["updates"][2]["seconds"] > 0
    assert record["device"] is None and record["versions"]["torch"]


@pytest.mark.thorough
@pytest.mark.parametrize(("updates", "status"), [(2, 7), (0, 0)])
def test_a_run_that_ends_before_its_third_update_is_refused(updates: int, status: int) -> None:
    with pytest.raises(UserError, match=rf"ended after {updates} update") as caught:
        main(
            ["measure", "smollm2-135m", "--", sys.executable, "train.py", str(updates), str(status)]
        )
    assert f"status was {status}" in str(caught.value) and Path("ended").exists()


@pytest.mark.thorough
def test_a_run_without_a_gpu_and_a_program_that_does_not_start_are_refused() -> None:
    with pytest.raises(UserError, match="used no GPU"):
        main(["measure", "smollm2-135m", "--", sys.executable, "train.py", "5", "0"])
    for size in (0, None):  # CUDA was there, and the program trained on the CPU
        updates = [{**one, "allocated_bytes": size} for one in RECORD["updates"]]
        with pytest.raises(UserError, match="used no GPU"):
            main(["compare", *STEP, "--measured", kept(RECORD | {"updates": updates})])
    for words, said in (([], "no program to run"), (["--", "./nothing"], "can't be started")):
        with pytest.raises(UserError, match=said):
            main(["measure", "smollm2-135m", *words])
    with pytest.raises(UserError, match=r"names a field"):
        main(["compare", "smollm2-135m", "--set", "lroa.rank=3", "--measured", kept(RECORD)])


def test_a_record_becomes_a_row_and_later_answers_name_it(own: Path, capsys) -> None:
    assert main(["compare", *STEP, "--measured", kept(RECORD)]) == 0
    out = capsys.readouterr().out
    assert "allocated" in out and "beside the allocator" in out and str(own) in out
    (row,) = read(own)
    assert (row.card, row.kinds.platform, row.torch) == ("rtx-4080", "windows", "2.6.0")
    assert (
        abs(row.allocated_error) < 0.005
        and row.step_seconds == 0.3419
        and row.time_error is not None
    )
    assert main([*STEP, "--gpu", "rtx-4080", "--json", "--fresh"]) == 0
    assert row.id in json.loads(capsys.readouterr().out)["evidence"]["rows"]


@pytest.mark.thorough
def test_what_the_card_held_beside_the_allocator_is_counted_when_it_is_written(capsys) -> None:
    main(["compare", *STEP, "--measured", kept(RECORD)])
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("write `gpu: ")
    )
    assert "`gpu: {name: rtx-4080, context_mib: 382}`" in line
    setting = line.partition('--gpu "')[2].partition('"')[0]
    assert main([*STEP, "--gpu", setting]) == 0
    assert " of 15.23 GiB, " in capsys.readouterr().out and "15.23 GiB are usable then" in line


@pytest.mark.thorough
def test_a_peak_that_was_larger_is_explained_and_fails(capsys) -> None:
    updates = [{**one, "allocated_bytes": 2 * one["allocated_bytes"]} for one in RECORD["updates"]]
    assert main(["compare", *STEP, "--measured", kept(RECORD | {"updates": updates})]) == 1
    assert "What would make as much" in capsys.readouterr().out


def test_what_is_no_record_is_refused() -> None:
    for content, said in (
        (RECORD | {"form": 2}, "Wrong value for form"),
        ([], "holds no keys"),
        ({**RECORD, "updates": RECORD["updates"][:2]}, "ended after 2 updates"),
        ({**RECORD, "updates": [{"seconds": 1}]}, "A key is missing"),
    ):
        with pytest.raises(UserError, match=said):
            main(["compare", *STEP, "--measured", kept(content)])
    Path("run.json").write_text("{")
    for name, said in (("run.json", "JSONDecodeError"), ("none.json", "isn't there")):
        with pytest.raises(UserError, match=said):
            main(["compare", *STEP, "--measured", name])
